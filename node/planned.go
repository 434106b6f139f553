package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
)

const (
	// scheduleEvery is how often it is looked whether a planned switchover is due.
	scheduleEvery = time.Second
	// scheduleLate is how late a planned switchover may still be carried out, as
	// after a failover at that very time. Later nobody expects it any more.
	scheduleLate = 5 * time.Minute

	keySchedule = "switchover" // below the cluster's own prefix
)

// PlannedSwitchover is one that is to be carried out later, by whoever is the
// primary then.
type PlannedSwitchover struct {
	At     time.Time `json:"at"`
	Target string    `json:"target,omitempty"` // "" = the best replica
	By     string    `json:"by"`               // as root@n1

	rev int64 // in etcd
}

// String says what is planned, by whom, for when.
func (p PlannedSwitchover) String() string {
	to := "the best replica"
	if p.Target != "" {
		to = p.Target
	}
	return fmt.Sprintf("switchover to %s at %s by %s", to, p.At.UTC().Format(time.RFC3339), p.By)
}

// planObservation is what decidePlan looks at.
type planObservation struct {
	now, at time.Time
	target  string
	planned *PlannedSwitchover
	leader  string
	members []handOverMember
}

// decidePlan says why a switchover cannot be planned, or nil. What may change
// until then is looked at when the time has come.
func decidePlan(o planObservation) error {
	i := slices.IndexFunc(o.members, func(m handOverMember) bool { return m.Name == o.target })
	switch {
	case o.planned != nil:
		return refused(cluster.CodeConflict, "there is a %s already: pgha switchover --cancel first", o.planned)
	case !o.at.After(o.now):
		return refused(cluster.CodeBadRequest, "%s is not in the future: it is %s now", o.at.UTC().Format(time.RFC3339), o.now.UTC().Format(time.RFC3339))
	case o.target == "":
		return nil
	case i < 0:
		return unknownNode(o.target, namesOf(o.members))
	case o.members[i].Role == cluster.RoleWitness:
		return refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL: name a data node", o.target)
	case o.members[i].Maintenance != nil:
		return refused(cluster.CodeConflict, "%s is in maintenance (pgha maintenance leave %s)", o.target, o.target)
	case o.target == o.leader:
		return refused(cluster.CodeConflict, "%s is the primary already", o.target)
	}
	return nil
}

func (n *Node) planSwitchover(ctx context.Context, o *Operation, req SwitchoverRequest) (any, error) {
	planned, err := n.plannedSwitchover(ctx)
	if err != nil {
		return nil, err
	}
	s := n.status(ctx)
	po := planObservation{now: time.Now(), at: req.At, target: req.Target, planned: planned, leader: s.Leader}
	for _, m := range s.Members {
		po.members = append(po.members, handOverMember{MemberStatus: m})
	}
	if err := decidePlan(po); err != nil {
		return nil, err
	}
	p := PlannedSwitchover{At: req.At.UTC().Truncate(time.Second), Target: req.Target, By: o.Actor()}
	value, err := json.Marshal(p)
	if err != nil {
		return nil, fmt.Errorf("encode planned switchover: %w", err)
	}
	c, err := n.etcdClient()
	if err != nil {
		return nil, err
	}
	if _, err := c.Put(ctx, n.scheduleKey(), string(value)); err != nil {
		return nil, fmt.Errorf("store planned switchover: %w", err)
	}
	n.wake()
	o.Say("planned: %s; whoever is the primary then carries it out", p)
	return p, nil
}

func (n *Node) cancelSwitchover(ctx context.Context, o *Operation) (any, error) {
	p, err := n.plannedSwitchover(ctx)
	if err != nil {
		return nil, err
	}
	if p == nil {
		return nil, refused(cluster.CodeConflict, "no switchover is planned")
	}
	if ok, err := n.takePlan(ctx, *p); err != nil || !ok {
		return nil, errors.Join(err, refused(cluster.CodeConflict, "the %s has just been carried out", p))
	}
	o.Say("cancelled: %s", p)
	return p, nil
}

func (n *Node) scheduleKey() string { return n.store.Load().Prefix() + keySchedule }

// plannedSwitchover reads the plan, nil for none.
func (n *Node) plannedSwitchover(ctx context.Context) (*PlannedSwitchover, error) {
	if n.store.Load() == nil {
		return nil, n.notReady()
	}
	c, err := n.etcdClient()
	if err != nil {
		return nil, err
	}
	r, err := c.Get(ctx, n.scheduleKey())
	if err != nil {
		return nil, fmt.Errorf("read planned switchover: %w", err)
	}
	if len(r.Kvs) == 0 {
		return nil, nil
	}
	p := PlannedSwitchover{rev: r.Kvs[0].ModRevision}
	if err := json.Unmarshal(r.Kvs[0].Value, &p); err != nil {
		return nil, fmt.Errorf("decode planned switchover: %w", err)
	}
	return &p, nil
}

// takePlan deletes a plan, and says whether it was there: whoever has deleted it
// carries it out.
func (n *Node) takePlan(ctx context.Context, p PlannedSwitchover) (bool, error) {
	c, err := n.etcdClient()
	if err != nil {
		return false, err
	}
	r, err := c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(n.scheduleKey()), "=", p.rev)).
		Then(clientv3.OpDelete(n.scheduleKey())).Commit()
	if err != nil {
		return false, fmt.Errorf("take planned switchover: %w", err)
	}
	n.wake()
	return r.Succeeded, nil
}

type planAction string

const (
	planWait planAction = ""
	planDo   planAction = "carry it out"
	planDrop planAction = "drop it"
)

// decideDue says what this node does about a planned switchover.
func decideDue(p PlannedSwitchover, self, primary string, now time.Time) (planAction, string) {
	switch {
	case primary != self:
		return planWait, "another node is the primary"
	case now.Before(p.At):
		return planWait, "it is not due"
	case now.After(p.At.Add(scheduleLate)):
		return planDrop, fmt.Sprintf("nobody could carry it out within %s", scheduleLate)
	case p.Target == self:
		return planDrop, self + " is the primary already"
	}
	return planDo, "it is due"
}

// carryOut carries planned switchovers out, on the node that is the primary when
// the time has come.
func (n *Node) carryOut(ctx context.Context) error {
	told := ""
	for sleep(ctx, scheduleEvery) {
		p := n.snapshot().Planned
		if p == nil {
			continue
		}
		primary := ""
		if s := n.keeper.gate.Status(); s.Self && s.State == gate.Open {
			primary = n.cfg.Name
		}
		switch what, why := decideDue(*p, n.cfg.Name, primary, time.Now()); what {
		case planDrop:
			if ok, err := n.takePlan(ctx, *p); err == nil && ok {
				n.event(EventOperation, p.Target, actorPgha, "the %s is dropped: %s", p, why)
			}
		case planDo:
			spec := operationSpec{lock: true, data: true, run: func(n *Node, ctx context.Context, o *Operation, _ json.RawMessage) (any, error) {
				if ok, err := n.takePlan(ctx, *p); err != nil || !ok {
					return nil, errors.Join(err, errors.New("somebody else has taken it"))
				}
				told = ""
				n.event(EventOperation, p.Target, p.By, "carrying out the planned %s", p)
				r, err := n.moveLeadership(ctx, o, p.Target, true)
				if err != nil {
					n.event(EventOperation, p.Target, p.By, "the planned %s has failed: %v", p, err)
				}
				return r, err
			}}
			req := OperationRequest{ID: "planned", Actor: "planned", Timeout: scheduleLate}
			end := n.runOperation(ctx, "switchover", spec, req, func(OperationLine) {})
			if end.Error != nil && end.Error.Message != told {
				told = end.Error.Message // it is tried again until it is too late
				n.log.Warn("planned switchover not carried out", "plan", p.String(), "err", told)
			}
		}
	}
	return nil
}
