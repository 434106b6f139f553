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
		err = n.leave(ctx, quiet, leaveRequest{by: clipped(req.By), why: "it was removed", allowEven: req.AllowEven})
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
	d := departure{name: req.Name, member: seen.etcd, by: o.Actor(), why: "it was removed"}
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
		if err := n.handOver(ctx, o.Say, ""); err != nil {
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
	e, seen := n.observeTakeOut(name, roster, st)
	o := removeObservation{leaveObservation: n.observeLeave(n.status(ctx), name), name: name, self: name == n.cfg.Name, known: rosterNames(roster), etcd: e.ID}
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
	if seen.token == r.Token {
		return nil // it has been done, and this is who has joined
	}
	seen.as = r.New.Role
	if err := decideReplace(seen); err != nil {
		return err
	}
	if r.DryRun {
		return nil
	}
	return n.takeOut(ctx, departure{name: r.Old, member: seen.etcd, by: r.By, why: fmt.Sprintf("%s at %s took its place", r.New.Name, r.New.Addr), token: r.Token})
}

// observeReplace looks at a node whose place another is to take.
func (n *Node) observeReplace(ctx context.Context, name string) (replaceObservation, error) {
	seen, m, err := n.observeRemove(ctx, name)
	if err != nil {
		return replaceObservation{}, err
	}
	o := replaceObservation{
		leaveObservation: seen.leaveObservation, name: name, known: seen.known, self: seen.self, joining: seen.joining,
		answers: !seen.silent, role: m.Role, etcd: seen.etcd, token: m.TokenID,
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
