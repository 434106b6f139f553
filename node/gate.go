package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
	"pgha/gate/kernel"
	"pgha/internal/fsx"
	"pgha/patroni"
	"pgha/postgres"
	"pgha/supervisor"
)

// restartPromise is the promise made before a planned restart of the daemon:
// time enough to end, start, and find etcd's leader again.
const restartPromise = 12 * time.Second

// restartingFor bounds how long Patroni is believed that it is restarting
// PostgreSQL on purpose.
const restartingFor = 60 * time.Second

// gatekeeper is what a data node has for its gate.
type gatekeeper struct {
	n       *Node
	gate    *gate.Gate
	kernel  *kernel.Kernel
	watcher *postgres.Watcher
	reactor *reactor
	pass    *gateKernel

	mu   sync.Mutex
	kept []gate.Failover // to this node, not yet stored
}

// newGate prepares the kernel, shut unless an earlier daemon has left it open,
// before anything of the node may start.
func (n *Node) newGate(ctx context.Context) (*gatekeeper, error) {
	k, err := kernel.New(n.opts.Log, n.cfg.Ports.Postgres)
	if err != nil {
		return nil, fmt.Errorf("open nftables (the gate needs them): %w", err)
	}
	if err := k.Install(ctx); err != nil {
		return nil, fmt.Errorf("install the gate: %w", err)
	}
	was, err := k.Read(ctx)
	if err != nil {
		return nil, fmt.Errorf("read the gate: %w", err)
	}
	g := &gatekeeper{n: n, kernel: k, pass: &gateKernel{k: k}}
	g.pass.replica.Store(n.image.Replica)
	c := gate.Config{
		Self: n.cfg.Name, Timers: gate.TimersOf(n.snapshot().Settings.Profile),
		Store: gateStore{n}, Kernel: g.pass, Peers: gatePeers{n}, Actor: g,
		Changed: g.changed, Failover: g.failedOver, Log: n.opts.Log,
		Permit: g.permit, Permitted: n.permitted(),
	}
	now := gate.SystemClock{}.Now()
	switch {
	case was.Open:
		c.Held = now.Add(was.Remaining + gate.Margin(was.Remaining))
	case was.Role != "": // the wall clock has gone ahead: only that keeps it shut
		c.Held = now.Add(restartPromise)
	}
	g.gate = gate.New(c)
	g.watcher = postgres.New(postgres.Config{
		DataDir: n.cfg.Postgres.DataDir, SocketDir: n.paths.pgSocket(), Port: n.cfg.Ports.Postgres, User: patroni.Superuser,
		Every: 100 * time.Millisecond, Timeout: time.Second, HungAfter: 5 * time.Second,
		Now: func() time.Duration { return gate.SystemClock{}.Now().Mono }, Log: n.opts.Log,
	})
	g.reactor = &reactor{n: n, watcher: g.watcher, gate: g.gate}
	return g, nil
}

// openGate installs the gate and starts what keeps it. It goes on while the
// node stops, so that an owner can say that its PostgreSQL is gone; the function
// that it returns ends it.
func (n *Node) openGate(ctx context.Context) (func(), error) {
	if n.cfg.Role != cluster.RoleData {
		return func() {}, nil
	}
	keeper, err := n.newGate(ctx)
	if err != nil {
		return nil, err
	}
	n.keeper = keeper
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	var wg sync.WaitGroup
	wg.Go(func() { keeper.run(ctx) })
	return func() {
		cancel()
		wg.Wait()
	}, nil
}

// promiseRestart makes a promise that lasts until the next daemon is there.
func (n *Node) promiseRestart() error {
	if n.keeper == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	return n.keeper.gate.Extend(ctx, restartPromise)
}

// waitShut waits, after PostgreSQL has been stopped, until the others know that
// this node's gate is shut; without a quorum they learn it by waiting.
func (n *Node) waitShut(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	for ctx.Err() == nil {
		if s := n.keeper.gate.Status(); !s.Self || s.State == gate.Shut {
			return
		}
		sleep(ctx, 20*time.Millisecond)
	}
}

// watchGate has the gate look again as soon as its record or Patroni's leader
// key changes. Its own reads would find the same a moment later.
func (n *Node) watchGate(ctx context.Context, c *clientv3.Client) {
	if n.keeper == nil {
		return
	}
	for _, key := range []string{gateStore{n}.key(), patroni.Prefix(n.cfg.Cluster) + patroni.KeyLeader} {
		go func() {
			for ctx.Err() == nil {
				watched, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
				for r := range c.Watch(watched, key) {
					if r.Err() == nil && !n.keeper.gate.Status().Self {
						n.keeper.gate.Kick()
					}
				}
				cancel()
				sleep(ctx, 500*time.Millisecond)
			}
		}()
	}
}

// run keeps the gate until ctx ends.
func (g *gatekeeper) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { _ = g.gate.Run(ctx) }) // it ends with ctx alone
	wg.Go(func() { _ = g.watcher.Run(ctx) })
	wg.Go(func() { g.feed(ctx) })
	wg.Go(func() { g.tellRoles(ctx) })
	wg.Go(func() { g.watchKernel(ctx) })
	wg.Go(func() { g.reactor.run(ctx) })
	wg.Go(func() {
		for ctx.Err() == nil {
			if err := g.serveHook(ctx); ctx.Err() == nil {
				g.n.problem("promotion hook", err)
				sleep(ctx, time.Second)
			}
		}
	})
	wg.Wait()
}

// feed tells the gate what PostgreSQL and Patroni do.
func (g *gatekeeper) feed(ctx context.Context) {
	restarting, since := false, time.Time{}
	var replica, primary postgres.Probe // the last one that told of a replica, of a primary
	g.watcher.Follow(ctx, func(p postgres.Probe) {
		// A replica that receives nothing any more knows its timeline from its last
		// checkpoint alone. It is never on an earlier one than it has been on.
		if p.Kind == postgres.Recovery {
			if p.PID == replica.PID {
				p.Timeline = max(p.Timeline, replica.Timeline)
			}
			replica, primary = p, postgres.Probe{}
		}
		if p.Kind == postgres.Primary {
			primary = p
		}
		st := g.n.patroni.Status()
		l := gate.Local{
			At: moment(p.At), Process: gate.Process(p.Kind), Timeline: p.Timeline, Received: p.ReceivedLSN, Replayed: p.ReplayedLSN, StreamedAt: p.StreamedAt,
			PatroniUp: st.State == supervisor.Running && st.Health.Err == "" && !st.Health.Checked.IsZero(),
			Stopping:  g.n.leaving.Load() || g.n.stopping.Load() || g.n.settingAside.Load(),
		}
		l.WasPrimary = p.Kind == postgres.Hung && p.PID == primary.PID && p.Started == primary.Started
		switch {
		case p.Kind != postgres.Gone:
			since = time.Time{}
		case since.IsZero(): // it has just ended: on purpose?
			since = time.Now()
			restarting = g.n.restarting.Load() > 0 || g.patroniRestarts(ctx)
		}
		l.Restarting = p.Kind == postgres.Gone && restarting && time.Since(since) < restartingFor && !l.Stopping
		g.gate.Local(l)
	})
}

// moment turns the watcher's clock, which is the gate's, into a Moment. Its
// wall clock is that of now and so too late by the age of the probe: it is
// put back by that.
func moment(mono time.Duration) gate.Moment {
	now := gate.SystemClock{}.Now()
	return gate.Moment{Mono: mono, Wall: now.Wall - int64(now.Mono-mono)}
}

// patroniRestarts asks Patroni whether it is restarting PostgreSQL itself.
func (g *gatekeeper) patroniRestarts(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 250*time.Millisecond)
	defer cancel()
	st, err := g.n.restClient(g.n.snapshot(), g.n.cfg.Address, g.n.cfg.Ports.Patroni).Status(ctx)
	return err == nil && st.State == "restarting"
}

// watchKernel puts the gate back, shut, when somebody has removed it.
func (g *gatekeeper) watchKernel(ctx context.Context) {
	for ctx.Err() == nil {
		err := g.kernel.Watch(ctx, func() {
			if err := g.kernel.Install(ctx); err != nil && ctx.Err() == nil {
				g.n.problem("gate", err)
				return
			}
			g.n.problem("gate", nil)
			g.gate.Doubt()
		})
		if ctx.Err() == nil {
			g.n.problem("gate watch", err)
			sleep(ctx, time.Second)
		}
	}
}

// changed hears of each change of the gate; it must not block.
func (g *gatekeeper) changed(s gate.Status) {
	g.n.wake()
	g.n.router.tell(s)
}

func (g *gatekeeper) failedOver(f gate.Failover) {
	g.mu.Lock()
	g.kept = append(g.kept, f)
	g.mu.Unlock()
	g.n.wake()
	g.n.event(EventRole, f.To, actorPgha, "%s %s", f.Kind, FailoverText(f))
	g.n.log.Info("failover complete", "from", f.From, "to", f.To, "epoch", f.Epoch, "kind", string(f.Kind), "total_ms", f.Total().Milliseconds(),
		"detect_ms", f.Detect.Milliseconds(), "fence_ms", f.Fence.Milliseconds(), "admit_ms", f.Admit.Milliseconds(),
		"promote_ms", f.Promote.Milliseconds(), "route_ms", f.Route.Milliseconds())
}

// RestartPatroni implements gate.Actor.
func (g *gatekeeper) RestartPatroni(why string) {
	g.n.problem("patroni restart", g.n.patroni.Kill(why))
}

// StopPostgres implements gate.Actor: PostgreSQL ends at once, and a Patroni
// that starts anew sees that it is no leader.
func (g *gatekeeper) StopPostgres(why string) {
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		err := g.n.patroni.Kill(why)
		if errors.Is(err, supervisor.ErrNotRunning) {
			err = nil
		}
		if k := g.watcher.Latest().Kind; k != postgres.Gone && !g.gate.Status().Self {
			g.n.log.Warn("killing PostgreSQL", "why", why)
			err = errors.Join(err, postgres.Kill(ctx, g.n.cfg.Postgres.DataDir))
		}
		g.n.problem("demotion", err)
	}()
}

// permission notes to which postmaster a promotion was allowed.
type permission struct {
	PID     int    `json:"pid"`
	Started uint64 `json:"started"` // clock ticks since boot
}

func (n *Node) permissionFile() string { return filepath.Join(n.paths.Run, "promotion.json") }

// permit notes that PostgreSQL may be promoted from now on. It outlives the
// daemon, not the host.
func (g *gatekeeper) permit() error {
	p := g.watcher.Latest()
	return fsx.WriteJSON(g.n.permissionFile(), permission{p.PID, p.Started}, 0o600)
}

// permitted says whether an earlier daemon has allowed a promotion to the
// postmaster that still runs. In doubt it has.
func (n *Node) permitted() bool {
	var p permission
	if err := fsx.ReadJSON(n.permissionFile(), &p); err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	runs, err := postgres.Runs(p.PID, p.Started)
	return err != nil || runs
}

func (n *Node) hookSocket() string { return filepath.Join(n.paths.Run, "hook.sock") }
func (n *Node) hookScript() string { return filepath.Join(n.paths.patroniDir(), "pre_promote.py") }

// hookTimeout is for how long Patroni waits before a promotion: the longest
// promise that an owner may have made, and the time to take over.
const hookTimeout = restartPromise + 30*time.Second

// hookCommand writes the hook and returns the command that Patroni runs.
func (n *Node) hookCommand() (string, error) {
	if err := fsx.WriteFile(n.hookScript(), patroni.PrePromote(), 0o644, fsx.Keep, fsx.Keep); err != nil {
		return "", err
	}
	path, args, err := patroni.Interpreter(patroniBin)
	if err != nil {
		return "", err
	}
	words := append([]string{path}, args...)
	return strings.Join(append(words, n.hookScript(), n.hookSocket(), fmt.Sprint(hookTimeout.Seconds())), " "), nil
}

// serveHook answers Patroni, which asks before each promotion. Its socket is
// for PostgreSQL's user and does nothing else.
func (g *gatekeeper) serveHook(ctx context.Context) error {
	path := g.n.hookSocket()
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove old socket: %w", err)
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "unix", path)
	if err != nil {
		return fmt.Errorf("listen: %w", err)
	}
	u := g.n.owners.postgres
	if err := errors.Join(os.Chmod(path, 0o600), os.Chown(path, int(u.UID), int(u.GID))); err != nil {
		return fmt.Errorf("give socket to Patroni: %w", err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/admit", func(w http.ResponseWriter, r *http.Request) {
		// The hook asks again, so that it never acts on an old answer.
		ctx, cancel := context.WithTimeout(r.Context(), time.Second)
		defer cancel()
		err := g.gate.Admit(ctx)
		if err != nil {
			g.n.log.Info("PostgreSQL may not be promoted yet", "why", err)
			err = &cluster.Error{Code: cluster.CodeConflict, Message: err.Error()}
		} else {
			g.n.log.Info("PostgreSQL may be promoted")
		}
		reply(w, struct{}{}, err)
	})
	return serveHTTP(ctx, l, mux, g.n.opts.Log)
}

// gateKernel lets the gate speak to the kernel. The gate uses it from one
// goroutine at a time.
type gateKernel struct {
	k       *kernel.Kernel
	replica atomic.Bool // no session of an ownership can be left
}

// Open implements gate.Kernel. Answers that this node gave as an owner, and that
// the gate has held back, must not leave when it opens as a replica.
func (g *gateKernel) Open(ctx context.Context, as gate.Pass, until gate.Moment) error {
	if as == gate.AsOwner {
		g.replica.Store(false)
		return g.k.Open(ctx, kernel.Owner, until)
	}
	if !g.replica.Load() {
		// An earlier daemon may have opened it as a replica.
		if was, err := g.k.Read(ctx); err != nil {
			return err
		} else if !was.Open || was.Role != kernel.Replica {
			if err := g.endSessions(ctx); err != nil {
				return err
			}
		}
		g.replica.Store(true)
	}
	return g.k.Open(ctx, kernel.Replica, until)
}

func (g *gateKernel) endSessions(ctx context.Context) error {
	if err := g.k.Shut(ctx); err != nil {
		return err
	}
	_, err := g.k.EndSessions(ctx)
	return err
}

// Shut implements gate.Kernel.
func (g *gateKernel) Shut(ctx context.Context) error { return g.k.Shut(ctx) }

// Reset implements gate.Kernel. When ownership has moved, sessions end on this
// side too, as this node may become the owner again.
func (g *gateKernel) Reset(ctx context.Context, on bool) error {
	if err := g.k.Moved(ctx, on); err != nil || !on {
		return err
	}
	_, err := g.k.EndSessions(ctx)
	return err
}

// removeGate takes the gate out of the kernel; PostgreSQL must be gone.
func removeGate(ctx context.Context) error {
	k, err := kernel.New(discardLog(), 1) // the port does not matter
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	return errors.Join(k.Remove(ctx), k.Close())
}

// GateReport is what a node says of its gate. What passes is read from the
// kernel; the rest is what the daemon knows.
type GateReport struct {
	gate.Status
	Open      bool          `json:"open"` // the kernel passes clients to PostgreSQL
	OpenAs    string        `json:"open_as,omitempty"`
	Remaining time.Duration `json:"remaining"` // until the kernel shuts by itself
	Dropped   uint64        `json:"dropped_packets"`
}

func (g *gatekeeper) report(ctx context.Context) *GateReport {
	r := &GateReport{Status: g.gate.Status()}
	st, err := g.kernel.Read(ctx)
	switch {
	case err != nil:
		r.Error = err.Error()
	case !st.Installed:
		r.Error = "the gate is not in the kernel: nothing is gated"
	}
	r.Open, r.OpenAs, r.Remaining, r.Dropped = st.Open, string(st.Role), st.Remaining, st.Dropped.Packets
	return r
}

// reconcile brings the gate in line with the settings, and stores the records
// of failovers.
func (g *gatekeeper) reconcile(ctx context.Context, w world) error {
	g.gate.SetTimers(gate.TimersOf(w.Settings.Profile))
	g.mu.Lock()
	kept := g.kept
	g.kept = nil
	g.mu.Unlock()
	for i, f := range kept {
		if err := g.n.keepFailover(ctx, f); err != nil {
			g.mu.Lock()
			g.kept = append(kept[i:], g.kept...)
			g.mu.Unlock()
			return err
		}
	}
	return nil
}
