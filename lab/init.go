package lab

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// initEnv is set for a host's init, and for nothing that it runs.
const initEnv = "PGHA_LAB_INIT"

const initName = "pgha-lab-init"

// ready is what an init says when the host can be used; anything else that it
// says is why not.
const ready = "ready"

// spec is what an init reads from its standard input, once its network link is
// there. The input then stays open for as long as the owner lives.
type spec struct {
	Name      string
	Dir       string // the host's disk
	HostsFile string
	Index     int
}

// hostMounts are the directories on a host's disk and where the host sees them.
var hostMounts = []struct{ disk, point string }{
	{"etc", "/etc/pgha"},
	{"lib", "/var/lib/pgha"},
	{"log", "/var/log/pgha"},
}

func mountPoints() []string {
	var points []string
	for _, m := range hostMounts {
		points = append(points, m.point)
	}
	return points
}

// MaybeInit must be called first thing in main, and in TestMain, of a program
// that makes labs: the hosts' PID 1 is that program, started again. In a host's
// init it does not return; elsewhere it does nothing.
func MaybeInit() {
	if os.Getenv(initEnv) == "" {
		return
	}
	// There is no main to return to.
	os.Exit(initMain(os.Stdin, os.Stdout))
}

func initMain(in io.Reader, out io.WriteCloser) int {
	// A shell's "kill 1" is no power off.
	signal.Ignore(syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT, syscall.SIGPIPE,
		syscall.SIGUSR1, syscall.SIGUSR2)
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)

	var s spec
	err := json.NewDecoder(in).Decode(&s)
	if err == nil {
		err = setUpHost(s)
	}
	answer := ready
	if err != nil {
		answer = err.Error()
	}
	if _, werr := io.WriteString(out, answer); err != nil || werr != nil || out.Close() != nil {
		return 1
	}
	ownerGone := make(chan struct{})
	go func() {
		_, _ = io.Copy(io.Discard, in)
		close(ownerGone)
	}()
	for {
		select {
		case <-children:
			reap()
		case <-ownerGone:
			return 0 // and the kernel ends the host
		}
	}
}

// reap buries every dead child. All are orphans of the host: an init starts
// nothing itself, so that nobody else waits for them.
func reap() {
	for {
		pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if pid <= 0 || err != nil {
			return
		}
	}
}

func setUpHost(s spec) error {
	if err := unix.Sethostname([]byte(s.Name)); err != nil {
		return fmt.Errorf("set host name: %w", err)
	}
	// The disk comes first, as it may lie in what is about to be hidden.
	for _, m := range hostMounts {
		if err := unix.Mount(filepath.Join(s.Dir, m.disk), m.point, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	err := unix.Mount(s.HostsFile, "/etc/hosts", "", unix.MS_BIND, "")
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a machine need not have one
		return fmt.Errorf("mount /etc/hosts: %w", err)
	}
	for _, m := range []struct{ kind, point, data string }{
		{"proc", "/proc", ""},
		{"tmpfs", "/dev/shm", "mode=1777"},
		{"tmpfs", "/run", "mode=0755"},
	} {
		if err := unix.Mount("pgha-lab", m.point, m.kind, unix.MS_NOSUID|unix.MS_NODEV, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.point, err)
		}
	}
	if err := os.WriteFile("/proc/self/comm", []byte(initName), 0); err != nil {
		return fmt.Errorf("set process name: %w", err)
	}
	if err := setUpLink("eth0", firstHost+s.Index); err != nil {
		return err
	}
	// It leads nowhere, but a host has one, and asks it for its own address.
	err = netlink.RouteAdd(&netlink.Route{Gw: ClientAddr().AsSlice()})
	if err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}
