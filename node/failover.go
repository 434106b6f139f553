package node

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

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

// String says all of it in one line.
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
		var known []string
		for _, m := range o.members {
			known = append(known, m.Name)
		}
		return Candidate{}, unknownNode(req.Target, known)
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

// observeFailover looks at whoever could be promoted.
func (n *Node) observeFailover(ctx context.Context, l leadership, serving string) failoverObservation {
	o := failoverObservation{
		serving: serving, paused: l.View.Paused, async: !l.View.Synchronous(),
		last: cmp.Or(l.Record.Last, l.Record.Owner), syncOf: l.View.Sync.Leader, optime: l.View.Status.Optime,
	}
	if l.View.Sync.Quorum == 0 {
		o.standby = l.View.Sync.Standbys
	}
	o.members = n.status(ctx).Members
	return o
}

// FailoverPlan is what a failover would do as things are now.
type FailoverPlan struct {
	Promotes   Candidate   `json:"promotes"`
	Candidates []Candidate `json:"candidates"` // the best first
}

// planFailover looks at everything and changes nothing. It does not wait until a
// primary that has gone silent is surely shut: the failover does, and decides anew.
func (n *Node) planFailover(ctx context.Context, req FailoverRequest) (FailoverPlan, error) {
	if err := n.notOnWitness("cannot judge the data nodes"); err != nil {
		return FailoverPlan{}, err
	}
	l, err := n.readLeadership(ctx)
	if err != nil {
		return FailoverPlan{}, err
	}
	if l.Record.Owner == "" {
		return FailoverPlan{}, noPrimaryEver()
	}
	serving := ""
	if l.Record.State != gate.Shut && n.serves(ctx, l.Record.Owner) {
		serving = l.Record.Owner
	}
	o := n.observeFailover(ctx, l, serving)
	c, err := decideFailover(o, req)
	return FailoverPlan{Promotes: c, Candidates: o.candidates()}, err
}

func noPrimaryEver() error {
	return refused(cluster.CodeConflict, "this cluster has never had a primary: see pgha status")
}

func (n *Node) failoverPlanHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	var req FailoverRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	p, err := n.planFailover(ctx, req)
	reply(w, p, err)
}

// PlanFailover asks the daemon what a failover would do; what it would refuse is
// an error.
func (l *Local) PlanFailover(ctx context.Context, req FailoverRequest) (FailoverPlan, error) {
	var p FailoverPlan
	return p, l.call(ctx, http.MethodPost, "/v1/failover", req, &p)
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
	fo := n.observeFailover(ctx, l, serving)
	if serving == "" {
		for _, c := range fo.candidates() {
			o.Say("%s", c)
		}
	}
	c, err := decideFailover(fo, req)
	if err != nil {
		return nil, err
	}
	if err := n.appoint(ctx, l, c.Name, req.AllowDataLoss); err != nil {
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
		return l, "", noPrimaryEver()
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
		moved := now.Rev != l.Rev
		l = now // who is in sync may have changed although the record has not
		if moved {
			began = time.Now()
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
//
// Unless loss was allowed, it must also still be in sync as it was then.
func (n *Node) appoint(ctx context.Context, l leadership, name string, allowLoss bool) error {
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
	as := []clientv3.Cmp{
		same,
		clientv3.Compare(clientv3.ModRevision(gateStore{n}.key()), "=", l.Rev),
		clientv3.Compare(clientv3.ModRevision(prefix+patroni.KeyConfig), "=", l.View.ModRevisions[patroni.KeyConfig]),
		clientv3.Compare(clientv3.LeaseValue(prefix+patroni.KeyMembers+name), "=", m.LeaseID),
	}
	if !allowLoss {
		as = append(as, clientv3.Compare(clientv3.ModRevision(prefix+patroni.KeySync), "=", l.View.ModRevisions[patroni.KeySync]))
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := c.Txn(ctx).If(as...).Then(
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
