package embedded

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"go.etcd.io/etcd/etcdutl/v3/snapshot"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
	"golang.org/x/sys/unix"

	"pgha/internal/fsx"
)

// revisionBump is what a restored keyspace's revision is raised by: whoever
// compares with a revision that he knows from before finds it gone.
const revisionBump = 1_000_000_000

// Restore makes the member of cfg anew, as the only one of a new etcd cluster
// that holds the keyspace of the database at db. The cluster's and the member's
// IDs are new: members of the old cluster, and what they still have under way,
// find nobody who would listen to them, now or later. cfg.DataDir must be absent
// or empty. cfg.Token stays what the data is known by.
//
// db is what UnpackSnapshot has written, or the Database of a stopped member.
func Restore(db string, cfg Config) (err error) {
	cfg, err = cfg.complete()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return fmt.Errorf("restore etcd: %w", err)
	}
	if entries, err := os.ReadDir(cfg.DataDir); err != nil || len(entries) > 0 {
		return fmt.Errorf("restore etcd: %s is not empty: %w", cfg.DataDir, errors.Join(err, os.ErrExist))
	}
	raw := make([]byte, 16)
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("restore etcd: %w", err)
	}
	setSegmentSize(cfg.WALSegmentBytes)
	// It logs what it cannot do, and ends the process.
	lg := zap.New(zapcore.NewNopCore(), zap.WithFatalHook(zapcore.WriteThenPanic))
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("restore etcd: %w: %v", ErrCorrupt, r)
		}
	}()
	err = snapshot.NewV3(lg).Restore(snapshot.RestoreConfig{
		SnapshotPath: db, SkipHashCheck: true, // our own file has had one
		Name: cfg.Name, PeerURLs: []string{cfg.PeerURL}, InitialCluster: cfg.Name + "=" + cfg.PeerURL,
		InitialClusterToken: cfg.Token + "/" + hex.EncodeToString(raw),
		OutputDataDir:       cfg.DataDir, OutputWALDir: cfg.WALDir,
		RevisionBump: revisionBump, MarkCompacted: true,
	})
	if err != nil {
		return fmt.Errorf("restore etcd: %w", err)
	}
	return fsx.WriteJSON(cfg.identityPath(), identity{Token: cfg.Token}, 0o600)
}

// HoldsMember says whether cfg.DataDir is known to be that of a member. Restore
// makes it so at its end: what was cut off before holds none.
func HoldsMember(cfg Config) bool {
	_, err := os.Lstat(cfg.identityPath())
	return err == nil
}

// Exchange puts the data directory fresh in the place of dir, and what was there
// at aside, in this order: at no moment does dir not hold one of the two whole. No
// member may run on either. aside must be absent and on the same file system.
// After an error the exchange may have been made; what was in dir is then in
// fresh, or at aside.
func Exchange(fresh, dir, aside string) error {
	if _, err := os.Lstat(aside); err == nil {
		return fmt.Errorf("replace etcd data: %s is there already: %w", aside, os.ErrExist)
	}
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		if err := os.Rename(fresh, dir); err != nil {
			return fmt.Errorf("replace etcd data: %w", err)
		}
		return fsx.SyncDir(filepath.Dir(dir))
	}
	err := unix.Renameat2(unix.AT_FDCWD, fresh, unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE)
	if err != nil {
		return fmt.Errorf("replace etcd data: exchange %s and %s: %w", fresh, dir, err)
	}
	if err := os.Rename(fresh, aside); err != nil {
		return fmt.Errorf("move old etcd data aside: %w", err)
	}
	return fsx.SyncDir(filepath.Dir(dir))
}
