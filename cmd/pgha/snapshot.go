package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func snapshotCommand() *cli.Command {
	return &cli.Command{
		Name: "snapshot", Category: "recovery",
		Usage: "save and restore the cluster's state (not the database)",
		Subcommands: []*cli.Command{
			{
				Name: "save", ArgsUsage: "[FILE]",
				Usage:  "save the cluster's state, as this node has it, to FILE or among this node's snapshots",
				Flags:  []cli.Flag{jsonFlag},
				Action: runSnapshotSave,
			},
			{
				Name:   "list",
				Usage:  "list this node's snapshots: one a day, and one from before each dangerous operation, are kept by themselves",
				Flags:  []cli.Flag{jsonFlag},
				Action: runSnapshotList,
			},
			snapshotRestoreCommand(),
		},
	}
}

func runSnapshotSave(c *cli.Context) error {
	if c.NArg() > 1 {
		return fmt.Errorf("save takes one file, but was given %d arguments", c.NArg())
	}
	if err := node.CheckRoot(); err != nil {
		return err
	}
	file := c.Args().First()
	if file != "" {
		abs, err := filepath.Abs(file)
		if err != nil {
			return fmt.Errorf("find where to save: %w", err)
		}
		file = abs
	}
	ctx, cancel := context.WithTimeout(c.Context, time.Minute)
	defer cancel()
	s, err := node.NewLocal(node.DefaultPaths()).SaveSnapshot(ctx, file)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, s)
	}
	fmt.Printf("%s: cluster %s at revision %d, %s\n", s.File, s.Cluster, s.Revision, node.FormatBytes(uint64(s.Bytes)))
	return nil
}

func runSnapshotList(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	if err := node.CheckRoot(); err != nil {
		return err
	}
	if _, err := node.LoadState(node.DefaultPaths()); err != nil {
		return err
	}
	all, err := node.ListSnapshots(node.DefaultPaths())
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, all)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "TIME\tCLUSTER\tREVISION\tGENERATION\tNODE\tSIZE\tWHY\tFILE")
	for _, s := range all {
		if s.Damaged != "" {
			fmt.Fprintf(t, "%s\t-\t-\t-\t-\t%s\tDAMAGED\t%s\n", s.At.Local().Format(time.DateTime), node.FormatBytes(uint64(s.Bytes)), s.File)
			continue
		}
		fmt.Fprintf(t, "%s\t%s (%s)\t%d\t%d\t%s\t%s\t%s\t%s\n", s.At.Local().Format(time.DateTime), s.Cluster, s.ClusterID, s.Revision, s.Generation, s.Node,
			node.FormatBytes(uint64(s.Bytes)), s.Reason, s.File)
	}
	return t.Flush()
}
