// Package undertest provides the program under test to the suites that run it.
package undertest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// Main runs the tests of m with *bin set to the program under test: PGHA_BIN, or
// one that is built for this run. It returns the exit status.
func Main(m *testing.M, bin *string) int {
	code, err := run(m, bin)
	if err != nil {
		fmt.Fprintln(os.Stderr, "prepare the program under test:", err)
		return 1
	}
	return code
}

func run(m *testing.M, bin *string) (code int, err error) {
	if given := os.Getenv("PGHA_BIN"); given != "" {
		if *bin, err = filepath.Abs(given); err != nil {
			return 0, fmt.Errorf("find PGHA_BIN: %w", err)
		}
		return m.Run(), nil
	}
	dir, err := os.MkdirTemp("", "pgha-test-")
	if err != nil {
		return 0, fmt.Errorf("make directory: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := os.Chmod(dir, 0o755); err != nil {
		return 0, fmt.Errorf("set mode of directory: %w", err)
	}
	*bin = filepath.Join(dir, "pgha")
	cmd := exec.Command("go", "build", "-trimpath", "-o", *bin, "pgha/cmd/pgha")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return 0, fmt.Errorf("build pgha: %w: %s", err, out)
	}
	return m.Run(), nil
}
