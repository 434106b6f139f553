package main

import (
	"encoding/json"
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

var allowEvenFlag = &cli.BoolFlag{Name: "allow-even", Usage: "accept that an even number of etcd voters remains"}

func memberCommand() *cli.Command {
	return &cli.Command{
		Name: "member", Category: "cluster", Usage: "show, remove and replace the cluster's nodes",
		Subcommands: []*cli.Command{
			{Name: "list", Usage: "show the nodes, and what in the cluster belongs to none", Flags: []cli.Flag{jsonFlag}, Action: listMembers},
			{
				Name: "remove", Usage: "take another node out of the cluster, dead or alive", ArgsUsage: "NAME",
				Description: "A node that answers hands over, stops its PostgreSQL and leaves; one that does not is told when it comes back.\n" +
					"What is left of a node that is none, by the name or the id that pgha member list shows, goes too.",
				Flags:  append([]cli.Flag{allowEvenFlag}, operationFlags...),
				Action: removeMember,
			},
			{
				Name: "replace", Usage: "make the token with which a new node takes the place of one that is gone for good", ArgsUsage: "NAME",
				Description: "The old node is taken out in the moment in which the new one joins, be it with the same name and address or with others.\n" +
					"If the old one answers again before that, the join is refused.",
				Flags: append([]cli.Flag{
					&cli.BoolFlag{Name: "witness", Usage: "the node to replace is a witness"},
					&cli.DurationFlag{Name: "ttl", Usage: "how long the token can be used, as 30m or 24h", Value: cluster.DefaultTokenTTL},
				}, timeoutFlag, jsonFlag),
				Action: replaceMember,
			},
		},
	}
}

func oneName(c *cli.Context) (string, error) {
	if c.NArg() != 1 {
		return "", fmt.Errorf("%s needs one node's NAME: see pgha member list", strings.TrimPrefix(c.Command.HelpName, "pgha "))
	}
	return c.Args().First(), nil
}

func listMembers(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	l, err := node.NewLocal(node.DefaultPaths()).MemberList(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, l)
	}
	printMembers(os.Stdout, l)
	return nil
}

func printMembers(w io.Writer, l node.MemberList) {
	t := tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "NAME\tROLE\tADDRESS\tVERSION\tSTATE\tETCD\tSINCE")
	for _, m := range l.Members {
		etcd := m.Etcd
		if m.EtcdLeader {
			etcd += " (leader)"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", m.Name, firstOf(m.Postgres, string(m.Role)), m.Address, firstOf(m.Version, "-"), m.State, etcd, m.Since.Local().Format(time.DateTime))
	}
	_ = t.Flush() // to a terminal or memory of our own; nobody to report a failed write to
	for _, g := range l.Ghosts {
		fmt.Fprintf(w, "\n%s\n  -> %s\n", g.What, g.Mend)
	}
	if len(l.Former) == 0 {
		return
	}
	fmt.Fprintln(w, "\nMembers once:")
	t = tabwriter.NewWriter(w, 0, 4, 2, ' ', 0)
	for _, f := range l.Former {
		fmt.Fprintf(t, "  %s\t%s\t%s\tuntil %s\t%s (%s)\n", f.Name, f.Role, f.Addr, f.RemovedAt.Local().Format(time.DateTime), f.Why, firstOf(f.By, "by itself"))
	}
	_ = t.Flush()
}

func removeMember(c *cli.Context) error {
	name, err := oneName(c)
	if err != nil {
		return err
	}
	question := fmt.Sprintf("This takes %s out of the cluster for good: its PostgreSQL is stopped, its data stays where it is.\nGo on?", name)
	if err := confirm(c.Bool("yes"), question); err != nil {
		return err
	}
	return operate(c, "member-remove", node.MemberRemoveRequest{Name: name, AllowEven: c.Bool("allow-even")})
}

func replaceMember(c *cli.Context) error {
	name, err := oneName(c)
	if err != nil {
		return err
	}
	if c.Duration("ttl") <= 0 {
		return errors.New("--ttl must be more than nothing: leave it out for a day")
	}
	req := node.MemberReplaceRequest{Name: name, TTL: c.Duration("ttl")}
	if c.Bool("witness") {
		req.Role = cluster.RoleWitness
	}
	answer, err := perform(c, newProgress(), "member-replace", req)
	if err != nil {
		return err
	}
	var a node.TokenAnswer
	if err := json.Unmarshal(answer, &a); err != nil {
		return fmt.Errorf("decode result: %w", err)
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, a)
	}
	join := "pgha join "
	if a.Role == cluster.RoleWitness {
		join += "--witness "
	}
	fmt.Printf("On the new host:\n\n%s%s\n\n%s is taken out when it joins. The token can be used until %s. Its id is %s.\n",
		join, a.Token, name, a.Expires.Local().Format("2006-01-02 15:04"), a.ID)
	return nil
}
