package kernel

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The test's own program is started again as a daemon that opens the gate. The
// variable says how.
const (
	childEnv = "PGHA_GATE_TEST_CHILD"
	// childOpens opens the gate for childTime, says so, and stays.
	childOpens = "opens"
	// childStops stops itself between computing what remains and sending it.
	childStops = "stops"

	childTime = 4 * time.Second
	childNS   = 3 // its file descriptor of the namespace
)

func TestMain(m *testing.M) {
	mode := os.Getenv(childEnv)
	if mode == "" {
		os.Exit(m.Run())
	}
	if err := child(mode); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(mode string) error {
	ctx := context.Background()
	k, err := New(slog.New(slog.DiscardHandler), testPort, InNetNS(childNS))
	if err != nil {
		return err
	}
	until := in(childTime)
	if mode == childStops {
		k.beforeSend = func() {
			// Another thread may be the one that takes the signal: this one must not
			// go on before the process has been stopped.
			continued := make(chan os.Signal, 1)
			signal.Notify(continued, unix.SIGCONT)
			fmt.Println("stopping, until", until.Wall)
			if err := unix.Kill(os.Getpid(), unix.SIGSTOP); err != nil {
				fmt.Println("stop:", err)
			}
			<-continued
		}
	}
	if err := k.Open(ctx, Owner, until); err != nil {
		return err
	}
	fmt.Println("open, until", until.Wall)
	if mode == childOpens {
		select {}
	}
	return nil
}

// startChild starts the daemon and waits for its first line.
func (h *host) startChild(mode, line string) (cmd *exec.Cmd, out *bufio.Reader, until time.Time) {
	h.t.Helper()
	cmd = exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childEnv+"="+mode)
	cmd.Stderr = h.t.Output()
	ns, err := unix.Dup(int(h.ns))
	must(h.t, err)
	f := os.NewFile(uintptr(ns), "netns")
	cmd.ExtraFiles = []*os.File{f}
	stdout, err := cmd.StdoutPipe()
	must(h.t, err)
	must(h.t, cmd.Start())
	must(h.t, f.Close())
	h.t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	out = bufio.NewReader(stdout)
	got, err := out.ReadString('\n')
	must(h.t, err)
	var wall int64
	if _, err := fmt.Sscanf(got, line+", until %d\n", &wall); err != nil {
		h.t.Fatalf("the child says %q: %v", got, err)
	}
	return cmd, out, time.Unix(0, wall)
}

// untilStopped waits until every thread of the process has stopped.
func untilStopped(t *testing.T, pid int) {
	t.Helper()
	eventually(t, "the child has stopped", func() bool {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		must(t, err)
		_, fields, _ := strings.Cut(string(stat), ") ")
		return strings.HasPrefix(fields, "T")
	})
}

// TestNobodyLeft has the kernel shut the gate all by itself.
func TestNobodyLeft(t *testing.T) {
	for _, sig := range []unix.Signal{unix.SIGKILL, unix.SIGSTOP} {
		t.Run(unix.SignalName(sig), func(t *testing.T) {
			t.Parallel()
			h := newHost(t)
			cmd, _, until := h.startChild(childOpens, "open")
			must(t, cmd.Process.Signal(sig))
			if sig == unix.SIGKILL {
				_ = cmd.Wait()
			} else {
				untilStopped(t, cmd.Process.Pid)
			}
			sessions := h.connectAll()
			for _, s := range sessions {
				s.mustTalk()
			}
			h.untilShut()
			if now := time.Now(); now.Before(until.Add(-time.Second)) {
				t.Errorf("the gate shut %v too soon", until.Sub(now))
			}
			h.passesNothing(sessions)
			eventually(t, "the element is gone", func() bool { return h.state().Role == "" })
		})
	}
}

// TestStoppedBeforeSending is what the guard is for: the element comes to life
// too late, with all of its timeout before it.
func TestStoppedBeforeSending(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	cmd, out, until := h.startChild(childStops, "stopping")
	untilStopped(t, cmd.Process.Pid)
	eventually(t, "the promise has run out", func() bool { return time.Now().After(until) })
	must(t, cmd.Process.Signal(unix.SIGCONT))
	if _, err := out.ReadString('\n'); err != nil {
		t.Fatalf("the child did not open the gate: %v", err)
	}
	if s := h.state(); s.Role != Owner || s.Open || s.Remaining != 0 {
		t.Errorf("state is %+v, want an owner's element, and shut", s)
	}
	_, err := h.dial(h.ways[0], moment)
	s := h.state()
	if s.Role != Owner {
		t.Fatal("the element ran out during the test: it shows nothing")
	}
	if !timedOut(err) || s.Dropped.Packets == 0 {
		t.Errorf("connecting gives %v, want a timeout; state is %+v", err, s)
	}
	must(t, cmd.Wait())
	// A new promise opens it again.
	h.open(Owner, long)
	h.connect(h.ways[0]).mustTalk()
}
