package node

import (
	"context"
	"errors"
	"fmt"
	"time"

	"pgha/systemd"
)

// stopHandOver bounds the hand-over before a stop, so that a host that shuts down
// is not held up for long.
const stopHandOver = 30 * time.Second

// decideStop says whether the node hands its leadership over before it stops, and
// to whom. why is set where it is the primary and cannot.
func decideStop(self string, o handOverObservation) (to, why string) {
	if o.leader != self {
		return "", ""
	}
	to, err := decideHandOver(o, "")
	if err != nil {
		return "", err.Error()
	}
	return to, ""
}

// whyStopping asks systemd why the daemon was told to end.
func (n *Node) whyStopping() systemd.StopReason {
	if n.opts.Foreground {
		return systemd.StopUnit
	}
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	return systemd.WhyStopping(ctx)
}

// beforeStop hands the leadership over while everything still runs, if the node
// is going to stop with its PostgreSQL. It is best effort: what it could not do
// is told, and the node stops all the same.
func (n *Node) beforeStop(ctx context.Context, why systemd.StopReason) {
	if n.keeper == nil || why == systemd.RestartUnit || n.leaving.Load() || !n.keeper.gate.Status().Self {
		return
	}
	ctx, cancel := context.WithTimeoutCause(ctx, stopHandOver, fmt.Errorf("not within %s", stopHandOver))
	defer cancel()
	o, _, err := n.observeHandOver(ctx)
	if err == nil {
		var to, cannot string
		to, cannot = decideStop(n.cfg.Name, o)
		switch {
		case cannot != "":
			err = errors.New(cannot)
		case to == "":
			return
		default:
			n.event(EventRole, n.cfg.Name, actorPgha, "the node is to stop (%s): handing the primary over to %s first", why, to)
			if _, err = n.moveLeadership(ctx, n.logSteps("hand-over before the stop"), to, false); err == nil {
				return
			}
		}
	}
	n.event(EventFault, n.cfg.Name, actorPgha, "the node stops (%s) as the primary without having handed over: %v", why, err)
}
