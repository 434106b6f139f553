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
)

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
