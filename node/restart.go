package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/patroni"
	"pgha/supervisor"
)

const (
	taskReload  = "reload"
	taskRestart = "restart"

	// restartTimeout bounds a restart of PostgreSQL, the recovery of what it had
	// not yet written included.
	restartTimeout = 30 * time.Minute
	// successorTimeout is for how long it is waited that a replica that was
	// restarted can take over again.
	successorTimeout = time.Minute
)

// RestartRequest asks for restarts of PostgreSQL.
type RestartRequest struct {
	Node string `json:"node,omitempty"` // "" = all data nodes
	// Rolling restarts replicas first, and hands over before the primary's turn.
	Rolling bool `json:"rolling,omitempty"`
	// Pending leaves out whoever has nothing that waits for a restart.
	Pending bool `json:"pending,omitempty"`
}

// RestartResult says what was restarted.
type RestartResult struct {
	Restarted []string `json:"restarted"`
	// HandedOver is the new primary, if there is one.
	HandedOver string `json:"handed_over_to,omitempty"`
	// Renewed are the programs beside PostgreSQL that were started anew, by node.
	Renewed map[string][]string `json:"renewed,omitempty"`
	// StillPending are nodes with settings that no rolling restart can bring in.
	StillPending []string `json:"still_pending,omitempty"`
}

// restartObservation is what decideRestart looks at.
type restartObservation struct {
	handOverObservation
	// pending says by name why a PostgreSQL waits for a restart.
	pending map[string]string
	// programs are those beside PostgreSQL that wait for one, by node.
	programs map[string][]string
}

// restartPlan is whom to restart, in order.
type restartPlan struct {
	replicas []string // each in place
	primary  string   // "" = it stays
	handOver bool     // before the primary's turn
	renew    []string // nodes with other programs to start anew
}

// decideRestart makes the plan. An empty plan says that there is nothing to do.
func decideRestart(o restartObservation, req RestartRequest) (restartPlan, error) {
	var p restartPlan
	var data []string
	for _, m := range o.members {
		if m.Role == cluster.RoleData {
			data = append(data, m.Name)
		}
	}
	named, known := o.member(req.Node)
	switch {
	case req.Node == "" && !req.Rolling:
		return p, refused(cluster.CodeBadRequest, "which node? Name one of %s, or restart all, one after the other, with --rolling", strings.Join(data, ", "))
	case req.Node != "" && !known:
		return p, unknownNode(req.Node, namesOf(o.members))
	case req.Node != "" && named.Role == cluster.RoleWitness:
		return p, refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL: the data nodes are %s", req.Node, strings.Join(data, ", "))
	case o.leader == "":
		return p, refused(cluster.CodeConflict, "there is no primary now, and no restart can mend that: see pgha status")
	case o.underWay != "":
		return p, refused(cluster.CodeConflict, "Patroni has been asked for %s already: wait until it is over", o.underWay)
	case req.Rolling && o.paused:
		return p, refused(cluster.CodeConflict, "automatic failover is paused, and nobody can take over meanwhile: pgha resume first, or restart the nodes one by one by their names")
	}
	if req.Node != "" {
		data = []string{req.Node}
	}
	for _, name := range data {
		m, _ := o.member(name)
		if req.Pending && len(o.programs[name]) > 0 {
			p.renew = append(p.renew, name)
		}
		if req.Pending && o.pending[name] == "" {
			continue
		}
		switch {
		case !m.Reachable:
			return p, refused(cluster.CodeConflict, "the pgha of %s does not answer: bring it back first", name)
		case name == o.leader:
			p.primary, p.handOver = name, req.Rolling
		case req.Rolling && !m.streaming:
			return p, refused(cluster.CodeConflict, "%s does not stream from %s%s: wait until it does, or restart it alone with pgha restart %s", name, o.leader, paren(m.State), name)
		default:
			p.replicas = append(p.replicas, name)
		}
	}
	if p.handOver {
		if _, err := decideHandOver(o.handOverObservation, ""); err != nil {
			return p, refused(cluster.CodeConflict, "%s; pgha restart %s restarts it in place, and clients wait for that long", err, o.leader)
		}
	}
	return p, nil
}

func (p restartPlan) empty() bool {
	return len(p.replicas) == 0 && p.primary == "" && len(p.renew) == 0
}

// observeRestart looks at everything that restarts depend on.
func (n *Node) observeRestart(ctx context.Context) (restartObservation, error) {
	h, _, err := n.observeHandOver(ctx)
	o := restartObservation{handOverObservation: h, pending: map[string]string{}, programs: map[string][]string{}}
	if err != nil {
		return o, err
	}
	for _, m := range h.members {
		if m.SettingsPending {
			o.pending[m.Name] = "changed settings"
		}
		for _, p := range m.RestartPending {
			if p.Part == PartPostgres {
				o.pending[m.Name] = p.Reason
			} else {
				o.programs[m.Name] = append(o.programs[m.Name], p.Part)
			}
		}
	}
	return o, nil
}

// restart restarts PostgreSQL as the request asks for.
func (n *Node) restart(ctx context.Context, op *Operation, raw json.RawMessage) (any, error) {
	var req RestartRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	o, err := n.observeRestart(ctx)
	if err != nil {
		return nil, err
	}
	p, err := decideRestart(o, req)
	if err != nil {
		return nil, err
	}
	if p.empty() {
		op.Say("nothing waits for a restart")
		return RestartResult{Restarted: []string{}}, nil
	}
	return n.restartAll(ctx, op, o, p)
}

// restartAll restarts whom the plan names.
func (n *Node) restartAll(ctx context.Context, tell *Operation, o restartObservation, p restartPlan) (RestartResult, error) {
	r := RestartResult{Restarted: []string{}, Renewed: map[string][]string{}}
	done := func(name string) {
		r.Restarted = append(r.Restarted, name)
		n.event(EventRestart, name, tell.Actor(), "PostgreSQL was restarted")
	}
	leader := o.leader
	for _, name := range p.replicas {
		if err := n.restartReplica(ctx, tell, o.async, leader, name); err != nil {
			return r, err
		}
		done(name)
	}
	switch {
	case p.primary == "":
	case p.handOver:
		to, err := n.restartByHandOver(ctx, tell, o.async, p.primary)
		if to != "" {
			r.HandedOver, leader = to, to
		}
		if err != nil {
			return r, err
		}
		done(p.primary)
	default:
		if err := n.restartPrimary(ctx, tell, p.primary); err != nil {
			return r, err
		}
		done(p.primary)
	}
	for _, name := range p.renew {
		parts, err := n.renewPrograms(ctx, tell, name)
		if err != nil {
			return r, err
		}
		r.Renewed[name] = parts
	}
	return r, n.stillPending(ctx, tell, o, leader, &r)
}

// stillPending tells of settings that are not in force after all. Five settings,
// such as max_connections, cannot be lowered on a replica before the primary has
// done it: that one has to restart in its place.
func (n *Node) stillPending(ctx context.Context, tell *Operation, before restartObservation, leader string, r *RestartResult) error {
	for _, name := range r.Restarted {
		if before.pending[name] == "" {
			continue
		}
		m, err := n.memberNamed(name)
		if err != nil {
			return err
		}
		st, err := n.primaryStatus(ctx, m)
		if err != nil {
			return fmt.Errorf("ask Patroni of %s whether something still waits for a restart: %w", name, err)
		}
		if st.PendingRestart {
			r.StillPending = append(r.StillPending, name)
		}
	}
	if len(r.StillPending) > 0 {
		tell.Say("settings of %s are still not in force: a setting that replicas follow was lowered, and the primary has to be first: pgha restart %s (clients wait meanwhile), then pgha restart --rolling --pending",
			strings.Join(r.StillPending, ", "), leader)
	}
	return nil
}

// askRestart has the Patroni of a member restart its PostgreSQL, and meanwhile
// keeps the primary's awake, which has to let go of a synchronous standby first.
func (n *Node) askRestart(ctx context.Context, tell steps, leader string, m cluster.Member) error {
	tell.Say("%s: writing a checkpoint, so that it stops quickly", m.Name)
	if err := n.checkpointOn(ctx, m); err != nil {
		if ctx.Err() != nil {
			return fmt.Errorf("write a checkpoint on %s: %w", m.Name, context.Cause(ctx))
		}
		tell.Say("%s: without it: %v", m.Name, err)
	}
	tell.Say("%s: restarting PostgreSQL", m.Name)
	tell.Leaves("PostgreSQL on %s was asked to restart, and does it by itself: pgha status", m.Name)
	primary, err := n.memberNamed(leader)
	if err != nil {
		return err
	}
	asked := make(chan error, 1)
	go func() { asked <- n.onNode(ctx, m, taskRestart, struct{}{}, nil) }()
	t := time.NewTicker(time.Second)
	defer t.Stop()
	for {
		select {
		case err := <-asked:
			if err != nil {
				return fmt.Errorf("restart PostgreSQL on %s: %w", m.Name, err)
			}
			return nil
		case <-ctx.Done(): // it goes on by itself
			return fmt.Errorf("restart PostgreSQL on %s: %w", m.Name, context.Cause(ctx))
		case <-t.C:
			if m.Name != leader {
				_ = n.patroniOf(primary).Wake(ctx) // it looks in its next round otherwise
			}
		}
	}
}

// restartTask has this node's Patroni restart PostgreSQL, and waits for it. The
// gate is told first: a primary that ends without a reason is given up to the
// replica at once. It goes on when whoever asked has gone.
func (n *Node) restartTask(ctx context.Context, _ json.RawMessage) (any, error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), restartTimeout)
	defer cancel()
	n.restarting.Add(1)
	defer n.restarting.Add(-1)
	err := n.restClient(n.snapshot(), n.cfg.Address, n.cfg.Ports.Patroni).Restart(ctx, false)
	var status *patroni.StatusError
	if errors.As(err, &status) {
		err = refused(cluster.CodeUnavailable, "Patroni says %q: see pgha logs postgres on %s", status.Message, n.cfg.Name)
	}
	return struct{}{}, err
}

// restartReplica restarts a replica and waits until it streams again and commits
// are confirmed by a standby.
func (n *Node) restartReplica(ctx context.Context, tell steps, async bool, leader, name string) error {
	m, err := n.memberNamed(name)
	if err != nil {
		return err
	}
	if err := n.askRestart(ctx, tell, leader, m); err != nil {
		return err
	}
	h := &handing{n: n, tell: tell, async: async, r: HandOverResult{From: name, To: leader}}
	return h.waitFollows(ctx)
}

// restartPrimary restarts the primary in its place and waits until it takes
// writes again.
func (n *Node) restartPrimary(ctx context.Context, tell steps, name string) error {
	m, err := n.memberNamed(name)
	if err != nil {
		return err
	}
	began := time.Now()
	if err := n.askRestart(ctx, tell, name, m); err != nil {
		return err
	}
	for {
		if r, err := n.reportOf(ctx, m); err == nil && r.takesWrites() {
			tell.Say("%s takes writes again; the restart took %s", name, time.Since(began).Round(100*time.Millisecond))
			tell.Leaves("PostgreSQL on %s has restarted", name)
			return nil
		}
		if l, err := n.readLeadership(ctx); err == nil && l.serving() != "" && l.serving() != name {
			tell.Leaves("%s is the primary", l.serving())
			return refused(cluster.CodeUnavailable, "%s was not back in time, and %s has taken over: pgha logs postgres on %s says why", name, l.serving(), name)
		}
		if !sleep(ctx, 4*handOverPoll) {
			return fmt.Errorf("wait until %s takes writes: %w", name, context.Cause(ctx))
		}
	}
}

// waitSuccessor waits until a replica can take over from the primary. One whose
// Patroni or PostgreSQL has just started is left out for a moment.
func (n *Node) waitSuccessor(ctx context.Context, tell steps) error {
	end, said := time.Now().Add(successorTimeout), false
	for {
		o, l, err := n.observeHandOver(ctx)
		if err == nil {
			_, err = decideHandOver(o, "")
		}
		if err == nil || o.paused || time.Now().After(end) {
			return err
		}
		if !said {
			said = true
			tell.Say("waiting until a replica can take over: %v", err)
		}
		if primary, err := n.memberNamed(l.serving()); err == nil {
			_ = n.patroniOf(primary).Wake(ctx) // it looks in its next round otherwise
		}
		if !sleep(ctx, time.Second) {
			return fmt.Errorf("wait until a replica can take over: %w", context.Cause(ctx))
		}
	}
}

// restartByHandOver hands over from the primary, which restarts it as a replica.
func (n *Node) restartByHandOver(ctx context.Context, tell steps, async bool, name string) (to string, err error) {
	m, err := n.memberNamed(name)
	if err != nil {
		return "", err
	}
	before, err := n.primaryStatus(ctx, m)
	if err != nil {
		return "", fmt.Errorf("ask Patroni of %s: %w", name, err)
	}
	if err := n.waitSuccessor(ctx, tell); err != nil {
		return "", err
	}
	r, err := n.moveLeadership(ctx, tell, "", true)
	if err != nil {
		return r.To, err
	}
	after, err := n.primaryStatus(ctx, m)
	if err != nil {
		return r.To, fmt.Errorf("ask Patroni of %s: %w", name, err)
	}
	if after.PostmasterStart != before.PostmasterStart {
		tell.Say("%s: PostgreSQL has started anew for its new role", name)
		return r.To, nil
	}
	return r.To, n.restartReplica(ctx, tell, async, r.To, name)
}

// renewPrograms has a node start the Patroni and HAProxy that are on disk.
func (n *Node) renewPrograms(ctx context.Context, tell steps, name string) ([]string, error) {
	m, err := n.memberNamed(name)
	if err != nil {
		return nil, err
	}
	var r Renewed
	if err := n.onNode(ctx, m, taskRenew, struct{}{}, &r); err != nil {
		return nil, fmt.Errorf("start the new programs of %s: %w", name, err)
	}
	if len(r.Parts) > 0 {
		tell.Say("%s: %s started anew; PostgreSQL and sessions go on", name, strings.Join(r.Parts, " and "))
	}
	return r.Parts, nil
}

// ReloadRequest asks nodes to read their configuration again.
type ReloadRequest struct {
	Node string `json:"node,omitempty"` // "" = all data nodes
}

// ReloadResult names the nodes that have read it.
type ReloadResult struct {
	Reloaded []string `json:"reloaded"`
}

// reload has data nodes read their configuration again.
func (n *Node) reload(ctx context.Context, op *Operation, raw json.RawMessage) (any, error) {
	var req ReloadRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	members := n.snapshot().Members
	if !slices.ContainsFunc(members, func(m cluster.Member) bool { return req.Node == "" || m.Name == req.Node }) {
		return nil, refused(cluster.CodeBadRequest, "there is no node %q: the data nodes are %s", req.Node, strings.Join(n.dataNodes(), ", "))
	}
	out := ReloadResult{Reloaded: []string{}}
	var errs []error
	for _, m := range members {
		if req.Node != "" && m.Name != req.Node || req.Node == "" && m.Role == cluster.RoleWitness {
			continue
		}
		if m.Role == cluster.RoleWitness {
			return nil, refused(cluster.CodeBadRequest, "%s is a witness and has nothing to reload: the data nodes are %s", m.Name, strings.Join(n.dataNodes(), ", "))
		}
		// One that is down reads its configuration when it starts; the others need not wait for it.
		if err := n.onNode(ctx, m, taskReload, struct{}{}, nil); err != nil {
			op.Leaves("reloaded: %s", strings.Join(append(out.Reloaded, "and no other"), ", "))
			errs = append(errs, fmt.Errorf("reload %s: %w", m.Name, err))
			continue
		}
		op.Say("%s: Patroni, PostgreSQL and HAProxy have read their configuration again", m.Name)
		out.Reloaded = append(out.Reloaded, m.Name)
	}
	return out, errors.Join(errs...)
}

// reloadTask has this node's programs read their configuration again.
func (n *Node) reloadTask(ctx context.Context, _ json.RawMessage) (any, error) {
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	err := n.restClient(n.snapshot(), n.cfg.Address, n.cfg.Ports.Patroni).Reload(ctx)
	err = errors.Join(err, n.reloadPostgres(ctx))
	if n.haproxy.Status().State == supervisor.Running {
		err = errors.Join(err, n.reloadHAProxy(ctx))
	}
	return struct{}{}, err
}
