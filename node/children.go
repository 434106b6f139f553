package node

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/haproxy"
	"pgha/internal/fsx"
	"pgha/internal/host"
	"pgha/patroni"
	"pgha/pki"
	"pgha/supervisor"
)

const (
	patroniBin = "/usr/bin/patroni"
	haproxyBin = "/usr/sbin/haproxy"

	// checkTimeout bounds the check of a configuration by its own program, so that
	// one that hangs does not hold up the reconciler for ever.
	checkTimeout = time.Minute

	// Children log to files of their own: a pipe would end with the daemon.
	logMax  = 20 << 20
	logKeep = 3

	// haproxyFiles is what HAProxy needs for its default number of sessions, two
	// files each, with room to spare.
	haproxyFiles = 16384
)

// Scores for the OOM killer, next to the daemon's own -900: etcd and Patroni
// are what the cluster stands on, and small.
const patroniOOM, haproxyOOM = -800, -500

// oomScore is want, or nil where this process may not set it: without
// CAP_SYS_RESOURCE a score can only be raised.
func oomScore(want int) *int {
	own, err := os.ReadFile("/proc/self/oom_score_adj")
	if err != nil {
		return nil
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(own))); err != nil || now > want {
		return nil
	}
	return &want
}

var childEnv = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8", "LC_ALL=C.UTF-8"}

func (n *Node) patroniYML() string    { return filepath.Join(n.paths.patroniDir(), "patroni.yml") }
func (n *Node) haproxyCfg() string    { return filepath.Join(n.paths.haproxyDir(), "haproxy.cfg") }
func (n *Node) haproxyRun() string    { return filepath.Join(n.paths.Run, "haproxy") }
func (n *Node) haproxySocket() string { return filepath.Join(n.haproxyRun(), "admin.sock") }
func (n *Node) haproxyMaster() string { return filepath.Join(n.haproxyRun(), "master.sock") }
func (n *Node) postgresLog() string   { return filepath.Join(n.paths.Log, "postgres") }

// makeDataDirs creates the directories that the children write to.
func (n *Node) makeDataDirs() error {
	pg, ha := n.owners.postgres, n.owners.haproxy
	for _, d := range []struct {
		path     string
		mode     fs.FileMode
		uid, gid int
	}{
		{n.paths.patroniDir(), 0o750, 0, int(pg.GID)},
		{n.paths.haproxyDir(), 0o750, 0, int(ha.GID)},
		{n.haproxyRun(), 0o700, int(ha.UID), int(ha.GID)},
		{n.paths.pgSocket(), 0o750, int(pg.UID), int(pg.GID)},
		{n.postgresLog(), 0o750, int(pg.UID), int(pg.GID)},
		{filepath.Join(n.paths.Lib, "postgres"), 0o711, 0, 0},
	} {
		if err := makeDir(d.path, d.mode, d.uid, d.gid); err != nil {
			return err
		}
	}
	if n.state.Adopted != "" {
		return nil
	}
	return makeDir(filepath.Dir(n.cfg.Postgres.DataDir), 0o750, int(pg.UID), int(pg.GID))
}

// patroniCommand is how Patroni is started: by itself, or by the launcher that
// makes an older one safe.
func (n *Node) patroniCommand() (path string, args []string, err error) {
	if !n.version.NeedsLauncher() {
		return patroniBin, []string{n.patroniYML()}, nil
	}
	launcher := filepath.Join(n.paths.patroniDir(), "launcher.py")
	if err := fsx.WriteFile(launcher, patroni.Launcher(), 0o644, fsx.Keep, fsx.Keep); err != nil {
		return "", nil, err
	}
	path, args, err = patroni.Interpreter(patroniBin)
	return path, append(args, launcher, n.patroniYML()), err
}

func (n *Node) patroniSpec(path string, args []string) supervisor.Spec {
	return supervisor.Spec{
		Name: "patroni", Path: path, Args: args,
		// The postmaster inherits Patroni's protection from the OOM killer; a backend
		// must be killed in its stead.
		Env: append([]string{"HOME=" + n.paths.patroniDir(), "PG_OOM_ADJUST_FILE=/proc/self/oom_score_adj", "PG_OOM_ADJUST_VALUE=0"}, childEnv...), Dir: "/",
		OOMScoreAdj: oomScore(patroniOOM),
		User:        n.owners.postgres, Marker: n.state.ClusterID + "/patroni",
		RunDir: n.paths.Run, LogFile: filepath.Join(n.paths.Log, "patroni.log"), LogMax: logMax, LogKeep: logKeep,
		ParseLine: patroni.ParseLogLine, Continues: patroni.ContinuesLog,
		StopSignal: syscall.SIGTERM, Grace: 90 * time.Second,
		// SIGTERM would stop PostgreSQL; a Patroni of other settings takes over
		// the one that runs.
		ReplaceSignal: syscall.SIGKILL,
		Restart:       supervisor.RestartPolicy{MinBackoff: 200 * time.Millisecond, MaxBackoff: 15 * time.Second, Budget: supervisor.Budget{Failures: 8, HalfLife: 30 * time.Second}},
		Exit:          classifyPatroniExit,
		Before:        n.beforePatroni,
		// Patroni that is stopped or hangs answers nothing; it is killed and
		// started again while PostgreSQL goes on.
		Health: n.patroniAlive, HealthEvery: time.Second, HealthTimeout: 3 * time.Second, HealthFailures: 3,
	}
}

func (n *Node) haproxySpec() supervisor.Spec {
	return supervisor.Spec{
		Name: "haproxy", Path: haproxyBin,
		Args: []string{"-W", "-S", n.haproxyMaster(), "-f", n.haproxyCfg()},
		Env:  childEnv, Dir: "/", OOMScoreAdj: oomScore(haproxyOOM), User: n.owners.haproxy, Marker: n.state.ClusterID + "/haproxy",
		RunDir: n.paths.Run, LogFile: filepath.Join(n.paths.Log, "haproxy.log"), LogMax: logMax, LogKeep: logKeep,
		StopSignal: syscall.SIGTERM, Grace: 5 * time.Second, KillGroup: true,
		Limits:  supervisor.Limits{NoFile: fileLimit(haproxyFiles)},
		Restart: supervisor.RestartPolicy{MinBackoff: 100 * time.Millisecond, MaxBackoff: 5 * time.Second, Budget: supervisor.Budget{Failures: 10, HalfLife: 30 * time.Second}},
		Health: func(ctx context.Context) error {
			_, err := n.runtime.Info(ctx)
			return err
		},
		HealthEvery: 2 * time.Second, HealthTimeout: 2 * time.Second, HealthFailures: 3,
	}
}

// fileLimit is want, or the most that this process may set.
func fileLimit(want uint64) uint64 {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return 0 // leave it as it is
	}
	return min(want, l.Max)
}

// classifyPatroniExit tells the exits that a restart cannot mend.
func classifyPatroniExit(e supervisor.ExitStatus) supervisor.Verdict {
	for _, line := range e.LastLog {
		if strings.Contains(line, "system ID mismatch") {
			return supervisor.VerdictStop("the data directory belongs to another PostgreSQL cluster (system identifiers differ): move it aside and start again, or pgha reset")
		}
	}
	return supervisor.VerdictRestart
}

// patroniAlive asks the local Patroni whether its main loop turns.
func (n *Node) patroniAlive(ctx context.Context) error {
	return n.restClient(n.snapshot(), n.cfg.Address, n.cfg.Ports.Patroni).Liveness(ctx)
}

// adoptChildren takes over what an earlier daemon has left running.
func (n *Node) adoptChildren(ctx context.Context) {
	if n.cfg.Role != cluster.RoleData {
		return
	}
	n.problem("bootstrap", n.endUnfinishedBootstrap(ctx))
	for _, p := range []*supervisor.Process{n.patroni, n.haproxy} {
		adopted, err := p.Adopt(ctx)
		name := p.Status().Name
		n.problem(name, err)
		if adopted {
			n.log.Info("took over a running child", "child", name, "pid", p.Status().PID)
		}
	}
}

func (n *Node) detachChildren() error {
	if n.cfg.Role != cluster.RoleData {
		return nil
	}
	return errors.Join(n.patroni.Detach(), n.haproxy.Detach())
}

// stopChildren stops PostgreSQL through Patroni, which hands the leadership to
// a replica that has everything, then HAProxy.
func (n *Node) stopChildren() error {
	if n.cfg.Role != cluster.RoleData {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	err := n.patroni.Stop(ctx)
	err = errors.Join(err, n.stopPostgres(ctx))
	n.waitShut(ctx)
	return errors.Join(err, n.haproxy.Stop(ctx))
}

// stopPostgres stops a PostgreSQL that Patroni has left running, as it does
// when it is paused or had to be killed.
func (n *Node) stopPostgres(ctx context.Context) error {
	info, err := patroni.InspectDataDir(n.cfg.Postgres.DataDir)
	if err != nil || !info.Running {
		return nil // no data directory, or nothing that runs on it
	}
	n.log.Warn("PostgreSQL still runs after Patroni has stopped; stopping it", "pid", info.PID)
	return n.asPostgres(ctx, filepath.Join(n.cfg.Postgres.BinDir, "pg_ctl"), "stop", "-D", n.cfg.Postgres.DataDir, "-m", "fast", "-t", "60", "-s")
}

// asPostgres runs a program as PostgreSQL's operating system user.
func (n *Node) asPostgres(ctx context.Context, path string, args ...string) error {
	u := n.owners.postgres
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Dir = childEnv, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("run %s: %w: %s", filepath.Base(path), err, strings.TrimSpace(string(out)))
	}
	return nil
}

// reconcilePatroni renders Patroni's configuration, replaces it when it has
// changed, and starts Patroni once it may start.
func (n *Node) reconcilePatroni(ctx context.Context, w world) error {
	if w.Secrets == nil {
		return nil // not readable yet; what runs goes on with what it has
	}
	cfg := n.patroniConfig(w)
	text, err := patroni.Render(cfg)
	if err != nil {
		return err
	}
	changed, err := n.replaceFile(ctx, n.patroniYML(), text, 0o640, n.owners.postgres, func(ctx context.Context, path string) error {
		return n.validatePatroni(ctx, cfg, path+".check")
	})
	if err != nil {
		return err
	}
	if changed {
		if err := n.reloadPatroni(ctx, w); err != nil {
			return err
		}
	}
	switch n.patroni.Status().State {
	case supervisor.Stopped, supervisor.Waiting:
	default:
		n.setWaiting("")
		return n.dynamicConfig(ctx, w, cfg)
	}
	if n.leaving.Load() {
		return nil
	}
	if wait, why := n.mustWait(w); wait {
		n.patroni.SetWaiting(why)
		n.setWaiting(why)
		return nil
	}
	if err := n.prepareAdopted(ctx, w, cfg); err != nil {
		return err
	}
	return n.patroni.Start(ctx)
}

// reloadPatroni has a running Patroni read its configuration now, and not when its
// loop turns by itself.
func (n *Node) reloadPatroni(ctx context.Context, w world) error {
	if err := signalRunning(n.patroni, syscall.SIGHUP); err != nil {
		return fmt.Errorf("reload Patroni: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if err := n.restClient(w, n.cfg.Address, n.cfg.Ports.Patroni).Wake(ctx); err != nil {
		n.log.Debug("cannot wake Patroni; it reads its configuration a little later", "err", err)
	}
	return nil
}

// validatePatroni has Patroni check its configuration. It would connect to
// PostgreSQL's port to see whether that is free, and the gate answers nothing
// there: it is shown another port, on which nobody listens.
func (n *Node) validatePatroni(ctx context.Context, cfg patroni.Config, path string) error {
	cfg.Ports.Postgres = 1
	text, err := patroni.Render(cfg)
	if err != nil {
		return err
	}
	if err := fsx.WriteFile(path, text, 0o640, 0, int(n.owners.postgres.GID)); err != nil {
		return err
	}
	return errors.Join(patroni.Validate(ctx, patroniBin, path), os.Remove(path))
}

// mustWait says whether Patroni may not start yet. Only the founder
// initialises; anybody else would run initdb for a second cluster.
func (n *Node) mustWait(w world) (bool, string) {
	switch {
	case !w.Viewed:
		return true, "waiting for etcd: " + n.votersNeeded()
	case !w.View.Initialized && !n.state.Founder:
		return true, "waiting for the first node to initialise PostgreSQL"
	}
	if n.settingAside.Load() {
		return true, "waiting for the old data to be moved aside"
	}
	if n.keeper != nil {
		why := n.keeper.reactor.held()
		return why != "", why
	}
	return false, ""
}

func (n *Node) patroniConfig(w world) patroni.Config {
	own := w.Settings.Nodes[n.cfg.Name]
	memory := host.Memory()
	if size := cmp.Or(own.Memory, n.cfg.Postgres.Memory); size != "" {
		// Checked when it was set.
		memory, _ = ParseBytes(size)
	}
	_, disk, _ := host.DiskFree(filepath.Dir(n.cfg.Postgres.DataDir)) // 0 leaves the limit at its floor
	c := patroni.Config{
		Version: n.version, Scope: n.cfg.Cluster, Name: n.cfg.Name, Addr: n.cfg.Address,
		Ports:   patroni.Ports{Postgres: n.cfg.Ports.Postgres, Patroni: n.cfg.Ports.Patroni},
		DataDir: n.cfg.Postgres.DataDir, BinDir: n.cfg.Postgres.BinDir, PGMajor: n.pgMajor(),
		SocketDir: n.paths.pgSocket(), LogDir: n.paths.Log,
		Bundle: n.pki.BundlePath(pki.RolePatroni), PostgresBundle: n.pki.BundlePath(pki.RolePostgres), CAFile: n.pki.CAPath(),
		EtcdAddr: n.etcdAddr(), RESTUser: cluster.PatroniRESTUser, RESTPassword: w.Secrets.PatroniREST,
		ClientNets: w.Settings.ClientNets, Async: w.Settings.Async, Profile: w.Settings.Profile,
		MemoryBytes: memory, CPUs: host.CPUs(), DiskBytes: disk, PrePromote: n.hook,
		Postgres: w.Settings.Postgres, NodePostgres: own.Postgres, HBA: w.Settings.HBA,
	}
	for _, m := range w.Members {
		if m.Name == n.cfg.Name {
			c.Tags = maintenanceTags(m)
		}
		if m.Role == cluster.RoleData {
			c.Members = append(c.Members, patroni.Member{Name: m.Name, Addr: m.Addr, Postgres: m.Ports.Postgres, Patroni: m.Ports.Patroni})
		}
	}
	return c
}

// reconcileHAProxy renders HAProxy's configuration and starts or reloads it.
func (n *Node) reconcileHAProxy(ctx context.Context, w world) error {
	if w.Secrets == nil {
		// HAProxy needs no etcd: what was rendered last is right until a roster
		// says otherwise.
		if _, err := os.Stat(n.haproxyCfg()); err == nil && n.haproxy.Status().State == supervisor.Stopped {
			return n.haproxy.Start(ctx)
		}
		return nil
	}
	c := haproxy.Config{
		Self:   n.cfg.Name,
		Ports:  haproxy.Ports{ReadWrite: n.cfg.Ports.ReadWrite, ReadOnly: n.cfg.Ports.ReadOnly, Stats: n.cfg.Ports.Stats, Health: n.cfg.Ports.Health},
		Bundle: n.pki.BundlePath(pki.RoleHAProxy), CAFile: n.pki.CAPath(), SocketPath: n.haproxySocket(),
		StatsUser: cluster.StatsPageUser, StatsPassword: w.Secrets.StatsPage, Profile: w.Settings.Profile,
	}
	for _, m := range w.Members {
		if m.Role == cluster.RoleData {
			c.Servers = append(c.Servers, haproxy.Server{Name: m.Name, Addr: m.Addr, Postgres: m.Ports.Postgres, Patroni: m.Ports.Patroni})
		}
	}
	text, err := haproxy.Render(c)
	if err != nil {
		return err
	}
	changed, err := n.replaceFile(ctx, n.haproxyCfg(), text, 0o640, n.owners.haproxy, func(ctx context.Context, path string) error {
		return haproxy.Validate(ctx, haproxyBin, path)
	})
	if err != nil {
		return err
	}
	n.haproxyStale = n.haproxyStale || changed // until a reload has come through
	switch st := n.haproxy.Status().State; {
	case st == supervisor.Stopped:
		n.haproxyStale = false
		return n.haproxy.Start(ctx)
	case n.haproxyStale && st == supervisor.Running:
		if err := n.reloadHAProxy(ctx); err != nil {
			return err
		}
		n.haproxyStale = false
	}
	return nil
}

// replaceFile writes text to path if it differs and check accepts it; the
// group of user may read it. It says whether the file has changed.
func (n *Node) replaceFile(ctx context.Context, path string, text []byte, mode fs.FileMode, user *supervisor.User, check func(context.Context, string) error) (bool, error) {
	old, err := os.ReadFile(path)
	if err == nil && bytes.Equal(old, text) {
		return false, nil
	}
	draft := path + ".new"
	if err := fsx.WriteFile(draft, text, mode, 0, int(user.GID)); err != nil {
		return false, err
	}
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	if err := check(ctx, draft); err != nil {
		return false, fmt.Errorf("check %s: %w", draft, err)
	}
	if err := os.Rename(draft, path); err != nil {
		return false, fmt.Errorf("replace %s: %w", path, err)
	}
	return true, fsx.SyncDir(filepath.Dir(path))
}

// localPostgres connects to this node's PostgreSQL through its private socket,
// as the superuser: peer authentication lets root in.
func (n *Node) localPostgres(ctx context.Context) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("")
	if err != nil {
		return nil, fmt.Errorf("prepare connection: %w", err)
	}
	c.Host, c.Port, c.User, c.Database, c.TLSConfig = n.paths.pgSocket(), n.cfg.Ports.Postgres, "postgres", "postgres", nil
	c.Fallbacks = nil
	return pgx.ConnectConfig(ctx, c)
}

// reloadPostgres has a running PostgreSQL read its configuration and
// certificates again.
func (n *Node) reloadPostgres(ctx context.Context) error {
	info, err := patroni.InspectDataDir(n.cfg.Postgres.DataDir)
	if err != nil || !info.Running {
		return nil // it reads the files when it starts
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := n.localPostgres(ctx)
	if err != nil {
		return fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	if _, err := c.Exec(ctx, "SELECT pg_reload_conf()"); err != nil {
		return fmt.Errorf("reload PostgreSQL: %w", err)
	}
	return nil
}
