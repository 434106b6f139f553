package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

const (
	// scheduleEvery is how often it is looked whether a planned switchover is due.
	scheduleEvery = time.Second
	// scheduleLate is how late a planned switchover may still be carried out, as
	// after a failover at that very time. Later nobody expects it any more.
	scheduleLate = 5 * time.Minute

	keySchedule = "switchover" // below the cluster's own prefix
)

// SwitchoverRequest asks for a switchover, now or later.
type SwitchoverRequest struct {
	Target string    `json:"target,omitempty"` // "" = the best replica
	At     time.Time `json:"at,omitzero"`      // zero = now
	Cancel bool      `json:"cancel,omitempty"` // the planned one
}

// PlannedSwitchover is one that is to be carried out later, by whoever is the
// primary then.
type PlannedSwitchover struct {
	At     time.Time `json:"at"`
	Target string    `json:"target,omitempty"` // "" = the best replica
	By     string    `json:"by"`               // as root@n1

	rev int64 // in etcd
}

func (p PlannedSwitchover) String() string {
	to := "the best replica"
	if p.Target != "" {
		to = p.Target
	}
	return fmt.Sprintf("switchover to %s at %s by %s", to, p.At.UTC().Format(time.RFC3339), p.By)
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
		return unknownNode(o.target, o.members)
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

// FailoverRequest asks for a promotion where there is no primary.
type FailoverRequest struct {
	Target        string `json:"target,omitempty"` // "" = the one that lacks least
	AllowDataLoss bool   `json:"allow_data_loss,omitempty"`
}

// Candidate is a node that could be promoted, and what that would cost.
type Candidate struct {
	Name     string `json:"name"`
	State    string `json:"state"`
	Timeline int    `json:"timeline"`
	LSN      uint64 `json:"lsn"`
	// LagBytes is what it lacks of the furthest position that is known; -1 unknown.
	LagBytes int64 `json:"lag_bytes"`
	Sync     bool  `json:"sync"`
	// Unfit says why it cannot be promoted at all, and Loss what acknowledged
	// commits would be lost; "" = it can be, and none.
	Unfit string `json:"unfit,omitempty"`
	Loss  string `json:"loss,omitempty"`
}

func (c Candidate) String() string {
	role := "async"
	if c.Sync {
		role = "sync"
	}
	loses := "loses nothing that was acknowledged"
	switch {
	case c.Unfit != "":
		loses = "cannot be promoted: " + c.Unfit
	case c.Loss != "":
		loses = c.Loss
	}
	return fmt.Sprintf("%s: timeline %d, lag %s, %s; %s", c.Name, c.Timeline, lagText(c.LagBytes), role, loses)
}

// failoverObservation is what decideFailover looks at.
type failoverObservation struct {
	serving string // a primary that serves; "" = there is none
	paused  bool
	async   bool
	last    string   // the node that had every acknowledged commit last
	syncOf  string   // whose sync key it is
	standby []string // who is in it, each with every acknowledged commit; nil when that is not sure
	optime  uint64   // the last primary's position as it reported it last
	members []MemberStatus
}

// candidates judges each data node, the best first.
func (o failoverObservation) candidates() []Candidate {
	head := o.optime
	for _, m := range o.members {
		head = max(head, m.LSN)
	}
	last := cmp.Or(o.last, "the last primary")
	var out []Candidate
	for _, m := range o.members {
		if m.Role != cluster.RoleData {
			continue
		}
		c := Candidate{Name: m.Name, State: m.State, Timeline: m.Timeline, LSN: m.LSN, LagBytes: -1, Sync: slices.Contains(o.standby, m.Name)}
		if m.LSN > 0 && m.Reachable {
			c.LagBytes = int64(head - m.LSN)
		}
		switch {
		case !m.Reachable:
			c.Unfit = "its pgha does not answer"
		case m.Postgres != pgReplica:
			c.Unfit = "it is not a running replica" + paren(m.State)
		case m.Maintenance != nil:
			c.Unfit = "it is in maintenance (pgha maintenance leave " + m.Name + ")"
		case m.NoFailover:
			c.Unfit = "it is tagged nofailover"
		case m.Name == o.last:
		case c.Sync && o.syncOf == o.last && !o.async:
		case o.async:
			c.Loss = fmt.Sprintf("may lose what %s acknowledged and had not sent: %s of what is known, and all since its last report", last, lagText(c.LagBytes))
		default:
			c.Loss = fmt.Sprintf("may lose what %s acknowledged alone: %s of what is known, and all since its last report", last, lagText(c.LagBytes))
		}
		out = append(out, c)
	}
	rank := func(c Candidate) int {
		switch {
		case c.Unfit != "":
			return 2
		case c.Loss != "":
			return 1
		}
		return 0
	}
	slices.SortStableFunc(out, func(a, b Candidate) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(b.Timeline, a.Timeline), cmp.Compare(b.LSN, a.LSN))
	})
	return out
}

// decideFailover names the node to promote where there is no primary.
func decideFailover(o failoverObservation, req FailoverRequest) (Candidate, error) {
	all := o.candidates()
	i := 0
	if req.Target != "" {
		i = slices.IndexFunc(all, func(c Candidate) bool { return c.Name == req.Target })
	}
	switch {
	case i < 0 && slices.ContainsFunc(o.members, func(m MemberStatus) bool { return m.Name == req.Target }):
		return Candidate{}, refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL: name a data node", req.Target)
	case i < 0:
		var members []handOverMember
		for _, m := range o.members {
			members = append(members, handOverMember{MemberStatus: m})
		}
		return Candidate{}, unknownNode(req.Target, members)
	case o.serving != "":
		return Candidate{}, refused(cluster.CodeConflict, "%s is the primary and serves: to move the primary use pgha switchover", o.serving)
	case o.paused:
		return Candidate{}, refused(cluster.CodeConflict, "automatic failover is paused, and nobody is promoted meanwhile: pgha resume; a replica that has everything then takes over by itself")
	case len(all) == 0:
		return Candidate{}, refused(cluster.CodeConflict, "there is no data node")
	}
	c := all[i]
	switch {
	case c.Unfit != "" && req.Target != "":
		return c, refused(cluster.CodeConflict, "%s cannot be promoted: %s", c.Name, c.Unfit)
	case c.Unfit != "":
		var why []string
		for _, c := range all {
			why = append(why, c.Name+": "+c.Unfit)
		}
		return c, refused(cluster.CodeConflict, "nobody can be promoted: %s", strings.Join(why, "; "))
	case c.Loss != "" && !req.AllowDataLoss:
		return c, refused(cluster.CodeConflict, "promoting %s %s: bring %s back if you can; if not, repeat with --allow-data-loss", c.Name, c.Loss, cmp.Or(o.last, "the last primary"))
	}
	return c, nil
}

// failover promotes a replica where there is no primary and none comes by itself.
func (n *Node) failover(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req FailoverRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	l, serving, err := n.waitSilent(ctx, o)
	if err != nil {
		return nil, err
	}
	fo := failoverObservation{
		serving: serving, paused: l.View.Paused, async: !l.View.Synchronous(),
		last: l.Record.Last, syncOf: l.View.Sync.Leader, optime: l.View.Status.Optime,
	}
	if fo.last == "" {
		fo.last = l.Record.Owner
	}
	if l.View.Sync.Quorum == 0 {
		fo.standby = l.View.Sync.Standbys
	}
	fo.members = n.status(ctx).Members
	if serving == "" {
		for _, c := range fo.candidates() {
			o.Say("%s", c)
		}
	}
	c, err := decideFailover(fo, req)
	if err != nil {
		return nil, err
	}
	if err := n.appoint(ctx, l, c.Name); err != nil {
		return nil, err
	}
	o.Say("%s is appointed", c.Name)
	o.Leaves("%s was appointed and is promoted by itself if it can be: pgha status", c.Name)
	h := &handing{n: n, tell: o, r: HandOverResult{From: l.Record.Owner, To: c.Name}}
	for {
		now, err := n.readLeadership(ctx)
		if err == nil && now.serving() == c.Name {
			h.r.Epoch = now.Record.Epoch
			break
		}
		if !sleep(ctx, handOverPoll) {
			return nil, fmt.Errorf("promote %s: %w: pgha logs patroni on %s says why", c.Name, context.Cause(ctx), c.Name)
		}
	}
	if err := h.waitWritable(ctx); err != nil {
		return nil, err
	}
	n.event(EventRole, c.Name, o.Actor(), "%s was promoted by hand; %s", c.Name, c)
	return h.r, nil
}

// waitSilent waits until the last owner's gate is surely shut, or somebody
// serves.
func (n *Node) waitSilent(ctx context.Context, tell steps) (l leadership, serving string, err error) {
	if l, err = n.readLeadership(ctx); err != nil {
		return l, "", err
	}
	if l.Record.Owner == "" {
		return l, "", refused(cluster.CodeConflict, "this cluster has never had a primary: see pgha status")
	}
	began := time.Now()
	for told := false; l.Record.State != gate.Shut; told = true {
		if n.serves(ctx, l.Record.Owner) {
			return l, l.Record.Owner, nil
		}
		need := l.Record.Promise() + gate.Margin(l.Record.Promise())
		if time.Since(began) >= need {
			return l, "", nil
		}
		if !told {
			tell.Say("waiting until the gate of %s is surely shut (%s)", l.Record.Owner, need.Round(100*time.Millisecond))
		}
		if !sleep(ctx, 2*handOverPoll) {
			return l, "", context.Cause(ctx)
		}
		now, err := n.readLeadership(ctx)
		if err != nil {
			return l, "", err
		}
		if now.Rev != l.Rev {
			l, began = now, time.Now()
			if owner := l.serving(); owner != "" {
				return l, owner, nil // it renews its promise, whether or not it answers this node
			}
		}
	}
	return l, "", nil
}

// serves says whether a node passes clients to a PostgreSQL that takes writes, by
// its own word.
func (n *Node) serves(ctx context.Context, name string) bool {
	m, err := n.memberNamed(name)
	if err != nil {
		return false
	}
	r, err := n.reportOf(ctx, m)
	return err == nil && r.takesWrites()
}

// takesWrites says whether the node's kernel passes clients to a PostgreSQL that
// takes writes.
func (r Report) takesWrites() bool {
	return r.Gate != nil && r.Gate.Open && r.Gate.OpenAs == string(gate.AsOwner) && r.Postgres.Role == pgPrimary
}

// appoint overwrites Patroni's leader key with a member's name, on its own
// session, if nothing has changed since l was read. The member's Patroni promotes
// it after the gate's admission. The key is never deleted: docs/adr/0010-gate.md.
func (n *Node) appoint(ctx context.Context, l leadership, name string) error {
	c, err := n.etcdClient()
	if err != nil {
		return err
	}
	m, ok := l.View.Member(name)
	if !ok || m.LeaseID == 0 {
		return refused(cluster.CodeConflict, "the Patroni of %s has no session in etcd: pgha logs patroni on %s", name, name)
	}
	prefix := patroni.Prefix(n.cfg.Cluster)
	leader := prefix + patroni.KeyLeader
	same := clientv3.Compare(clientv3.CreateRevision(leader), "=", 0)
	if l.View.Leader != "" {
		same = clientv3.Compare(clientv3.Value(leader), "=", l.View.Leader)
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := c.Txn(ctx).If(same,
		clientv3.Compare(clientv3.ModRevision(gateStore{n}.key()), "=", l.Rev),
		clientv3.Compare(clientv3.ModRevision(prefix+patroni.KeyConfig), "=", l.View.ModRevisions[patroni.KeyConfig]),
		clientv3.Compare(clientv3.LeaseValue(prefix+patroni.KeyMembers+name), "=", m.LeaseID),
	).Then(
		clientv3.OpPut(leader, name, clientv3.WithLease(clientv3.LeaseID(m.LeaseID))),
		clientv3.OpDelete(prefix+patroni.KeyFailover),
	).Commit()
	switch {
	case err != nil:
		return fmt.Errorf("appoint %s: %w", name, err)
	case !r.Succeeded:
		return refused(cluster.CodeConflict, "the leadership has changed just now: see pgha status, and repeat if there is still no primary")
	}
	return nil
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
