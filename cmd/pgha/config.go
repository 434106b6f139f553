package main

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func configCommand() *cli.Command {
	return &cli.Command{
		Name: "config", Category: "cluster", Usage: "show and change the cluster-wide settings",
		Subcommands: []*cli.Command{
			{Name: "show", Usage: "list all settings", Flags: []cli.Flag{jsonFlag}, Action: showConfig},
			{Name: "get", Usage: "print one setting's value", ArgsUsage: "KEY", Action: getConfig},
			{Name: "set", Usage: "change a setting on all nodes, while they run", ArgsUsage: "KEY=VALUE", Flags: []cli.Flag{jsonFlag}, Action: setConfig},
		},
	}
}

func showConfig(c *cli.Context) error {
	if err := noArgs(c); err != nil {
		return err
	}
	values, err := node.NewLocal(node.DefaultPaths()).Config(c.Context)
	if err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, values)
	}
	t := tabwriter.NewWriter(os.Stdout, 0, 4, 2, ' ', 0)
	fmt.Fprintln(t, "KEY\tVALUE\tWHAT IT IS")
	for _, v := range values {
		fmt.Fprintf(t, "%s\t%s\t%s\n", v.Key, v.Value, v.Help)
	}
	return t.Flush()
}

func getConfig(c *cli.Context) error {
	if c.NArg() != 1 {
		return errors.New("config get needs one KEY: see pgha config show")
	}
	values, err := node.NewLocal(node.DefaultPaths()).Config(c.Context)
	if err != nil {
		return err
	}
	for _, v := range values {
		if v.Key == c.Args().First() {
			fmt.Println(v.Value)
			return nil
		}
	}
	return fmt.Errorf("there is no setting %q: see pgha config show", c.Args().First())
}

func setConfig(c *cli.Context) error {
	key, value, ok := strings.Cut(c.Args().First(), "=")
	if c.NArg() != 1 || !ok || key == "" {
		return errors.New("config set needs one KEY=VALUE, behind any flags, as profile=steady: see pgha config show")
	}
	if err := node.NewLocal(node.DefaultPaths()).SetConfig(c.Context, node.ConfigChange{Key: key, Value: value}); err != nil {
		return err
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, map[string]string{"key": key, "value": value})
	}
	fmt.Printf("%s is %s now. All nodes follow by themselves.\n", key, value)
	return nil
}
