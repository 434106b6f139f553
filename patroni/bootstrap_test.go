package patroni

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDecideBootstrapRepair(t *testing.T) {
	// Each row differs from cut, a bootstrap that was cut off during initdb.
	cut := BootstrapObservation{Initialized: true, BootstrapNode: true, Pending: true, DataDir: DataDirPartial}
	for _, tc := range []struct {
		what   string
		change func(*BootstrapObservation)
		want   BootstrapAction
		reason string
	}{
		{"cut off during initdb", func(o *BootstrapObservation) {}, BootstrapRepair, "cut off"},
		{"cut off before initdb wrote anything", func(o *BootstrapObservation) { o.DataDir = DataDirEmpty }, BootstrapRepair, "cut off"},
		{"cut off late in initdb", func(o *BootstrapObservation) { o.DataDir = DataDirValid }, BootstrapRepair, "cut off"},
		{"repair cut off after the key was deleted", func(o *BootstrapObservation) { o.Initialized = false }, BootstrapRepair, "cut off"},
		{"half made without a record", func(o *BootstrapObservation) { o.Pending = false }, BootstrapRepair, "cut off"},
		{"empty key without a record", func(o *BootstrapObservation) { o.Pending, o.DataDir = false, DataDirEmpty }, BootstrapRepair, "cut off"},
		{"a leader", func(o *BootstrapObservation) { o.Leader = "n2" }, BootstrapNothing, "has a leader, n2"},
		{"initialised", func(o *BootstrapObservation) { o.SystemID = "7391234567890123456" }, BootstrapNothing, "initialised with system identifier 7391234567890123456"},
		{"another node's business", func(o *BootstrapObservation) { o.BootstrapNode = false }, BootstrapNothing, "another node"},
		{"Patroni at work", func(o *BootstrapObservation) { o.PatroniRunning = true }, BootstrapWait, "may be making"},
		{"a database and an empty key", func(o *BootstrapObservation) { o.Pending, o.DataDir = false, DataDirValid }, BootstrapNothing, "was there before"},
		{"a database and no key", func(o *BootstrapObservation) { o.Initialized, o.Pending, o.DataDir = false, false, DataDirValid }, BootstrapNothing, "was there before"},
		{"a database that runs", func(o *BootstrapObservation) { o.Pending, o.PostgresRunning, o.DataDir = false, true, DataDirValid }, BootstrapNothing, "was there before"},
		{"PostgreSQL of the bootstrap runs", func(o *BootstrapObservation) { o.PostgresRunning, o.DataDir = true, DataDirValid }, BootstrapStopPostgres, "still runs"},
		{"PostgreSQL runs on a damaged directory", func(o *BootstrapObservation) { o.Pending, o.PostgresRunning = false, true }, BootstrapRefuse, "without a valid control file"},
		{"nothing begun", func(o *BootstrapObservation) { o.Initialized, o.DataDir = false, DataDirEmpty }, BootstrapNothing, "nothing has been begun"},
		{"someone's files", func(o *BootstrapObservation) { o.Initialized, o.Pending = false, false }, BootstrapRefuse, "empty it or move it away"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			o := cut
			tc.change(&o)
			got, reason := DecideBootstrapRepair(o)
			if got != tc.want || !strings.Contains(reason, tc.reason) {
				t.Errorf("%v, %q; want %v, %q", got, reason, tc.want, tc.reason)
			}
		})
	}
}

// TestDecideBootstrapRepairSpares tries every observation: a database that this
// node has no record of having begun is never touched, nor anything in a
// cluster that is made or is being made.
func TestDecideBootstrapRepairSpares(t *testing.T) {
	bools := []bool{false, true}
	for _, initialized := range bools {
		for _, id := range []string{"", "7391234567890123456"} {
			for _, leader := range []string{"", "n1"} {
				for _, boot := range bools {
					for _, pending := range bools {
						for _, patroni := range bools {
							for _, postgres := range bools {
								for _, dir := range []DataDirState{DataDirEmpty, DataDirPartial, DataDirValid} {
									o := BootstrapObservation{initialized, id, leader, boot, pending, patroni, postgres, dir}
									made := initialized && id != ""
									a, reason := DecideBootstrapRepair(o)
									if reason == "" {
										t.Errorf("%+v: %v without a reason", o, a)
									}
									if a != BootstrapRepair && a != BootstrapStopPostgres {
										continue
									}
									if made || leader != "" || !boot || patroni || dir == DataDirValid && !pending ||
										a == BootstrapRepair && postgres {
										t.Errorf("%+v: %v, %s", o, a, reason)
									}
								}
							}
						}
					}
				}
			}
		}
	}
}

func TestMoveAside(t *testing.T) {
	parent := t.TempDir()
	dir := filepath.Join(parent, "data")
	moved := map[string]bool{}
	// Twice within a second, so that the names collide.
	for i := range 2 {
		must(t, os.Mkdir(dir, 0o700))
		must(t, os.WriteFile(filepath.Join(dir, "file"), []byte{byte(i)}, 0o600))
		to, err := MoveAside(dir + "/")
		must(t, err)
		moved[to] = true
		if data, err := os.ReadFile(filepath.Join(to, "file")); err != nil || data[0] != byte(i) || filepath.Dir(to) != parent {
			t.Errorf("moved to %s: %v, %v", to, data, err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) || len(moved) != 2 {
		t.Errorf("left behind: %v; moved to %v", err, moved)
	}
	if _, err := MoveAside(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("moving nothing: %v", err)
	}
}
