package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
)

// PortOwner tells which process listens on the TCP port, on whatever address.
// found says that the port is taken; proc is "an unknown process" and pid 0
// where the owner cannot be seen, because it lives in another container or this
// process is not root. Of several processes that share the socket it is the one
// with the lowest pid.
func PortOwner(port uint16) (proc string, pid int, found bool, err error) {
	inodes := map[string]bool{}
	// The calling thread's own view: a process's threads may be in different
	// network namespaces.
	for _, table := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		f, err := os.Open(table)
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return "", 0, false, fmt.Errorf("read listening sockets: %w", err)
		}
		err = errors.Join(listeners(f, port, inodes), f.Close())
		if err != nil {
			return "", 0, false, fmt.Errorf("read listening sockets from %s: %w", table, err)
		}
	}
	if len(inodes) == 0 {
		return "", 0, false, nil
	}
	for _, pid := range pids() {
		if !holdsSocket(pid, inodes) {
			continue
		}
		comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
		if err != nil {
			continue // it has just ended
		}
		return strings.TrimSpace(string(comm)), pid, true, nil
	}
	return "an unknown process", 0, true, nil
}

// listeners adds the inodes of the sockets that listen on port.
func listeners(r io.Reader, port uint16, inodes map[string]bool) error {
	const (
		local, state, inode = 1, 3, 9
		listening           = "0A"
	)
	suffix := fmt.Sprintf(":%04X", port)
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		fields := strings.Fields(scanner.Text())
		if len(fields) > inode && fields[state] == listening && strings.HasSuffix(fields[local], suffix) {
			inodes[fields[inode]] = true
		}
	}
	return scanner.Err()
}

func pids() []int {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil
	}
	var out []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			out = append(out, pid)
		}
	}
	slices.Sort(out)
	return out
}

func holdsSocket(pid int, inodes map[string]bool) bool {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return false // ended, or not ours to look at
	}
	for _, e := range entries {
		target, err := os.Readlink(dir + "/" + e.Name())
		if err != nil {
			continue
		}
		inode, ok := strings.CutPrefix(target, "socket:[")
		if ok && inodes[strings.TrimSuffix(inode, "]")] {
			return true
		}
	}
	return false
}
