package systemd

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// The tests of what systemd does run on a real one: the test binary boots a
// container whose /usr is the host's and whose everything else is empty, and
// runs itself in there. The container has no network.
const (
	insideEnv  = "PGHA_TEST_INSIDE" // set in the container to the name of the test
	insideBin  = "/pgha-test"       // the test binary, as the container sees it
	insideDir  = "/pgha-out"        // shared with the host
	whyFile    = insideDir + "/why" // one line for each end of the daemon
	bootTime   = 5 * time.Minute
	insideTime = 2 * time.Minute
)

func TestMain(m *testing.M) {
	// Under the installed unit the test binary is the daemon.
	if len(os.Args) == 2 && os.Args[1] == "run" {
		if err := daemonMain(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	os.Exit(m.Run())
}

// daemonMain is a small pgha: it is ready, feeds the watchdog, and writes down
// why it was stopped.
func daemonMain() error {
	terminated := make(chan os.Signal, 1)
	signal.Notify(terminated, syscall.SIGTERM)
	if err := NotifyReady(); err != nil {
		return err
	}
	if err := NotifyStatus(fmt.Sprintf("watchdog every %v", WatchdogInterval())); err != nil {
		return err
	}
	tick := time.NewTicker(WatchdogInterval() / 2)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := NotifyWatchdog(); err != nil {
				return err
			}
		case <-terminated:
			ctx, cancel := context.WithTimeout(context.Background(), insideTime)
			defer cancel()
			f, err := os.OpenFile(whyFile, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintln(f, WhyStopping(ctx))
			return err
		}
	}
}

// TestBooted runs the tests of this file in the container.
func TestBooted(t *testing.T) {
	if os.Getenv(insideEnv) == t.Name() {
		inside(t)
		return
	}
	out := t.TempDir()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf("#!/bin/sh\n%s=%s exec %s -test.v -test.run '^%s$' >%s/log 2>&1\n",
		insideEnv, t.Name(), insideBin, t.Name(), insideDir)
	if err := os.WriteFile(filepath.Join(out, "main"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(context.Background(), bootTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "systemd-nspawn", "--quiet", "--directory=/", "--volatile=yes", "--boot",
		"--register=no", "--keep-unit", "--private-network", "--console=pipe",
		fmt.Sprintf("--machine=pgha-systemd-test-%d", os.Getpid()),
		"--bind-ro="+self+":"+insideBin, "--bind="+out+":"+insideDir,
		// There is no network to wait for.
		"systemd.mask=systemd-networkd-wait-online.service",
		"systemd.run="+insideDir+"/main", "systemd.run_success_action=exit", "systemd.run_failure_action=exit")
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 30 * time.Second
	console, err := cmd.CombinedOutput()
	log, logErr := os.ReadFile(filepath.Join(out, "log"))
	t.Logf("inside:\n%s", log)
	if err != nil || logErr != nil {
		t.Fatalf("container: %v, log: %v\n%s", err, logErr, tail(console, 4000))
	}
	if !bytes.Contains(log, []byte("--- PASS: "+t.Name())) {
		t.Error("the tests did not run in the container")
	}
	// The daemon that the tests leave running ends with the container.
	why, err := os.ReadFile(filepath.Join(out, filepath.Base(whyFile)))
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff("stop\nrestart\nunknown\nstop\nshutdown\n", string(why)); d != "" {
		t.Errorf("reasons for stopping (-want +got):\n%s", d)
	}
}

func tail(b []byte, n int) []byte { return b[max(0, len(b)-n):] }

// TestWithoutSystemd runs withoutSystemd where /run is empty, so that the
// result does not depend on what the host was booted with.
func TestWithoutSystemd(t *testing.T) {
	if os.Getenv(insideEnv) == t.Name() {
		withoutSystemd(t)
		return
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount -t tmpfs none /run && exec "$0" "$@"`,
		self, "-test.v", "-test.run", "^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), insideEnv+"="+t.Name())
	out, err := cmd.CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("--- PASS: "+t.Name())) {
		t.Errorf("%v\n%s", err, out)
	}
}

// inside is the part of TestBooted that runs in the container.
func inside(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), insideTime)
	defer cancel()
	if !Available() {
		t.Fatal("systemd is not available")
	}
	t.Run("Quiesce", func(t *testing.T) { insideQuiesce(ctx, t) })
	t.Run("Unit", func(t *testing.T) { insideUnit(ctx, t) })
}

func insideUnit(ctx context.Context, t *testing.T) {
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	state := func() UnitState {
		t.Helper()
		s, err := State(ctx)
		must(err)
		return s
	}
	if s := state(); s.LoadState != "not-found" {
		t.Errorf("before Install: %+v", s)
	}
	must(Uninstall(ctx))
	if err := Start(ctx); err == nil || !strings.Contains(err.Error(), "start pgha.service") {
		t.Errorf("start without a unit: %v", err)
	}
	must(Install(ctx, insideBin))
	must(Install(ctx, insideBin))
	if s := state(); s.LoadState != "loaded" || s.UnitFileState != "enabled" || s.ActiveState != "inactive" {
		t.Errorf("after Install: %+v", s)
	}
	must(Start(ctx))
	first := state()
	if first.ActiveState != "active" || first.SubState != "running" || first.MainPID == 0 || first.Result != "success" {
		t.Errorf("after Start: %+v", first)
	}
	eventually(t, "the status text", func() bool { return state().StatusText == "watchdog every 5s" })
	for _, dir := range []string{"/run/pgha", "/var/lib/pgha"} {
		if _, err := os.Stat(dir); err != nil {
			t.Error(err)
		}
	}
	must(Stop(ctx)) // writes "stop"
	if s := state(); s.ActiveState != "inactive" || s.MainPID != 0 {
		t.Errorf("after Stop: %+v", s)
	}
	must(Stop(ctx))
	if _, err := os.Stat("/run/pgha"); err != nil {
		t.Errorf("the runtime directory went with the unit: %v", err)
	}
	must(Start(ctx))
	systemctl(t, "restart", UnitName) // writes "restart"
	second := state()
	if second.MainPID == first.MainPID || second.ActiveState != "active" {
		t.Errorf("after restart: %+v", second)
	}
	// A kill by hand is no job, and the unit comes back by itself.
	must(syscall.Kill(second.MainPID, syscall.SIGTERM)) // writes "unknown"
	eventually(t, "the automatic restart", func() bool {
		s := state()
		return s.Restarts == 1 && s.ActiveState == "active" && s.MainPID != second.MainPID
	})
	must(Uninstall(ctx)) // writes "stop"
	if s := state(); s.LoadState != "not-found" || s.MainPID != 0 {
		t.Errorf("after Uninstall: %+v", s)
	}
	if _, err := os.Stat(UnitPath); err == nil {
		t.Error("the unit file is still there")
	}
	must(Install(ctx, insideBin))
	must(Start(ctx)) // left for the shutdown
}

func insideQuiesce(ctx context.Context, t *testing.T) {
	// Stand-ins below /run, which may be masked, and one that an administrator
	// has written, which may not.
	units := map[string]string{
		"/run/systemd/system/haproxy.service":     "enabled, running",
		"/run/systemd/system/patroni@.service":    "a template with a running instance",
		"/run/systemd/system/postgresql.service":  "disabled, not running",
		"/run/systemd/system/postgresql@.service": "a template without instances",
		"/etc/systemd/system/etcd.service":        "enabled, running, no way to mask it",
		"/run/systemd/system/patroni.service":     "masked by the administrator",
		"/run/systemd/system/unrelated.service":   "enabled, running, none of ours",
	}
	for path, description := range units {
		text := fmt.Sprintf("[Unit]\nDescription=%s\n[Service]\nExecStart=/usr/bin/sleep infinity\n"+
			"ExecStop=/usr/bin/touch %s/stopped-%%p\n[Install]\nWantedBy=multi-user.target\n", description, insideDir)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	systemctl(t, "daemon-reload")
	systemctl(t, "disable", "postgresql@.service")
	systemctl(t, "disable", "--now", "postgresql.service", "patroni.service")
	systemctl(t, "mask", "patroni.service")
	systemctl(t, "enable", "haproxy.service", "etcd.service", "unrelated.service")
	systemctl(t, "restart", "haproxy.service", "etcd.service", "unrelated.service", "patroni@a.service")

	names := []string{"haproxy.service", "patroni@a.service", "patroni@.service", "postgresql.service",
		"postgresql@.service", "etcd.service", "patroni.service", "unrelated.service"}
	snapshot := func() map[string]string {
		states := map[string]string{}
		for _, n := range names {
			enabled, _ := exec.Command("systemctl", "is-enabled", n).Output()
			active := []byte("-")
			if !strings.Contains(n, "@.") {
				active, _ = exec.Command("systemctl", "is-active", n).Output()
			}
			states[n] = strings.Join(strings.Fields(string(enabled)+" "+string(active)), " ")
		}
		return states
	}
	before := snapshot()
	t.Logf("before: %v", before)

	statePath := filepath.Join(t.TempDir(), "units.json")
	changes, err := Quiesce(ctx, statePath)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"haproxy.service": "masked inactive", "patroni@a.service": "masked inactive", "patroni@.service": "masked -",
		"postgresql.service": "masked inactive", "postgresql@.service": "masked -",
		"etcd.service": "disabled inactive", "patroni.service": "masked inactive", "unrelated.service": "enabled active",
	}
	if d := cmp.Diff(want, snapshot()); d != "" {
		t.Errorf("after Quiesce (-want +got):\n%s\nchanges: %+v", d, changes)
	}
	for _, unit := range []string{"haproxy", "patroni", "etcd"} {
		if _, err := os.Stat(filepath.Join(insideDir, "stopped-"+unit)); err != nil {
			t.Errorf("%s was not stopped by its own ExecStop: %v", unit, err)
		}
	}
	var recorded []UnitChange
	data, err := os.ReadFile(statePath)
	if err == nil {
		err = json.Unmarshal(data, &recorded)
	}
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(changes, recorded); d != "" {
		t.Errorf("record (-returned +recorded):\n%s", d)
	}
	// Again: there is nothing left to do, and the record stands.
	if again, err := Quiesce(ctx, statePath); err != nil || len(again) != 0 {
		t.Errorf("second Quiesce: %+v, %v", again, err)
	}
	// A unit that somebody starts again goes down again, and is not forgotten.
	systemctl(t, "enable", "--now", "etcd.service")
	if again, err := Quiesce(ctx, statePath); err != nil || len(again) != 1 || again[0].Unit != "etcd.service" {
		t.Errorf("third Quiesce: %+v, %v", again, err)
	}
	if d := cmp.Diff(want, snapshot()); d != "" {
		t.Errorf("after the third Quiesce (-want +got):\n%s", d)
	}

	for range 2 { // the second time there is no record
		if err := Restore(ctx, statePath); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, snapshot()); d != "" {
			t.Errorf("after Restore (-before +after):\n%s", d)
		}
	}
	if _, err := os.Stat(statePath); err == nil {
		t.Error("the record is still there")
	}

	changes, err = Quiesce(ctx, statePath, CompetingWitnessUnits()...)
	if err != nil || len(changes) != 1 || changes[0].Unit != "etcd.service" {
		t.Errorf("Quiesce on a witness: %+v, %v", changes, err)
	}
}

func systemctl(t *testing.T, args ...string) {
	t.Helper()
	if out, err := exec.Command("systemctl", args...).CombinedOutput(); err != nil {
		t.Fatalf("systemctl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
}

// eventually polls until ok, or fails the test after a generous time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting: %s", what)
		}
	}
}
