package node

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"path/filepath"
	"strconv"
)

// sameJSON tells whether two values have the same JSON form, which is what
// would be written of them.
func sameJSON(a, b any) bool {
	x, errX := json.Marshal(a)
	y, errY := json.Marshal(b)
	return errX == nil && errY == nil && bytes.Equal(x, y)
}

func parseLevel(s string) (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(s)); err != nil {
		return l, fmt.Errorf("%q is no level: use debug, info, warn or error", s)
	}
	return l, nil
}

// majorOf reads PostgreSQL's major version from the path of its programs,
// /usr/lib/postgresql/15/bin; 0 where the path does not say.
func majorOf(binDir string) int {
	n, err := strconv.Atoi(filepath.Base(filepath.Dir(binDir)))
	if err != nil {
		return 0
	}
	return n
}

func discardLog() *slog.Logger { return slog.New(slog.DiscardHandler) }
