package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"time"

	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/client/pkg/v3/fileutil"
	"go.etcd.io/etcd/client/pkg/v3/types"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.etcd.io/etcd/server/v3/storage/wal/walpb"
	"go.etcd.io/raft/v3/raftpb"
	"go.uber.org/zap"
	"google.golang.org/protobuf/proto"
)

// lockTimeout bounds the wait for another process to let go of the database.
const lockTimeout = 2 * time.Second

// dataInfo is what a sound data directory says about itself.
type dataInfo struct {
	memberID uint64
	removed  bool // the member saw its own removal
}

type walInfo struct {
	memberID  uint64
	lastIndex uint64 // of the last entry or snapshot in the log
}

type dbInfo struct {
	applied uint64 // consistent index
	members int
	removed map[string]bool // member IDs, hexadecimal
}

// inspect reads the whole log and database. It fails with ErrCorrupt where etcd
// would end the process, and with ErrInUse when another process has the
// database open. It writes nothing: etcd itself cuts off a torn last record.
func inspect(cfg Config) (dataInfo, error) {
	if _, err := os.Stat(cfg.dbPath()); errors.Is(err, fs.ErrNotExist) {
		return dataInfo{}, corrupt("database %s is missing", cfg.dbPath())
	}
	db, err := inspectDB(cfg.dbPath())
	if err != nil {
		return dataInfo{}, err
	}
	w, err := inspectWAL(cfg.walDir())
	if err != nil {
		return dataInfo{}, err
	}
	if db.applied > w.lastIndex {
		return dataInfo{}, corrupt("the log %s ends at entry %d, the database has applied %d: the end of the log is lost",
			cfg.walDir(), w.lastIndex, db.applied)
	}
	return dataInfo{memberID: w.memberID, removed: db.removed[types.ID(w.memberID).String()]}, nil
}

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: "+format+"; %s", append(append([]any{ErrCorrupt}, args...), adviceRejoin)...)
}

// checkLeftover looks at a database without a log. A start that was cut off
// early leaves an empty one, which etcd takes over. One with content has lost
// its log, and with it the votes of this member.
func checkLeftover(cfg Config) error {
	if _, err := os.Stat(cfg.dbPath()); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	db, err := inspectDB(cfg.dbPath())
	if err != nil {
		return err
	}
	if db.applied > 0 || db.members > 0 {
		return corrupt("database %s is there and its log %s is gone", cfg.dbPath(), cfg.walDir())
	}
	return nil
}

// inspectWAL verifies every record of the log. etcd's decoders panic on some
// kinds of damage, hence the recover.
func inspectWAL(dir string) (info walInfo, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = corrupt("log %s: %v", dir, r)
		}
	}()
	lg := zap.NewNop()
	snaps, err := wal.ValidSnapshotEntries(lg, dir)
	if err != nil {
		return info, corrupt("log %s: %v", dir, err)
	}
	snap := &walpb.Snapshot{}
	if len(snaps) > 0 {
		snap = snaps[len(snaps)-1]
	}
	if _, err := wal.Verify(lg, dir, snap); err != nil {
		return info, corrupt("log %s: %v", dir, err)
	}
	// Verify takes a record cut short for the end, wherever it is. That is so
	// in the last file only.
	names, err := filepath.Glob(filepath.Join(dir, "*.wal"))
	if err != nil {
		return info, fmt.Errorf("list log %s: %w", dir, err)
	}
	slices.Sort(names)
	info.lastIndex = snap.GetIndex()
	for i, name := range names {
		if err := inspectSegment(name, i == len(names)-1, &info); err != nil {
			return info, err
		}
	}
	return info, nil
}

func inspectSegment(name string, last bool, info *walInfo) (err error) {
	f, err := os.Open(name)
	if err != nil {
		return fmt.Errorf("open log segment: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	dec := wal.NewDecoder(fileutil.NewFileReader(f))
	for {
		rec := &walpb.Record{}
		err := dec.Decode(rec)
		switch {
		case errors.Is(err, io.EOF), last && errors.Is(err, io.ErrUnexpectedEOF):
			return nil
		case err != nil:
			return corrupt("log segment %s: %v", name, err)
		}
		switch rec.GetType() {
		case wal.CrcType:
			dec.UpdateCRC(rec.GetCrc())
		case wal.MetadataType:
			var m etcdserverpb.Metadata
			if err := proto.Unmarshal(rec.Data, &m); err != nil {
				return corrupt("log segment %s: read its owner: %v", name, err)
			}
			info.memberID = m.GetNodeID()
		case wal.EntryType:
			var e raftpb.Entry
			if err := proto.Unmarshal(rec.Data, &e); err != nil {
				return corrupt("log segment %s: read an entry: %v", name, err)
			}
			// A later entry of the same index replaces the ones after it.
			info.lastIndex = e.GetIndex()
		}
	}
}

// inspectDB reads every page and key. bbolt answers damage with panics and, for
// a page beyond the end of the file, with a memory fault; both are caught here
// because all of it happens on this goroutine (bbolt's own check does not).
func inspectDB(path string) (info dbInfo, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if r := recover(); r != nil {
			err = corrupt("database %s: %v", path, r)
		}
	}()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if errors.Is(err, bolterrors.ErrTimeout) {
		return info, fmt.Errorf("%w: %s is locked by another process; stop it first", ErrInUse, path)
	}
	if err != nil {
		return info, corrupt("database %s: %v", path, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	tx, err := db.Begin(false)
	if err != nil {
		return info, fmt.Errorf("read etcd database: %w", err)
	}
	defer func() { err = errors.Join(err, tx.Rollback()) }()

	st, err := os.Stat(path)
	if err != nil {
		return info, fmt.Errorf("read size of etcd database: %w", err)
	}
	if tx.Size() > st.Size() {
		return info, corrupt("database %s has %d bytes and should have %d", path, st.Size(), tx.Size())
	}
	info.removed = map[string]bool{}
	err = tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
		return inspectBucket(path, name, b, &info)
	})
	return info, err
}

func inspectBucket(path string, name []byte, b *bbolt.Bucket, info *dbInfo) error {
	var prev []byte
	return b.ForEach(func(k, v []byte) error {
		if prev != nil && bytes.Compare(prev, k) >= 0 {
			return corrupt("database %s: keys of bucket %q are out of order", path, name)
		}
		prev = k
		switch {
		case bytes.Equal(name, schema.Key.Name()):
			var kv mvccpb.KeyValue
			if err := proto.Unmarshal(v, &kv); err != nil {
				return corrupt("database %s: key at revision %x: %v", path, k, err)
			}
		case bytes.Equal(name, schema.Members.Name()):
			info.members++
		case bytes.Equal(name, schema.MembersRemoved.Name()):
			info.removed[string(k)] = true
		case bytes.Equal(name, schema.Meta.Name()) && bytes.Equal(k, schema.MetaConsistentIndexKeyName):
			if len(v) != 8 {
				return corrupt("database %s: applied index has %d bytes", path, len(v))
			}
			info.applied = binary.BigEndian.Uint64(v)
		}
		return nil
	})
}
