package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"pgha/cluster"
	"pgha/internal/host"
	"pgha/node"
	"pgha/systemd"
)

// nodeFlags are those that init and join share.
func nodeFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "name", Usage: "this node's `NAME` (a-z, 0-9, _); default: the host's name"},
		&cli.StringFlag{Name: "address", Usage: "`IP` at which the other nodes reach this one; default: that of the default route"},
		&cli.StringSliceFlag{Name: "san", Usage: "another `NAME` or IP that clients connect to, such as the load balancer's (repeatable)"},
		&cli.StringSliceFlag{Name: "port", Usage: "another port, as `NAME=N`; names: postgres, read_write, read_only, patroni, etcd_client, etcd_peer, stats, health, api"},
		&cli.StringFlag{Name: "memory", Usage: "size PostgreSQL to this much memory, as `4GB`; default: all of the host's"},
		&cli.BoolFlag{Name: "no-service", Usage: "run in the foreground instead of as a systemd unit"},
		yesFlag, jsonFlag,
	}
}

func initCommand() *cli.Command {
	return &cli.Command{
		Name: "init", Category: "cluster",
		Usage: "make this host the first node of a new cluster",
		Flags: append([]cli.Flag{
			&cli.StringFlag{Name: "cluster", Value: "main", Usage: "`NAME` of the cluster"},
			&cli.StringSliceFlag{Name: "clients", Usage: "`NETWORK` that applications connect from, as 10.0.0.0/16 (repeatable); default: this host's own network"},
			&cli.StringSliceFlag{Name: "probe", Usage: "`IP` from which a load balancer probes (repeatable)", Value: cli.NewStringSlice("168.63.129.16")},
			&cli.BoolFlag{Name: "async", Usage: "do not wait for the replica at each commit: faster, and the loss of the primary may lose the last commits"},
			&cli.StringFlag{Name: "profile", Value: "fast", Usage: "timers: fast, steady (slow disks) or wide (distant sites)"},
			&cli.StringFlag{Name: "adopt", Usage: "take over the existing PostgreSQL data directory `DIR`"},
		}, nodeFlags()...),
		Action: func(c *cli.Context) error {
			if err := noArgs(c); err != nil {
				return err
			}
			return runInit(c)
		},
	}
}

func runInit(c *cli.Context) error {
	if err := node.CheckRoot(); err != nil {
		return err
	}
	if err := checkService(c); err != nil {
		return err
	}
	paths := node.DefaultPaths()
	again, err := node.CheckFresh(paths, true)
	if err != nil {
		return err
	}
	cfg, settings, err := initConfig(c)
	if err != nil {
		return err
	}
	adopt := c.String("adopt")
	if adopt != "" {
		if adopt, err = filepath.Abs(adopt); err != nil {
			return fmt.Errorf("resolve %s: %w", c.String("adopt"), err)
		}
	}
	p := newProgress()
	undo, err := prepareHost(c, p, &cfg, paths, adopt, 0, again != nil)
	if err != nil {
		return err
	}
	if again != nil {
		p.say("an earlier pgha init was interrupted: starting over")
		if err := node.RemovePrepared(paths); err != nil {
			return errors.Join(err, undo())
		}
	}
	p.say("making the certificate authority, certificates and secrets of cluster %q", cfg.Cluster)
	if _, err := node.PrepareInit(paths, cfg, settings, c.StringSlice("san"), adopt); err != nil {
		return errors.Join(err, node.RemovePrepared(paths), undo())
	}
	return startAndWait(c, p, paths, func(ctx context.Context) error { return announceInit(ctx, c, p, paths) })
}

// initConfig makes the node's configuration and the cluster's settings of the
// flags.
func initConfig(c *cli.Context) (node.Config, cluster.Settings, error) {
	settings := cluster.Settings{Async: c.Bool("async"), Profile: c.String("profile")}
	if err := cluster.ValidateName("cluster name", c.String("cluster")); err != nil {
		return node.Config{}, settings, fmt.Errorf("--cluster: %w", err)
	}
	cfg, err := nodeConfig(c, cluster.RoleData)
	if err != nil {
		return cfg, settings, err
	}
	cfg.Cluster = c.String("cluster")
	for _, s := range c.StringSlice("clients") {
		net, err := netip.ParsePrefix(s)
		if err != nil {
			return cfg, settings, fmt.Errorf("--clients %q is not a network: write it as 10.0.0.0/16", s)
		}
		settings.ClientNets = append(settings.ClientNets, net.Masked())
	}
	if len(settings.ClientNets) == 0 {
		net, err := host.NetworkOf(cfg.Address)
		if err != nil {
			return cfg, settings, err
		}
		settings.ClientNets = []netip.Prefix{net}
	}
	for _, s := range c.StringSlice("probe") {
		a, err := netip.ParseAddr(s)
		if err != nil {
			return cfg, settings, fmt.Errorf("--probe %q is not an IP address", s)
		}
		settings.ProbeAddrs = append(settings.ProbeAddrs, a)
	}
	if err := settings.Validate(); err != nil {
		return cfg, settings, err
	}
	return cfg, settings, nil
}

// checkService refuses a host on which no unit can be made, before anything is
// changed there.
func checkService(c *cli.Context) error {
	if !c.Bool("no-service") && !systemd.Available() {
		return errors.New("this host was not booted with systemd: run it in the foreground with --no-service, and have pgha run started at each boot")
	}
	return nil
}

// nodeConfig makes a node's configuration of the flags that init and join share.
func nodeConfig(c *cli.Context, role cluster.NodeRole) (node.Config, error) {
	cfg := node.NewConfig()
	cfg.Role, cfg.Name = role, c.String("name")
	if cfg.Name == "" {
		name, err := os.Hostname()
		if err != nil {
			return cfg, fmt.Errorf("read host name: %w", err)
		}
		name, _, _ = strings.Cut(strings.ToLower(name), ".")
		cfg.Name = strings.ReplaceAll(name, "-", "_")
	}
	if err := cluster.ValidateNodeName(cfg.Name); err != nil {
		return cfg, fmt.Errorf("%w (choose one with --name)", err)
	}
	var err error
	if s := c.String("address"); s != "" {
		if cfg.Address, err = netip.ParseAddr(s); err != nil {
			return cfg, fmt.Errorf("--address %q is not an IP address", s)
		}
	} else if cfg.Address, err = host.DefaultAddress(); err != nil {
		return cfg, fmt.Errorf("%w (choose one with --address)", err)
	}
	if s := c.String("memory"); s != "" {
		if _, err := node.ParseBytes(s); err != nil {
			return cfg, fmt.Errorf("--memory: %w", err)
		}
		cfg.Postgres.Memory = s
	}
	for _, s := range c.StringSlice("port") {
		if err := cfg.SetPort(s); err != nil {
			return cfg, fmt.Errorf("--port %s: %w", s, err)
		}
	}
	if err := cfg.Validate(); err != nil {
		return cfg, err
	}
	for _, s := range c.StringSlice("san") {
		if err := cluster.ValidateSAN(s); err != nil {
			return cfg, fmt.Errorf("--san: %w", err)
		}
	}
	return cfg, node.CheckAddress(cfg)
}

// prepareHost installs what is missing, stops what would compete and checks
// that the node's ports and directories are free. It asks once, for all of it.
// The function it returns puts the distribution's services back.
func prepareHost(c *cli.Context, p *progress, cfg *node.Config, paths node.Paths, adopt string, major int, again bool) (undo func() error, err error) {
	undo = func() error { return nil }
	if err := node.CheckDisk(paths, *cfg); err != nil {
		return undo, err
	}
	missing := node.MissingPackages(cfg.Role)
	if err := confirm(c.Bool("yes"), plan(cfg, missing)); err != nil {
		if len(missing) > 0 {
			err = fmt.Errorf("%s must be installed: %w", packageNames(missing), err)
		}
		return undo, err
	}
	if len(missing) > 0 {
		p.say("installing %s", packageNames(missing))
		if err := host.InstallPackages(c.Context, missing, os.Stderr); err != nil {
			return undo, err
		}
	}
	if undo, err = quiesce(c.Context, p, paths, cfg.Role); err != nil {
		return undo, err
	}
	if err := checkHost(c.Context, cfg, paths, adopt, major, again); err != nil {
		return undo, errors.Join(err, undo())
	}
	return undo, nil
}

func plan(cfg *node.Config, missing []host.Package) string {
	var b strings.Builder
	fmt.Fprintf(&b, "This makes %s the %s node %q (address %s).\n", hostname(), cfg.Role, cfg.Name, cfg.Address)
	if len(missing) > 0 {
		fmt.Fprintf(&b, "It installs %s with the distribution's package manager.\n", packageNames(missing))
	}
	if cfg.Role == cluster.RoleData {
		b.WriteString("It stops and disables the distribution's own postgresql, patroni, haproxy and etcd services.\n")
	}
	b.WriteString("Go on?")
	return b.String()
}

func packageNames(pkgs []host.Package) string {
	var names []string
	for _, p := range pkgs {
		names = append(names, p.Name)
	}
	return strings.Join(names, ", ")
}

func hostname() string {
	name, err := os.Hostname()
	if err != nil {
		return "this host"
	}
	return name
}

// quiesce stops and disables the distribution's services, and returns how to
// put them back.
func quiesce(ctx context.Context, p *progress, paths node.Paths, role cluster.NodeRole) (func() error, error) {
	undo := func() error { return nil }
	if !systemd.Available() {
		return undo, nil
	}
	patterns := systemd.CompetingUnits()
	if role == cluster.RoleWitness {
		patterns = systemd.CompetingWitnessUnits()
	}
	// On a fresh host nothing has made the directory of the record yet.
	if err := os.MkdirAll(paths.Lib, 0o711); err != nil {
		return undo, fmt.Errorf("make state directory: %w", err)
	}
	changes, err := systemd.Quiesce(ctx, paths.Units(), patterns...)
	undo = func() error {
		err := systemd.Restore(context.WithoutCancel(ctx), paths.Units())
		_ = os.Remove(paths.Lib) // fails, and stays, if there is anything in it
		return err
	}
	if err != nil {
		return undo, errors.Join(err, undo())
	}
	for _, ch := range changes {
		if ch.WasActive {
			p.say("stopped and disabled %s", ch.Unit)
		} else {
			p.say("disabled %s", ch.Unit)
		}
	}
	return undo, nil
}

// checkHost looks for everything that would keep the node from starting. major
// is the version of PostgreSQL that the cluster runs, 0 if there is none yet.
func checkHost(ctx context.Context, cfg *node.Config, paths node.Paths, adopt string, major int, again bool) error {
	if cfg.Role == cluster.RoleData {
		if adopt != "" {
			info, err := node.CheckAdoptable(adopt)
			if err != nil {
				return err
			}
			major = info.Major
		}
		if err := node.CheckPatroni(ctx); err != nil {
			return err
		}
		pg, err := node.ChoosePostgres(major)
		if err != nil {
			return err
		}
		cfg.Postgres.BinDir, cfg.Postgres.DataDir = pg.BinDir, node.DefaultDataDir(paths, pg.Major)
		if adopt != "" {
			cfg.Postgres.DataDir = adopt
		} else if err := node.CheckDataDir(cfg.Postgres.DataDir); err != nil && !again {
			return err
		}
	}
	if err := node.CheckPorts(*cfg); err != nil {
		return err
	}
	return node.CheckDisk(paths, *cfg)
}

// startAndWait starts the node, as a unit or in this process, and runs ready
// beside it. In the foreground it goes on until the process is asked to stop.
func startAndWait(c *cli.Context, p *progress, paths node.Paths, ready func(context.Context) error) error {
	if !c.Bool("no-service") {
		bin, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find this program's path: %w", err)
		}
		p.say("installing and starting pgha.service")
		if err := systemd.Install(c.Context, bin); err != nil {
			return err
		}
		if err := systemd.Start(c.Context); err != nil {
			return fmt.Errorf("%w: see journalctl -u pgha", err)
		}
		return ready(c.Context)
	}
	ctx, cancel := context.WithCancelCause(c.Context)
	defer cancel(nil)
	ran := make(chan error, 1)
	go func() {
		err := runNode(ctx, paths, io.Discard) // progress is on the terminal, the log in its file
		ran <- err
		cancel(err)
	}()
	if err := ready(ctx); err != nil {
		if cause := context.Cause(ctx); c.Context.Err() == nil && ctx.Err() != nil && cause != nil {
			return cause // the daemon itself has failed
		}
		if c.Context.Err() == nil {
			// The node may well come up later: it stays, as a unit would.
			fmt.Fprintln(os.Stderr, "pgha: "+err.Error())
		}
	}
	return <-ran
}

// announceInit waits until clients can write, then tells what comes next.
func announceInit(ctx context.Context, c *cli.Context, p *progress, paths node.Paths) error {
	s, err := waitStatus(ctx, p, paths, 10*time.Minute, func(s node.Status) (bool, string) {
		if s.Leader == s.SeenBy {
			return true, ""
		}
		return false, firstOf(strings.Join(s.Problems, "; "), s.Waiting, selfState(s), s.Verdict)
	})
	if err != nil {
		return err
	}
	local := node.NewLocal(paths)
	data, err := local.CreateToken(ctx, node.TokenRequest{Role: cluster.RoleData})
	if err != nil {
		return fmt.Errorf("create join token: %w", err)
	}
	witness, err := local.CreateToken(ctx, node.TokenRequest{Role: cluster.RoleWitness})
	if err != nil {
		return fmt.Errorf("create join token: %w", err)
	}
	p.say("PostgreSQL accepts writes")
	if c.Bool("json") {
		return printJSON(os.Stdout, map[string]any{"cluster": s.Cluster, "cluster_id": s.ClusterID, "node": s.SeenBy,
			"ca": node.CAPath(paths), "read_write": s.ReadWrite, "join_token": data, "witness_token": witness})
	}
	fmt.Printf(`
Cluster %q runs: node %s accepts writes on %s, over TLS only.

On the second VM:        pgha join %s

On a small third VM:     pgha join --witness %s

Each token works once, until %s. The CA for clients (sslrootcert) is %s.
Make a database and a user for your application: pgha psql
`, s.Cluster, s.SeenBy, strings.Join(s.ReadWrite, ", "), data.Token, witness.Token, data.Expires.Local().Format("2006-01-02 15:04"), node.CAPath(paths))
	return nil
}

func selfState(s node.Status) string {
	for _, m := range s.Members {
		if m.Name == s.SeenBy && m.State != "" {
			return "PostgreSQL: " + m.State
		}
	}
	return ""
}

func firstOf(texts ...string) string {
	for _, t := range texts {
		if t != "" {
			return t
		}
	}
	return ""
}
