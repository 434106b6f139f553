package embedded

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"go.etcd.io/bbolt"
)

func segments(t *testing.T, cfg Config) []string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(cfg.walDir(), "*.wal"))
	if err != nil || len(names) < 3 {
		t.Fatalf("segments %v, %v; want three at least", names, err)
	}
	return names
}

func overwrite(t *testing.T, path string, at int64, data []byte) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(data, at); err != nil {
		t.Fatal(err)
	}
}

func TestDamageIsRefused(t *testing.T) {
	cfg, id := withData(t)
	size := func(t *testing.T, path string) int64 {
		st, err := os.Stat(path)
		must(t, err)
		return st.Size()
	}
	tests := []struct {
		name   string
		damage func(t *testing.T, c Config)
		want   error
		text   string
	}{
		{"none", func(*testing.T, Config) {}, nil, ""},
		{"flipped byte in the log", func(t *testing.T, c Config) {
			overwrite(t, segments(t, c)[1], 20_000, []byte{0xff, 0x00, 0xff})
		}, ErrCorrupt, "crc mismatch"},
		{"inner segment cut short", func(t *testing.T, c Config) {
			must(t, os.Truncate(segments(t, c)[1], 20_001))
		}, ErrCorrupt, ""},
		{"inner segment gone", func(t *testing.T, c Config) {
			must(t, os.Remove(segments(t, c)[1]))
		}, ErrCorrupt, ""},
		{"end of the log gone", func(t *testing.T, c Config) {
			for _, name := range segments(t, c)[1:] {
				must(t, os.Remove(name))
			}
		}, ErrCorrupt, "the end of the log is lost"},
		{"log gone", func(t *testing.T, c Config) { must(t, os.RemoveAll(c.walDir())) }, ErrCorrupt, "is gone"},
		{"database gone", func(t *testing.T, c Config) { must(t, os.Remove(c.dbPath())) }, ErrCorrupt, "is missing"},
		{"database empty", func(t *testing.T, c Config) { must(t, os.Truncate(c.dbPath(), 0)) }, ErrCorrupt, ""},
		{"database cut short", func(t *testing.T, c Config) {
			must(t, os.Truncate(c.dbPath(), 40_000))
		}, ErrCorrupt, "database"},
		{"database of noise after its head", func(t *testing.T, c Config) {
			overwrite(t, c.dbPath(), 8192, bytes.Repeat([]byte{0xa5}, int(size(t, c.dbPath())-8192)))
		}, ErrCorrupt, "database"},
		{"both heads of the database gone", func(t *testing.T, c Config) {
			overwrite(t, c.dbPath(), 0, make([]byte, 8192))
		}, ErrCorrupt, "database"},
		{"not made here", func(t *testing.T, c Config) { must(t, os.Remove(c.identityPath())) }, ErrOtherCluster, "was not made by pgha"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := cfg
			c.DataDir = filepath.Join(t.TempDir(), "etcd")
			must(t, os.CopyFS(c.DataDir, os.DirFS(cfg.DataDir)))
			tt.damage(t, c)
			s, err := Start(within(t), c)
			if err == nil {
				defer s.Stop()
				if s.WaitReady(within(t)) == nil && uint64(s.es.MemberID()) != id {
					t.Errorf("member is %x, was %x", s.es.MemberID(), id)
				}
			}
			if !errors.Is(err, tt.want) || err != nil && !strings.Contains(err.Error(), tt.text) {
				t.Errorf("got %v, want %v with %q", err, tt.want, tt.text)
			}
			if err != nil && !strings.Contains(err.Error(), "join it again") && errors.Is(err, ErrCorrupt) {
				t.Errorf("%v does not say what to do", err)
			}
		})
	}
}

// Every place of the database in turn is overwritten: whatever inspect makes of
// it, it must come back.
func TestInspectSurvivesAnyDamage(t *testing.T) {
	cfg, _ := withData(t)
	db, err := os.ReadFile(cfg.dbPath())
	must(t, err)
	sound, err := inspectDB(cfg.dbPath())
	must(t, err)
	if sound.applied == 0 || sound.members != 1 {
		t.Fatalf("sound database gives %+v", sound)
	}
	db = db[:usedBytes(t, cfg.dbPath())] // the rest is allocated ahead
	refused := 0
	path := filepath.Join(t.TempDir(), "db")
	must(t, os.WriteFile(path, db, 0o600))
	if _, err := inspectDB(path); err != nil {
		t.Fatalf("refused without damage: %v", err)
	}
	for page := 0; page < len(db)/4096; page++ {
		for _, noise := range [][]byte{bytes.Repeat([]byte{0xff}, 64), bytes.Repeat([]byte{0x5a}, 4096)} {
			broken := bytes.Clone(db)
			copy(broken[page*4096:], noise)
			must(t, os.WriteFile(path, broken, 0o600))
			if _, err := inspectDB(path); errors.Is(err, ErrCorrupt) {
				refused++
			} else if err != nil {
				t.Fatalf("page %d: %v", page, err)
			}
		}
	}
	if refused == 0 {
		t.Error("no damage was found")
	}
	t.Logf("%d of %d damages refused (the others hit free pages, free parts of pages or one of two heads)", refused, len(db)/4096*2)
}

// A page number that lies far outside the file is a memory fault, not a panic.
func TestInspectSurvivesWildPageNumber(t *testing.T) {
	cfg, _ := withData(t)
	db, err := os.ReadFile(cfg.dbPath())
	must(t, err)
	const branch, header, pageNumber = 1, 16, 8 // flag, its size, offset in an element
	found := 0
	for at := 2 * 4096; at < len(db); at += 4096 {
		if binary.LittleEndian.Uint16(db[at+8:]) != branch {
			continue
		}
		found++
		broken := bytes.Clone(db)
		binary.LittleEndian.PutUint64(broken[at+header+pageNumber:], 1<<30)
		path := filepath.Join(t.TempDir(), "db")
		must(t, os.WriteFile(path, broken, 0o600))
		// A page that is free by now may be as broken as it likes.
		if _, err := inspectDB(path); err != nil && !errors.Is(err, ErrCorrupt) {
			t.Errorf("page %d: %v", at/4096, err)
		} else if err == nil {
			found--
		}
	}
	if found == 0 {
		t.Error("no page in use has a page number")
	}
}

func usedBytes(t *testing.T, path string) int64 {
	t.Helper()
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true})
	must(t, err)
	defer db.Close()
	var size int64
	must(t, db.View(func(tx *bbolt.Tx) error { size = tx.Size(); return nil }))
	return size
}

func TestTornLastRecordIsNoDamage(t *testing.T) {
	cfg, _ := withData(t)
	names := segments(t, cfg)
	info, err := inspectWAL(cfg.walDir())
	must(t, err)
	// A record that a power cut left half written follows the last sound one:
	// a length, then nothing.
	f, err := os.ReadFile(names[len(names)-1])
	must(t, err)
	end := len(bytes.TrimRight(f, "\x00"))
	end += (8 - end%8) % 8
	overwrite(t, names[len(names)-1], int64(end), []byte{200, 0, 0, 0, 0, 0, 0, 0})
	torn, err := inspectWAL(cfg.walDir())
	if err != nil || torn != info {
		t.Fatalf("%+v, %v; want %+v", torn, err, info)
	}
	s := mustStart(t, cfg)
	if resp, err := s.Client().Get(within(t), "k000299"); err != nil || len(resp.Kvs) != 1 {
		t.Errorf("last key: %v, %v", resp, err)
	}
}

func TestHalfMadeBootstrapIsRepaired(t *testing.T) {
	cfg, _ := single(t)
	// Killed after etcd made its database and before it made its log.
	must(t, os.MkdirAll(filepath.Dir(cfg.dbPath()), 0o700))
	db, err := bbolt.Open(cfg.dbPath(), 0o600, nil)
	must(t, err)
	must(t, db.Close())
	if HasData(cfg.DataDir) {
		t.Error("an empty database counts as data")
	}
	mustStart(t, cfg)
	if !HasData(cfg.DataDir) {
		t.Error("a running member has no data")
	}
}
