package node

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
)

// SwitchoverRequest asks for a switchover, now or later.
type SwitchoverRequest struct {
	Target string    `json:"target,omitempty"` // "" = the best replica
	At     time.Time `json:"at,omitzero"`      // zero = now
	Cancel bool      `json:"cancel,omitempty"` // the planned one
}

// switchover hands the leadership over, plans that, or cancels the plan.
func (n *Node) switchover(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req SwitchoverRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	switch {
	case req.Cancel:
		return n.cancelSwitchover(ctx, o)
	case !req.At.IsZero():
		return n.planSwitchover(ctx, o, req)
	}
	return n.moveLeadership(ctx, o, req.Target, true)
}

// PauseRequest switches automatic failover off or on.
type PauseRequest struct {
	Pause bool `json:"pause"`
}

// pause switches automatic failover off, and resume on again; it waits until
// every Patroni has taken notice.
func (n *Node) pause(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req PauseRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	word, value := "resumed", any(nil)
	if req.Pause {
		word, value = "paused", true
	}
	l, err := n.readLeadership(ctx)
	if err != nil {
		return nil, err
	}
	if l.View.Paused == req.Pause {
		o.Say("automatic failover is %s already", word)
	} else {
		self, err := n.memberNamed(n.cfg.Name)
		if err != nil {
			return nil, err
		}
		o.Say("telling Patroni")
		o.Leaves("whether automatic failover is %s is not known: see pgha status", word)
		if err := n.patroniOf(self).PatchConfig(ctx, map[string]any{"pause": value}); err != nil {
			return nil, err
		}
		o.Leaves("automatic failover is %s, but not every node has taken notice yet", word)
	}
	waits := ""
	for {
		l, err := n.readLeadership(ctx)
		if err == nil {
			var deaf []string
			for _, m := range l.View.Members {
				if m.Paused != req.Pause {
					deaf = append(deaf, m.Name)
				}
			}
			if len(deaf) == 0 && l.View.Paused == req.Pause {
				for _, name := range n.dataNodes() {
					if _, ok := l.View.Member(name); !ok {
						o.Say("the Patroni of %s does not run; it takes notice when it starts", name)
					}
				}
				o.Say("automatic failover is %s", word)
				n.wake()
				return map[string]bool{"paused": req.Pause}, nil
			}
			if text := strings.Join(deaf, ", "); text != waits && text != "" {
				waits = text
				o.Say("waiting for %s to take notice", waits)
			}
		}
		if !sleep(ctx, 2*handOverPoll) {
			return nil, fmt.Errorf("wait for %s to take notice: %w", waits, context.Cause(ctx))
		}
	}
}
