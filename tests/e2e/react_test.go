package e2e

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
)

// TestReactions takes one cluster through what a node does by itself, at once,
// about a part that is gone or hangs. The gaps that clients saw are printed.
func TestReactions(t *testing.T) {
	c := &trio{Bed: newBed(t)}
	ctx := within(t, 2*trioWait)
	for _, name := range trioHosts {
		var o lab.HostOptions
		if name != "witness" {
			o.Volumes = []lab.Volume{{Path: "/var/lib/pgha/postgres", Bytes: 1536 << 20}}
		}
		if _, err := c.Lab.AddHost(ctx, name, o); err != nil {
			t.Fatal(err)
		}
	}
	r, err := c.Init(ctx, "n1")
	if err == nil {
		_, err = c.Join(ctx, "n2", r.Data.Token)
	}
	if err == nil {
		_, err = c.Join(ctx, "witness", r.Witness.Token, "--witness")
	}
	if err != nil {
		t.Fatal(err)
	}
	c.healthy(t)
	if err := c.CreateApp(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	type step struct {
		name string
		run  func(*trio, *testing.T)
	}
	for _, s := range []step{
		{"profile changed under load", (*trio).profileChanged},
		{"Patroni stopped", (*trio).patroniStopped},
		{"standby lost, then PostgreSQL crashed without one", (*trio).standbyLost},
		{"PostgreSQL crashed", (*trio).postgresCrashed},
		{"PostgreSQL hung", (*trio).postgresHung},
		{"disk filling up", (*trio).diskFills},
		{"disk full", (*trio).diskFull},
	} {
		ok := t.Run(s.name, func(t *testing.T) {
			c.healthy(t)
			s.run(c, t)
			c.healthy(t)
			c.nothingLost(t)
		})
		if !ok {
			return
		}
	}
}

// gap prints the longest time without a commit that a writer has seen.
func gap(t *testing.T, what string, w *testbed.Writer) {
	t.Helper()
	longest, _, _ := testbed.Outage(w.Writes())
	t.Logf("%s: the longest gap was %s, with %d errors", what, longest.Round(time.Millisecond), len(testbed.Failed(w.Writes())))
}

// said waits until a host's log says text, behind the first skip bytes.
func (c *trio) said(t *testing.T, host, text string, skip int) {
	t.Helper()
	err := testbed.Until(within(t, trioWait), fmt.Sprintf("%s to say %q", host, text), func() error {
		if all := c.log(t, host); strings.Contains(all[min(skip, len(all)):], text) {
			return nil
		}
		return fmt.Errorf("it has not")
	})
	if err != nil {
		t.Fatal(err)
	}
}

func (c *trio) log(t *testing.T, host string) string {
	t.Helper()
	data, err := os.ReadFile(c.Host(host).Path("/var/log/pgha/pgha.log"))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func isPostgres(p lab.Proc) bool { return p.Comm == "postgres" }

// signalAll signals processes of PostgreSQL, and fails if there are none.
func (c *trio) signalAll(t *testing.T, host string, sig syscall.Signal, match func(lab.Proc) bool) {
	t.Helper()
	if n, err := c.Host(host).SignalAll(match, sig); err != nil || n == 0 {
		t.Fatalf("signal %d processes on %s: %v", n, host, err)
	}
}

// profileChanged: all timers of all nodes follow, and no client notices.
func (c *trio) profileChanged(t *testing.T) {
	before := c.state(t)
	near, far := c.writer(t, before.leader), c.writer(t, replicaOf(node.Status{Leader: before.leader}))
	commit := c.session(t, "n1")
	if _, err := c.Pgha(t.Context(), "n1", "config", "set", "profile=slow"); err == nil || !strings.Contains(err.Error(), "use one of fast, steady, wide") {
		t.Errorf("an unknown profile: %v", err)
	}
	for _, p := range []struct {
		name        string
		promise     time.Duration
		loop        int
		replication string
	}{
		{"wide", 15 * time.Second, 10, "20s"},
		{"steady", 6 * time.Second, 5, "10s"},
		{"fast", 2500 * time.Millisecond, 5, "5s"},
	} {
		if _, err := c.Pgha(t.Context(), "n2", "config", "set", "profile="+p.name); err != nil {
			t.Fatal(err)
		}
		if out, err := c.Pgha(t.Context(), "n1", "config", "get", "profile"); err != nil || strings.TrimSpace(out) != p.name {
			t.Errorf("config get: %q, %v, want %q", out, err, p.name)
		}
		err := testbed.Until(within(t, trioWait), "profile "+p.name+" everywhere", func() error { return c.profileIs(t.Context(), p.name, p.promise, p.loop, p.replication) })
		if err != nil {
			t.Fatal(err)
		}
		c.goesOn(t, near)
		c.goesOn(t, far)
	}
	now := c.sameReign(t, before)
	for _, h := range []string{"n1", "n2"} {
		if now.data[h].Postmaster != before.data[h].Postmaster || now.data[h].Patroni != before.data[h].Patroni {
			t.Errorf("on %s something was restarted: %+v, before %+v", h, now.data[h], before.data[h])
		}
	}
	commit()
	c.unharmed(t, near)
	c.unharmed(t, far)
	gap(t, "profiles changed", near)
}

func (c *trio) profileIs(ctx context.Context, name string, promise time.Duration, loop int, replication string) error {
	s, err := c.Status(ctx, "n1")
	if err != nil {
		return err
	}
	if s.Gate == nil || s.Gate.Promise != promise {
		return fmt.Errorf("the gate is %+v, want a promise of %s", s.Gate, promise)
	}
	for _, h := range []string{"n1", "n2"} {
		out, err := c.Pgha(ctx, h, "psql", "-X", "-A", "-t", "-c", "SELECT setting || unit FROM pg_settings WHERE name = 'wal_sender_timeout'")
		if err != nil {
			return err
		}
		if got, err := time.ParseDuration(strings.TrimSpace(out)); err != nil || got.String() != replication {
			return fmt.Errorf("wal_sender_timeout on %s is %q, want %s", h, out, replication)
		}
		out, err = c.Host(h).Run(ctx, "patronictl", "-c", "/var/lib/pgha/patroni/patroni.yml", "show-config")
		if err != nil {
			return err
		}
		if !strings.Contains("\n"+out, fmt.Sprintf("\nloop_wait: %d\n", loop)) {
			return fmt.Errorf("Patroni on %s has %s", h, out)
		}
	}
	return nil
}

// patroniStopped: a Patroni that was stopped is replaced, and nothing else is.
func (c *trio) patroniStopped(t *testing.T) {
	before := c.state(t)
	w := c.writer(t, before.leader)
	skip := len(c.log(t, before.leader))
	began := time.Now()
	if err := c.Host(before.leader).Kill(before.data[before.leader].Patroni, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	c.child(t, before.leader, "patroni", "to be replaced", func(k node.ChildReport) bool { return k.PID != before.data[before.leader].Patroni })
	t.Logf("replaced within %s", time.Since(began).Round(10*time.Millisecond))
	c.said(t, before.leader, "it has been stopped by a signal", skip)
	now := c.sameReign(t, before)
	got, want := now.data[before.leader], before.data[before.leader]
	want.Patroni = got.Patroni
	if !samePIDs(got, want) {
		t.Errorf("with Patroni, something else was replaced: %+v, before %+v", got, want)
	}
	c.unharmed(t, w)
	gap(t, "Patroni stopped", w)
	// A new Patroni must not make commits wait for nobody.
	out, err := c.Pgha(t.Context(), before.leader, "psql", "-X", "-A", "-t", "-c", "SELECT sync_state FROM pg_stat_replication")
	if err != nil || strings.TrimSpace(out) != "sync" {
		t.Errorf("with a new Patroni the standby is %q, %v", out, err)
	}
}

// standbyLost: commits go on without a standby whose host is gone, before
// PostgreSQL itself gives it up. Without a standby a PostgreSQL that crashes is
// started again where it is.
func (c *trio) standbyLost(t *testing.T) {
	before := c.state(t)
	lost := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, before.leader)
	skip := len(c.log(t, before.leader))
	if err := c.PowerOff(lost); err != nil {
		t.Fatal(err)
	}
	c.goesOn(t, w)
	gap(t, "standby lost", w)
	c.said(t, before.leader, "a synchronous standby is lost", skip)

	w = c.writer(t, before.leader)
	old := before.data[before.leader].Postmaster
	if err := c.Host(before.leader).Kill(old, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.child(t, before.leader, "patroni", "to go on", func(k node.ChildReport) bool { return k.PID == before.data[before.leader].Patroni })
	c.await(t, before.leader, "PostgreSQL to be started again", func(s node.Status) bool {
		return s.Leader == before.leader && s.Gate != nil && s.Gate.Open && s.Gate.Owner == before.leader
	})
	c.goesOn(t, w)
	gap(t, "PostgreSQL crashed, no standby", w)
	if now := c.pids(t, before.leader); now.Postmaster == old || now.Patroni != before.data[before.leader].Patroni {
		t.Errorf("on %s runs %+v, before %+v", before.leader, now, before.data[before.leader])
	}
	if err := c.PowerOn(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	if s := c.healthy(t); s.Leader != before.leader {
		t.Errorf("the primary is %s, was %s", s.Leader, before.leader)
	}
}

// postgresCrashed: with a standby that has everything, a crash is a failover.
func (c *trio) postgresCrashed(t *testing.T) {
	before := c.state(t)
	next := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, next)
	if err := c.Host(before.leader).Kill(before.data[before.leader].Postmaster, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	c.goesOn(t, w)
	s := c.healthy(t)
	gap(t, "PostgreSQL crashed", w)
	if s.Leader != next {
		t.Errorf("the primary is %s, want %s", s.Leader, next)
	}
}

// postgresHung: a primary that answers nobody is handed over, and the old one,
// which hears nothing either, becomes a replica without help.
func (c *trio) postgresHung(t *testing.T) {
	before := c.state(t)
	next := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, next)
	skip := len(c.log(t, before.leader))
	c.signalAll(t, before.leader, syscall.SIGSTOP, isPostgres)
	c.await(t, "witness", next+" to lead", func(s node.Status) bool { return s.Leader == next })
	c.goesOn(t, w)
	gap(t, "PostgreSQL hung", w)
	c.said(t, before.leader, "killing PostgreSQL", skip)
	s := c.healthy(t)
	if m := trioMember(t, s, before.leader); s.Leader != next || m.Postgres != "replica" || !m.Sync {
		t.Errorf("%s has not become a replica of %s: %+v", before.leader, next, m)
	}
}

// fill leaves so many bytes on the disk of a host's PostgreSQL, and returns a
// function that gives the room back.
func (c *trio) fill(t *testing.T, host string, leave int) (empty func()) {
	t.Helper()
	const dir = "/var/lib/pgha/postgres"
	script := fmt.Sprintf(`cd %s; free=$(df --output=avail -B1 . | tail -1); fallocate -l $((free - %d)) ballast`, dir, max(leave, 16<<20))
	if leave == 0 { // the file system needs some for itself: to the last byte
		script += "; cat /dev/zero >> ballast; true"
	}
	if _, err := c.Host(host).Run(t.Context(), "sh", "-c", script); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := os.Remove(filepath.Join(c.Host(host).Path(dir), "ballast")); err != nil {
			t.Fatal(err)
		}
	}
}

// diskFills: the primary moves to where there is room, once.
func (c *trio) diskFills(t *testing.T) {
	before := c.state(t)
	next := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, next)
	empty := c.fill(t, before.leader, 56<<20)
	c.await(t, "witness", next+" to lead", func(s node.Status) bool {
		return s.Leader == next && slices.ContainsFunc(s.Members, func(m node.MemberStatus) bool { return m.Name == before.leader && m.Postgres == "replica" })
	})
	c.goesOn(t, w)
	gap(t, "disk filling up", w)
	empty()
	if s := c.healthy(t); s.Leader != next {
		t.Errorf("the primary is %s, want %s", s.Leader, next)
	}
}

// diskFull: a PostgreSQL that ends for want of room, with nobody to hand over to,
// is not started over and over; the node says what to do, and goes on by itself
// when that was done.
func (c *trio) diskFull(t *testing.T) {
	before := c.state(t)
	other := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, before.leader)
	if err := c.PowerOff(other); err != nil {
		t.Fatal(err)
	}
	c.goesOn(t, w)
	empty := c.fill(t, before.leader, 0)
	ctx, stop := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { // so that there is WAL to write
		for ctx.Err() == nil {
			_, err := c.Pgha(ctx, before.leader, "psql", "-X", "-q", "-c", "SELECT pg_logical_emit_message(true, 'fill', repeat('x', 1000000)) FROM generate_series(1, 40)")
			if err != nil { // it is full, or starting
				select {
				case <-ctx.Done():
				case <-time.After(time.Second):
				}
			}
		}
	})
	c.await(t, "witness", before.leader+" to say that its disk is full", func(s node.Status) bool {
		return slices.ContainsFunc(trioMember(t, s, before.leader).Problems, func(p string) bool { return strings.Contains(p, "waiting for disk space") })
	})
	stop()
	wg.Wait()
	empty()
	c.goesOn(t, w)
	if err := c.PowerOn(t.Context(), other); err != nil {
		t.Fatal(err)
	}
	if s := c.healthy(t); s.Leader != before.leader {
		t.Errorf("the primary is %s, was %s", s.Leader, before.leader)
	}
}
