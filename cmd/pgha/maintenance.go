package main

import (
	"github.com/urfave/cli/v2"

	"pgha/node"
)

func maintenanceCommand() *cli.Command {
	return &cli.Command{
		Name: "maintenance", Category: "operations", Usage: "take a node out of service for a while",
		Subcommands: []*cli.Command{
			{
				Name: "enter", ArgsUsage: "[NODE]",
				Usage:       "hand the primary over if NODE (this one) has it, and do not promote NODE until it leaves",
				Description: "It holds across reboots, and status shows it. While a data node is in maintenance, the loss of the primary is not survivable.",
				Flags: []cli.Flag{
					&cli.StringFlag{Name: "reason", Usage: "`TEXT` that status shows"},
					&cli.BoolFlag{Name: "force", Usage: "also on a primary that nobody can take over from: it stays the primary"},
					waitFlag, jsonFlag,
				},
				Action: func(c *cli.Context) error {
					return maintain(c, node.MaintenanceRequest{Reason: c.String("reason"), Force: c.Bool("force")})
				},
			},
			{
				Name: "leave", ArgsUsage: "[NODE]", Usage: "bring NODE (this one) back, and wait until it takes its part again",
				Flags: []cli.Flag{waitFlag, jsonFlag},
				Action: func(c *cli.Context) error {
					return maintain(c, node.MaintenanceRequest{Leave: true})
				},
			},
		},
	}
}

func maintain(c *cli.Context, req node.MaintenanceRequest) (err error) {
	if req.Node, err = optionalNode(c); err != nil {
		return err
	}
	return operate(c, "maintenance", req)
}
