package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

func tokenCommand() *cli.Command {
	return &cli.Command{
		Name: "token", Category: "cluster", Usage: "make, list and revoke join tokens",
		Subcommands: []*cli.Command{
			{
				Name: "create", Usage: "make a token for a new node; it is shown once",
				Flags: []cli.Flag{
					&cli.BoolFlag{Name: "witness", Usage: "for a witness instead of a data node"},
					&cli.StringFlag{Name: "name", Usage: "only a node of this `NAME` may use it"},
					&cli.DurationFlag{Name: "ttl", Usage: "how long it can be used, as 30m or 24h", Value: cluster.DefaultTokenTTL},
					&cli.IntFlag{Name: "uses", Usage: "how many nodes may use it", Value: 1},
					jsonFlag,
				},
				Action: createToken,
			},
			{Name: "list", Usage: "list the tokens, without their secrets", Flags: []cli.Flag{jsonFlag}, Action: listTokens},
			{Name: "revoke", Usage: "make a token useless", ArgsUsage: "ID", Flags: []cli.Flag{jsonFlag}, Action: revokeToken},
		},
	}
}

func createToken(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	// In the request 0 stands for the default.
	if c.Duration("ttl") <= 0 || c.Int("uses") <= 0 {
		return errors.New("--ttl and --uses must be more than nothing: leave them out for a day and one node")
	}
	req := node.TokenRequest{Role: cluster.RoleData, Name: c.String("name"), TTL: c.Duration("ttl"), Uses: c.Int("uses")}
	join := "pgha join "
	if c.Bool("witness") {
		req.Role, join = cluster.RoleWitness, "pgha join --witness "
	}
	a, err := node.NewLocal(node.DefaultPaths()).CreateToken(c.Context, req)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, a)
	}
	fmt.Printf("%s%s\n\nIt can be used until %s. Its id is %s.\n", join, a.Token, a.Expires.Local().Format("2006-01-02 15:04"), a.ID)
	return nil
}

func listTokens(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	tokens, err := node.NewLocal(node.DefaultPaths()).Tokens(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, tokens)
	}
	if len(tokens) == 0 {
		fmt.Println("There are no tokens. Make one: pgha token create [--witness]")
		return nil
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "ID\tROLE\tFOR\tSTATE\tUSES LEFT\tEXPIRES\tMADE ON\tUSED BY")
	for _, k := range tokens {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%d\t%s\t%s\t%s\n", k.ID, k.Role, firstOf(k.Name, "any"), k.State, k.UsesLeft,
			k.Expires.Local().Format(time.DateTime), k.CreatedBy, strings.Join(k.UsedBy, ","))
	}
	return t.Flush()
}

func revokeToken(c *cli.Context) error {
	if c.NArg() != 1 {
		return errors.New("token revoke needs one token's ID: see pgha token list")
	}
	id := c.Args().First()
	if err := node.NewLocal(node.DefaultPaths()).RevokeToken(c.Context, id); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, map[string]string{"revoked": id})
	}
	fmt.Printf("Token %s can no longer be used.\n", id)
	return nil
}
