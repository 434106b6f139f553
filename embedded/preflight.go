package embedded

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"pgha/internal/fsx"
)

// spaceMargin is what the database and a record may grow by before the next
// check, beyond the log segment that etcd preallocates as soon as it starts.
const spaceMargin = 8 << 20

// newDataSpace is what a new member writes beside its log.
const newDataSpace = 32 << 20

// identity is the file in DataDir that says whose data it is. etcd's own
// cluster ID is a hash that cannot be told from the token.
type identity struct {
	Token string `json:"cluster_token"`
}

func (c Config) identityPath() string { return filepath.Join(c.DataDir, "pgha-cluster.json") }

// plan is what prepare found out: how etcd is to be started.
type plan struct {
	state    string            // etcd's initial-cluster-state
	cluster  map[string]string // initial cluster
	memberID string            // hexadecimal; "" without data
}

// prepare refuses what etcd would answer with the end of the process, and
// decides how to start. It does not change existing data.
func prepare(ctx context.Context, cfg Config) (plan, error) {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return plan{}, fmt.Errorf("make etcd data directory: %w", err)
	}
	rec, err := readRecord(cfg.FatalFile)
	if err != nil {
		// A torn or foreign record must not keep a sound member down.
		cfg.Log.Warn("ignoring the record of etcd's last failure", "error", err)
	}
	hasData := cfg.HasData()
	if err := checkSpace(cfg, hasData, rec); err != nil {
		return plan{}, err
	}
	if err := checkIdentity(cfg, hasData); err != nil {
		return plan{}, err
	}
	if !hasData {
		if err := checkLeftover(cfg); err != nil {
			return plan{}, err
		}
		p, err := planEmpty(ctx, cfg)
		if err != nil {
			return plan{}, err
		}
		return p, clearRecord(cfg.FatalFile)
	}

	info, err := inspect(cfg)
	if err != nil {
		return plan{}, err
	}
	id := memberIDString(info.memberID)
	if info.removed {
		return plan{}, removedError(id)
	}
	if rec != nil && rec.refuses(id) {
		return plan{}, fmt.Errorf("%w: recorded %s in %s: %s (to try this data again all the same, delete that file)",
			rec.err(), rec.Time.Format("2006-01-02 15:04:05Z"), cfg.FatalFile, rec.Message)
	}
	if rec != nil {
		cfg.Log.Warn("etcd ended with an error last time, starting again", "cause", rec.Cause, "at", rec.Time, "error", rec.Message)
	}
	return plan{
		state: "existing", cluster: map[string]string{cfg.Name: cfg.PeerURL}, memberID: id,
	}, clearRecord(cfg.FatalFile)
}

// planEmpty decides how a member without data starts.
func planEmpty(ctx context.Context, cfg Config) (plan, error) {
	if !cfg.Bootstrap {
		cluster, err := joinCluster(ctx, cfg)
		return plan{state: "existing", cluster: cluster}, err
	}
	// A first node that lost its data would make the same cluster again, down
	// to its IDs, and its peers would take it for what it was.
	if len(cfg.peersToAsk()) > 0 {
		_, err := joinCluster(ctx, cfg)
		if err == nil || errors.Is(err, ErrNotMember) {
			return plan{}, fmt.Errorf("%w: asked to make a new cluster, but the members of one answer; join that", ErrOtherCluster)
		}
		if !errors.Is(err, ErrNoPeer) {
			return plan{}, err
		}
	}
	return plan{state: "new", cluster: map[string]string{cfg.Name: cfg.PeerURL}}, nil
}

func memberIDString(id uint64) string { return fmt.Sprintf("%x", id) }

func removedError(id string) error {
	return fmt.Errorf("%w: member %s; its data is of no use any more: %s", ErrRemoved, id, adviceRejoin)
}

// checkSpace wants room for the log segment that etcd preallocates at start.
// After a full disk it wants twice that, so that a member does not come and go
// with every small file that is deleted.
func checkSpace(cfg Config, hasData bool, rec *fatalRecord) error {
	need := uint64(cfg.WALSegmentBytes) + spaceMargin
	if !hasData {
		need = 2*uint64(cfg.WALSegmentBytes) + newDataSpace
	}
	if rec != nil && rec.Cause == causeName(ErrDiskFull) {
		need *= 2
	}
	dirs := []string{cfg.DataDir}
	if cfg.WALDir != "" {
		dirs = append(dirs, existingParent(cfg.WALDir))
	}
	for _, dir := range dirs {
		var st syscall.Statfs_t
		if err := syscall.Statfs(dir, &st); err != nil {
			return fmt.Errorf("read free space of %s: %w", dir, err)
		}
		if free := st.Bavail * uint64(st.Bsize); free < need {
			return fmt.Errorf("%w: %s has %d MiB free and etcd needs %d MiB to start; free space and start again",
				ErrDiskFull, dir, free>>20, (need+1<<20-1)>>20)
		}
	}
	return nil
}

// existingParent returns dir or the nearest directory above it that exists.
func existingParent(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// checkIdentity compares the data's cluster with ours. The file is written
// before etcd makes its first one, so data without it was not made here.
func checkIdentity(cfg Config, hasData bool) error {
	var id identity
	err := fsx.ReadJSON(cfg.identityPath(), &id)
	switch {
	case errors.Is(err, fs.ErrNotExist) && hasData:
		return fmt.Errorf("%w: %s holds an etcd member that was not made by pgha (no %s); move it aside",
			ErrOtherCluster, cfg.DataDir, filepath.Base(cfg.identityPath()))
	case err != nil && hasData:
		return fmt.Errorf("read whose data %s is: %w", cfg.DataDir, err)
	case err == nil && hasData && id.Token != cfg.Token:
		return fmt.Errorf("%w: %s belongs to cluster %s, this node to cluster %s; move the directory aside",
			ErrOtherCluster, cfg.DataDir, id.Token, cfg.Token)
	case hasData || (err == nil && id.Token == cfg.Token):
		return nil
	}
	if err := fsx.WriteJSON(cfg.identityPath(), identity{Token: cfg.Token}, 0o600); err != nil {
		return fmt.Errorf("write whose data %s is: %w", cfg.DataDir, err)
	}
	return nil
}
