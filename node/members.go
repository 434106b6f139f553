package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
	"pgha/pki"
)

// AddLearner adds the etcd member of a joining node, as cluster.Membership
// asks for. It returns the names and peer URLs of all members.
func (n *Node) AddLearner(ctx context.Context, peerURL string) (map[string]string, error) {
	srv := n.etcd.Load()
	if srv == nil {
		return nil, errors.New("etcd does not run on this node")
	}
	_, members, err := srv.AddLearner(ctx, peerURL)
	if err != nil {
		return nil, err
	}
	out := map[string]string{}
	for _, m := range members {
		name := m.Name
		if name == "" { // it has not started yet; the roster will name it
			name = m.PeerURL
		}
		out[name] = m.PeerURL
	}
	return out, nil
}

// admit opens this node's firewall to a member before it is told that it may
// come. The other nodes read it from the roster within their next round.
func (n *Node) admit(m cluster.Member) {
	n.mu.Lock()
	known := false
	for _, k := range n.world.Members {
		known = known || k.Name == m.Name
	}
	if !known {
		n.world.Members = append(n.world.Members[:len(n.world.Members):len(n.world.Members)], m)
	}
	n.mu.Unlock()
	n.applyFirewall(context.Background())
	n.wake()
}

// pgMajor is the major version of the cluster's PostgreSQL, 0 where none runs.
func (n *Node) pgMajor() int {
	if n.cfg.Role != cluster.RoleData {
		return 0
	}
	return majorOf(n.cfg.Postgres.BinDir)
}

// TokenRequest asks for a join token.
type TokenRequest struct {
	Role cluster.NodeRole `json:"role"`
	Name string           `json:"name,omitempty"`
	TTL  time.Duration    `json:"ttl,omitempty"` // nanoseconds; 0 = the default
	Uses int              `json:"uses,omitempty"`
}

// TokenAnswer carries a new token. It is shown once.
type TokenAnswer struct {
	Token   string           `json:"token"`
	ID      string           `json:"id"`
	Role    cluster.NodeRole `json:"role"`
	Expires time.Time        `json:"expires"`
}

func (n *Node) createToken(w http.ResponseWriter, r *http.Request) {
	var req TokenRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	a, err := n.newToken(r.Context(), req)
	reply(w, a, err)
}

func (n *Node) newToken(ctx context.Context, req TokenRequest) (TokenAnswer, error) {
	store := n.store.Load()
	if store == nil {
		return TokenAnswer{}, n.notReady()
	}
	ca, err := n.pki.CACert()
	if err != nil {
		return TokenAnswer{}, err
	}
	pin, err := pki.PinOf(ca)
	if err != nil {
		return TokenAnswer{}, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	members, _, err := store.Members(ctx)
	if err != nil {
		return TokenAnswer{}, err
	}
	// Only data nodes can sign; the node that was asked comes first.
	addrs := []string{}
	for _, m := range members {
		switch {
		case m.Role != cluster.RoleData || m.State != cluster.StateMember:
		case m.Name == n.cfg.Name:
			addrs = append([]string{m.APIAddr()}, addrs...)
		default:
			addrs = append(addrs, m.APIAddr())
		}
	}
	if len(addrs) == 0 {
		return TokenAnswer{}, errors.New("create token: no data node is a full member yet: wait a moment and repeat")
	}
	spec := cluster.TokenSpec{Role: req.Role, Name: req.Name, TTL: req.TTL, Uses: req.Uses}
	t, text, err := store.CreateToken(ctx, spec, pin, addrs, n.cfg.Name, time.Now())
	if err != nil {
		return TokenAnswer{}, err
	}
	n.wake() // the firewall opens the API's port to joining nodes
	return TokenAnswer{Token: text, ID: t.ID, Role: t.Role, Expires: t.Expires}, nil
}

func (n *Node) listTokens(w http.ResponseWriter, r *http.Request) {
	store := n.store.Load()
	if store == nil {
		reply(w, nil, n.notReady())
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	tokens, err := store.Tokens(ctx)
	if tokens == nil {
		tokens = []cluster.TokenInfo{}
	}
	reply(w, tokens, err)
}

func (n *Node) revokeToken(w http.ResponseWriter, r *http.Request) {
	store := n.store.Load()
	if store == nil {
		reply(w, nil, n.notReady())
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), 5*time.Second)
	defer cancel()
	err := store.RevokeToken(ctx, r.PathValue("id"))
	n.wake()
	reply(w, struct{}{}, err)
}

func (n *Node) notReady() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	return &cluster.Error{Code: cluster.CodeUnavailable, Message: "this node is not ready: " + n.waiting + "; etcd: " + n.etcdState}
}

func (n *Node) renewHandler(w http.ResponseWriter, r *http.Request) {
	reply(w, struct{}{}, n.renewNow(r.Context()))
}

// renewNow replaces every certificate of this node at once.
func (n *Node) renewNow(ctx context.Context) error {
	w := n.snapshot()
	due := map[pki.Role]string{}
	for role := range n.leafSpecs(w) {
		due[role] = "asked for"
	}
	if len(due) == 0 {
		return n.notReady()
	}
	return n.reissue(ctx, w, due)
}

func (n *Node) leaveHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 2*time.Minute)
	defer cancel()
	reply(w, struct{}{}, n.leave(ctx))
}

// leaveObservation is what decideLeave looks at.
type leaveObservation struct {
	members   int // on the roster, this node included
	voters    int
	answering int  // voters that answer, this node included
	voter     bool // this node is one
	leader    bool // this node is the primary
	successor string
	noSuccess string // why nobody can take over
}

// decideLeave says whether a node may go, with the reason if not.
func decideLeave(o leaveObservation) (bool, string) {
	switch {
	case o.members <= 1:
		return true, "this is the last node: the cluster ends with it"
	case o.voter && o.voters == 1:
		return false, "this node is the only etcd voter: the others would lose the cluster. Reset the others first, or add a witness so that they become voters"
	case o.voter && o.answering-1 < (o.voters-1)/2+1:
		return false, fmt.Sprintf("only %d of %d voters answer: without this one the cluster would lose its quorum", o.answering, o.voters)
	case o.leader && o.successor == "":
		return false, "this node is the primary and nobody can take over: " + o.noSuccess
	}
	return true, ""
}

// leave takes this node out of the cluster: PostgreSQL's leadership goes to
// another node first, then the node leaves etcd and the roster.
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
	}
	if err := store.RemoveMember(ctx, n.cfg.Name); err != nil && !errors.Is(err, cluster.ErrNoMember) {
		return err
	}
	return leaveEtcd(ctx, srv, st.MemberID)
}

// leaveEtcd removes this node's own member. The answer may be lost with the
// membership, and the leader takes a learner that is on no roster out by
// itself: what counts is that the member is out.
func leaveEtcd(ctx context.Context, srv *embedded.Server, id uint64) error {
	for {
		try, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := srv.Remove(try, id)
		cancel()
		if err == nil || wasRemoved(ctx, srv) {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("leave etcd: %w", err)
		}
	}
}

// wasRemoved waits a moment for a member to end, and tells whether it did
// because others have taken it out.
func wasRemoved(ctx context.Context, srv *embedded.Server) bool {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	select {
	case <-ctx.Done():
		return false
	case <-srv.Done():
		return errors.Is(srv.Err(), embedded.ErrRemoved)
	}
}
