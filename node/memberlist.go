package node

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
)

// MemberInfo is a node of the roster with what etcd knows of it.
type MemberInfo struct {
	Name    string           `json:"name"`
	Role    cluster.NodeRole `json:"role"`
	Address string           `json:"address"`
	Version string           `json:"version"`
	// State is member; joining, or abandoned when the join has stood still for so
	// long that it is dropped; or unreachable.
	State      string    `json:"state"`
	Postgres   string    `json:"postgres,omitempty"` // primary or replica
	Etcd       string    `json:"etcd"`               // voter, learner or none
	EtcdLeader bool      `json:"etcd_leader,omitempty"`
	EtcdID     string    `json:"etcd_id,omitempty"` // hexadecimal
	Since      time.Time `json:"since"`
}

// Ghost is something in the cluster behind which no node stands.
type Ghost struct {
	What string `json:"what"`
	Mend string `json:"mend"` // the command for it
}

// MemberList is who is in the cluster, what is of nobody, and who was in it.
type MemberList struct {
	Members []MemberInfo           `json:"members"`
	Ghosts  []Ghost                `json:"ghosts"`
	Former  []cluster.FormerMember `json:"former"`
}

func (n *Node) memberListHandler(w http.ResponseWriter, r *http.Request) {
	l, err := n.memberList(r.Context())
	reply(w, l, err)
}

// memberList asks all members, and needs a quorum.
func (n *Node) memberList(ctx context.Context) (MemberList, error) {
	srv, store := n.etcd.Load(), n.store.Load()
	if r := n.removal.Load(); r != nil {
		return MemberList{}, refused(cluster.CodeNoMember, "%s: %s", r.RemovalText(n.state.ClusterName), RemovalToDo)
	}
	if srv == nil || store == nil {
		return MemberList{}, n.notReady()
	}
	read, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	roster, _, err := store.Members(read)
	if err != nil {
		return MemberList{}, err
	}
	former, err := store.Former(read)
	if err != nil {
		return MemberList{}, err
	}
	st, err := srv.Status(read)
	if err != nil {
		return MemberList{}, err
	}
	s := n.status(ctx)
	l := MemberList{Members: []MemberInfo{}, Ghosts: []Ghost{}, Former: former}
	for _, m := range roster {
		l.Members = append(l.Members, memberInfo(m, s, st, time.Now()))
	}
	l.Ghosts = append(l.Ghosts, findGhosts(roster, st.Members, n.snapshot().View, n.tracesOf(ctx, s))...)
	return l, nil
}

func memberInfo(m cluster.Member, s Status, st embedded.Status, now time.Time) MemberInfo {
	i := MemberInfo{Name: m.Name, Role: m.Role, Address: m.Addr.String(), Version: m.Version, State: string(m.State), Etcd: etcdNone, Since: m.JoinedAt}
	e, ok := etcdMemberOf(m, st.Members)
	if ok {
		i.Etcd, i.EtcdLeader, i.EtcdID = etcdVoter, e.ID == st.LeaderID, fmt.Sprintf("%x", e.ID)
		if e.Learner {
			i.Etcd = etcdLearner
		}
	}
	for _, r := range s.Members {
		if r.Name != m.Name {
			continue
		}
		i.Postgres = r.Postgres
		if r.Version != "" {
			i.Version = r.Version
		}
		if m.State == cluster.StateMember && !r.Reachable {
			i.State = "unreachable"
		}
	}
	if m.State == cluster.StateJoining && now.Sub(m.JoinedAt) > cluster.AbandonAfter && !e.Started {
		i.State = "abandoned"
	}
	return i
}

// etcdMemberOf finds a node's etcd member.
func etcdMemberOf(m cluster.Member, members []embedded.Member) (embedded.Member, bool) {
	i := slices.IndexFunc(members, func(e embedded.Member) bool { return e.Name == m.Name || e.PeerURL == m.PeerURL() })
	if i < 0 {
		return embedded.Member{}, false
	}
	return members[i], true
}

// traces are what a data node has of the members, beyond etcd.
type traces struct {
	Slots   []string `json:"slots"`   // of its PostgreSQL, for standbys
	Servers []string `json:"servers"` // of its HAProxy
	Primary bool     `json:"primary"`
}

const pathTraces = "/v1/members/traces"

func (n *Node) tracesHandler(w http.ResponseWriter, r *http.Request) {
	reply(w, n.traces(r.Context()), nil)
}

// traces looks at this node; what cannot be read is left out.
func (n *Node) traces(ctx context.Context) traces {
	t := traces{Slots: []string{}, Servers: []string{}}
	if n.cfg.Role != cluster.RoleData {
		return t
	}
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	if stats, err := n.runtime.ShowStat(ctx); err == nil {
		for _, s := range stats {
			if !slices.Contains(t.Servers, s.Server) && s.Server != "BACKEND" && s.Server != "FRONTEND" {
				t.Servers = append(t.Servers, s.Server)
			}
		}
	}
	c, err := n.localPostgres(ctx)
	if err != nil {
		return t
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	rows, err := c.Query(ctx, "SELECT slot_name FROM pg_replication_slots WHERE slot_type = 'physical' AND NOT temporary")
	if err != nil {
		return t
	}
	defer rows.Close()
	for rows.Next() {
		var name string
		if rows.Scan(&name) == nil {
			t.Slots = append(t.Slots, name)
		}
	}
	t.Primary = n.keeper.gate.Status().Self
	return t
}

// tracesOf asks the data nodes that answer.
func (n *Node) tracesOf(ctx context.Context, s Status) map[string]traces {
	out := map[string]traces{}
	for _, m := range n.snapshot().Members {
		switch {
		case m.Role != cluster.RoleData:
		case m.Name == n.cfg.Name:
			out[m.Name] = n.traces(ctx)
		case slices.ContainsFunc(s.Members, func(r MemberStatus) bool { return r.Name == m.Name && r.Reachable }):
			var t traces
			ask, cancel := context.WithTimeout(ctx, 2*askTimeout)
			if n.seen.call(ask, http.MethodGet, m.APIAddr(), pathTraces, nil, &t) == nil {
				out[m.Name] = t
			}
			cancel()
		}
	}
	return out
}

// findGhosts names what stands in the cluster for nobody, and the reverse: nodes
// that etcd does not know.
func findGhosts(roster []cluster.Member, members []embedded.Member, v patroni.ClusterView, seen map[string]traces) []Ghost {
	var out []Ghost
	add := func(mend, format string, args ...any) {
		out = append(out, Ghost{What: fmt.Sprintf(format, args...), Mend: mend})
	}
	for _, e := range members {
		if slices.ContainsFunc(roster, func(m cluster.Member) bool { return m.Name == e.Name || m.PeerURL() == e.PeerURL }) {
			continue
		}
		kind := etcdVoter
		if e.Learner {
			kind = etcdLearner
		}
		add(fmt.Sprintf("pgha member remove %x", e.ID), "etcd has a %s %q (%s) that is no node of this cluster", kind, e.Name, e.PeerURL)
	}
	for _, m := range roster {
		if _, ok := etcdMemberOf(m, members); ok {
			continue
		}
		add("pgha member remove "+m.Name+"; then pgha reset and pgha join on it", "%s is on the roster, but has no etcd member", m.Name)
	}
	for _, k := range v.Members {
		if !named(roster, k.Name) {
			add("pgha member remove "+k.Name, "Patroni has a member %q that is no node of this cluster", k.Name)
		}
	}
	slots, _ := v.Config["slots"].(map[string]any)
	for _, name := range slices.Sorted(maps.Keys(seen)) {
		t := seen[name]
		for _, slot := range t.Slots {
			if _, meant := slots[slot]; !meant && !named(roster, slot) && t.Primary {
				add(fmt.Sprintf("on %s: pgha psql -c \"SELECT pg_drop_replication_slot('%s')\"", name, slot), "PostgreSQL on %s keeps WAL in a replication slot %q for nobody", name, slot)
			}
		}
		for _, server := range t.Servers {
			if !named(roster, server) {
				add(fmt.Sprintf("on %s: pgha logs haproxy says why it has not been loaded anew", name), "HAProxy on %s has a server %q that is no node of this cluster", name, server)
			}
		}
	}
	return out
}

// MemberList returns who is in the cluster, and what is of nobody.
func (l *Local) MemberList(ctx context.Context) (MemberList, error) {
	var m MemberList
	return m, l.call(ctx, http.MethodGet, "/v1/members", nil, &m)
}
