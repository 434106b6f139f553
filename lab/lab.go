package lab

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// waitDelay is how long a killed command's output is waited for while one of
// its descendants holds it open.
const waitDelay = 5 * time.Second

// killTimeout bounds the death of killed processes, which a disk can hold up.
const killTimeout = 60 * time.Second

// hostsFile cannot be the name of a host, whose disk is beside it.
const hostsFile = "etc_hosts"

var errClosed = errors.New("the lab is closed")

// Options of New.
type Options struct {
	Dir string       // holds the hosts' disks; created if missing, never removed
	Log *slog.Logger // nil: no log
}

// HostOptions of AddHost.
type HostOptions struct {
	// TmpfsBytes, if not 0, makes /var/lib/pgha a tmpfs of that size instead of
	// a directory on disk. It outlives PowerOff, but not the lab.
	TmpfsBytes int64
	// Volumes are further disks, mounted below /var/lib/pgha. They outlive
	// PowerOff, but not the lab.
	Volumes []Volume
}

// Lab is a set of hosts on one switch. Its methods may be called from several
// goroutines at once.
type Lab struct {
	dir    string
	log    *slog.Logger
	marker string // environment entry that tells whose a process is
	claim  *claim

	// The lab's thread lives in the switch's namespaces and is the parent of
	// every host's init, whose death signal is bound to it.
	calls      chan func()
	done       chan struct{}
	switchNS   string // what /proc/PID/ns/net of a process in the switch reads
	switchPath string // a path to that namespace for any process of the machine

	mu       sync.Mutex
	hosts    []*Host
	cuts     map[pair]bool
	oneWay   map[pair]bool // from the first to the second
	ports    map[uint16]bool
	isolated map[string]bool
	closed   bool
}

// New makes an empty lab and removes what dead owners of earlier labs left. It
// needs root, and a main function that calls MaybeInit.
func New(ctx context.Context, opts Options) (*Lab, error) {
	if os.Getenv(initEnv) != "" {
		// Without this a program that forgets MaybeInit starts itself for ever.
		return nil, errors.New("create lab: this process is a host's init: call lab.MaybeInit first thing in main")
	}
	if os.Geteuid() != 0 {
		return nil, errors.New("create lab: root is needed to make namespaces: run it with sudo")
	}
	for _, tool := range []string{"nsenter", "setpriv"} {
		if _, err := exec.LookPath(tool); err != nil {
			return nil, fmt.Errorf("create lab: find %s (package util-linux): %w", tool, err)
		}
	}
	dir, err := filepath.Abs(opts.Dir)
	if err != nil {
		return nil, fmt.Errorf("create lab: resolve directory %q: %w", opts.Dir, err)
	}
	if opts.Dir == "" {
		return nil, errors.New("create lab: no directory given for the hosts' disks")
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("create lab: %w", err)
	}
	log := opts.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	marker, err := ownMarker()
	if err != nil {
		return nil, fmt.Errorf("create lab: %w", err)
	}
	if err := killOrphans(ctx); err != nil {
		return nil, fmt.Errorf("create lab: %w", err)
	}
	c, err := machine.claim()
	if err != nil {
		return nil, fmt.Errorf("create lab: %w", err)
	}
	l := &Lab{
		dir: dir, log: log.With("component", "lab"), marker: marker, claim: c,
		calls: make(chan func()), done: make(chan struct{}), cuts: map[pair]bool{}, oneWay: map[pair]bool{},
		ports: map[uint16]bool{}, isolated: map[string]bool{},
	}
	if err := l.startThread(); err != nil {
		return nil, errors.Join(fmt.Errorf("create lab: %w", err), c.release())
	}
	if err := l.do(l.setUpSwitch); err != nil {
		return nil, errors.Join(fmt.Errorf("create lab: %w", err), l.Close())
	}
	return l, nil
}

// startThread starts the lab's thread in new network and mount namespaces. A
// mount made there is seen by the hosts started from it and by nobody else.
func (l *Lab) startThread() error {
	started := make(chan error, 1)
	onOwnThread(func() {
		err := l.enterSwitch()
		started <- err
		if err != nil {
			return
		}
		for {
			select {
			case f := <-l.calls:
				f()
			case <-l.done:
				return
			}
		}
	})
	return <-started
}

func (l *Lab) enterSwitch() (err error) {
	if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("make the switch's namespaces (a container must be privileged): %w", err)
	}
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	if l.switchNS, err = os.Readlink("/proc/thread-self/ns/net"); err != nil {
		return fmt.Errorf("read the switch's namespace: %w", err)
	}
	l.switchPath = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	return nil
}

// onOwnThread runs f in a goroutine with a thread of its own, which ends with
// it. It is never the main thread: that one cannot end, and /proc/self shows
// its namespaces.
func onOwnThread(f func()) {
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() != os.Getpid() {
			f()
			return
		}
		moved := make(chan struct{})
		go func() { // on another thread, as this one is held
			runtime.LockOSThread()
			close(moved)
			f()
		}()
		<-moved
		runtime.UnlockOSThread()
	}()
}

// do runs f on the lab's thread.
func (l *Lab) do(f func() error) error {
	result := make(chan error, 1)
	select {
	case l.calls <- func() { result <- f() }:
		return <-result
	case <-l.done:
		return errClosed
	}
}

// Close kills every host and every process in the switch and gives everything
// back but the hosts' disks. It may be called again. Connections made with Dial
// are the caller's to close; they keep their namespace in memory until then.
func (l *Lab) Close() error {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil
	}
	l.closed = true
	hosts := slices.Clone(l.hosts)
	l.mu.Unlock()

	var errs []error
	for _, h := range hosts {
		errs = append(errs, h.PowerOff())
	}
	errs = append(errs, l.killClients())
	close(l.done)
	errs = append(errs, l.claim.release())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close lab: %w", err)
	}
	return nil
}

// killClients kills what Command has started, with all descendants.
func (l *Lab) killClients() error {
	ctx, cancel := context.WithTimeout(context.Background(), killTimeout)
	defer cancel()
	return killAll(ctx, func(pid int) bool {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid))
		return err == nil && ns == l.switchNS
	})
}

var hostName = regexp.MustCompile(`^[a-z][a-z0-9-]{0,11}[a-z0-9]$`)

// AddHost makes a host and powers it on. The name becomes its host name; it is
// 2 to 13 lower-case letters, digits and hyphens. A lab holds 16 hosts.
// After an error the name can be used again.
func (l *Lab) AddHost(ctx context.Context, name string, opts HostOptions) (*Host, error) {
	if !hostName.MatchString(name) || name == Clients {
		return nil, fmt.Errorf("add host %q: use 2 to 13 lower-case letters, digits and hyphens, and not %q", name, Clients)
	}
	h, err := l.reserve(name)
	if err != nil {
		return nil, fmt.Errorf("add host %s: %w", name, err)
	}
	if err := l.bringUp(ctx, h, opts); err != nil {
		l.mu.Lock()
		l.hosts = slices.DeleteFunc(l.hosts, func(o *Host) bool { return o == h })
		l.mu.Unlock()
		return nil, fmt.Errorf("add host %s: %w", name, err)
	}
	return h, nil
}

// reserve takes the name and the lowest free address.
func (l *Lab) reserve(name string) (*Host, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errClosed
	}
	used := map[int]bool{}
	for _, h := range l.hosts {
		if h.name == name {
			return nil, errors.New("the name is taken")
		}
		used[h.index] = true
	}
	for i := range maxHosts {
		if !used[i] {
			h := &Host{lab: l, name: name, index: i, dir: filepath.Join(l.dir, name)}
			l.hosts = append(l.hosts, h)
			return h, nil
		}
	}
	return nil, fmt.Errorf("the lab is full: it holds %d hosts", maxHosts)
}

func (l *Lab) bringUp(ctx context.Context, h *Host, opts HostOptions) error {
	for _, m := range hostMounts {
		if err := os.MkdirAll(filepath.Join(h.dir, m.disk), 0o755); err != nil {
			return err
		}
	}
	if opts.TmpfsBytes > 0 {
		err := l.do(func() error {
			return unix.Mount("pgha-lab", filepath.Join(h.dir, "lib"), "tmpfs", 0, fmt.Sprintf("mode=0755,size=%d", opts.TmpfsBytes))
		})
		if err != nil {
			return fmt.Errorf("mount tmpfs of %d bytes: %w", opts.TmpfsBytes, err)
		}
	}
	if err := h.mountVolumes(opts.Volumes); err != nil {
		return err
	}
	if err := l.writeHostsFile(); err != nil {
		return err
	}
	return h.PowerOn(ctx)
}

// writeHostsFile writes what every host sees as /etc/hosts. It is written in
// place because the hosts have the file itself mounted, which a rename would
// not change for them.
func (l *Lab) writeHostsFile() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b strings.Builder
	fmt.Fprintf(&b, "127.0.0.1 localhost\n::1 localhost\n%s %s\n", ClientAddr(), Clients)
	for _, h := range l.hosts {
		fmt.Fprintf(&b, "%s %s\n", h.Addr(), h.name)
	}
	if err := os.WriteFile(filepath.Join(l.dir, hostsFile), []byte(b.String()), 0o644); err != nil {
		return fmt.Errorf("write hosts file: %w", err)
	}
	return nil
}

// Host returns the host with that name, or nil.
func (l *Lab) Host(name string) *Host {
	for _, h := range l.Hosts() {
		if h.name == name {
			return h
		}
	}
	return nil
}

// Hosts returns the hosts in the order in which they were added.
func (l *Lab) Hosts() []*Host {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.hosts)
}

// Dial connects from the switch: it is what an application's own host does, and
// can serve as pgx's DialFunc. addr is ADDRESS:PORT or HOST:PORT with the name
// of a host of the lab; the network is one of TCP's or UDP's.
func (l *Lab) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return l.dialIn(ctx, l.switchPath, network, addr)
}

// Command returns a command that runs with the machine's files and this
// process's environment, but in the switch's network: a client such as psql.
// It gets its own process group and is killed by Close.
func (l *Lab) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "nsenter", append([]string{"--net=" + l.switchPath, "--", name}, args...)...)
	cmd.Env = append(os.Environ(), l.marker)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = waitDelay
	return cmd
}
