package patroni

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"pgha/internal/pgdata"
)

// ErrNoDatabase says that a directory holds no PostgreSQL database, or one whose
// global/pg_control makes no sense.
var ErrNoDatabase = errors.New("no PostgreSQL database")

// DataDirInfo is what can be told of a data directory from its files.
type DataDirInfo struct {
	State    DataDirState
	Major    int    // of PostgreSQL; 0 when there is no PG_VERSION
	SystemID string // as Patroni writes it; empty unless State is DataDirValid
	// CleanShutdown: PostgreSQL was stopped in order, and needs no recovery.
	CleanShutdown bool
	// Running: the process in postmaster.pid lives and works in this directory.
	Running bool
	PID     int // of that process
	// Standby: a signal file tells PostgreSQL to start as a standby or in recovery.
	Standby bool
	// Config: postgresql.conf (or Patroni's copy of it) is in the directory.
	// Patroni needs it there; Debian's packages keep it in /etc/postgresql.
	Config bool
	// Tablespaces: some data lies outside the directory.
	Tablespaces bool
	UID, GID    int // owner of the directory
}

// controlFile is the start of global/pg_control, the same in every release.
type controlFile struct {
	systemID uint64
	version  uint32
	catalog  uint32
	state    uint32
}

// States in pg_control of a PostgreSQL that was stopped in order.
const (
	controlShutDown           = 1
	controlShutDownInRecovery = 2
)

func readControl(dir string) (controlFile, error) {
	f, err := os.Open(filepath.Join(dir, "global", "pg_control"))
	if err != nil {
		return controlFile{}, fmt.Errorf("%w: %w", ErrNoDatabase, err)
	}
	defer func() { _ = f.Close() }()
	var b [20]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return controlFile{}, fmt.Errorf("%w: read %s: %w", ErrNoDatabase, f.Name(), err)
	}
	c := controlFile{
		systemID: binary.NativeEndian.Uint64(b[0:]),
		version:  binary.NativeEndian.Uint32(b[8:]),
		catalog:  binary.NativeEndian.Uint32(b[12:]),
		state:    binary.NativeEndian.Uint32(b[16:]),
	}
	// Versions run from 900 to 1800 and on; catalogs are dates, as 202209061.
	if !validSystemID(strconv.FormatUint(c.systemID, 10)) || c.version < 900 || c.version > 9999 ||
		c.catalog < 200000000 || c.catalog > 299999999 {
		return controlFile{}, fmt.Errorf("%w: %s is damaged or only begun", ErrNoDatabase, f.Name())
	}
	return c, nil
}

// SystemIdentifier returns the system identifier of the database in dataDir. With
// a binDir, pg_controldata from there reads it and a control file with a wrong
// checksum is refused; otherwise only the file's start is looked at.
func SystemIdentifier(dataDir, binDir string) (string, error) {
	if binDir == "" {
		c, err := readControl(dataDir)
		if err != nil {
			return "", fmt.Errorf("read the system identifier: %w", err)
		}
		return strconv.FormatUint(c.systemID, 10), nil
	}
	fields, err := controlData(dataDir, binDir)
	if err != nil {
		return "", fmt.Errorf("read the system identifier: %w", err)
	}
	id := fields["Database system identifier"]
	if !validSystemID(id) {
		return "", fmt.Errorf("read the system identifier: %w: %q in %s", ErrNoDatabase, id, dataDir)
	}
	return id, nil
}

// DataChecksums reports whether the database in dataDir has data checksums.
func DataChecksums(dataDir, binDir string) (bool, error) {
	fields, err := controlData(dataDir, binDir)
	if err != nil {
		return false, fmt.Errorf("see whether data checksums are on: %w", err)
	}
	v, ok := fields["Data page checksum version"]
	if !ok {
		return false, fmt.Errorf("see whether data checksums are on: pg_controldata does not say for %s", dataDir)
	}
	return v != "0", nil
}

func controlData(dataDir, binDir string) (map[string]string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, filepath.Join(binDir, "pg_controldata"), "-D", dataDir)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "LANGUAGE=")
	out, err := cmd.CombinedOutput()
	if err != nil {
		return nil, fmt.Errorf("%w: run pg_controldata on %s: %w: %s", ErrNoDatabase, dataDir, err, lastLine(string(out)))
	}
	fields := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "WARNING: Calculated CRC checksum does not match") {
			return nil, fmt.Errorf("%w: global/pg_control in %s is damaged", ErrNoDatabase, dataDir)
		}
		if name, value, ok := strings.Cut(line, ":"); ok {
			fields[name] = strings.TrimSpace(value)
		}
	}
	return fields, nil
}

// InspectDataDir tells what dir is. An absent or empty one is DataDirEmpty, not
// an error. Nothing is changed.
func InspectDataDir(dir string) (DataDirInfo, error) {
	var info DataDirInfo
	stat, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return info, nil
	case err != nil:
		return info, fmt.Errorf("inspect data directory: %w", err)
	case !stat.IsDir():
		return info, fmt.Errorf("inspect data directory: %s is not a directory", dir)
	}
	if owner, ok := stat.Sys().(*syscall.Stat_t); ok {
		info.UID, info.GID = int(owner.Uid), int(owner.Gid)
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return info, fmt.Errorf("inspect data directory: %w", err)
	}
	for _, e := range entries {
		switch e.Name() {
		case "standby.signal", "recovery.signal":
			info.Standby = true
		case "postgresql.conf", "postgresql.base.conf":
			info.Config = true
		}
		// Patroni too takes a directory with nothing but these for empty.
		if e.Name() != "lost+found" && !strings.HasPrefix(e.Name(), ".") {
			info.State = DataDirPartial
		}
	}
	if info.State == DataDirEmpty {
		return info, nil
	}
	if data, err := os.ReadFile(filepath.Join(dir, "PG_VERSION")); err == nil {
		if info.Major, err = strconv.Atoi(strings.TrimSpace(string(data))); err != nil {
			return info, fmt.Errorf("inspect data directory: read %s/PG_VERSION: %w", dir, err)
		}
	} else if !errors.Is(err, fs.ErrNotExist) {
		return info, fmt.Errorf("inspect data directory: %w", err)
	}
	if c, err := readControl(dir); err == nil && info.Major > 0 {
		info.State = DataDirValid
		info.SystemID = strconv.FormatUint(c.systemID, 10)
		info.CleanShutdown = c.state == controlShutDown || c.state == controlShutDownInRecovery
	}
	spaces, err := os.ReadDir(filepath.Join(dir, "pg_tblspc"))
	info.Tablespaces = err == nil && len(spaces) > 0
	info.PID, info.Running = postmaster(dir)
	return info, nil
}

// postmaster returns the process named in dir/postmaster.pid, and whether it
// lives and is at work in dir. A pid that was given to another program since
// does not count.
func postmaster(dir string) (int, bool) {
	file, err := pgdata.ReadPIDFile(dir)
	if err != nil || file.PID < 0 {
		return 0, false
	}
	works, err := pgdata.WorksIn(file.PID, dir)
	if err != nil {
		// Not ours to look at: it may be the postmaster, so say so.
		return file.PID, true
	}
	if !works {
		return 0, false
	}
	return file.PID, true
}
