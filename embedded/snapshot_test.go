package embedded

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
)

var withAll = []clientv3.OpOption{clientv3.WithFromKey()}

type testMeta struct {
	Cluster  string `json:"cluster"`
	Revision int64  `json:"revision"`
}

// saved is a running member with a key, and a snapshot of it.
func saved(t *testing.T) (Config, *Server, string) {
	t.Helper()
	cfg, _ := single(t)
	s := mustStart(t, cfg)
	for _, kv := range [][2]string{{"a", "1"}, {"b", "2"}, {"a", "3"}} {
		if _, err := s.Client().Put(within(t), kv[0], kv[1]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Client().Delete(within(t), "b"); err != nil {
		t.Fatal(err)
	}
	rev, err := s.Revision()
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "one.snap")
	if err := s.SaveSnapshot(within(t), file, testMeta{"uuid-1", rev}); err != nil {
		t.Fatal(err)
	}
	return cfg, s, file
}

func TestSnapshotHoldsTheKeyspace(t *testing.T) {
	_, s, file := saved(t)
	st, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	if st.Mode() != 0o600 {
		t.Errorf("mode is %v", st.Mode())
	}
	var meta testMeta
	if err := ReadSnapshot(file, &meta); err != nil {
		t.Fatal(err)
	}
	db := filepath.Join(t.TempDir(), "db")
	var again testMeta
	if err := UnpackSnapshot(file, db, &again); err != nil {
		t.Fatal(err)
	}
	keys, rev, err := Keys(db)
	if err != nil {
		t.Fatal(err)
	}
	if again != meta || meta.Cluster != "uuid-1" || rev != meta.Revision {
		t.Errorf("described as %+v and %+v, holds revision %d", meta, again, rev)
	}
	if len(keys) != 1 || string(keys["a"]) != "3" {
		t.Errorf("keys are %q", keys)
	}
	if err := s.SaveSnapshot(within(t), file, meta); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second snapshot of the same name: %v", err)
	}
	left, err := filepath.Glob(filepath.Join(filepath.Dir(file), ".*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestDamagedSnapshotIsRefused(t *testing.T) {
	_, _, file := saved(t)
	sound, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	flipped := func(at int) []byte {
		b := append([]byte(nil), sound...)
		b[at] ^= 1
		return b
	}
	for name, content := range map[string][]byte{
		"empty":       {},
		"other file":  []byte("hello"),
		"magic":       flipped(2),
		"hash":        flipped(snapshotHash + 3),
		"description": flipped(snapshotBody + 3),
		"content":     flipped(len(sound) / 2),
		"last byte":   flipped(len(sound) - 1),
		"cut off":     sound[:len(sound)-10],
		"no content":  sound[:snapshotBody+5],
		"appended":    append(append([]byte(nil), sound...), 'x'),
	} {
		t.Run(name, func(t *testing.T) {
			bad, db := filepath.Join(t.TempDir(), "bad.snap"), filepath.Join(t.TempDir(), "db")
			if err := os.WriteFile(bad, content, 0o600); err != nil {
				t.Fatal(err)
			}
			var meta testMeta
			if err := ReadSnapshot(bad, &meta); !errors.Is(err, ErrSnapshot) {
				t.Errorf("read: %v", err)
			}
			if err := UnpackSnapshot(bad, db, &meta); !errors.Is(err, ErrSnapshot) {
				t.Errorf("unpack: %v", err)
			}
			if _, err := os.Stat(db); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("what a damaged one holds was left: %v", err)
			}
		})
	}
}

// A restored member has the keys and is nobody's peer: its IDs are new, and its
// revision is past all that anybody has seen.
func TestRestoreMakesAnotherCluster(t *testing.T) {
	cfg, s, file := saved(t)
	before, err := s.Status(within(t))
	if err != nil {
		t.Fatal(err)
	}
	s.Stop()
	dir := t.TempDir()
	db := filepath.Join(dir, "db")
	var meta testMeta
	if err := UnpackSnapshot(file, db, &meta); err != nil {
		t.Fatal(err)
	}
	fresh := cfg
	fresh.DataDir = filepath.Join(filepath.Dir(cfg.DataDir), "fresh")
	if err := Restore(db, fresh); err != nil {
		t.Fatal(err)
	}
	if err := Restore(db, fresh); !errors.Is(err, fs.ErrExist) {
		t.Errorf("restored over existing data: %v", err)
	}
	aside := cfg.DataDir + "-old"
	if err := Exchange(fresh.DataDir, cfg.DataDir, aside); err != nil {
		t.Fatal(err)
	}
	again := mustStart(t, cfg)
	after, err := again.Status(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if after.ClusterID == before.ClusterID || after.MemberID == before.MemberID {
		t.Errorf("cluster %x and member %x are the old ones", after.ClusterID, after.MemberID)
	}
	if len(after.Members) != 1 || after.Members[0].Name != "n1" || after.Learner {
		t.Errorf("members are %+v", after.Members)
	}
	r, err := again.Client().Get(within(t), "\x00", withAll...)
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Key) != "a" || string(r.Kvs[0].Value) != "3" {
		t.Errorf("keys are %v", r.Kvs)
	}
	if r.Header.Revision < meta.Revision+revisionBump {
		t.Errorf("revision is %d", r.Header.Revision)
	}
	if _, err := again.Client().Put(within(t), "c", "4"); err != nil {
		t.Error(err)
	}
	if _, _, err := KeysOf(Config{DataDir: aside}); err != nil {
		t.Errorf("the old data was not kept: %v", err)
	}
	if err := Exchange(fresh.DataDir, cfg.DataDir, aside); !errors.Is(err, fs.ErrExist) {
		t.Errorf("moved over what was kept: %v", err)
	}
}

func TestKeysOfNothing(t *testing.T) {
	if _, _, err := KeysOf(Config{DataDir: t.TempDir()}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
