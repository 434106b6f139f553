package node

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/patroni"
)

// aPair is a primary n1 with a replica n2 in sync, and a witness.
func aPair() restartObservation {
	data := func(name, role string) handOverMember {
		return handOverMember{MemberStatus: MemberStatus{Name: name, Role: cluster.RoleData, Reachable: true, Postgres: role, State: "running", Timeline: 3, Sync: role == pgReplica}, streaming: role == pgReplica}
	}
	return restartObservation{
		handOverObservation: handOverObservation{leader: "n1", members: []handOverMember{
			data("n1", pgPrimary), data("n2", pgReplica),
			{MemberStatus: MemberStatus{Name: "w", Role: cluster.RoleWitness, Reachable: true}},
		}},
		pending: map[string]string{}, programs: map[string][]string{},
	}
}

// wants checks a decision: a refusal that says why, or none.
func wants(t *testing.T, what string, err error, why string) {
	t.Helper()
	if why == "" && err != nil || why != "" && (err == nil || !strings.Contains(err.Error(), why)) {
		t.Errorf("%s: error is %v, want one that says %q", what, err, why)
	}
}

func TestDecideRestart(t *testing.T) {
	all := RestartRequest{Rolling: true}
	for what, tc := range map[string]struct {
		change func(*restartObservation)
		req    RestartRequest
		want   restartPlan
		why    string
	}{
		"all, rolling":            {req: all, want: restartPlan{replicas: []string{"n2"}, primary: "n1", handOver: true}},
		"a replica":               {req: RestartRequest{Node: "n2"}, want: restartPlan{replicas: []string{"n2"}}},
		"the primary, in place":   {req: RestartRequest{Node: "n1"}, want: restartPlan{primary: "n1"}},
		"the primary, rolling":    {req: RestartRequest{Node: "n1", Rolling: true}, want: restartPlan{primary: "n1", handOver: true}},
		"nothing named":           {req: RestartRequest{Pending: true}, why: "Name one of n1, n2, or restart all, one after the other, with --rolling"},
		"an unknown node":         {req: RestartRequest{Node: "n9"}, why: "the cluster has n1, n2, w"},
		"a witness":               {req: RestartRequest{Node: "w"}, why: "w is a witness and has no PostgreSQL: the data nodes are n1, n2"},
		"no primary":              {change: func(o *restartObservation) { o.leader = "" }, req: all, why: "no primary"},
		"a switchover under way":  {change: func(o *restartObservation) { o.underWay = "a switchover" }, req: RestartRequest{Node: "n2"}, why: "already"},
		"paused, rolling":         {change: func(o *restartObservation) { o.paused = true }, req: all, why: "pgha resume first"},
		"paused, one by name":     {change: func(o *restartObservation) { o.paused = true }, req: RestartRequest{Node: "n2"}, want: restartPlan{replicas: []string{"n2"}}},
		"a replica that is away":  {change: func(o *restartObservation) { o.members[1].Reachable = false }, req: all, why: "the pgha of n2 does not answer"},
		"a replica that lags":     {change: func(o *restartObservation) { o.members[1].streaming = false }, req: all, why: "n2 does not stream from n1"},
		"one that lags, by name":  {change: func(o *restartObservation) { o.members[1].streaming = false }, req: RestartRequest{Node: "n2"}, want: restartPlan{replicas: []string{"n2"}}},
		"nobody to hand over to":  {change: func(o *restartObservation) { o.members[1].Sync = false }, req: all, why: "it is not in sync yet"},
		"a way without hand-over": {change: func(o *restartObservation) { o.members[1].NoFailover = true }, req: RestartRequest{Node: "n1", Rolling: true}, why: "pgha restart n1 restarts it in place"},
		"a single node, rolling": {
			change: func(o *restartObservation) { o.members = o.members[:1] }, req: all, why: "nobody can take over from n1: there is no replica",
		},
		"nothing pending": {req: RestartRequest{Rolling: true, Pending: true}},
		"a replica's pending": {
			change: func(o *restartObservation) { o.pending["n2"] = "changed settings" },
			req:    RestartRequest{Rolling: true, Pending: true}, want: restartPlan{replicas: []string{"n2"}},
		},
		"the primary's pending": {
			change: func(o *restartObservation) { o.pending["n1"] = "changed settings" },
			req:    RestartRequest{Rolling: true, Pending: true}, want: restartPlan{primary: "n1", handOver: true},
		},
		"other programs": {
			change: func(o *restartObservation) { o.programs["n1"] = []string{PartHAProxy} },
			req:    RestartRequest{Rolling: true, Pending: true}, want: restartPlan{renew: []string{"n1"}},
		},
		"other programs stay without --pending": {
			change: func(o *restartObservation) { o.programs["n2"] = []string{PartHAProxy} },
			req:    RestartRequest{Node: "n2"}, want: restartPlan{replicas: []string{"n2"}},
		},
	} {
		o := aPair()
		if tc.change != nil {
			tc.change(&o)
		}
		got, err := decideRestart(o, tc.req)
		wants(t, what, err, tc.why)
		if d := cmp.Diff(tc.want, got, cmp.AllowUnexported(restartPlan{})); err == nil && d != "" {
			t.Errorf("%s: plan (-want +got):\n%s", what, d)
		}
	}
}

func TestDecideReinit(t *testing.T) {
	for what, tc := range map[string]struct {
		change func(*handOverObservation)
		name   string
		why    string
	}{
		"a replica":              {name: "n2"},
		"a replica that is down": {name: "n2", change: func(o *handOverObservation) { o.members[1].Postgres, o.members[1].streaming = "", false }},
		"the primary":            {name: "n1", why: "hand over first with pgha switchover"},
		"a witness":              {name: "w", why: "is a witness"},
		"an unknown node":        {name: "n9", why: "the cluster has n1, n2, w"},
		"the last copy":          {name: "n2", change: func(o *handOverObservation) { o.leader = "" }, why: "may be the last copy"},
		"a silent pgha":          {name: "n2", change: func(o *handOverObservation) { o.members[1].Reachable = false }, why: "does not answer"},
		"paused":                 {name: "n2", change: func(o *handOverObservation) { o.paused = true }, why: "pgha resume"},
		"a switchover under way": {name: "n2", change: func(o *handOverObservation) { o.underWay = "a switchover" }, why: "wait"},
	} {
		o := aPair().handOverObservation
		if tc.change != nil {
			tc.change(&o)
		}
		wants(t, what, decideReinit(o, tc.name), tc.why)
	}
}

func TestDecideSetAside(t *testing.T) {
	good := setAsideObservation{self: "n2", primary: "n1", leader: "n1", dir: "/data/pg", info: patroni.DataDirInfo{State: patroni.DataDirValid}, need: 100 << 20, free: 110 << 20}
	for what, tc := range map[string]struct {
		change func(*setAsideObservation)
		why    string
	}{
		"a replica":                {},
		"no data":                  {change: func(o *setAsideObservation) { o.info.State, o.free = patroni.DataDirEmpty, 0 }},
		"half a copy":              {change: func(o *setAsideObservation) { o.info.State = patroni.DataDirPartial }},
		"the gate's owner":         {change: func(o *setAsideObservation) { o.owner = true }, why: "is the primary"},
		"the leader key's holder":  {change: func(o *setAsideObservation) { o.leader = "n2" }, why: "is the primary"},
		"another primary than his": {change: func(o *setAsideObservation) { o.leader = "n3" }, why: "no primary n1"},
		"no primary":               {change: func(o *setAsideObservation) { o.leader = "" }, why: "no primary n1"},
		"tablespaces":              {change: func(o *setAsideObservation) { o.info.Tablespaces = true }, why: "--discard"},
		"no room":                  {change: func(o *setAsideObservation) { o.free-- }, why: "it needs 110.0 MB and has 110.0 MB in /data"},
	} {
		o := good
		if tc.change != nil {
			tc.change(&o)
		}
		wants(t, what, decideSetAside(o), tc.why)
	}
}

func TestCopyWatch(t *testing.T) {
	start := time.Now()
	c := copyWatch{at: start}
	const total = 1000
	var said []int64
	for _, look := range []struct {
		after time.Duration
		done  int64
	}{{1, 100}, {3, 100}, {4, 150}, {6, 100}, {6, 160}, {6, 170}, {9, 171}, {36, 172}, {60, 172}} {
		if c.due(start.Add(look.after*time.Second), look.done, total) {
			said = append(said, look.done)
		}
	}
	// Not before 3 s; then what is 2% more; then anything new after half a minute.
	if d := cmp.Diff([]int64{100, 160, 172}, said); d != "" {
		t.Errorf("words about a copy (-want +got):\n%s", d)
	}
}
