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
	paths, state, err := hostToReset(c, c.Bool("force"))
	if err != nil {
		return err
	}
	aside := paths.Aside(time.Now())
	if err := confirm(c.Bool("yes"), resetQuestion(paths, state, aside)); err != nil {
		return err
	}
	p := newProgress()
	switch {
	case state.Phase != node.PhaseReady:
	case state.Removed != nil:
		p.say("%s", state.Removed.RemovalText(state.ClusterName))
	default:
		p.say("leaving the cluster")
		_, err := perform(c, p, "leave", node.LeaveRequest{AllowEven: true, Last: true})
		if err != nil && !c.Bool("force") {
			return fmt.Errorf("%w\nWith --force this host is reset all the same; the others then go on counting it as a member that is down", err)
		}
		if err != nil {
			p.say("the cluster was not told: %v", err)
		}
	}
	return resetHost(c, p, paths, state, aside)
}

func leaveCommand() *cli.Command {
	return &cli.Command{
		Name: "leave", Category: "cluster",
		Usage: "take this host out of its cluster in order: hand over, leave, reset; its data is moved aside, not deleted",
		Description: "A host that cannot leave because its cluster is gone, or has forgotten it, is for pgha reset. A node that does not\n" +
			"answer is taken out on another one: pgha member remove, or pgha member replace.",
		Flags:  append([]cli.Flag{allowEvenFlag}, operationFlags...),
		Action: runLeave,
	}
}

func runLeave(c *cli.Context) error {
	paths, state, err := hostToReset(c, false)
	if err != nil {
		return err
	}
	switch {
	case state.Phase != node.PhaseReady:
		return errors.New("this host has not finished becoming a node: pgha reset cleans up")
	case state.Removed != nil:
		return fmt.Errorf("%s: %s", state.Removed.RemovalText(state.ClusterName), node.RemovalToDo)
	}
	aside := paths.Aside(time.Now())
	if err := confirm(c.Bool("yes"), resetQuestion(paths, state, aside)); err != nil {
		return err
	}
	p := newProgress()
	if _, err := perform(c, p, "leave", node.LeaveRequest{AllowEven: c.Bool("allow-even")}); err != nil {
		return err
	}
	return resetHost(c, p, paths, state, aside)
}

// hostToReset reads which node this host is.
func hostToReset(c *cli.Context, force bool) (node.Paths, node.State, error) {
	paths := node.DefaultPaths()
	if err := noArgs(c); err != nil {
		return paths, node.State{}, err
	}
	if err := node.CheckRoot(); err != nil {
		return paths, node.State{}, err
	}
	state, err := node.LoadState(paths)
	if errors.Is(err, node.ErrNoNode) {
		return paths, state, fmt.Errorf("this host is not a node: there is nothing to %s", c.Command.Name)
	}
	if err != nil && !force {
		return paths, state, fmt.Errorf("%w (pgha reset --force goes on without it)", err)
	}
	return paths, state, nil
}

func resetQuestion(paths node.Paths, state node.State, aside string) string {
	what := fmt.Sprintf("This takes the %s node %q out of cluster %q (%s): it stops PostgreSQL, HAProxy and etcd here,\n"+
		"moves what is in %s to %s, and puts the firewall and the distribution's services back.\n", state.Role, state.Node, state.ClusterName, state.ClusterID, paths.Lib, aside)
	if state.Adopted != "" {
		what += fmt.Sprintf("The adopted data directory %s stays where it is.\n", state.Adopted)
	}
	return what + "Go on?"
}

// resetHost makes a host that has left no node any more.
func resetHost(c *cli.Context, p *progress, paths node.Paths, state node.State, aside string) error {
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
