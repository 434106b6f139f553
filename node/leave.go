package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
)

const (
	// leaveTimeout bounds the whole of a node's leaving.
	leaveTimeout = 2 * time.Minute
	// takeOutTimeout bounds what a remaining member does for one that leaves;
	// askOutTimeout leaves its answer the time to arrive.
	takeOutTimeout = 15 * time.Second
	askOutTimeout  = takeOutTimeout + 5*time.Second
	// handOverTimeout bounds a change of etcd's leader, which takes 0.1 s.
	handOverTimeout = 5 * time.Second
)

// pathMemberLeave is where a node asks a peer to take it out of the cluster.
const pathMemberLeave = "/v1/members/leave"

// MemberLeave asks a remaining member to take the caller out. Who that is its
// certificate says.
type MemberLeave struct {
	// MemberID is the caller's etcd member. A question that is answered late must
	// not take out a node that has joined anew under the old name.
	MemberID uint64 `json:"member_id,string"`
}

func (n *Node) leaveHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), leaveTimeout)
	defer cancel()
	reply(w, struct{}{}, n.leave(ctx))
}

// memberLeaveHandler serves a node that leaves. It need not be on the roster any
// more: one that did not hear the answer asks again.
func (n *Node) memberLeaveHandler(w http.ResponseWriter, r *http.Request) {
	var req MemberLeave
	id, err := n.caller(r)
	if err == nil {
		err = decode(w, r, &req)
	}
	if err == nil {
		// A caller that hangs up must not stay half a member.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), takeOutTimeout)
		defer cancel()
		err = n.takeOut(ctx, id.Node, req.MemberID)
	}
	reply(w, struct{}{}, err)
}

// leaveObservation is what decideLeave looks at.
type leaveObservation struct {
	members   int // on the roster, the one that leaves included
	voters    int
	answering int  // voters that answer, the one that leaves included
	voter     bool // the one that leaves is a voter
	silent    bool // and does not answer
	leader    bool // it is the primary
	successor string
	noSuccess string // why nobody can take over
}

// decideLeave says whether a node may go, with the reason if not.
func decideLeave(o leaveObservation) (bool, string) {
	if o.members <= 1 {
		return true, "this is the last node: the cluster ends with it"
	}
	if why := quorumWithout(o); why != "" {
		return false, why
	}
	if o.leader && o.successor == "" {
		return false, "this node is the primary and nobody can take over: " + o.noSuccess
	}
	return true, ""
}

// quorumWithout says why etcd's voters cannot do without a member, or "".
func quorumWithout(o leaveObservation) string {
	others := o.answering
	if !o.silent {
		others--
	}
	switch {
	case !o.voter:
		return ""
	case o.voters == 1:
		return "it is the only etcd voter: the others would lose the cluster. Reset the others first, or add a witness so that they become voters"
	case others < (o.voters-1)/2+1:
		return fmt.Sprintf("only %d of %d voters answer: without this one the cluster would lose its quorum", o.answering, o.voters)
	}
	return ""
}

// leave takes this node out of the cluster: PostgreSQL's leadership goes to
// another node first, then a remaining member takes the node out.
func (n *Node) leave(ctx context.Context) (err error) {
	srv, store := n.etcd.Load(), n.store.Load()
	if srv == nil || store == nil {
		return n.notReady()
	}
	st, err := srv.Status(ctx)
	if err != nil {
		return err
	}
	s := n.status(ctx)
	o := leaveObservation{members: len(s.Members), leader: s.Leader == n.cfg.Name}
	for _, m := range s.Members {
		if m.voter() {
			o.voters++
			if m.Reachable {
				o.answering++
			}
			o.voter = o.voter || m.Name == n.cfg.Name
		}
	}
	w := n.snapshot()
	oo := observation{leader: s.Leader, async: w.Settings.Async, paused: w.View.Paused, maxLag: patroni.MaxLagOnFailover, members: s.Members}
	if o.noSuccess = noSuccessor(oo); o.noSuccess == "" {
		o.successor = "yes"
	}
	if ok, why := decideLeave(o); !ok {
		return &cluster.Error{Code: cluster.CodeConflict, Message: "this node cannot leave: " + why}
	}
	if o.members <= 1 {
		return nil
	}
	n.log.Warn("leaving the cluster")
	// The reconciler would start Patroni again; if this fails half way, it should.
	n.leaving.Store(true)
	defer func() { n.leaving.Store(err == nil) }()
	if n.cfg.Role == cluster.RoleData {
		if err := n.patroni.Stop(ctx); err != nil {
			return fmt.Errorf("stop PostgreSQL: %w", err)
		}
		if err := n.stopPostgres(ctx); err != nil {
			return err
		}
		n.waitShut(ctx)
	}
	removed := func() bool { return errors.Is(srv.Err(), embedded.ErrRemoved) }
	return n.askOut(ctx, whomToAsk(n.cfg.Name, w.Members, s.Members), st.MemberID, removed)
}

// whomToAsk lists the remaining members, those first that can take a node out
// best: that answer, that lead etcd, that vote.
func whomToAsk(self string, roster []cluster.Member, seen []MemberStatus) []cluster.Member {
	rank := map[string]int{}
	for _, m := range seen {
		for i, good := range []bool{m.voter(), m.EtcdLeader, m.Reachable} {
			if good {
				rank[m.Name] += 1 << i
			}
		}
	}
	out := slices.DeleteFunc(slices.Clone(roster), func(m cluster.Member) bool { return m.Name == self })
	slices.SortStableFunc(out, func(a, b cluster.Member) int { return cmp.Compare(rank[b.Name], rank[a.Name]) })
	return out
}

// askOut has a remaining member take this node out. A node must not do that
// itself: with its entry in the roster the others shut their firewalls to it,
// and it never hears what became of its etcd member. removed tells whether this
// node's etcd has heard that its member is out. Then a pass in which nobody
// answers at all means that the roster's entry is gone too, and an answer lost.
func (n *Node) askOut(ctx context.Context, whom []cluster.Member, id uint64, removed func() bool) error {
	for {
		answered, reasons := false, []string{}
		for _, m := range whom {
			try, cancel := context.WithTimeout(ctx, askOutTimeout)
			err := n.seen.call(try, http.MethodPost, m.APIAddr(), pathMemberLeave, MemberLeave{MemberID: id}, nil)
			cancel()
			if err == nil {
				n.log.Warn("this node is no member any more", "asked", m.Name)
				return nil
			}
			var refusal *cluster.Error
			answered = answered || errors.As(err, &refusal)
			reasons = append(reasons, m.Name+": "+err.Error())
			n.log.Warn("a member has not taken this node out", "asked", m.Name, "err", err)
		}
		if removed() && (!answered || ctx.Err() != nil) {
			n.log.Warn("this node's etcd member was removed, and no answer came")
			return nil
		}
		if !sleep(ctx, time.Second) {
			return &cluster.Error{Code: cluster.CodeUnavailable, Message: "no other member has taken this node out: " + strings.Join(reasons, "; ")}
		}
	}
}

// takeOut removes another node's etcd member, then its entry in the roster,
// which closes the firewalls to it. It ends when both are committed. A step that
// was done before is fine, so that it can be repeated after any failure, by any
// member. It refuses, with [cluster.ErrConflict], to take out a voter that etcd
// cannot do without as this node sees it. id is the etcd member that the node is
// known to have, or 0 for whichever it has.
func (n *Node) takeOut(ctx context.Context, name string, id uint64) error {
	n.takeMu.Lock() // each decision stands on the one before
	defer n.takeMu.Unlock()
	srv, store := n.etcd.Load(), n.store.Load()
	if srv == nil || store == nil {
		return n.notReady()
	}
	refuse := func(why string) error {
		return &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("%s does not take %s out of the cluster: %s", n.cfg.Name, name, why)}
	}
	if name == n.cfg.Name || n.leaving.Load() {
		return refuse("another member has to, one that stays")
	}
	// The store's reads are linearizable: what this member knows of etcd's
	// membership afterwards is no older than the question.
	roster, _, err := store.Members(ctx)
	if err != nil {
		return err
	}
	st, err := srv.Status(ctx)
	if err != nil {
		return err
	}
	member, o := n.observeTakeOut(name, roster, st)
	if id != 0 && member.ID != 0 && member.ID != id {
		return refuse(fmt.Sprintf("its etcd member is %x, not %x: it has joined anew", member.ID, id))
	}
	if why := quorumWithout(o); why != "" {
		return refuse(why)
	}
	if member.ID != 0 {
		n.log.Warn("taking a member out of the cluster", "member", name, "id", fmt.Sprintf("%x", member.ID))
		if err := removeFromEtcd(ctx, srv, st, member.ID); err != nil {
			return err
		}
	}
	if err := store.RemoveMember(ctx, name); err != nil && !errors.Is(err, cluster.ErrNoMember) {
		return err
	}
	return nil
}

// observeTakeOut finds a node's etcd member, the zero value if there is none,
// and what its removal would do to the quorum as this node sees it.
func (n *Node) observeTakeOut(name string, roster []cluster.Member, st embedded.Status) (embedded.Member, leaveObservation) {
	answers := map[uint64]bool{st.MemberID: true}
	for _, r := range n.seen.lately() {
		answers[r.Etcd.MemberID] = true
	}
	url := ""
	for _, m := range roster {
		if m.Name == name {
			url = m.PeerURL()
		}
	}
	var found embedded.Member
	o := leaveObservation{members: len(roster)}
	for _, m := range st.Members {
		if m.Name == name || m.PeerURL == url {
			found = m
			o.voter, o.silent = !m.Learner, !answers[m.ID]
		}
		if !m.Learner {
			o.voters++
			if answers[m.ID] {
				o.answering++
			}
		}
	}
	return found, o
}

// removeFromEtcd removes another member. If that one leads, it is relieved
// first: a leader of two voters that ends before the other has heard of the
// removal would leave that one without a quorum for ever.
func removeFromEtcd(ctx context.Context, srv *embedded.Server, st embedded.Status, id uint64) error {
	if st.LeaderID == id && !st.Learner {
		ctx, cancel := context.WithTimeout(ctx, handOverTimeout)
		err := srv.MoveLeader(ctx, st.MemberID)
		cancel()
		if err != nil {
			return err
		}
	}
	return srv.Remove(ctx, id)
}
