package node

import (
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pgha/cluster"
)

// standIn is a node of which only the acquaintance with the others runs.
type standIn struct {
	*Node
	t *testing.T
}

func newHost(t *testing.T, name, lib string) standIn {
	t.Helper()
	n := &Node{
		log: discardLog(), cfg: Config{Name: name, Role: cluster.RoleWitness}, paths: Paths{Lib: lib},
		state: State{ClusterName: "main", Node: name}, problems: map[string]string{},
	}
	if err := n.loadLineage(); err != nil {
		t.Fatal(err)
	}
	return standIn{n, t}
}

// started is the host's next start with the disk that it has.
func (h standIn) started() standIn {
	h.t.Helper()
	return newHost(h.t, h.cfg.Name, h.paths.Lib)
}

// meet is one meeting, as one of two nodes asks for it.
func meet(a, b standIn) {
	in, out := a.tell(b.cfg.Name), b.tell(a.cfg.Name)
	b.met(a.cfg.Name, in)
	a.met(b.cfg.Name, out)
}

// live has nodes start, unless they must not, and beat and meet for a while.
func live(t *testing.T, beats int, all ...standIn) {
	t.Helper()
	each := func(f func(standIn)) {
		for _, h := range all {
			if h.isBarred() == nil {
				f(h)
			}
		}
	}
	mingle := func() {
		for i, a := range all {
			for _, b := range all[i+1:] {
				meet(a, b) // one that is out of service answers all the same
			}
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	mingle()
	each(func(h standIn) { must(h.lineage.marks.begin(h.paths.marks())) })
	for range beats {
		each(func(h standIn) { must(h.lineage.marks.beat(h.paths.marks())) })
		mingle()
	}
}

// copyOf is a copy of a host's disk.
func copyOf(t *testing.T, h standIn) string {
	t.Helper()
	to := t.TempDir()
	if out, err := exec.Command("cp", "-a", h.paths.Lib+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("copy: %v: %s", err, out)
	}
	return to
}

// TestDisksPutBack: of three nodes some are put back to different moments, and
// then all start.
func TestDisksPutBack(t *testing.T) {
	for _, tc := range []struct {
		name string
		back map[string]int // to which of the copies, the oldest first; absent = not put back
		want string         // who is refused
	}{
		{"none", nil, ""},
		{"one", map[string]int{"n2": 1}, "n2"},
		{"two, to the same moment", map[string]int{"n2": 1, "n3": 1}, "n2 n3"},
		{"two, to different moments", map[string]int{"n2": 0, "n3": 1}, "n2 n3"},
		{"all, to different moments: the latest stays", map[string]int{"n1": 2, "n2": 0, "n3": 1}, "n2 n3"},
		{"all, two to the same latest moment", map[string]int{"n1": 1, "n2": 1, "n3": 0}, "n3"},
		{"all, to the same moment", map[string]int{"n1": 1, "n2": 1, "n3": 1}, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var all []standIn
			for _, name := range []string{"n1", "n2", "n3"} {
				all = append(all, newHost(t, name, t.TempDir()))
			}
			copies := map[string][]string{}
			for range 3 {
				live(t, 3, all...)
				// A copy holds what all had agreed on when they were stopped for it.
				for i, h := range all {
					if err := h.lineage.marks.beat(h.paths.marks()); err != nil {
						t.Fatal(err)
					}
					copies[h.cfg.Name] = append(copies[h.cfg.Name], copyOf(t, h))
					all[i] = h.started()
				}
			}
			live(t, 3, all...)
			for i, h := range all {
				if c, ok := tc.back[h.cfg.Name]; ok {
					h.paths.Lib = copies[h.cfg.Name][c]
				}
				all[i] = h.started()
			}
			live(t, 4, all...)
			var refused []string
			for _, h := range all {
				if b := h.isBarred(); b != nil {
					refused = append(refused, h.cfg.Name)
					if b.Kind != barOlder || !strings.Contains(strings.Join(b.ToDo, " "), "pgha member replace "+h.cfg.Name) {
						t.Errorf("%s says %+v", h.cfg.Name, b)
					}
				}
			}
			if got := strings.Join(refused, " "); got != tc.want {
				t.Errorf("refused are %q, want %q", got, tc.want)
			}
		})
	}
}

// TestReplacedNodesHear: two nodes of the past hear of the new generation from
// the one that has begun it, and a late one from any node that belongs to it.
func TestReplacedNodesHear(t *testing.T) {
	var all []standIn
	for _, name := range []string{"n1", "n2", "n3", "n4"} {
		h := newHost(t, name, t.TempDir())
		if err := os.WriteFile(h.paths.State(), []byte(`{"cluster_id":"c","node":"`+name+`"}`), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := h.setGeneration(Generation{Number: 1}); err != nil {
			t.Fatal(err)
		}
		all = append(all, h)
	}
	survivor, lost, late := all[0], all[1], all[2]
	if err := survivor.setGeneration(Generation{Number: 2, ID: "x", By: "n1", At: time.Now()}); err != nil {
		t.Fatal(err)
	}
	meet(lost, late)
	if lost.isBarred() != nil || late.isBarred() != nil {
		t.Error("those that have not heard of it are out of service")
	}
	meet(lost, survivor)
	if survivor.isBarred() != nil || lost.isBarred() == nil || lost.isBarred().Kind != barReplaced {
		t.Errorf("the survivor is %+v, the lost one %+v", survivor.isBarred(), lost.isBarred())
	}
	joined := newHost(t, "n5", t.TempDir()) // it does not know its generation yet
	meet(joined, survivor)
	meet(joined, late)
	if joined.isBarred() != nil || late.isBarred() != nil {
		t.Error("a node that has just joined was taken for one of the past, or believed")
	}
	if err := joined.setGeneration(survivor.generation()); err != nil {
		t.Fatal(err)
	}
	meet(late, joined)
	if joined.isBarred() != nil || late.isBarred() == nil {
		t.Error("a node of the past did not hear of it from a new one")
	}
}
