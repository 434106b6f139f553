package faults

import (
	"slices"
	"time"

	"pgha/node"
)

var etcdFaults = []fault{
	{
		name: "both-leaders-lost", what: "etcd's leader is on the primary's host, which loses power", quick: true, expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.leadBoth()
			r.powerOff(r.leader)
			return func() { r.powerOn(r.leader) }
		},
	},
	{
		name: "both-leaders-silent", what: "etcd's leader is on the primary's host, whose packets vanish", expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			r.leadBoth()
			r.must(r.Lab.Isolate(r.leader))
			return func() { r.must(r.Lab.Rejoin(r.leader)) }
		},
	},
	{
		name: "witness-power-off", what: "the witness loses power", expect: stays, lasts: 15 * time.Second, bound: blipBound,
		inject: func(r *trial) func() {
			r.powerOff("witness")
			return func() { r.powerOn("witness") }
		},
	},
	{
		name: "witness-then-primary", what: "the witness loses power, then the primary's host; the witness returns first", expect: moves, bound: 4 * time.Minute,
		inject: func(r *trial) func() {
			r.powerOff("witness")
			r.missed(r.replica, "witness")
			r.powerOff(r.leader)
			r.missed(r.replica, r.leader)
			r.powerOn("witness") // only now can anybody be promoted
			return func() { r.powerOn(r.leader) }
		},
	},
	{
		name: "quorum-lost", what: "etcd's members cannot reach each other for 10 s, everything else goes on", quick: true,
		expect: stays, lasts: 10 * time.Second, bound: 8 * time.Second, inject: cutPeers,
	},
	{
		name: "quorum-lost-long", what: "etcd's members cannot reach each other for 60 s, longer than Patroni tries, everything else goes on",
		expect: stays, lasts: 60 * time.Second, bound: 8 * time.Second,
		inject: func(r *trial) func() {
			heal := cutPeers(r)
			r.lasts(40 * time.Second)
			// HAProxy has no Patroni to ask by now, and lets new sessions in all the same.
			late := r.history.Now()
			for _, h := range dataHosts {
				r.client("late client of "+h, r.target(h, readWritePort, r.Lab.Dial))
			}
			r.served(late)
			return heal
		},
	},
	{
		name: "quorum-frozen", what: "SIGSTOP to pgha on the replica and on the witness for 10 s: nobody can say that it will not take over",
		expect: stays, bound: 40 * time.Second,
		whole: func(r *trial) {
			heal1, heal2 := r.stop(r.replica, isDaemon), r.stop("witness", isDaemon)
			r.lasts(10 * time.Second)
			heal1()
			heal2()
		},
	},
	{
		name: "quorum-killed", what: "replica and witness lose power and return", expect: either, bound: 4 * time.Minute,
		inject: func(r *trial) func() {
			r.powerOff(r.replica)
			r.powerOff("witness")
			r.lasts(10 * time.Second)
			r.powerOn("witness")
			r.powerOn(r.replica)
			return func() {}
		},
	},
}

// leadBoth puts etcd's leader on the primary's host. It does not stay there for
// long: the witness gets it as soon as it is found to be back.
func (r *trial) leadBoth() {
	r.Helper()
	r.must(r.Lab.Isolate("witness"))
	r.until("etcd's leader to be on "+r.leader, func() error { return r.leadEtcd(r.leader) })
	r.must(r.Lab.Rejoin("witness"))
	r.injected = r.history.Now()
}

func cutPeers(r *trial) func() {
	r.must(r.Lab.CutPort(etcdPeerPort))
	return func() { r.must(r.Lab.HealPort(etcdPeerPort)) }
}

// missed waits until a node says that another does not answer.
func (r *trial) missed(asked, lost string) {
	r.Helper()
	_, err := r.WaitStatus(within(r.T, patience), asked, lost+" to be missed", func(s node.Status) bool {
		return slices.ContainsFunc(s.Members, func(m node.MemberStatus) bool { return m.Name == lost && !m.Reachable })
	})
	r.must(err)
}
