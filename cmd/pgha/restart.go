package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/node"
)

func restartCommand() *cli.Command {
	return &cli.Command{
		Name: "restart", Category: "operations", ArgsUsage: "[NODE]",
		Usage: "restart PostgreSQL on one node, or with --rolling on all, one after the other",
		Description: "With --rolling replicas come first, each is waited for until it streams and is in sync, and\n" +
			"the primary hands over before its turn: clients see the pause of a switchover. Without it the\n" +
			"primary restarts in its place, and clients wait and lose their sessions.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "rolling", Usage: "replicas first, and the primary hands over before its turn"},
			&cli.BoolFlag{Name: "pending", Usage: "only where changed settings or new versions wait for it"},
		}, operationFlags...),
		Action: func(c *cli.Context) error {
			name, err := optionalNode(c)
			if err != nil {
				return err
			}
			req := node.RestartRequest{Node: name, Rolling: c.Bool("rolling"), Pending: c.Bool("pending")}
			if name != "" && !req.Rolling {
				if err := confirmPrimary(c, name); err != nil {
					return err
				}
			}
			return operate(c, "restart", req)
		},
	}
}

// confirmPrimary asks before the primary is restarted in its place.
func confirmPrimary(c *cli.Context, name string) error {
	s, err := currentStatus(c.Context)
	if err != nil {
		return err
	}
	if s.Leader != name {
		return nil
	}
	err = confirm(c.Bool("yes"), fmt.Sprintf("%s is the primary: its clients lose their sessions, and nobody can write until PostgreSQL is back, for seconds or,\n"+
		"after much writing, minutes. pgha restart --rolling %s hands over first. Restart it in its place?", name, name))
	if err != nil {
		return fmt.Errorf("%s is the primary, and with --rolling it would hand over first: %w", name, err)
	}
	return nil
}

func currentStatus(ctx context.Context) (node.Status, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	return node.NewLocal(node.DefaultPaths()).Status(ctx)
}

func reloadCommand() *cli.Command {
	return &cli.Command{
		Name: "reload", Category: "operations", ArgsUsage: "[NODE]",
		Usage: "have Patroni, PostgreSQL and HAProxy read their configuration again, on one node or all",
		Flags: []cli.Flag{timeoutFlag, jsonFlag},
		Action: func(c *cli.Context) error {
			name, err := optionalNode(c)
			if err != nil {
				return err
			}
			return operate(c, "reload", node.ReloadRequest{Node: name})
		},
	}
}

func reinitCommand() *cli.Command {
	return &cli.Command{
		Name: "reinit", Category: "operations", ArgsUsage: "NODE",
		Usage: "replace a replica's data by a new copy of the primary's",
		Description: "The old data is moved aside, not deleted, for which there must be room. With --discard it is\n" +
			"deleted first. Until the copy is complete, the data is on the primary alone.",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "discard", Usage: "delete the old data first, where there is no room for two copies"},
		}, operationFlags...),
		Action: func(c *cli.Context) error {
			name, err := optionalNode(c)
			if err != nil {
				return err
			}
			if name == "" {
				return errors.New("reinit needs the name of a replica: see pgha status")
			}
			what := fmt.Sprintf("This stops PostgreSQL on %s, moves its data aside and copies the primary's anew.\n", name)
			if c.Bool("discard") {
				what = fmt.Sprintf("This stops PostgreSQL on %s, DELETES its data and copies the primary's anew.\n", name)
			}
			if err := confirm(c.Bool("yes"), what+"Until that is done, "+name+" cannot take over. Go on?"); err != nil {
				return err
			}
			return operate(c, "reinit", node.ReinitRequest{Node: name, Discard: c.Bool("discard")})
		},
	}
}
