package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/internal/host"
	"pgha/lab/testbed"
	"pgha/node"
)

func demoCommand() *cli.Command {
	return &cli.Command{
		Name:  "demo",
		Usage: "run a real three-node cluster on this machine, pull the plug of its primary, and show what clients see",
		Description: "The hosts are network namespaces of their own; PostgreSQL, Patroni, HAProxy, etcd and nftables are real.\n" +
			"Nothing of this machine is changed, but for packages that are missing.",
		Flags:  []cli.Flag{yesFlag},
		Action: runDemo,
	}
}

func runDemo(c *cli.Context) (err error) {
	if err := noArgs(c); err != nil {
		return err
	}
	if err := node.CheckRoot(); err != nil {
		return err
	}
	if missing := host.MissingPackages(host.RoleData); len(missing) > 0 {
		if err := confirm(c.Bool("yes"), fmt.Sprintf("The demo needs %s, and installs it with the distribution's package manager. Go on?", packageNames(missing))); err != nil {
			return err
		}
		if err := host.InstallPackages(c.Context, missing, os.Stderr); err != nil {
			return err
		}
	}
	bin, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find this program's path: %w", err)
	}
	dir, err := os.MkdirTemp("", "pgha-demo-")
	if err != nil {
		return fmt.Errorf("make directory: %w", err)
	}
	// PostgreSQL's user has to pass through it.
	if err := os.Chmod(dir, 0o711); err != nil {
		return fmt.Errorf("set mode of directory: %w", err)
	}
	bed, err := testbed.New(c.Context, dir, bin)
	if err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	defer func() { err = errors.Join(err, bed.Close(), os.RemoveAll(dir)) }()
	d := demo{bed: bed, p: newProgress(), bin: bin}
	if err := d.play(c.Context); err != nil {
		if c.Context.Err() != nil {
			return errors.New("interrupted; everything is cleaned up")
		}
		return err
	}
	if isTerminal(os.Stdout) && isTerminal(os.Stdin) {
		d.stay(c.Context)
	}
	return nil
}

type demo struct {
	bed *testbed.Bed
	p   *progress
	bin string
}

func (d *demo) play(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 15*time.Minute, errors.New("the demo took longer than 15 minutes"))
	defer cancel()
	if err := d.build(ctx); err != nil {
		return err
	}
	d.p.say("an application writes through port 5432 of n1 and, when that fails, of n2 (TLS, verify-full)")
	w, err := d.bed.StartWriter(ctx, 1, "n1", "n2")
	if err != nil {
		return err
	}
	defer w.Stop()
	if err := d.eachHAProxy(ctx); err != nil {
		return err
	}
	if _, err := w.WaitAck(ctx); err != nil {
		return err
	}
	s, err := d.bed.WaitHealthy(ctx, "witness")
	if err != nil {
		return err
	}
	old := s.Leader
	survivor := "n1"
	if old == "n1" {
		survivor = "n2"
	}
	d.p.say("pulling the plug of %s, the primary", old)
	off := time.Now()
	if err := d.bed.PowerOff(old); err != nil {
		return err
	}
	if s, err = d.bed.WaitStatus(ctx, survivor, survivor+" to become the primary", func(s node.Status) bool { return s.Leader == survivor }); err != nil {
		return err
	}
	if _, err := w.WaitAck(ctx); err != nil {
		return err
	}
	d.p.say("%s is the primary and the application writes again", survivor)
	showDemoStatus(s)
	outage, from, _ := testbed.Outage(w.Writes())
	d.p.say("the application was without a write for %.1f s (from %.1f s after the power cut)", outage.Seconds(), max(0, from.Sub(off).Seconds()))

	d.p.say("%s gets its power back", old)
	if err := d.bed.PowerOn(ctx, old); err != nil {
		return err
	}
	if s, err = d.bed.WaitHealthy(ctx, old); err != nil {
		return err
	}
	writes := w.Stop()
	lost, err := d.bed.Lost(ctx, survivor, writes)
	if err != nil {
		return err
	}
	d.p.say("%s has rejoined as a replica by itself", old)
	showDemoStatus(s)
	if len(lost) > 0 {
		return fmt.Errorf("%d acknowledged commits are lost, the first is %d: this must not happen", len(lost), lost[0])
	}
	fmt.Printf("\nThe primary's host lost its power. Outage for the application: %.1f s. Acknowledged commits: %d, lost: 0.\n",
		outage.Seconds(), len(testbed.Acked(writes)))
	return nil
}

// build types what an operator would type on three VMs.
func (d *demo) build(ctx context.Context) error {
	d.p.say("making three hosts: n1, n2 and witness")
	if err := d.bed.AddHosts(ctx, "n1", "n2", "witness"); err != nil {
		return err
	}
	d.p.say("n1$ pgha init")
	r, err := d.bed.Init(ctx, "n1")
	if err != nil {
		return err
	}
	d.p.say("n2$ pgha join %s...", cut(r.Data.Token))
	if _, err := d.bed.Join(ctx, "n2", r.Data.Token); err != nil {
		return err
	}
	d.p.say("witness$ pgha join --witness %s...", cut(r.Witness.Token))
	if _, err := d.bed.Join(ctx, "witness", r.Witness.Token, "--witness"); err != nil {
		return err
	}
	s, err := d.bed.WaitHealthy(ctx, "n1")
	if err != nil {
		return err
	}
	d.p.say("n1$ pgha status")
	showDemoStatus(s)
	return d.bed.CreateApp(ctx, "n1")
}

// eachHAProxy proves that every data node's port 5432 leads to the primary.
func (d *demo) eachHAProxy(ctx context.Context) error {
	for i, h := range []string{"n1", "n2"} {
		w, err := d.bed.StartWriter(ctx, int64(i+1)<<40, h)
		if err != nil {
			return err
		}
		_, err = w.WaitAck(ctx)
		w.Stop()
		if err != nil {
			return fmt.Errorf("write through %s: %w", h, err)
		}
		d.p.say("wrote through %s:5432", h)
	}
	return nil
}

// stay leaves the cluster up to play with.
func (d *demo) stay(ctx context.Context) {
	var b strings.Builder
	b.WriteString("\nThe cluster stays up until Ctrl-C. In another terminal, as root:\n\n")
	for _, h := range d.bed.Lab.Hosts() {
		role := cluster.RoleData
		if h.Name() == "witness" {
			role = cluster.RoleWitness
		}
		fmt.Fprintf(&b, "  # a shell on %s (%s, %s)\n  nsenter -t %d -m -n -p -u -i\n", h.Name(), role, h.Addr(), h.PID())
	}
	fmt.Fprintf(&b, "\nThere: %s status   %s psql   %s logs -f patroni\n", d.bin, d.bin, d.bin)
	fmt.Print(b.String())
	<-ctx.Done()
	fmt.Println("\ncleaning up")
}

func showDemoStatus(s node.Status) {
	fmt.Println()
	printStatus(os.Stdout, s)
	fmt.Println()
}

// cut shortens a token for the eye: its secret is its end.
func cut(token string) string { return token[:min(len(token), 12)] }
