package main

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func logsCommand() *cli.Command {
	return &cli.Command{
		Name: "logs", Category: "cluster",
		Usage:     "show the log of this node, or of one COMPONENT of it",
		ArgsUsage: "[" + strings.Join(node.LogComponents, "|") + "]",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "follow", Aliases: []string{"f"}, Usage: "go on as lines come"},
			&cli.IntFlag{Name: "lines", Aliases: []string{"n"}, Value: 50, Usage: "how many `LINES` back to begin"},
			jsonFlag,
		},
		BashComplete: func(*cli.Context) { fmt.Println(strings.Join(node.LogComponents, "\n")) },
		Action: func(c *cli.Context) error {
			if c.NArg() > 1 {
				return fmt.Errorf("logs takes one component, but was given %d arguments", c.NArg())
			}
			if c.Int("lines") < 0 {
				return errors.New("--lines must not be negative")
			}
			return node.Logs(c.Context, node.DefaultPaths(), os.Stdout, node.LogQuery{
				Component: c.Args().First(), Lines: c.Int("lines"), Follow: c.Bool("follow"), JSON: c.Bool("json"),
			})
		},
	}
}
