package node

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/firewall"
	"pgha/patroni"
	"pgha/pki"
	"pgha/supervisor"
)

func TestDecideLeave(t *testing.T) {
	for _, tc := range []struct {
		name string
		o    leaveObservation
		ok   bool
		why  string // part of it
	}{
		{"the last node", leaveObservation{members: 1, voters: 1, answering: 1, voter: true, leader: true}, true, "the cluster ends with it"},
		{"the only voter of two", leaveObservation{members: 2, voters: 1, answering: 1, voter: true, leader: true, successor: "yes"}, false, "only etcd voter"},
		{"the learner of two", leaveObservation{members: 2, voters: 1, answering: 1}, true, ""},
		{"a learner whose voter is away", leaveObservation{members: 3, voters: 2, answering: 0}, true, ""},
		{"a voter of three", leaveObservation{members: 3, voters: 3, answering: 3, voter: true}, false, "2 voters would remain"},
		{"a voter of three, knowingly", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, allowEven: true}, true, ""},
		{"a voter of three, with a learner for its place", leaveObservation{members: 4, voters: 3, answering: 3, voter: true, learners: 1}, true, ""},
		{"a voter of three, one away", leaveObservation{members: 3, voters: 3, answering: 2, voter: true}, false, "only 2 of 3 voters answer"},
		{"a voter of two", leaveObservation{members: 2, voters: 2, answering: 2, voter: true}, true, ""},
		{"a voter of two, the other away", leaveObservation{members: 2, voters: 2, answering: 1, voter: true}, false, "only 1 of 2 voters answer"},
		{"a voter of five", leaveObservation{members: 5, voters: 5, answering: 5, voter: true}, false, "4 voters would remain"},
		{"a voter of five, one away", leaveObservation{members: 5, voters: 5, answering: 4, voter: true, allowEven: true}, true, ""},
		{"a voter of five, two away", leaveObservation{members: 5, voters: 5, answering: 3, voter: true}, false, "only 3 of 5"},
		{"a dead voter of three", leaveObservation{members: 3, voters: 3, answering: 2, voter: true, silent: true}, false, "pgha member replace"},
		{"a dead voter of three, knowingly", leaveObservation{members: 3, voters: 3, answering: 2, voter: true, silent: true, allowEven: true}, true, ""},
		{"a dead voter of three, another away", leaveObservation{members: 3, voters: 3, answering: 1, voter: true, silent: true}, false, "only 1 of 3"},
		{"a dead voter of two", leaveObservation{members: 2, voters: 2, answering: 1, voter: true, silent: true}, true, ""},
		{"a dead learner", leaveObservation{members: 2, voters: 1, answering: 1, silent: true}, true, ""},
		{"the primary with a successor", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, leader: true, successor: "yes", allowEven: true, data: true, copies: 1}, true, ""},
		{"the last data node with data", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, data: true, allowEven: true}, false, "last data node with data"},
		{"a data node while there is no primary", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, data: true, copies: 1, noPrimary: true, allowEven: true}, false, "there is no primary now"},
		{"a witness while there is no primary", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, noPrimary: true, allowEven: true}, true, ""},
		{"the primary without one", leaveObservation{members: 3, voters: 3, answering: 3, voter: true, leader: true, noSuccess: "n2 is not in sync yet"}, false, "nobody can take over: n2 is not in sync yet"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			ok, why := decideLeave(tc.o)
			if ok != tc.ok || !strings.Contains(why, tc.why) || !ok && why == "" {
				t.Errorf("decideLeave = %v, %q, want %v, %q", ok, why, tc.ok, tc.why)
			}
		})
	}
}

func TestMustWait(t *testing.T) {
	up := patroni.ClusterView{Initialized: true}
	for _, tc := range []struct {
		name    string
		founder bool
		w       world
		wait    bool
		why     string
	}{
		{"nothing is known", true, world{}, true, "waiting for etcd: starting this member"},
		{"nothing is known of three", false, world{Members: roster()}, true, "a majority of its voters must be up (n1, n2, w)"},
		{"the founder initialises", true, world{Viewed: true}, false, ""},
		{"others wait for it", false, world{Viewed: true}, true, "waiting for the first node to initialise PostgreSQL"},
		{"others once it has", false, world{Viewed: true, View: up}, false, ""},
		{"what was known does not count", false, world{View: up}, true, "waiting for etcd"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := &Node{state: State{Founder: tc.founder}, world: tc.w}
			wait, why := n.mustWait(tc.w)
			if wait != tc.wait || !strings.Contains(why, tc.why) {
				t.Errorf("mustWait = %v, %q, want %v, %q", wait, why, tc.wait, tc.why)
			}
		})
	}
}

// roster is that of two data nodes and a witness.
func roster() []cluster.Member {
	member := func(name, addr string, role cluster.NodeRole) cluster.Member {
		return cluster.Member{Name: name, Role: role, Addr: netip.MustParseAddr(addr), Ports: cluster.DefaultPorts(), State: cluster.StateMember}
	}
	return []cluster.Member{
		member("n1", "10.0.0.1", cluster.RoleData), member("n2", "10.0.0.2", cluster.RoleData), member("w", "10.0.0.3", cluster.RoleWitness),
	}
}

func TestGoneSlots(t *testing.T) {
	physical := map[string]any{"type": "physical"}
	for _, tc := range []struct {
		name   string
		config map[string]any
		want   []string
	}{
		{"no configuration", nil, nil},
		{"no slots", map[string]any{"ttl": 30}, nil},
		{"slots of another kind", map[string]any{"slots": "none"}, nil},
		{"members only", map[string]any{"slots": map[string]any{"n1": physical, "n2": physical}}, nil},
		{"one that has left", map[string]any{"slots": map[string]any{"n1": physical, "n3": physical}}, []string{"n3"}},
		{"an operator's logical slot", map[string]any{"slots": map[string]any{"cdc": map[string]any{"type": "logical", "database": "d", "plugin": "p"}}}, nil},
		{"an operator's physical slot", map[string]any{"slots": map[string]any{"backup": map[string]any{"type": "physical", "lsn": 1}}}, nil},
		{"no slot at all", map[string]any{"slots": map[string]any{"n9": nil}}, nil},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := goneSlots(world{Members: roster(), View: patroni.ClusterView{Config: tc.config}})
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("slots (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLeaderOf(t *testing.T) {
	primary, replica := Report{Postgres: PostgresReport{Role: pgPrimary}}, Report{Postgres: PostgresReport{Role: pgReplica}}
	for _, tc := range []struct {
		name    string
		key     string
		reports map[string]Report
		want    string
	}{
		{"nobody has the key", "", map[string]Report{"n1": primary}, ""},
		{"the holder is primary", "n1", map[string]Report{"n1": primary, "n2": replica}, "n1"},
		{"the holder is being promoted", "n1", map[string]Report{"n1": replica}, ""},
		{"the holder's PostgreSQL does not run", "n1", map[string]Report{"n1": {}}, ""},
		{"the holder does not answer", "n1", map[string]Report{"n2": replica}, "n1"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := leaderOf(patroni.ClusterView{Leader: tc.key}, tc.reports); got != tc.want {
				t.Errorf("leaderOf = %q, want %q", got, tc.want)
			}
		})
	}
}

func TestLagOf(t *testing.T) {
	at := func(lsn uint64) Report { return Report{Postgres: PostgresReport{LSN: lsn}} }
	for _, tc := range []struct {
		name    string
		member  string
		lsn     uint64
		leader  string
		optime  uint64
		reports map[string]Report
		want    int64
	}{
		{"the primary itself", "n1", 0, "n1", 0, nil, 0},
		{"unknown position", "n2", 0, "n1", 100, nil, -1},
		{"behind what the primary says", "n2", 60, "n1", 50, map[string]Report{"n1": at(100)}, 40},
		{"behind what the primary wrote last", "n2", 60, "n1", 100, nil, 40},
		{"the newer of both counts", "n2", 60, "n1", 100, map[string]Report{"n1": at(80)}, 40},
		{"in step", "n2", 100, "n1", 0, map[string]Report{"n1": at(100)}, 0},
		{"ahead of an old report", "n2", 120, "n1", 0, map[string]Report{"n1": at(100)}, 0},
		{"no primary", "n2", 60, "", 100, map[string]Report{"": at(500)}, 40},
	} {
		t.Run(tc.name, func(t *testing.T) {
			v := patroni.ClusterView{Status: patroni.StatusState{Optime: tc.optime}}
			if got := lagOf(tc.member, tc.lsn, tc.leader, v, tc.reports); got != tc.want {
				t.Errorf("lagOf = %d, want %d", got, tc.want)
			}
		})
	}
}

func TestMemberStatus(t *testing.T) {
	soon, late := time.Date(2030, 1, 1, 0, 0, 0, 0, time.UTC), time.Date(2031, 1, 1, 0, 0, 0, 0, time.UTC)
	view := patroni.ClusterView{
		Leader: "n1", Sync: patroni.SyncState{Leader: "n1", Standbys: []string{"n2"}}, Status: patroni.StatusState{Optime: 1000},
		Members: []patroni.MemberKey{
			{Name: "n1", State: "running", Timeline: 3, XLogLocation: 1000},
			{Name: "n2", State: "streaming", Timeline: 3, XLogLocation: 900, Tags: map[string]any{"nofailover": true}},
		},
	}
	etcd := embedded.Status{LeaderID: 3, Members: []embedded.Member{
		{ID: 1, Name: "n1"}, {ID: 2, PeerURL: "https://10.0.0.2:2380", Learner: true}, {ID: 3, Name: "w"},
	}}
	reports := map[string]Report{
		"n1": {Version: "2", Postgres: PostgresReport{Role: pgPrimary, State: "running", Timeline: 3, LSN: 1000}},
		"n2": {Version: "2", Problems: []string{"p"}, Waiting: "w",
			Postgres: PostgresReport{Role: pgReplica, State: "streaming", Timeline: 3, LSN: 940},
			Certs:    []CertReport{{Role: pki.RoleNode, NotAfter: late}, {Role: pki.RolePostgres, NotAfter: soon}}},
		"w": {Version: "2"},
	}
	members := roster()
	addr := func(i int) netip.Addr { return members[i].Addr }
	for _, tc := range []struct {
		name   string
		member int
		change func(m *cluster.Member, reports map[string]Report)
		want   MemberStatus
	}{
		{"the primary", 0, nil, MemberStatus{
			Name: "n1", Role: cluster.RoleData, Addr: addr(0), PostgresPort: 5442, Reachable: true, Postgres: pgPrimary, State: "running",
			Timeline: 3, LSN: 1000, Etcd: etcdVoter, Version: "2",
		}},
		{"the replica, as its node reports it", 1, nil, MemberStatus{
			Name: "n2", Role: cluster.RoleData, Addr: addr(1), PostgresPort: 5442, Reachable: true, Postgres: pgReplica, State: "streaming",
			Timeline: 3, LSN: 940, LagBytes: 60, Sync: true, NoFailover: true, Etcd: etcdLearner, CertExpires: soon, Version: "2",
			Waiting: "w", Problems: []string{"p"},
		}},
		{"the witness", 2, nil, MemberStatus{
			Name: "w", Role: cluster.RoleWitness, Addr: addr(2), Reachable: true, LagBytes: -1, Etcd: etcdVoter, EtcdLeader: true, Version: "2",
		}},
		{"silent: only what etcd knows", 1, func(m *cluster.Member, r map[string]Report) { delete(r, "n2"); m.Version = "1" }, MemberStatus{
			Name: "n2", Role: cluster.RoleData, Addr: addr(1), Timeline: 3, LSN: 900, LagBytes: -1, Sync: true, NoFailover: true,
			Etcd: etcdLearner, Version: "1",
		}},
		{"joining", 2, func(m *cluster.Member, r map[string]Report) {
			m.Name, m.State, m.Addr = "n9", cluster.StateJoining, netip.MustParseAddr("10.0.0.9")
		}, MemberStatus{
			Name: "n9", Role: cluster.RoleWitness, Addr: netip.MustParseAddr("10.0.0.9"), LagBytes: -1, Etcd: etcdNone,
			Waiting: "it has not finished joining",
		}},
		{"its Patroni does not answer", 1, func(m *cluster.Member, r map[string]Report) {
			r["n2"] = Report{Postgres: PostgresReport{State: "patroni does not answer"}}
		}, MemberStatus{
			Name: "n2", Role: cluster.RoleData, Addr: addr(1), PostgresPort: 5442, Reachable: true, State: "patroni does not answer",
			Timeline: 3, LSN: 900, LagBytes: 100, Sync: true, NoFailover: true, Etcd: etcdLearner,
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m, r := members[tc.member], map[string]Report{}
			for name, report := range reports {
				r[name] = report
			}
			if tc.change != nil {
				tc.change(&m, r)
			}
			got := memberStatus(m, view, etcd, "n1", r)
			if diff := cmp.Diff(tc.want, got, cmpAddrs); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
		})
	}
}

func TestGhosts(t *testing.T) {
	members := []embedded.Member{
		{Name: "n1", PeerURL: "https://10.0.0.1:2380"},
		{PeerURL: "https://10.0.0.2:2380"}, // n2, not started yet
		{Name: "w", PeerURL: "https://10.9.9.9:2380"},
	}
	if got := ghosts(roster(), members); len(got) > 0 {
		t.Errorf("ghosts among members of the roster: %q", got)
	}
	got := ghosts(roster(), append(members, embedded.Member{Name: "old", PeerURL: "https://10.0.0.7:2380"}))
	if len(got) != 1 || !strings.Contains(got[0], `"old" (https://10.0.0.7:2380) that is no node`) {
		t.Errorf("ghosts = %q", got)
	}
}

func TestClassifyPatroniExit(t *testing.T) {
	for line, stop := range map[string]bool{
		"": false, "killed": false,
		"CRITICAL: system ID mismatch, node n2 belongs to a different cluster: 1 != 2": true,
	} {
		got := classifyPatroniExit(supervisor.ExitStatus{Code: 1, LastLog: []string{"first", line, "last"}})
		if (got != supervisor.VerdictRestart) != stop {
			t.Errorf("exit with %q: verdict %+v", line, got)
		}
	}
}

func TestFirewallPolicy(t *testing.T) {
	cfg := NewConfig()
	cfg.Name, cfg.Address = "n1", netip.MustParseAddr("10.0.0.1")
	addrs := func(list ...string) (out []netip.Addr) {
		for _, s := range list {
			out = append(out, netip.MustParseAddr(s))
		}
		return out
	}
	clients := []netip.Prefix{netip.MustParsePrefix("10.1.0.0/16")}
	w := world{Members: roster(), JoinOpen: true, Settings: cluster.Settings{ClientNets: clients, ProbeAddrs: addrs("168.63.129.16")}}
	all := firewall.Ports{Postgres: 5442, ReadWrite: 5432, ReadOnly: 5433, Patroni: 8008, EtcdClient: 2379, EtcdPeer: 2380, Stats: 8404, Health: 8405, API: 8432}
	for _, tc := range []struct {
		name  string
		role  cluster.NodeRole
		state State
		w     world
		want  firewall.Policy
	}{
		{"a data node", cluster.RoleData, State{}, w, firewall.Policy{
			Mode: FirewallPorts, Ports: all, Members: addrs("10.0.0.1", "10.0.0.2", "10.0.0.3"), Clients: clients, Probes: addrs("168.63.129.16"), JoinOpen: true,
		}},
		{"a witness guards two ports", cluster.RoleWitness, State{}, w, firewall.Policy{
			Mode: FirewallPorts, Ports: firewall.Ports{EtcdPeer: 2380, API: 8432}, Members: addrs("10.0.0.1", "10.0.0.2", "10.0.0.3"),
			Clients: clients, Probes: addrs("168.63.129.16"), JoinOpen: true,
		}},
		{"former members may ask what became of them", cluster.RoleData, State{}, world{Members: roster(), Former: []cluster.FormerMember{
			{Name: "n2", Addr: addrs("10.0.0.9")[0]}, {Name: "n4", Addr: addrs("10.0.0.2")[0]}, {Name: "n2", Addr: addrs("10.0.0.9")[0]},
		}}, firewall.Policy{Mode: FirewallPorts, Ports: all, Members: addrs("10.0.0.1", "10.0.0.2", "10.0.0.3"), Former: addrs("10.0.0.9")}},
		{"the first start lets in whom the cluster's answer named", cluster.RoleData, State{InitialCluster: map[string]string{
			"n1": "https://10.0.0.1:2380", "n2": "https://10.0.0.2:2380", "bad": "nonsense", "worse": "https://host:2380",
		}}, world{}, firewall.Policy{Mode: FirewallPorts, Ports: all, Members: addrs("10.0.0.1", "10.0.0.2")}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := &Node{cfg: cfg, state: tc.state}
			n.cfg.Role = tc.role
			if diff := cmp.Diff(tc.want, n.firewallPolicy(tc.w), cmpAddrs); diff != "" {
				t.Errorf("policy (-want +got):\n%s", diff)
			}
		})
	}
}

func TestHealthText(t *testing.T) {
	for _, h := range []Health{Healthy, Degraded, NoLeader, Unknown} {
		text, err := h.MarshalText()
		if err != nil {
			t.Fatal(err)
		}
		got := Health(-1)
		if err := got.UnmarshalText(text); err != nil || got != h {
			t.Errorf("%v read back as %v, %v", h, got, err)
		}
	}
	var h Health
	if err := h.UnmarshalText([]byte("fine")); err == nil {
		t.Error("an unknown condition was read")
	}
}

// One failed read of the cluster's state is the normal price of a change of
// etcd's leader; three in a row are a problem.
func TestObserved(t *testing.T) {
	n := &Node{problems: map[string]string{}, log: discardLog()}
	fail := cluster.ErrUnavailable
	for i, want := range []int{0, 0, 1, 1} {
		if n.observed(fail); len(n.problems) != want {
			t.Errorf("after %d failed rounds there are %d problems, want %d", i+1, len(n.problems), want)
		}
	}
	if n.observed(nil); len(n.problems) != 0 {
		t.Errorf("problems after a good round: %v", n.problems)
	}
	if n.observed(fail); len(n.problems) != 0 {
		t.Errorf("a good round does not count: %v", n.problems)
	}
}
