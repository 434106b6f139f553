package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"slices"
	"time"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/pki"
	"pgha/systemd"
)

// What becomes of a node that is no member any more: it hears so, from etcd while
// it runs or from a peer when it comes back, stops for good what it served, and
// says so until it is reset.

const (
	// pathStanding is where a node asks whether it is still a member.
	pathStanding = "/v1/members/standing"
	// standingEvery is how often a node in doubt asks.
	standingEvery = 2 * time.Second
	// leaderless is for how long etcd must have had no leader for a doubt.
	leaderless = 5 * time.Second
	// doubtFor is how long a doubt lasts that a refusal has raised; etcd's word
	// lasts for ever.
	doubtFor = 10 * time.Second
	forEver  = 365 * 24 * time.Hour
	// obeyTimeout bounds the stop of PostgreSQL on a node that was removed.
	obeyTimeout = 3 * time.Minute
)

// Removal says since when and by whom a node is no member any more.
type Removal struct {
	At  time.Time `json:"at,omitzero"` // zero: not known any more
	By  string    `json:"by,omitempty"`
	Why string    `json:"why"`
}

// RemovalText says in words that a node was removed from a cluster.
func (r Removal) RemovalText(clusterName string) string {
	text := fmt.Sprintf("this node was removed from cluster %q", clusterName)
	if r.By != "" {
		text += " by " + r.By
	}
	if !r.At.IsZero() {
		text += " at " + r.At.UTC().Format(time.RFC3339)
	}
	return text + paren(r.Why)
}

// RemovalToDo is the way out of it.
const RemovalToDo = "take it in again, or use the host for something else: pgha reset, then pgha join TOKEN"

// StandingRequest asks whether the caller, whom its certificate names, is still a
// member.
type StandingRequest struct {
	// MemberID is the etcd member that the caller has; 0 = it does not know.
	MemberID uint64 `json:"member_id,string"`
}

// Standing is the answer. Removed is nil for a member.
type Standing struct {
	Removed *cluster.FormerMember `json:"removed,omitempty"`
}

// decideStanding says whether a node was removed. The etcd member tells one life
// of a node from another: a host of its name may have joined since.
func decideStanding(roster []cluster.Member, former []cluster.FormerMember, name string, id uint64) (cluster.FormerMember, bool) {
	f, ok := cluster.FormerOf(former, name, id)
	switch {
	case id != 0 && ok:
		return f, true
	case named(roster, name):
		return cluster.FormerMember{}, false // or it was never told apart from who has its name now
	case !ok:
		f, ok = cluster.FormerOf(former, name, 0)
	}
	if !ok { // so long ago that it is forgotten
		f = cluster.FormerMember{Name: name, MemberID: id, Why: "it is not on the roster"}
	}
	return f, true
}

// standingHandler answers a node that asks, former members included.
func (n *Node) standingHandler(w http.ResponseWriter, r *http.Request) {
	var req StandingRequest
	id, err := n.caller(r)
	if err == nil {
		err = decode(w, r, &req)
	}
	var s Standing
	if err == nil {
		s, err = n.standing(r.Context(), id.Node, req.MemberID)
	}
	reply(w, s, err)
}

// standing reads with a quorum: what it says stops a node.
func (n *Node) standing(ctx context.Context, name string, id uint64) (Standing, error) {
	store := n.store.Load()
	if store == nil || n.removal.Load() != nil {
		return Standing{}, n.notReady()
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	roster, _, err := store.Members(ctx)
	if err != nil {
		return Standing{}, err
	}
	former, err := store.Former(ctx)
	if err != nil {
		return Standing{}, err
	}
	if f, removed := decideStanding(roster, former, name, id); removed {
		return Standing{Removed: &f}, nil
	}
	return Standing{}, nil
}

// lifeSlack is by how much a node's certificate may be older than its entry in
// the roster, for clocks that are set.
const lifeSlack = 5 * time.Minute

// ofThisLife refuses the certificate of a node that has left, after another has
// joined under its name.
func (n *Node) ofThisLife(r *http.Request, name string) error {
	for _, m := range n.snapshot().Members {
		if m.Name != name || len(r.TLS.VerifiedChains) == 0 {
			continue
		}
		if issued := pki.IssuedAt(r.TLS.VerifiedChains[0][0]); issued.Add(lifeSlack).Before(m.JoinedAt) {
			return noPeer(fmt.Errorf("the certificate of %s is of %s, and the node of that name has joined at %s: this host was replaced",
				name, issued.UTC().Format(time.RFC3339), m.JoinedAt.UTC().Format(time.RFC3339)))
		}
	}
	return nil
}

// renewals passes on what asks for new certificates, unless its own is of a life
// before. That it is on the roster is seen with a quorum.
func (n *Node) renewals(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		id, err := n.caller(r)
		if err == nil {
			err = n.ofThisLife(r, id.Node)
		}
		if err != nil {
			reply(w, nil, err)
			return
		}
		h.ServeHTTP(w, r)
	})
}

// doubtful notes that a peer has refused this node as a stranger, or that etcd
// has said it was removed: for a while it asks.
func (n *Node) doubtful(d time.Duration) {
	if until := time.Now().Add(d).UnixNano(); until > n.doubt.Load() {
		n.doubt.Store(until)
	}
}

// watchStanding asks the peers whether this node is still a member whenever there
// is a reason to doubt it.
func (n *Node) watchStanding(ctx context.Context) error {
	if r := n.removal.Load(); r != nil { // known since before this start
		n.obeyRemoval(ctx, *r)
		return nil
	}
	t := time.NewTicker(standingEvery)
	defer t.Stop()
	var leader time.Time // when etcd last had one
	var id uint64
	for leader = time.Now(); ; {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		if n.removal.Load() != nil {
			return nil
		}
		if srv := n.etcd.Load(); srv != nil {
			if st, err := srv.Status(ctx); err == nil {
				id = st.MemberID
				if st.HasLeader && !st.Learner {
					leader = time.Now()
				}
			}
		}
		if time.Since(leader) < leaderless && time.Now().UnixNano() > n.doubt.Load() {
			continue
		}
		if f := n.askStanding(ctx, id); f != nil {
			n.markRemoved(Removal{At: f.RemovedAt, By: f.By, Why: f.Why})
			return nil
		}
	}
}

// askStanding asks one peer after the other; nil = this node is a member, or
// nobody could tell.
func (n *Node) askStanding(ctx context.Context, id uint64) *cluster.FormerMember {
	for _, m := range n.snapshot().Members {
		if m.Name == n.cfg.Name {
			continue
		}
		var s Standing
		try, cancel := context.WithTimeout(ctx, 2*askTimeout)
		err := n.seen.call(try, http.MethodPost, m.APIAddr(), pathStanding, StandingRequest{MemberID: id}, &s)
		cancel()
		if err == nil {
			return s.Removed
		}
	}
	return nil
}

// markRemoved notes for good that this node is no member any more, and stops what
// it serves. It returns when that is done.
func (n *Node) markRemoved(r Removal) {
	if !n.removal.CompareAndSwap(nil, &r) {
		return
	}
	if err := n.changeState(func(s *State) { s.Removed = &r }); err != nil {
		n.problem("note that this node was removed", err) // it will be told again after a restart
	}
	n.event(EventMembership, n.cfg.Name, actorOr(r.By), "%s", r.RemovalText(n.state.ClusterName))
	n.obeyRemoval(context.Background(), r)
}

func actorOr(by string) string {
	if by == "" {
		return actorPgha
	}
	return by
}

// obeyRemoval stops what a former member must not serve: its PostgreSQL is of no
// timeline that is known to be right, and its HAProxy knows the cluster as it was.
func (n *Node) obeyRemoval(ctx context.Context, r Removal) {
	n.leaving.Store(true)
	text := r.RemovalText(n.state.ClusterName)
	n.log.Error("this node is no member any more", "cluster", n.state.ClusterName, "removed_by", r.By, "removed_at", r.At, "why", r.Why, "to_do", RemovalToDo)
	n.setEtcdState(text)
	n.problem("removed", errors.New(text))
	if err := systemd.NotifyStatus(text + ": " + RemovalToDo); err != nil {
		n.log.Warn("cannot tell systemd", "err", err)
	}
	if srv := n.etcd.Load(); srv != nil {
		srv.Stop()
	}
	ctx, cancel := context.WithTimeout(ctx, obeyTimeout)
	defer cancel()
	n.partProblem(ctx, "stop after the removal", n.stopServing(ctx))
}

// stopServing stops PostgreSQL and HAProxy.
func (n *Node) stopServing(ctx context.Context) error {
	if n.patroni == nil {
		return nil
	}
	err := n.patroni.Stop(ctx)
	err = errors.Join(err, n.stopPostgres(ctx))
	if n.keeper != nil {
		n.waitShut(ctx)
	}
	return errors.Join(err, n.haproxy.Stop(ctx))
}

// etcdRemoved is what follows when etcd says that this member was removed. The
// peers know by whom; whatever they say, there is nothing to serve any more.
func (n *Node) etcdRemoved(ctx context.Context) {
	n.leaving.Store(true)
	n.doubtful(forEver)
	ctx, cancel := context.WithTimeout(ctx, obeyTimeout)
	defer cancel()
	n.partProblem(ctx, "stop after the removal", n.stopServing(ctx))
}

// removedStatus is all that a former member can say.
func (n *Node) removedStatus(r Removal) Status {
	text := r.RemovalText(n.state.ClusterName)
	return Status{
		Cluster: n.state.ClusterName, ClusterID: n.state.ClusterID, SeenBy: n.cfg.Name, At: time.Now(), Health: Unknown,
		Members: []MemberStatus{}, Verdict: text, ToDo: []string{RemovalToDo}, Problems: []string{text},
	}
}

// changeState changes the state on disk. What others have written to it stays.
func (n *Node) changeState(change func(*State)) error {
	n.stateMu.Lock()
	defer n.stateMu.Unlock()
	var s State
	if err := fsx.ReadJSON(n.paths.State(), &s); err != nil {
		return fmt.Errorf("read node state: %w", err)
	}
	change(&s)
	return s.Save(n.paths)
}

// formerAddrs are the addresses of former members, and of others that must be
// told something, that no member has now.
func formerAddrs(w world, others []netip.Addr) []netip.Addr {
	out := slices.Clone(others)
	for _, f := range w.Former {
		out = append(out, f.Addr)
	}
	out = slices.DeleteFunc(out, func(a netip.Addr) bool {
		return slices.ContainsFunc(w.Members, func(m cluster.Member) bool { return m.Addr == a })
	})
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}
