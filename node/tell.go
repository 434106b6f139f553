package node

import (
	"context"
	"fmt"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/postgres"
	"pgha/supervisor"
)

// What happens by itself becomes events here: to PostgreSQL and the children of
// this node, told by the node; to other nodes and to the quorum, told by the node
// that leads etcd.

// quorumMissed is how long a quorum must have been away to be worth an event: an
// election takes a second or two.
const quorumMissed = 3 * time.Second

// tellRoles tells what this node's PostgreSQL becomes, until ctx ends.
func (g *gatekeeper) tellRoles(ctx context.Context) {
	var last postgres.Probe
	known := false
	g.watcher.Follow(ctx, func(p postgres.Probe) {
		if text := roleText(last, p); known && text != "" {
			kind := EventRole
			if p.Kind == postgres.Gone || p.Kind == postgres.Hung {
				kind = EventFault
			}
			if g.n.stopping.Load() || g.n.leaving.Load() {
				text += ", as it was asked to"
			}
			g.n.event(kind, g.n.cfg.Name, actorPgha, "%s", text)
		}
		if toldKind(p.Kind) {
			last, known = p, true
		}
	})
}

// toldKind says whether a kind of probe tells of something lasting.
func toldKind(k postgres.Kind) bool {
	switch k {
	case postgres.Primary, postgres.Recovery, postgres.Gone, postgres.Hung:
		return true
	}
	return false
}

// roleText says what has changed from one probe to the next, or "".
func roleText(last, p postgres.Probe) string {
	if !toldKind(p.Kind) || p.Kind == last.Kind {
		return ""
	}
	switch p.Kind {
	case postgres.Primary:
		if last.Kind == postgres.Hung && last.PID == p.PID {
			return "PostgreSQL answers again, as the primary"
		}
		return fmt.Sprintf("PostgreSQL is the primary, on timeline %d", p.Timeline)
	case postgres.Recovery:
		return "PostgreSQL runs as a replica"
	case postgres.Hung:
		return "PostgreSQL does not answer any more"
	}
	return "PostgreSQL has ended"
}

// chronicler remembers what was told last.
type chronicler struct {
	pids   map[string]int       // by child: as it was seen last
	silent map[string]time.Time // by node: since when it has not answered
	heard  map[string]time.Time // by node: when it answered last
	lostAt time.Time            // since when there is no quorum
}

// children tells of Patroni and HAProxy that were started again.
func (t *chronicler) children(n *Node) {
	if t.pids == nil {
		t.pids = map[string]int{}
	}
	for _, p := range []*supervisor.Process{n.patroni, n.haproxy} {
		st := p.Status()
		old := t.pids[st.Name]
		if st.PID == 0 || st.PID == old {
			continue
		}
		t.pids[st.Name] = st.PID
		if old != 0 {
			n.event(EventRestart, n.cfg.Name, actorPgha, "%s was started again, as process %d instead of %d%s", st.Name, st.PID, old, paren(st.Reason))
		}
	}
}

// peers notes which members stop and begin to answer, and tells it on the node
// that leads.
func (t *chronicler) peers(n *Node, roster []cluster.Member, leads bool, now time.Time) {
	if t.silent == nil {
		t.silent, t.heard = map[string]time.Time{}, map[string]time.Time{}
	}
	lately := n.seen.lately()
	for _, m := range roster {
		if m.Name == n.cfg.Name || m.State != cluster.StateMember {
			continue
		}
		_, answers := lately[m.Name]
		since, silent := t.silent[m.Name]
		switch {
		case answers && silent:
			delete(t.silent, m.Name)
			if leads {
				n.event(EventFault, m.Name, actorPgha, "pgha on %s answers again, after %s", m.Name, now.Sub(since).Round(time.Second))
			}
		case !answers && !silent && !t.heard[m.Name].IsZero():
			t.silent[m.Name] = t.heard[m.Name]
			if leads {
				n.event(EventFault, m.Name, actorPgha, "pgha on %s does not answer", m.Name)
			}
		}
		if answers {
			t.heard[m.Name] = lately[m.Name].At
		}
	}
}

// quorum tells, when it is back, that there was none.
func (t *chronicler) quorum(n *Node, st embedded.Status, now time.Time) {
	switch {
	case !st.HasLeader && t.lostAt.IsZero():
		t.lostAt = now
	case st.HasLeader && !t.lostAt.IsZero():
		if away := now.Sub(t.lostAt); away > quorumMissed && st.IsLeader {
			n.event(EventFault, "", actorPgha, "etcd has a quorum again; it had none for %s", away.Round(time.Second))
		}
		t.lostAt = time.Time{}
	}
}
