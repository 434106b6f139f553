package node

import (
	"context"
	"errors"
	"sync"
	"time"

	"pgha/cluster"
	"pgha/gate"
	"pgha/haproxy"
	"pgha/supervisor"
)

// routeEvery is how often HAProxy is told that the owner serves: before a second
// check of a Patroni that is away can fail.
const routeEvery = 250 * time.Millisecond

// router leads HAProxy to the gate's owner as soon as this node knows of it.
// HAProxy's own checks are the safety net: they find the same a little later,
// and go on when the daemon is away.
type router struct {
	n    *Node
	kick chan struct{}

	mu     sync.Mutex
	target route

	done route // what HAProxy was told last; the loop's own
}

// route is where writing clients are led.
type route struct {
	owner string
	epoch uint64
	open  bool // its PostgreSQL takes writes
}

func (r *router) init(n *Node) { r.n, r.kick = n, make(chan struct{}, 1) }

// tell notes what the gate knows; it does not block.
func (r *router) tell(s gate.Status) {
	r.mu.Lock()
	r.target = route{owner: s.Owner, epoch: s.Epoch, open: s.State == gate.Open}
	r.mu.Unlock()
	r.wake()
}

func (r *router) wake() {
	select {
	case r.kick <- struct{}{}:
	default:
	}
}

// loop follows the target, and tries again what HAProxy could not be told.
func (r *router) loop(ctx context.Context) error {
	t := time.NewTicker(routeEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-r.kick:
		case <-t.C:
		}
		r.mu.Lock()
		want := r.target
		r.mu.Unlock()
		if want.owner == "" || (want == r.done && !(want.open && r.serves())) {
			continue
		}
		if st := r.n.haproxy.Status(); st.State != supervisor.Running || st.Health.Checked.IsZero() {
			continue // told when it runs
		}
		var err error
		if want == r.done {
			// Patroni's answer is missed while it is started anew; the owner serves on.
			err = r.n.runtime.SetServerHealth(ctx, haproxy.BackendReadWrite, want.owner, true)
		} else if err = r.follow(ctx, want); err == nil {
			r.done = want
		}
		if ctx.Err() == nil {
			r.n.problem("haproxy routing", err)
		}
	}
}

// serves says whether the owner has committed just now, as this node sees it, or
// has asked just now to be left alone without a quorum: then it takes writes,
// whatever Patroni answers.
func (r *router) serves() bool {
	s := r.n.keeper.gate.Status()
	return s.State == gate.Open && (s.Quorum && s.Silent < s.Promise/2 || s.Agreed || s.KeptOff)
}

// follow tells HAProxy: the sessions to everybody but the owner end, and no new
// ones begin there; the owner is used once it takes writes.
func (r *router) follow(ctx context.Context, want route) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	var errs []error
	moved := want.owner != r.done.owner || want.epoch != r.done.epoch
	for _, m := range r.n.snapshot().Members {
		if m.Role != cluster.RoleData || m.Name == want.owner || !moved {
			continue
		}
		errs = append(errs,
			r.n.runtime.SetServerHealth(ctx, haproxy.BackendReadWrite, m.Name, false),
			r.n.runtime.ShutdownSessions(ctx, haproxy.BackendReadWrite, m.Name))
	}
	if want.open {
		errs = append(errs, r.n.runtime.SetServerHealth(ctx, haproxy.BackendReadWrite, want.owner, true))
	}
	err := errors.Join(errs...)
	if err == nil {
		r.n.log.Info("HAProxy leads to the owner", "owner", want.owner, "epoch", want.epoch, "open", want.open)
	}
	return err
}
