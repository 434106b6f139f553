package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/pgdata"
)

const (
	// userHZ is the unit of times in /proc/PID/stat: 100 a second on every
	// architecture that Linux gives to userland here.
	userHZ = 100
	// startSlack is how far the start time in the pid file and the kernel's may lie
	// apart. Patroni allows the same.
	startSlack = 3 * time.Second
)

// postmaster is a server's first process, held by its pidfd.
type postmaster struct {
	pid     int
	started uint64 // clock ticks since boot
	pidfd   *os.File
	// life ends when the process does, or when it is let go.
	life    context.Context
	end     context.CancelFunc
	watched chan struct{} // closed when nobody watches any more

	// How long it has left us without an answer, on the kept connection and on
	// new ones.
	kept, fresh silence
}

// holdPostmaster takes hold of the process in file and watches it. It returns
// nil without an error when there is none, or when its pid has gone to another.
func holdPostmaster(file pgdata.PIDFile, dataDir string) (*postmaster, error) {
	fd, err := unix.PidfdOpen(file.PID, unix.PIDFD_NONBLOCK)
	if errors.Is(err, unix.ESRCH) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open pidfd of process %d: %w", file.PID, err)
	}
	pm := &postmaster{pid: file.PID, pidfd: os.NewFile(uintptr(fd), "pidfd:"+strconv.Itoa(file.PID)), watched: make(chan struct{})}
	is, err := isPostmaster(file, dataDir)
	if err == nil && is {
		pm.started, err = startTicks(pm.pid)
	}
	// What was read is of the process that we hold if that has not ended since.
	if err != nil || !is || !pm.alive() {
		return nil, errors.Join(err, pm.pidfd.Close())
	}
	rc, err := pm.pidfd.SyscallConn()
	if err == nil {
		err = pm.pidfd.SetReadDeadline(time.Time{}) // fails if it cannot be polled
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("watch process %d: %w", pm.pid, err), pm.pidfd.Close())
	}
	pm.life, pm.end = context.WithCancel(context.Background())
	go func() {
		defer close(pm.watched)
		defer pm.end()
		// The runtime's poller wakes us; closing the pidfd ends the wait too.
		_ = rc.Read(func(fd uintptr) bool { return ended(int(fd)) })
	}()
	return pm, nil
}

// alive reports whether the process lives, by asking the kernel.
func (pm *postmaster) alive() bool {
	rc, err := pm.pidfd.SyscallConn()
	if err != nil {
		return false
	}
	gone := true
	err = rc.Control(func(fd uintptr) { gone = ended(int(fd)) })
	return err == nil && !gone
}

// release lets go of the process without touching it.
func (pm *postmaster) release() {
	_ = pm.pidfd.Close()
	<-pm.watched
}

// ended reports whether the process behind a pidfd has ended.
func ended(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// isPostmaster reports whether the process in file lives and is the server of
// dataDir. A pid may have gone to another process, even to one that works in
// the same directory: what tells them apart is the start time, or if the wall
// clock has been set since, that a server holds shared memory.
func isPostmaster(file pgdata.PIDFile, dataDir string) (bool, error) {
	pid := max(file.PID, -file.PID)
	works, err := pgdata.WorksIn(pid, dataDir)
	if err != nil || !works {
		return false, err
	}
	ticks, err := startTicks(pid)
	if pgdata.Ended(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if file.Start == 0 || sinceEpoch(ticks).Sub(time.Unix(file.Start, 0)).Abs() <= startSlack {
		return true, nil
	}
	return holdsSharedMemory(pid)
}

// startTicks returns when a process was started, in clock ticks since boot.
func startTicks(pid int) (uint64, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	// The second field, the command, may hold spaces and brackets.
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 {
		return 0, fmt.Errorf("read status of process %d: unknown format %q", pid, data)
	}
	ticks, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return 0, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	return ticks, nil
}

// sinceEpoch turns a start time in ticks since boot into a time of day.
func sinceEpoch(ticks uint64) time.Time {
	var boot unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
		return time.Time{} // agrees with no pid file
	}
	return time.Now().Add(time.Duration(ticks)*(time.Second/userHZ) - time.Duration(boot.Nano()))
}

// holdsSharedMemory reports whether a process has a System V segment attached,
// as every process of a server has that can touch the database.
func holdsSharedMemory(pid int) (bool, error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if pgdata.Ended(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read memory map of process %d: %w", pid, err)
	}
	return bytes.Contains(maps, []byte(" /SYSV")), nil
}

// Runs reports whether the postmaster of a Probe, by its PID and Started, is
// still there.
func Runs(pid int, started uint64) (bool, error) {
	ticks, err := startTicks(pid)
	if pgdata.Ended(err) {
		return false, nil
	}
	return ticks == started, err
}
