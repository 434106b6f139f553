package undertest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgha/lab/testbed"
)

// Bed makes an empty lab that ends with the test. When the test fails, the
// ends of all hosts' logs are shown.
func Bed(t *testing.T, bin string) *testbed.Bed {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgha-bed-")
	if err != nil {
		t.Fatal(err)
	}
	// PostgreSQL's user has to pass through it.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	bed, err := testbed.New(t.Context(), dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			showLogs(t, dir)
		}
		if err := errors.Join(bed.Close(), os.RemoveAll(dir)); err != nil {
			t.Errorf("clean up: %v", err)
		}
	})
	return bed
}

// showLogs prints the ends of every host's logs. Hosts keep their logs on disk,
// so those of a dead host are there too.
func showLogs(t *testing.T, dir string) {
	t.Helper()
	paths, err := filepath.Glob(filepath.Join(dir, "hosts", "*", "log", "pgha.log"))
	if err != nil {
		t.Errorf("find logs: %v", err)
	}
	errs, err := filepath.Glob(filepath.Join(dir, "*.err"))
	if err != nil {
		t.Errorf("find logs: %v", err)
	}
	for _, path := range append(errs, paths...) {
		data, err := os.ReadFile(path)
		if err != nil {
			t.Errorf("read log: %v", err)
			continue
		}
		lines := strings.Split(strings.TrimSpace(string(data)), "\n")
		t.Logf("the end of %s:\n%s", strings.TrimPrefix(path, dir), strings.Join(lines[max(0, len(lines)-60):], "\n"))
	}
}

// Within bounds one wait of a test, generously: it is there to end a test that
// hangs, not to measure.
func Within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("not within %s", d))
	t.Cleanup(cancel)
	return ctx
}
