package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"regexp"
	"strconv"
	"strings"

	"pgha/cluster"
)

// PackagesResult is the packages of all data nodes.
type PackagesResult struct {
	Nodes []PackagesReport `json:"nodes"`
}

// listPackages asks all data nodes for their packages.
func (n *Node) listPackages(ctx context.Context) (PackagesResult, error) {
	out := PackagesResult{Nodes: []PackagesReport{}}
	for _, m := range n.snapshot().Members {
		if m.Role != cluster.RoleData {
			continue
		}
		var p PackagesReport
		if err := n.onNode(ctx, m, taskPackages, struct{}{}, &p); err != nil {
			return out, fmt.Errorf("ask %s for its packages: %w", m.Name, err)
		}
		out.Nodes = append(out.Nodes, p)
	}
	return out, nil
}

// packagesHandler serves the command line.
func (n *Node) packagesHandler(w http.ResponseWriter, r *http.Request) {
	if err := n.notOnWitness("has none of these packages"); err != nil {
		reply(w, nil, err)
		return
	}
	p, err := n.listPackages(r.Context())
	reply(w, p, err)
}

// Packages returns the packages of all data nodes: which version runs, is
// installed, and could be. It fails if one of the nodes does not answer.
func (l *Local) Packages(ctx context.Context) (PackagesResult, error) {
	var p PackagesResult
	return p, l.call(ctx, http.MethodGet, "/v1/packages", nil, &p)
}

// UpgradePostgresRequest asks for the newest minor version on all data nodes.
type UpgradePostgresRequest struct {
	// NoDownload leaves the packages as they are on disk: they were upgraded
	// already.
	NoDownload bool `json:"no_download,omitempty"`
}

// UpgradePostgresResult says what has changed.
type UpgradePostgresResult struct {
	// Changed are the packages that were upgraded, by node.
	Changed map[string][]string `json:"changed"`
	RestartResult
}

// majorPattern finds the major version in a Debian package's.
var majorPattern = regexp.MustCompile(`^(?:\d+:)?(\d+)`)

func majorOfPackage(version string) int {
	m := majorPattern.FindStringSubmatch(version)
	if m == nil {
		return 0
	}
	major, err := strconv.Atoi(m[1])
	if err != nil {
		return 0
	}
	return major
}

// decideUpgradePostgres refuses an upgrade that would be none to a minor version.
func decideUpgradePostgres(nodes []PackagesReport, noDownload bool) error {
	for _, node := range nodes {
		if node.Major != nodes[0].Major {
			return refused(cluster.CodeConflict, "%s has PostgreSQL %d and %s has %d: a cluster runs one major version", nodes[0].Node, nodes[0].Major, node.Node, node.Major)
		}
		for _, p := range node.Packages {
			installed, available := majorOfPackage(p.Installed), majorOfPackage(p.Available)
			switch {
			case noDownload:
			case p.Part == PartPostgres && p.Package == "":
				return refused(cluster.CodeConflict, "the PostgreSQL of %s comes from no package: put the new one in its place on every data node, then pgha upgrade postgres --no-download", node.Node)
			case p.Part == PartPostgres && available != node.Major && p.Available != "":
				return refused(cluster.CodeConflict, "apt on %s would bring %s %s, and %s is there: pgha upgrades minor versions only; pin the package to its major version", node.Node, p.Package, p.Available, p.Installed)
			}
			if p.Part == PartPostgres && p.Installed != "" && installed != node.Major {
				return refused(cluster.CodeConflict, "%s has %s %s on disk, and its data is of PostgreSQL %d", node.Node, p.Package, p.Installed, node.Major)
			}
		}
	}
	return nil
}

// upgradePostgres upgrades the packages node by node and restarts what they have
// replaced, the primary last. What was done before is not done again.
func (n *Node) upgradePostgres(ctx context.Context, op *Operation, raw json.RawMessage) (any, error) {
	var req UpgradePostgresRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	known, err := n.listPackages(ctx)
	if err != nil {
		return nil, err
	}
	if err := decideUpgradePostgres(known.Nodes, req.NoDownload); err != nil {
		return nil, err
	}
	o, err := n.observeRestart(ctx)
	if err != nil {
		return nil, err
	}
	order, err := decideUpgradeOrder(o)
	if err != nil {
		return nil, err
	}
	out := UpgradePostgresResult{Changed: map[string][]string{}, RestartResult: RestartResult{Restarted: []string{}, Renewed: map[string][]string{}}}
	for _, name := range order {
		if !req.NoDownload {
			if err := n.upgradePackagesOf(ctx, op, name, out.Changed); err != nil {
				return out, err
			}
		}
		if err := n.restartPending(ctx, op, name, &out.RestartResult); err != nil {
			return out, err
		}
	}
	if len(out.Restarted)+len(out.Renewed) == 0 {
		op.Say("everything runs as it is on disk: nothing was restarted")
	}
	return out, nil
}

// decideUpgradeOrder lists the data nodes, the primary last, if each can have its
// turn.
func decideUpgradeOrder(o restartObservation) ([]string, error) {
	var order []string
	for _, m := range o.members {
		switch {
		case m.Role != cluster.RoleData:
		case !m.Reachable:
			return nil, refused(cluster.CodeConflict, "the pgha of %s does not answer: bring it back first, so that no node is left behind", m.Name)
		case m.Name != o.leader:
			order = append(order, m.Name)
		}
	}
	// A rolling restart of all must be possible before anything is touched.
	if _, err := decideRestart(o, RestartRequest{Rolling: true}); err != nil {
		return nil, err
	}
	return append(order, o.leader), nil
}

// upgradePackagesOf upgrades the packages of a node, on disk alone.
func (n *Node) upgradePackagesOf(ctx context.Context, op *Operation, name string, changed map[string][]string) error {
	m, err := n.memberNamed(name)
	if err != nil {
		return err
	}
	op.Say("%s: upgrading the packages on disk", name)
	op.Leaves("packages may be upgraded on %s, and what waits for a restart is in pgha status: repeat the command", name)
	var u UpgradedPackages
	if err := n.onNode(ctx, m, taskUpgrade, struct{}{}, &u); err != nil {
		return fmt.Errorf("upgrade the packages of %s: %w", name, err)
	}
	text := "they are the newest already"
	if len(u.Changed) > 0 {
		changed[name] = u.Changed
		text = strings.Join(u.Changed, ", ")
		n.event(EventUpgrade, name, op.Actor(), "packages upgraded: %s", text)
	}
	op.Say("%s: %s", name, text)
	return nil
}

// restartPending restarts what waits for it on one node.
func (n *Node) restartPending(ctx context.Context, op *Operation, name string, r *RestartResult) error {
	o, err := n.observeRestart(ctx)
	if err != nil {
		return err
	}
	// Whoever leads by now is handed over from.
	p, err := decideRestart(o, RestartRequest{Node: name, Rolling: true, Pending: true})
	if err != nil || p.empty() {
		return err
	}
	done, err := n.restartAll(ctx, op, o, p)
	r.Restarted = append(r.Restarted, done.Restarted...)
	r.StillPending = append(r.StillPending, done.StillPending...)
	for name, parts := range done.Renewed {
		r.Renewed[name] = parts
	}
	if done.HandedOver != "" {
		r.HandedOver = done.HandedOver
	}
	if err != nil {
		return err
	}
	return n.waitSuccessor(ctx, op)
}
