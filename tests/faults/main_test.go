package faults

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"pgha/lab"
)

// bin is the program under test: PGHA_BIN, or one that is built here.
var bin string

func TestMain(m *testing.M) {
	lab.MaybeInit()
	code, err := run(m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "faults:", err)
		code = 1
	}
	os.Exit(code)
}

func run(m *testing.M) (code int, err error) {
	if bin = os.Getenv("PGHA_BIN"); bin != "" {
		bin, err = filepath.Abs(bin)
		if err != nil {
			return 0, fmt.Errorf("find PGHA_BIN: %w", err)
		}
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "pgha-faults-")
	if err != nil {
		return 0, fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return 0, fmt.Errorf("set mode of directory: %w", err)
	}
	bin = filepath.Join(dir, "pgha")
	cmd := exec.Command("go", "build", "-trimpath", "-o", bin, "pgha/cmd/pgha")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build pgha: %w: %s", err, out)
	}
	return m.Run(), nil
}
