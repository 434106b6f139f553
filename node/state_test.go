package node

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/internal/fsx"
)

func TestMoveAside(t *testing.T) {
	p, s := founder(t)
	write(t, p.Lib+"/reset-20200101T000000/old", "x")
	aside := p.Aside(time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC))
	if aside != p.Lib+"/reset-20260102T030405" {
		t.Errorf("aside is %s", aside)
	}
	if err := moveAside(p, aside); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadState(p); !errors.Is(err, ErrNoNode) {
		t.Errorf("the state is still there: %v", err)
	}
	if _, err := CheckFresh(p, false); err != nil {
		t.Errorf("the host is not fresh: %v", err)
	}
	for _, name := range []string{"state.json", "pgha.yml", "pki/ca.crt", "secrets.sealed"} {
		if _, err := os.Stat(filepath.Join(aside, name)); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat(p.Lib + "/reset-20200101T000000/old"); err != nil {
		t.Errorf("an earlier reset's files were moved: %v", err)
	}
	if _, err := os.Stat(p.Run); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the run directory is left: %v", err)
	}
	// A second try after half a reset finds what is left.
	if err := os.MkdirAll(p.Lib, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := s.Save(p); err != nil {
		t.Fatal(err)
	}
	if err := moveAside(p, aside); err != nil {
		t.Errorf("again: %v", err)
	}
}

func TestCopyAway(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/from", "text")
	if err := copyAway(dir+"/from", dir+"/to"); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(dir + "/to"); err != nil || string(data) != "text" {
		t.Errorf("copy is %q, %v", data, err)
	}
	if _, err := os.Stat(dir + "/from"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the original is left: %v", err)
	}
	if err := copyAway(dir+"/from", dir+"/to"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

func TestCache(t *testing.T) {
	p := tempPaths(t)
	n := &Node{paths: p, problems: map[string]string{}, log: discardLog()}
	n.loadCache()
	if len(n.world.Members)+len(n.problems) > 0 {
		t.Errorf("without a cache: %+v, %v", n.world, n.problems)
	}
	w := world{Members: roster(), Settings: testSettings}
	if err := n.saveCache(w); err != nil {
		t.Fatal(err)
	}
	first, err := os.Stat(p.roster())
	if err != nil {
		t.Fatal(err)
	}
	if err := n.saveCache(w); err != nil {
		t.Fatal(err)
	}
	if again, err := os.Stat(p.roster()); err != nil || !os.SameFile(first, again) {
		t.Errorf("the same roster was written again (%v)", err)
	}
	n.loadCache()
	if diff := cmp.Diff(w.Members, n.world.Members, cmpAddrs); diff != "" {
		t.Errorf("members (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(w.Settings, n.world.Settings, cmpAddrs); diff != "" {
		t.Errorf("settings (-want +got):\n%s", diff)
	}
	write(t, p.roster(), "{")
	if n.loadCache(); n.problems["roster"] == "" {
		t.Error("a damaged cache is no problem")
	}
}

func TestProblem(t *testing.T) {
	n := &Node{problems: map[string]string{}, log: discardLog()}
	n.problem("b", errors.New("bad"))
	n.problem("a", errors.New("worse"))
	n.problem("b", errors.New("still bad"))
	n.problem("c", nil)
	if diff := cmp.Diff(map[string]string{"a": "worse", "b": "still bad"}, n.problems); diff != "" {
		t.Error(diff)
	}
	n.problem("b", nil)
	if diff := cmp.Diff(map[string]string{"a": "worse"}, n.problems); diff != "" {
		t.Error(diff)
	}
}

func TestReplaceFile(t *testing.T) {
	p, _ := founder(t)
	n, err := Open(Options{Paths: p, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	path := p.Lib + "/conf"
	var checked []string
	check := func(_ context.Context, draft string) error {
		data, err := os.ReadFile(draft)
		checked = append(checked, string(data))
		if string(data) == "bad" {
			return errors.New("no good")
		}
		return err
	}
	for _, tc := range []struct {
		text          string
		changed, fail bool
		want          string
	}{
		{"one", true, false, "one"}, {"one", false, false, "one"}, {"bad", false, true, "one"}, {"two", true, false, "two"},
	} {
		changed, err := n.replaceFile(t.Context(), path, []byte(tc.text), 0o640, n.owners.postgres, check)
		if changed != tc.changed || (err != nil) != tc.fail {
			t.Errorf("%s: changed %v, error %v", tc.text, changed, err)
		}
		data, err := os.ReadFile(path)
		if err != nil || string(data) != tc.want {
			t.Errorf("%s: the file holds %q, %v", tc.text, data, err)
		}
	}
	if diff := cmp.Diff([]string{"one", "bad", "two"}, checked); diff != "" {
		t.Errorf("checked (-want +got):\n%s", diff)
	}
}

func TestStateRoundTrip(t *testing.T) {
	p := tempPaths(t)
	if _, err := LoadState(p); !errors.Is(err, ErrNoNode) {
		t.Errorf("without a file: %v", err)
	}
	want := State{
		ClusterID: "c", ClusterName: "shop", Node: "n1", Role: cluster.RoleData, Phase: PhaseReady, CreatedAt: time.Now().UTC().Truncate(time.Second),
		Founder: true, Founded: true, Adopted: "/data", SystemID: "7", TokenID: "t", InitialCluster: map[string]string{"n1": "https://10.0.0.1:2380"},
		Settings: &testSettings, SANs: []string{"db"},
	}
	if err := want.Save(p); err != nil {
		t.Fatal(err)
	}
	got, err := LoadState(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpAddrs); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestMakeDir(t *testing.T) {
	dir := t.TempDir() + "/a/b"
	for _, mode := range []fs.FileMode{0o700, 0o711} {
		if err := makeDir(dir, mode, 1, 2); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != mode {
			t.Errorf("mode is %v, %v, want %v", st.Mode(), err, mode)
		}
	}
	write(t, filepath.Dir(dir)+"/file", "")
	if err := makeDir(filepath.Dir(dir)+"/file/c", 0o700, fsx.Keep, fsx.Keep); err == nil {
		t.Error("a directory was made below a file")
	}
}
