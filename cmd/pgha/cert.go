package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

func certCommand() *cli.Command {
	return &cli.Command{
		Name: "cert", Category: "settings", Usage: "show the nodes' certificates, renew them, print the CA for clients",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "list the certificates of all nodes", Flags: []cli.Flag{jsonFlag}, Action: listCerts},
			{
				Name: "renew", Usage: "renew this node's certificates now, or NODE's, or all; nothing is restarted", ArgsUsage: "[NODE...]",
				Flags: append([]cli.Flag{&cli.BoolFlag{Name: "all", Usage: "renew those of all nodes, one node after the other"}}, timeoutFlag, jsonFlag), Action: renewCerts,
			},
			{Name: "ca", Usage: "print the CA certificate that clients need (sslrootcert)", Action: func(c *cli.Context) error {
				if err := noArgs(c); err != nil {
					return err
				}
				pem, note, err := node.AllCACerts(node.DefaultPaths())
				if err != nil {
					return err
				}
				if note != "" {
					fmt.Fprintln(os.Stderr, note)
				}
				_, err = os.Stdout.Write(pem)
				return err
			}},
		},
	}
}

func listCerts(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	certs, err := node.NewLocal(node.DefaultPaths()).Certificates(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, certs)
	}
	return printCerts(os.Stdout, certs)
}

func printCerts(w io.Writer, nodes []node.CertsReport) error {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "NODE\tCERTIFICATE\tISSUED BY\tENDS\tDAYS LEFT\tRENEWED BY ITSELF\tNAMES")
	for _, n := range nodes {
		if !n.Reachable {
			fmt.Fprintf(t, "%s\tdoes not answer\t\t\t\t\t\n", n.Node)
		}
		for _, k := range n.Certs {
			fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\n", n.Node, k.Role, k.Issuer, k.NotAfter.Local().Format(time.DateTime),
				int(time.Until(k.NotAfter).Hours()/24), k.RenewAt.Local().Format(time.DateOnly), strings.Join(k.Names, " "))
		}
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	for _, n := range nodes {
		for i, ca := range n.Trusted {
			does := "signs"
			if i > 0 {
				does = "is trusted"
			}
			fmt.Fprintf(w, "%s: the CA %s %s, until %s\n", n.Node, ca.Fingerprint, does, ca.NotAfter.Local().Format(time.DateOnly))
		}
	}
	return nil
}

func renewCerts(c *cli.Context) error {
	names := c.Args().Slice()
	if c.Bool("all") && len(names) > 0 {
		return errors.New("--all and names of nodes exclude each other: give one")
	}
	if c.Bool("all") || len(names) > 0 {
		return operate(c, "renew-certificates", node.RenewOrder{Nodes: names})
	}
	local := node.NewLocal(node.DefaultPaths())
	self, err := local.Report(c.Context)
	if err != nil {
		return err
	}
	if self.Role == cluster.RoleData {
		return operate(c, "renew-certificates", node.RenewOrder{Nodes: []string{self.Name}})
	}
	// Operations are the data nodes'; a witness may renew its own all the same.
	ctx := c.Context
	if c.IsSet("timeout") {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeoutCause(ctx, c.Duration("timeout"), errors.New("it took longer than --timeout"))
		defer cancel()
	}
	if err := local.RenewCertificates(ctx); err != nil {
		return err
	}
	certs, err := local.Certificates(ctx)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, certs)
	}
	fmt.Println("Renewed; every part was told to load them.")
	return printCerts(os.Stdout, certs)
}
