package node

import (
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"pgha/internal/fsx"
)

// runsKept is how many of its starts a node remembers.
const runsKept = 64

// mark is a point in the life of a node's disk. A node writes it to disk before
// it tells anybody; so nobody can have seen more than the disk holds, unless the
// disk was put back.
type mark struct {
	Join  string `json:"join,omitempty"` // the token that the node came in with: a node that joins anew begins anew
	Start uint64 `json:"start"`          // counts the starts of the daemon
	Run   string `json:"run,omitempty"`  // random, for each start; "" = no mark
	Beat  uint64 `json:"beat"`           // counts while the daemon runs
}

// marks are a node's own, and the newest that it has had from others. Not safe
// for concurrent use.
type marks struct {
	Runs []mark          `json:"runs"` // the last of each start, the oldest first
	Seen map[string]mark `json:"seen"` // by name
	join string
}

func (p Paths) marks() string { return filepath.Join(p.Lib, "marks.json") }

func (m *marks) load(path, join string) error {
	m.join = join
	if err := fsx.ReadJSON(path, m); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read start marks: %w", err)
	}
	if m.Seen == nil {
		m.Seen = map[string]mark{}
	}
	return nil
}

// now is the newest mark that is on disk; the zero value before the first.
func (m *marks) now() mark {
	if len(m.Runs) == 0 {
		return mark{Join: m.join}
	}
	return m.Runs[len(m.Runs)-1]
}

// lacks says whether seen, which another node has had from this one, is missing
// here.
func (m *marks) lacks(seen mark) bool {
	if seen.Run == "" || seen.Join != m.join {
		return false
	}
	i := slices.IndexFunc(m.Runs, func(r mark) bool { return r.Run == seen.Run })
	if i >= 0 {
		return m.Runs[i].Beat < seen.Beat
	}
	forgotten := len(m.Runs) >= runsKept && seen.Start < m.Runs[0].Start
	return !forgotten
}

func (m *marks) seenOf(name string) mark { return m.Seen[name] }

// saw notes what a node says of itself. A new start of it counts once the node
// has shown, by ack, that it knows of the run that was seen before: one that was
// put back does not, and must be told so again until it has heard it.
func (m *marks) saw(name string, got mark, ack string) {
	old := m.Seen[name]
	if got.Run != "" && (got.Run == old.Run && got.Beat > old.Beat || got.Run != old.Run && old.Run == ack) {
		m.Seen[name] = got
	}
}

// begin makes the mark of a new start, durably.
func (m *marks) begin(path string) error {
	raw := make([]byte, 8)
	if _, err := rand.Read(raw); err != nil {
		return fmt.Errorf("make start mark: %w", err)
	}
	next := mark{Join: m.join, Start: m.now().Start + 1, Run: hex.EncodeToString(raw)}
	runs := append(slices.Clone(m.Runs), next)
	return m.save(path, runs[max(0, len(runs)-runsKept):])
}

// beat raises the newest mark, durably. Without a disk to write to it stays as
// it is, and nobody hears of more than the disk has.
func (m *marks) beat(path string) error {
	if len(m.Runs) == 0 {
		return nil // not begun
	}
	runs := slices.Clone(m.Runs)
	runs[len(runs)-1].Beat++
	return m.save(path, runs)
}

func (m *marks) save(path string, runs []mark) error {
	if err := fsx.WriteJSON(path, marks{Runs: runs, Seen: m.Seen}, 0o600); err != nil {
		return fmt.Errorf("write start mark: %w", err)
	}
	m.Runs = runs
	return nil
}
