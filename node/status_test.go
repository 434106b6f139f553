package node

import (
	"strings"
	"testing"

	"pgha/cluster"
	"pgha/postgres"
)

// three is a healthy cluster; cases change what they are about.
func three() observation {
	return observation{quorum: true, viewed: true, leader: "n1", maxLag: 1 << 20, members: []MemberStatus{
		{Name: "n1", Role: cluster.RoleData, Reachable: true, Postgres: pgPrimary, State: "running", Etcd: etcdVoter},
		{Name: "n2", Role: cluster.RoleData, Reachable: true, Postgres: pgReplica, State: "streaming", Sync: true, Etcd: etcdVoter},
		{Name: "w", Role: cluster.RoleWitness, Reachable: true, Etcd: etcdVoter},
	}}
}

func TestAssess(t *testing.T) {
	for _, tc := range []struct {
		name     string
		change   func(*observation)
		health   Health
		survives bool
		text     string // part of the verdict
		todo     string // part of one thing to do; "" = nothing to do
		promise  bool
	}{
		{"all is well", func(o *observation) {}, Healthy, true, "survivable now", "", true},
		{"the state cannot be read", func(o *observation) { o.viewed = false }, Unknown, false, "cannot read", "another", true},
		{"etcd is of no use here", func(o *observation) { o.viewed = false; o.problems = []string{"etcd: its data is damaged"} },
			Unknown, false, "cannot read", "its data is damaged", true},
		{"no quorum", func(o *observation) { o.quorum = false; o.members[1].Reachable = false; o.members[2].Reachable = false },
			NoLeader, false, "1 of 3 voters", "n2, w", false},
		{"the only voter is lost, as a learner sees it", func(o *observation) {
			o.viewed = false
			o.members = o.members[:2]
			o.members[0].Reachable, o.members[1].Etcd = false, etcdLearner
		}, NoLeader, false, "0 of 1 voters", "are down: n1", true},
		{"no primary", func(o *observation) { o.leader = ""; o.members[0].Postgres = "" }, NoLeader, false, "no primary", "logs patroni", false},
		{"primary silent", func(o *observation) {
			o.leader, o.silent = "", "n1"
			o.members[0].Reachable, o.members[0].Postgres = false, ""
		},
			NoLeader, false, "n1 does not answer", "takes over by itself within seconds", false},
		{"primary silent, replica behind", func(o *observation) {
			o.leader, o.silent = "", "n1"
			o.members[0].Reachable, o.members[0].Postgres, o.members[1].Sync = false, "", false
		}, NoLeader, false, "n1 does not answer", "no replica can take over: n2 is not in sync yet", false},
		{"replica lost", func(o *observation) { o.members[1].Reachable = false }, Degraded, false, "n1 is not covered: etcd would lose", "bring back n2", false},
		{"witness lost", func(o *observation) { o.members[2].Reachable = false }, Degraded, false, "n2 is not covered: etcd would lose", "bring back w", true},
		{"replica stopped", func(o *observation) { o.members[1].Postgres = ""; o.members[1].State = "stopped" },
			Degraded, false, "n2 is not a running replica (stopped)", "not running on n2", false},
		{"replica not in sync", func(o *observation) { o.members[1].Sync = false }, Degraded, false, "n2 is not in sync yet", "wait until n2", false},
		{"replica tagged", func(o *observation) { o.members[1].NoFailover = true }, Degraded, false, "nofailover", "", true},
		{"paused", func(o *observation) { o.paused = true }, Degraded, false, "paused", "resume", true},
		{"async and close", func(o *observation) { o.async = true; o.members[1].Sync = false; o.members[1].LagBytes = 100 }, Healthy, true, "survivable", "", true},
		{"async and far", func(o *observation) { o.async = true; o.members[1].Sync = false; o.members[1].LagBytes = 2 << 20 },
			Degraded, false, "lags too far behind (2.0 MB)", "", true},
		{"async, lag unknown", func(o *observation) { o.async = true; o.members[1].LagBytes = -1 }, Degraded, false, "lags too far", "", true},
		{"one node", func(o *observation) { o.members = o.members[:1] }, Degraded, false, "only etcd voter", "add a second data node", false},
		{"two nodes, no witness", func(o *observation) { o.members = o.members[:2]; o.members[1].Etcd = etcdLearner },
			Degraded, false, "the loss of n1 is not covered: it is the only etcd voter", "add a witness (pgha token create --witness)", true},
		{"two learners wait", func(o *observation) { o.members[1].Etcd = etcdLearner; o.members[2].Etcd = etcdLearner },
			Degraded, false, "only etcd voter", "become voters", true},
		{"two voters", func(o *observation) { o.members = o.members[:2] }, Degraded, false, "lose its quorum", "2 voters", true},
		{"a member's problem", func(o *observation) { o.members[1].Problems = []string{"disk nearly full"} }, Degraded, true, "needs attention", "n2: disk nearly full", true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := three()
			tc.change(&o)
			v := assess(o)
			if v.health != tc.health || v.survives != tc.survives {
				t.Errorf("health %v survives %v, want %v %v (%s)", v.health, v.survives, tc.health, tc.survives, v.text)
			}
			if !strings.Contains(v.text, tc.text) {
				t.Errorf("verdict %q does not say %q", v.text, tc.text)
			}
			all := strings.Join(v.todo, "\n")
			if (tc.todo == "") != (all == "") || !strings.Contains(all, tc.todo) {
				t.Errorf("to do %q, want %q", all, tc.todo)
			}
			if v.promise.Holds != tc.promise {
				t.Errorf("promise holds %v, want %v: %s", v.promise.Holds, tc.promise, v.promise.Text)
			}
		})
	}
}

func TestTwoNodesSurviveTheSecond(t *testing.T) {
	o := three()
	o.members = o.members[:2]
	o.members[1].Etcd = etcdLearner
	if v := assess(o); strings.Contains(v.text, "loss of n2") {
		t.Errorf("the loss of the learner's node is survivable, but: %s", v.text)
	}
}

// A Patroni that is away for a moment is no PostgreSQL that is away.
func TestSeenWithoutPatroni(t *testing.T) {
	silent := PostgresReport{State: noPatroni}
	for _, tc := range []struct {
		kind postgres.Kind
		from PostgresReport
		want string
	}{
		{postgres.Primary, silent, pgPrimary},
		{postgres.Recovery, silent, pgReplica},
		{postgres.Unknown, silent, ""},
		{postgres.Hung, silent, ""},
		{postgres.Primary, PostgresReport{State: "stopped"}, ""},
		{postgres.Primary, PostgresReport{State: "running", Role: pgReplica}, pgReplica},
	} {
		if got := tc.from.seen(postgres.Probe{Kind: tc.kind}).Role; got != tc.want {
			t.Errorf("%s, Patroni says %q: %q, want %q", tc.kind, tc.from.State, got, tc.want)
		}
	}
}
