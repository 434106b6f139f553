package postgres

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestPrimaryAndStandby(t *testing.T) {
	s := newServer(t, "synchronous_standby_names = 's2'", "synchronous_commit = local")
	s.ctl(t, "start")
	w := watch(t, s.config(t))
	p := w.kind(t, Primary)
	if p.PID != s.postmaster(t) || p.Started == 0 || p.Timeline != 1 || p.WriteLSN == 0 || p.DiskTotal == 0 || p.DiskFree > p.DiskTotal ||
		p.Streaming || p.Replicas != nil || p.SyncStandbys != nil || p.Err != "" {
		t.Errorf("primary: %+v", p)
	}

	b := s.standby(t, "s2")
	b.ctl(t, "start")
	wb := watch(t, b.config(t))
	p = wb.until(t, "the standby to stream", func(p Probe) bool { return p.Streaming })
	if p.Kind != Recovery || p.PID != b.postmaster(t) || p.Timeline != 1 || p.StreamedAt != p.At || p.WriteLSN != 0 || p.Err != "" {
		t.Errorf("standby: %+v", p)
	}
	s.exec(t, "CREATE TABLE t AS SELECT generate_series(1, 10000)")
	written := w.Now(t.Context()).WriteLSN
	p = wb.until(t, "the standby to catch up", func(p Probe) bool { return p.ReplayedLSN >= written })
	if p.ReceivedLSN < p.ReplayedLSN {
		t.Errorf("received less than replayed: %+v", p)
	}
	p = w.until(t, "the standby to be synchronous and up to date", func(p Probe) bool {
		return len(p.SyncStandbys) == 1 && len(p.Replicas) == 1 && p.Replicas[0].LagBytes == 0
	})
	if p.Replicas[0].ReplyTime.IsZero() {
		t.Errorf("a streaming standby without a sign of life: %+v", p)
	}
	p.Replicas[0].ReplyTime = time.Time{}
	want := []Replica{{Name: "s2", State: "streaming", SyncState: "sync"}}
	if diff := cmp.Diff(want, p.Replicas); diff != "" || p.SyncStandbys[0] != "s2" {
		t.Errorf("replicas (-want +got), synchronous %v:\n%s", p.SyncStandbys, diff)
	}

	testTerminateWalSenders(t, b, w)

	streamed := wb.until(t, "the standby to stream again", func(p Probe) bool { return p.Streaming })
	b.ctl(t, "promote")
	p = wb.kind(t, Primary, Unknown, Gone, Starting, Hung)
	if p.PID != streamed.PID || p.Started != streamed.Started || p.Timeline != 2 || p.Streaming || p.StreamedAt < streamed.StreamedAt || p.ReceivedLSN != 0 {
		t.Errorf("promoted: %+v, last streaming %+v", p, streamed)
	}
}

// testTerminateWalSenders freezes the standby, which leaves the primary with a
// connection that nobody answers on.
func testTerminateWalSenders(t *testing.T, b *server, w *watching) {
	t.Helper()
	if n, err := w.TerminateWalSenders(t.Context(), "nobody"); n != 0 || err != nil {
		t.Errorf("terminate nobody's walsenders: %d, %v", n, err)
	}
	frozen := b.pids(t)
	b.signal(t, syscall.SIGSTOP, frozen...)
	n, err := w.TerminateWalSenders(t.Context(), "s2")
	if n != 1 || err != nil {
		t.Errorf("terminate the standby's walsenders: %d, %v, want 1", n, err)
	}
	p := w.until(t, "the standby's connection to end", func(p Probe) bool { return p.Kind == Primary && len(p.Replicas) == 0 })
	if len(p.SyncStandbys) > 0 {
		t.Errorf("synchronous without a connection: %+v", p)
	}
	b.signal(t, syscall.SIGCONT, frozen...)
	w.until(t, "the standby to come back", func(p Probe) bool { return len(p.Replicas) == 1 && p.Replicas[0].State == "streaming" })
}

// TestPostmasterKilled has a session at work when the postmaster is killed: it
// goes on, and can commit, until it next waits for something.
func TestPostmasterKilled(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	cfg := s.config(t)
	cfg.Every = time.Hour // what is seen is seen by the pidfd
	w := watch(t, cfg)
	w.until(t, "the primary", func(p Probe) bool { return p.Kind == Primary })

	conn, busy := s.session(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_, _ = conn.Exec(ctx, "SELECT count(*) FROM generate_series(1, 1000000000000)")
	}()
	t.Cleanup(func() { cancel(); <-done })
	waitFor(t, "the session to be at work", func() bool {
		c, err := s.dial(t.Context())
		must(t, err)
		defer discard(c)
		var active bool
		must(t, c.QueryRow(t.Context(), "SELECT state = 'active' FROM pg_stat_activity WHERE pid = $1", busy).Scan(&active))
		return active
	})
	pid := s.postmaster(t)
	killed := time.Now()
	s.signal(t, syscall.SIGKILL, pid)
	p := w.until(t, "the end of the postmaster", func(p Probe) bool { return p.Kind != Primary }, Gone)
	t.Logf("the postmaster's end was seen after %v", time.Since(killed))
	if p.Kind != Unknown || p.PID != 0 {
		t.Errorf("after the postmaster's end: %+v", p)
	}
	waitFor(t, "the busy session to be alone", func() bool {
		return slices.Equal(slices.DeleteFunc(s.pids(t), func(pid int) bool {
			holds, err := holdsSharedMemory(pid)
			return err == nil && !holds // the logger stays until the last has gone
		}), []int{busy})
	})
	for range 20 {
		w.until(t, "a look at the busy session", func(p Probe) bool {
			return p.Kind == Unknown && strings.HasSuffix(p.Err, "processes left on its shared memory: 1")
		}, Gone)
	}
	checkGone(t, s.data, false)
	// Whatever somebody takes away, the session is still there.
	removeSegment(t, s.data)
	checkGone(t, s.data, false)
	must(t, os.Remove(filepath.Join(s.data, "postmaster.pid")))
	checkGone(t, s.data, false)

	killed = time.Now()
	s.signal(t, syscall.SIGKILL, busy)
	w.until(t, "the server to be gone", func(p Probe) bool { return p.Kind == Gone })
	t.Logf("the last session's end was seen after %v", time.Since(killed))
	checkGone(t, s.data, true)
}

func TestPostmasterKilledIdle(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	cfg := s.config(t)
	cfg.Every = time.Hour
	w := watch(t, cfg)
	w.until(t, "the primary", func(p Probe) bool { return p.Kind == Primary })
	_, backend := s.session(t)
	pid := s.postmaster(t)
	killed := time.Now()
	s.signal(t, syscall.SIGKILL, pid)
	w.until(t, "the server to be gone", func(p Probe) bool { return p.Kind == Gone })
	t.Logf("gone after %v", time.Since(killed))
	if holds, err := holdsSharedMemory(backend); holds || err != nil {
		t.Errorf("gone with session %d at its shared memory: %v", backend, err)
	}
	// The pid file is still there; a new server takes its place. It minds a
	// postmaster that nobody has reaped, which is no process to us.
	waitFor(t, "the postmaster to be reaped", func() bool { return errors.Is(syscall.Kill(pid, 0), syscall.ESRCH) })
	s.ctl(t, "start")
	if p := w.Now(t.Context()); p.Kind != Primary || p.PID != s.postmaster(t) {
		t.Errorf("started again: %+v", p)
	}
}

func TestHung(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	cfg := s.config(t)
	cfg.Timeout, cfg.HungAfter = 2*time.Second, 2*time.Second
	w := watch(t, cfg)
	was := w.kind(t, Primary)

	pids := s.pids(t)
	s.signal(t, syscall.SIGSTOP, pids...)
	p := w.kind(t, Hung, Gone, Starting)
	if p.PID != was.PID || !strings.HasPrefix(p.Err, "no answer for ") {
		t.Errorf("all stopped: %+v", p)
	}
	s.signal(t, syscall.SIGCONT, pids...)
	if p = w.kind(t, Primary, Gone, Starting); p.PID != was.PID || p.Started != was.Started {
		t.Errorf("going on: %+v, before %+v", p, was)
	}

	// The kept connection goes on to answer.
	s.signal(t, syscall.SIGSTOP, was.PID)
	if p = w.kind(t, Hung, Gone, Starting); p.PID != was.PID || p.Timeline != 1 || !strings.HasPrefix(p.Err, "new connections get no answer for ") {
		t.Errorf("postmaster stopped: %+v", p)
	}
	s.signal(t, syscall.SIGCONT, was.PID)
	if p = w.kind(t, Primary, Gone, Starting); p.PID != was.PID {
		t.Errorf("going on: %+v, before %+v", p, was)
	}
}

// TestKilledWhileStopped kills a postmaster while a question is out that will
// not be answered: the pidfd must cut it short.
func TestKilledWhileStopped(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	cfg := s.config(t)
	cfg.Timeout = time.Hour
	w := watch(t, cfg)
	p := w.kind(t, Primary)
	pids := s.pids(t)
	s.signal(t, syscall.SIGSTOP, pids...)
	waitFor(t, "a question to be out", func() bool { // the last probe gets old
		return w.now()-w.Latest().At > 10*cfg.Every
	})
	s.signal(t, syscall.SIGKILL, p.PID)
	w.until(t, "the postmaster's end", func(p Probe) bool { return p.Kind == Unknown && p.PID == 0 }, Gone, Hung)
	s.signal(t, syscall.SIGKILL, pids...)
	w.kind(t, Gone)
}

// TestKilledAfterAnswer kills the postmaster between its answer and the verdict.
func TestKilledAfterAnswer(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	pid := s.postmaster(t)
	pidfd, err := unix.PidfdOpen(pid, 0)
	must(t, err)
	defer unix.Close(pidfd)
	cfg := s.config(t)
	now, reading := New(cfg).cfg.Now, 0
	cfg.Now = func() time.Duration {
		if reading++; reading == 3 { // New has read it once, and the probe before it asked
			s.signal(t, syscall.SIGKILL, pid)
			waitFor(t, "the postmaster to end", func() bool { return ended(pidfd) })
		}
		return now()
	}
	if p := New(cfg).Now(t.Context()); p.Kind != Unknown && p.Kind != Gone || p.PID != 0 || p.Timeline != 0 {
		t.Errorf("of a server that has just ended: %+v", p)
	}
	if reading < 3 {
		t.Errorf("the clock was read %d times: the postmaster was never killed", reading)
	}
}

// TestBackendCrash: the postmaster ends all sessions and starts the database
// anew, under the same pid. It is kept at it by a session that is stopped, which
// it kills after 5 s.
func TestBackendCrash(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	w := watch(t, s.config(t))
	was := w.kind(t, Primary)
	_, stopped := s.session(t)
	_, victim := s.session(t)
	s.signal(t, syscall.SIGSTOP, stopped)
	s.signal(t, syscall.SIGKILL, victim)
	p := w.until(t, "the restart of the database", func(p Probe) bool { return p.Kind == Starting }, Gone, Hung)
	if p.PID != was.PID || p.Started != was.Started || !strings.Contains(p.Err, sqlCannotConnectNow) {
		t.Errorf("restarting: %+v, before %+v", p, was)
	}
	p = w.kind(t, Primary, Gone, Hung)
	if p.PID != was.PID || p.Started != was.Started || p.Err != "" {
		t.Errorf("restarted: %+v, before %+v", p, was)
	}
}

func TestStopAndStart(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	w := watch(t, s.config(t))
	first := w.kind(t, Primary)
	s.ctl(t, "restart", "-m", "fast")
	second := w.until(t, "the next server", func(p Probe) bool { return p.Kind == Primary && p.PID != first.PID }, Hung)
	if second.PID != s.postmaster(t) || second.Started == first.Started && second.PID == first.PID {
		t.Errorf("restarted: %+v, before %+v", second, first)
	}

	_, stopped := s.session(t)
	s.signal(t, syscall.SIGSTOP, stopped) // holds the shutdown up
	s.ctl(t, "stop", "-m", "fast", "--no-wait")
	if p := w.kind(t, Starting, Gone, Hung); p.PID != second.PID {
		t.Errorf("shutting down: %+v", p)
	}
	s.signal(t, syscall.SIGCONT, stopped)
	if p := w.kind(t, Gone, Hung); p.PID != 0 || p.Started != 0 || p.Err != "" || p.DiskTotal == 0 {
		t.Errorf("stopped: %+v", p)
	}
	checkGone(t, s.data, true)
	if _, err := w.TerminateWalSenders(t.Context(), "s2"); !errors.Is(err, ErrNoServer) {
		t.Errorf("terminate walsenders of a stopped server: %v", err)
	}

	// In recovery, and letting nobody in.
	s.write(t, "standby.signal", "")
	s.set(t, "hot_standby = off")
	s.ctl(t, "start", "-W")
	w.kind(t, Starting, Hung)
	s.ctl(t, "stop", "-m", "immediate")
	w.kind(t, Gone)
}

// TestConnectionsFull: a server that refuses for want of connections is alive.
func TestConnectionsFull(t *testing.T) {
	s := newServer(t, "max_connections = 6", "superuser_reserved_connections = 2", "max_wal_senders = 0", "wal_level = minimal")
	s.ctl(t, "start")
	kept := watch(t, s.config(t))
	kept.kind(t, Primary)
	free := 5 // the sixth is kept, or else a trial's for a moment
	waitFor(t, "the server to be full", func() bool {
		if conn, err := s.dial(t.Context()); err == nil {
			t.Cleanup(func() { discard(conn) })
			free--
		}
		return free == 0
	})
	cfg := s.config(t)
	cfg.HungAfter = time.Nanosecond
	late := New(cfg)
	for range 3 {
		if p := late.Now(t.Context()); p.Kind != Unknown || !strings.Contains(p.Err, "53300") || p.PID == 0 {
			t.Errorf("full, to a newcomer: %+v", p)
		}
	}
	kept.kind(t, Primary, Gone, Hung, Starting)
}

// TestNow uses a watcher that does not run, as a command would.
func TestNow(t *testing.T) {
	s := newServer(t)
	w := New(s.config(t))
	if p := w.Latest(); p.Kind != Unknown || p.Err == "" {
		t.Errorf("before the first probe: %+v", p)
	}
	if p := w.Now(t.Context()); p.Kind != Gone {
		t.Errorf("not started: %+v", p)
	}
	s.ctl(t, "start")
	p := w.Now(t.Context())
	if p.Kind != Primary {
		t.Errorf("started: %+v", p)
	}
	if diff := cmp.Diff(p, w.Latest()); diff != "" {
		t.Errorf("the latest is another (-want +got):\n%s", diff)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if p := w.Now(ctx); p.Kind != Unknown || !strings.Contains(p.Err, "canceled") {
		t.Errorf("cancelled: %+v", p)
	}
	if p := w.Latest(); p.Kind != Primary {
		t.Errorf("a probe that was cancelled is the latest: %+v", p)
	}
	if n, err := w.TerminateWalSenders(t.Context(), "s2"); n != 0 || err != nil {
		t.Errorf("terminate walsenders: %d, %v", n, err)
	}

	// A server of another directory at the socket is not ours.
	other := emptyServer(t)
	must(t, os.Mkdir(other.data, 0o700))
	stranger := startIn(t, other.data)
	other.write(t, "postmaster.pid", pidFile(stranger, time.Now()))
	cfg := s.config(t)
	cfg.DataDir = other.data
	if p := New(cfg).Now(t.Context()); p.Kind != Unknown || !strings.Contains(p.Err, "listens on the socket") {
		t.Errorf("another server's socket: %+v", p)
	}
}
