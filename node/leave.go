package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode"

	clientv3 "go.etcd.io/etcd/client/v3"

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
	By       string `json:"by"`  // who wanted it, as root@n1
	Why      string `json:"why"` // in words
}

// memberLeaveHandler serves a node that leaves. It need not be on the roster any
// more: one that did not hear the answer asks again.
func (n *Node) memberLeaveHandler(w http.ResponseWriter, r *http.Request) {
	var req MemberLeave
	id, err := n.caller(r)
	if err == nil {
		err = n.ofThisLife(r, id.Node)
	}
	if err == nil {
		err = decodeStrictly(w, r, &req)
	}
	if err == nil && req.MemberID == 0 {
		err = refused(cluster.CodeBadRequest, "a node that leaves must name its etcd member")
	}
	if err == nil {
		// A caller that hangs up must not stay half a member.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(r.Context()), takeOutTimeout)
		defer cancel()
		err = n.takeOut(ctx, departure{name: id.Node, member: req.MemberID, by: clipped(req.By), why: clipped(req.Why)})
	}
	reply(w, struct{}{}, err)
}

// clipped bounds what another node says of itself before it is kept and shown.
func clipped(s string) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return -1
		}
		return r
	}, s)
	return strings.ToValidUTF8(s[:min(len(s), 200)], "")
}

// leaveRequest says how a node leaves.
type leaveRequest struct {
	by, why   string // who wants it, as root@n1, and what is done, in words
	allowEven bool   // even if an even number of voters remains
}

// leave takes this node out of the cluster: PostgreSQL's leadership goes to
// another node first, then a remaining member takes the node out. The last node
// of a cluster has nobody to tell: nothing is done.
func (n *Node) leave(ctx context.Context, tell steps, r leaveRequest) error {
	srv := n.etcd.Load()
	if srv == nil || n.store.Load() == nil {
		return n.notReady()
	}
	st, err := srv.Status(ctx)
	if err != nil {
		return err
	}
	s := n.status(ctx)
	o := n.observeLeave(s, n.cfg.Name)
	o.allowEven = r.allowEven
	if ok, why := decideLeave(o); !ok {
		return refused(cluster.CodeConflict, "this node cannot leave: %s", why)
	}
	if o.members <= 1 {
		return nil
	}
	if o.leader {
		if err := n.handOver(ctx, tell.Say, ""); err != nil {
			return err
		}
	}
	// With what follows this node's etcd ends, and the operation's lock with it:
	// that must not cut the rest short.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTimeout)
	defer cancel()
	return n.depart(ctx, tell, r, whomToAsk(n.cfg.Name, n.snapshot().Members, s.Members), st.MemberID, srv)
}

// depart is the part of leave that changes something.
func (n *Node) depart(ctx context.Context, tell steps, r leaveRequest, whom []cluster.Member, id uint64, srv *embedded.Server) (err error) {
	n.log.Warn("leaving the cluster", "by", r.by, "why", r.why)
	// The reconciler would start Patroni again; if this fails half way, it should.
	n.leaving.Store(true)
	defer func() { n.leaving.Store(err == nil) }()
	if n.cfg.Role == cluster.RoleData {
		tell.Leaves("%s is still a member, and its PostgreSQL is started again", n.cfg.Name)
		tell.Say("stopping PostgreSQL on %s", n.cfg.Name)
		if err := n.patroni.Stop(ctx); err != nil {
			return fmt.Errorf("stop PostgreSQL: %w", err)
		}
		if err := n.stopPostgres(ctx); err != nil {
			return err
		}
		n.waitShut(ctx)
	}
	tell.Say("having %s taken out of the cluster", n.cfg.Name)
	removed := func() bool { return errors.Is(srv.Err(), embedded.ErrRemoved) }
	if err := n.askOut(ctx, whom, MemberLeave{MemberID: id, By: r.by, Why: r.why}, removed); err != nil {
		return err
	}
	n.markRemoved(Removal{At: time.Now().UTC().Truncate(time.Second), By: r.by, Why: r.why})
	return nil
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
func (n *Node) askOut(ctx context.Context, whom []cluster.Member, req MemberLeave, removed func() bool) error {
	for {
		answered, reasons := false, []string{}
		for _, m := range whom {
			try, cancel := context.WithTimeout(ctx, askOutTimeout)
			err := n.seen.call(try, http.MethodPost, m.APIAddr(), pathMemberLeave, req, nil)
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

// departure is a member that is taken out.
type departure struct {
	name string
	// member is the etcd member that the node is known to have, or 0 for whichever
	// it has.
	member  uint64
	by, why string // who wanted it, as root@n1, and what was done, in words
	token   string // the id of the join token with which another takes its place; "" = nobody does
}

// takeOut removes another node's etcd member, then its entry in the roster,
// which closes the firewalls to it and is what it will be told when it comes
// back, then what else there is of it in the cluster. It ends when all is
// committed. A step that was done before is fine, so that it can be repeated
// after any failure, by any member. It refuses, with [cluster.ErrConflict], to
// take out a voter that etcd cannot do without as this node sees it.
func (n *Node) takeOut(ctx context.Context, d departure) error {
	n.takeMu.Lock() // each decision stands on the one before
	defer n.takeMu.Unlock()
	srv, store := n.etcd.Load(), n.store.Load()
	if srv == nil || store == nil {
		return n.notReady()
	}
	refuse := func(why string) error {
		return refused(cluster.CodeConflict, "%s does not take %s out of the cluster: %s", n.cfg.Name, d.name, why)
	}
	if d.name == n.cfg.Name || n.leaving.Load() {
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
	member, o := n.observeTakeOut(d.name, roster, st)
	if d.member != 0 && member.ID != 0 && member.ID != d.member {
		// Which one it has now is not for whoever asks with an old one.
		return refuse(fmt.Sprintf("its etcd member is not %x any more: it has joined anew", d.member))
	}
	if why := quorumWithout(o); why != "" {
		return refuse(why)
	}
	if member.ID != 0 {
		n.log.Warn("taking a member out of the cluster", "member", d.name, "id", fmt.Sprintf("%x", member.ID), "by", d.by, "why", d.why)
		if err := removeFromEtcd(ctx, srv, st, member.ID); err != nil {
			return err
		}
		d.member = member.ID
	}
	return n.forget(ctx, store, srv.Client(), d, roster)
}

// forget takes what there is of a node, but its etcd member, out of the cluster.
func (n *Node) forget(ctx context.Context, store *cluster.Store, c *clientv3.Client, d departure, roster []cluster.Member) error {
	var entry cluster.Member
	if i := slices.IndexFunc(roster, func(m cluster.Member) bool { return m.Name == d.name }); i >= 0 {
		entry = roster[i]
	}
	if entry.Rev != 0 {
		f := cluster.FormerMember{Name: d.name, Addr: entry.Addr, Role: entry.Role, MemberID: d.member, RemovedAt: time.Now(), By: d.by, Why: d.why}
		if err := store.TakeOut(ctx, entry, f); err != nil {
			return err
		}
		n.event(EventMembership, d.name, actorOr(d.by), "%s (%s, %s) is no member any more: %s", d.name, entry.Role, entry.Addr, d.why)
	}
	n.wake()
	if _, err := store.RevokeTokensOf(ctx, d.name, entry.TokenID, d.token); err != nil {
		return err
	}
	// Patroni would keep the node's replication slot until its key ends with its
	// session, after a minute. The lock of an operation that ran on the node has
	// nobody who could give it back.
	own := patroni.Prefix(n.cfg.Cluster) + patroni.KeyMembers + d.name
	if _, err := c.Delete(ctx, own); err != nil {
		return fmt.Errorf("delete Patroni's key of %s: %w", d.name, err)
	}
	if err := n.breakLockOf(ctx, c, d.name); err != nil {
		return err
	}
	n.wakePrimary(ctx)
	return nil
}

// breakLockOf ends the lock of an operation that ran on a node which is no member
// any more.
func (n *Node) breakLockOf(ctx context.Context, c *clientv3.Client, name string) error {
	r, err := c.Get(ctx, n.operationKey())
	if err != nil {
		return fmt.Errorf("read lock: %w", err)
	}
	for _, kv := range r.Kvs {
		var o OperationInfo
		if json.Unmarshal(kv.Value, &o) != nil || o.Node != name {
			continue
		}
		key := string(kv.Key)
		if _, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", kv.ModRevision)).Then(clientv3.OpDelete(key)).Commit(); err != nil {
			return fmt.Errorf("end the lock of %s: %w", name, err)
		}
	}
	return nil
}

// wakePrimary has the primary's Patroni see at once what has changed, if this
// node may ask it; it sees it in its next round all the same.
func (n *Node) wakePrimary(ctx context.Context) {
	w := n.snapshot()
	for _, m := range w.Members {
		if m.Name != w.View.Leader || w.Secrets == nil {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, wakeTimeout)
		err := n.restClient(w, m.Addr, m.Ports.Patroni).Wake(ctx)
		cancel()
		if err != nil {
			n.log.Debug("cannot wake Patroni on the primary", "primary", m.Name, "err", err)
		}
	}
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
		if m.Name == name || m.PeerURL == url || fmt.Sprintf("%x", m.ID) == name {
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
