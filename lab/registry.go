package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/fsx"
)

// registry counts the labs of a machine, so that the last one, and only that,
// removes the mount points: removing a directory would unmount what other labs'
// hosts have on it. A lab is alive while it holds the lock on its file, which
// the kernel drops with its owner.
type registry struct {
	dir    string
	points []string // in the order of creation, parents first
}

var machine = registry{dir: "/run/pgha-lab", points: mountPoints()}

type claim struct {
	reg  registry
	file *os.File
}

func (r registry) claim() (_ *claim, err error) {
	lock, err := r.lock()
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := r.sweep(); err != nil {
		return nil, err
	}
	f, err := os.CreateTemp(r.dir, "lab-*")
	if err != nil {
		return nil, fmt.Errorf("register lab: %w", err)
	}
	c := &claim{reg: r, file: f}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", f.Name(), err), f.Close())
	}
	if err := r.makePoints(); err != nil {
		return nil, errors.Join(err, f.Close(), r.sweep())
	}
	return c, nil
}

func (c *claim) release() (err error) {
	lock, err := c.reg.lock()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	if err := c.file.Close(); err != nil {
		return fmt.Errorf("unregister lab: %w", err)
	}
	if err := c.reg.sweep(); err != nil {
		return err
	}
	// Not empty while another lab lives.
	if err := os.Remove(c.reg.dir); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return fmt.Errorf("remove registry: %w", err)
	}
	return nil
}

// lock takes the registry's lock: the directory itself. It is released by
// closing the file.
func (r registry) lock() (*os.File, error) {
	for {
		if err := os.MkdirAll(r.dir, 0o755); err != nil {
			return nil, fmt.Errorf("make registry: %w", err)
		}
		f, err := os.Open(r.dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue // the last lab has just removed it
		}
		if err != nil {
			return nil, fmt.Errorf("open registry: %w", err)
		}
		if err := flock(f); err != nil {
			return nil, errors.Join(fmt.Errorf("lock registry: %w", err), f.Close())
		}
		mine, err := f.Stat()
		if err != nil {
			return nil, errors.Join(fmt.Errorf("stat registry: %w", err), f.Close())
		}
		if now, err := os.Stat(r.dir); err == nil && os.SameFile(mine, now) {
			return f, nil
		}
		if err := f.Close(); err != nil {
			return nil, fmt.Errorf("close registry: %w", err)
		}
	}
}

func flock(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// sweep forgets dead labs and, when none lives, removes the mount points that
// labs have made. The registry must be locked.
func (r registry) sweep() error {
	files, err := filepath.Glob(filepath.Join(r.dir, "lab-*"))
	if err != nil {
		return fmt.Errorf("list labs: %w", err)
	}
	live := false
	for _, name := range files {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("open lab's file: %w", err)
		}
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			err = os.Remove(name)
		} else if errors.Is(err, unix.EWOULDBLOCK) {
			live, err = true, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("sweep %s: %w", name, err)
		}
	}
	if live {
		return nil
	}
	made, err := r.made()
	if err != nil {
		return err
	}
	for i := len(made) - 1; i >= 0; i-- {
		err := os.Remove(made[i])
		// A real installation may have moved in since.
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return fmt.Errorf("remove mount point: %w", err)
		}
	}
	if err := os.Remove(r.record()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove record of mount points: %w", err)
	}
	return nil
}

func (r registry) record() string { return filepath.Join(r.dir, "made.json") }

func (r registry) made() (made []string, err error) {
	if err := fsx.ReadJSON(r.record(), &made); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("read record of mount points: %w", err)
	}
	return made, nil
}

// makePoints makes the mount points that are missing, written down beforehand
// so that a crash leaves none behind.
func (r registry) makePoints() error {
	made, err := r.made()
	if err != nil {
		return err
	}
	var missing []string
	for _, p := range r.points {
		if _, err := os.Stat(p); errors.Is(err, fs.ErrNotExist) {
			missing = append(missing, p)
		} else if err != nil {
			return fmt.Errorf("look at mount point: %w", err)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	if err := fsx.WriteJSON(r.record(), append(made, missing...), 0o644); err != nil {
		return fmt.Errorf("record mount points: %w", err)
	}
	for _, p := range missing {
		if err := os.Mkdir(p, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
	}
	return nil
}

// ownerEnv marks the lab's processes with PID:START:PIDNS of the owner.
const ownerEnv = "PGHA_LAB_OWNER"

func ownMarker() (string, error) {
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return "", fmt.Errorf("read own namespace: %w", err)
	}
	start, err := startTime(os.Getpid())
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%s=%d:%s:%s", ownerEnv, os.Getpid(), start, ns), nil
}

// orphaned tells whether environ, the content of a /proc/PID/environ, names an
// owner that is dead. An owner in a PID namespace other than ns cannot be
// judged and counts as alive.
func orphaned(environ, ns string, start func(pid int) (string, error)) bool {
	for entry := range strings.SplitSeq(environ, "\x00") {
		marker, ok := strings.CutPrefix(entry, ownerEnv+"=")
		if !ok {
			continue
		}
		part := strings.SplitN(marker, ":", 3)
		if len(part) != 3 || part[2] != ns {
			return false
		}
		pid, err := strconv.Atoi(part[0])
		if err != nil {
			return false
		}
		now, err := start(pid)
		if err != nil {
			return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
		}
		return now != part[1]
	}
	return false
}

// killOrphans kills the processes whose owner is dead: clients in a switch, as
// hosts die with their owner.
func killOrphans(ctx context.Context) error {
	ns, err := os.Readlink("/proc/self/ns/pid")
	if err != nil {
		return fmt.Errorf("read own namespace: %w", err)
	}
	err = killAll(ctx, func(pid int) bool {
		environ, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
		return err == nil && orphaned(string(environ), ns, startTime)
	})
	if err != nil {
		return fmt.Errorf("kill a dead lab's processes: %w", err)
	}
	return nil
}

// killAll kills the processes that match until there are none.
func killAll(ctx context.Context, match func(pid int) bool) error {
	for {
		pids, err := listPIDs()
		if err != nil {
			return err
		}
		left := 0
		for _, pid := range pids {
			if pid == os.Getpid() || !match(pid) {
				continue
			}
			left++
			if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("kill process %d: %w", pid, err)
			}
		}
		if left == 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d processes do not die: %w", left, ctx.Err())
		case <-time.After(pollInterval):
		}
	}
}
