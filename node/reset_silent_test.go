package node

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
)

// TestStopSilentDaemon: a daemon that does not serve its socket yet is stopped
// too; its data must not be moved away under it.
func TestStopSilentDaemon(t *testing.T) {
	p := Paths{Run: t.TempDir()}
	if err := stopDaemon(t.Context(), p); err != nil {
		t.Errorf("without a daemon: %v", err)
	}
	cmd := exec.Command("flock", "--no-fork", p.lock(), "sleep", "600")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	until(t, "the lock is held", func() bool {
		unlock, err := lockDaemon(p)
		if err == nil {
			unlock()
		}
		return err != nil
	})
	if err := os.WriteFile(p.lock(), fmt.Appendln(nil, cmd.Process.Pid), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := stopDaemon(t.Context(), p); err != nil {
		t.Error(err)
	}
	if err := <-ended; err == nil {
		t.Error("it was not ended by a signal")
	}
}
