package machine

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

const (
	// bootLimit is generous: it is reached only by a machine that never comes up.
	bootLimit = 3 * time.Minute
	poll      = 100 * time.Millisecond
)

// errOff is the answer to a request to a machine that has no power.
var errOff = errors.New("machine is off")

// Machine is a Debian host with systemd as PID 1. Its methods may be called from
// any goroutine; changes of power (Reboot, PowerOff, PowerOn) one at a time.
type Machine struct {
	t      testing.TB
	net    *Net
	name   string
	addr   netip.Addr
	dir    string // disk (upper), its mount point (root), console.log
	cgroup string // prefix of the cgroups of its boots

	mu    sync.Mutex
	on    bool // a reboot is followed by a boot
	boots int
	boot  *boot         // nil when off
	off   chan struct{} // closed when the machine has come to rest
	err   error         // why a reboot failed to boot
}

// Boot starts a machine with the next address of the network and returns when
// systemd says that it is up. The machine goes with the test; if the test
// failed, the end of its console and journal are logged first.
func (n *Net) Boot(t testing.TB, name string) *Machine {
	t.Helper()
	m, err := n.newMachine(t, name)
	if err != nil {
		t.Fatalf("make machine %s: %v", name, err)
	}
	t.Cleanup(m.Close)
	ctx, cancel := context.WithTimeout(t.Context(), bootLimit)
	defer cancel()
	if err := m.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	return m
}

func (n *Net) newMachine(t testing.TB, name string) (*Machine, error) {
	addr, err := n.nextAddr()
	if err != nil {
		return nil, err
	}
	own, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	m := &Machine{t: t, net: n, name: name, addr: addr, dir: t.TempDir()}
	m.cgroup = filepath.Join(own, fmt.Sprintf("pgha-test-%s-%s", name, rand.Text()[:8]))
	for _, dir := range []string{"root", "work", "upper", "upper/etc"} {
		path := filepath.Join(m.dir, dir)
		// Not left to the umask: upper is the machine's / and must be open to all its users.
		if err := errors.Join(os.Mkdir(path, 0o755), os.Chmod(path, 0o755)); err != nil {
			return nil, fmt.Errorf("make disk: %w", err)
		}
	}
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails
	for file, text := range map[string]string{
		"upper/etc/machine-id": fmt.Sprintf("%x\n", id),
		"upper/etc/hostname":   name + "\n",
		"upper/etc/hosts":      fmt.Sprintf("127.0.0.1 localhost\n::1 localhost\n%s %s\n", addr, name),
		"netns":                "", // a mount point
	} {
		path := filepath.Join(m.dir, file)
		if err := errors.Join(os.WriteFile(path, []byte(text), 0o644), os.Chmod(path, 0o644)); err != nil {
			return nil, fmt.Errorf("write identity: %w", err)
		}
	}
	return m, nil
}

// Name returns the machine's host name.
func (m *Machine) Name() string { return m.name }

// Addr returns the machine's IPv4 address, which never changes.
func (m *Machine) Addr() string { return m.addr.String() }

// Run runs a command in the machine as root, with a login's environment and
// nothing of the test's, and returns what it wrote to stdout and stderr. The
// error wraps *exec.ExitError when the command failed, and the context's when
// that ended first; the command is killed then. What it left running in the
// background goes on.
func (m *Machine) Run(ctx context.Context, args ...string) (string, error) {
	return m.run(ctx, nil, args...)
}

func (m *Machine) run(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	b := m.current()
	if b == nil {
		return "", fmt.Errorf("run %q on %s: %w", args, m.name, errOff)
	}
	out, err := b.exec(ctx, stdin, args...)
	switch {
	case err != nil && ctx.Err() != nil:
		return out, fmt.Errorf("run %q on %s: %w", args, m.name, context.Cause(ctx))
	case err != nil:
		return out, fmt.Errorf("run %q on %s: %w", args, m.name, err)
	}
	return out, nil
}

// exec enters the namespaces and the cgroup of the machine, as a login would,
// without the help of any of its services.
func (b *boot) exec(ctx context.Context, stdin io.Reader, args ...string) (string, error) {
	leader, err := b.leader()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(b.cgroup, "payload", "login")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("make cgroup: %w", err)
	}
	cgroup, err := os.Open(dir)
	if err != nil {
		return "", fmt.Errorf("open cgroup: %w", err)
	}
	defer cgroup.Close()

	cmd := exec.CommandContext(ctx, "nsenter", append([]string{
		"--target", leader, "--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--",
		"/usr/bin/env", "--ignore-environment", "--chdir=/root", "HOME=/root", "USER=root", "LOGNAME=root",
		"SHELL=/bin/bash", "LANG=C.UTF-8", "TERM=dumb",
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	}, args...)...)
	var out bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = stdin, &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, UseCgroupFD: true, CgroupFD: int(cgroup.Fd())}
	// nsenter forks to enter the PID namespace; the command is in its process group.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A daemon that keeps our pipe must not keep us.
	cmd.WaitDelay = 2 * time.Second
	err = cmd.Run()
	if errors.Is(err, exec.ErrWaitDelay) {
		err = nil
	}
	return out.String(), err
}

// Copy puts a file of the host into the machine, with its permissions; missing
// directories above dstInside are made, and a running program is replaced.
func (m *Machine) Copy(src, dstInside string) error {
	f, err := os.Open(src)
	if err != nil {
		return fmt.Errorf("copy to %s: %w", m.name, err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return fmt.Errorf("copy to %s: %w", m.name, err)
	}
	mode := fmt.Sprintf("--mode=%o", info.Mode().Perm())
	if out, err := m.run(m.t.Context(), f, "install", "-D", mode, "/dev/stdin", dstInside); err != nil {
		return fmt.Errorf("copy %s: %w: %s", src, err, strings.TrimSpace(out))
	}
	return nil
}

// Reboot has systemd reboot the machine and returns when it is up again. It
// fails when the machine stays off or the context ends first.
func (m *Machine) Reboot(ctx context.Context) error {
	old := m.current()
	if old == nil {
		return fmt.Errorf("reboot %s: %w", m.name, errOff)
	}
	// The command may be killed by its own success, so its error counts only if nothing happens.
	_, runErr := m.Run(ctx, "systemctl", "reboot")
	select {
	case <-old.done:
	case <-ctx.Done():
		return fmt.Errorf("reboot %s: wait until it is down: %w", m.name, errors.Join(context.Cause(ctx), runErr))
	}
	if err := m.waitUp(ctx, old); err != nil {
		return fmt.Errorf("reboot %s: %w", m.name, err)
	}
	return nil
}

// PowerOff cuts the power: every process of the machine is killed at once. The
// disk stays. A machine that is off stays so.
func (m *Machine) PowerOff() {
	m.mu.Lock()
	m.on = false
	b, off := m.boot, m.off
	m.mu.Unlock()
	if b != nil {
		b.kill()
	}
	if off != nil {
		<-off
	}
}

// PowerOn starts a machine that is off, with the disk as it was left, and
// returns when it is up. It fails when it does not come up or the context ends first.
func (m *Machine) PowerOn(ctx context.Context) error {
	if err := m.start(); err != nil {
		return fmt.Errorf("power on %s: %w", m.name, err)
	}
	if err := m.waitUp(ctx, nil); err != nil {
		return fmt.Errorf("power on %s: %w", m.name, err)
	}
	return nil
}

// Close cuts the power for good. It is called at the end of the test.
func (m *Machine) Close() {
	if m.t.Failed() {
		m.logState()
	}
	m.PowerOff()
}

// logState logs what helps to see why a test failed.
func (m *Machine) logState() {
	console, err := os.ReadFile(filepath.Join(m.dir, "console.log"))
	m.t.Logf("console of %s (error %v):\n%s", m.name, err, tail(console))
	// From the disk, so that a machine that is off is heard too.
	journal, err := exec.Command("journalctl", "--no-pager", "--lines=200",
		"--directory="+filepath.Join(m.dir, "upper/var/log/journal")).CombinedOutput()
	m.t.Logf("journal of %s (error %v):\n%s", m.name, err, journal)
}

func (m *Machine) current() *boot {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.boot
}

// start boots the machine, and boots it again whenever it asks to, until it
// powers off or is powered off.
func (m *Machine) start() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.boot != nil {
		return errors.New("machine is on")
	}
	b, err := m.nextBoot()
	if err != nil {
		return err
	}
	m.boot, m.on, m.err = b, true, nil
	off := make(chan struct{})
	m.off = off
	go func() {
		defer close(off)
		for b != nil {
			<-b.done
			b = m.afterBoot(b)
		}
	}()
	return nil
}

// afterBoot returns the next boot of the machine, or nil if it is off now.
func (m *Machine) afterBoot(last *boot) *boot {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.boot = nil
	if last.code != exitReboot {
		m.err = fmt.Errorf("it powered off (exit code %d)", last.code)
	} else if m.on {
		m.boot, m.err = m.nextBoot()
	}
	return m.boot
}

func (m *Machine) nextBoot() (*boot, error) {
	// A new namespace each time: a kernel that boots has no rules and no connections.
	ns, err := m.net.connect(m.addr)
	if err != nil {
		return nil, err
	}
	m.boots++
	return startBoot(m.dir, m.net.root, m.name, fmt.Sprintf("%s-%d", m.cgroup, m.boots), ns)
}

// waitUp waits until a boot other than old has come up.
func (m *Machine) waitUp(ctx context.Context, old *boot) error {
	ticker := time.NewTicker(poll)
	defer ticker.Stop()
	state := "not started"
	for {
		m.mu.Lock()
		b, off, cause := m.boot, m.off, m.err
		m.mu.Unlock()
		select {
		case <-off:
			console, _ := os.ReadFile(filepath.Join(m.dir, "console.log"))
			return fmt.Errorf("it is off: %w\n%s", cause, tail(console))
		default:
		}
		if b != nil && b != old {
			out, err := b.exec(ctx, nil, "systemctl", "is-system-running")
			switch state = strings.TrimSpace(out); state {
			case "running":
				return nil
			case "degraded":
				failed, _ := b.exec(ctx, nil, "systemctl", "--failed", "--no-legend", "--plain")
				m.t.Logf("%s is up, with failed units:\n%s", m.name, failed)
				return nil
			case "":
				state = fmt.Sprint(err)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait until it is up: %w, last state: %s", context.Cause(ctx), state)
		case <-ticker.C:
		}
	}
}
