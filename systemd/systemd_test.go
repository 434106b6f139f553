package systemd

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
)

func TestUnitText(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	// systemd-analyze wants the binary to exist, and a path without surprises.
	bin := filepath.Join(t.TempDir(), "pgha")
	if err := os.Symlink(self, bin); err != nil {
		t.Fatal(err)
	}
	text, err := UnitText(bin)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(text), "ExecStart="+bin+" run\n") {
		t.Errorf("the unit does not start %s:\n%s", bin, text)
	}
	path := filepath.Join(t.TempDir(), UnitName)
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("systemd-analyze", "verify", "--man=no", path).CombinedOutput()
	if err != nil {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
	// It exits 0 on keys that it does not know, but speaks of them.
	if strings.Contains(string(out), UnitName) {
		t.Errorf("systemd-analyze verify complains:\n%s", out)
	}
}

func TestUnitTextRefusesPaths(t *testing.T) {
	for _, path := range []string{"", "pgha", "./pgha", "/opt/my apps/pgha", "/opt/%i/pgha", "/opt/$x", "/opt/../pgha", "/opt//pgha", "/pgha\nUser=x", "/pgha;"} {
		if _, err := UnitText(path); err == nil {
			t.Errorf("%q was accepted", path)
		}
	}
}

func TestNotify(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	t.Setenv("NOTIFY_SOCKET", socket)
	buf := make([]byte, 100)
	for want, notify := range map[string]func() error{
		"READY=1":                          NotifyReady,
		"STOPPING=1":                       NotifyStopping,
		"WATCHDOG=1":                       NotifyWatchdog,
		"STATUS=waiting for node2 to join": func() error { return NotifyStatus("waiting for node2 to join") },
	} {
		if err := notify(); err != nil {
			t.Fatal(err)
		}
		n, err := l.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		if got := string(buf[:n]); got != want {
			t.Errorf("sent %q, want %q", got, want)
		}
	}
	t.Setenv("NOTIFY_SOCKET", socket+".gone")
	if err := NotifyReady(); err == nil {
		t.Error("no error though nobody listens")
	}
	t.Setenv("NOTIFY_SOCKET", "")
	if err := NotifyReady(); err != nil {
		t.Errorf("without a service manager: %v", err)
	}
}

func TestWatchdogInterval(t *testing.T) {
	me := strconv.Itoa(os.Getpid())
	for _, tc := range []struct {
		usec, pid string
		want      time.Duration
	}{
		{"", "", 0}, {"10000000", "", 10 * time.Second}, {"10000000", me, 10 * time.Second},
		{"10000000", "1", 0}, {"soon", me, 0},
	} {
		t.Setenv("WATCHDOG_USEC", tc.usec)
		t.Setenv("WATCHDOG_PID", tc.pid)
		if got := WatchdogInterval(); got != tc.want {
			t.Errorf("WATCHDOG_USEC=%q WATCHDOG_PID=%q: %v, want %v", tc.usec, tc.pid, got, tc.want)
		}
	}
}

func TestDecideStop(t *testing.T) {
	ours := func(kind string) []dbus.JobStatus {
		return []dbus.JobStatus{{Unit: "other.service", JobType: "start"}, {Unit: UnitName, JobType: kind}}
	}
	for name, tc := range map[string]struct {
		system string
		jobs   []dbus.JobStatus
		want   StopReason
	}{
		"nothing known":          {"running", nil, Unknown},
		"another unit's job":     {"running", []dbus.JobStatus{{Unit: "other.service", JobType: "stop"}}, Unknown},
		"stop":                   {"running", ours("stop"), StopUnit},
		"stop, degraded":         {"degraded", ours("stop"), StopUnit},
		"restart":                {"running", ours("restart"), RestartUnit},
		"try-restart":            {"running", ours("try-restart"), RestartUnit},
		"start":                  {"starting", ours("start"), Unknown},
		"shutdown":               {"stopping", ours("stop"), Shutdown},
		"shutdown in a restart":  {"stopping", ours("restart"), Shutdown},
		"shutdown, jobs unknown": {"stopping", nil, Shutdown},
	} {
		if got := decideStop(tc.system, tc.jobs); got != tc.want {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// withoutSystemd covers what happens on a host that runs something else. It
// runs in a mount namespace where /run is empty.
func withoutSystemd(t *testing.T) {
	ctx := context.Background()
	if Available() {
		t.Fatal("systemd is available")
	}
	for name, do := range map[string]func() error{
		"Install":   func() error { return Install(ctx, "/usr/local/bin/pgha") },
		"Start":     func() error { return Start(ctx) },
		"Stop":      func() error { return Stop(ctx) },
		"Uninstall": func() error { return Uninstall(ctx) },
		"State":     func() error { _, err := State(ctx); return err },
	} {
		if err := do(); !errors.Is(err, ErrNoSystemd) {
			t.Errorf("%s: error is %v, want ErrNoSystemd", name, err)
		}
	}
	if got := WhyStopping(ctx); got != Unknown {
		t.Errorf("WhyStopping: %v", got)
	}
	state := filepath.Join(t.TempDir(), "units.json")
	if changes, err := Quiesce(ctx, state); changes != nil || err != nil {
		t.Errorf("Quiesce: %v, %v", changes, err)
	}
	if err := Restore(ctx, state); err != nil {
		t.Errorf("Restore: %v", err)
	}
	if _, err := os.Stat(UnitPath); err == nil {
		t.Error("a unit file was written")
	}
}
