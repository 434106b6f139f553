package e2e

import (
	"context"
	"errors"
	"slices"
	"strings"
	"syscall"
	"testing"

	"pgha/lab/testbed"
	"pgha/node"
)

// replicaLost: the primary goes on without its replica's host, says that its
// promise does not hold meanwhile, and is whole again when the host returns.
func (c *trio) replicaLost(t *testing.T) {
	before := c.state(t)
	lost := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, before.leader)
	if err := c.PowerOff(lost); err != nil {
		t.Fatal(err)
	}
	c.goesOn(t, w)
	for _, h := range []string{before.leader, "witness"} {
		s := c.await(t, h, "the loss of "+lost+" to be seen", func(s node.Status) bool {
			return s.Health == node.Degraded && s.Leader == before.leader && !trioMember(t, s, lost).Reachable && !s.Promise.Holds
		})
		if s.Survives || !strings.Contains(s.Verdict, "the loss of "+before.leader+" is not covered") || !slices.ContainsFunc(s.ToDo, func(d string) bool { return strings.Contains(d, "bring back "+lost) }) {
			t.Errorf("%s says %q, to do %q", h, s.Verdict, s.ToDo)
		}
		if code, text := c.exitCode(t, h); code != int(node.Degraded) {
			t.Errorf("pgha status on %s: exit status %d\n%s", h, code, text)
		}
	}
	conn, err := c.connect(t, before.leader, 5433, nil)
	if err != nil {
		t.Errorf("without a replica the read-only port must lead to the primary: %v", err)
	} else if err := conn.Ping(t.Context()); err != nil {
		t.Errorf("without a replica the read-only port must lead to the primary: %v", err)
	}
	if err := c.PowerOn(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	now := c.sameReign(t, before)
	if now.data[before.leader].Postmaster != before.data[before.leader].Postmaster {
		t.Error("the primary's PostgreSQL was restarted")
	}
	s := c.healthy(t)
	if m := trioMember(t, s, lost); !m.Sync || m.Postgres != "replica" {
		t.Errorf("%s has not returned as synchronous replica: %+v", lost, m)
	}
	c.goesOn(t, w)
}

// witnessLost: no client notices.
func (c *trio) witnessLost(t *testing.T) {
	before := c.state(t)
	w := c.writer(t, before.leader)
	far := c.writer(t, replicaOf(node.Status{Leader: before.leader}))
	if err := c.PowerOff("witness"); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"n1", "n2"} {
		s := c.await(t, h, "the loss of the witness to be seen", func(s node.Status) bool {
			return s.Health == node.Degraded && s.Leader == before.leader && !trioMember(t, s, "witness").Reachable && s.Promise.Holds
		})
		if s.Survives || !slices.ContainsFunc(s.ToDo, func(d string) bool { return strings.Contains(d, "bring back witness") }) {
			t.Errorf("%s says %q, to do %q", h, s.Verdict, s.ToDo)
		}
	}
	c.unharmed(t, w)
	c.unharmed(t, far)
	if err := c.PowerOn(t.Context(), "witness"); err != nil {
		t.Fatal(err)
	}
	c.sameReign(t, before)
	c.unharmed(t, w)
	c.unharmed(t, far)
}

// haproxyKilled: a node's HAProxy is started again, and nothing else is.
func (c *trio) haproxyKilled(t *testing.T) {
	before := c.state(t)
	hit := replicaOf(node.Status{Leader: before.leader})
	w := c.writer(t, hit)
	other := c.writer(t, before.leader)
	for _, pid := range append(before.data[hit].Workers, before.data[hit].HAProxy) {
		// The master takes its worker with it, and the other way round.
		if err := c.Host(hit).Kill(pid, syscall.SIGKILL); err != nil && !strings.Contains(err.Error(), "no such process") {
			t.Fatal(err)
		}
	}
	c.child(t, hit, "haproxy", "to be started again", func(k node.ChildReport) bool {
		return k.PID != before.data[hit].HAProxy && k.Restarts == 1
	})
	c.goesOn(t, w)
	c.unharmed(t, other)
	now := c.sameReign(t, before)
	if !samePIDs(now.data[before.leader], before.data[before.leader]) {
		t.Errorf("on %s, where nothing was killed: %+v, before %+v", before.leader, now.data[before.leader], before.data[before.leader])
	}
	if now.data[hit].Patroni != before.data[hit].Patroni || now.data[hit].Postmaster != before.data[hit].Postmaster {
		t.Errorf("with HAProxy, something else was started again: %+v, before %+v", now.data[hit], before.data[hit])
	}
}

// patroniKilled: PostgreSQL does not notice that its Patroni was replaced.
func (c *trio) patroniKilled(t *testing.T) {
	c.patroniReplaced(t, syscall.SIGKILL)
}

// patroniHung: a Patroni that does nothing is as good as a dead one.
func (c *trio) patroniHung(t *testing.T) {
	c.patroniReplaced(t, syscall.SIGSTOP)
}

func (c *trio) patroniReplaced(t *testing.T, sig syscall.Signal) {
	before := c.state(t)
	replica := replicaOf(node.Status{Leader: before.leader})
	near, far := c.writer(t, before.leader), c.writer(t, replica)
	commit := c.session(t, replica)
	if err := c.Host(before.leader).Kill(before.data[before.leader].Patroni, sig); err != nil {
		t.Fatal(err)
	}
	c.child(t, before.leader, "patroni", "to be replaced", func(k node.ChildReport) bool {
		return k.PID != before.data[before.leader].Patroni
	})
	c.goesOn(t, near)
	c.goesOn(t, far)
	now := c.sameReign(t, before)
	got, want := now.data[before.leader], before.data[before.leader]
	want.Patroni = got.Patroni
	if !samePIDs(got, want) {
		t.Errorf("with Patroni, something else was replaced: %+v, before %+v", got, want)
	}
	if !samePIDs(now.data[replica], before.data[replica]) {
		t.Errorf("on %s, where nothing was wrong: %+v, before %+v", replica, now.data[replica], before.data[replica])
	}
	commit()
	c.unharmed(t, near)
	c.unharmed(t, far)
}

func samePIDs(a, b trioPIDs) bool {
	return a.Patroni == b.Patroni && a.Postmaster == b.Postmaster && a.HAProxy == b.HAProxy && slices.Equal(a.Workers, b.Workers)
}

// daemonsKilled: what pgha started lives on without it, and is taken over by
// the next one; no client notices.
func (c *trio) daemonsKilled(t *testing.T) {
	before := c.state(t)
	replica := replicaOf(node.Status{Leader: before.leader})
	near, far := c.writer(t, before.leader), c.writer(t, replica)
	commit := c.session(t, before.leader)
	for _, h := range []string{before.leader, replica, "witness"} {
		if err := c.Kill(h); err != nil {
			t.Fatal(err)
		}
		c.goesOn(t, near)
		c.goesOn(t, far)
		if err := c.Run(t.Context(), h); err != nil {
			t.Fatal(err)
		}
		if h != "witness" {
			for name, pid := range map[string]int{"patroni": before.data[h].Patroni, "haproxy": before.data[h].HAProxy} {
				k := c.child(t, h, name, "to be adopted", func(k node.ChildReport) bool { return k.Adopted })
				if k.PID != pid || k.Restarts != 0 {
					t.Errorf("%s of %s was not adopted but is %+v; it had pid %d", name, h, k, pid)
				}
			}
		}
		now := c.sameReign(t, before)
		for _, d := range []string{"n1", "n2"} {
			if !samePIDs(now.data[d], before.data[d]) {
				t.Errorf("after pgha was killed on %s, on %s runs %+v, before %+v", h, d, now.data[d], before.data[d])
			}
		}
	}
	commit()
	c.unharmed(t, near)
	c.unharmed(t, far)
}

// triangle: the data nodes lose each other, and both still see the witness.
// Whoever was the primary stays it, alone, and commits go on once the replica
// is known to be gone.
func (c *trio) triangle(t *testing.T) {
	before := c.state(t)
	c.witnessLeads(t, before.leader)
	r := c.record(t)
	w := c.writer(t, before.leader)
	if err := c.Lab.Cut("n1", "n2"); err != nil {
		t.Fatal(err)
	}
	c.await(t, "witness", "the replica to be given up", func(s node.Status) bool {
		return s.Health == node.Degraded && s.Leader == before.leader && !s.Promise.Holds
	})
	c.goesOn(t, w)
	s := c.await(t, before.leader, "a status from the primary", func(s node.Status) bool { return s.Leader != "" })
	if m := trioMember(t, s, before.leader); s.Leader != before.leader || m.Timeline != before.timeline || s.Survives {
		t.Errorf("with the link cut: %s; %s", s.Verdict, testbed.Members(s))
	}
	if err := c.Lab.Heal("n1", "n2"); err != nil {
		t.Fatal(err)
	}
	c.sameReign(t, before)
	c.goesOn(t, w)
	if got, want := r.reigns(t, turn{before.leader, before.timeline}), []turn{{before.leader, before.timeline}}; !slices.Equal(got, want) {
		t.Errorf("rows were taken by %v, want %v alone", got, want)
	}
}

// leaderLost: the replica takes over, the old leader returns as its replica.
func (c *trio) leaderLost(t *testing.T) {
	before := c.state(t)
	next := replicaOf(node.Status{Leader: before.leader})
	r := c.record(t)
	w := c.writer(t, before.leader, next)
	idle, err := c.connect(t, next, 5432, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.PowerOff(before.leader); err != nil {
		t.Fatal(err)
	}
	c.await(t, "witness", next+" to become the primary", func(s node.Status) bool { return s.Leader == next })
	c.goesOn(t, w)
	if _, err := idle.Exec(within(t, trioWait), "SELECT 1"); err == nil || t.Context().Err() != nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a session to the lost primary has not ended: %v", err)
	}
	s := c.await(t, next, "a degraded cluster", func(s node.Status) bool { return s.Health == node.Degraded && s.Leader == next })
	if m := trioMember(t, s, next); m.Timeline != before.timeline+1 || s.Survives || s.Promise.Holds {
		t.Errorf("%s took over on timeline %d after %d; %s", next, m.Timeline, before.timeline, s.Verdict)
	}
	if err := c.PowerOn(t.Context(), before.leader); err != nil {
		t.Fatal(err)
	}
	s = c.healthy(t)
	for _, h := range []string{"n1", "n2"} {
		if m := trioMember(t, s, h); m.Timeline != before.timeline+1 || (m.Postgres == "primary") != (h == next) {
			t.Errorf("after the return: %s is %+v", h, m)
		}
	}
	c.goesOn(t, w)
	// The writer may go by way of the returned node as well.
	c.goesOn(t, c.writer(t, before.leader))
	want := []turn{{before.leader, before.timeline}, {next, before.timeline + 1}}
	if got := r.reigns(t, want[1]); !slices.Equal(got, want) {
		t.Errorf("rows were taken by %v, want %v", got, want)
	}
}

// dataRestarted: the data nodes are switched off and on, one after the other
// and then both at once.
func (c *trio) dataRestarted(t *testing.T) {
	s := c.healthy(t)
	r := c.record(t)
	w := c.writer(t, "n1", "n2")
	for _, hosts := range [][]string{{replicaOf(s)}, {s.Leader}, {"n1", "n2"}} {
		c.powerCycle(t, hosts...)
		c.healthy(t)
		c.goesOn(t, w)
	}
	c.fromTo(t, r, s.Leader)
}

// allLost: the power of the whole cluster fails, and returns.
func (c *trio) allLost(t *testing.T) {
	s := c.healthy(t)
	r := c.record(t)
	w := c.writer(t, "n1", "n2")
	c.powerCycle(t, trioHosts...)
	c.healthy(t)
	c.goesOn(t, w)
	c.fromTo(t, r, s.Leader)
}

// fromTo checks who was the primary: the first one first, and in the end the
// one that is it now, by its timeline too.
func (c *trio) fromTo(t *testing.T, r *recorder, first string) {
	t.Helper()
	s := c.healthy(t)
	now := turn{s.Leader, trioMember(t, s, s.Leader).Timeline}
	order := r.reigns(t, now)
	t.Logf("rows were taken by %v", order)
	if len(order) == 0 || order[0].host != first || order[len(order)-1] != now {
		t.Errorf("rows were taken by %v, but %s was the primary at first and %v is now", order, first, now)
	}
}

func (c *trio) powerCycle(t *testing.T, hosts ...string) {
	t.Helper()
	for _, h := range hosts {
		if err := c.PowerOff(h); err != nil {
			t.Fatal(err)
		}
	}
	for _, h := range hosts {
		if err := c.PowerOn(t.Context(), h); err != nil {
			t.Fatal(err)
		}
	}
}
