package pgdata

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Dir is a data directory, as the place where a server's processes work.
type Dir struct {
	path   string
	exists bool
	stat   unix.Stat_t
}

// Look returns the directory at path, which need not exist.
func Look(path string) (Dir, error) {
	d := Dir{path: filepath.Clean(path)}
	err := unix.Stat(path, &d.stat)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Dir{}, fmt.Errorf("look at data directory %s: %w", path, err)
	}
	d.exists = err == nil
	return d, nil
}

// HasAtWork reports whether process pid lives and has d as its working
// directory, as every process of a server has; also if the directory has been
// removed since. An error means that the process may not be looked at, and could
// be a server by its user: a server runs as the owner of its data directory, and
// never as root.
func (d Dir) HasAtWork(pid int) (bool, error) {
	link := fmt.Sprintf("/proc/%d/cwd", pid)
	var cwd unix.Stat_t
	err := unix.Stat(link, &cwd)
	switch {
	case Ended(err):
		return false, nil
	case errors.Is(err, fs.ErrPermission):
		if uid, uidErr := effectiveUID(pid); uidErr == nil && (uid == 0 || d.exists && uid != d.stat.Uid) || Ended(uidErr) {
			return false, nil
		}
	}
	if err != nil {
		return false, fmt.Errorf("see where process %d works: %w", pid, err)
	}
	if d.exists && cwd.Dev == d.stat.Dev && cwd.Ino == d.stat.Ino {
		return true, nil
	}
	if cwd.Nlink > 0 {
		return false, nil
	}
	was, err := os.Readlink(link)
	if err != nil && !Ended(err) {
		return false, fmt.Errorf("see where process %d works: %w", pid, err)
	}
	return was == d.path+" (deleted)", nil
}

// WorksIn is Look and HasAtWork.
func WorksIn(pid int, dir string) (bool, error) {
	d, err := Look(dir)
	if err != nil {
		return false, err
	}
	return d.HasAtWork(pid)
}

// effectiveUID returns whom a process acts as. The owner of /proc/PID may be
// root instead.
func effectiveUID(pid int) (uint32, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read owner of process %d: %w", pid, err)
	}
	_, line, _ := strings.Cut(string(data), "\nUid:")
	var real, effective uint32
	if _, err := fmt.Sscan(line, &real, &effective); err != nil {
		return 0, fmt.Errorf("read owner of process %d: %w", pid, err)
	}
	return effective, nil
}

// Ended reports whether reading something under /proc/PID failed because the
// process has ended.
func Ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH)
}
