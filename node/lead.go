package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"time"

	"pgha/cluster"
	"pgha/embedded"
)

const (
	leadEvery   = time.Second
	defragEvery = time.Hour
	leadTimeout = 20 * time.Second
	// moveInterval keeps raft's leadership from going to and fro.
	moveInterval = 10 * time.Second
)

// leadLoop does what exactly one node has to do, on the node whose etcd member
// is raft's leader: it promotes learners, removes members that never came,
// and keeps raft's leadership off the primary's host.
func (n *Node) leadLoop(ctx context.Context) error {
	t := time.NewTicker(leadEvery)
	defer t.Stop()
	d := duties{n: n, nextDefrag: time.Now().Add(defragEvery)}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		round, cancel := context.WithTimeout(ctx, leadTimeout)
		err := d.round(round)
		cancel()
		if ctx.Err() == nil {
			n.problem("membership", err)
		}
	}
}

// duties is what the leader's rounds remember.
type duties struct {
	n          *Node
	lastMove   time.Time
	lastReason string
	unstarted  map[uint64]time.Time // since when a member has been seen unstarted
	nextDefrag time.Time
	tell       chronicler
}

func (d *duties) round(ctx context.Context) error {
	srv, store := d.n.etcd.Load(), d.n.store.Load()
	if srv == nil || store == nil {
		return nil
	}
	st, err := srv.Status(ctx)
	if err != nil {
		return nil // the etcd part reports it
	}
	d.tell.quorum(d.n, st, time.Now())
	d.tell.peers(d.n, d.n.snapshot().Members, st.IsLeader, time.Now())
	if !st.HasLeader {
		return nil
	}
	d.defrag(ctx, srv)
	if err := d.settle(ctx, store); err != nil {
		return err
	}
	if !st.IsLeader {
		d.unstarted = nil
		return nil
	}
	if err := d.membership(ctx, srv, store, st); err != nil {
		return err
	}
	return d.placement(ctx, srv, st)
}

// settle turns this node's own roster entry into a full member once its etcd
// member takes part, and keeps its version right.
func (d *duties) settle(ctx context.Context, store *cluster.Store) error {
	for _, m := range d.n.snapshot().Members {
		if m.Name != d.n.cfg.Name || (m.State == cluster.StateMember && m.Version == Version) {
			continue
		}
		old := m
		err := store.UpdateMember(ctx, m.Name, func(m *cluster.Member) error {
			m.State, m.Version = cluster.StateMember, Version
			return nil
		})
		switch {
		case err != nil:
			return err
		case old.State != cluster.StateMember:
			d.n.event(EventMembership, m.Name, actorPgha, "%s has joined as a %s node, at %s", m.Name, m.Role, m.Addr)
		default:
			d.n.event(EventUpgrade, m.Name, actorPgha, "pgha on %s is version %s now, it was %s", m.Name, Version, old.Version)
		}
		return nil
	}
	return nil
}

func (d *duties) membership(ctx context.Context, srv *embedded.Server, store *cluster.Store, st embedded.Status) error {
	now := time.Now()
	if err := d.dropAbandoned(ctx, srv, store, st, now); err != nil {
		return err
	}
	o := embedded.MembershipObservation{
		Members: st.Members, Committed: st.Committed,
		Expected: map[string]bool{}, NotStartedFor: map[uint64]time.Duration{},
	}
	for _, m := range d.n.snapshot().Members {
		o.Expected[m.PeerURL()] = true
	}
	o.Reachable, o.Applied = d.progress(st)
	if d.unstarted == nil {
		d.unstarted = map[uint64]time.Time{}
	}
	for _, m := range st.Members {
		if m.Started {
			delete(d.unstarted, m.ID)
			continue
		}
		if _, ok := d.unstarted[m.ID]; !ok {
			d.unstarted[m.ID] = now
		}
		o.NotStartedFor[m.ID] = now.Sub(d.unstarted[m.ID])
	}
	act, why := embedded.DecideMembership(o)
	if why != d.lastReason {
		d.lastReason = why
		d.n.log.Info("membership", "decision", why)
	}
	for _, id := range act.Promote {
		if err := d.promote(ctx, srv, id); err != nil {
			return err
		}
	}
	if act.Remove != 0 {
		d.n.log.Warn("removing an etcd member", "id", fmt.Sprintf("%x", act.Remove), "why", why)
		return srv.Remove(ctx, act.Remove)
	}
	return nil
}

// progress says which members answered lately and how far they were.
func (d *duties) progress(st embedded.Status) (reachable map[uint64]bool, applied map[uint64]uint64) {
	reachable, applied = map[uint64]bool{st.MemberID: true}, map[uint64]uint64{st.MemberID: st.Applied}
	for _, r := range d.n.seen.lately() {
		if r.Etcd.MemberID != 0 {
			reachable[r.Etcd.MemberID], applied[r.Etcd.MemberID] = true, r.Etcd.Applied
		}
	}
	return reachable, applied
}

// promote makes a learner a voter. It insists: between two promotions the
// cluster has an even number of voters, which is worse than either end.
func (d *duties) promote(ctx context.Context, srv *embedded.Server, id uint64) error {
	for {
		err := srv.Promote(ctx, id)
		if err == nil {
			d.n.event(EventMembership, d.memberOf(ctx, srv, id), actorPgha, "its etcd member votes now")
			d.n.wake()
			return nil
		}
		if !sleep(ctx, 50*time.Millisecond) {
			return errors.Join(fmt.Errorf("promote learner %x", id), err)
		}
	}
}

// memberOf is the node's name of an etcd member, or its id.
func (d *duties) memberOf(ctx context.Context, srv *embedded.Server, id uint64) string {
	if st, err := srv.Status(ctx); err == nil {
		for _, m := range st.Members {
			if m.ID == id && m.Name != "" {
				return m.Name
			}
		}
	}
	return fmt.Sprintf("%x", id)
}

// dropAbandoned frees the names of joins that nobody finished.
func (d *duties) dropAbandoned(ctx context.Context, srv *embedded.Server, store *cluster.Store, st embedded.Status, now time.Time) error {
	abandoned, err := store.AbandonedJoins(ctx, now)
	if err != nil {
		return err
	}
	for _, m := range abandoned {
		started := false
		for _, e := range st.Members {
			if e.PeerURL != m.PeerURL() {
				continue
			}
			if started = e.Started; !started {
				if err := srv.Remove(ctx, e.ID); err != nil {
					return fmt.Errorf("remove abandoned member %s: %w", m.Name, err)
				}
			}
		}
		if started {
			continue
		}
		d.n.event(EventMembership, m.Name, actorPgha, "its join was abandoned at %s; the name is free again", m.JoinedAt.Format(time.DateTime))
		if err := store.DropAbandoned(ctx, m); err != nil && !errors.Is(err, cluster.ErrConflict) {
			return err
		}
	}
	return nil
}

// placement moves raft's leadership to the witness, or at least to where the
// loss of the primary's host does not cost an election on top.
func (d *duties) placement(ctx context.Context, srv *embedded.Server, st embedded.Status) error {
	w := d.n.snapshot()
	if !w.Viewed || w.View.Leader == "" {
		return nil
	}
	o := embedded.PlacementObservation{
		Members: st.Members, LeaderID: st.LeaderID, Committed: st.Committed, PostgresLeader: w.View.Leader,
		SinceLastMove: time.Since(d.lastMove), MinInterval: moveInterval,
	}
	o.Reachable, o.Applied = d.progress(st)
	target, why := embedded.DecideLeaderPlacement(o)
	if target == 0 || !d.answersNow(ctx, st, target) {
		return nil
	}
	d.lastMove = time.Now()
	d.n.log.Info("moving etcd's leadership", "to", fmt.Sprintf("%x", target), "why", why)
	return srv.MoveLeader(ctx, target)
}

// answersNow asks a member whether it is there. A transfer to one that is not
// would have raft drop every proposal until it is given up, a second later.
func (d *duties) answersNow(ctx context.Context, st embedded.Status, id uint64) bool {
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	for _, e := range st.Members {
		for _, m := range d.n.snapshot().Members {
			if e.ID == id && m.PeerURL() == e.PeerURL {
				return e.ID == st.MemberID || d.n.seen.call(ctx, http.MethodGet, m.APIAddr(), pathAlive, nil, nil) == nil
			}
		}
	}
	return false
}

// defrag gives etcd's free pages back now and then. Members do it at
// different times because they start at different times; it takes
// milliseconds at the sizes that a quota of 256 MiB allows.
func (d *duties) defrag(ctx context.Context, srv *embedded.Server) {
	if time.Now().Before(d.nextDefrag) {
		return
	}
	d.nextDefrag = time.Now().Add(defragEvery)
	if _, err := srv.DefragIfNeeded(ctx); err != nil {
		d.n.log.Warn("cannot defragment etcd", "err", err)
	}
}
