package embedded

import (
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"go.etcd.io/bbolt"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/server/v3/storage/mvcc"
	"go.etcd.io/etcd/server/v3/storage/schema"
	"google.golang.org/protobuf/proto"

	"pgha/internal/fsx"
)

// ErrSnapshot means that a file is no snapshot, or a damaged one.
var ErrSnapshot = errors.New("damaged snapshot")

const (
	snapshotMagic = "pgha-snapshot-1 "
	snapshotHash  = len(snapshotMagic)
	// snapshotBody is where what the hash covers begins.
	snapshotBody = snapshotHash + sha256.Size*2 + 1
	// maxSnapshotMeta bounds the line that describes a snapshot, in bytes.
	maxSnapshotMeta = 1 << 20
)

// Revision is the keyspace's as this member has applied it. It needs no quorum.
func (s *Server) Revision() (int64, error) {
	if err := s.ended(); err != nil {
		return 0, fmt.Errorf("read etcd revision: %w", err)
	}
	return s.es.KV().Rev(), nil
}

// SaveSnapshot writes this member's keyspace, as it has applied it, to a new file
// at path with mode 0600, compressed, with a hash over everything. meta, which is
// encoded as JSON, describes it. It needs no quorum. It fails with fs.ErrExist
// when there is a file, and leaves none behind when it fails.
func (s *Server) SaveSnapshot(ctx context.Context, path string, meta any) error {
	if err := errors.Join(s.ended(), ctx.Err()); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	snap := s.es.Backend().Snapshot()
	err := writeSnapshot(path, meta, func(w io.Writer) error {
		_, err := snap.WriteTo(w)
		return err
	})
	if err := errors.Join(err, snap.Close()); err != nil {
		return fmt.Errorf("save snapshot: %w", err)
	}
	return nil
}

// writeSnapshot writes a snapshot file whose content write gives.
func writeSnapshot(path string, meta any, write func(io.Writer) error) (err error) {
	line, err := json.Marshal(meta)
	if err != nil {
		return fmt.Errorf("encode description: %w", err)
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".tmp-*") // mode 0600
	if err != nil {
		return fmt.Errorf("create temporary file for %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, f.Close(), os.Remove(f.Name())) }()
	placeholder := snapshotMagic + strings.Repeat("0", sha256.Size*2) + "\n"
	if _, err := f.WriteString(placeholder); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	sum := sha256.New()
	out := bufio.NewWriter(io.MultiWriter(f, sum))
	if _, err := out.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	z := gzip.NewWriter(out)
	if err := errors.Join(write(z), z.Close(), out.Flush()); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if _, err := f.WriteAt([]byte(hex.EncodeToString(sum.Sum(nil))), int64(snapshotHash)); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	// A link replaces nothing, where a rename would.
	if err := os.Link(f.Name(), path); err != nil {
		return fmt.Errorf("put %s in place: %w", path, err)
	}
	return fsx.SyncDir(dir)
}

// ReadSnapshot verifies the whole file and decodes its description into meta.
// ErrSnapshot means that it is damaged or none.
func ReadSnapshot(path string, meta any) error {
	return openSnapshot(path, meta, func(body io.Reader) error {
		_, err := io.Copy(io.Discard, body)
		return err
	})
}

// UnpackSnapshot verifies the file at path as ReadSnapshot does, and writes the
// database that it holds to a new file at db. What a damaged one holds is removed
// again.
func UnpackSnapshot(path, db string, meta any) error {
	f, err := os.OpenFile(db, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return fmt.Errorf("unpack snapshot: %w", err)
	}
	err = openSnapshot(path, meta, func(body io.Reader) error {
		z, err := gzip.NewReader(body)
		if err != nil {
			return snapshotDamage(path, err)
		}
		if _, err := io.Copy(f, z); err != nil {
			return snapshotDamage(path, err)
		}
		// Behind the end of the compressed part the hash still counts.
		_, err = io.Copy(io.Discard, body)
		return err
	})
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(db))
	}
	return nil
}

func snapshotDamage(path string, why any) error {
	return fmt.Errorf("%w: %s: %v", ErrSnapshot, path, why)
}

// openSnapshot gives what follows the description to read, which must read it
// to its end, and then compares the hash.
func openSnapshot(path string, meta any, read func(io.Reader) error) (err error) {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open snapshot: %w", err)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	head := make([]byte, snapshotBody)
	if _, err := io.ReadFull(f, head); err != nil || !bytes.HasPrefix(head, []byte(snapshotMagic)) {
		return snapshotDamage(path, "it is no snapshot of pgha")
	}
	sum := sha256.New()
	in := bufio.NewReaderSize(f, maxSnapshotMeta)
	line, err := in.ReadSlice('\n')
	if err != nil {
		return snapshotDamage(path, "it is cut off")
	}
	line = bytes.Clone(line)
	sum.Write(line)
	if err := read(&hashing{in, sum}); err != nil {
		return err
	}
	if want := string(head[snapshotHash : snapshotBody-1]); hex.EncodeToString(sum.Sum(nil)) != want {
		return snapshotDamage(path, "its content does not fit its hash")
	}
	if err := json.Unmarshal(line, meta); err != nil {
		return snapshotDamage(path, err)
	}
	return nil
}

// hashing reads and hashes.
type hashing struct {
	r   io.Reader
	sum hash.Hash
}

// Read implements io.Reader.
func (h *hashing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.sum.Write(p[:n])
	return n, err
}

// Keys reads the keyspace of the database of a stopped member, or of an unpacked
// snapshot: each key with its newest value, and the newest revision. It changes
// nothing. It fails with ErrInUse while a member runs on it, with ErrCorrupt when
// it is damaged, and with fs.ErrNotExist when there is none.
func Keys(db string) (keys map[string][]byte, revision int64, err error) {
	if _, err := os.Stat(db); err != nil {
		return nil, 0, fmt.Errorf("read etcd database: %w", err)
	}
	if _, err := inspectDB(db); err != nil {
		return nil, 0, err
	}
	defer func() {
		if r := recover(); r != nil {
			err = corrupt("database %s: %v", db, r)
		}
	}()
	b, err := bbolt.Open(db, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockTimeout})
	if err != nil {
		return nil, 0, fmt.Errorf("open etcd database: %w", err)
	}
	defer func() { err = errors.Join(err, b.Close()) }()
	keys = map[string][]byte{}
	err = b.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket(schema.Key.Name())
		if bucket == nil {
			return nil
		}
		return bucket.ForEach(func(k, v []byte) error {
			revision = mvcc.BytesToRev(k).Main
			var kv mvccpb.KeyValue
			if err := proto.Unmarshal(v, &kv); err != nil {
				return fmt.Errorf("decode key at revision %d: %w", revision, err)
			}
			switch {
			case len(kv.Key) == 0: // a revision that was passed over
			case mvcc.IsTombstone(k):
				delete(keys, string(kv.Key))
			default:
				keys[string(kv.Key)] = kv.Value
			}
			return nil
		})
	})
	return keys, revision, err
}

// Database is where the member of cfg keeps its keyspace. While it is stopped it
// can be restored from as an unpacked snapshot can; the last moments before a
// crash may be in its log alone.
func (c Config) Database() string { return c.dbPath() }

// KeysOf is Keys for the member of cfg, which must be stopped.
func KeysOf(cfg Config) (map[string][]byte, int64, error) {
	keys, rev, err := Keys(cfg.dbPath())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, 0, fmt.Errorf("%s holds no etcd database: %w", cfg.DataDir, fs.ErrNotExist)
	}
	return keys, rev, err
}
