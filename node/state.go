package node

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"pgha/cluster"
	"pgha/internal/fsx"
)

// Phase says how far a host has come in becoming a node.
type Phase string

// Phases of a host, in order.
const (
	PhasePreparing Phase = "preparing" // init or join has begun to write; neither has finished
	PhaseReady     Phase = "ready"     // everything that the daemon needs is on disk
)

// State says which node of which cluster this host is. It is written by init
// and join, and read by everything else.
type State struct {
	ClusterID   string           `json:"cluster_id"`
	ClusterName string           `json:"cluster_name"`
	Node        string           `json:"node"`
	Role        cluster.NodeRole `json:"role"`
	Phase       Phase            `json:"phase"`
	CreatedAt   time.Time        `json:"created_at"`
	// Founder is true on the node that ran init: it starts etcd as a cluster of
	// one and bootstraps PostgreSQL.
	Founder bool `json:"founder"`
	// Founded is true once the founder's etcd holds the cluster's record: from
	// then on an empty etcd directory is a lost one, never a new cluster.
	Founded bool `json:"founded,omitempty"`
	// Adopted is the PostgreSQL data directory that init took over, if any.
	Adopted string `json:"adopted,omitempty"`
	// SystemID is the system identifier of an adopted data directory.
	SystemID string `json:"system_id,omitempty"`
	// TokenID is the join token this node came in with.
	TokenID string `json:"token_id,omitempty"`
	// InitialCluster maps member names to etcd peer URLs for the first start.
	InitialCluster map[string]string `json:"initial_cluster,omitempty"`
	// Settings is what init was asked for; it is written to etcd by the first
	// start of the founder and not read after that.
	Settings *cluster.Settings `json:"settings,omitempty"`
	// SANs are names of the load balancer given on this node.
	SANs []string `json:"sans,omitempty"`
	// Removed is set once this node knows that it is no member any more.
	Removed *Removal `json:"removed,omitempty"`
}

// ErrNoNode says that this host is not a node of any cluster.
var ErrNoNode = errors.New("this host is not a node of a cluster: run pgha init for a new cluster, or pgha join TOKEN")

// LoadState reads the state. A host without one gives ErrNoNode.
func LoadState(p Paths) (State, error) {
	var s State
	err := fsx.ReadJSON(p.State(), &s)
	if errors.Is(err, fs.ErrNotExist) {
		return s, ErrNoNode
	}
	if err != nil {
		return s, fmt.Errorf("read node state: %w", err)
	}
	if s.ClusterID == "" || s.Node == "" {
		return s, fmt.Errorf("read node state: %s names no cluster and node: restore it from a backup, or pgha reset", p.State())
	}
	return s, nil
}

// Save writes the state durably.
func (s State) Save(p Paths) error { return fsx.WriteJSON(p.State(), s, 0o600) }

// lockWait is how often a lock is tried again, every 50 ms: a daemon that was
// killed while it forked has its lock held by the fork for a moment.
const lockWait = 20

// lockDaemon makes sure that no other daemon runs with these paths: a second
// one would take the socket and the children away from the first. The lock ends
// with the process.
func lockDaemon(p Paths) (unlock func(), err error) {
	f, err := os.OpenFile(p.lock(), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	for try := 0; ; try++ {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil || !errors.Is(err, unix.EWOULDBLOCK) || try == lockWait {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if errors.Is(err, unix.EWOULDBLOCK) {
		pid, _ := io.ReadAll(io.LimitReader(f, 20)) // for the message alone
		err = fmt.Errorf("pgha runs on this host already (pid %s): see pgha status", bytes.TrimSpace(pid))
	}
	if err == nil {
		err = errors.Join(f.Truncate(0), writeAt0(f, fmt.Sprintln(os.Getpid())))
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil // which gives the lock back
}

func writeAt0(f *os.File, text string) error {
	_, err := f.WriteAt([]byte(text), 0)
	return err
}

// makeDirs creates the node's directories with the modes that let each
// child reach its own files and nobody else anything.
func makeDirs(p Paths) error {
	for _, d := range []struct {
		path string
		mode fs.FileMode
	}{
		{p.Etc, 0o755}, {p.Lib, 0o711}, {p.Run, 0o711}, {p.Log, 0o755},
		{p.PKI(), 0o711}, {p.etcd(), 0o700},
	} {
		if err := makeDir(d.path, d.mode, fsx.Keep, fsx.Keep); err != nil {
			return err
		}
	}
	return nil
}

// makeDir creates a directory, or sets mode and owner of the one that is there.
func makeDir(path string, mode fs.FileMode, uid, gid int) error {
	if err := os.MkdirAll(path, mode); err != nil {
		return fmt.Errorf("create directory: %w", err)
	}
	if err := os.Chmod(path, mode); err != nil {
		return fmt.Errorf("set mode of directory: %w", err)
	}
	if uid != fsx.Keep || gid != fsx.Keep {
		if err := os.Chown(path, uid, gid); err != nil {
			return fmt.Errorf("set owner of directory: %w", err)
		}
	}
	return nil
}
