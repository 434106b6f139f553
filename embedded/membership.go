package embedded

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	retryMin = 100 * time.Millisecond
	retryMax = 400 * time.Millisecond

	// Defragmentation pays when half the file is empty and the file is not
	// small: bbolt allocates 16 MiB at a time anyway.
	defragMinSize  = 32 << 20
	defragMinWaste = 0.5
	// disarmBelow is the part of the quota that must be free again before
	// writes are allowed again.
	disarmBelow = 0.8
)

// AddLearner adds the member with the given peer URL as a learner and returns
// it and all members. A member that is there already, learner or voter, is
// returned as it is, so the call can be repeated. While etcd refuses because
// members are away, have just connected, or two learners are waiting, it is
// tried again until ctx ends; the error then names that cause.
func (s *Server) AddLearner(ctx context.Context, peerURL string) (Member, []Member, error) {
	if _, err := parseURL(peerURL); err != nil {
		return Member{}, nil, fmt.Errorf("add learner: %w: %w", ErrConfig, err)
	}
	var members []Member
	err := s.retry(ctx, "add learner "+peerURL, func(ctx context.Context) error {
		resp, err := s.client.MemberAddAsLearner(ctx, []string{peerURL})
		if errors.Is(err, rpctypes.ErrMemberExist) || errors.Is(err, rpctypes.ErrPeerURLExist) {
			list, err := s.client.MemberList(ctx)
			if err != nil {
				return err
			}
			members = fromProto(list.Members)
			return nil
		}
		if err != nil {
			return err
		}
		members = fromProto(resp.Members)
		return nil
	})
	if err != nil {
		return Member{}, nil, err
	}
	i := slices.IndexFunc(members, func(m Member) bool { return m.PeerURL == peerURL })
	if i < 0 {
		return Member{}, nil, fmt.Errorf("add learner %s: it was removed again meanwhile", peerURL)
	}
	return members[i], members, nil
}

// Promote makes a learner a voter. While the learner is not in sync it is tried
// again until ctx ends. A voter stays one. The caller sees to it that the number
// of voters stays odd (DecideMembership, Apply).
func (s *Server) Promote(ctx context.Context, id uint64) error {
	return s.retry(ctx, "promote member "+memberIDString(id), func(ctx context.Context) error {
		_, err := s.client.MemberPromote(ctx, id)
		if errors.Is(err, rpctypes.ErrMemberNotLearner) {
			return nil
		}
		return err
	})
}

// Remove takes a member out. One that is out already is fine. etcd refuses when
// the rest would have no quorum; that is tried again until ctx ends.
func (s *Server) Remove(ctx context.Context, id uint64) error {
	return s.retry(ctx, "remove member "+memberIDString(id), func(ctx context.Context) error {
		_, err := s.client.MemberRemove(ctx, id)
		if errors.Is(err, rpctypes.ErrMemberNotFound) {
			return nil
		}
		return err
	})
}

// Apply carries out what DecideMembership decided. Promotions follow each other
// without a pause: between two of them the loss of either voter stops both.
func (s *Server) Apply(ctx context.Context, a MembershipAction) error {
	for _, id := range a.Promote {
		if err := s.Promote(ctx, id); err != nil {
			return err
		}
	}
	if a.Remove != 0 {
		return s.Remove(ctx, a.Remove)
	}
	return nil
}

// MoveLeader makes the voter to the leader and waits for it. Any member may
// ask. It fails when to is no voter, and with ctx's error when to does not take
// over in time; the old leader then stays or a new election settles it.
func (s *Server) MoveLeader(ctx context.Context, to uint64) error {
	if err := s.ended(); err != nil {
		return fmt.Errorf("move etcd leader: %w", err)
	}
	lead := s.es.Lead()
	if lead == to {
		return nil
	}
	if lead == 0 {
		return fmt.Errorf("move etcd leader: there is none now")
	}
	if err := s.es.MoveLeader(ctx, lead, to); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("move etcd leader to %s: %w (%w)", memberIDString(to), err, ctx.Err())
		}
		return fmt.Errorf("move etcd leader to %s: %w", memberIDString(to), err)
	}
	return nil
}

// Defragment gives the database's empty pages back to the file system. This
// member serves nothing meanwhile, so the caller does one member at a time, the
// leader last. It cannot be interrupted.
func (s *Server) Defragment(ctx context.Context) error {
	if err := s.ended(); err != nil {
		return fmt.Errorf("defragment etcd: %w", err)
	}
	if err := ctx.Err(); err != nil {
		return fmt.Errorf("defragment etcd: %w", err)
	}
	s.defragMu.Lock()
	defer s.defragMu.Unlock()
	before := s.sizes()
	s.defrag.Store(true)
	err := s.es.Defragment()
	s.defrag.Store(false)
	if err != nil {
		return fmt.Errorf("defragment etcd: %w", err)
	}
	s.log.Info("etcd defragmented", "before_bytes", before.size, "after_bytes", s.sizes().size)
	return nil
}

// DefragIfNeeded defragments when at least half of a file of some size is
// empty, or the quota was reached, and tells whether it did. After a reached
// quota it also clears this member's NOSPACE alarm, which stops all writes of
// the cluster, once a fifth of the quota is free.
func (s *Server) DefragIfNeeded(ctx context.Context) (bool, error) {
	st, err := s.Status(ctx)
	if err != nil {
		return false, fmt.Errorf("defragment etcd: %w", err)
	}
	full := slices.Contains(st.Alarms, pb.AlarmType_NOSPACE.String())
	if !full && !wasteful(st.DBSize, st.DBInUse) {
		return false, nil
	}
	if err := s.Defragment(ctx); err != nil {
		return false, err
	}
	if !full || float64(s.sizes().size) > disarmBelow*float64(s.cfg.QuotaBytes) {
		return true, nil
	}
	_, err = s.client.AlarmDisarm(ctx, &clientv3.AlarmMember{MemberID: st.MemberID, Alarm: pb.AlarmType_NOSPACE})
	if err != nil {
		return true, fmt.Errorf("clear etcd's NOSPACE alarm: %w", err)
	}
	return true, nil
}

func wasteful(size, inUse int64) bool {
	return size >= defragMinSize && float64(size-inUse) >= defragMinWaste*float64(size)
}

// transient are refusals that time heals.
var transient = []error{
	rpctypes.ErrUnhealthy, rpctypes.ErrMemberNotEnoughStarted, rpctypes.ErrTooManyLearners,
	rpctypes.ErrMemberLearnerNotReady, rpctypes.ErrNoLeader, rpctypes.ErrLeaderChanged, rpctypes.ErrNotLeader,
	rpctypes.ErrTimeout, rpctypes.ErrTimeoutDueToLeaderFail, rpctypes.ErrTimeoutDueToConnectionLost,
}

func isTransient(err error) bool {
	return slices.ContainsFunc(transient, func(t error) bool { return errors.Is(err, t) })
}

// retry runs op until it succeeds, fails for good, or ctx or the member ends.
func (s *Server) retry(ctx context.Context, what string, op func(context.Context) error) error {
	var last error
	for {
		if err := s.ended(); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		err := op(ctx)
		switch {
		case err == nil:
			return nil
		case isTransient(err):
			last = err
		case ctx.Err() == nil:
			return fmt.Errorf("%s: %w", what, err)
		}
		select {
		case <-ctx.Done():
			if last != nil {
				return fmt.Errorf("%s: %w (%w)", what, last, ctx.Err())
			}
			return fmt.Errorf("%s: %w", what, ctx.Err())
		case <-s.done:
		case <-time.After(retryMin + rand.N(retryMax-retryMin)):
		}
	}
}

func fromProto(in []*pb.Member) []Member {
	out := make([]Member, 0, len(in))
	for _, m := range in {
		out = append(out, newMember(m.GetID(), m.GetName(), m.GetPeerURLs(), m.GetClientURLs(), m.GetIsLearner()))
	}
	return out
}

func voters(members []Member) []Member {
	return slices.DeleteFunc(slices.Clone(members), func(m Member) bool { return m.Learner })
}
