package systemd_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/lab/testbed"
	"pgha/node"
)

// upgrades: a daemon that runs a program anew in its process is the unit's main
// process still, and a program that crashes or hangs on trial leaves the installed
// one to systemd.
func (j *journey) upgrades(t *testing.T) {
	ctx := within(t, 8*time.Minute)
	p, replica := j.primary(t)
	w := j.writer(t, p, replica)
	before, pid := children(ctx, t, p), show(ctx, t, p, "MainPID")
	enter(ctx, t, p, 0, "pgha", "upgrade", "--restart")
	waitHealthy(t, p)
	for property, want := range map[string]string{
		"MainPID": pid, "NRestarts": "0", "ActiveState": "active", "SubState": "running", "WatchdogUSec": "5s", "StatusText": "running",
	} {
		if got := show(ctx, t, p, property); got != want {
			t.Errorf("%s of the unit is %q after a restart in place, want %q", property, got, want)
		}
	}
	if d := cmp.Diff(before, children(ctx, t, p)); d != "" {
		t.Errorf("processes (-before +after):\n%s", d)
	}
	j.ack(t, w)

	for i, version := range []string{"v99.0.0", "v99.0.0-rc1"} { // the one crashes, the other hangs
		bad := filepath.Join(t.TempDir(), "pgha")
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-X main.version="+version, "-o", bad, "pgha/tests/day2/testdata/crash")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build %s: %v: %s", version, err, out)
		}
		if err := p.Copy(bad, "/root/"+version); err != nil {
			t.Fatal(err)
		}
		running := waitHealthy(t, p).Members[0].Version
		// The witness is the first.
		want := fmt.Sprintf("witness runs %s again, as %s has failed there", running, version)
		err := testbed.Until(ctx, "the upgrade to fail", func() error {
			out := enter(ctx, t, p, 1, "pgha", "upgrade", "--yes", "--allow-older", "--binary", "/root/"+version)
			switch {
			case strings.Contains(out, want):
				return nil
			case strings.Contains(out, "another operation is under way"): // the lock of the last one may outlive it
				return errors.New("there is a lock")
			}
			return testbed.Stop(fmt.Errorf("it does not say %q", want))
		})
		if err != nil {
			t.Fatal(err)
		}
		s := waitStatus(t, j.w, "the installed version on the witness", func(s node.Status) bool { return s.Health == node.Healthy })
		for _, m := range s.Members {
			if m.Version != running {
				t.Errorf("%s runs %s", m.Name, m.Version)
			}
		}
		if got, want := show(ctx, t, j.w, "NRestarts"), fmt.Sprint(i+1); got != want {
			t.Errorf("systemd has restarted the witness's daemon %s times, want %s", got, want)
		}
		if got := must(ctx, t, j.w, "sh", "-c", "readlink /proc/$(systemctl show --value --property=MainPID pgha)/exe"); got != program {
			t.Errorf("the witness runs %s", got)
		}
	}
	must(ctx, t, j.w, "journalctl", "-q", "-u", "pgha", "--grep", "Failed with result 'watchdog'")
	for _, f := range testbed.Failed(j.check(t, w)) {
		t.Errorf("a client saw an error at %s: %v", f.At.Format(time.TimeOnly), f.Err)
	}
}
