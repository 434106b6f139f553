package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/procstat"
)

func TestStopAsksFirst(t *testing.T) {
	p, logs := started(t, testSpec(t, "trap 'echo bye; exit 3' TERM; echo ready; "+forever))
	waitOutput(t, logs, "ready")
	pid := p.Status().PID
	stop(t, p)
	assertStates(t, p, Starting, Running, Stopping, Stopped)
	st := p.Status()
	if st.PID != 0 || st.LastExit == nil || !st.LastExit.Known || st.LastExit.Code != 3 || st.LastExit.PID != pid {
		t.Errorf("status after stop: %+v, exit %+v", st, st.LastExit)
	}
	if !logs.has("INFO worker/output: bye") {
		t.Errorf("last line of output is not in the log: %q", logs.output())
	}
	if _, err := os.Stat(p.spec.file(".pid")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("pid file after stop: %v", err)
	}
	stop(t, p) // idempotent
	assertStates(t, p, Starting, Running, Stopping, Stopped)
}

func TestStopKillsWhatIgnoresTERM(t *testing.T) {
	s := testSpec(t, "trap '' TERM; echo ready; "+forever)
	s.Grace = 100 * time.Millisecond
	p, logs := started(t, s)
	waitOutput(t, logs, "ready")
	stop(t, p)
	assertStates(t, p, Starting, Running, Stopping, Stopping, Stopped)
	if e := p.Status().LastExit; e == nil || e.Signal != syscall.SIGKILL || e.Code != -1 {
		t.Errorf("exit %+v, want by SIGKILL", e)
	}
}

func TestStopByKillDoesNotAsk(t *testing.T) {
	p, logs := started(t, testSpec(t, "trap 'echo asked; exit' TERM; echo ready; "+forever))
	waitOutput(t, logs, "ready")
	if err := p.StopBy(t.Context(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	assertStates(t, p, Starting, Running, Stopping, Stopped)
	if e := p.Status().LastExit; e == nil || e.Signal != syscall.SIGKILL || logs.has("INFO worker/output: asked") {
		t.Errorf("exit %+v, want by SIGKILL alone", e)
	}
}

func TestStopGoesOnAfterItsContext(t *testing.T) {
	p, logs := started(t, testSpec(t, "trap 'while [ ! -e "+filepath.Join(t.TempDir(), "never")+" ]; do sleep 0.05; done' TERM; echo ready; "+forever))
	waitOutput(t, logs, "ready")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := p.Stop(ctx); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "still stopping") {
		t.Fatalf("stop: %v", err)
	}
	if err := p.Start(t.Context()); !errors.Is(err, ErrStarted) {
		t.Errorf("start while stopping: %v", err)
	}
	if err := p.Kill("test"); err != nil {
		t.Fatal(err)
	}
	waitState(t, p, Stopped)
}

func TestStopOfAFrozenProcess(t *testing.T) {
	p, logs := started(t, testSpec(t, "echo ready; "+forever))
	waitOutput(t, logs, "ready")
	if err := p.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	stop(t, p)
	if e := p.Status().LastExit; e == nil || e.Signal != syscall.SIGTERM {
		t.Errorf("exit %+v, want by SIGTERM", e)
	}
}

func TestKillGroupLeavesNothing(t *testing.T) {
	for _, group := range []bool{true, false} {
		t.Run(fmt.Sprint(group), func(t *testing.T) {
			s := testSpec(t, `sh -c 'trap "" TERM; while :; do sleep 0.05; done' & echo $!; trap 'exit 0' TERM; echo ready; `+forever)
			s.KillGroup = group
			p, logs := started(t, s)
			waitOutput(t, logs, "ready")
			other, err := strconv.Atoi(logs.output()[0])
			if err != nil {
				t.Fatal(err)
			}
			stop(t, p)
			if isAlive(other) == group {
				t.Errorf("other member of the group alive: %v with KillGroup %v", !group, group)
			}
		})
	}
}

func TestExitIsRestartedUntilTheBudgetIsSpent(t *testing.T) {
	s := testSpec(t, "echo one; echo boom >&2; exit 3")
	s.Restart.Budget.Failures = 2
	s.Restart.Budget.HalfLife = time.Hour
	s.Restart.GiveUp = true
	p, _ := started(t, s)
	st := waitState(t, p, Failed)
	assertStates(t, p, Starting, Running, BackingOff, Starting, Running, BackingOff, Starting, Running, Failed)
	if want := "given up, more than 2 failures: exit code 3; last output: one | boom"; st.Reason != want {
		t.Errorf("reason %q, want %q", st.Reason, want)
	}
	if st.Restarts != 2 {
		t.Errorf("%d restarts, want 2", st.Restarts)
	}
	waitFor(t, "end of the loop", func() bool { return p.running() == nil })
	if err := p.Kill("x"); !errors.Is(err, ErrNotRunning) {
		t.Errorf("kill after giving up: %v", err)
	}
	mustStart(t, p) // a new start is a new budget
	waitState(t, p, Failed)
	stop(t, p)
	if st := p.Status(); st.State != Stopped {
		t.Errorf("state after stop: %v", st.State)
	}
}

func TestFailedIsTriedOn(t *testing.T) {
	flag := filepath.Join(t.TempDir(), "ok")
	s := testSpec(t, "[ -e "+flag+" ] || exit 1; "+forever)
	s.Restart.Budget = Budget{Failures: 1, HalfLife: time.Hour}
	p, _ := newProcess(t, s)
	ch, cancel := p.Subscribe()
	defer cancel()
	mustStart(t, p)
	for e := range ch {
		if e.To == Failed {
			break
		}
	}
	if err := os.WriteFile(flag, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a run that lasts", func() bool {
		st := p.Status()
		return st.State == Running && time.Since(st.Since) > 200*time.Millisecond
	})
}

func TestMissingProgram(t *testing.T) {
	s := testSpec(t, "")
	s.Path = "/nonexistent/program"
	s.Restart.Budget.Failures, s.Restart.GiveUp = 1, true
	p, _ := started(t, s)
	st := waitState(t, p, Failed)
	if !strings.Contains(st.Reason, "start /nonexistent/program: no such file") {
		t.Errorf("reason %q", st.Reason)
	}
	assertStates(t, p, Starting, BackingOff, Starting, Failed)
}

func TestVerdictStop(t *testing.T) {
	s := testSpec(t, "exit 7")
	s.Exit = func(e ExitStatus) Verdict {
		if e.Code == 7 {
			return VerdictStop("seven is final")
		}
		return VerdictRestart
	}
	p, _ := started(t, s)
	st := waitState(t, p, Failed)
	assertStates(t, p, Starting, Running, Failed)
	if st.Reason != "not restarted: seven is final (exit code 7)" {
		t.Errorf("reason %q", st.Reason)
	}
}

func TestBeforeIsRunAndShown(t *testing.T) {
	s := testSpec(t, forever)
	var calls atomic.Int32
	s.Before = func(context.Context) error {
		if calls.Add(1) == 1 {
			return errors.New("config is bad")
		}
		return nil
	}
	p, _ := started(t, s)
	waitState(t, p, Running)
	assertStates(t, p, Starting, BackingOff, Starting, Running)
	if r := p.Events()[1].Reason; !strings.Contains(r, "prepare: config is bad") {
		t.Errorf("reason %q", r)
	}
}

func TestStopInterruptsBefore(t *testing.T) {
	s := testSpec(t, forever)
	in := make(chan struct{})
	s.Before = func(ctx context.Context) error { close(in); <-ctx.Done(); return ctx.Err() }
	p, _ := started(t, s)
	<-in
	stop(t, p)
	assertStates(t, p, Starting, Stopping, Stopped)
}

func TestHungIsKilledAndRestarted(t *testing.T) {
	s := testSpec(t, forever)
	var hung atomic.Bool
	s.Health = func(ctx context.Context) error {
		if hung.Load() {
			<-ctx.Done()
		}
		return ctx.Err()
	}
	s.HealthEvery, s.HealthTimeout, s.HealthFailures = 5*time.Millisecond, 20*time.Millisecond, 2
	s.HealthGrace = time.Hour // ends with the first success
	p, _ := started(t, s)
	waitFor(t, "a healthy check", func() bool { h := p.Status().Health; return !h.Checked.IsZero() && h.Err == "" })
	pid := p.Status().PID
	hung.Store(true)
	waitFor(t, "another process", func() bool { st := p.Status(); return st.PID != 0 && st.PID != pid })
	if e := p.Events()[2]; e.To != BackingOff || !strings.Contains(e.Reason, "hung, was killed: 2 health checks failed in a row") {
		t.Errorf("event %+v", e)
	}
	if isAlive(pid) {
		t.Error("the hung process lives")
	}
}

func TestHealthGrace(t *testing.T) {
	s := testSpec(t, forever)
	var checks atomic.Int32
	s.Health = func(context.Context) error { checks.Add(1); return errors.New("not up yet") }
	s.HealthEvery, s.HealthFailures, s.HealthGrace = time.Millisecond, 1, time.Hour
	p, _ := started(t, s)
	waitFor(t, "some checks", func() bool { return checks.Load() > 5 })
	if st := p.Status(); st.State != Running || st.Health.Err != "not up yet" || st.Health.Since.IsZero() {
		t.Errorf("status %+v", st)
	}
	stop(t, p)
	assertStates(t, p, Starting, Running, Stopping, Stopped)
}

func TestKillRestartSignal(t *testing.T) {
	s := testSpec(t, "trap 'echo usr1' USR1; echo ready; "+forever)
	s.Restart.MinBackoff, s.Restart.MaxBackoff = time.Hour, time.Hour // neither may wait for it
	p, logs := started(t, s)
	waitOutput(t, logs, "ready")
	if err := p.Signal(syscall.SIGUSR1); err != nil {
		t.Fatal(err)
	}
	waitOutput(t, logs, "usr1")
	first := p.Status().PID
	if err := p.Kill("test"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "restart after kill", func() bool { st := p.Status(); return st.State == Running && st.PID != first })
	second := p.Status().PID
	if err := p.Restart(t.Context(), "new config"); err != nil {
		t.Fatal(err)
	}
	st := p.Status()
	if st.State != Running || st.PID == second || st.Restarts != 2 {
		t.Errorf("status after restart %+v", st)
	}
	assertStates(t, p, Starting, Running, Starting, Running, Stopping, Starting, Running)
	if ev := p.Events(); ev[2].Reason != "killed: test" || ev[4].Reason != "restart: new config" {
		t.Errorf("reasons %q and %q", ev[2].Reason, ev[4].Reason)
	}
	stop(t, p)
	if err := p.Signal(syscall.SIGUSR1); !errors.Is(err, ErrNotRunning) {
		t.Errorf("signal when stopped: %v", err)
	}
	if err := p.Restart(t.Context(), "from stopped"); err != nil || p.Status().State != Running {
		t.Errorf("restart of a stopped process: %v, %v", err, p.Status().State)
	}
}

func TestRestartTellsOfAFailedStart(t *testing.T) {
	s := testSpec(t, forever)
	var bad atomic.Bool
	s.Before = func(context.Context) error {
		if bad.Load() {
			return errors.New("config is bad")
		}
		return nil
	}
	p, _ := started(t, s)
	waitState(t, p, Running)
	bad.Store(true)
	if err := p.Restart(t.Context(), "test"); err == nil || !strings.Contains(err.Error(), "config is bad") {
		t.Errorf("restart: %v", err)
	}
}

func TestOnlyOneSupervisor(t *testing.T) {
	s := testSpec(t, forever)
	p, _ := started(t, s)
	if err := p.Start(t.Context()); !errors.Is(err, ErrStarted) {
		t.Errorf("second start: %v", err)
	}
	other, _ := newProcess(t, s)
	if err := other.Start(t.Context()); !errors.Is(err, ErrLocked) {
		t.Errorf("start of another supervisor: %v", err)
	}
	if st := p.Status(); st.State != Running {
		t.Errorf("state of the first: %v", st.State)
	}
}

func TestChildIsIndependentAndClean(t *testing.T) {
	for _, k := range []string{"NOTIFY_SOCKET", "SECRET_OF_PARENT"} {
		t.Setenv(k, "leaked")
	}
	s := testSpec(t, `echo "uid $(id -u) gid $(id -g) groups $(id -G)"; env; echo "nofile $(ulimit -n)"; echo ready; `+forever)
	s.Env = append(s.Env, "A=1", "NOTIFY_SOCKET=x", "WATCHDOG_USEC=1", "WATCHDOG_PID=1", "LISTEN_FDS=1", "INVOCATION_ID=x", "JOURNAL_STREAM=x", MarkerEnv+"=forged")
	s.User = &User{UID: 12345, GID: 23456, Groups: []uint32{34567, 45678}}
	s.Limits.NoFile = 777
	adj := 321
	s.OOMScoreAdj = &adj
	var before unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &before); err != nil {
		t.Fatal(err)
	}
	p, logs := started(t, s)
	waitOutput(t, logs, "ready")
	out := logs.output()
	for _, want := range []string{"uid 12345 gid 23456 groups 23456 34567 45678", "A=1", "nofile 777", MarkerEnv + "=" + s.Marker} {
		if !slices.Contains(out, want) {
			t.Errorf("no %q in %q", want, out)
		}
	}
	for _, line := range out {
		if k, _, ok := strings.Cut(line, "="); ok && !slices.Contains([]string{"A", "PATH", "PWD", "OLDPWD", "SHLVL", "_", MarkerEnv}, k) {
			t.Errorf("the child's environment has %q", line)
		}
	}
	pid := p.Status().PID
	st, err := procstat.Read(pid)
	if err != nil || st.Session != pid || st.Group != pid {
		t.Errorf("session %d and group %d of process %d, %v; want its own", st.Session, st.Group, pid, err)
	}
	if data, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", pid)); err != nil || strings.TrimSpace(string(data)) != "321" {
		t.Errorf("OOM score adjustment %q, %v", data, err)
	}
	for _, fd := range []string{"1", "2"} {
		if to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd)); err != nil || to != s.LogFile {
			t.Errorf("descriptor %s goes to %q, %v; want the log file", fd, to, err)
		}
	}
	var after unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &after); err != nil || after != before {
		t.Errorf("own limit of open files was %v and is %v, %v", before, after, err)
	}
}

func TestParseLine(t *testing.T) {
	s := testSpec(t, "echo 'E bad'; printf unfinished; exit 1")
	s.Restart.Budget.Failures, s.Restart.GiveUp = 1, true
	s.ParseLine = func(line string) (slog.Level, string) {
		if msg, ok := strings.CutPrefix(line, "E "); ok {
			return slog.LevelError, msg
		}
		return slog.LevelDebug, line
	}
	p, logs := started(t, s)
	waitState(t, p, Failed)
	for _, want := range []string{"ERROR worker/output: bad", "DEBUG worker/output: unfinished"} {
		if !logs.has(want) {
			t.Errorf("no %q in %q", want, logs.lines)
		}
	}
}

func TestLinesThatBelongTogether(t *testing.T) {
	s := testSpec(t, "printf 'one\ntwo\n more\n and more\nthree\n'; exit 1")
	s.Restart.Budget.Failures, s.Restart.GiveUp = 1, true
	s.Continues = func(lines []string, line string) bool { return lines[0] == "two" && line[0] == ' ' }
	s.ParseLine = func(text string) (slog.Level, string) {
		first, _, more := strings.Cut(text, "\n")
		if more {
			return slog.LevelWarn, first + "…"
		}
		return slog.LevelInfo, first
	}
	p, logs := started(t, s)
	waitState(t, p, Failed)
	for _, want := range []string{"INFO worker/output: one", "WARN worker/output: two…", "DEBUG worker/output: two\n more\n and more", "INFO worker/output: three"} {
		if !logs.has(want) {
			t.Errorf("no %q in %q", want, logs.output())
		}
	}
	if got := len(logs.output()); got%4 != 0 {
		t.Errorf("%d records of output, want four for each start: %q", got, logs.output())
	}
}

func TestWaitingSubscribersAndRing(t *testing.T) {
	p, _ := newProcess(t, testSpec(t, forever))
	ch, cancel := p.Subscribe()
	p.SetWaiting("for etcd")
	p.SetWaiting("for etcd")
	since := p.Status().Since
	p.SetWaiting("for the leader")
	if st := p.Status(); st.State != Waiting || st.Reason != "for the leader" || st.Since != since {
		t.Errorf("status %+v", st)
	}
	mustStart(t, p)
	p.SetWaiting("too late")
	stop(t, p)
	for _, want := range []State{Waiting, Waiting, Starting, Running, Stopping, Stopped} {
		if e := <-ch; e.To != want || e.Name != "worker" || e.At.IsZero() {
			t.Errorf("event %+v, want to %v", e, want)
		}
	}
	for i := range 2 * eventRing {
		p.SetWaiting(strconv.Itoa(i))
	}
	ev := p.Events()
	if len(ev) != eventRing || ev[len(ev)-1].Reason != strconv.Itoa(2*eventRing-1) {
		t.Errorf("%d events, last %+v", len(ev), ev[len(ev)-1])
	}
	var last Event
	cancel()
	cancel() // idempotent
	for e := range ch {
		last = e
	}
	if last != ev[len(ev)-1] {
		t.Errorf("a slow subscriber's last event is %+v, want the newest", last)
	}
}
