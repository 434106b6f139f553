package cluster

import (
	"context"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// watchRetry is the pause before a watch that etcd ended is begun again.
const watchRetry = 300 * time.Millisecond

// Change says what has changed in the store, up to and including Rev. Read the
// parts that are named again.
type Change struct {
	Rev                      int64
	Roster, Settings, Tokens bool
}

func (c *Change) any() bool { return c.Roster || c.Settings || c.Tokens }

// Watch reports changes after revision rev (as returned by [Store.Members])
// until ctx ends, then closes the channel. It goes on by itself after etcd was
// away. Changes that the reader has not taken yet are merged into one, so a
// slow reader never holds anything up. When etcd has compacted the history in
// between, everything is reported as changed.
func (s *Store) Watch(ctx context.Context, rev int64) <-chan Change {
	out := make(chan Change)
	go func() {
		defer close(out)
		var pending Change
		pending.Rev = rev
		for s.watchOnce(ctx, out, &pending) {
			select {
			case <-ctx.Done():
				return
			case <-time.After(watchRetry):
			}
		}
	}()
	return out
}

// watchOnce runs one etcd watch and returns false when ctx has ended.
func (s *Store) watchOnce(ctx context.Context, out chan<- Change, pending *Change) bool {
	// Without a leader the stream must fail, so that it is opened anew on a
	// member that may have one again, and not hang on a member cut off.
	wctx, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer cancel()
	events := s.c.Watch(wctx, s.prefix, clientv3.WithPrefix(), clientv3.WithRev(pending.Rev+1))
	for {
		var ready chan<- Change
		if pending.any() {
			ready = out
		}
		select {
		case <-ctx.Done():
			return false
		case ready <- *pending:
			*pending = Change{Rev: pending.Rev}
		case resp, ok := <-events:
			if !ok {
				return ctx.Err() == nil
			}
			if resp.CompactRevision > 0 {
				*pending = Change{Rev: resp.CompactRevision - 1, Roster: true, Settings: true, Tokens: true}
			}
			if resp.Err() != nil {
				return true
			}
			s.merge(pending, resp.Events)
		}
	}
}

func (s *Store) merge(c *Change, events []*clientv3.Event) {
	for _, e := range events {
		c.Rev = max(c.Rev, e.Kv.ModRevision)
		switch k := strings.TrimPrefix(string(e.Kv.Key), s.prefix); {
		case strings.HasPrefix(k, dirMembers):
			c.Roster = true
		case strings.HasPrefix(k, dirTokens):
			c.Tokens = true
		case k == keyConfig:
			c.Settings = true
		}
	}
}
