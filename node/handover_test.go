package node

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

// fitMembers are a primary n1, a replica n2 in sync, and a witness.
func fitMembers() []handOverMember {
	return []handOverMember{
		{MemberStatus: MemberStatus{Name: "n1", Role: cluster.RoleData, Reachable: true, Postgres: pgPrimary, Timeline: 3}},
		{MemberStatus: MemberStatus{Name: "n2", Role: cluster.RoleData, Reachable: true, Postgres: pgReplica, Timeline: 3, Sync: true}, streaming: true},
		{MemberStatus: MemberStatus{Name: "w", Role: cluster.RoleWitness, Reachable: true}},
	}
}

func TestDecideHandOver(t *testing.T) {
	third := func(o *handOverObservation) *handOverMember {
		m := o.members[1]
		m.Name = "n3"
		o.members = append(o.members, m)
		return &o.members[len(o.members)-1]
	}
	for _, c := range []struct {
		name   string
		with   func(*handOverObservation)
		target string
		want   string
		why    string
	}{
		{"to the best", func(*handOverObservation) {}, "", "n2", ""},
		{"to a named one", func(*handOverObservation) {}, "n2", "n2", ""},
		{"an unknown node", func(*handOverObservation) {}, "n9", "", `no node "n9": the cluster has n1, n2, w`},
		{"a witness", func(*handOverObservation) {}, "w", "", "witness"},
		{"the primary", func(*handOverObservation) {}, "n1", "", "n1 is the primary already"},
		{"no primary", func(o *handOverObservation) { o.leader = "" }, "", "", "pgha failover"},
		{"paused", func(o *handOverObservation) { o.paused = true }, "", "", "pgha resume"},
		{"a request to Patroni", func(o *handOverObservation) { o.underWay = "a switchover to n2" }, "", "", "asked for a switchover to n2 already"},
		{"no answer", func(o *handOverObservation) { o.members[1].Reachable = false }, "n2", "", "does not answer"},
		{"maintenance", func(o *handOverObservation) { o.members[1].Maintenance = &cluster.Maintenance{} }, "n2", "", "pgha maintenance leave n2"},
		{"not running", func(o *handOverObservation) { o.members[1].Postgres, o.members[1].State = "", "starting" }, "n2", "", "not a running replica (starting)"},
		{"tagged", func(o *handOverObservation) { o.members[1].NoFailover = true }, "n2", "", "nofailover"},
		{"not streaming", func(o *handOverObservation) { o.members[1].streaming = false }, "n2", "", "does not stream from n1"},
		{"another timeline", func(o *handOverObservation) { o.members[1].Timeline = 2 }, "n2", "", "timeline 2, and n1 on 3"},
		{"not in sync", func(o *handOverObservation) { o.members[1].Sync = false }, "n2", "", "not in sync"},
		{"asynchronous", func(o *handOverObservation) { o.members[1].Sync, o.async = false, true }, "", "n2", ""},
		{"asynchronous, within bounds", func(o *handOverObservation) { o.async, o.maxLag, o.members[1].LagBytes = true, 10, 10 }, "", "n2", ""},
		{"asynchronous, lagging", func(o *handOverObservation) { o.async, o.maxLag, o.members[1].LagBytes = true, 10, 11 }, "n2", "", "lags too far behind (11 B, and 10 B are allowed)"},
		{"asynchronous, lag unknown", func(o *handOverObservation) { o.async, o.members[1].LagBytes = true, -1 }, "n2", "", "lags too far behind (unknown"},
		{"nobody fit", func(o *handOverObservation) { o.members[1].Sync = false }, "", "", "nobody can take over from n1: n2: it is not in sync"},
		{"no replica at all", func(o *handOverObservation) { o.members = o.members[:1] }, "", "", "there is no replica"},
		{"the one in sync", func(o *handOverObservation) {
			m := third(o)
			o.async, o.maxLag = true, 100
			o.members[1].Sync = false
			m.LagBytes = 5
		}, "", "n3", ""},
		{"the one that lags least", func(o *handOverObservation) { third(o); o.members[1].LagBytes = 5 }, "", "n3", ""},
		{"the first of equals", func(o *handOverObservation) { third(o) }, "", "n2", ""},
		{"the fit one", func(o *handOverObservation) { third(o); o.members[1].streaming = false }, "", "n3", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := handOverObservation{leader: "n1", members: fitMembers()}
			c.with(&o)
			got, err := decideHandOver(o, c.target)
			refusedWith(t, err, c.why)
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

// refusedWith checks that err is a refusal that says why, or nil for "".
func refusedWith(t *testing.T, err error, why string) {
	t.Helper()
	var refusal *cluster.Error
	switch {
	case why == "" && err == nil:
	case why == "" || !errors.As(err, &refusal) || !strings.Contains(err.Error(), why):
		t.Errorf("error %v, want a refusal with %q", err, why)
	}
}

func TestDecideStop(t *testing.T) {
	for _, c := range []struct {
		name     string
		with     func(*handOverObservation)
		to, why  string
		selfName string
	}{
		{"the primary", func(*handOverObservation) {}, "n2", "", "n1"},
		{"a replica", func(*handOverObservation) {}, "", "", "n2"},
		{"no primary", func(o *handOverObservation) { o.leader = "" }, "", "", "n1"},
		{"nobody fit", func(o *handOverObservation) { o.members[1].streaming = false }, "", "nobody can take over", "n1"},
		{"paused", func(o *handOverObservation) { o.paused = true }, "", "paused", "n1"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := handOverObservation{leader: "n1", members: fitMembers()}
			c.with(&o)
			to, why := decideStop(c.selfName, o)
			if to != c.to || (why == "") != (c.why == "") || !strings.Contains(why, c.why) {
				t.Errorf("%q, %q; want %q, %q", to, why, c.to, c.why)
			}
		})
	}
}

func TestRequestPending(t *testing.T) {
	for want, r := range map[string]request{
		"":                      {},
		"a switchover to n2":    {Leader: "n1", Member: "n2"},
		"a switchover":          {Leader: "n1"},
		"a switchover at later": {Leader: "n1", Member: "n2", At: "later"},
	} {
		if got := r.pending("n1"); got != want {
			t.Errorf("%+v: %q, want %q", r, got, want)
		}
	}
	for _, done := range []request{{Leader: "n2", Member: "n1"}, {Leader: "n2"}, {Member: "n1"}} {
		if got := done.pending("n1"); got != "" {
			t.Errorf("%+v is over, but %q", done, got)
		}
	}
}

func TestDecidePlan(t *testing.T) {
	now := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name string
		with func(*planObservation)
		why  string
	}{
		{"to the best", func(o *planObservation) { o.target = "" }, ""},
		{"to a replica", func(*planObservation) {}, ""},
		{"one that is not fit now", func(o *planObservation) { o.members[1].Reachable = false }, ""},
		{"no primary now", func(o *planObservation) { o.leader = "" }, ""},
		{"another is planned", func(o *planObservation) { o.planned = &PlannedSwitchover{By: "root@n1"} }, "--cancel first"},
		{"now", func(o *planObservation) { o.at = now }, "not in the future"},
		{"the past", func(o *planObservation) { o.at = now.Add(-time.Hour) }, "not in the future"},
		{"unknown", func(o *planObservation) { o.target = "n9" }, "no node"},
		{"a witness", func(o *planObservation) { o.target = "w" }, "witness"},
		{"maintenance", func(o *planObservation) { o.members[1].Maintenance = &cluster.Maintenance{} }, "in maintenance"},
		{"the primary", func(o *planObservation) { o.target = "n1" }, "already"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := planObservation{now: now, at: now.Add(time.Hour), target: "n2", leader: "n1", members: fitMembers()}
			c.with(&o)
			refusedWith(t, decidePlan(o), c.why)
		})
	}
}

func TestDecideDue(t *testing.T) {
	at := time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)
	for _, c := range []struct {
		name    string
		target  string
		primary string
		now     time.Time
		want    planAction
	}{
		{"due", "", "n1", at, planDo},
		{"due, to another", "n2", "n1", at, planDo},
		{"early", "", "n1", at.Add(-time.Second), planWait},
		{"another is the primary", "", "n2", at, planWait},
		{"nobody is", "", "", at, planWait},
		{"late", "", "n1", at.Add(scheduleLate), planDo},
		{"too late", "", "n1", at.Add(scheduleLate + time.Second), planDrop},
		{"done already", "n1", "n1", at, planDrop},
		{"done already, and early", "n1", "n1", at.Add(-time.Second), planWait},
	} {
		t.Run(c.name, func(t *testing.T) {
			if got, why := decideDue(PlannedSwitchover{At: at, Target: c.target}, "n1", c.primary, c.now); got != c.want || why == "" {
				t.Errorf("%q, %q; want %q", got, why, c.want)
			}
		})
	}
}

func TestDecideFailover(t *testing.T) {
	for _, c := range []struct {
		name string
		with func(*failoverObservation)
		req  FailoverRequest
		want string
		why  string
	}{
		{"in sync", func(*failoverObservation) {}, FailoverRequest{}, "n2", ""},
		{"a primary serves", func(o *failoverObservation) { o.serving = "n1" }, FailoverRequest{AllowDataLoss: true}, "", "pgha switchover"},
		{"paused", func(o *failoverObservation) { o.paused = true }, FailoverRequest{AllowDataLoss: true}, "", "pgha resume"},
		{"unknown", func(*failoverObservation) {}, FailoverRequest{Target: "n9"}, "", "no node"},
		{"a witness", func(*failoverObservation) {}, FailoverRequest{Target: "w"}, "", "witness"},
		{"one that is down", func(*failoverObservation) {}, FailoverRequest{Target: "n1", AllowDataLoss: true}, "", "n1 cannot be promoted: its pgha does not answer"},
		{"nobody is up", func(o *failoverObservation) { o.members[1].Reachable = false }, FailoverRequest{AllowDataLoss: true}, "", "nobody can be promoted: n2: its pgha"},
		{"in maintenance", func(o *failoverObservation) { o.members[1].Maintenance = &cluster.Maintenance{} }, FailoverRequest{AllowDataLoss: true}, "", "in maintenance"},
		{"tagged", func(o *failoverObservation) { o.members[1].NoFailover = true }, FailoverRequest{AllowDataLoss: true}, "", "nofailover"},
		{"not in sync", func(o *failoverObservation) { o.standby = nil }, FailoverRequest{}, "", "may lose what n1 acknowledged alone: 100 B of what is known"},
		{"not in sync, allowed", func(o *failoverObservation) { o.standby = nil }, FailoverRequest{AllowDataLoss: true}, "n2", ""},
		{"in another's sync key", func(o *failoverObservation) { o.syncOf = "n3" }, FailoverRequest{}, "", "--allow-data-loss"},
		{"asynchronous", func(o *failoverObservation) { o.async = true }, FailoverRequest{}, "", "had not sent: 100 B"},
		{"it was the last primary itself", func(o *failoverObservation) { o.last, o.standby = "n2", nil }, FailoverRequest{}, "n2", ""},
		{"the one with most", func(o *failoverObservation) {
			o.standby, o.members[0].Reachable, o.members[0].Postgres, o.members[0].LSN = nil, true, pgReplica, 950
		}, FailoverRequest{AllowDataLoss: true}, "n1", ""},
		{"the one that loses nothing, though behind", func(o *failoverObservation) {
			o.last, o.syncOf = "n3", "n3"
			o.members[0].Reachable, o.members[0].Postgres, o.members[0].LSN = true, pgReplica, 950
		}, FailoverRequest{}, "n2", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := failoverObservation{last: "n1", syncOf: "n1", standby: []string{"n2"}, optime: 1000, members: []MemberStatus{
				{Name: "n1", Role: cluster.RoleData}, {Name: "n2", Role: cluster.RoleData, Reachable: true, Postgres: pgReplica, LSN: 900},
				{Name: "w", Role: cluster.RoleWitness, Reachable: true},
			}}
			c.with(&o)
			got, err := decideFailover(o, c.req)
			refusedWith(t, err, c.why)
			if c.why == "" && got.Name != c.want {
				t.Errorf("%s, want %s", got, c.want)
			}
		})
	}
}

func TestDecideMaintenance(t *testing.T) {
	away := &cluster.Maintenance{By: "root@n1"}
	nobody := refused(cluster.CodeConflict, "nobody can take over")
	for _, c := range []struct {
		name string
		with func(*maintenanceObservation)
		want maintenanceAction
		why  string
	}{
		{"a replica", func(*maintenanceObservation) {}, maintenanceMark, ""},
		{"a witness", func(o *maintenanceObservation) { o.node = "w" }, maintenanceMark, ""},
		{"unknown", func(o *maintenanceObservation) { o.node = "n9" }, "", "no node"},
		{"the primary", func(o *maintenanceObservation) { o.node = "n1" }, maintenanceHandOver, ""},
		{"the primary without a successor", func(o *maintenanceObservation) { o.node, o.refusal = "n1", nobody }, "", "--force"},
		{"forced", func(o *maintenanceObservation) { o.node, o.refusal, o.force = "n1", nobody, true }, maintenanceKeep, ""},
		{"forced without need", func(o *maintenanceObservation) { o.node, o.force = "n1", true }, maintenanceHandOver, ""},
		{"again", func(o *maintenanceObservation) { o.members[1].Maintenance = away }, "", ""},
		{"another is", func(o *maintenanceObservation) { o.members[2].Maintenance = away }, "", "w is in maintenance already"},
		{"both data nodes, forced", func(o *maintenanceObservation) { o.node, o.force, o.members[1].Maintenance = "n1", true, away }, "", "n2 is in maintenance already"},
		{"out", func(o *maintenanceObservation) { o.leave, o.members[1].Maintenance = true, away }, maintenanceUnmark, ""},
		{"out, again", func(o *maintenanceObservation) { o.leave = true }, "", ""},
		{"out, unknown", func(o *maintenanceObservation) { o.leave, o.node = true, "n9" }, "", "no node"},
		{"without a primary", func(o *maintenanceObservation) { o.leader = "" }, maintenanceMark, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := maintenanceObservation{node: "n2", leader: "n1", members: fitMembers()}
			c.with(&o)
			got, err := decideMaintenance(o)
			refusedWith(t, err, c.why)
			if got != c.want {
				t.Errorf("%q, want %q", got, c.want)
			}
		})
	}
}

func TestMaintenanceTags(t *testing.T) {
	for _, c := range []struct {
		m    *cluster.Maintenance
		away bool
	}{{nil, false}, {&cluster.Maintenance{}, true}, {&cluster.Maintenance{Primary: true}, false}} {
		if got := maintenanceTags(cluster.Member{Maintenance: c.m}); got.NoFailover != c.away || got.NoSync != c.away {
			t.Errorf("%+v: %+v", c.m, got)
		}
	}
	m := cluster.Member{Name: "n2", Maintenance: &cluster.Maintenance{Since: time.Now().Add(-2 * time.Hour), By: "root@n1", Reason: "kernel update"}}
	want := "n2 is in maintenance since 2h (root@n1: kernel update): pgha maintenance leave n2"
	if got := maintenanceToDo([]cluster.Member{{Name: "n1"}, m}, time.Now()); len(got) != 1 || got[0] != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// told takes the steps of a hand-over.
type told struct{ said, left string }

func (s *told) Say(format string, args ...any)    { s.said = fmt.Sprintf(format, args...) }
func (s *told) Leaves(format string, args ...any) { s.left = fmt.Sprintf(format, args...) }

// TestHandOverLook goes through what may become of a hand-over from n1 to n2.
func TestHandOverLook(t *testing.T) {
	at := func(owner string, epoch uint64, state gate.State) leadership {
		return leadership{Record: gate.Record{Owner: owner, Epoch: epoch, State: state}}
	}
	asked := at("n1", 1, gate.Open)
	asked.Request = request{Leader: "n1", Member: "n2"}
	no := &patroni.StatusError{Code: 412, Message: "no good candidates have been found"}
	for _, c := range []struct {
		name   string
		answer error // Patroni's, before the first look
		looks  []leadership
		done   bool
		err    string
		left   string
	}{
		{"nothing yet", nil, []leadership{asked}, false, "", ""},
		{"through", nil, []leadership{asked, at("n1", 1, gate.Shut), at("n2", 2, gate.Promoting), at("n2", 2, gate.Open)}, true, "", "by itself"},
		{"through at once", nil, []leadership{at("n2", 2, gate.Open)}, true, "", "by itself"},
		{"Patroni refuses", no, []leadership{at("n1", 1, gate.Open)}, false, "Patroni does not hand over from n1 to n2: no good candidates", ""},
		{"Patroni cannot be asked", errors.New("refused"), []leadership{at("n1", 1, gate.Open)}, false, "could not be asked", ""},
		{"a bad answer, and it goes on", no, []leadership{asked}, false, "", ""},
		{"a bad answer, when it has stopped", no, []leadership{at("n1", 1, gate.Shut)}, false, "", "n1 has stopped for n2"},
		{"half way, and back", nil, []leadership{asked, at("n1", 1, gate.Shut), at("n1", 1, gate.Promoting)}, false, "n2 did not take over", "n1 is the primary again"},
		{"another is faster", nil, []leadership{asked, at("n1", 1, gate.Shut), at("n3", 2, gate.Promoting)}, false, "n3 has taken over instead of n2", "n3 is the primary"},
		{"it goes back afterwards", nil, []leadership{at("n2", 2, gate.Promoting), at("n1", 3, gate.Promoting)}, false, "n2 did not take over", "n1 is the primary again"},
	} {
		t.Run(c.name, func(t *testing.T) {
			var s told
			h := handing{tell: &s, r: HandOverResult{From: "n1"}, asked: make(chan error, 1), seen: time.Now()}
			if c.answer != nil {
				h.asked <- c.answer
			}
			var done bool
			var err error
			for i, l := range c.looks {
				if done, err = h.look(l, "n2"); (done || err != nil) && i < len(c.looks)-1 {
					t.Fatalf("it has ended after look %d: %t, %v", i, done, err)
				}
			}
			if done != c.done || (err == nil) != (c.err == "") || (err != nil && !strings.Contains(err.Error(), c.err)) {
				t.Errorf("%t, %v; want %t, %q", done, err, c.done, c.err)
			}
			if !strings.Contains(s.left, c.left) || (c.left == "") != (s.left == "") {
				t.Errorf("it leaves %q, want %q", s.left, c.left)
			}
		})
	}
}
