package main

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

// waitFlag bounds an operation that waits for its result.
var waitFlag = &cli.DurationFlag{Name: "timeout", Value: 2 * time.Minute, Usage: "give up waiting after this long; what is begun goes on, and is said"}

func switchoverCommand() *cli.Command {
	return &cli.Command{
		Name: "switchover", Category: "operations", ArgsUsage: "[NODE]",
		Usage: "hand the primary over to a replica, the best one or NODE, without losing anything",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "at", Usage: "carry it out at `TIME`: 2026-01-31T03:00:00Z, or +2h from now"},
			&cli.BoolFlag{Name: "cancel", Usage: "cancel the one that is planned"},
			waitFlag, jsonFlag,
		},
		Action: func(c *cli.Context) error {
			target, err := optionalNode(c)
			if err != nil {
				return err
			}
			req := node.SwitchoverRequest{Target: target, Cancel: c.Bool("cancel")}
			if c.IsSet("at") {
				if req.At, err = parseAt(c.String("at"), time.Now()); err != nil {
					return err
				}
			}
			if req.Cancel && (target != "" || c.IsSet("at")) {
				return errors.New("--cancel takes neither NODE nor --at: there is one planned switchover at most")
			}
			return operate(c, "switchover", req)
		},
	}
}

func failoverCommand() *cli.Command {
	return &cli.Command{
		Name: "failover", Category: "operations", ArgsUsage: "[NODE]",
		Usage:       "promote a replica where there is no primary and none comes by itself",
		Description: "Shows what each node lacks and what its promotion would lose. While a primary serves, use switchover.",
		Flags: []cli.Flag{
			&cli.BoolFlag{Name: "allow-data-loss", Usage: "promote a node that may lack acknowledged commits"},
			waitFlag, yesFlag, jsonFlag,
		},
		Action: func(c *cli.Context) error {
			target, err := optionalNode(c)
			if err != nil {
				return err
			}
			req := node.FailoverRequest{Target: target, AllowDataLoss: c.Bool("allow-data-loss")}
			if req.AllowDataLoss && !c.Bool("yes") {
				p, err := node.NewLocal(node.DefaultPaths()).PlanFailover(c.Context, req)
				if err != nil {
					return err
				}
				if err := confirm(false, failoverText(p)); err != nil {
					return err
				}
			}
			return operate(c, "failover", req)
		},
	}
}

// failoverText asks whether to promote a node, and says what each would lose.
func failoverText(p node.FailoverPlan) string {
	var b strings.Builder
	for _, c := range p.Candidates {
		fmt.Fprintf(&b, "  %s\n", c)
	}
	fmt.Fprintf(&b, "No primary serves as far as this node sees. Commits that clients were told are safe may be lost for good. Promote %s all the same?", p.Promotes.Name)
	return b.String()
}

func pauseCommand() *cli.Command {
	return pausing("pause", "switch automatic failover off, until pgha resume", true)
}

func resumeCommand() *cli.Command {
	return pausing("resume", "switch automatic failover on again", false)
}

func pausing(name, usage string, pause bool) *cli.Command {
	return &cli.Command{
		Name: name, Category: "operations", Usage: usage, Flags: []cli.Flag{waitFlag, jsonFlag},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			return operate(c, name, node.PauseRequest{Pause: pause})
		},
	}
}

// optionalNode is a command's only argument, "" if there is none.
func optionalNode(c *cli.Context) (string, error) {
	if c.NArg() > 1 || strings.HasPrefix(c.Args().First(), "-") {
		return "", fmt.Errorf("%s takes one NODE at most, but was given %s", strings.TrimPrefix(c.Command.HelpName, "pgha "), strings.Join(c.Args().Slice(), " "))
	}
	return c.Args().First(), nil
}

// parseAt reads a point in time, or with + how long from now.
func parseAt(s string, now time.Time) (time.Time, error) {
	if rest, ok := strings.CutPrefix(s, "+"); ok {
		if d, err := time.ParseDuration(rest); err == nil && d > 0 {
			return now.Add(d), nil
		}
	} else if t, err := time.Parse(time.RFC3339, s); err == nil {
		return t, nil
	}
	return time.Time{}, fmt.Errorf("--at %q is no time: write it as 2026-01-31T03:00:00Z (with its zone) or +2h", s)
}
