package lab

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	pollInterval  = 5 * time.Millisecond
	freezeTimeout = 30 * time.Second
)

// Proc is a process of a host.
type Proc struct {
	PID     int // on the machine
	PPID    int // on the machine
	NSPID   int // in the host; 1 is the init
	UID     int // effective
	State   byte
	Comm    string
	Cmdline []string // empty for a zombie
}

// Processes lists the host's processes by NSPID, its init included.
func (h *Host) Processes() ([]Proc, error) {
	p := h.init()
	if p == nil {
		return nil, fmt.Errorf("list processes: %w", h.errOff())
	}
	pids, err := listPIDs()
	if err != nil {
		return nil, fmt.Errorf("list processes of %s: %w", h.name, err)
	}
	var procs []Proc
	for _, pid := range pids {
		ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", pid))
		if err != nil || ns != p.ns {
			continue // gone, or elsewhere
		}
		proc, err := readProc(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("list processes of %s: %w", h.name, err)
		}
		procs = append(procs, proc)
	}
	slices.SortFunc(procs, func(a, b Proc) int { return a.NSPID - b.NSPID })
	return procs, nil
}

func listPIDs() ([]int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("open /proc: %w", err)
	}
	defer func() { _ = dir.Close() }()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return nil, fmt.Errorf("read /proc: %w", err)
	}
	var pids []int
	for _, name := range names {
		if pid, err := strconv.Atoi(name); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

func readProc(pid int) (Proc, error) {
	dir := filepath.Join("/proc", strconv.Itoa(pid))
	status, err := os.ReadFile(filepath.Join(dir, "status"))
	if err != nil {
		return Proc{}, err
	}
	cmdline, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	if err != nil {
		return Proc{}, err
	}
	p := Proc{PID: pid}
	if s := strings.TrimRight(string(cmdline), "\x00"); s != "" {
		p.Cmdline = strings.Split(s, "\x00")
	}
	for line := range strings.Lines(string(status)) {
		key, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		field := strings.Fields(value)
		switch {
		case key == "Name":
			p.Comm = value
		case len(field) == 0:
		case key == "State":
			p.State = field[0][0]
		case key == "PPid":
			p.PPID, err = strconv.Atoi(field[0])
		case key == "Uid" && len(field) > 1:
			p.UID, err = strconv.Atoi(field[1])
		case key == "NSpid":
			p.NSPID, err = strconv.Atoi(field[len(field)-1])
		}
		if err != nil {
			return Proc{}, fmt.Errorf("parse %s/status: %w", dir, err)
		}
	}
	return p, nil
}

// statFields returns the fields of a /proc stat file from the third, the state,
// on. The second can contain anything.
func statFields(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	field := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(field) < 20 {
		return nil, fmt.Errorf("parse %s: %d fields", path, len(field))
	}
	return field, nil
}

// startTime tells one process with this PID from another.
func startTime(pid int) (string, error) {
	field, err := statFields(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", fmt.Errorf("read start time of process %d: %w", pid, err)
	}
	return field[19], nil
}

// Kill sends a signal to the process with that PID in the host.
func (h *Host) Kill(nspid int, sig syscall.Signal) error {
	return h.signalWhere(func(p Proc) bool { return p.NSPID == nspid }, sig, fmt.Sprintf("process %d", nspid))
}

// Signal sends a signal to the process that a started Command runs.
func (h *Host) Signal(cmd *exec.Cmd, sig syscall.Signal) error {
	if cmd.Process == nil {
		return fmt.Errorf("send %v on %s: the command is not started", sig, h.name)
	}
	return h.signalWhere(func(p Proc) bool { return p.PPID == cmd.Process.Pid }, sig, "the command")
}

func (h *Host) signalWhere(match func(Proc) bool, sig syscall.Signal, what string) error {
	procs, err := h.Processes()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(procs, match)
	if i < 0 {
		return fmt.Errorf("send %v on %s: no such process: %s", sig, h.name, what)
	}
	if err := unix.Kill(procs[i].PID, sig); err != nil {
		return fmt.Errorf("send %v to %s on %s: %w", sig, what, h.name, err)
	}
	return nil
}

// Freeze stops every process of the host, its init last, and returns when none
// runs any more. The kernel goes on: it acknowledges packets, and timers of
// nftables run. Commands must not be started on a frozen host. It changes
// nothing if the host is frozen.
func (h *Host) Freeze() error {
	h.power.Lock()
	defer h.power.Unlock()
	if h.frozen != nil {
		return nil
	}
	stopped, err := h.stopAll()
	h.frozen = stopped
	if err != nil {
		return fmt.Errorf("freeze %s: %w", h.name, errors.Join(err, h.thaw()))
	}
	h.lab.log.Info("host frozen", "host", h.name, "processes", len(stopped))
	return nil
}

// stopAll returns the PIDs that it has stopped, in that order. Processes that
// were stopped before are not among them, as Thaw must leave them so.
func (h *Host) stopAll() (stopped []int, err error) {
	before := map[int]bool{}
	deadline := time.Now().Add(freezeTimeout)
	for withInit := false; ; {
		procs, err := h.Processes()
		if err != nil {
			return stopped, err
		}
		quiet := true
		for _, p := range procs {
			switch {
			case p.NSPID == 1 && !withInit, before[p.PID]:
			case slices.Contains(stopped, p.PID):
				quiet = quiet && halted(p.PID)
			case p.State == 'T':
				before[p.PID] = true
			default:
				quiet = false // look again: it may have forked
				if err := unix.Kill(p.PID, unix.SIGSTOP); err != nil && !errors.Is(err, unix.ESRCH) {
					return stopped, fmt.Errorf("stop process %d: %w", p.PID, err)
				}
				stopped = append(stopped, p.PID)
			}
		}
		if quiet && withInit {
			return stopped, nil
		}
		withInit = withInit || quiet
		if time.Now().After(deadline) {
			return stopped, fmt.Errorf("some processes do not stop within %v", freezeTimeout)
		}
		time.Sleep(pollInterval)
	}
}

// halted tells whether no thread of a process that was sent SIGSTOP can run its
// own code any more. A thread in the kernel that cannot be interrupted counts:
// it stops before it returns, and may be waiting for a child that is stopped.
func halted(pid int) bool {
	paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return false
	}
	for _, path := range paths {
		if field, err := statFields(path); err == nil && !strings.Contains("TtDZX", field[0]) {
			return false
		}
	}
	return true // or gone
}

// Thaw lets go on what Freeze has stopped. It changes nothing if the host is
// not frozen.
func (h *Host) Thaw() error {
	h.power.Lock()
	defer h.power.Unlock()
	if h.frozen == nil {
		return nil
	}
	if err := h.thaw(); err != nil {
		return fmt.Errorf("thaw %s: %w", h.name, err)
	}
	h.lab.log.Info("host thawed", "host", h.name)
	return nil
}

func (h *Host) thaw() error {
	procs, err := h.Processes()
	if err != nil {
		return err
	}
	var errs []error
	for _, pid := range slices.Backward(h.frozen) {
		if !slices.ContainsFunc(procs, func(p Proc) bool { return p.PID == pid }) {
			continue // killed meanwhile
		}
		if err := unix.Kill(pid, unix.SIGCONT); err != nil && !errors.Is(err, unix.ESRCH) {
			errs = append(errs, fmt.Errorf("continue process %d: %w", pid, err))
		}
	}
	h.frozen = nil
	return errors.Join(errs...)
}

// FillDisk fills the file system at a path of the host until nothing fits, and
// returns what empties it again. It refuses any but a tmpfs or volume of the
// lab: see HostOptions.
func (h *Host) FillDisk(path string) (undo func() error, err error) {
	if !h.Alive() {
		return nil, fmt.Errorf("fill disk: %w", h.errOff())
	}
	var st unix.Statfs_t
	if err := unix.Statfs(h.Path(path), &st); err != nil {
		return nil, fmt.Errorf("fill disk: look at %s on %s: %w", path, h.name, err)
	}
	if st.Type != unix.TMPFS_MAGIC && !h.hasVolume(path) {
		return nil, fmt.Errorf("fill disk: %s on %s lies on the machine's disk: add the host with TmpfsBytes or Volumes", path, h.name)
	}
	name := filepath.Join(path, ".pgha-lab-fill")
	f, err := os.OpenFile(h.Path(name), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, fmt.Errorf("fill disk: %w", err)
	}
	// Most of it at once, where the file system can; the rest is written.
	if most := int64(st.Bavail) * st.Bsize / 10 * 9; unix.Fallocate(int(f.Fd()), 0, 0, most) == nil {
		if _, err := f.Seek(most, io.SeekStart); err != nil {
			return nil, errors.Join(fmt.Errorf("fill disk: %w", err), f.Close(), os.Remove(f.Name()))
		}
	}
	for chunk := make([]byte, 1<<20); len(chunk) > 0; {
		// Smaller and smaller, as a page may have become free since.
		if _, err = f.Write(chunk); errors.Is(err, unix.ENOSPC) {
			chunk = chunk[:len(chunk)/2]
		} else if err != nil {
			return nil, errors.Join(fmt.Errorf("fill disk: %w", err), f.Close(), os.Remove(f.Name()))
		}
	}
	if err := f.Close(); err != nil {
		return nil, fmt.Errorf("fill disk: %w", err)
	}
	h.lab.log.Info("disk filled", "host", h.name, "path", path)
	return func() error {
		if err := os.Remove(h.Path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("empty disk: %w", err)
		}
		return nil
	}, nil
}
