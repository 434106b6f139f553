package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"sync"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"pgha/internal/procstat"
)

// child is a living process, held by its pidfd, so that nothing done to it can
// hit another process with the same pid.
type child struct {
	pid       int
	start     uint64 // ticks since boot
	startedAt time.Time
	adopted   bool
	pidfd     *os.File
	exited    chan ExitStatus // receives once, when the process has ended
}

// holdPID opens a pidfd for pid, which may be anybody's. A process that has gone
// gives an error that satisfies errors.Is(err, unix.ESRCH).
func holdPID(pid int) (*child, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("open pidfd of process %d: %w", pid, err)
	}
	return newChild(pid, fd), nil
}

func newChild(pid, pidfd int) *child {
	return &child{pid: pid, pidfd: os.NewFile(uintptr(pidfd), "pidfd:"+strconv.Itoa(pid)), exited: make(chan ExitStatus, 1)}
}

// identify fills in the start time.
func (c *child) identify() (procstat.Stat, error) {
	st, err := procstat.Read(c.pid)
	if err != nil {
		return st, err
	}
	c.start, c.startedAt = st.Started, st.StartedAt()
	return st, nil
}

// alive reports whether the process behind the pidfd has not ended. Having read
// something about the pid, alive afterwards proves that it was about this one.
func (c *child) alive() bool {
	alive := false
	_ = c.control(func(fd int) error { alive = !readable(fd); return nil })
	return alive
}

func (c *child) control(f func(fd int) error) error {
	rc, err := c.pidfd.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	return errors.Join(rc.Control(func(fd uintptr) { ferr = f(int(fd)) }), ferr)
}

// signal sends sig. A process that has ended already gives unix.ESRCH.
func (c *child) signal(sig syscall.Signal) error {
	if err := c.control(func(fd int) error { return unix.PidfdSendSignal(fd, sig, nil, 0) }); err != nil {
		return fmt.Errorf("send %s to process %d: %w", unix.SignalName(sig), c.pid, err)
	}
	return nil
}

// watch waits in a goroutine for the process to end. It must be called once.
func (c *child) watch() error {
	rc, err := c.pidfd.SyscallConn()
	if err != nil {
		return fmt.Errorf("watch process %d: %w", c.pid, err)
	}
	if err := c.pidfd.SetReadDeadline(time.Time{}); err != nil {
		return fmt.Errorf("watch process %d: its pidfd cannot be polled: %w", c.pid, err)
	}
	go func() {
		st := ExitStatus{Code: -1, PID: c.pid}
		// The runtime's poller wakes us, so that no thread is held; closing the
		// pidfd ends the wait.
		err := rc.Read(func(fd uintptr) bool {
			if !readable(int(fd)) {
				return false
			}
			reap(int(fd), &st)
			return true
		})
		if err != nil {
			return // released
		}
		st.At = time.Now()
		st.Ran = st.At.Sub(c.startedAt)
		c.exited <- st
	}()
	return nil
}

// release lets go of the process without touching it.
func (c *child) release() { _ = c.pidfd.Close() }

// readable reports whether the process behind a pidfd has ended.
func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return err == nil && n > 0
		}
	}
}

// siginfoChild is siginfo_t as waitid fills it, on 64-bit Linux.
type siginfoChild struct {
	signo, errno, code, _ int32
	pid                   int32
	uid                   uint32
	status                int32
	_                     [128 - 28]byte
}

// Values of si_code for an ended child.
const (
	cldExited = 1
	cldKilled = 2
	cldDumped = 3
)

// reap collects the exit status of an ended process if it is our child; after a
// restart of the supervisor in place an adopted process may be. Only this very
// process is waited for: other parts of the program have children too.
func reap(pidfd int, st *ExitStatus) {
	var si siginfoChild
	for {
		err := unix.Waitid(unix.P_PIDFD, pidfd, (*unix.Siginfo)(unsafe.Pointer(&si)), unix.WEXITED|unix.WNOHANG, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || si.pid == 0 {
			return // not ours (ECHILD): the status goes to its parent
		}
		break
	}
	st.Known = true
	switch si.code {
	case cldExited:
		st.Code = int(si.status)
	case cldKilled, cldDumped:
		st.Signal, st.Core = syscall.Signal(si.status), si.code == cldDumped
	}
}

// rlimitMu guards the moments in which this process's own limit is changed.
var rlimitMu sync.Mutex

// withNoFile runs start with this process's limit of open files set to n: a child
// takes its limits at the fork, and may read them before they could be changed
// from outside.
func withNoFile(n uint64, start func() error) error {
	if n == 0 {
		return start()
	}
	rlimitMu.Lock()
	defer rlimitMu.Unlock()
	var old unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &old); err != nil {
		return fmt.Errorf("get limit of open files: %w", err)
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: n, Max: max(n, old.Max)}); err != nil {
		return fmt.Errorf("set limit of open files to %d: %w", n, err)
	}
	err := start()
	if rerr := unix.Setrlimit(unix.RLIMIT_NOFILE, &old); rerr != nil {
		return errors.Join(err, fmt.Errorf("restore limit of open files: %w", rerr))
	}
	return err
}

// spawn starts the child of s with its output on out. On return the program has
// been executed, not only forked.
func spawn(s Spec, out *os.File) (*child, error) {
	if st, err := os.Stat(s.Dir); err != nil || !st.IsDir() {
		return nil, fmt.Errorf("start %s: working directory %s is missing", s.Path, s.Dir)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	defer func() { _ = null.Close() }()
	pidfd := -1
	// Its own session: no terminal, no signal meant for us reaches it.
	sys := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if u := s.User; u != nil {
		sys.Credential = &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}
	}
	attr := &syscall.ProcAttr{Dir: s.Dir, Env: s.Env, Files: []uintptr{null.Fd(), out.Fd(), out.Fd()}, Sys: sys}
	var pid int
	err = withNoFile(s.Limits.NoFile, func() (err error) {
		pid, _, err = syscall.StartProcess(s.Path, append([]string{s.Path}, s.Args...), attr)
		return err
	})
	if pid == 0 {
		return nil, fmt.Errorf("start %s: %w", s.Path, err)
	}
	// From here on the child exists: until we reap it its pid is not given away.
	if pidfd < 0 {
		return nil, errors.Join(fmt.Errorf("start %s: no pidfd (Linux 5.4 or later is needed)", s.Path), syscall.Kill(pid, syscall.SIGKILL))
	}
	nerr := unix.SetNonblock(pidfd, true)
	c := newChild(pid, pidfd)
	_, ierr := c.identify()
	if err := errors.Join(err, nerr, ierr); err != nil {
		return nil, errors.Join(fmt.Errorf("start %s: %w", s.Path, err), c.discard())
	}
	return c, nil
}

// discard kills a child that cannot be used and reaps it in the background.
func (c *child) discard() error {
	err := errors.Join(c.signal(syscall.SIGKILL), c.watch())
	go func() { <-c.exited; c.release() }()
	return err
}

// setOOMScore writes the child's OOM score adjustment.
func setOOMScore(pid, adj int) error {
	path := fmt.Sprintf("/proc/%d/oom_score_adj", pid)
	// Not O_CREATE: the process may have ended.
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return fmt.Errorf("set OOM score adjustment to %d: %w", adj, err)
	}
	_, err = f.WriteString(strconv.Itoa(adj))
	if err := errors.Join(err, f.Close()); err != nil && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("set OOM score adjustment to %d: %w", adj, err)
	}
	return nil
}

// killGroup kills what is left of the process group that leader led, and waits a
// short while until it is gone. It goes member by member through pidfds: the
// number of the group may by now belong to someone else.
func killGroup(leader *child, marker string) error {
	var errs []error
	for range 200 {
		members, err := groupMembers(leader, marker)
		if err != nil {
			return err
		}
		if len(members) == 0 {
			return nil
		}
		errs = nil
		for _, m := range members {
			if err := m.signal(syscall.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
				errs = append(errs, err)
			}
			m.release()
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.Join(append(errs, fmt.Errorf("kill process group %d: processes are left", leader.pid))...)
}

func groupMembers(leader *child, marker string) ([]*child, error) {
	if st, err := procstat.Read(leader.pid); err == nil && st.Started != leader.start {
		return nil, nil // the number has a new owner, so the group was empty
	}
	pids, err := allPIDs()
	if err != nil {
		return nil, err
	}
	var members []*child
	for _, pid := range pids {
		// Cheap look first; what counts is read again under a pidfd.
		if st, err := procstat.Read(pid); err != nil || st.Group != leader.pid || pid == leader.pid {
			continue
		}
		c, err := holdPID(pid)
		if err != nil {
			continue
		}
		st, err := procstat.Read(pid)
		mark, _ := readMarker(pid, marker)
		ours := err == nil && st.Group == leader.pid && st.Session == leader.pid && st.Started >= leader.start &&
			st.State != 'Z' && slices.Contains([]markerState{markerSame, markerUnreadable}, mark)
		if !ours || !c.alive() {
			c.release()
			continue
		}
		members = append(members, c)
	}
	return members, nil
}
