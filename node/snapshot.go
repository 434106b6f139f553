package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/embedded"
)

const (
	snapshotSuffix = ".snap"
	// snapshotsKept is how many snapshots of a kind stay on disk, the newest.
	snapshotsKept = 7
	snapshotAge   = 24 * time.Hour // after which the next daily one is due
	snapshotLook  = time.Minute

	reasonDaily  = "daily"
	reasonManual = "manual"
	reasonBefore = "before" // followed by a dash and the operation
)

// SnapshotInfo describes a snapshot of the cluster's state: of etcd, not of the
// database.
type SnapshotInfo struct {
	File       string    `json:"file,omitempty"` // where it is; not in the file itself
	Bytes      int64     `json:"bytes,omitempty"`
	Damaged    string    `json:"damaged,omitempty"` // what is wrong with it
	Cluster    string    `json:"cluster"`
	ClusterID  string    `json:"cluster_id"`
	Node       string    `json:"node"`
	At         time.Time `json:"at"`
	Revision   int64     `json:"revision"` // of etcd
	Generation uint64    `json:"generation"`
	Reason     string    `json:"reason"`
	Version    string    `json:"version"` // of pgha
}

func (p Paths) snapshots() string { return filepath.Join(p.Lib, "snapshots") }

// saveSnapshot saves the cluster's state, as this node has it, among the node's
// snapshots, and returns the file's path.
func (n *Node) saveSnapshot(ctx context.Context, reason string) (string, error) {
	dir := n.paths.snapshots()
	if err := makeDir(dir, 0o700, -1, -1); err != nil {
		return "", err
	}
	at := time.Now().UTC()
	for try := 0; ; try++ {
		name := at.Format("20060102T150405") + "-" + reason
		if try > 0 {
			name += fmt.Sprintf("-%d", try)
		}
		path := filepath.Join(dir, name+snapshotSuffix)
		err := n.saveSnapshotTo(ctx, path, reason, at)
		if errors.Is(err, fs.ErrExist) && try < 100 {
			continue
		}
		if err != nil {
			return "", err
		}
		return path, n.pruneSnapshots()
	}
}

func (n *Node) saveSnapshotTo(ctx context.Context, path, reason string, at time.Time) error {
	srv := n.etcd.Load()
	if srv == nil {
		return n.notReady()
	}
	rev, err := srv.Revision()
	if err != nil {
		return err
	}
	return srv.SaveSnapshot(ctx, path, SnapshotInfo{
		Cluster: n.state.ClusterName, ClusterID: n.state.ClusterID, Node: n.cfg.Name, At: at.Truncate(time.Second), Revision: rev,
		Generation: max(n.generation().Number, 1), Reason: reason, Version: Version,
	})
}

// ListSnapshots returns this node's snapshots, the newest first. Damaged ones are
// among them and say so. It needs no daemon.
func ListSnapshots(p Paths) ([]SnapshotInfo, error) {
	files, err := filepath.Glob(filepath.Join(p.snapshots(), "*"+snapshotSuffix))
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	out := []SnapshotInfo{}
	for _, f := range files {
		var s SnapshotInfo
		st, err := os.Stat(f)
		if err == nil {
			err = embedded.ReadSnapshot(f, &s)
		}
		s.File = f
		if err != nil {
			s.Damaged = err.Error()
		}
		if st != nil {
			s.Bytes = st.Size()
			if s.At.IsZero() {
				s.At = st.ModTime()
			}
		}
		out = append(out, s)
	}
	slices.SortStableFunc(out, func(a, b SnapshotInfo) int { return b.At.Compare(a.At) })
	return out, nil
}

// prunable are the snapshots beyond what is kept of each kind. What an operator
// has saved is never taken away, and neither is what cannot be read.
func prunable(all []SnapshotInfo) []string {
	var out []string
	kept := map[string]int{}
	for _, s := range all { // the newest first
		kind, _, _ := strings.Cut(s.Reason, "-")
		if s.Damaged != "" || kind == reasonManual {
			continue
		}
		if kept[kind]++; kept[kind] > snapshotsKept {
			out = append(out, s.File)
		}
	}
	return out
}

func (n *Node) pruneSnapshots() error {
	all, err := ListSnapshots(n.paths)
	if err != nil {
		return err
	}
	var errs []error
	for _, f := range prunable(all) {
		errs = append(errs, os.Remove(f))
	}
	return errors.Join(errs...)
}

// dailyDue says whether the next daily snapshot is due.
func dailyDue(all []SnapshotInfo, now time.Time) bool {
	for _, s := range all {
		if s.Reason == reasonDaily && s.Damaged == "" && now.Sub(s.At) < snapshotAge && !s.At.After(now) {
			return false
		}
	}
	return true
}

// snapshotLoop saves the state once a day.
func (n *Node) snapshotLoop(ctx context.Context) error {
	t := time.NewTicker(snapshotLook)
	defer t.Stop()
	var last time.Time // when the list was last found to need no other
	for {
		if time.Since(last) >= snapshotAge/24 {
			done, err := n.dailySnapshot(ctx)
			n.partProblem(ctx, "daily snapshot", err)
			if done {
				last = time.Now()
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-n.woken(t.C):
		}
	}
}

// woken is c, or a shorter wait while nothing could be saved yet.
func (n *Node) woken(c <-chan time.Time) <-chan time.Time {
	if n.generation().Number == 0 {
		return time.After(time.Second)
	}
	return c
}

// dailySnapshot saves one if it is due, and says whether there is one now.
func (n *Node) dailySnapshot(ctx context.Context) (bool, error) {
	srv := n.etcd.Load()
	if srv == nil || n.generation().Number == 0 { // not before the cluster has been seen whole
		return false, nil
	}
	st, err := srv.Status(ctx)
	if err != nil || !st.HasLeader {
		return false, nil // what a node has without the others may be old
	}
	all, err := ListSnapshots(n.paths)
	if err != nil {
		return false, err
	}
	if !dailyDue(all, time.Now()) {
		return true, nil
	}
	file, err := n.saveSnapshot(ctx, reasonDaily)
	if err != nil {
		return false, err
	}
	n.log.Info("saved the cluster's state", "file", file)
	return true, nil
}

// safetySnapshot saves the state before something dangerous is done.
func (n *Node) safetySnapshot(ctx context.Context, o *Operation) error {
	file, err := n.saveSnapshot(ctx, reasonBefore+"-"+o.kind)
	if err != nil {
		return fmt.Errorf("save the cluster's state first: %w", err)
	}
	o.Say("the cluster's state is saved in %s", file)
	return nil
}

// openSnapshot verifies a snapshot and reads the keyspace that it holds.
func (n *Node) openSnapshot(file string) (SnapshotInfo, map[string][]byte, error) {
	var info SnapshotInfo
	dir, err := os.MkdirTemp(n.paths.Lib, ".snapshot-")
	if err != nil {
		return info, nil, fmt.Errorf("make room for the snapshot: %w", err)
	}
	db := filepath.Join(dir, "db")
	var keys map[string][]byte
	err = embedded.UnpackSnapshot(file, db, &info)
	if err == nil {
		keys, _, err = embedded.Keys(db)
	}
	if err := errors.Join(err, os.RemoveAll(dir)); err != nil {
		return info, nil, err
	}
	info.File = file
	// What it says of itself must be what it holds.
	if _, ok := keys[cluster.Root+info.ClusterID+"/identity"]; !ok {
		return info, nil, fmt.Errorf("%w: %s: it says that it is of cluster %s and does not hold that", embedded.ErrSnapshot, file, info.ClusterID)
	}
	return info, keys, nil
}

// SnapshotRequest asks the daemon to save the cluster's state.
type SnapshotRequest struct {
	// File is where to, absolute; "" = among the node's snapshots.
	File string `json:"file,omitempty"`
}

func (n *Node) snapshotHandler(w http.ResponseWriter, r *http.Request) {
	var req SnapshotRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	info, err := n.takeSnapshot(r.Context(), req.File)
	reply(w, info, err)
}

func (n *Node) takeSnapshot(ctx context.Context, file string) (SnapshotInfo, error) {
	var info SnapshotInfo
	var err error
	switch {
	case file == "":
		file, err = n.saveSnapshot(ctx, reasonManual)
	case !filepath.IsAbs(file):
		err = refused(cluster.CodeBadRequest, "%s is not an absolute path", file)
	default:
		err = n.saveSnapshotTo(ctx, file, reasonManual, time.Now().UTC())
	}
	if errors.Is(err, fs.ErrExist) {
		err = refused(cluster.CodeConflict, "%s is there already: choose another name", file)
	}
	if err != nil {
		return info, err
	}
	if err := embedded.ReadSnapshot(file, &info); err != nil {
		return info, err
	}
	info.File = file
	if st, err := os.Stat(file); err == nil {
		info.Bytes = st.Size()
	}
	return info, nil
}

// SaveSnapshot has the daemon save the cluster's state to file, which must be
// absolute and absent, or with "" among the node's snapshots.
func (l *Local) SaveSnapshot(ctx context.Context, file string) (SnapshotInfo, error) {
	var s SnapshotInfo
	return s, l.call(ctx, http.MethodPost, "/v1/snapshots", SnapshotRequest{File: file}, &s)
}
