package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
)

const (
	// programTransfer bounds the sending of a program to a node.
	programTransfer = 10 * time.Minute
	// trialWatched is how long a node may take from the start of a trial until it
	// answers as what it has become.
	trialWatched = trialTime + trialGrace + time.Minute
	// readyWithin is how long the cluster may take to be whole again after a node,
	// readyAtFirst how long it may take before anything was changed.
	readyWithin  = 5 * time.Minute
	readyAtFirst = 20 * time.Second

	pathProgram      = "/v1/program"       // PUT: a program comes in
	pathProgramCheck = "/v1/program/check" // POST: is it there, and would it run?
	pathProgramTrial = "/v1/program/trial" // POST: run it
)

// UpgradeRequest asks for another version of pgha on all nodes, one after the
// other. Repeated, it goes on where it was. Programs of two versions speak here:
// fields may be added, and must not change.
type UpgradeRequest struct {
	File    string `json:"file,omitempty"`    // the program, on the host of this daemon
	SHA256  string `json:"sha256,omitempty"`  // of the file, in hexadecimal
	Version string `json:"version,omitempty"` // of the program
	Node    string `json:"node,omitempty"`    // this one alone, whatever state the cluster is in
	// AllowOlder permits a version that is not newer than what runs.
	AllowOlder bool `json:"allow_older,omitempty"`
}

// UpgradeResult says what an upgrade has done.
type UpgradeResult struct {
	Version  string   `json:"version"`
	Upgraded []string `json:"upgraded"` // nodes
	// Here says that the node that was asked begins its own part now. Whoever has
	// asked waits until it is over, and asks again.
	Here *UpgradeReport `json:"here,omitempty"`
}

// upgradeNode is a node as planUpgrade sees it.
type upgradeNode struct {
	name            string
	role            cluster.NodeRole
	version         string
	leader, answers bool
	trial           bool // it tries the version already
}

// planUpgrade lists the nodes that have to change, in their order: a witness
// first, the primary last, so that what is wrong with a version shows where it
// costs least.
func planUpgrade(nodes []upgradeNode, req UpgradeRequest) ([]upgradeNode, error) {
	refuse := func(c cluster.Code, format string, args ...any) ([]upgradeNode, error) {
		return nil, &cluster.Error{Code: c, Message: fmt.Sprintf(format, args...)}
	}
	var names []string
	var plan []upgradeNode
	for _, m := range nodes {
		names = append(names, m.name)
		if req.Node != "" && m.name != req.Node {
			continue
		}
		if !m.answers {
			return refuse(cluster.CodeConflict, "%s does not answer: bring it back first, or upgrade the others with --node", m.name)
		}
		if m.version == req.Version && !m.trial {
			continue
		}
		if order, ok := compareVersions(req.Version, m.version); !req.AllowOlder && m.version != req.Version {
			switch {
			case !ok:
				return refuse(cluster.CodeConflict, "it cannot be told whether %s is newer than %s, which runs on %s: add --allow-older if it is what you want", req.Version, m.version, m.name)
			case order < 0:
				return refuse(cluster.CodeConflict, "%s is older than %s, which runs on %s: add --allow-older if you want to go back", req.Version, m.version, m.name)
			}
		}
		plan = append(plan, m)
	}
	if req.Node != "" && !slices.Contains(names, req.Node) {
		return refuse(cluster.CodeNoMember, "there is no node %q: use one of %s", req.Node, strings.Join(names, ", "))
	}
	rank := func(m upgradeNode) int {
		switch {
		case m.role == cluster.RoleWitness:
			return 0
		case m.leader:
			return 2
		}
		return 1
	}
	slices.SortStableFunc(plan, func(a, b upgradeNode) int { return rank(a) - rank(b) })
	return plan, nil
}

// notReady says why the next node must not be touched now, or "".
func notReady(s Status) string {
	if s.Health == NoLeader || s.Health == Unknown {
		return s.Verdict
	}
	replicas := 0
	for _, m := range s.Members {
		switch {
		case !m.Reachable:
			return m.Name + " does not answer"
		case m.Waiting != "":
			return m.Name + " is not up: " + m.Waiting
		case m.Upgrade != nil && m.Upgrade.Failed == "":
			return m.Name + " has " + m.Upgrade.Version + " on trial"
		case m.Etcd == etcdNone:
			return m.Name + " takes no part in etcd"
		case m.Role != cluster.RoleData || m.Name == s.Leader:
			continue
		case m.Postgres != pgReplica:
			return fmt.Sprintf("PostgreSQL is no running replica on %s%s", m.Name, paren(m.State))
		case m.LagBytes < 0:
			return "it is not known how far " + m.Name + " is behind the primary"
		}
		replicas++
	}
	if replicas > 0 && !s.Promise.Holds {
		return s.Promise.Text
	}
	return ""
}

// upgrade is the operation. It changes the other nodes from here; its own part it
// only begins, as it ends with this daemon.
func (n *Node) upgrade(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req UpgradeRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	s, reports := n.status(ctx), n.reports(ctx)
	plan, err := planUpgrade(upgradeNodes(s, reports, req.Version), req)
	if err != nil {
		return nil, err
	}
	result := UpgradeResult{Version: req.Version, Upgraded: []string{}}
	if len(plan) == 0 {
		o.Say("%s runs already", req.Version)
		return result, nil
	}
	if req.Node == "" {
		limit := readyAtFirst
		if slices.ContainsFunc(plan, func(m upgradeNode) bool { return m.trial }) {
			limit = readyWithin // what was begun before is still under way
		}
		if err := n.awaitReady(ctx, o, limit); err != nil {
			return nil, &cluster.Error{Code: cluster.CodeConflict, Message: err.Error() + ": an upgrade takes a whole cluster (to change one node of a broken one: --node)"}
		}
	}
	for _, m := range plan {
		if m.trial {
			continue // it has it
		}
		if err := n.bringProgram(ctx, o, m.name, req); err != nil {
			return nil, err
		}
	}
	o.Leaves("some nodes may run %s, the others what they ran before, which work together; repeat the command to go on", req.Version)
	for _, m := range plan {
		if req.Node == "" {
			if err := n.awaitReady(ctx, o, readyWithin); err != nil {
				return nil, err
			}
		}
		here, err := n.changeProgram(ctx, o, m, reports[m.name], req)
		if err != nil {
			return nil, err
		}
		result.Upgraded = append(result.Upgraded, m.name)
		if here != nil {
			result.Here = here
			return result, nil
		}
	}
	if req.Node == "" {
		return result, n.awaitReady(ctx, o, readyWithin)
	}
	return result, nil
}

// reports asks all members, this one too.
func (n *Node) reports(ctx context.Context) map[string]Report {
	out := n.seen.ask(ctx, n.snapshot().Members)
	out[n.cfg.Name] = n.report(ctx)
	return out
}

func upgradeNodes(s Status, reports map[string]Report, version string) []upgradeNode {
	var out []upgradeNode
	for _, m := range s.Members {
		r, ok := reports[m.Name]
		u := r.Upgrade
		out = append(out, upgradeNode{
			name: m.Name, role: m.Role, version: r.Version, leader: m.Name == s.Leader, answers: ok,
			trial: u != nil && u.Failed == "" && u.Version == version,
		})
	}
	return out
}

// awaitReady waits until the next node may be changed.
func (n *Node) awaitReady(ctx context.Context, o *Operation, limit time.Duration) error {
	wait, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for last := ""; ; {
		why := notReady(n.status(wait))
		if why != "" && why != last {
			last = why
			o.Say("waiting: %s", why)
		}
		switch {
		case why == "":
			return nil
		case sleep(wait, time.Second):
		case ctx.Err() != nil:
			return fmt.Errorf("wait for the cluster to be whole: %s", why)
		default:
			return &cluster.Error{Code: cluster.CodeConflict, Message: why}
		}
	}
}

// programCheck asks a node for a program that was brought to it.
type programCheck struct {
	SHA256 string `json:"sha256"`
}

// programState is the answer: whether the program is there and would run.
type programState struct {
	There   bool   `json:"there"`
	Version string `json:"version,omitempty"`
	Refused string `json:"refused,omitempty"` // why it would not
}

// bringProgram puts the program on a node, beside the one that is installed, and
// has the node try all of it that can be tried while it runs.
func (n *Node) bringProgram(ctx context.Context, o *Operation, name string, req UpgradeRequest) error {
	m, err := n.memberNamed(name)
	if err != nil {
		return err
	}
	check := func() (st programState, err error) {
		if name == n.cfg.Name {
			return n.checkProgram(ctx, req.SHA256), nil
		}
		ctx, cancel := context.WithTimeout(ctx, 3*programTimeout)
		defer cancel()
		return st, n.seen.call(ctx, http.MethodPost, m.APIAddr(), pathProgramCheck, programCheck{req.SHA256}, &st)
	}
	st, err := check()
	if err == nil && !st.There {
		o.Say("bringing %s to %s", req.Version, name)
		if err = n.sendProgram(ctx, m, req); err == nil {
			st, err = check()
		}
	}
	switch {
	case err != nil:
		return fmt.Errorf("bring the program to %s: %w", name, err)
	case st.Refused != "":
		return &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("%s does not take %s, so nothing was changed: %s", name, req.Version, st.Refused)}
	case !st.There || st.Version != req.Version:
		return &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("%s has not got the program: run the command again", name)}
	}
	return nil
}

// sendProgram sends the program's file to a node.
func (n *Node) sendProgram(ctx context.Context, m cluster.Member, req UpgradeRequest) error {
	f, err := os.Open(req.File)
	if err != nil {
		return &cluster.Error{Code: cluster.CodeBadRequest, Message: fmt.Sprintf("the daemon cannot read %s: %v", req.File, err)}
	}
	defer func() { _ = f.Close() }()
	if m.Name == n.cfg.Name {
		return receive(n.image.Installed, req.SHA256, f)
	}
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read program: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, programTransfer)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, http.MethodPut, "https://"+m.APIAddr()+pathProgram+"?sha256="+url.QueryEscape(req.SHA256), f)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	r.ContentLength = st.Size()
	return doAPI(n.seen.client, r, nil)
}

// changeProgram has a node run the program, and waits until it is the installed
// one there. Its own part the daemon only begins; the trial is returned then.
func (n *Node) changeProgram(ctx context.Context, o *Operation, u upgradeNode, before Report, req UpgradeRequest) (*UpgradeReport, error) {
	if u.name == n.cfg.Name {
		if u.trial {
			return n.image.report(), nil
		}
		o.Say("%s: from %s to %s; pgha alone starts anew", u.name, u.version, req.Version)
		return n.beginTrial(ctx, req.SHA256, o.Actor())
	}
	m, err := n.memberNamed(u.name)
	if err != nil {
		return nil, err
	}
	t := before.Upgrade
	if !u.trial {
		o.Say("%s: from %s to %s", u.name, u.version, req.Version)
		start, cancel := context.WithTimeout(ctx, 3*programTimeout)
		defer cancel()
		t = &UpgradeReport{}
		if err := n.seen.call(start, http.MethodPost, m.APIAddr(), pathProgramTrial, trialRequest{req.SHA256, o.Actor()}, t); err != nil {
			return nil, fmt.Errorf("start %s on %s: %w", req.Version, u.name, err)
		}
	}
	after, err := n.watchTrial(ctx, m, t)
	if err != nil {
		return nil, err
	}
	if a, b := before.Postgres.Postmaster, after.Postgres.Postmaster; a != 0 && a != b {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("PostgreSQL on %s was started anew during the upgrade (process %d, then %d), which must not be: see pgha logs patroni there before you go on", u.name, a, b)}
	}
	o.Say("%s: runs %s; %s", u.name, req.Version, went(before.health(), after.health()))
	return nil, nil
}

// health is what a report tells of a node's children.
func (r Report) health() health {
	h := health{Children: map[string]int{}, Postgres: r.Postgres.Role, Postmaster: r.Postgres.Postmaster}
	for _, c := range r.Children {
		if c.PID != 0 {
			h.Children[c.Name] = c.PID
		}
	}
	return h
}

// watchTrial waits for the end of a trial on another node.
func (n *Node) watchTrial(ctx context.Context, m cluster.Member, t *UpgradeReport) (Report, error) {
	wait, cancel := context.WithTimeout(ctx, trialWatched)
	defer cancel()
	var last error
	for {
		try, end := context.WithTimeout(wait, askTimeout)
		var r Report
		err := n.seen.call(try, http.MethodGet, m.APIAddr(), "/v1/node", nil, &r)
		end()
		switch {
		case err != nil:
			last = err
		case r.Upgrade == nil && r.Version == t.Version:
			return r, nil
		case r.Upgrade != nil && r.Upgrade.ID == t.ID && r.Upgrade.Failed != "":
			return r, &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("%s runs %s again, as %s has failed there: %s", m.Name, r.Version, t.Version, r.Upgrade.Failed)}
		default:
			last = fmt.Errorf("it runs %s, on trial", r.Version)
		}
		switch {
		case sleep(wait, trialEvery):
		case ctx.Err() != nil:
			return Report{}, fmt.Errorf("wait for %s with %s: %w", m.Name, t.Version, last)
		default:
			return Report{}, &cluster.Error{Code: cluster.CodeUnavailable, Message: fmt.Sprintf("%s does not become healthy with %s (%v): see systemctl status pgha there", m.Name, t.Version, last)}
		}
	}
}
