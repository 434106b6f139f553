package patroni

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"pgha/assets"
)

// Launcher is a program in Python that starts a Patroni for which
// Version.NeedsLauncher is true, with the methods at fault replaced. It takes
// the path of the configuration file, and refuses to start Patroni when it
// cannot prove that the replacements work.
func Launcher() []byte { return assets.PatroniLauncher }

// PrePromote is a program in Python that asks the daemon whether PostgreSQL may
// be promoted: PROGRAM SOCKET SECONDS. It exits 0 only with the daemon's yes.
func PrePromote() []byte { return assets.PrePromote }

// Interpreter returns the Python that runs patroniBin, and its arguments.
func Interpreter(patroniBin string) (path string, args []string, err error) {
	data, err := os.ReadFile(patroniBin)
	if err != nil {
		return "", nil, fmt.Errorf("read %s: %w", patroniBin, err)
	}
	first, _, _ := strings.Cut(string(data), "\n")
	line, ok := strings.CutPrefix(first, "#!")
	words := strings.Fields(line)
	if !ok || len(words) == 0 {
		return "", nil, errors.New(patroniBin + " is no script: cannot tell which Python runs it")
	}
	return words[0], words[1:], nil
}
