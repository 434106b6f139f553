package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"pgha/cluster"
	"pgha/haproxy"
	"pgha/internal/host"
	"pgha/supervisor"
)

// What packages have replaced on disk while it runs. Nothing is restarted for
// it: it is shown, and an operator restarts it when it suits.

// Parts of a node that come in packages, as status and upgrade name them.
const (
	PartPostgres = "postgresql"
	PartPatroni  = "patroni"
	PartHAProxy  = "haproxy"
)

const (
	// packagesLooked is how often it is looked whether a package has replaced what
	// runs.
	packagesLooked = 5 * time.Second
	// renewTimeout bounds the restart of Patroni, and the reload of HAProxy.
	renewTimeout = time.Minute
	// packagesTimeout bounds an upgrade of packages.
	packagesTimeout = 30 * time.Minute

	taskRenew    = "renew-programs"
	taskPackages = "packages"
	taskUpgrade  = "upgrade-packages"
)

// PendingRestart is a part that runs as something else than what is on disk.
type PendingRestart struct {
	Part   string `json:"part"`
	Reason string `json:"reason"`
}

// packages is what a node knows of its packages.
type packages struct {
	upgrading sync.Mutex // one upgrade at a time
	renewing  sync.Mutex // one restart of programs at a time
	reloading sync.Mutex // one reload of HAProxy at a time

	mu      sync.Mutex
	looked  time.Time
	pids    string // of what was looked at
	pending []PendingRestart
}

// running is a process of a part.
type running struct {
	part string
	pid  int
	// program is the file that a start would execute; "" for what the process
	// itself names.
	program string
	// script is what an interpreter has read, and started when.
	script  []string
	started time.Time
}

// pendingRestarts says which parts wait for a restart. It looks every few
// seconds at most, and when there is a new process.
func (n *Node) pendingRestarts(ctx context.Context) []PendingRestart {
	programs := n.runningPrograms(ctx)
	pids := fmt.Sprint(programs)
	n.packages.mu.Lock()
	defer n.packages.mu.Unlock()
	if time.Since(n.packages.looked) < packagesLooked && pids == n.packages.pids {
		return n.packages.pending
	}
	n.packages.pending, n.packages.looked, n.packages.pids = lookPending(programs), time.Now(), pids
	return n.packages.pending
}

// pendingNow is pendingRestarts for those who have just changed something.
func (n *Node) pendingNow(ctx context.Context) []PendingRestart {
	n.packages.mu.Lock()
	n.packages.looked = time.Time{}
	n.packages.mu.Unlock()
	return n.pendingRestarts(ctx)
}

func lookPending(programs []running) []PendingRestart {
	var out []PendingRestart
	for _, r := range programs {
		if slices.ContainsFunc(out, func(p PendingRestart) bool { return p.Part == r.part }) {
			continue
		}
		why, err := replacedOnDisk("/proc", r)
		if err != nil {
			continue // it has just ended, or is being started
		}
		if why != "" {
			out = append(out, PendingRestart{Part: r.part, Reason: why})
		}
	}
	return out
}

// runningPrograms lists the processes of the parts that run.
func (n *Node) runningPrograms(ctx context.Context) []running {
	var out []running
	if n.keeper != nil {
		if p := n.keeper.watcher.Latest(); p.PID != 0 {
			out = append(out, running{part: PartPostgres, pid: p.PID, program: filepath.Join(n.cfg.Postgres.BinDir, "postgres")})
		}
	}
	if st := n.patroni.Status(); st.State == supervisor.Running {
		out = append(out, running{part: PartPatroni, pid: st.PID, script: patroniFiles, started: st.StartedAt})
	}
	if st := n.haproxy.Status(); st.State == supervisor.Running {
		out = append(out, running{part: PartHAProxy, pid: st.PID, program: haproxyBin})
		ctx, cancel := context.WithTimeout(ctx, time.Second)
		defer cancel()
		if info, err := n.runtime.Info(ctx); err == nil {
			if pid, err := strconv.Atoi(info["Pid"]); err == nil {
				out = append(out, running{part: PartHAProxy, pid: pid, program: haproxyBin})
			}
		}
	}
	return out
}

// patroniFiles change whenever Patroni's package is unpacked: the program, and
// dpkg's list of the package's files.
var patroniFiles = []string{patroniBin, "/var/lib/dpkg/info/patroni.list"}

// replacedOnDisk says what of the files that a process was started from has been
// replaced since, "" for nothing. It fails when the process has gone.
func replacedOnDisk(proc string, r running) (string, error) {
	dir := filepath.Join(proc, strconv.Itoa(r.pid))
	link, err := os.Readlink(filepath.Join(dir, "exe"))
	if err != nil {
		return "", fmt.Errorf("look at process %d: %w", r.pid, err)
	}
	path, gone := strings.CutSuffix(link, " (deleted)")
	if r.program != "" {
		path = r.program
	}
	mine, err := os.Stat(filepath.Join(dir, "exe"))
	if err != nil {
		return "", fmt.Errorf("look at process %d: %w", r.pid, err)
	}
	now, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist) && gone:
		return "", nil // removed, not replaced: there is nothing to start
	case err != nil:
		return "", fmt.Errorf("look at %s: %w", path, err)
	case !os.SameFile(mine, now):
		return path + " was replaced", nil
	}
	for _, file := range r.script {
		var st syscall.Stat_t
		// Not the time of its content, which is of the package's making.
		if err := syscall.Stat(file, &st); err == nil && time.Unix(st.Ctim.Unix()).After(r.started) {
			return "its package was installed after it started", nil
		}
	}
	maps, err := os.ReadFile(filepath.Join(dir, "maps"))
	if err != nil {
		return "", fmt.Errorf("look at process %d: %w", r.pid, err)
	}
	if lib := replacedLibrary(maps); lib != "" {
		return filepath.Base(lib) + ", which it uses, was replaced", nil
	}
	return "", nil
}

// replacedLibrary finds a shared library in /proc/PID/maps that is no longer on
// disk, "" if there is none.
func replacedLibrary(maps []byte) string {
	for s := bufio.NewScanner(bytes.NewReader(maps)); s.Scan(); {
		f := strings.Fields(s.Text())
		// address permissions offset device inode path (deleted)
		if len(f) != 7 || f[6] != "(deleted)" || !strings.Contains(f[1], "x") {
			continue
		}
		if path := f[5]; strings.HasPrefix(path, "/usr/") || strings.HasPrefix(path, "/lib") {
			return path
		}
	}
	return ""
}

// reloadHAProxy has HAProxy execute its program again with the configuration on
// disk. Sessions stay with the old worker; the new one takes the listeners over
// and knows which servers were up.
func (n *Node) reloadHAProxy(ctx context.Context) error {
	n.packages.reloading.Lock()
	defer n.packages.reloading.Unlock()
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := n.runtime.SaveState(ctx, n.haproxySocket()+".state"); err != nil {
		return err
	}
	return haproxy.Master{Socket: n.haproxyMaster()}.Reload(ctx)
}

// Renewed lists the parts that were started anew.
type Renewed struct {
	Parts []string `json:"parts"`
}

// renewProgramsTask starts the Patroni and the HAProxy on disk in the place of
// those that run, where they are not the same. PostgreSQL and sessions go on.
func (n *Node) renewProgramsTask(ctx context.Context, _ json.RawMessage) (any, error) {
	n.packages.renewing.Lock()
	defer n.packages.renewing.Unlock()
	ctx, cancel := context.WithTimeout(ctx, renewTimeout)
	defer cancel()
	out := Renewed{Parts: []string{}}
	for _, p := range n.pendingNow(ctx) {
		var err error
		switch p.Part {
		case PartPatroni:
			err = n.renewPatroni(ctx, p.Reason)
		case PartHAProxy:
			err = n.reloadHAProxy(ctx)
		default:
			continue
		}
		if err != nil {
			return out, fmt.Errorf("start the new %s: %w", p.Part, err)
		}
		n.event(EventRestart, n.cfg.Name, actorPgha, "%s was started anew: %s", p.Part, p.Reason)
		out.Parts = append(out.Parts, p.Part)
	}
	n.pendingNow(ctx)
	return out, nil
}

// renewPatroni kills Patroni, which is started again at once and takes over the
// PostgreSQL that runs, and waits until it answers.
func (n *Node) renewPatroni(ctx context.Context, why string) error {
	old := n.patroni.Status().PID
	if err := n.patroni.Kill(why); err != nil {
		return err
	}
	for {
		err := errors.New("it has not started yet")
		if st := n.patroni.Status(); st.State == supervisor.Running && st.PID != old {
			if err = n.patroniAlive(ctx); err == nil {
				return nil
			}
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return fmt.Errorf("wait for Patroni: %w; last: %w", context.Cause(ctx), err)
		}
	}
}

// PackageVersion is a package of a node: which version runs, which is on disk,
// and which apt has.
type PackageVersion struct {
	Part      string `json:"part"`
	Package   string `json:"package,omitempty"` // "" where it does not come from one
	Running   string `json:"running,omitempty"`
	Installed string `json:"installed,omitempty"`
	Available string `json:"available,omitempty"`
	// Pending says why what runs is not what is on disk.
	Pending string `json:"pending,omitempty"`
}

// PackagesReport are the packages of a node.
type PackagesReport struct {
	Node     string           `json:"node"`
	Major    int              `json:"major"` // of its PostgreSQL
	Packages []PackageVersion `json:"packages"`
}

// packageNames are the packages that hold the parts of a node.
func (n *Node) packageNames() map[string]string {
	names := map[string]string{PartPatroni: "patroni", PartHAProxy: "haproxy"}
	if strings.HasPrefix(n.cfg.Postgres.BinDir, "/usr/lib/postgresql/") {
		names[PartPostgres] = fmt.Sprintf("postgresql-%d", n.pgMajor())
	}
	return names
}

// packagesTask tells which versions this node runs, has and could have.
func (n *Node) packagesTask(ctx context.Context, _ json.RawMessage) (any, error) {
	out := PackagesReport{Node: n.cfg.Name, Major: n.pgMajor()}
	names := n.packageNames()
	known, err := host.Candidates(ctx, names[PartPatroni], names[PartHAProxy], fmt.Sprintf("postgresql-%d", n.pgMajor()))
	if err != nil {
		return nil, err
	}
	runs := n.runningVersions(ctx)
	pending := n.pendingNow(ctx)
	for _, part := range []string{PartPostgres, PartPatroni, PartHAProxy} {
		p := PackageVersion{Part: part, Running: runs[part]}
		if c, ok := known[names[part]]; ok && c.Installed != "" {
			p.Package, p.Installed, p.Available = names[part], c.Installed, c.Available
		}
		for _, r := range pending {
			if r.Part == part {
				p.Pending = r.Reason
			}
		}
		out.Packages = append(out.Packages, p)
	}
	return out, nil
}

// runningVersions asks what runs for its version, in its own words.
func (n *Node) runningVersions(ctx context.Context) map[string]string {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	out := map[string]string{}
	if st, err := n.restClient(n.snapshot(), n.cfg.Address, n.cfg.Ports.Patroni).Status(ctx); err == nil {
		out[PartPatroni] = st.PatroniVersion
		if v := st.ServerVersion; v > 0 {
			out[PartPostgres] = fmt.Sprintf("%d.%d", v/10000, v%10000)
		}
	}
	if info, err := n.runtime.Info(ctx); err == nil {
		out[PartHAProxy] = info["Version"]
	}
	return out
}

// UpgradedPackages are the packages that an upgrade has changed, as
// "postgresql-15 15.14-0+deb12u1 -> 15.15-0+deb12u1".
type UpgradedPackages struct {
	Changed []string `json:"changed"`
}

// upgradePackagesTask upgrades this node's packages on disk; nothing is
// restarted. It goes on when whoever asked has gone: half an upgrade is worst.
func (n *Node) upgradePackagesTask(ctx context.Context, _ json.RawMessage) (any, error) {
	if !n.packages.upgrading.TryLock() {
		return nil, refused(cluster.CodeConflict, "the packages of %s are being upgraded already: wait until that has ended", n.cfg.Name)
	}
	defer n.packages.upgrading.Unlock()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), packagesTimeout)
	defer cancel()
	var names []string
	for _, name := range n.packageNames() {
		names = append(names, name)
	}
	slices.Sort(names)
	before, err := host.Candidates(ctx, names...)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		// Patroni and HAProxy of another major version are no matter of this.
		return before[name].Installed == "" || majorOfPackage(before[name].Installed) != majorOfPackage(before[name].Available)
	})
	n.log.Info("upgrading packages", "packages", names)
	if err := host.UpgradePackages(ctx, names, io.Discard); err != nil {
		return nil, err
	}
	after, err := host.Candidates(ctx, names...)
	if err != nil {
		return nil, err
	}
	out := UpgradedPackages{Changed: []string{}}
	for _, name := range names {
		if a, b := before[name].Installed, after[name].Installed; a != b {
			out.Changed = append(out.Changed, fmt.Sprintf("%s %s -> %s", name, a, b))
		}
	}
	n.pendingNow(ctx)
	return out, nil
}

// waitingRestarts says what to do about restarts that are pending. It is no fault
// of the cluster's: everything goes on as it is until it suits.
func waitingRestarts(members []MemberStatus) []string {
	var programs, settings, out []string
	for _, m := range members {
		var parts []string
		for _, p := range m.RestartPending {
			parts = append(parts, p.Part)
		}
		if len(parts) > 0 {
			programs = append(programs, fmt.Sprintf("%s (%s)", m.Name, strings.Join(parts, ", ")))
		}
		if m.SettingsPending {
			settings = append(settings, m.Name)
		}
	}
	if len(programs) > 0 {
		out = append(out, "new versions are installed on "+strings.Join(programs, " and ")+", and the old ones run: pgha upgrade postgres")
	}
	if len(settings) > 0 {
		out = append(out, "changed settings wait for a restart of PostgreSQL on "+strings.Join(settings, " and ")+": pgha restart --rolling --pending")
	}
	return out
}
