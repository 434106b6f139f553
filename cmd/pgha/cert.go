package main

import (
	"fmt"
	"os"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func certCommand() *cli.Command {
	return &cli.Command{
		Name: "cert", Category: "cluster", Usage: "show this node's certificates, renew them, print the CA for clients",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "list this node's certificates", Flags: []cli.Flag{jsonFlag}, Action: listCerts},
			{Name: "renew", Usage: "renew this node's certificates now; nothing is restarted", Flags: []cli.Flag{jsonFlag}, Action: renewCerts},
			{Name: "ca", Usage: "print the CA certificate that clients need (sslrootcert)", Action: func(c *cli.Context) error {
				if err := noArgs(c); err != nil {
					return err
				}
				pem, err := os.ReadFile(node.CAPath(node.DefaultPaths()))
				if err != nil {
					return fmt.Errorf("read CA certificate: %w", err)
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
	r, err := node.NewLocal(node.DefaultPaths()).Report(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, r.Certs)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "CERTIFICATE\tENDS\tDAYS LEFT")
	for _, k := range r.Certs {
		fmt.Fprintf(t, "%s\t%s\t%d\n", k.Role, k.NotAfter.Local().Format(time.DateTime), int(time.Until(k.NotAfter).Hours()/24))
	}
	return t.Flush()
}

func renewCerts(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	local := node.NewLocal(node.DefaultPaths())
	if err := local.RenewCertificates(c.Context); err != nil {
		return err
	}
	if !c.Bool("json") {
		fmt.Println("Renewed; every part uses the new certificates already.")
	}
	return listCerts(c)
}
