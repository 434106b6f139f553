// Package pgdata reads what PostgreSQL's data directory and the kernel tell of
// the server that works in it. It changes nothing and speaks to no server.
package pgdata

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// PIDFile is what postmaster.pid says. Two of them that are equal were written
// by the same server at the same stage of its start.
type PIDFile struct {
	PID      int   // of the postmaster; below zero: of a single-user server, which serves no clients
	Start    int64 // when it started, by the wall clock in seconds since 1970; 0 when not said
	HasShm   bool  // the two below are said: the server got as far as its shared memory
	ShmKey   int32 // key and
	ShmID    int   // id of the System V segment that every process of the server holds
	contents string
}

// Lines of postmaster.pid, counted from 0.
const (
	linePID   = 0
	lineStart = 2
	lineShm   = 6
)

// ReadPIDFile reads dir/postmaster.pid. The error is fs.ErrNotExist when there
// is none; a file without a process id is an error too.
func ReadPIDFile(dir string) (PIDFile, error) {
	data, err := os.ReadFile(filepath.Join(dir, "postmaster.pid"))
	if err != nil {
		return PIDFile{}, fmt.Errorf("read pid file: %w", err)
	}
	f, err := parsePIDFile(string(data))
	if err != nil {
		return PIDFile{}, fmt.Errorf("read pid file %s/postmaster.pid: %w", dir, err)
	}
	return f, nil
}

func parsePIDFile(text string) (PIDFile, error) {
	lines := strings.Split(text, "\n")
	pid, err := strconv.Atoi(strings.TrimSpace(lines[linePID]))
	if err != nil || pid == 0 || pid == 1 {
		return PIDFile{}, fmt.Errorf("%q is not the pid of a server", lines[linePID])
	}
	f := PIDFile{PID: pid, contents: text}
	// The server adds the later lines as it gets on.
	if len(lines) > lineStart {
		if start, err := strconv.ParseInt(strings.TrimSpace(lines[lineStart]), 10, 64); err == nil {
			f.Start = start
		}
	}
	if len(lines) > lineShm {
		var key, id uint64 // a negative key is printed as its 64-bit complement
		if n, err := fmt.Sscan(lines[lineShm], &key, &id); n == 2 && err == nil {
			f.HasShm, f.ShmKey, f.ShmID = true, int32(key), int(id)
		}
	}
	return f, nil
}
