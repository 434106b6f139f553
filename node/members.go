package node

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"time"

	"pgha/cluster"
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

// admitFor is how long a member that was let in may be missing from the roster
// as it is read: longer than a round of the reconciler takes to read it.
const admitFor = 10 * time.Second

// admission is a member that was let in, and until when that holds by itself.
type admission struct {
	member cluster.Member
	until  time.Time
}

// admit opens this node's firewall to a member before it is told that it may
// come. The other nodes read it from the roster within their next round.
func (n *Node) admit(m cluster.Member) {
	n.mu.Lock()
	if n.admitted == nil {
		n.admitted = map[string]admission{}
	}
	n.admitted[m.Name] = admission{m, time.Now().Add(admitFor)}
	if !named(n.world.Members, m.Name) {
		n.world.Members = append(slices.Clip(n.world.Members), m)
	}
	n.mu.Unlock()
	n.applyFirewall(context.Background())
	n.wake()
}

// withAdmitted adds to a roster the members that were let in while it was being
// read: a round that ended without them would shut them out again until the
// next. The caller holds n.mu.
func (n *Node) withAdmitted(roster []cluster.Member, now time.Time) []cluster.Member {
	for name, a := range n.admitted {
		if named(roster, name) || now.After(a.until) {
			delete(n.admitted, name)
			continue
		}
		roster = append(slices.Clip(roster), a.member)
	}
	return roster
}

func named(roster []cluster.Member, name string) bool {
	return slices.ContainsFunc(roster, func(m cluster.Member) bool { return m.Name == name })
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
	// Replaces is the member whose place the new node takes, "" for none.
	Replaces string `json:"replaces,omitempty"`
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
	if req.Replaces != "" {
		reply(w, nil, refused(cluster.CodeBadRequest, "a token that replaces a member is made with pgha member replace"))
		return
	}
	a, err := n.newToken(r.Context(), req, n.cfg.Name)
	reply(w, a, err)
}

func (n *Node) newToken(ctx context.Context, req TokenRequest, by string) (TokenAnswer, error) {
	if n.cfg.Role != cluster.RoleData {
		return TokenAnswer{}, refused(cluster.CodeBadRequest, "a witness lets nobody in: make the token on %s", orList(n.dataNodes()))
	}
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
		case m.Role != cluster.RoleData || m.State != cluster.StateMember || m.Name == req.Replaces:
		case m.Name == n.cfg.Name:
			addrs = append([]string{m.APIAddr()}, addrs...)
		default:
			addrs = append(addrs, m.APIAddr())
		}
	}
	if len(addrs) == 0 {
		return TokenAnswer{}, errors.New("create token: no data node is a full member yet: wait a moment and repeat")
	}
	spec := cluster.TokenSpec{Role: req.Role, Name: req.Name, TTL: req.TTL, Uses: req.Uses, Replaces: req.Replaces}
	t, text, err := store.CreateToken(ctx, spec, pin, addrs, by, time.Now())
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
	why := "etcd: " + n.etcdState
	if n.waiting != "" {
		why = n.waiting + "; " + why
	}
	return &cluster.Error{Code: cluster.CodeUnavailable, Message: "this node is not ready: " + why}
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
