package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/node"
)

const (
	// hereWithin is how long this host's daemon may take to become the new version,
	// or the one before again.
	hereWithin = 4 * time.Minute
	// lockWithin is how long the lock of an operation may outlive a daemon.
	lockWithin = 30 * time.Second
)

func upgradeCommand() *cli.Command {
	return &cli.Command{
		Name: "upgrade", Category: "operations",
		Usage: "run another version of pgha on every node, without a restart of PostgreSQL",
		Description: "Bring the new pgha to one data node and run it there: ./pgha upgrade. It goes to every\n" +
			"node and takes over from the version that runs, a node at a time, the witness first and the\n" +
			"primary last. PostgreSQL, Patroni and HAProxy go on; no client notices. A version that does not\n" +
			"become healthy on a node gives way to the one before by itself, and the upgrade ends there.\n" +
			"After an interruption, repeat the command.",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "binary", Usage: "the new pgha, a `FILE` on this host", DefaultText: "the one that runs this command"},
			&cli.StringFlag{Name: "node", Usage: "only this `NODE`, whatever state the others are in"},
			&cli.BoolFlag{Name: "allow-older", Usage: "go back to an older version, or to one of which that cannot be told"},
			&cli.BoolFlag{Name: "restart", Usage: "run the version that runs anew, on this host alone"},
		}, operationFlags...),
		Subcommands: []*cli.Command{upgradePostgresCommand()},
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			if err := node.CheckRoot(); err != nil {
				return err
			}
			if c.Bool("restart") {
				return runAnew(c)
			}
			return runUpgrade(c)
		},
	}
}

func runUpgrade(c *cli.Context) error {
	file := c.String("binary")
	if file == "" {
		var err error
		if file, err = os.Executable(); err != nil {
			return fmt.Errorf("find this program's path: %w", err)
		}
	}
	file, err := filepath.Abs(file)
	if err != nil {
		return fmt.Errorf("resolve %s: %w", file, err)
	}
	info, sum, err := node.Inspect(c.Context, file)
	if err != nil {
		return err
	}
	if err := askUpgrade(c, info.Version); err != nil {
		return err
	}
	req := node.UpgradeRequest{File: file, SHA256: sum, Version: info.Version, Node: c.String("node"), AllowOlder: c.Bool("allow-older")}
	result, err := upgradeAll(c, newProgress(), req)
	if err != nil {
		return err
	}
	return finish(c, "upgrade", result)
}

// askUpgrade asks whether to go on, if there is anything to do.
func askUpgrade(c *cli.Context, version string) error {
	ctx, cancel := context.WithTimeout(c.Context, 15*time.Second)
	defer cancel()
	s, err := node.NewLocal(node.DefaultPaths()).Status(ctx)
	if err != nil {
		return err
	}
	for _, m := range s.Members {
		if m.Version != version {
			return confirm(c.Bool("yes"), fmt.Sprintf("%s\nThis runs pgha %s on %s. PostgreSQL, Patroni and HAProxy go on, and no client notices. Go on?",
				node.VersionsText(s.Members), version, firstOf(c.String("node"), "every node, one after the other")))
		}
	}
	return nil
}

// upgradeAll runs the operation. This host's daemon ends with its own part and the
// new one goes on from there: then the operation is asked for once more.
func upgradeAll(c *cli.Context, p *progress, req node.UpgradeRequest) (node.UpgradeResult, error) {
	all := node.UpgradeResult{Version: req.Version, Upgraded: []string{}}
	var patience time.Time // until when somebody else's lock may be what is left of ours
	for {
		answer, err := perform(c, p, "upgrade", req)
		if errors.Is(err, cluster.ErrConflict) && time.Now().Before(patience) && pause(c.Context, time.Second) {
			continue
		}
		if err != nil {
			return all, err
		}
		var r node.UpgradeResult
		if err := json.Unmarshal(answer, &r); err != nil {
			return all, fmt.Errorf("decode result: %w", err)
		}
		all.Upgraded = append(all.Upgraded, r.Upgraded...)
		if r.Here == nil {
			return all, nil
		}
		if err := waitHere(c.Context, p, r.Here.Started, func(n node.Report) (bool, error) {
			if u := n.Upgrade; u != nil && u.ID == r.Here.ID && u.Failed != "" {
				return false, fmt.Errorf("this host runs %s again, as %s has failed: %s", n.Version, u.Version, u.Failed)
			}
			return n.Upgrade == nil && n.Version == r.Here.Version, nil
		}); err != nil {
			return all, err
		}
		p.say("this host runs %s", r.Here.Version)
		if req.Node != "" {
			return all, nil
		}
		patience = time.Now().Add(lockWithin)
	}
}

// runAnew has this host's daemon execute its own program again.
func runAnew(c *cli.Context) error {
	if c.IsSet("binary") || c.IsSet("node") || c.IsSet("allow-older") {
		return errors.New("--restart runs the version of this host anew: it goes with no other choice")
	}
	p, before := newProgress(), time.Now()
	if _, err := perform(c, p, "run-anew", struct{}{}); err != nil {
		return err
	}
	if err := waitHere(c.Context, p, before, func(n node.Report) (bool, error) { return n.Waiting == "", nil }); err != nil {
		return err
	}
	return finish(c, "restart", struct{}{})
}

// waitHere waits until this host's daemon was started after a moment and done
// accepts what it reports.
func waitHere(ctx context.Context, p *progress, after time.Time, done func(node.Report) (bool, error)) error {
	ctx, cancel := context.WithTimeoutCause(ctx, hereWithin, fmt.Errorf("not within %s", hereWithin))
	defer cancel()
	local := node.NewLocal(node.DefaultPaths())
	var last error
	for {
		try, end := context.WithTimeout(ctx, 5*time.Second)
		r, err := local.Report(try)
		end()
		switch {
		case err != nil:
			last = err
		case !r.Started.After(after):
			last = errors.New("the one before has not ended")
		default:
			ok, err := done(r)
			if ok || err != nil {
				return err
			}
			last = fmt.Errorf("it is not healthy yet %s", r.Waiting)
		}
		p.say("waiting for this host's daemon to start anew")
		if !pause(ctx, 200*time.Millisecond) {
			return fmt.Errorf("%w: this host's daemon: %w. It goes on by itself: see pgha status, and repeat the command", context.Cause(ctx), last)
		}
	}
}

// pause waits for d and says whether ctx still runs.
func pause(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
