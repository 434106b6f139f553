package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pgha/firewall"
	"pgha/internal/fsx"
	"pgha/patroni"
	"pgha/supervisor"
)

// Step is one part of a reset. Each can be repeated.
type Step struct {
	Name string
	Run  func(context.Context) error
}

// ResetSteps returns what makes this host no node any more, once its unit is
// gone: what still runs is stopped, the firewall opened, and the data moved
// to aside.
func ResetSteps(p Paths, aside string) []Step {
	return []Step{
		{"stop the daemon, Patroni, PostgreSQL and HAProxy", func(ctx context.Context) error { return stopLeftovers(ctx, p) }},
		{"remove the firewall's tables", removeTables},
		{"move the data aside", func(context.Context) error { return moveAside(p, aside) }},
	}
}

// stopLeftovers ends what runs of this node without its daemon.
func stopLeftovers(ctx context.Context, p Paths) error {
	cfg, errConfig := LoadConfig(p.Config())
	var errs []error
	if err := stopDaemon(ctx, p); err != nil {
		errs = append(errs, err)
	}
	for _, name := range []string{"patroni", "haproxy"} {
		if err := stopLeftover(ctx, p, name); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", name, err))
		}
	}
	if errConfig != nil || cfg.Postgres.DataDir == "" {
		return errors.Join(errs...)
	}
	info, err := patroni.InspectDataDir(cfg.Postgres.DataDir)
	if err == nil && info.Running {
		// SIGINT is PostgreSQL's fast shutdown.
		errs = append(errs, terminate(ctx, info.PID, syscall.SIGINT, time.Minute))
	}
	return errors.Join(errs...)
}

func stopLeftover(ctx context.Context, p Paths, name string) error {
	pid, err := supervisor.Lookup(p.Run, name)
	if err != nil || pid == 0 {
		return err
	}
	return terminate(ctx, pid, syscall.SIGTERM, 90*time.Second)
}

// stopDaemon ends a daemon that runs without a unit.
func stopDaemon(ctx context.Context, p Paths) error {
	r, err := NewLocal(p).Report(ctx)
	if errors.Is(err, ErrNotRunning) {
		return stopSilent(ctx, p)
	}
	if err != nil {
		return fmt.Errorf("find the daemon: %w", err)
	}
	return terminate(ctx, r.PID, syscall.SIGTERM, 3*time.Minute)
}

// stopSilent ends a daemon that does not answer yet, or any more: it is known by
// its lock.
func stopSilent(ctx context.Context, p Paths) error {
	unlock, err := lockDaemon(p)
	if err == nil {
		unlock()
		return nil
	}
	if errors.Is(err, fs.ErrNotExist) { // no daemon has run since the boot
		return nil
	}
	text, rerr := os.ReadFile(p.lock())
	pid, perr := strconv.Atoi(strings.TrimSpace(string(text)))
	if rerr != nil || perr != nil || pid <= 1 {
		return fmt.Errorf("find the daemon: %w", err)
	}
	return terminate(ctx, pid, syscall.SIGTERM, 3*time.Minute)
}

// terminate sends sig and waits until the process is gone.
func terminate(ctx context.Context, pid int, sig syscall.Signal, limit time.Duration) error {
	if err := syscall.Kill(pid, sig); err != nil {
		if errors.Is(err, syscall.ESRCH) {
			return nil
		}
		return fmt.Errorf("signal process %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		if err := syscall.Kill(pid, 0); errors.Is(err, syscall.ESRCH) {
			return nil
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return fmt.Errorf("process %d did not end within %s", pid, limit)
		}
	}
}

// removeTables takes pgha's tables out of the kernel; PostgreSQL is gone.
func removeTables(ctx context.Context) error {
	return errors.Join(removeFirewall(ctx), removeGate(ctx))
}

func removeFirewall(ctx context.Context) error {
	fw, err := firewall.New(discardLog())
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	return fw.Remove(ctx)
}

const asidePrefix = "reset-"

// Aside is the directory that a reset at the time t moves the node's files
// to. It is on the same file system as they are, so that nothing is copied.
func (p Paths) Aside(t time.Time) string {
	return filepath.Join(p.Lib, asidePrefix+t.UTC().Format("20060102T150405"))
}

// moveAside renames the state directory and takes the configuration along. The
// state file goes last: until then the host is known to be half reset.
func moveAside(p Paths, aside string) error {
	if err := os.Mkdir(aside, 0o711); err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("make %s: %w", aside, err)
	}
	entries, err := os.ReadDir(p.Lib)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("list %s: %w", p.Lib, err)
	}
	var errs []error
	move := func(from string) {
		err := os.Rename(from, filepath.Join(aside, filepath.Base(from)))
		if errors.Is(err, syscall.EXDEV) { // the configuration, on another file system
			err = copyAway(from, filepath.Join(aside, filepath.Base(from)))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("move %s aside: %w", from, err))
		}
	}
	move(p.Config())
	for _, e := range entries {
		if path := filepath.Join(p.Lib, e.Name()); path != p.State() && !strings.HasPrefix(e.Name(), asidePrefix) {
			move(path)
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	move(p.State())
	errs = append(errs, os.RemoveAll(p.Run))
	return errors.Join(errs...)
}

func copyAway(from, to string) error {
	data, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	if err := fsx.WriteFile(to, data, 0o600, fsx.Keep, fsx.Keep); err != nil {
		return err
	}
	return os.Remove(from)
}
