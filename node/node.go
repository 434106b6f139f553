package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/firewall"
	"pgha/haproxy"
	"pgha/internal/host"
	"pgha/patroni"
	"pgha/pki"
	"pgha/supervisor"
	"pgha/systemd"
)

// Version of the program; the build sets it.
var Version = "dev"

// Options start a Node.
type Options struct {
	Paths Paths
	Log   *slog.Logger
	// Foreground is true when no service manager keeps the daemon: a signal
	// then always means that the whole node stops.
	Foreground bool
	// Image is what this process was handed (BeginImage); nil for nothing.
	Image *Image
}

// Node is the daemon of one node.
type Node struct {
	paths Paths
	cfg   Config
	state State
	log   *slog.Logger
	opts  Options

	pki     pki.Dir
	certs   *pki.Reloader
	sealing *cluster.SealingKey // data nodes only
	owners  owners
	fw      *firewall.Firewall
	patroni *supervisor.Process // data nodes only
	haproxy *supervisor.Process // data nodes only
	runtime *haproxy.Runtime
	router  router
	keeper  *gatekeeper // data nodes only
	version patroni.Version
	hook    string // what Patroni runs before a promotion

	etcd  atomic.Pointer[embedded.Server]
	store atomic.Pointer[cluster.Store]

	etcdTrust atomic.Pointer[[]byte] // the CA certificates that etcd was started with
	rotation  follower               // used by the reconciler, and why under mu
	turnWaits string                 // under mu: what a restart of etcd waits for

	haproxyStale bool // used by the reconciler: HAProxy has not loaded its configuration

	founded atomic.Bool             // state.Founded as it is now; state itself never changes
	leaving atomic.Bool             // this node is leaving: what it has stopped stays so
	removal atomic.Pointer[Removal] // this node is no member any more
	doubt   atomic.Int64            // until when, by Unix nanoseconds, it is in doubt whether it is one
	stateMu sync.Mutex              // one change of the state file at a time

	stopping atomic.Bool // the node is being stopped, with PostgreSQL
	takeMu   sync.Mutex  // one member is taken out at a time
	renewMu  sync.Mutex  // one renewal of certificates at a time

	fwMu      sync.Mutex
	fwApplied *firewall.Policy

	kick      chan struct{}           // wakes the reconciler
	seen      peers                   // what the other members answered lately
	runs      runs                    // operations that this daemon runs
	end       context.CancelCauseFunc // ends Run
	image     *Image
	started   time.Time
	upgradeMu sync.Mutex // one program comes in, or begins, at a time
	news      eventLog   // events that are not stored yet
	told      chronicler // used by the reconciler alone
	lineage   lineage    // this node's place in the cluster's history
	memory    memory     // what was last known of the whole cluster
	packages  packages

	settingAside atomic.Bool  // Patroni has to wait while its data directory is moved
	restarting   atomic.Int32 // restarts of PostgreSQL that Patroni was asked for

	mu        sync.Mutex
	waiting   string               // what the start waits for; "" once it is over
	problems  map[string]string    // by part: what is wrong now
	unread    int                  // rounds in a row in which the state could not be read
	world     world                // what the reconciler saw last
	admitted  map[string]admission // by name: members that the roster may not have shown yet
	etcdState string               // running, or why not
	rest      map[[3]string]*patroni.Client
	lastTick  time.Time // when the reconciler last finished a round
	taken     int64     // revision of the settings that this node follows
}

// world is what the reconciler works from.
type world struct {
	Members  []cluster.Member
	Settings cluster.Settings
	// SettingsRev is etcd's revision of Settings; 0 before they were read from etcd.
	SettingsRev int64

	Former   []cluster.FormerMember
	JoinOpen bool // unexpired join tokens exist
	View     patroni.ClusterView
	Viewed   bool      // View was read from etcd in this round
	ViewedAt time.Time // when View was last read from etcd
	Secrets  *cluster.Secrets
	CA       *cluster.CAState         // nil: it was never replaced
	Taken    map[string]cluster.Taken // by name: what the members have followed
	Planned  *PlannedSwitchover       // nil: none
}

// owners are the operating system's users of the children.
type owners struct {
	postgres, haproxy *supervisor.User
}

// Open reads and checks what is on disk. It changes nothing but missing
// directories, and starts nothing.
func Open(opts Options) (*Node, error) {
	state, cfg, err := load(opts.Paths)
	if err != nil {
		return nil, err
	}
	n := &Node{
		paths: opts.Paths, cfg: cfg, state: state, opts: opts,
		log:       opts.Log.With("component", "pgha"),
		kick:      make(chan struct{}, 1),
		problems:  map[string]string{},
		rest:      map[[3]string]*patroni.Client{},
		etcdState: "starting",
		waiting:   "starting",
	}
	n.started = time.Now()
	if n.image = opts.Image; n.image == nil {
		n.image = &Image{}
	}
	if err := n.loadLineage(); err != nil {
		return nil, err
	}
	n.founded.Store(state.Founded)
	n.removal.Store(state.Removed)
	if n.owners, err = lookupOwners(cfg.Role); err != nil {
		return nil, err
	}
	n.pki = pkiDir(n.paths, n.owners)
	for _, r := range cfg.Role.Roles() {
		if err := n.pki.Verify(state.ClusterID, state.Node, r); err != nil {
			return nil, wrongCertificates(err)
		}
	}
	if err := makeDirs(n.paths); err != nil {
		return nil, err
	}
	if n.certs, err = pki.NewReloader(n.pki, pki.RoleNode, opts.Log); err != nil {
		return nil, fmt.Errorf("load node certificate: %w", err)
	}
	if cfg.Role == cluster.RoleData {
		if err := n.openData(); err != nil {
			return nil, err
		}
	}
	n.seen.init(n)
	return n, nil
}

// load reads which node of which cluster this host is.
func load(p Paths) (State, Config, error) {
	state, err := LoadState(p)
	if err != nil {
		return state, Config{}, err
	}
	if state.Phase != PhaseReady {
		return state, Config{}, fmt.Errorf("%s was interrupted on this host: run the same command again, or pgha reset", initOrJoin(state))
	}
	cfg, err := LoadConfig(p.Config())
	if err != nil {
		return state, Config{}, err
	}
	if cfg.Name != state.Node || cfg.Cluster != state.ClusterName || cfg.Role != state.Role {
		return state, cfg, fmt.Errorf("%s says this is the %s node %q of cluster %q, but the data on disk belongs to the %s node %q of cluster %q: put the configuration right, or pgha reset",
			p.Config(), cfg.Role, cfg.Name, cfg.Cluster, state.Role, state.Node, state.ClusterName)
	}
	return state, cfg, nil
}

// wrongCertificates says what to do about certificates that are missing or not
// this node's. They are never made anew: a second CA would be a second cluster.
func wrongCertificates(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("check certificates: %w: restore it from a backup, ca.crt also from another node; or take this host out with pgha reset --force and join again", err)
	case errors.Is(err, pki.ErrOtherCluster):
		return fmt.Errorf("check certificates: %w: put this node's own files back; or take this host out with pgha reset --force and join again", err)
	}
	return fmt.Errorf("check certificates: %w", err)
}

// openData prepares what only data nodes have.
func (n *Node) openData() error {
	if n.cfg.Postgres.DataDir == "" {
		return fmt.Errorf("%s: postgres.data_dir is missing: put back the directory of this node's data (%s, unless it was adopted)",
			n.paths.Config(), DefaultDataDir(n.paths, n.pgMajor()))
	}
	key, err := cluster.LoadSealingKey(n.paths.sealingKey())
	if err != nil {
		return fmt.Errorf("load sealing key: %w", err)
	}
	n.sealing = &key
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if n.version, err = patroni.InstalledVersion(ctx, patroniBin); err != nil {
		return fmt.Errorf("ask Patroni for its version: %w", err)
	}
	if err := n.makeDataDirs(); err != nil {
		return err
	}
	path, args, err := n.patroniCommand()
	if err != nil {
		return fmt.Errorf("prepare Patroni: %w", err)
	}
	if n.hook, err = n.hookCommand(); err != nil {
		return fmt.Errorf("prepare Patroni's hook: %w", err)
	}
	if n.patroni, err = supervisor.New(n.patroniSpec(path, args), n.opts.Log); err != nil {
		return fmt.Errorf("prepare Patroni: %w", err)
	}
	if n.haproxy, err = supervisor.New(n.haproxySpec(), n.opts.Log); err != nil {
		return fmt.Errorf("prepare HAProxy: %w", err)
	}
	n.runtime = &haproxy.Runtime{Socket: n.haproxySocket()}
	n.router.init(n)
	return nil
}

// openFirewall prepares the firewall, or takes it away where it is off.
func (n *Node) openFirewall(ctx context.Context) error {
	if n.cfg.Firewall.Mode != FirewallOff {
		fw, err := firewall.New(n.opts.Log)
		if err != nil {
			return fmt.Errorf("open nftables: %w", err)
		}
		n.fw = fw
	} else if err := removeFirewall(ctx); err != nil {
		// It may be off because this host has no nftables.
		n.log.Warn("cannot make sure that the firewall's table is gone", "err", err)
	}
	return nil
}

// Run runs the node until ctx ends, or etcd dies of a fatal error. How it
// leaves the children is decided by why it stops: see stop.
func (n *Node) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	n.end = cancel
	unlock, err := lockDaemon(n.paths)
	if err != nil {
		return err
	}
	defer unlock()
	if err := n.openFirewall(ctx); err != nil {
		return err
	}
	if !n.opts.Foreground {
		// A node that an earlier pgha has installed is told of here.
		n.problem("needrestart", systemd.KeepNeedrestartAway())
	}
	n.loadCache()
	n.problem("last known state", n.loadKnown())
	// The firewall stands before anything listens.
	n.applyFirewall(ctx)
	closeGate, err := n.openGate(ctx)
	if err != nil {
		return err
	}
	defer closeGate()

	n.event(EventRestart, n.cfg.Name, actorPgha, "pgha %s has started", Version)
	// Whatever a dead daemon has left running is taken over before anything
	// that can wait: Patroni must not miss its etcd for long.
	n.adoptChildren(ctx)
	// The unit has started once the daemon can be asked what it waits for; a
	// cluster that lacks its quorum must not make systemd restart it.
	if err := systemd.NotifyReady(); err != nil {
		n.log.Warn("cannot tell systemd", "err", err)
	}
	n.notifyWatchdog(systemd.WatchdogInterval()) // an image before may have changed it
	ping, endPing := context.WithCancel(context.WithoutCancel(ctx))
	defer endPing()
	go func() { _ = n.pingWatchdog(ping) }() // also while the node stops; it ends with ping alone
	// What runs goes on after ctx until the leadership has been handed over.
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	run, runCtx := errgroup.WithContext(life)
	why := systemd.Unknown
	run.Go(func() error {
		defer end()
		select {
		case <-runCtx.Done(): // a part has failed
		case <-ctx.Done():
			if next := (*Reexec)(nil); !errors.As(context.Cause(ctx), &next) {
				why = n.whyStopping()
				n.beforeStop(runCtx, why)
			}
		}
		return nil
	})
	serve := func(name string, f func(context.Context) error) {
		run.Go(func() error {
			if err := f(runCtx); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			return nil
		})
	}
	serve("serve local API", n.serveLocal)
	serve("serve API", n.serveRemote)
	serve("run etcd", n.runEtcd)
	serve("watch etcd's CAs", n.etcdTrustLoop)
	serve("reconcile", n.reconcileLoop)
	serve("lead", n.leadLoop)
	serve("watch peers", n.seen.loop)
	serve("meet the others", n.meetLoop)
	serve("stay out of service", n.endService)
	serve("save snapshots", n.snapshotLoop)
	serve("watch own membership", n.watchStanding)
	serve("watch firewall", n.watchFirewall)
	serve("keep events", n.keepEvents)
	serve("prove this version", n.prove)
	if n.cfg.Role == cluster.RoleData {
		serve("route", n.router.loop)
		serve("check roles", n.rolesLoop)
		serve("carry out switchovers", n.carryOut)
	}
	err = run.Wait()
	if next := (*Reexec)(nil); errors.As(context.Cause(ctx), &next) {
		return n.giveWay(next)
	}
	if ctx.Err() != nil {
		err = nil // asked to stop
	}
	return errors.Join(err, n.stop(ctx.Err() != nil, why))
}

// stop ends the node's parts in the order in which they need each other. Patroni
// goes first: where beforeStop could not hand the leadership over, it lets go of
// it through etcd.
func (n *Node) stop(asked bool, why systemd.StopReason) error {
	var err error
	if !asked || why == systemd.RestartUnit {
		n.event(EventRestart, n.cfg.Name, actorPgha, "pgha stops and leaves Patroni, PostgreSQL and HAProxy running for the next daemon")
		err = errors.Join(n.promiseRestart(), n.detachChildren())
	} else {
		if err := systemd.NotifyStopping(); err != nil {
			n.log.Warn("cannot tell systemd", "err", err)
		}
		n.event(EventRestart, n.cfg.Name, actorPgha, "the node stops, PostgreSQL with it: %s", why)
		n.stopping.Store(true)
		err = n.stopChildren()
	}
	err = errors.Join(err, n.saveEvents())
	if s := n.etcd.Swap(nil); s != nil {
		s.Stop()
	}
	n.log.Info("stopped")
	return err
}

// pingWatchdog tells systemd that the daemon lives, as long as the reconciler
// does its rounds.
func (n *Node) pingWatchdog(ctx context.Context) error {
	every := systemd.WatchdogInterval() / 3
	if every <= 0 {
		return nil
	}
	t := time.NewTicker(every)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-t.C:
		}
		n.mu.Lock()
		stuck := time.Since(n.lastTick) > reconcileStuck
		n.mu.Unlock()
		if stuck {
			n.log.Error("the reconciler is stuck; systemd will restart pgha, Patroni and HAProxy go on")
			continue
		}
		if err := systemd.NotifyWatchdog(); err != nil {
			n.log.Warn("cannot ping the watchdog", "err", err)
		}
	}
}

// setWaiting says what the start waits for, in the log, to systemd and in
// status; "" says that it waits for nothing more.
func (n *Node) setWaiting(what string) {
	n.mu.Lock()
	changed := n.waiting != what
	n.waiting = what
	n.mu.Unlock()
	if !changed {
		return
	}
	if what == "" {
		what = "running"
	}
	n.log.Info("start", "state", what)
	if err := systemd.NotifyStatus(what); err != nil {
		n.log.Warn("cannot tell systemd", "err", err)
	}
}

// problem records what is wrong with a part, or with a nil error that it is
// right again. A problem is logged once, when it appears or changes.
func (n *Node) problem(part string, err error) {
	text := ""
	if err != nil {
		text = err.Error()
	}
	n.mu.Lock()
	old := n.problems[part]
	if text == "" {
		delete(n.problems, part)
	} else {
		n.problems[part] = text
	}
	n.mu.Unlock()
	switch {
	case text == old:
	case text == "":
		n.event(EventFault, n.cfg.Name, actorPgha, "%s: all right again", part)
	default:
		n.log.Error("problem", "part", part, "err", text)
		n.event(EventFault, n.cfg.Name, actorPgha, "%s: %s", part, text)
	}
}

func (n *Node) wake() {
	select {
	case n.kick <- struct{}{}:
	default:
	}
}

func (n *Node) snapshot() world {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.world
}

func lookupOwners(role cluster.NodeRole) (owners, error) {
	var o owners
	if role != cluster.RoleData {
		return o, nil
	}
	for name, to := range map[string]**supervisor.User{"postgres": &o.postgres, "haproxy": &o.haproxy} {
		uid, gid, groups, err := host.LookupUser(name)
		if err != nil {
			return o, fmt.Errorf("look up user %s (its package creates it): %w", name, err)
		}
		*to = &supervisor.User{UID: uid, GID: gid, Groups: groups}
	}
	return o, nil
}

func pkiDir(p Paths, o owners) pki.Dir {
	d := pki.Dir{Path: p.PKI(), Owners: map[pki.Role]pki.Owner{}}
	if o.postgres != nil {
		owner := pki.Owner{UID: int(o.postgres.UID), GID: int(o.postgres.GID)}
		d.Owners[pki.RolePostgres], d.Owners[pki.RolePatroni] = owner, owner
		d.Owners[pki.RoleHAProxy] = pki.Owner{UID: int(o.haproxy.UID), GID: int(o.haproxy.GID)}
	}
	return d
}

func initOrJoin(s State) string {
	if s.Founder {
		return "pgha init"
	}
	return "pgha join"
}
