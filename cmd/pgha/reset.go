package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/internal/host"
	"pgha/node"
	"pgha/systemd"
)

func resetCommand() *cli.Command {
	return &cli.Command{
		Name: "reset", Category: "cluster",
		Usage: "take this host out of its cluster; its data is moved aside, not deleted",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "force", Usage: "reset this host even if the cluster cannot be told, or would be harmed"},
			yesFlag, jsonFlag,
		},
		Action: runReset,
	}
}

func runReset(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	if err := node.CheckRoot(); err != nil {
		return err
	}
	paths := node.DefaultPaths()
	state, err := node.LoadState(paths)
	if errors.Is(err, node.ErrNoNode) {
		return errors.New("this host is not a node: there is nothing to reset")
	}
	if err != nil && !c.Bool("force") {
		return fmt.Errorf("%w (pgha reset --force goes on without it)", err)
	}
	aside := paths.Aside(time.Now())
	what := fmt.Sprintf("This takes the %s node %q out of cluster %q (%s): it stops PostgreSQL, HAProxy and etcd here,\n"+
		"moves what is in %s to %s, and puts the firewall and the distribution's services back.\n", state.Role, state.Node, state.ClusterName, state.ClusterID, paths.Lib, aside)
	if state.Adopted != "" {
		what += fmt.Sprintf("The adopted data directory %s stays where it is.\n", state.Adopted)
	}
	if err := confirm(c.Bool("yes"), what+"Go on?"); err != nil {
		return err
	}
	p := newProgress()
	if state.Phase == node.PhaseReady {
		if err := leaveCluster(c.Context, p, paths, c.Bool("force")); err != nil {
			return err
		}
	}
	steps := node.ResetSteps(paths, aside)
	if systemd.Available() {
		steps = append([]node.Step{{Name: "stop and remove pgha.service", Run: systemd.Uninstall}}, steps...)
		// They need the ports that what is stopped holds, and the record of them
		// is moved aside in the last step.
		steps = slices.Insert(steps, len(steps)-1, node.Step{
			Name: "put the distribution's services back", Run: func(ctx context.Context) error {
				return errors.Join(systemd.Restore(ctx, paths.Units()), host.RemoveDropIn())
			}})
	}
	// Every step is tried, whatever the others do: half a reset is worst.
	var errs []error
	for _, s := range steps {
		p.say("%s", s.Name)
		if err := s.Run(context.WithoutCancel(c.Context)); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.Name, err))
		}
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w\nRun pgha reset again when that is mended", err)
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, map[string]string{"node": state.Node, "cluster": state.ClusterName, "moved_to": aside})
	}
	fmt.Printf("This host is no node any more. Its old data is in %s; remove it when you are sure.\n", aside)
	return nil
}

// leaveCluster has the cluster forget this node, if it can be asked.
func leaveCluster(ctx context.Context, p *progress, paths node.Paths, force bool) error {
	p.say("leaving the cluster")
	ctx, cancel := context.WithTimeout(ctx, 3*time.Minute)
	defer cancel()
	err := node.NewLocal(paths).Leave(ctx)
	switch {
	case err == nil:
		return nil
	case !force:
		return fmt.Errorf("%w\nWith --force this host is reset all the same; the others then go on counting it as a member that is down", err)
	}
	p.say("the cluster was not told: %v", err)
	return nil
}
