package main

import (
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func upgradePostgresCommand() *cli.Command {
	return &cli.Command{
		Name:  "postgres",
		Usage: "bring PostgreSQL, Patroni and HAProxy to their newest minor versions, node by node",
		Description: "Shows which versions run, are installed, and apt has; upgrades the packages of one node after\n" +
			"the other, and restarts what they have replaced: replicas first, and the primary hands over\n" +
			"before its turn. After an interruption, repeat the command.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "no-download", Usage: "leave the packages as they are on disk, and restart what is not the same"},
		}, operationFlags...),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if err := node.CheckRoot(); err != nil {
				return err
			}
			known, err := node.NewLocal(node.DefaultPaths()).Packages(c.Context)
			if err != nil {
				return err
			}
			if err := printPackages(os.Stderr, known); err != nil {
				return err
			}
			what := "This upgrades these packages on every data node, one after the other, and restarts what they replace.\n"
			if c.Bool("no-download") {
				what = "This restarts what packages have replaced, on one data node after the other.\n"
			}
			if err := confirm(c.Bool("yes"), what+"If PostgreSQL is among it, the primary hands over before its turn. Go on?"); err != nil {
				return err
			}
			return operate(c, "upgrade-postgres", node.UpgradePostgresRequest{NoDownload: c.Bool("no-download")})
		},
	}
}

func printPackages(w io.Writer, known node.PackagesResult) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tPACKAGE\tRUNS\tINSTALLED\tAVAILABLE\t")
	for _, n := range known.Nodes {
		for _, p := range n.Packages {
			pending := ""
			if p.Pending != "" {
				pending = "restart pending: " + p.Pending
			}
			fmt.Fprintln(t, strings.Join([]string{n.Node, firstOf(p.Package, p.Part+" (no package)"), firstOf(p.Running, "-"), firstOf(p.Installed, "-"), firstOf(p.Available, "-"), pending}, "\t"))
		}
	}
	fmt.Fprintln(t)
	return t.Flush()
}
