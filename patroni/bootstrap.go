package patroni

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"pgha/internal/fsx"
)

// BootstrapAction is what to do about a bootstrap that may have been cut off.
type BootstrapAction int

// The actions. They are to be done while Patroni does not run on this node, and
// decided again afterwards.
const (
	// BootstrapNothing: Patroni may start.
	BootstrapNothing BootstrapAction = iota
	// BootstrapWait: someone is at work; look again later.
	BootstrapWait
	// BootstrapStopPostgres: stop the PostgreSQL that runs in the data directory.
	BootstrapStopPostgres
	// BootstrapRepair: move the data directory aside if it is not empty, then
	// delete the initialize key on condition that its value is still empty.
	BootstrapRepair
	// BootstrapRefuse: do not start Patroni; a person must look.
	BootstrapRefuse
)

// String names the action.
func (a BootstrapAction) String() string {
	switch a {
	case BootstrapNothing:
		return "nothing"
	case BootstrapWait:
		return "wait"
	case BootstrapStopPostgres:
		return "stop postgres"
	case BootstrapRepair:
		return "repair"
	case BootstrapRefuse:
		return "refuse"
	default:
		return fmt.Sprintf("BootstrapAction(%d)", int(a))
	}
}

// DataDirState is how much of a database a directory holds.
type DataDirState int

// The states of a data directory.
const (
	DataDirEmpty   DataDirState = iota // absent or empty
	DataDirPartial                     // files, but no valid global/pg_control
	DataDirValid                       // a valid global/pg_control
)

// String names the state.
func (s DataDirState) String() string {
	return [...]string{"empty", "partial", "valid"}[s]
}

// BootstrapObservation is what DecideBootstrapRepair looks at.
type BootstrapObservation struct {
	Initialized bool   // the initialize key exists
	SystemID    string // its value; empty from the start of a bootstrap to its end
	Leader      string // the leader key's value, empty when absent

	BootstrapNode bool // this node is the one that makes the cluster
	// Pending is this node's own record on disk: it let Patroni bootstrap into an
	// empty directory and has never seen the cluster initialised since. Only this
	// tells an initdb that was cut off late, and has a valid pg_control, from a
	// database.
	Pending bool

	PatroniRunning  bool // on this node
	PostgresRunning bool // in this node's data directory
	DataDir         DataDirState
}

// DecideBootstrapRepair says whether a bootstrap was cut off and must be undone.
// Patroni's initialize key has no lease: when its maker dies during initdb, the
// key stays empty and every node waits for ever.
func DecideBootstrapRepair(o BootstrapObservation) (BootstrapAction, string) {
	switch {
	case o.Leader != "":
		return BootstrapNothing, fmt.Sprintf("the cluster has a leader, %s", o.Leader)
	case o.Initialized && o.SystemID != "":
		return BootstrapNothing, fmt.Sprintf("the cluster is initialised with system identifier %s", o.SystemID)
	case !o.BootstrapNode:
		return BootstrapNothing, "another node makes the cluster"
	case o.PatroniRunning:
		return BootstrapWait, "patroni runs and may be making the cluster"
	case o.DataDir == DataDirValid && !o.Pending:
		return BootstrapNothing, "the data directory holds a database that was there before"
	case o.PostgresRunning && !o.Pending:
		return BootstrapRefuse, "postgresql runs in a data directory without a valid control file"
	case o.PostgresRunning:
		return BootstrapStopPostgres, "postgresql of the unfinished bootstrap still runs"
	case o.DataDir == DataDirEmpty && !o.Initialized:
		return BootstrapNothing, "nothing has been begun"
	case o.DataDir == DataDirPartial && !o.Initialized && !o.Pending:
		return BootstrapRefuse, "the data directory holds files but no database, and no bootstrap was begun: empty it or move it away"
	default:
		return BootstrapRepair, "a bootstrap was begun on this node and cut off"
	}
}

// MoveAside renames dir to a free name beside it and returns that name. The
// parent must exist; a dir that does not exist is an error that is
// fs.ErrNotExist.
func MoveAside(dir string) (string, error) { return moveAside(dir, ".failed-") }

// SetAside is MoveAside for a directory that was as it should be.
func SetAside(dir string) (string, error) { return moveAside(dir, ".aside-") }

func moveAside(dir, suffix string) (string, error) {
	dir = filepath.Clean(dir)
	base := dir + suffix + time.Now().UTC().Format("20060102T150405")
	for i := 0; ; i++ {
		to := base
		if i > 0 {
			to = fmt.Sprintf("%s.%d", base, i)
		}
		if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return "", fmt.Errorf("move %s aside: %w", dir, err)
			}
			continue
		}
		if err := os.Rename(dir, to); err != nil {
			return "", fmt.Errorf("move %s aside: %w", dir, err)
		}
		if err := fsx.SyncDir(filepath.Dir(dir)); err != nil {
			return to, fmt.Errorf("move %s aside: %w", dir, err)
		}
		return to, nil
	}
}
