package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
)

// pathRetire is where another member has this node leave.
const pathRetire = "/v1/members/retire"

// retireTimeout bounds the leaving of another node, as it is waited for.
const retireTimeout = leaveTimeout + 2*time.Minute

// LeaveRequest has this node leave its cluster.
type LeaveRequest struct {
	// AllowEven accepts that an even number of voters remains.
	AllowEven bool `json:"allow_even,omitempty"`
	// Last accepts that this is the last node, and the cluster ends.
	Last bool `json:"last,omitempty"`
}

// LeaveResult says who has left.
type LeaveResult struct {
	Node string `json:"node"`
}

// leaveOperation takes this node out; its host is reset by who asked.
func (n *Node) leaveOperation(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req LeaveRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	if !req.Last && len(n.snapshot().Members) <= 1 {
		return nil, refused(cluster.CodeConflict, "%s is the last node, there is no cluster that it could leave: pgha reset ends it", n.cfg.Name)
	}
	return LeaveResult{n.cfg.Name}, n.leave(ctx, o, leaveRequest{by: o.Actor(), why: "it has left", allowEven: req.AllowEven})
}

// RetireRequest has another node leave its cluster.
type RetireRequest struct {
	AllowEven bool   `json:"allow_even,omitempty"`
	By        string `json:"by"`
}

// retireHandler serves a data node that removes this one.
func (n *Node) retireHandler(w http.ResponseWriter, r *http.Request) {
	var req RetireRequest
	err := decode(w, r, &req)
	if err == nil {
		_ = http.NewResponseController(w).SetReadDeadline(time.Time{}) // it takes longer than a request may to arrive
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), leaveTimeout)
		defer cancel()
		quiet := &sayer{say: func(format string, args ...any) { n.log.Info("leaving", "step", fmt.Sprintf(format, args...)) }}
		err = n.leave(ctx, quiet, leaveRequest{by: req.By, why: "it was removed", allowEven: req.AllowEven})
	}
	reply(w, struct{}{}, err)
}

// MemberRemoveRequest names the node to take out: by its name, or what is left of
// one by the name or the id that etcd or Patroni has.
type MemberRemoveRequest struct {
	Name      string `json:"name"`
	AllowEven bool   `json:"allow_even,omitempty"`
}

// MemberRemoveResult says who was taken out.
type MemberRemoveResult struct {
	Name string           `json:"name"`
	Role cluster.NodeRole `json:"role,omitempty"`
	// Told says that the node heard it and has stopped its PostgreSQL. Otherwise
	// it will when it comes back.
	Told bool `json:"told"`
}

// memberRemove takes another node out, dead or alive.
func (n *Node) memberRemove(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req MemberRemoveRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	seen, m, err := n.observeRemove(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	seen.allowEven = req.AllowEven
	if err := decideRemove(seen); err != nil {
		return nil, err
	}
	r := MemberRemoveResult{Name: req.Name, Role: m.Role}
	d := departure{name: req.Name, by: o.Actor(), why: "it was removed"}
	o.Leaves("%s may be a member still: see pgha member list, and repeat the same command", req.Name)
	switch {
	case seen.ghost:
		o.Say("taking out what is left of %s", req.Name)
	case seen.joining:
		o.Say("dropping the join of %s that was begun at %s", req.Name, m.JoinedAt.Local().Format(time.DateTime))
		d.why = "its join was dropped"
	case seen.silent:
		o.Say("%s does not answer: taking it out; it will be told when it comes back", req.Name)
	default:
		if r.Told, err = n.retire(ctx, o, m, seen, req.AllowEven); err != nil || r.Told {
			return r, err
		}
	}
	if err := n.takeOut(ctx, d); err != nil {
		return nil, err
	}
	return r, nil
}

// retire has a node that answers leave by itself. told is false when it does not
// answer any more and is a member still.
func (n *Node) retire(ctx context.Context, o *Operation, m cluster.Member, seen removeObservation, allowEven bool) (told bool, err error) {
	if seen.leader {
		o.Say("%s is the primary: handing over first", m.Name)
		if _, err := n.handOver(ctx, o.Say, ""); err != nil {
			return false, err
		}
	}
	o.Say("having %s stop its PostgreSQL and leave", m.Name)
	ctx, cancel := context.WithTimeout(ctx, retireTimeout)
	defer cancel()
	err = n.seen.call(ctx, http.MethodPost, m.APIAddr(), pathRetire, RetireRequest{AllowEven: allowEven, By: o.Actor()}, nil)
	var refusal *cluster.Error
	switch {
	case err == nil:
		return true, nil
	case errors.As(err, &refusal):
		return false, fmt.Errorf("%s: %w", m.Name, refusal)
	}
	// The answer may have been lost with the firewall that shut to it.
	store := n.store.Load()
	if store == nil {
		return false, n.notReady()
	}
	roster, _, err2 := store.Members(ctx)
	if err2 != nil {
		return false, errors.Join(err, err2)
	}
	if !named(roster, m.Name) {
		return true, nil
	}
	if _, err2 := n.reportOf(ctx, m); err2 == nil {
		return false, fmt.Errorf("have %s leave: %w", m.Name, err)
	}
	o.Say("%s does not answer any more: taking it out; it will be told when it comes back", m.Name)
	return false, nil
}

// observeRemove looks at a node that is to be taken out; the entry is its own in
// the roster, the zero value for one that has none.
func (n *Node) observeRemove(ctx context.Context, name string) (removeObservation, cluster.Member, error) {
	srv, store := n.etcd.Load(), n.store.Load()
	if srv == nil || store == nil {
		return removeObservation{}, cluster.Member{}, n.notReady()
	}
	roster, _, err := store.Members(ctx)
	if err != nil {
		return removeObservation{}, cluster.Member{}, err
	}
	st, err := srv.Status(ctx)
	if err != nil {
		return removeObservation{}, cluster.Member{}, err
	}
	o := removeObservation{leaveObservation: n.observeLeave(n.status(ctx), name), name: name, self: name == n.cfg.Name, known: rosterNames(roster)}
	e, seen := n.observeTakeOut(name, roster, st)
	if i := slices.IndexFunc(roster, func(m cluster.Member) bool { return m.Name == name }); i >= 0 {
		m := roster[i]
		o.joining = m.State == cluster.StateJoining && !e.Started
		return o, m, nil
	}
	_, key := n.snapshot().View.Member(name)
	o.ghost = e.ID != 0 || key
	// No node stands behind it: what counts is etcd alone.
	o.members, o.voter, o.silent, o.voters, o.answering = len(roster)+1, seen.voter, seen.silent, seen.voters, seen.answering
	o.leader, o.data = false, false
	return o, cluster.Member{}, nil
}

// MemberReplaceRequest asks for a token with which a new node takes the place of
// one that is gone for good.
type MemberReplaceRequest struct {
	Name string           `json:"name"`
	Role cluster.NodeRole `json:"role,omitempty"` // of the new one; "" = the same
	TTL  time.Duration    `json:"ttl,omitempty"`  // nanoseconds; 0 = the default
}

// memberReplace makes the token; the rest happens when it is used.
func (n *Node) memberReplace(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req MemberReplaceRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	seen, err := n.observeReplace(ctx, req.Name)
	if err != nil {
		return nil, err
	}
	seen.as = req.Role
	if err := decideReplace(seen); err != nil {
		return nil, err
	}
	o.Say("%s does not answer: whoever joins with this token takes its place", req.Name)
	return n.newToken(ctx, TokenRequest{Role: seen.role, TTL: req.TTL, Replaces: req.Name}, o.Actor())
}

// replace is what a data node does when a node joins with such a token. It asks
// everything anew, for that may be a day later.
func (n *Node) replace(ctx context.Context, r cluster.Replacement) error {
	seen, err := n.observeReplace(ctx, r.Old)
	if err != nil {
		return err
	}
	seen.as = r.New.Role
	if err := decideReplace(seen); err != nil {
		return err
	}
	if r.DryRun {
		return nil
	}
	return n.takeOut(ctx, departure{name: r.Old, by: r.By, why: fmt.Sprintf("%s at %s took its place", r.New.Name, r.New.Addr), token: r.Token})
}

// observeReplace looks at a node whose place another is to take.
func (n *Node) observeReplace(ctx context.Context, name string) (replaceObservation, error) {
	seen, m, err := n.observeRemove(ctx, name)
	if err != nil {
		return replaceObservation{}, err
	}
	o := replaceObservation{
		leaveObservation: seen.leaveObservation, name: name, known: seen.known, self: seen.self, joining: seen.joining,
		answers: !seen.silent, role: m.Role,
	}
	l, err := n.readLeadership(ctx)
	if err != nil {
		return o, err
	}
	o.owner = l.View.Leader == name || l.Record.Owner == name
	if m.Role == cluster.RoleData && !o.answers {
		// PostgreSQL and Patroni outlive pgha.
		o.answers = n.postgresReport(ctx, m.Addr, m.Ports.Patroni).State != noPatroni
	}
	return o, nil
}

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
	for name, t := range seen {
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
