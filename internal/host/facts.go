package host

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// IsRoot reports whether the process runs as root.
func IsRoot() bool { return os.Geteuid() == 0 }

// CPUs gives the number of processors that this process may use.
func CPUs() int { return runtime.NumCPU() }

// Memory gives the bytes of memory that the host's processes share: the
// machine's, or the container's limit where that is less. It is 0 where the
// kernel does not say.
func Memory() uint64 {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return 0
	}
	total := uint64(info.Totalram) * uint64(info.Unit) //nolint:unconvert // some machines have 32 bits here
	// The root of a machine's hierarchy has no such file; a container's has.
	limit, err := os.ReadFile("/sys/fs/cgroup/memory.max")
	if err != nil {
		return total
	}
	n, err := strconv.ParseUint(strings.TrimSpace(string(limit)), 10, 64)
	if err != nil {
		return total // "max"
	}
	return min(total, n)
}

// DiskFree gives the bytes that ordinary users may still write and the size of
// the file system that holds path. Where path does not exist yet, its nearest
// existing parent counts.
func DiskFree(path string) (free, total uint64, err error) {
	var st unix.Statfs_t
	for {
		err = unix.Statfs(path, &st)
		parent := filepath.Dir(path)
		if !errors.Is(err, unix.ENOENT) || parent == path {
			break
		}
		path = parent
	}
	if err != nil {
		return 0, 0, fmt.Errorf("read free space of %s: %w", path, err)
	}
	block := uint64(st.Frsize)
	return st.Bavail * block, st.Blocks * block, nil
}

// DirEmpty reports whether the directory at path is empty or does not exist.
// It is an error if path is something else than a directory.
func DirEmpty(path string) (bool, error) {
	d, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("open directory: %w", err)
	}
	defer func() { _ = d.Close() }()
	_, err = d.Readdirnames(1)
	if errors.Is(err, io.EOF) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read directory %s: %w", path, err)
	}
	return false, nil
}

// LookupUser gives the ids of a user and of all groups that the user is in, the
// primary one included. A process that drops to the user needs all of them:
// PostgreSQL reads keys as a member of ssl-cert.
func LookupUser(name string) (uid, gid uint32, groups []uint32, err error) {
	u, err := user.Lookup(name)
	if err != nil {
		var unknown user.UnknownUserError
		if errors.As(err, &unknown) {
			return 0, 0, nil, fmt.Errorf("user %q does not exist on this host", name)
		}
		return 0, 0, nil, fmt.Errorf("look up user %q: %w", name, err)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return 0, 0, nil, fmt.Errorf("look up groups of user %q: %w", name, err)
	}
	numbers := make([]uint32, 0, len(ids)+2)
	for _, id := range append([]string{u.Uid, u.Gid}, ids...) {
		n, err := strconv.ParseUint(id, 10, 32)
		if err != nil {
			return 0, 0, nil, fmt.Errorf("read ids of user %q: %w", name, err)
		}
		numbers = append(numbers, uint32(n))
	}
	return numbers[0], numbers[1], numbers[2:], nil
}

// OSRelease gives the distribution's id ("debian"), version ("12") and name for
// people.
func OSRelease() (id, versionID, pretty string, err error) {
	f, err := os.Open("/etc/os-release")
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.Open("/usr/lib/os-release")
	}
	if err != nil {
		return "", "", "", fmt.Errorf("read os-release: %w", err)
	}
	defer func() { _ = f.Close() }()
	v, err := parseOSRelease(f)
	if err != nil {
		return "", "", "", fmt.Errorf("read os-release: %w", err)
	}
	return v["ID"], v["VERSION_ID"], v["PRETTY_NAME"], nil
}

func parseOSRelease(r io.Reader) (map[string]string, error) {
	values := map[string]string{}
	scanner := bufio.NewScanner(r)
	for scanner.Scan() {
		line := strings.TrimSpace(scanner.Text())
		key, value, ok := strings.Cut(line, "=")
		if !ok || strings.HasPrefix(line, "#") {
			continue
		}
		if len(value) >= 2 && (value[0] == '"' || value[0] == '\'') && value[len(value)-1] == value[0] {
			value = value[1 : len(value)-1]
		}
		values[key] = value
	}
	return values, scanner.Err()
}
