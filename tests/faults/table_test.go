package faults

import (
	"slices"
	"syscall"
	"testing"
	"time"

	"pgha/lab"
)

// Bounds of the longest gap. They tell a failover by the gate from one that
// waits for Patroni's lease of 60 s, and are no promise: two cores run a whole
// cluster, its clients and its observers.
const (
	failoverBound = 25 * time.Second
	// blipBound is for faults that clients hardly notice.
	blipBound = 10 * time.Second
)

var faults = slices.Concat(hostFaults, networkFaults, processFaults, etcdFaults, clockFaults, diskFaults, sequences)

var hostFaults = []fault{
	{
		name: "power-off", what: "the primary's host loses power", quick: true, expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.powerOff(r.leader)
			return func() { r.powerOn(r.leader) }
		},
	},
	{
		name: "replica-power-off", what: "the synchronous replica's host loses power", expect: stays, lasts: 10 * time.Second, bound: blipBound,
		inject: func(r *trial) func() {
			r.powerOff(r.replica)
			return func() { r.powerOn(r.replica) }
		},
	},
	{
		name: "host-frozen", what: "all processes of the primary's host stand still for 30 s and go on", quick: true,
		expect: moves, lasts: 30 * time.Second, bound: failoverBound, inject: freeze,
	},
	{
		name: "host-frozen-to-failover", what: "all processes of the primary's host stand still and go on as soon as another has taken over",
		expect: moves, bound: failoverBound, inject: freeze,
	},
	{
		name: "all-killed", what: "SIGKILL to every process of the primary's host; its kernel lives", expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.signal(r.leader, isAny, syscall.SIGKILL)
			return func() { r.must(r.Bed.Run(r.Context(), r.leader)) }
		},
	},
}

func freeze(r *trial) func() {
	r.must(r.Host(r.leader).Freeze())
	return func() { r.must(r.Host(r.leader).Thaw()) }
}

var networkFaults = []fault{
	{
		name: "link-down", what: "the primary's link goes down", quick: true, expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.must(r.Host(r.leader).LinkDown())
			return func() { r.must(r.Host(r.leader).LinkUp()) }
		},
	},
	{
		name: "link-silent", what: "the primary's packets vanish, both ways", quick: true, expect: moves, lasts: 15 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() {
			r.must(r.Lab.Isolate(r.leader))
			return func() { r.must(r.Lab.Rejoin(r.leader)) }
		},
	},
	{
		name: "one-way-out", what: "what the primary sends to members is lost", quick: true, expect: moves, bound: failoverBound,
		inject: func(r *trial) func() { return r.cutOneWay(pair{r.leader, r.replica}, pair{r.leader, "witness"}) },
	},
	{
		name: "one-way-in", what: "what members send to the primary is lost", expect: moves, bound: failoverBound,
		inject: func(r *trial) func() { return r.cutOneWay(pair{r.replica, r.leader}, pair{"witness", r.leader}) },
	},
	{
		name: "one-way-to-replica", what: "what the primary sends to its replica is lost", expect: either, lasts: 15 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.cutOneWay(pair{r.leader, r.replica}) },
	},
	{
		name: "one-way-from-replica", what: "what the replica sends to the primary is lost", expect: either, lasts: 15 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.cutOneWay(pair{r.replica, r.leader}) },
	},
	{
		name: "triangle", what: "primary and replica cannot reach each other, both reach the witness", quick: true,
		expect: stays, lasts: 20 * time.Second, bound: blipBound,
		inject: func(r *trial) func() { return r.cut(r.leader, r.replica) },
	},
	{
		name: "triangle-primary", what: "primary and witness cannot reach each other, both reach the replica",
		expect: either, lasts: 20 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() { return r.cut(r.leader, "witness") },
	},
	{
		name: "triangle-replica", what: "replica and witness cannot reach each other, both reach the primary",
		expect: stays, lasts: 20 * time.Second, bound: blipBound,
		inject: func(r *trial) func() { return r.cut(r.replica, "witness") },
	},
}

type pair struct{ from, to string }

func (r *trial) cutOneWay(ways ...pair) func() {
	for _, w := range ways {
		r.must(r.Lab.CutOneWay(w.from, w.to))
	}
	return func() {
		for _, w := range ways {
			r.must(r.Lab.HealOneWay(w.from, w.to))
		}
	}
}

func (r *trial) cut(a, b string) func() {
	r.must(r.Lab.Cut(a, b))
	return func() { r.must(r.Lab.Heal(a, b)) }
}

var processFaults = []fault{
	{
		name: "pgha-killed", what: "SIGKILL to the primary's pgha, which is started again at once", quick: true, expect: either, lasts: 8 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() {
			r.must(r.Kill(r.leader))
			r.must(r.Bed.Run(r.Context(), r.leader))
			return func() {}
		},
	},
	{
		name: "pgha-dead", what: "SIGKILL to the primary's pgha, which is not started again", expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.must(r.Kill(r.leader))
			return func() { r.must(r.Bed.Run(r.Context(), r.leader)) }
		},
	},
	{
		name: "pgha-stopped", what: "SIGSTOP to the primary's pgha, SIGCONT after the failover", quick: true, expect: moves, lasts: 10 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() { return r.stop(r.leader, isDaemon) },
	},
	{
		name: "patroni-killed", what: "SIGKILL to the primary's Patroni", expect: stays, lasts: 8 * time.Second, bound: blipBound,
		inject: func(r *trial) func() {
			r.signal(r.leader, isPatroni, syscall.SIGKILL)
			return func() {}
		},
	},
	{
		name: "patroni-stopped", what: "SIGSTOP to the primary's Patroni", quick: true, expect: stays, lasts: 15 * time.Second, bound: blipBound,
		inject: func(r *trial) func() { return r.stop(r.leader, isPatroni) },
	},
	{
		name: "postmaster-killed", what: "SIGKILL to the primary's postmaster", quick: true, expect: either, bound: failoverBound,
		inject: func(r *trial) func() {
			r.signal(r.leader, r.isPostmaster(r.T, r.leader), syscall.SIGKILL)
			return func() {}
		},
	},
	{
		name: "postgres-killed", what: "SIGKILL to all of the primary's PostgreSQL", expect: either, bound: failoverBound,
		inject: func(r *trial) func() {
			r.signal(r.leader, isPostgres, syscall.SIGKILL)
			return func() {}
		},
	},
	{
		name: "postmaster-stopped", what: "SIGSTOP to the primary's postmaster: open sessions go on, new ones hang",
		expect: either, lasts: 30 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.stop(r.leader, r.isPostmaster(r.T, r.leader)) },
	},
	{
		name: "postgres-stopped", what: "SIGSTOP to all of the primary's PostgreSQL, SIGCONT after the failover", expect: moves, bound: time.Minute,
		inject: func(r *trial) func() { return r.stop(r.leader, isPostgres) },
	},
}

// stop stops processes, and lets those go on that are left when it is undone.
func (r *trial) stop(host string, match func(lab.Proc) bool) func() {
	r.signal(host, match, syscall.SIGSTOP)
	return func() {
		_, err := r.Host(host).SignalAll(func(p lab.Proc) bool { return p.State == 'T' }, syscall.SIGCONT)
		r.must(err)
	}
}

func TestNamesOfFaults(t *testing.T) {
	seen := map[string]bool{}
	for _, f := range faults {
		if seen[f.name] || f.name == "" || f.what == "" || f.bound == 0 || f.expect == "" || (f.inject == nil) == (f.whole == nil) {
			t.Errorf("fault %q is not whole, or not the only one of its name", f.name)
		}
		seen[f.name] = true
	}
}
