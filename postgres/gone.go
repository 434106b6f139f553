package postgres

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"pgha/internal/pgdata"
)

// ProveGone reports whether no PostgreSQL is left of the data directory: the
// postmaster in its pid file does not live, no process holds the segment of
// shared memory that the file names, and no process that works in the directory
// holds any. Without a pid file, and without a directory, the last alone counts;
// a server whose directory was moved away cannot be told then. False is no proof
// of the opposite. An error means that it could not be told.
func ProveGone(dataDir string) (bool, error) {
	_, left, err := proveGone(dataDir)
	return err == nil && left == "", err
}

// proveGone is ProveGone, and returns the pid file that the proof is of, and
// what is left; nothing is, when that is empty.
func proveGone(dataDir string) (pgdata.PIDFile, string, error) {
	file, err := readPIDFile(dataDir)
	if err != nil {
		return file, "", err
	}
	if file.PID != 0 {
		is, err := isPostmaster(file, dataDir)
		if err != nil {
			return file, "", err
		}
		if is {
			return file, fmt.Sprintf("process %d of the pid file is a server", max(file.PID, -file.PID)), nil
		}
	}
	if file.HasShm {
		n, err := attached(file.ShmKey, file.ShmID)
		if err != nil {
			return file, "", err
		}
		if n > 0 {
			return file, fmt.Sprintf("the postmaster has ended; processes left on its shared memory: %d", n), nil
		}
	}
	// The segment is enough, unless somebody has removed the pid file, or the
	// segment (its id stays with its holders alone then), or lives in another IPC
	// namespace. Twice, because a postmaster may make a child that the first look
	// misses, and end before it comes to it; a child makes none.
	for range 2 {
		pid, err := holder(dataDir)
		if err != nil {
			return file, "", err
		}
		if pid != 0 {
			return file, fmt.Sprintf("process %d works in the data directory and holds shared memory", pid), nil
		}
	}
	// A server that starts writes its pid file before it touches anything.
	again, err := readPIDFile(dataDir)
	if err == nil && again != file {
		return again, "a server is starting", nil
	}
	return file, "", err
}

// readPIDFile returns the zero PIDFile if there is none.
func readPIDFile(dataDir string) (pgdata.PIDFile, error) {
	file, err := pgdata.ReadPIDFile(dataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return pgdata.PIDFile{}, nil
	}
	return file, err
}

// attached returns how many processes have the segment attached. A segment of
// that id with another key is somebody else's, made after a boot.
func attached(key int32, id int) (uint64, error) {
	var desc unix.SysvShmDesc
	_, err := unix.SysvShmCtl(id, unix.IPC_STAT, &desc)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EIDRM) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("look at shared memory %d: %w", id, err)
	}
	if desc.Perm.Key != key {
		return 0, nil
	}
	return desc.Nattch, nil
}

// holder returns a process that works in dataDir and holds shared memory, or 0.
func holder(dataDir string) (found int, err error) {
	err = holders(dataDir, func(pid int) bool {
		found = pid
		return false
	})
	return found, err
}

// holders calls f for each process that works in dataDir and holds shared
// memory, until f returns false.
func holders(dataDir string, f func(pid int) bool) error {
	dir, err := pgdata.Look(dataDir)
	if err != nil {
		return err
	}
	proc, err := os.Open("/proc")
	if err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	names, err := proc.Readdirnames(-1)
	if err := errors.Join(err, proc.Close()); err != nil {
		return fmt.Errorf("list processes: %w", err)
	}
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		works, err := dir.HasAtWork(pid)
		if err != nil {
			return err
		}
		if !works {
			continue
		}
		holds, err := holdsSharedMemory(pid)
		if err != nil {
			return err
		}
		if holds && !f(pid) {
			return nil
		}
	}
	return nil
}
