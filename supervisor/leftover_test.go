package supervisor

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"pgha/internal/fsx"
	"pgha/internal/procstat"
)

const ticking = `i=0; while :; do i=$((i+1)); echo "tick $i"; sleep 0.05; done`

func TestAdoptionAfterTheSupervisorWasKilled(t *testing.T) {
	s := testSpec(t, ticking)
	dir := filepath.Dir(s.RunDir)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	sup := exec.Command(exe, "supervise", dir, ticking)
	sup.Stderr = os.Stderr
	if err := sup.Start(); err != nil {
		t.Fatal(err)
	}
	pid := 0
	waitFor(t, "the other supervisor's child", func() bool { pid, err = Lookup(s.RunDir, s.Name); return pid != 0 })
	// Until it has read something, it has not saved how far.
	waitFor(t, "its position", func() bool { _, err := os.Stat(s.file(".tail")); return err == nil })
	if err := sup.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = sup.Wait() // killed

	p, logs := started(t, s)
	st := p.Status()
	if st.State != Running || st.PID != pid || !st.Adopted || st.StartedAt.IsZero() {
		t.Fatalf("status %+v, want pid %d adopted", st, pid)
	}
	assertStates(t, p, Running)
	waitFor(t, "lines written after the adoption", func() bool { return len(logs.output()) >= 10 })
	first, n := 0, 0
	for i, line := range logs.output() {
		if _, err := fmt.Sscanf(line, "tick %d", &n); err != nil || i > 0 && n != first+i {
			t.Fatalf("line %d is %q after a first of %d: lines are missing", i, line, first)
		}
		if i == 0 {
			first = n
		}
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a new process", func() bool { st := p.Status(); return st.State == Running && st.PID != pid })
	st = p.Status()
	if st.Adopted || st.Restarts != 1 || st.LastExit == nil || st.LastExit.Known || len(st.LastExit.LastLog) == 0 {
		t.Errorf("status %+v, exit %+v", st, st.LastExit)
	}
	assertStates(t, p, Running, BackingOff, Starting, Running)
}

func TestDetachAndAdoptInTheSameProcess(t *testing.T) {
	s := testSpec(t, "trap 'exit 5' TERM; echo ready; "+forever)
	p, logs := started(t, s)
	waitOutput(t, logs, "ready")
	pid := p.Status().PID
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	if st := p.Status(); st.State != Stopped || st.PID != 0 || !isAlive(pid) {
		t.Fatalf("status after detach %+v, alive %v", st, isAlive(pid))
	}
	if got, err := Lookup(s.RunDir, s.Name); got != pid || err != nil {
		t.Errorf("lookup gives %d, %v; want %d", got, err, pid)
	}
	other, logs := newProcess(t, s)
	if ok, err := other.Adopt(t.Context()); !ok || err != nil || other.Status().PID != pid {
		t.Fatalf("adopt: %v, %v, %+v", ok, err, other.Status())
	}
	stop(t, other)
	// It is our own child still: its status is known and no zombie is left.
	if e := other.Status().LastExit; e == nil || !e.Known || e.Code != 5 {
		t.Errorf("exit %+v, want code 5", e)
	}
	if _, err := procstat.Read(pid); err == nil {
		t.Error("a zombie is left")
	}
	if slices.Contains(logs.output(), "ready") {
		t.Error("a line was logged twice across a detach")
	}
}

func TestZombieOfOursIsReaped(t *testing.T) {
	p, _ := started(t, testSpec(t, forever))
	pid := p.Status().PID
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "a zombie", func() bool { st, err := procstat.Read(pid); return err == nil && st.State == 'Z' })
	mustStart(t, p)
	if st := p.Status(); st.Adopted || st.PID == pid {
		t.Errorf("status %+v", st)
	}
	if _, err := procstat.Read(pid); err == nil {
		t.Error("the zombie is left")
	}
}

// stray starts a process that is not ours.
func stray(t *testing.T, env ...string) int {
	t.Helper()
	cmd := exec.Command("/bin/sleep", "600")
	cmd.Env = env
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return cmd.Process.Pid
}

func TestForeignProcessIsNeitherAdoptedNorTouched(t *testing.T) {
	boot, err := readBootID()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*pidFile){
		"pid was reused":       func(f *pidFile) { f.Start-- },
		"pid file of old boot": func(f *pidFile) { f.BootID = "00000000-0000-0000-0000-000000000000" },
		"no marker":            func(*pidFile) {},
		"not a pid":            func(f *pidFile) { f.PID = 0 },
	} {
		t.Run(name, func(t *testing.T) {
			s := testSpec(t, forever)
			pid := stray(t)
			st, err := procstat.Read(pid)
			if err != nil {
				t.Fatal(err)
			}
			p, _ := newProcess(t, s)
			hash, err := p.spec.hash()
			if err != nil {
				t.Fatal(err)
			}
			pf := pidFile{PID: pid, Start: st.Started, BootID: boot, Marker: s.Marker, ArgvHash: hash, Argv: []string{"/bin/sleep", "600"}}
			change(&pf)
			writePF(t, s, pf)
			if name != "no marker" {
				if got, err := Lookup(s.RunDir, s.Name); got != 0 || err != nil {
					t.Errorf("lookup gives %d, %v", got, err)
				}
			}
			mustStart(t, p)
			if st := p.Status(); st.State != Running || st.Adopted || st.PID == pid {
				t.Errorf("status %+v", st)
			}
			stop(t, p)
			if !isAlive(pid) {
				t.Error("a process that is not ours was killed")
			}
		})
	}
}

func writePF(t *testing.T, s Spec, v any) {
	t.Helper()
	if err := os.MkdirAll(s.RunDir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := fsx.WriteJSON(s.file(".pid"), v, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestOtherMarkerIsRefused(t *testing.T) {
	s := testSpec(t, forever)
	p, _ := started(t, s)
	pid := p.Status().PID
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	s.Marker += "-of-another-cluster"
	other, _ := newProcess(t, s)
	err := other.Start(t.Context())
	if err == nil || !strings.Contains(err.Error(), strconv.Itoa(pid)) || !strings.Contains(err.Error(), s.Marker) {
		t.Errorf("start: %v", err)
	}
	if !isAlive(pid) || other.Status().State != Stopped {
		t.Errorf("alive %v, state %v", isAlive(pid), other.Status().State)
	}
	mustStart(t, p) // adopts, so that the end of the test stops it
}

// crashWindow starts a child as a supervisor that dies before it writes the pid
// file.
func crashWindow(t *testing.T, s Spec) int {
	t.Helper()
	s, err := s.withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	out, err := openOutput(s)
	if err != nil {
		t.Fatal(err)
	}
	c, err := spawn(s, out)
	if err != nil {
		t.Fatal(err)
	}
	_ = out.Close()
	c.release()
	return c.pid
}

func TestCrashBeforeThePIDFileWasWritten(t *testing.T) {
	s := testSpec(t, forever)
	pid := crashWindow(t, s)
	writePF(t, s, "not what it should be")
	p, _ := started(t, s)
	if st := p.Status(); st.PID != pid || !st.Adopted {
		t.Errorf("status %+v, want pid %d adopted", st, pid)
	}
	if got, err := Lookup(s.RunDir, s.Name); got != pid || err != nil {
		t.Errorf("pid file after adoption gives %d, %v", got, err)
	}
}

func TestTwoLeftoversAreBothEnded(t *testing.T) {
	s := testSpec(t, forever)
	a, b := crashWindow(t, s), crashWindow(t, s)
	p, _ := started(t, s)
	st := waitState(t, p, Running)
	if st.PID == a || st.PID == b || isAlive(a) || isAlive(b) {
		t.Errorf("status %+v, %d alive %v, %d alive %v", st, a, isAlive(a), b, isAlive(b))
	}
	assertStates(t, p, Stopping, Stopping, Starting, Running)
}

func TestLeftoverWithAnotherConfigurationIsReplaced(t *testing.T) {
	for _, recorded := range []bool{true, false} {
		t.Run(fmt.Sprintf("recorded %v", recorded), func(t *testing.T) {
			s := testSpec(t, "trap 'echo asked to end; exit 0' USR1; trap '' TERM; echo ready; "+forever)
			old, logs := started(t, s)
			waitOutput(t, logs, "ready")
			pid := old.Status().PID
			if err := old.Detach(); err != nil {
				t.Fatal(err)
			}
			if !recorded {
				if err := os.Remove(s.file(".pid")); err != nil {
					t.Fatal(err)
				}
			}
			s.Args = []string{"-c", forever}
			s.ReplaceSignal = syscall.SIGUSR1
			p, logs := newProcess(t, s)
			if ok, err := p.Adopt(t.Context()); ok || err != nil || !isAlive(pid) {
				t.Fatalf("adopt of another configuration: %v, %v; alive %v", ok, err, isAlive(pid))
			}
			mustStart(t, p)
			st := waitState(t, p, Running)
			if st.PID == pid || st.Adopted || st.Restarts != 0 || isAlive(pid) {
				t.Errorf("status %+v, old process alive %v", st, isAlive(pid))
			}
			assertStates(t, p, Stopping, Starting, Running)
			waitOutput(t, logs, "asked to end")
		})
	}
}

func TestStopLeftover(t *testing.T) {
	s := testSpec(t, forever)
	p, _ := newProcess(t, s)
	if err := p.StopLeftover(t.Context()); err != nil || p.Status().State != Stopped {
		t.Fatalf("nothing left over: %v, %v", err, p.Status().State)
	}
	pid := crashWindow(t, s)
	if err := p.StopLeftover(t.Context()); err != nil || isAlive(pid) {
		t.Errorf("%v, alive %v", err, isAlive(pid))
	}
	waitFor(t, "the end of all its children", func() bool { return len(marked(t, s.Marker)) == 0 })
}

// A daemon that a child started in a session of its own carries our marker, and
// is none of our business.
func TestDaemonOfAChildIsLeftAlone(t *testing.T) {
	s := testSpec(t, `setsid sleep 600 & while :; do sleep 0.05; done`)
	s.KillGroup = true
	p, _ := started(t, s)
	pid, daemon := p.Status().PID, 0
	waitFor(t, "the daemon", func() bool {
		for _, m := range marked(t, s.Marker) {
			if st, err := procstat.Read(m); err == nil && st.Session == m && m != pid {
				if args, err := readCmdline(m); err == nil && slices.Equal(args, []string{"sleep", "600"}) {
					daemon = m
				}
			}
		}
		return daemon != 0
	})
	stop(t, p)
	if !isAlive(daemon) {
		t.Fatal("stop ended the daemon of the child")
	}
	s.Args = []string{"-c", forever}
	next, _ := started(t, s)
	if st := next.Status(); st.Adopted || st.PID == daemon {
		t.Errorf("status %+v", st)
	}
	if !isAlive(daemon) {
		t.Error("the scan ended the daemon of the child")
	}
}

func TestAdoptionOfAnotherUsersProcess(t *testing.T) {
	s := testSpec(t, forever)
	s.User, s.KillGroup = &User{UID: 12345, GID: 12345}, true
	p, _ := started(t, s)
	pid := p.Status().PID
	for _, file := range []string{"with", "without"} {
		if err := p.Detach(); err != nil {
			t.Fatal(err)
		}
		if file == "without" {
			if err := os.Remove(s.file(".pid")); err != nil {
				t.Fatal(err)
			}
		}
		mustStart(t, p)
		if st := p.Status(); st.PID != pid || !st.Adopted {
			t.Errorf("%s pid file: status %+v, want pid %d adopted", file, st, pid)
		}
	}
	if err := p.Detach(); err != nil {
		t.Fatal(err)
	}
	s.User = nil
	p, _ = started(t, s)
	if st := waitState(t, p, Running); st.PID == pid || isAlive(pid) {
		t.Errorf("process of the wrong user: status %+v, alive %v", st, isAlive(pid))
	}
}

// A helper of a child may be the same program in a session of its own.
func TestHelperOfALeftoverIsLeftAlone(t *testing.T) {
	s := testSpec(t, `setsid /bin/sh -c '`+forever+`' & echo ready; `+forever)
	pid := crashWindow(t, s)
	helper := 0
	waitFor(t, "the helper", func() bool {
		for _, m := range marked(t, s.Marker) {
			args, err := readCmdline(m)
			if st, serr := procstat.Read(m); err == nil && serr == nil && st.Session == m && m != pid && len(args) > 0 && args[0] == "/bin/sh" {
				helper = m
			}
		}
		return helper != 0
	})
	p, _ := started(t, s)
	if st := p.Status(); st.PID != pid || !st.Adopted {
		t.Errorf("status %+v, want pid %d adopted", st, pid)
	}
	if !isAlive(helper) {
		t.Error("the helper was ended")
	}
}

// A program behind "#!" has another argv[0] than its path, and one that executes
// itself again may add arguments.
func TestAdoptionOfAScriptThatReexecutesItself(t *testing.T) {
	s := testSpec(t, "")
	script := filepath.Join(t.TempDir(), "program")
	text := "#!/bin/sh\ntrap 'exec \"$0\" -f x -sf 99' USR2\necho \"started $*\"\n" + forever + "\n"
	if err := os.WriteFile(script, []byte(text), 0o755); err != nil {
		t.Fatal(err)
	}
	s.Path, s.Args = script, []string{"-f", "x"}
	p, logs := started(t, s)
	waitOutput(t, logs, "started -f x")
	pid := p.Status().PID
	if err := p.Signal(syscall.SIGUSR2); err != nil {
		t.Fatal(err)
	}
	waitOutput(t, logs, "started -f x -sf 99")
	for _, file := range []string{"with", "without"} {
		if err := p.Detach(); err != nil {
			t.Fatal(err)
		}
		if file == "without" {
			if err := os.Remove(s.file(".pid")); err != nil {
				t.Fatal(err)
			}
		}
		mustStart(t, p)
		if st := p.Status(); st.PID != pid || !st.Adopted {
			t.Errorf("%s pid file: status %+v, want pid %d adopted", file, st, pid)
		}
	}
}
