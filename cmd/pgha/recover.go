package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

var allowLossFlag = &cli.BoolFlag{Name: "allow-data-loss", Usage: "go on where commits that clients were told of may be missing on this node"}

func recoverCommand() *cli.Command {
	return &cli.Command{
		Name: "recover", Category: "recovery",
		Usage: "begin the cluster anew from what is left of it",
		Subcommands: []*cli.Command{{
			Name:  "quorum",
			Usage: "on the data node that is left: go on without the others, which are lost for good",
			Description: "For a cluster that has lost most of its nodes for good. The others are declared lost and taken off\n" +
				"the roster; this node becomes the primary of a new generation of the cluster. Destroy the other VMs,\n" +
				"or power them off, first: one that lives on, and that this node cannot reach, may still take writes.",
			Flags: append([]cli.Flag{allowLossFlag}, operationFlags...),
			Action: func(c *cli.Context) error {
				if err := noArgs(c); err != nil {
					return err
				}
				return beginAnew(c, "recover-quorum", node.RecoverRequest{AllowDataLoss: c.Bool(allowLossFlag.Name)})
			},
		}},
	}
}

func snapshotRestoreCommand() *cli.Command {
	return &cli.Command{
		Name: "restore", ArgsUsage: "FILE",
		Usage: "begin the cluster anew from a snapshot of its state; the database is not touched",
		Description: "For a cluster whose state is lost or spoilt on all nodes. It restores the roster, the settings and\n" +
			"Patroni's configuration, not the database: that stays as it is on this node. All other nodes are\n" +
			"declared lost, and join again; stop pgha on those that are left first.",
		Flags: append([]cli.Flag{allowLossFlag, &cli.BoolFlag{Name: "older", Usage: "restore it although a newer snapshot is at hand"}}, operationFlags...),
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return errors.New("restore needs one file, after the flags: pgha snapshot list shows those there are")
			}
			file, err := filepath.Abs(c.Args().First())
			if err != nil {
				return fmt.Errorf("find snapshot: %w", err)
			}
			return beginAnew(c, "snapshot-restore", node.RecoverRequest{File: file, AllowDataLoss: c.Bool(allowLossFlag.Name), Older: c.Bool("older")})
		},
	}
}

// beginAnew shows what would be done, asks, and has the daemon do it.
func beginAnew(c *cli.Context, kind string, req node.RecoverRequest) error {
	if err := node.CheckRoot(); err != nil {
		return err
	}
	paths := node.DefaultPaths()
	if _, err := node.LoadState(paths); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(c.Context, time.Minute)
	defer cancel()
	plan, err := node.NewLocal(paths).PlanRecovery(ctx, req)
	if errors.Is(err, node.ErrNotRunning) {
		return errors.New("pgha is not running on this host: start it first (systemctl start pgha), it waits for the others and does this meanwhile")
	}
	if err != nil {
		return err
	}
	if plan.Refusal != "" {
		return errors.New(plan.Refusal)
	}
	if err := confirm(c.Bool("yes"), planText(plan)+"Go on?"); err != nil {
		return err
	}
	return operate(c, kind, req)
}

// planText says what a recovery would do, and what nobody can check for the
// operator.
func planText(p node.RecoverPlan) string {
	var b strings.Builder
	from := "what its etcd holds"
	if s := p.Snapshot; s != nil {
		from = fmt.Sprintf("the snapshot %s, taken on %s at %s (revision %d)", s.File, s.Node, s.At.Local().Format(time.DateTime), s.Revision)
	}
	fmt.Fprintf(&b, "This begins generation %d of cluster %q on %s, from %s.\n", p.Generation, p.Cluster, p.Node, from)
	fmt.Fprintf(&b, "Data:  %s.\n", p.Holds)
	if len(p.Lost) > 0 {
		fmt.Fprintf(&b, "Lost:  %s. They are taken off the roster for good and have to be reset and join again.\n"+
			"       None of them answers %s. That is no proof that they are down: make sure that each is destroyed,\n"+
			"       or powered off. Two of them that can reach each other and clients, but not %s, would be a second\n"+
			"       primary, until they hear of %s and stop.\n", strings.Join(p.Lost, ", "), p.Node, p.Node, p.Node)
	}
	for _, w := range p.Warnings {
		fmt.Fprintf(&b, "Note:  %s.\n", w)
	}
	b.WriteString("The present etcd directory is kept beside the new one.\n")
	return b.String()
}
