package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/pgdata"
	"pgha/internal/procstat"
)

// startSlack is how far the start time in the pid file and the kernel's may lie
// apart. Patroni allows the same.
const startSlack = 3 * time.Second

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
		var st procstat.Stat
		st, err = procstat.Read(pm.pid)
		pm.started = st.Started
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
	st, err := procstat.Read(pid)
	if pgdata.Ended(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if file.Start == 0 || st.StartedAt().Sub(time.Unix(file.Start, 0)).Abs() <= startSlack {
		return true, nil
	}
	return holdsSharedMemory(pid)
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
	st, err := procstat.Read(pid)
	if pgdata.Ended(err) {
		return false, nil
	}
	return st.Started == started, err
}
