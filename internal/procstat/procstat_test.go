package procstat

import (
	"errors"
	"io/fs"
	"os"
	"testing"
	"time"
)

func TestParse(t *testing.T) {
	st, err := parse([]byte("42 (a) b) (c) S 7 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456 9 9"))
	if err != nil || st != (Stat{'S', 7, 8, 9, 123456}) {
		t.Errorf("%+v, %v", st, err)
	}
	for _, bad := range []string{"", "42", "42 (a) S 1", "42 (a) S x 8 9 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 123456"} {
		if _, err := parse([]byte(bad)); err == nil {
			t.Errorf("no error for %q", bad)
		}
	}
}

func TestRead(t *testing.T) {
	own, err := Read(os.Getpid())
	if err != nil || own.Parent != os.Getppid() {
		t.Errorf("own status %+v, %v", own, err)
	}
	if since := time.Since(own.StartedAt()); since < 0 || since > 24*time.Hour {
		t.Errorf("started %s ago", since)
	}
	if _, err := Read(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no process: %v", err)
	}
}
