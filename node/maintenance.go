package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/patroni"
)

// MaintenanceRequest takes a node out of service for a while, or brings it back.
type MaintenanceRequest struct {
	Node   string `json:"node,omitempty"` // "" = the node that is asked
	Leave  bool   `json:"leave,omitempty"`
	Reason string `json:"reason,omitempty"`
	// Force enters on a primary that nobody can take over from: it stays the
	// primary.
	Force bool `json:"force,omitempty"`
}

const (
	// maintenanceReason is how long a reason may be, in bytes.
	maintenanceReason = 200
	// tagsAgain is how often a Patroni that has not shown its new tags is woken.
	tagsAgain = time.Second
)

// maintenanceObservation is what decideMaintenance looks at.
type maintenanceObservation struct {
	node    string
	leave   bool
	force   bool
	leader  string
	refusal error // why nobody can take over from the leader; nil = somebody can
	members []handOverMember
}

type maintenanceAction string

const (
	maintenanceNone     maintenanceAction = ""
	maintenanceHandOver maintenanceAction = "hand over, then mark"
	maintenanceMark     maintenanceAction = "mark"
	maintenanceKeep     maintenanceAction = "mark the primary as it is"
	maintenanceUnmark   maintenanceAction = "unmark"
)

// decideMaintenance says what is to be done so that a node is in maintenance, or
// is not any more.
func decideMaintenance(o maintenanceObservation) (maintenanceAction, error) {
	i := slices.IndexFunc(o.members, func(m handOverMember) bool { return m.Name == o.node })
	if i < 0 {
		return maintenanceNone, unknownNode(o.node, namesOf(o.members))
	}
	m := o.members[i]
	switch {
	case o.leave && m.Maintenance == nil:
		return maintenanceNone, nil
	case o.leave:
		return maintenanceUnmark, nil
	case m.Maintenance != nil && m.Name != o.leader:
		return maintenanceNone, nil
	}
	for _, other := range o.members {
		if other.Maintenance != nil && other.Name != o.node {
			return maintenanceNone, refused(cluster.CodeConflict, "%s is in maintenance already, and the cluster cannot do without two nodes: pgha maintenance leave %s first", other.Name, other.Name)
		}
	}
	switch {
	case m.Name != o.leader:
		return maintenanceMark, nil
	case o.refusal == nil:
		return maintenanceHandOver, nil
	case o.force:
		return maintenanceKeep, nil
	}
	return maintenanceNone, refused(cluster.CodeConflict, "%s is the primary, and %v; with --force it stays the primary, and to stop it stops the database", o.node, o.refusal)
}

// maintenance enters and leaves it.
func (n *Node) maintenance(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req MaintenanceRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	if len(req.Reason) > maintenanceReason || strings.ContainsFunc(req.Reason, func(r rune) bool { return r < ' ' }) {
		return nil, refused(cluster.CodeBadRequest, "the reason must be one line of at most %d bytes", maintenanceReason)
	}
	if req.Node == "" {
		req.Node = n.cfg.Name
	}
	mo := maintenanceObservation{node: req.Node, leave: req.Leave, force: req.Force}
	ho, _, err := n.observeHandOver(ctx)
	if err != nil {
		return nil, err
	}
	mo.members, mo.leader = ho.members, ho.leader
	if mo.leader != "" {
		_, mo.refusal = decideHandOver(ho, "")
	}
	what, err := decideMaintenance(mo)
	if err != nil {
		return nil, err
	}
	switch what {
	case maintenanceHandOver:
		if _, err := n.moveLeadership(ctx, o, "", true); err != nil {
			return nil, err
		}
		o.Leaves("the primary was handed over; %s is not in maintenance yet: repeat the command", req.Node)
	case maintenanceKeep:
		o.Say("nobody can take over: %s stays the primary", req.Node)
	case maintenanceNone:
		if req.Leave {
			o.Say("%s is not in maintenance", req.Node)
		} else {
			o.Say("%s is in maintenance already", req.Node)
		}
	}
	if what != maintenanceNone {
		if err := n.mark(ctx, o, req, what == maintenanceKeep); err != nil {
			return nil, err
		}
	}
	if req.Leave {
		return nil, n.waitBack(ctx, o, req.Node)
	}
	return nil, n.waitTagged(ctx, o, req.Node)
}

// mark writes into the roster that a node is in maintenance, or is not.
func (n *Node) mark(ctx context.Context, o *Operation, req MaintenanceRequest, primary bool) error {
	store := n.store.Load()
	if store == nil {
		return n.notReady()
	}
	err := store.UpdateMember(ctx, req.Node, func(m *cluster.Member) error {
		m.Maintenance = nil
		if !req.Leave {
			m.Maintenance = &cluster.Maintenance{Since: time.Now().UTC().Truncate(time.Second), By: o.Actor(), Reason: req.Reason, Primary: primary}
		}
		return nil
	})
	if err != nil {
		return err
	}
	n.wake()
	if req.Leave {
		o.Leaves("%s is out of maintenance; it takes its part again by itself", req.Node)
		n.event(EventOperation, req.Node, o.Actor(), "%s is out of maintenance", req.Node)
		return nil
	}
	o.Leaves("%s is in maintenance, and may not have taken notice yet", req.Node)
	n.event(EventOperation, req.Node, o.Actor(), "%s is in maintenance%s", req.Node, because(req.Reason))
	return nil
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

// maintenanceTags are Patroni's for a node. One that stays the primary keeps its
// part: tagged, nobody would be promoted after its restart. Commits do not wait for
// a node in maintenance, so that to stop it stalls nobody.
func maintenanceTags(m cluster.Member) patroni.Tags {
	away := m.Maintenance != nil && !m.Maintenance.Primary
	return patroni.Tags{NoFailover: away, NoSync: away}
}

// patroniSees says whether a node's Patroni shows the tags that it should, and
// whether it runs at all.
func patroniSees(v patroni.ClusterView, m cluster.Member) (shown, runs bool) {
	k, ok := v.Member(m.Name)
	want := maintenanceTags(m)
	return ok && (k.Tags["nofailover"] == true) == want.NoFailover && (k.Tags["nosync"] == true) == want.NoSync, ok
}

// waitTagged waits until a node's Patroni has taken notice of its maintenance, and
// no commit waits for it.
func (n *Node) waitTagged(ctx context.Context, o *Operation, name string) error {
	wake := n.waker()
	for told := false; ; {
		m, l, err := n.freshMember(ctx, name)
		shown, runs := patroniSees(l.View, m)
		switch {
		case err != nil: // etcd may elect a leader of its own just now
		case m.Maintenance == nil:
			return fmt.Errorf("%s has been taken out of maintenance meanwhile", name)
		case m.Role != cluster.RoleData:
			o.Say("%s is in maintenance", name)
			return nil
		case !runs:
			o.Say("%s is in maintenance; its Patroni does not run and takes notice when it starts", name)
			return nil
		case !shown:
			wake(ctx, name)
			if !told {
				told = true
				o.Say("waiting for the Patroni of %s to take notice", name)
			}
		case slices.Contains(l.View.Sync.Standbys, name) && !m.Maintenance.Primary:
			wake(ctx, l.View.Leader)
		case m.Maintenance.Primary:
			o.Say("%s is in maintenance and stays the primary: to stop it stops the database", name)
			return nil
		default:
			o.Say("%s is in maintenance: it is not promoted, and no commit waits for it", name)
			return nil
		}
		if !sleep(ctx, 2*handOverPoll) {
			return fmt.Errorf("wait until %s has taken notice: %w", name, context.Cause(ctx))
		}
	}
}

// waitBack waits until a node takes its part again.
func (n *Node) waitBack(ctx context.Context, o *Operation, name string) error {
	wake := n.waker()
	for told := false; ; {
		m, l, err := n.freshMember(ctx, name)
		shown, runs := patroniSees(l.View, m)
		inSync := !l.View.Synchronous() || slices.Contains(l.View.Sync.Standbys, name)
		switch {
		case err != nil:
		case m.Role != cluster.RoleData:
			o.Say("%s is out of maintenance", name)
			return nil
		case !runs:
			o.Say("%s is out of maintenance, but its Patroni does not run: start it (systemctl start pgha)", name)
			return nil
		case !shown:
			wake(ctx, name)
		case l.View.Leader == "" || l.View.Leader == name || inSync:
			o.Say("%s is out of maintenance and takes its part again", name)
			return nil
		default:
			wake(ctx, l.View.Leader)
			if !told {
				told = true
				o.Say("waiting until %s is in sync again", name)
			}
		}
		if !sleep(ctx, 2*handOverPoll) {
			return fmt.Errorf("wait until %s takes its part again: %w", name, context.Cause(ctx))
		}
	}
}

// waker returns a function that wakes a member's Patroni, now and then only.
func (n *Node) waker() func(ctx context.Context, name string) {
	last := map[string]time.Time{}
	return func(ctx context.Context, name string) {
		m, err := n.memberNamed(name)
		if err != nil || time.Since(last[name]) < tagsAgain {
			return
		}
		last[name] = time.Now()
		try, cancel := context.WithTimeout(ctx, wakeTimeout)
		defer cancel()
		_ = n.patroniOf(m).Wake(try) // it looks by itself in its next round
	}
}

// freshMember reads a member of the roster, and who leads.
func (n *Node) freshMember(ctx context.Context, name string) (cluster.Member, leadership, error) {
	store := n.store.Load()
	if store == nil {
		return cluster.Member{}, leadership{}, n.notReady()
	}
	members, _, err := store.Members(ctx)
	if err != nil {
		return cluster.Member{}, leadership{}, err
	}
	m, err := pickMember(members, name)
	if err != nil {
		return cluster.Member{}, leadership{}, err
	}
	l, err := n.readLeadership(ctx)
	return m, l, err
}

// maintenanceToDo says for each node in maintenance what to do about it.
func maintenanceToDo(members []cluster.Member, now time.Time) []string {
	var out []string
	for _, m := range members {
		if m.Maintenance != nil {
			out = append(out, fmt.Sprintf("%s is in maintenance since %s (%s%s): pgha maintenance leave %s",
				m.Name, age(now.Sub(m.Maintenance.Since)), m.Maintenance.By, because(m.Maintenance.Reason), m.Name))
		}
	}
	return out
}

// age writes how long something has lasted, roughly: 40s, 5m, 2h or 3 days.
func age(d time.Duration) string {
	switch {
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(max(d, 0).Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%d days", int(d.Hours()/24))
}
