package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"pgha/cluster"
)

// KeepOffRequest asks a member not to become the gate's owner for a while. The
// owner asks all others when it has lost its quorum
// (docs/adr/0012-quorum-lost.md).
type KeepOffRequest struct {
	Epoch uint64        `json:"epoch"`
	For   time.Duration `json:"for"` // nanoseconds
	// Roster is what the owner takes the cluster to be: a member that knows of
	// others refuses, for one of those might take over.
	Roster []string `json:"roster"`
}

// gatePeers implements gate.Peers over the members' API.
type gatePeers struct{ n *Node }

// KeepOff implements gate.Peers.
func (p gatePeers) KeepOff(ctx context.Context, epoch uint64, d time.Duration) error {
	members := p.n.snapshot().Members
	req := KeepOffRequest{Epoch: epoch, For: d, Roster: rosterNames(members)}
	all, ctx := errgroup.WithContext(ctx)
	others := 0
	for _, m := range members {
		if m.Name == p.n.cfg.Name {
			continue
		}
		others++
		all.Go(func() error {
			if err := p.n.seen.call(ctx, http.MethodPost, m.APIAddr(), "/v1/gate/keep-off", req, nil); err != nil {
				return fmt.Errorf("%s: %w", m.Name, err)
			}
			return nil
		})
	}
	if others == 0 {
		return errors.New("there is nobody to ask")
	}
	return all.Wait()
}

func rosterNames(members []cluster.Member) []string {
	var names []string
	for _, m := range members {
		names = append(names, m.Name)
	}
	slices.Sort(names)
	return names
}

// keepOff answers a member that asks. The certificate says who asks.
func (n *Node) keepOff(w http.ResponseWriter, r *http.Request) {
	var req KeepOffRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	err := func() error {
		owner, err := n.caller(r)
		if err != nil {
			return err
		}
		if own := rosterNames(n.snapshot().Members); !slices.Equal(own, req.Roster) {
			return fmt.Errorf("this node knows the members %s", strings.Join(own, ", "))
		}
		if n.keeper == nil {
			return nil // a witness owns nothing
		}
		return n.keeper.gate.Swear(owner.Node, req.Epoch, req.For)
	}()
	if err != nil {
		err = &cluster.Error{Code: cluster.CodeConflict, Message: err.Error()}
	}
	reply(w, struct{}{}, err)
}
