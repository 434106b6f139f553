package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

func joinCommand() *cli.Command {
	return &cli.Command{
		Name: "join", Category: "cluster",
		Usage:     "make this host a node of the cluster that gave the TOKEN",
		ArgsUsage: "TOKEN",
		Flags: append([]cli.Flag{
			&cli.BoolFlag{Name: "witness", Usage: "vote only: no PostgreSQL on this host"},
			&cli.StringFlag{Name: "token-file", Usage: "read the token from `FILE` (- for standard input), so that it is on no command line"},
		}, nodeFlags()...),
		Action: runJoin,
	}
}

// readToken takes the token from the argument or a file.
func readToken(c *cli.Context) (cluster.Token, error) {
	text := c.Args().First()
	switch file := c.String("token-file"); {
	case c.NArg() > 1:
		return cluster.Token{}, fmt.Errorf("join takes one token, but was given %d arguments", c.NArg())
	case file != "" && text != "":
		return cluster.Token{}, errors.New("give the token as an argument or with --token-file, not both")
	case file == "-":
		b, err := io.ReadAll(io.LimitReader(os.Stdin, 1<<16))
		if err != nil {
			return cluster.Token{}, fmt.Errorf("read token: %w", err)
		}
		text = string(b)
	case file != "":
		b, err := os.ReadFile(file)
		if err != nil {
			return cluster.Token{}, fmt.Errorf("read token: %w", err)
		}
		text = string(b)
	case text == "":
		return cluster.Token{}, errors.New("join needs the token that pgha init or pgha token create printed: pgha join TOKEN")
	}
	return cluster.ParseToken(strings.TrimSpace(text))
}

func runJoin(c *cli.Context) error {
	if err := node.CheckRoot(); err != nil {
		return err
	}
	if err := checkService(c); err != nil {
		return err
	}
	tok, err := readToken(c)
	if err != nil {
		return err
	}
	role := cluster.RoleData
	if c.Bool("witness") {
		role = cluster.RoleWitness
	}
	if tok.Role != role {
		return fmt.Errorf("this token is for a %s node: %s", tok.Role, map[cluster.NodeRole]string{
			cluster.RoleWitness: "run pgha join --witness TOKEN", cluster.RoleData: "run pgha join TOKEN, without --witness"}[tok.Role])
	}
	if now := time.Now(); now.After(tok.Expires) {
		return fmt.Errorf("this token expired at %s: make a new one with pgha token create", tok.Expires.Local().Format(time.DateTime))
	}
	paths := node.DefaultPaths()
	again, err := node.CheckFresh(paths, false)
	if err != nil {
		return err
	}
	if again != nil && again.ClusterID != tok.ClusterID {
		return fmt.Errorf("an unfinished join of this host is to cluster %s, this token is of cluster %s: clean up with pgha reset first", again.ClusterID, tok.ClusterID)
	}
	cfg, err := joinConfig(c, tok, role)
	if err != nil {
		return err
	}
	p := newProgress()
	p.say("asking %s", strings.Join(tok.Addrs, ", "))
	// Whatever the cluster would refuse is refused before anything is installed.
	j := node.NewJoining(paths, cfg, tok, c.StringSlice("san"))
	if err := cluster.CheckJoin(c.Context, tok, j.Check, cluster.JoinOptions{}); err != nil {
		return err
	}
	undo, err := prepareHost(c, p, &cfg, paths, "", j.PGMajor(), again != nil)
	if err != nil {
		return err
	}
	j.SetConfig(cfg)
	p.say("joining")
	resp, err := cluster.Join(c.Context, tok, func(cluster.Hello) (cluster.JoinRequest, error) { return j.Request() },
		cluster.JoinOptions{Progress: func(s string) { p.say("%s", s) }})
	if err != nil {
		var refused *cluster.Error
		// An earlier attempt may have been taken in, and its answer lost: then the
		// keys are what the cluster knows this node by.
		if again == nil && errors.As(err, &refused) && !refused.Repeatable() {
			return errors.Join(err, j.Undo(), undo())
		}
		return fmt.Errorf("%w\nNothing is lost: run the same command again", err)
	}
	if _, err := j.Finish(resp); err != nil {
		return fmt.Errorf("%w\nNothing is lost: run the same command again", err)
	}
	p.say("the cluster has taken this node in")
	return startAndWait(c, p, paths, func(ctx context.Context) error { return announceJoin(ctx, c, p, paths, role) })
}

// joinConfig makes the configuration; without --address, the one from which
// this host speaks to the cluster is right.
func joinConfig(c *cli.Context, tok cluster.Token, role cluster.NodeRole) (node.Config, error) {
	if c.String("address") == "" {
		for _, a := range tok.Addrs {
			if local, err := localRoute(a); err == nil {
				if err := c.Set("address", local.String()); err != nil {
					return node.Config{}, fmt.Errorf("set address: %w", err)
				}
				break
			}
		}
	}
	return nodeConfig(c, role)
}

func announceJoin(ctx context.Context, c *cli.Context, p *progress, paths node.Paths, role cluster.NodeRole) error {
	s, err := waitStatus(ctx, p, paths, time.Hour, func(s node.Status) (bool, string) {
		for _, m := range s.Members {
			if m.Name != s.SeenBy {
				continue
			}
			switch {
			case len(s.Problems) > 0:
				return false, strings.Join(s.Problems, "; ")
			case s.Waiting != "":
				return false, s.Waiting
			case role == cluster.RoleWitness:
				return m.Etcd != "none" && s.Leader != "", "this node to take part in etcd"
			case m.Postgres == "replica" && m.LagBytes == 0:
				return true, ""
			}
			return false, fmt.Sprintf("the copy of the data (PostgreSQL: %s)", firstOf(m.State, "starting"))
		}
		return false, firstOf(s.Waiting, s.Verdict)
	})
	if err != nil {
		return err
	}
	p.say("this node is part of cluster %q", s.Cluster)
	// The last steps (both new members become voters, the replica is named
	// synchronous) take a few seconds more; they are worth waiting for, because
	// the next thing an operator does is to look at the verdict.
	settled, err := waitStatus(ctx, p, paths, time.Minute, func(s node.Status) (bool, string) {
		return s.Survives || missingMember(s), s.Verdict
	})
	if err == nil {
		s = settled
	}
	if c.Bool("json") {
		return printJSON(os.Stdout, s)
	}
	fmt.Println()
	printStatus(os.Stdout, s)
	return nil
}

// missingMember tells whether only another node can make the cluster
// survivable, so that there is nothing to wait for.
func missingMember(s node.Status) bool {
	data := 0
	for _, m := range s.Members {
		if m.Role == cluster.RoleData {
			data++
		}
	}
	return len(s.Members) < 3 || data < 2
}
