package machine

import (
	"bufio"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

//go:embed boot.sh
var bootScript string

// exitReboot is how systemd-nspawn --keep-unit says that the machine asked to
// be booted again.
const exitReboot = 133

// boot is one life of a machine, from power on to off or reboot.
type boot struct {
	process *os.Process
	cgroup  string        // directory of its cgroup; nspawn puts the machine into payload below it
	done    chan struct{} // closed when no process of the machine is left
	code    int           // exit code of nspawn, -1 when killed; set before done is closed
}

// startBoot starts the machine in dir and returns at once. It takes ns over.
func startBoot(dir, root, name, cgroup string, ns netns.NsHandle) (*boot, error) {
	started := make(chan error, 1)
	b := &boot{cgroup: cgroup, done: make(chan struct{})}
	go func() {
		// The kernel kills the child when this thread ends, not when the
		// process does, so the thread has to wait with us.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		defer func() { _ = ns.Close() }()
		cmd, err := b.start(dir, root, name, ns)
		started <- err
		if err != nil {
			return
		}
		_ = cmd.Wait() // the exit code says it all
		b.code = cmd.ProcessState.ExitCode()
		removeCgroup(cgroup)
		close(b.done)
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start systemd-nspawn: %w", err)
	}
	return b, nil
}

func (b *boot) start(dir, root, name string, ns netns.NsHandle) (*exec.Cmd, error) {
	mount, err := cgroupMount()
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(b.cgroup, 0o755); err != nil {
		return nil, fmt.Errorf("make cgroup: %w", err)
	}
	cgroup, err := os.Open(b.cgroup)
	if err != nil {
		return nil, fmt.Errorf("open cgroup: %w", err)
	}
	defer cgroup.Close()
	console, err := os.OpenFile(filepath.Join(dir, "console.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open console log: %w", err)
	}
	defer console.Close()

	nsPath := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), int(ns))
	cmd := exec.Command("/bin/sh", "-c", bootScript, "boot.sh", dir, root, mount, nsPath, name)
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{
		// First process of its own PID namespace: with it, all of the machine goes.
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS,
		Pdeathsig:   unix.SIGKILL,
		Setpgid:     true, // an interrupt from the terminal is the test's, not the machine's
		UseCgroupFD: true,
		CgroupFD:    int(cgroup.Fd()),
	}
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, os.Remove(b.cgroup))
	}
	b.process = cmd.Process
	return cmd, nil
}

// kill cuts the power and returns when no process of the machine is left.
func (b *boot) kill() {
	_ = b.process.Kill() // an error means that it has ended already
	<-b.done
}

// leader returns the process id, on the host, of the machine's PID 1, or an
// error while it is not up.
func (b *boot) leader() (string, error) {
	data, err := os.ReadFile(filepath.Join(b.cgroup, "payload", "init.scope", "cgroup.procs"))
	if err != nil {
		return "", fmt.Errorf("find PID 1: %w", err)
	}
	for pid := range strings.FieldsSeq(string(data)) {
		status, err := os.ReadFile(filepath.Join("/proc", pid, "status"))
		if err != nil {
			continue // it ended
		}
		for line := range strings.Lines(string(status)) {
			if ids := strings.Fields(line); ids[0] == "NSpid:" && ids[len(ids)-1] == "1" {
				return pid, nil
			}
		}
	}
	return "", errors.New("find PID 1: not up yet")
}

// cgroupMount returns where the host's cgroup2 hierarchy is mounted. We do not
// mount it ourselves: mounting it anew changes its options for the whole host.
func cgroupMount() (string, error) {
	f, err := os.Open("/proc/self/mounts")
	if err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 2 && fields[2] == "cgroup2" {
			return fields[1], nil
		}
	}
	if err := lines.Err(); err != nil {
		return "", fmt.Errorf("find cgroup2: %w", err)
	}
	return "", errors.New("no cgroup2 hierarchy is mounted: mount -t cgroup2 cgroup2 /sys/fs/cgroup")
}

// ownCgroup returns the directory of this process's cgroup. Machines are put
// below it, so that on a host run by systemd they are part of our unit or session.
func ownCgroup() (string, error) {
	mount, err := cgroupMount()
	if err != nil {
		return "", err
	}
	data, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", fmt.Errorf("find own cgroup: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(mount, path), nil
		}
	}
	return "", errors.New("find own cgroup: no cgroup2 entry in /proc/self/cgroup")
}

// removeCgroup removes an empty cgroup and those below it. An error leaves
// empty directories, which nobody minds.
func removeCgroup(dir string) {
	var dirs []string
	_ = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	for _, d := range slices.Backward(dirs) {
		_ = os.Remove(d)
	}
}
