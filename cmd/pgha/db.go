package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"pgha/node"
	"pgha/sqladmin"
)

func dbCommand() *cli.Command {
	return &cli.Command{
		Name: "db", Category: "settings", Usage: "make and list databases for applications",
		Subcommands: []*cli.Command{
			{
				Name: "create", ArgsUsage: "NAME",
				Usage: "make a database that only its owner, and users made for it, can connect to",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "owner", Usage: "the `USER` that it belongs to: make that first with pgha user create", DefaultText: "the superuser"},
					timeoutFlag, jsonFlag,
				},
				Action: func(c *cli.Context) error {
					name, err := theName(c)
					if err == nil {
						err = sqladmin.CheckNewDatabase(name)
					}
					if err != nil {
						return err
					}
					req := node.DatabaseRequest{Name: name, Owner: c.String("owner")}
					answer, err := perform(c, newProgress(), "db-create", req)
					if err != nil || !c.Bool("json") {
						return err
					}
					return printJSON(os.Stdout, answer)
				},
			},
			{Name: "list", Usage: "list the databases", Flags: []cli.Flag{jsonFlag}, Action: listDatabases},
		},
	}
}

// theName returns the only argument of a command.
func theName(c *cli.Context) (string, error) {
	if c.NArg() != 1 || strings.HasPrefix(c.Args().First(), "-") {
		return "", fmt.Errorf("%s needs one NAME: see %s --help", strings.TrimPrefix(c.Command.HelpName, "pgha "), c.Command.HelpName)
	}
	return c.Args().First(), nil
}

func listDatabases(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	list, err := node.NewLocal(node.DefaultPaths()).Databases(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, list)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "DATABASE\tOWNER\tSIZE\tSESSIONS\tWHO MAY CONNECT")
	for _, d := range list {
		who := "its owner and users made for it"
		if d.Public {
			who = "every user"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%d\t%s\n", d.Name, d.Owner, node.FormatBytes(uint64(d.Bytes)), d.Connections, who)
	}
	if err := t.Flush(); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

// passwordFileFlag says where a password is read from; it is never on a command line.
var passwordFileFlag = &cli.StringFlag{Name: "password-file", Usage: "read the password from `FILE`, - for standard input", DefaultText: "a generated one, shown once"}

var errNoPassword = errors.New("there is no password in the file")
