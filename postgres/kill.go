package postgres

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/pgdata"
)

// Kill ends the server of dataDir with SIGKILL to each of its processes, and
// returns when ProveGone says that none is left. It is for a server that hangs:
// one that was stopped hears of nothing else. What was committed is recovered at
// the next start. It fails when ctx ends first.
func Kill(ctx context.Context, dataDir string) error {
	for {
		var errs []error
		err := holders(dataDir, func(pid int) bool {
			errs = append(errs, killHolder(pid, dataDir))
			return true
		})
		gone := false
		if err == nil {
			gone, err = ProveGone(dataDir)
		}
		if gone {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("kill PostgreSQL: %w", errors.Join(append(errs, err, ctx.Err())...))
		case <-time.After(10 * time.Millisecond): // it may just have forked
		}
	}
}

// killHolder kills a process, unless its pid has gone to another.
func killHolder(pid int, dataDir string) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("open pidfd of process %d: %w", pid, err)
	}
	defer func() { _ = unix.Close(fd) }()
	dir, err := pgdata.Look(dataDir)
	if err != nil {
		return err
	}
	if works, err := dir.HasAtWork(pid); err != nil || !works {
		return err
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("kill process %d: %w", pid, err)
	}
	return nil
}
