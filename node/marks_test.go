package node

import (
	"path/filepath"
	"testing"
)

// diskOf is a node's marks with the file that they are in.
type diskOf struct {
	t    *testing.T
	path string
	marks
}

func newDisk(t *testing.T, path, join string) *diskOf {
	t.Helper()
	d := &diskOf{t: t, path: path}
	if err := d.load(path, join); err != nil {
		t.Fatal(err)
	}
	return d
}

// run starts the node and lets it beat.
func (d *diskOf) run(beats int) *diskOf {
	d.t.Helper()
	if err := d.begin(d.path); err != nil {
		d.t.Fatal(err)
	}
	for range beats {
		if err := d.beat(d.path); err != nil {
			d.t.Fatal(err)
		}
	}
	return d
}

// meets exchanges marks as two nodes do that meet twice, and says whether the
// first one has found that it lacks something.
func (d *diskOf) meets(other *diskOf) bool {
	for range 2 {
		seen := other.seenOf("d")
		if d.lacks(seen) {
			return true
		}
		other.saw("d", d.now(), seen.Run)
	}
	return false
}

// TestMarksTellAnOlderDisk: a disk that was put back is recognised by whoever has
// met the node after the copy was made, however often it was started since, and
// by nobody else.
func TestMarksTellAnOlderDisk(t *testing.T) {
	dir := t.TempDir()
	peer := newDisk(t, filepath.Join(dir, "peer"), "")
	path := filepath.Join(dir, "d")
	d := newDisk(t, path, "t1").run(3)
	if d.meets(peer) {
		t.Fatal("a first meeting")
	}
	copied := *newDisk(t, path, "t1") // the disk as it is now
	copied.path = filepath.Join(dir, "copy")
	copied.Runs = append([]mark(nil), copied.Runs...)
	if (&copied).lacks(peer.seenOf("d")) {
		t.Error("a copy that lacks nothing")
	}
	// A reboot of the true disk.
	d = newDisk(t, path, "t1").run(5)
	if d.meets(peer) {
		t.Error("a reboot")
	}
	// The copy, put back, once and again.
	if !(&copied).meets(peer) {
		t.Error("an older disk was not recognised")
	}
	copied.run(100)
	if !(&copied).meets(peer) {
		t.Error("an older disk was not recognised after it had run")
	}
	copied.run(1)
	copied.run(1)
	if !(&copied).meets(peer) {
		t.Error("an older disk was not recognised after more starts than the true one had")
	}
	// A peer that has restarted remembers.
	if err := peer.save(peer.path, peer.Runs); err != nil {
		t.Fatal(err)
	}
	if !(&copied).meets(newDisk(t, peer.path, "")) {
		t.Error("a peer has forgotten with its restart")
	}
	// The true one is what it was.
	if d.meets(peer) {
		t.Error("the true disk was refused")
	}
	// Memory put back: the same run with fewer beats.
	older := newDisk(t, path, "t1")
	older.Runs[len(older.Runs)-1].Beat--
	if !older.meets(peer) {
		t.Error("the same run with fewer beats was not recognised")
	}
	// A node that has joined anew under the name begins anew.
	anew := newDisk(t, filepath.Join(dir, "anew"), "t2").run(0)
	if anew.meets(peer) {
		t.Error("a node that has joined anew was refused")
	}
	if anew.run(0).meets(peer) {
		t.Error("its restart was refused")
	}
}

func TestMarksForgetOldStarts(t *testing.T) {
	dir := t.TempDir()
	d, peer := newDisk(t, filepath.Join(dir, "d"), ""), newDisk(t, filepath.Join(dir, "p"), "")
	d.run(1)
	d.meets(peer)
	for range runsKept + 3 {
		d.run(0)
	}
	if len(d.Runs) != runsKept {
		t.Errorf("%d starts are kept", len(d.Runs))
	}
	if d.meets(peer) {
		t.Error("a peer that was away for long has made it doubt itself")
	}
}
