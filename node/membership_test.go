package node

import (
	"context"
	"crypto/tls"
	"errors"
	"net/http"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
)

func TestDecideRemove(t *testing.T) {
	known := []string{"n1", "n2", "w"}
	three := leaveObservation{members: 3, voters: 3, answering: 3, voter: true, allowEven: true}
	dead := three
	dead.answering, dead.silent = 2, true
	with := func(o leaveObservation, change func(*leaveObservation)) leaveObservation {
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    removeObservation
		want error // nil: it may
		says string
	}{
		{"unknown", removeObservation{name: "n9", known: known}, cluster.ErrBadRequest, `there is no node "n9": the cluster has n1, n2, w`},
		{"this node", removeObservation{leaveObservation: three, name: "n1", known: known, self: true}, cluster.ErrBadRequest, "pgha leave"},
		{"the witness", removeObservation{leaveObservation: with(three, func(o *leaveObservation) { o.allowEven = false }), name: "w", known: known}, cluster.ErrConflict, "w cannot be removed: 2 voters would remain"},
		{"the witness, knowingly", removeObservation{leaveObservation: three, name: "w", known: known}, nil, ""},
		{"a dead node", removeObservation{leaveObservation: dead, name: "w", known: known}, nil, ""},
		{"a dead node, and another", removeObservation{leaveObservation: with(dead, func(o *leaveObservation) { o.answering = 1 }), name: "w", known: known}, cluster.ErrConflict, "only 1 of 3 voters answer"},
		{"the only voter", removeObservation{leaveObservation: leaveObservation{members: 2, voters: 1, answering: 1, voter: true}, name: "n2", known: known}, cluster.ErrConflict, "only etcd voter"},
		{"the primary that nobody can replace", removeObservation{leaveObservation: with(three, func(o *leaveObservation) { o.data, o.leader, o.noSuccess = true, true, "n2 is not in sync yet" }), name: "n1", known: known}, cluster.ErrConflict, "nobody can take over: n2 is not in sync yet"},
		{"the last data", removeObservation{leaveObservation: with(dead, func(o *leaveObservation) { o.data = true }), name: "n1", known: known}, cluster.ErrConflict, "last data node with data"},
		{"a join that has not finished", removeObservation{leaveObservation: leaveObservation{members: 4, voters: 3, answering: 1, data: true}, name: "n2", known: known, joining: true}, nil, ""},
		{"what is left of a voter", removeObservation{leaveObservation: leaveObservation{members: 4, voters: 4, answering: 3, voter: true, silent: true}, name: "ghost", known: known, ghost: true}, nil, ""},
		{"what is left of a voter, of three", removeObservation{leaveObservation: leaveObservation{members: 3, voters: 3, answering: 2, voter: true, silent: true}, name: "ghost", known: known, ghost: true}, cluster.ErrConflict, "--allow-even"},
	} {
		t.Run(tc.name, func(t *testing.T) { checkDecision(t, decideRemove(tc.o), tc.want, tc.says) })
	}
}

func checkDecision(t *testing.T, err, want error, says string) {
	t.Helper()
	if want == nil && err != nil || want != nil && (!errors.Is(err, want) || !strings.Contains(err.Error(), says)) {
		t.Errorf("decided %v, want %q", err, says)
	}
}

func TestDecideReplace(t *testing.T) {
	ok := replaceObservation{
		leaveObservation: leaveObservation{members: 3, voters: 3, answering: 2, voter: true, silent: true, data: true, copies: 1},
		name:             "n2", known: []string{"n1", "n2", "w"}, role: cluster.RoleData,
	}
	for _, tc := range []struct {
		name   string
		change func(*replaceObservation)
		want   error
		says   string
	}{
		{"a dead replica", func(*replaceObservation) {}, nil, ""},
		{"a dead witness", func(o *replaceObservation) {
			o.role, o.as, o.data, o.copies = cluster.RoleWitness, cluster.RoleWitness, false, 0
		}, nil, ""},
		{"a dead learner", func(o *replaceObservation) { o.voter, o.voters, o.answering = false, 1, 1 }, nil, ""},
		{"unknown", func(o *replaceObservation) { o.name = "n9" }, cluster.ErrBadRequest, "the cluster has n1, n2, w"},
		{"this node", func(o *replaceObservation) { o.self = true }, cluster.ErrBadRequest, "another one"},
		{"by another kind", func(o *replaceObservation) { o.as = cluster.RoleWitness }, cluster.ErrBadRequest, "n2 is a data node"},
		{"it answers", func(o *replaceObservation) { o.answers = true }, cluster.ErrConflict, "n2 cannot be replaced: it answers"},
		{"the primary still", func(o *replaceObservation) { o.owner = true }, cluster.ErrConflict, "wait until a replica has taken over"},
		{"joining", func(o *replaceObservation) { o.joining = true }, cluster.ErrConflict, "pgha member remove n2"},
		{"no quorum without it", func(o *replaceObservation) { o.answering = 1 }, cluster.ErrConflict, "only 1 of 3 voters answer"},
		{"the only copy", func(o *replaceObservation) { o.copies = 0 }, cluster.ErrConflict, "no other data node"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := ok
			tc.change(&o)
			checkDecision(t, decideReplace(o), tc.want, tc.says)
		})
	}
}

func TestDecideStanding(t *testing.T) {
	at := time.Unix(1900000000, 0)
	roster := []cluster.Member{{Name: "n1"}, {Name: "n2"}}
	former := []cluster.FormerMember{ // the latest first
		{Name: "n2", MemberID: 22, RemovedAt: at, By: "root@n1"}, {Name: "w", MemberID: 33, RemovedAt: at.Add(-time.Hour)}, {Name: "w", MemberID: 32},
	}
	for _, tc := range []struct {
		name    string
		who     string
		id      uint64
		removed bool
		by      string
		at      time.Time
	}{
		{"a member", "n1", 11, false, "", time.Time{}},
		{"a member that does not know its etcd member", "n1", 0, false, "", time.Time{}},
		{"the new host of a name", "n2", 23, false, "", time.Time{}},
		{"the new host of a name, that does not know its etcd member", "n2", 0, false, "", time.Time{}},
		{"the old host of a name", "n2", 22, true, "root@n1", at},
		{"removed", "w", 32, true, "", time.Time{}},
		{"removed, its data is gone", "w", 0, true, "", at.Add(-time.Hour)},
		{"removed in a life that is forgotten", "w", 31, true, "", at.Add(-time.Hour)},
		{"forgotten", "x", 44, true, "", time.Time{}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, removed := decideStanding(roster, former, tc.who, tc.id)
			if removed != tc.removed || f.By != tc.by || !f.RemovedAt.Equal(tc.at) || removed && f.Name != tc.who {
				t.Errorf("removed %t: %+v", removed, f)
			}
		})
	}
}

func TestFindGhosts(t *testing.T) {
	m := func(name, addr string) cluster.Member {
		return cluster.Member{Name: name, Addr: netip.MustParseAddr(addr), Ports: cluster.DefaultPorts()}
	}
	roster := []cluster.Member{m("n1", "10.0.0.1"), m("n2", "10.0.0.2"), m("lost", "10.0.0.4")}
	etcd := []embedded.Member{
		{ID: 1, Name: "n1", PeerURL: "https://10.0.0.1:2380"}, {ID: 2, PeerURL: "https://10.0.0.2:2380", Learner: true},
		{ID: 0xab, Name: "old", PeerURL: "https://10.0.0.9:2380"},
	}
	v := patroni.ClusterView{Members: []patroni.MemberKey{{Name: "n1"}, {Name: "gone"}}, Config: map[string]any{"slots": map[string]any{"backup": nil}}}
	seen := map[string]traces{
		"n1": {Primary: true, Slots: []string{"n2", "gone", "backup"}, Servers: []string{"n1", "n2", "lost"}},
		"n2": {Slots: []string{"stale"}, Servers: []string{"n1", "gone"}},
	}
	var got []string
	for _, g := range findGhosts(roster, etcd, v, seen) {
		got = append(got, g.What+" -> "+g.Mend)
	}
	want := []string{
		`etcd has a voter "old" (https://10.0.0.9:2380) that is no node of this cluster -> pgha member remove ab`,
		`lost is on the roster, but has no etcd member -> pgha member remove lost; then pgha reset and pgha join on it`,
		`Patroni has a member "gone" that is no node of this cluster -> pgha member remove gone`,
		`PostgreSQL on n1 keeps WAL in a replication slot "gone" for nobody -> on n1: pgha psql -c "SELECT pg_drop_replication_slot('gone')"`,
		`HAProxy on n2 has a server "gone" that is no node of this cluster -> on n2: pgha logs haproxy says why it has not been loaded anew`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("ghosts (-want +got):\n%s", d)
	}
}

// What a node was told stays true after a restart, and what it served is off.
func TestRemovalIsKept(t *testing.T) {
	n := opened(t)
	r := Removal{At: time.Unix(1900000000, 0).UTC(), By: "root@n2", Why: "it was removed"}
	n.markRemoved(r)
	n.markRemoved(Removal{Why: "again"}) // the first word counts
	const text = `this node was removed from cluster "shop" by root@n2 at 2030-03-17T17:46:40Z (it was removed)`
	s := n.status(t.Context())
	if s.Health != Unknown || s.Verdict != text || len(s.ToDo) != 1 || !strings.Contains(s.ToDo[0], "pgha reset, then pgha join TOKEN") {
		t.Errorf("status is %+v", s)
	}
	state, err := LoadState(n.paths)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(&r, state.Removed); d != "" || state.ClusterID != n.state.ClusterID {
		t.Errorf("on disk (-want +got):\n%s", d)
	}
	again, err := Open(Options{Paths: n.paths, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	if got := again.status(t.Context()).Verdict; got != text {
		t.Errorf("after a restart: %s", got)
	}
	if !n.leaving.Load() {
		t.Error("Patroni would be started again")
	}
}

// A node in doubt asks until somebody can tell, and believes it.
func TestWatchStanding(t *testing.T) {
	n := opened(t)
	var asked atomic.Int32
	sock, err := tls.Listen("tcp", "127.0.0.1:0", n.certs.ServerConfig(tls.RequireAndVerifyClientCert))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathStanding, func(w http.ResponseWriter, r *http.Request) {
		var req StandingRequest
		err := decode(w, r, &req)
		switch asked.Add(1) {
		case 1:
			err = errors.New("no quorum")
		case 2:
			reply(w, Standing{}, err) // a member
			return
		}
		reply(w, Standing{Removed: &cluster.FormerMember{Name: "n1", By: "root@n2", Why: "it was removed"}}, err)
	})
	run(t, func(ctx context.Context) error { return serveHTTP(ctx, sock, mux, discardLog()) })
	at := netip.MustParseAddrPort(sock.Addr().String())
	peer := cluster.Member{Name: "n2", Addr: at.Addr()}
	peer.Ports.API = at.Port()
	n.remember(world{Members: []cluster.Member{n.self(), peer}})
	n.doubtful(forEver)
	run(t, n.watchStanding)
	until(t, "the node believes it", func() bool { return n.removal.Load() != nil })
	if r := n.removal.Load(); asked.Load() != 3 || r.By != "root@n2" || r.Why != "it was removed" {
		t.Errorf("after %d questions: %+v", asked.Load(), r)
	}
	n.seen.client.CloseIdleConnections()
}
