package node

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/gate"
)

// failoversKept is how many records of past failovers stay in etcd.
const failoversKept = 50

// GateStatus is the cluster's gate as one node sees it.
type GateStatus struct {
	Owner string     `json:"owner"` // "" = nobody yet
	Epoch uint64     `json:"epoch"`
	State gate.State `json:"state"`
	// Open says that the owner's kernel passes clients, as its own node has read
	// it from the kernel just now, and Remaining for how long yet without another
	// commit, in nanoseconds. Unknown is true when the owner's pgha did not answer.
	Open      bool          `json:"open"`
	Unknown   bool          `json:"unknown,omitempty"`
	Remaining time.Duration `json:"remaining"`
	Promise   time.Duration `json:"promise"` // the owner's, in nanoseconds
	Beat      time.Duration `json:"beat"`    // what its last commit took
	Why       string        `json:"why,omitempty"`
	Dropped   uint64        `json:"dropped_packets"` // by the owner's kernel
	// Candidates are the nodes that watch the owner, and what each waits for.
	Candidates map[string]string `json:"candidates,omitempty"`
	// Failovers are the last ones, newest first.
	Failovers []gate.Failover `json:"failovers,omitempty"`
}

func (n *Node) failoverDir() string { return gatePrefix + n.state.ClusterID + "/failovers/" }

// keepFailover stores the record of a failover to this node.
func (n *Node) keepFailover(ctx context.Context, f gate.Failover) error {
	c, err := n.etcdClient()
	if err != nil {
		return err
	}
	value, err := json.Marshal(f)
	if err != nil {
		return fmt.Errorf("encode failover: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	key := func(epoch uint64) string { return fmt.Sprintf("%s%020d", n.failoverDir(), epoch) }
	ops := []clientv3.Op{clientv3.OpPut(key(f.Epoch), string(value))}
	if f.Epoch > failoversKept {
		ops = append(ops, clientv3.OpDelete(key(0), clientv3.WithRange(key(f.Epoch-failoversKept))))
	}
	if _, err := c.Txn(ctx).Then(ops...).Commit(); err != nil {
		return fmt.Errorf("keep the record of a failover: %w", err)
	}
	return nil
}

// failovers returns the last few, newest first. It needs no quorum.
func (n *Node) failovers(ctx context.Context, limit int64) []gate.Failover {
	c, err := n.etcdClient()
	if err != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	r, err := c.Get(ctx, n.failoverDir(), clientv3.WithPrefix(), clientv3.WithSerializable(),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(limit))
	if err != nil {
		return nil
	}
	var out []gate.Failover
	for _, kv := range r.Kvs {
		var f gate.Failover
		if json.Unmarshal(kv.Value, &f) == nil {
			out = append(out, f)
		}
	}
	return out
}

// gateStatus puts together what the nodes say of their gates. The highest epoch
// is the newest knowledge.
func gateStatus(reports map[string]Report) *GateStatus {
	var s *GateStatus
	for _, r := range reports {
		if g := r.Gate; g != nil && g.Owner != "" && (s == nil || g.Epoch > s.Epoch) {
			s = &GateStatus{Owner: g.Owner, Epoch: g.Epoch, State: g.State, Promise: g.Promise}
		}
	}
	if s == nil {
		return nil
	}
	s.Unknown = true
	for name, r := range reports {
		switch g := r.Gate; {
		case g == nil:
		case name == s.Owner:
			s.Unknown, s.Open, s.Remaining, s.Beat, s.Dropped = false, g.Open && g.OpenAs == string(gate.AsOwner), g.Remaining, g.Beat, g.Dropped
			s.State, s.Promise, s.Why = g.State, g.Promise, g.Why
		default:
			if s.Candidates == nil {
				s.Candidates = map[string]string{}
			}
			s.Candidates[name] = g.Waits
		}
	}
	return s
}

// GateText says in words what the gate does.
func (s GateStatus) GateText() string {
	short := func(d time.Duration) string { return d.Round(10 * time.Millisecond).String() }
	var b strings.Builder
	switch {
	case s.Unknown:
		fmt.Fprintf(&b, "owned by %s, whose pgha does not answer", s.Owner)
	case s.Open:
		fmt.Fprintf(&b, "open on %s for %s without another commit; the last took %s", s.Owner, short(s.Remaining), s.Beat.Round(time.Millisecond))
	default:
		fmt.Fprintf(&b, "shut on its owner %s: %s", s.Owner, s.Why)
	}
	return b.String()
}

// FailoverText says in one line what a failover was and where its time went.
func FailoverText(f gate.Failover) string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%d", d.Milliseconds()) }
	return fmt.Sprintf("%s  %s -> %s in %s ms (detect %s, fence %s, admit %s, promote %s, route %s)", f.At.UTC().Format(time.DateTime), f.From, f.To,
		ms(f.Total()), ms(f.Detect), ms(f.Fence), ms(f.Admit), ms(f.Promote), ms(f.Route))
}
