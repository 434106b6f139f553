// Package procstat reads what the kernel tells of a process in /proc/PID/stat.
package procstat

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// userHZ is the unit of times in /proc/PID/stat: 100 a second on every
// architecture that Linux gives to userland here.
const userHZ = 100

// Stat is what is used of it.
type Stat struct {
	State                  byte // R, S, D, T for stopped by a signal, Z for dead and not reaped
	Parent, Group, Session int
	Started                uint64 // clock ticks since boot
}

// Read returns the Stat of a process. It fails with fs.ErrNotExist or ESRCH when
// there is none.
func Read(pid int) (Stat, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return Stat{}, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	st, err := parse(data)
	if err != nil {
		return Stat{}, fmt.Errorf("read status of process %d: %w", pid, err)
	}
	return st, nil
}

// parse decodes the content of /proc/PID/stat. The second field, the command, is
// chosen by the process and may hold spaces and brackets.
func parse(data []byte) (st Stat, err error) {
	f := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	if len(f) < 20 || len(f[0]) != 1 {
		return st, fmt.Errorf("unknown format %q", data)
	}
	st.State = f[0][0]
	var errs [4]error
	st.Parent, errs[0] = strconv.Atoi(f[1])
	st.Group, errs[1] = strconv.Atoi(f[2])
	st.Session, errs[2] = strconv.Atoi(f[3])
	st.Started, errs[3] = strconv.ParseUint(f[19], 10, 64)
	return st, errors.Join(errs[:]...)
}

// StartedAt is Started as a time of day, by the wall clock of now.
func (st Stat) StartedAt() time.Time {
	var boot unix.Timespec
	// It cannot fail for a clock that every kernel has.
	_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
	return time.Now().Add(time.Duration(st.Started)*(time.Second/userHZ) - time.Duration(boot.Nano()))
}
