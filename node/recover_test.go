package node

import (
	"strings"
	"testing"
	"time"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

func TestDecideRecover(t *testing.T) {
	fit := recoverObservation{
		self: "n2", clusterID: "c1", dataNodes: []string{"n1", "n2"}, holds: holding{Complete: true, Text: "it has all"}, inSnapshot: true,
	}
	mine, foreign := &SnapshotInfo{ClusterID: "c1", Cluster: "main"}, &SnapshotInfo{ClusterID: "c2", Cluster: "other"}
	newer := &SnapshotInfo{File: "new.snap", ClusterID: "c1", At: time.Unix(10, 0)}
	for _, tc := range []struct {
		name   string
		change func(*recoverObservation)
		want   string // part of the refusal; "" = none
	}{
		{"the survivor with everything", func(*recoverObservation) {}, ""},
		{"a witness", func(o *recoverObservation) { o.witness = true }, "n1, n2"},
		{"a node that was replaced", func(o *recoverObservation) { o.outOfService = "of the past" }, "of the past"},
		{"its disk was put back", func(o *recoverObservation) {
			o.outOfService, o.older, o.holds = "put back", true, holding{Text: "it lacks some"}
		}, "put back"},
		{"every disk was put back, and that is accepted", func(o *recoverObservation) {
			o.outOfService, o.older, o.holds, o.req.AllowDataLoss = "put back", true, holding{Text: "it lacks some"}, true
		}, ""},
		{"a node that was replaced, whatever is accepted", func(o *recoverObservation) {
			o.outOfService, o.req.AllowDataLoss = "of the past", true
		}, "of the past"},
		{"a quorum", func(o *recoverObservation) { o.quorum = true }, "nothing to recover"},
		{"another member answers", func(o *recoverObservation) { o.answering = []string{"n1 answers on 10.0.0.1:2380 (etcd)"} }, "n1 answers on 10.0.0.1:2380"},
		{"its etcd is damaged", func(o *recoverObservation) { o.etcd = "damaged" }, "restore a snapshot"},
		{"it has no copy of the data", func(o *recoverObservation) { o.database = "no database here" }, "no database here"},
		{"it may lack commits", func(o *recoverObservation) { o.holds = holding{Text: "it may lack some"} }, "it may lack some. To go on all the same, and lose them: --allow-data-loss"},
		{"it may lack commits, and that is accepted", func(o *recoverObservation) {
			o.holds, o.req.AllowDataLoss = holding{Text: "it may lack some"}, true
		}, ""},
		{"acceptance of loss does not pass by another member", func(o *recoverObservation) {
			o.answering, o.req.AllowDataLoss = []string{"n1 answers"}, true
		}, "n1 answers"},
		{"acceptance of loss does not pass by a quorum", func(o *recoverObservation) { o.quorum, o.req.AllowDataLoss = true, true }, "nothing to recover"},
		{"a snapshot", func(o *recoverObservation) { o.restore = mine }, ""},
		{"a snapshot, over a node that is alone with its quorum", func(o *recoverObservation) { o.restore, o.quorum = mine, true }, ""},
		{"a snapshot, in place of a damaged etcd", func(o *recoverObservation) { o.restore, o.etcd = mine, "damaged" }, ""},
		{"a snapshot, and another member answers", func(o *recoverObservation) { o.restore, o.answering = mine, []string{"n1 answers"} }, "n1 answers"},
		{"a snapshot of another cluster", func(o *recoverObservation) { o.restore = foreign }, "of cluster other (c2)"},
		{"a snapshot from before this node joined", func(o *recoverObservation) { o.restore, o.inSnapshot = mine, false }, "n2 is not on the roster"},
		{"an older snapshot", func(o *recoverObservation) { o.restore, o.newer = mine, newer }, "new.snap"},
		{"an older snapshot, as asked for", func(o *recoverObservation) { o.restore, o.newer, o.req.Older = mine, newer, true }, ""},
		{"a snapshot on a node that may lack commits", func(o *recoverObservation) {
			o.restore, o.holds = mine, holding{Text: "it may lack some"}
		}, "--allow-data-loss"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o := fit
			tc.change(&o)
			got := decideRecover(o)
			if (tc.want == "") != (got == "") || !strings.Contains(got, tc.want) {
				t.Errorf("refusal is %q, want %q", got, tc.want)
			}
		})
	}
}

func TestDecideHolding(t *testing.T) {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	record := func(owner, last string) *gate.Record { return &gate.Record{Owner: owner, Last: last} }
	sync := func(leader string, standbys ...string) patroni.SyncState {
		return patroni.SyncState{Leader: leader, Standbys: standbys}
	}
	for _, tc := range []struct {
		name     string
		known    known
		complete bool
		lacks    uint64
		want     string
	}{
		{"nothing is known", known{}, false, 0, "does not know who was the primary"},
		{"the primary", known{At: at, Record: record("n2", "n2")}, true, 0, "was the primary at"},
		{"it had just taken over", known{At: at, Record: record("n2", "n1")}, true, 0, "was the primary"},
		{"another has taken over and never opened", known{At: at, Record: record("n1", "n2")}, true, 0, "was the primary"},
		{"the synchronous standby", known{At: at, Record: record("n1", "n1"), Sync: sync("n1", "n2")}, true, 0, "synchronous standby of n1"},
		{"the primary had gone on alone", known{At: at, Record: record("n1", "n1"), Sync: sync("n1")}, false, 0, "was no synchronous standby of n1"},
		{"the sync key is of a primary before", known{At: at, Record: record("n1", "n1"), Sync: sync("n3", "n2")}, false, 0, "may lack"},
		{"one of several of which any may lack a commit", known{At: at, Record: record("n1", "n1"), Sync: patroni.SyncState{Leader: "n1", Standbys: []string{"n2", "n3"}, Quorum: 1}}, false, 0, "may lack"},
		{"asynchronous", known{At: at, Async: true, Record: record("n1", "n1"), Sync: sync("n1", "n2")}, false, 0, "asynchronous replica of n1"},
		{"asynchronous and behind", known{At: at, Async: true, Record: record("n1", "n1"), Optime: 5000, Position: 3000}, false, 2000, "at least"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			h := decideHolding("n2", tc.known)
			if h.Complete != tc.complete || h.Lacks != tc.lacks || !strings.Contains(h.Text, tc.want) {
				t.Errorf("got %+v", h)
			}
			if !tc.known.At.IsZero() && !strings.Contains(h.Text, at.Local().Format(time.DateTime)) {
				t.Errorf("it does not say of when this is: %s", h.Text)
			}
		})
	}
}

func TestAdvice(t *testing.T) {
	roster := []cluster.Member{{Name: "n1", Role: cluster.RoleData}, {Name: "n2", Role: cluster.RoleData}, {Name: "w", Role: cluster.RoleWitness}}
	k := known{At: time.Unix(1, 0), Record: &gate.Record{Owner: "n1", Last: "n1"}, Sync: patroni.SyncState{Leader: "n1", Standbys: []string{"n2"}}}
	for _, tc := range []struct {
		name      string
		self      string
		role      cluster.NodeRole
		answering []string
		want      []string
		not       string
	}{
		{"alone", "n2", cluster.RoleData, []string{"n2"}, []string{"start n1 or w", "synchronous standby of n1", "pgha recover quorum", "n1 and w are lost for good"}, ""},
		{"with somebody else", "n2", cluster.RoleData, []string{"n2", "w"}, []string{"start n1:"}, "recover quorum"},
		{"a witness", "w", cluster.RoleWitness, []string{"w"}, []string{"start n1 or n2", "this witness has no data"}, "synchronous"},
		{"everybody is there", "n2", cluster.RoleData, []string{"n1", "n2", "w"}, nil, "start"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got := strings.Join(adviceFor(tc.self, tc.role, roster, tc.answering, k), "\n")
			for _, w := range tc.want {
				if !strings.Contains(got, w) {
					t.Errorf("%q is not said: %s", w, got)
				}
			}
			if tc.not != "" && strings.Contains(got, tc.not) {
				t.Errorf("%q is said: %s", tc.not, got)
			}
		})
	}
}

func TestGenerationReplaces(t *testing.T) {
	early, late := time.Unix(100, 0), time.Unix(200, 0)
	for _, tc := range []struct {
		name   string
		g, old Generation
		want   bool
	}{
		{"a later one", Generation{Number: 2, ID: "a"}, Generation{Number: 1}, true},
		{"an earlier one", Generation{Number: 1}, Generation{Number: 2, ID: "a"}, false},
		{"the same", Generation{Number: 2, ID: "a", At: early}, Generation{Number: 2, ID: "a", At: early}, false},
		{"who does not know its own", Generation{Number: 2, ID: "a"}, Generation{}, false},
		{"one that says nothing", Generation{}, Generation{Number: 1}, false},
		{"a twin that began later", Generation{Number: 2, ID: "a", At: late}, Generation{Number: 2, ID: "b", At: early}, true},
		{"a twin that began earlier", Generation{Number: 2, ID: "b", At: early}, Generation{Number: 2, ID: "a", At: late}, false},
		{"a twin of the same moment", Generation{Number: 2, ID: "b", At: late}, Generation{Number: 2, ID: "a", At: late}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := tc.g.replaces(tc.old); got != tc.want {
				t.Errorf("got %t", got)
			}
			if tc.want && tc.old.replaces(tc.g) {
				t.Error("each replaces the other")
			}
		})
	}
}

func TestPrunable(t *testing.T) {
	var all []SnapshotInfo
	add := func(n int, reason, damaged string) {
		for i := range n {
			all = append(all, SnapshotInfo{File: reason + string(rune('a'+i)), Reason: reason, Damaged: damaged})
		}
	}
	add(9, "daily", "")
	add(8, "manual", "")
	add(4, "before-member-remove", "")
	add(4, "before-rotate-ca", "")
	add(1, "daily-x", "damaged")
	got := strings.Join(prunable(all), " ")
	if want := "dailyh dailyi before-rotate-cad"; got != want {
		t.Errorf("pruned %q, want %q", got, want)
	}
}

func TestDailyDue(t *testing.T) {
	now := time.Unix(1_000_000, 0)
	for name, tc := range map[string]struct {
		all  []SnapshotInfo
		want bool
	}{
		"none":                 {nil, true},
		"one of today":         {[]SnapshotInfo{{Reason: "daily", At: now.Add(-time.Hour)}}, false},
		"one of yesterday":     {[]SnapshotInfo{{Reason: "daily", At: now.Add(-25 * time.Hour)}}, true},
		"another kind":         {[]SnapshotInfo{{Reason: "manual", At: now.Add(-time.Hour)}}, true},
		"a damaged one":        {[]SnapshotInfo{{Reason: "daily", Damaged: "yes", At: now.Add(-time.Hour)}}, true},
		"the clock went back":  {[]SnapshotInfo{{Reason: "daily", At: now.Add(48 * time.Hour)}}, true},
		"the newest is enough": {[]SnapshotInfo{{Reason: "daily", At: now.Add(-time.Hour)}, {Reason: "daily", At: now.Add(-30 * time.Hour)}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := dailyDue(tc.all, now); got != tc.want {
				t.Errorf("got %t", got)
			}
		})
	}
}
