package supervisor

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"pgha/internal/procstat"
)

// TestMain lets the test binary be a supervisor in another process, to be killed.
func TestMain(m *testing.M) {
	if len(os.Args) == 4 && os.Args[1] == "supervise" {
		fmt.Fprintln(os.Stderr, superviseForever(os.Args[2], os.Args[3]))
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// superviseForever supervises specIn(dir, script) until it is killed.
func superviseForever(dir, script string) error {
	p, err := New(specIn(dir, script), slog.New(slog.DiscardHandler))
	if err != nil {
		return err
	}
	if err := p.Start(context.Background()); err != nil {
		return err
	}
	select {}
}

// forever is a script that runs until a signal ends it.
const forever = "while :; do sleep 0.05; done"

// specIn is a Spec for a shell script with all its files in dir. The marker is
// unique to dir.
func specIn(dir, script string) Spec {
	return Spec{
		Name: "worker", Path: "/bin/sh", Args: []string{"-c", script},
		Env: []string{"PATH=/usr/bin:/bin"}, Marker: "test:" + dir,
		RunDir: filepath.Join(dir, "run"), LogFile: filepath.Join(dir, "log", "worker.log"),
		Grace:   30 * time.Second,
		Restart: RestartPolicy{MinBackoff: time.Millisecond, MaxBackoff: 20 * time.Millisecond},
	}
}

func testSpec(t *testing.T, script string) Spec {
	t.Helper()
	s := specIn(t.TempDir(), script)
	t.Cleanup(func() { killMarked(t, s.Marker) })
	return s
}

// killMarked kills what a failed test has left behind.
func killMarked(t *testing.T, marker string) {
	t.Helper()
	for _, pid := range marked(t, marker) {
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// marked lists the living processes that carry marker.
func marked(t *testing.T, marker string) (found []int) {
	t.Helper()
	pids, err := allPIDs()
	if err != nil {
		t.Fatal(err)
	}
	for _, pid := range pids {
		if m, _ := readMarker(pid, marker); m == markerSame {
			found = append(found, pid)
		}
	}
	return found
}

// capture is a slog.Handler that keeps messages with their level and stream.
type capture struct {
	mu    sync.Mutex
	lines []string // "LEVEL component/stream: message"
	attrs string
}

func (c *capture) Enabled(context.Context, slog.Level) bool { return true }
func (c *capture) WithGroup(string) slog.Handler            { return c }
func (c *capture) WithAttrs(as []slog.Attr) slog.Handler {
	for _, a := range as {
		if a.Key == "component" {
			c.mu.Lock()
			c.attrs = a.Value.String()
			c.mu.Unlock()
		}
	}
	return c
}

func (c *capture) Handle(_ context.Context, r slog.Record) error {
	stream := ""
	r.Attrs(func(a slog.Attr) bool {
		if a.Key == "stream" {
			stream = a.Value.String()
		}
		return true
	})
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, fmt.Sprintf("%s %s/%s: %s", r.Level, c.attrs, stream, r.Message))
	return nil
}

// output returns the messages of the child.
func (c *capture) output() (out []string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, l := range c.lines {
		if _, msg, ok := strings.Cut(l, "/output: "); ok {
			out = append(out, msg)
		}
	}
	return out
}

func (c *capture) has(line string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Contains(c.lines, line)
}

func newProcess(t *testing.T, s Spec) (*Process, *capture) {
	t.Helper()
	logs := &capture{}
	p, err := New(s, slog.New(logs))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stop(t, p) })
	return p, logs
}

func started(t *testing.T, s Spec) (*Process, *capture) {
	t.Helper()
	p, logs := newProcess(t, s)
	mustStart(t, p)
	return p, logs
}

func mustStart(t *testing.T, p *Process) {
	t.Helper()
	if err := p.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}

func stop(t *testing.T, p *Process) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := p.Stop(ctx); err != nil {
		t.Error(err)
	}
}

func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain for: %s", what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func waitState(t *testing.T, p *Process, want State) Status {
	t.Helper()
	waitFor(t, "state "+want.String(), func() bool { return p.Status().State == want })
	return p.Status()
}

// waitOutput waits until the child has written line.
func waitOutput(t *testing.T, logs *capture, line string) {
	t.Helper()
	waitFor(t, "output "+line, func() bool { return slices.Contains(logs.output(), line) })
}

// assertStates compares the states that p went through, in order.
func assertStates(t *testing.T, p *Process, want ...State) {
	t.Helper()
	var got []string
	for _, e := range p.Events() {
		got = append(got, e.To.String())
	}
	var names []string
	for _, w := range want {
		names = append(names, w.String())
	}
	if d := cmp.Diff(names, got); d != "" {
		t.Errorf("states (-want +got):\n%s\n%+v", d, p.Events())
	}
}

func isAlive(pid int) bool {
	st, err := procstat.Read(pid)
	return err == nil && st.State != 'Z'
}
