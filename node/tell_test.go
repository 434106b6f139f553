package node

import (
	"testing"
	"time"

	"pgha/cluster"
	"pgha/postgres"
)

func TestRoleText(t *testing.T) {
	probe := func(k postgres.Kind, pid, timeline int) postgres.Probe {
		var p postgres.Probe
		p.Kind, p.PID, p.Timeline = k, pid, timeline
		return p
	}
	for _, c := range []struct {
		name    string
		last, p postgres.Probe
		want    string
	}{
		{"nothing new", probe(postgres.Primary, 7, 2), probe(postgres.Primary, 7, 2), ""},
		{"promoted", probe(postgres.Recovery, 7, 2), probe(postgres.Primary, 7, 3), "PostgreSQL is the primary, on timeline 3"},
		{"demoted", probe(postgres.Gone, 7, 3), probe(postgres.Recovery, 8, 3), "PostgreSQL runs as a replica"},
		{"crashed", probe(postgres.Primary, 7, 3), probe(postgres.Gone, 7, 3), "PostgreSQL has ended"},
		{"hangs", probe(postgres.Primary, 7, 3), probe(postgres.Hung, 7, 3), "PostgreSQL does not answer any more"},
		{"answers again", probe(postgres.Hung, 7, 3), probe(postgres.Primary, 7, 3), "PostgreSQL answers again, as the primary"},
	} {
		if got := roleText(c.last, c.p); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// A member that goes silent is told of once, by the node that leads, also if
// another led while it was still heard.
func TestTellPeers(t *testing.T) {
	n := &Node{log: discardLog(), cfg: Config{Name: "n1"}}
	n.seen.last = map[string]Report{"n2": {Name: "n2", At: time.Now()}}
	roster := []cluster.Member{{Name: "n1", State: cluster.StateMember}, {Name: "n2", State: cluster.StateMember}, {Name: "n3", State: cluster.StateJoining}}
	var tell chronicler
	said := func(want int) {
		t.Helper()
		if len(n.news.waiting) != want {
			t.Fatalf("told %d events, want %d: %+v", len(n.news.waiting), want, n.news.waiting)
		}
	}
	tell.peers(n, roster, false, time.Now())
	said(0)
	n.seen.last["n2"] = Report{Name: "n2", At: time.Now().Add(-2 * seenFresh)}
	tell.peers(n, roster, true, time.Now())
	said(1)
	tell.peers(n, roster, true, time.Now())
	said(1)
	n.seen.last["n2"] = Report{Name: "n2", At: time.Now()}
	tell.peers(n, roster, true, time.Now())
	said(2)
}

// Without etcd events wait, the newest of them, each of its own moment.
func TestEventsWait(t *testing.T) {
	n := &Node{log: discardLog(), cfg: Config{Name: "n1"}}
	for range eventsWaiting + 10 {
		n.event(EventFault, "n2", actorPgha, "again")
	}
	if len(n.news.waiting) != eventsWaiting {
		t.Fatalf("%d events wait, want %d", len(n.news.waiting), eventsWaiting)
	}
	for i, e := range n.news.waiting[1:] {
		if !e.At.After(n.news.waiting[i].At) {
			t.Fatalf("event %d is not after the one before it", i+1)
		}
	}
}
