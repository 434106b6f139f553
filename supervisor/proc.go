package supervisor

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// userHZ is the unit of times in /proc/PID/stat: 100 a second on every
// architecture that Linux gives to userland here.
const userHZ = 100

// procStat is what is used of /proc/PID/stat.
type procStat struct {
	state               byte
	ppid, pgrp, session int
	start               uint64 // clock ticks since boot
}

func readStat(pid int) (procStat, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return procStat{}, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	st, err := parseStat(data)
	if err != nil {
		return procStat{}, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	return st, nil
}

// parseStat decodes the content of /proc/PID/stat. The second field, the
// command, is chosen by the process and may hold spaces and brackets.
func parseStat(data []byte) (st procStat, err error) {
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 || len(f[0]) != 1 {
		return st, fmt.Errorf("unknown format %q", data)
	}
	st.state = f[0][0]
	var errs [4]error
	st.ppid, errs[0] = strconv.Atoi(f[1])
	st.pgrp, errs[1] = strconv.Atoi(f[2])
	st.session, errs[2] = strconv.Atoi(f[3])
	st.start, errs[3] = strconv.ParseUint(f[19], 10, 64)
	return st, errors.Join(errs[:]...)
}

// readCmdline returns the arguments of a process; none for a zombie.
func readCmdline(pid int) ([]string, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, fmt.Errorf("read command line of process %d: %w", pid, err)
	}
	if len(data) == 0 {
		return nil, nil
	}
	return strings.Split(strings.TrimSuffix(string(data), "\x00"), "\x00"), nil
}

// markerState says what /proc/PID/environ tells about a marker.
type markerState int

const (
	markerAbsent     markerState = iota // readable, and no marker in it
	markerSame                          // it is the one asked for
	markerOther                         // it holds another marker
	markerUnreadable                    // not permitted: without CAP_SYS_PTRACE, for other users' processes
)

// readMarker returns the marker in the environment of a process.
func readMarker(pid int, want string) (markerState, string) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", pid))
	if errors.Is(err, fs.ErrPermission) {
		return markerUnreadable, ""
	}
	for e := range bytes.SplitSeq(data, []byte{0}) {
		if v, ok := bytes.CutPrefix(e, []byte(MarkerEnv+"=")); ok {
			if string(v) == want {
				return markerSame, want
			}
			return markerOther, string(v)
		}
	}
	return markerAbsent, ""
}

func readUID(pid int) (uint32, error) {
	var st syscall.Stat_t
	if err := syscall.Stat(fmt.Sprintf("/proc/%d", pid), &st); err != nil {
		return 0, fmt.Errorf("read owner of process %d: %w", pid, err)
	}
	return st.Uid, nil
}

func readBootID() (string, error) {
	data, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(data)), nil
}

// allPIDs lists the processes in /proc.
func allPIDs() ([]int, error) {
	d, err := os.Open("/proc")
	if err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	names, err := d.Readdirnames(-1)
	if err := errors.Join(err, d.Close()); err != nil {
		return nil, fmt.Errorf("list processes: %w", err)
	}
	var pids []int
	for _, n := range names {
		if pid, err := strconv.Atoi(n); err == nil {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// wallClock turns a start time in ticks since boot into a time of day.
func wallClock(ticks uint64) time.Time {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return time.Now()
	}
	return time.Now().Add(time.Duration(ticks)*(time.Second/userHZ) - time.Duration(ts.Nano()))
}
