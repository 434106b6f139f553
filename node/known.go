package node

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"pgha/cluster"
	"pgha/gate"
	"pgha/internal/fsx"
	"pgha/patroni"
)

// knownEvery is how old what a node has on disk about the cluster may get while
// nothing but positions change.
const knownEvery = 10 * time.Second

// known is what a node last knew of the whole cluster, while that had a quorum.
type known struct {
	At       time.Time         `json:"at"`
	Revision int64             `json:"revision"` // of etcd
	Record   *gate.Record      `json:"gate,omitempty"`
	Leader   string            `json:"leader,omitempty"`
	Sync     patroni.SyncState `json:"sync"`
	Async    bool              `json:"async"`
	Optime   uint64            `json:"optime"` // bytes: the primary's position as it told last
	Position uint64            `json:"position"`
}

// memory keeps the newest in memory too.
type memory struct {
	mu    sync.Mutex
	known known
	saved known
}

func (p Paths) known() string { return filepath.Join(p.Lib, "last-known.json") }

// loadKnown reads what an earlier daemon has kept.
func (n *Node) loadKnown() error {
	n.memory.mu.Lock()
	defer n.memory.mu.Unlock()
	err := fsx.ReadJSON(n.paths.known(), &n.memory.known)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// lastKnown is what this node knew when it last saw a quorum; a zero At if never.
func (n *Node) lastKnown() known {
	n.memory.mu.Lock()
	defer n.memory.mu.Unlock()
	return n.memory.known
}

// keepKnown notes the state of a cluster that has a quorum now.
func (n *Node) keepKnown(w world, record []byte, revision int64) error {
	k := known{At: time.Now().UTC(), Revision: revision, Leader: w.View.Leader, Sync: w.View.Sync, Async: w.Settings.Async, Optime: w.View.Status.Optime}
	if len(record) > 0 {
		r, err := gate.ParseRecord(record)
		if err != nil {
			return err
		}
		k.Record = &r
	}
	if n.keeper != nil {
		p := n.keeper.watcher.Latest()
		k.Position = max(p.ReceivedLSN, p.WriteLSN)
	}
	n.memory.mu.Lock()
	defer n.memory.mu.Unlock()
	k.Position = max(k.Position, n.memory.known.Position) // it never goes back, and a PostgreSQL that starts does not say
	n.memory.known = k
	if old := n.memory.saved; k.At.Sub(old.At) < knownEvery && sameJSON(old.material(), k.material()) {
		return nil
	}
	if err := fsx.WriteJSON(n.paths.known(), k, 0o600); err != nil {
		return fmt.Errorf("note the cluster's state: %w", err)
	}
	n.memory.saved = k
	return nil
}

// material is what must be on disk at once when it changes.
func (k known) material() known {
	k.At, k.Revision, k.Optime, k.Position = time.Time{}, 0, 0, 0
	if k.Record != nil {
		r := *k.Record
		r.Seq, r.PromiseMS = 0, 0
		k.Record = &r
	}
	return k
}

// holding says whether a node has every commit that was acknowledged, as far as
// it can know.
type holding struct {
	Complete bool   `json:"complete"`
	Text     string `json:"text"`
	Lacks    uint64 `json:"lacks_bytes,omitempty"` // at least so much, when incomplete
}

// decideHolding judges what the node self has, by the state that it last knew.
// Nobody can know what happened after that without it: a node that was cut off
// first, and then lost the others, takes the state before the cut for the last.
func decideHolding(self string, k known) holding {
	at := k.At.Local().Format(time.DateTime)
	if k.At.IsZero() {
		at = "an unknown time"
	}
	r := k.Record
	switch {
	case r == nil:
		return holding{Text: "this node does not know who was the primary, so it may lack acknowledged commits"}
	case r.Last == self, r.Owner == self:
		return holding{Complete: true, Text: fmt.Sprintf("this node was the primary at %s, when it last saw the cluster whole: it has every commit that was acknowledged until then", at)}
	}
	primary := r.Last
	if primary == "" {
		primary = r.Owner
	}
	if !k.Async && k.Sync.Leader == primary && slices.Contains(k.Sync.Standbys, self) && k.Sync.Quorum == 0 {
		return holding{Complete: true, Text: fmt.Sprintf("this node was the synchronous standby of %s at %s, when it last saw the cluster whole: it has every commit that was acknowledged until then", primary, at)}
	}
	h := holding{}
	why := "was no synchronous standby"
	if k.Async {
		why = "was an asynchronous replica"
	}
	h.Text = fmt.Sprintf("this node %s of %s at %s, when it last saw the cluster whole: it may lack commits that %s has acknowledged", why, primary, at, primary)
	if k.Position > 0 && k.Optime > k.Position {
		h.Lacks = k.Optime - k.Position
		h.Text += fmt.Sprintf(", at least %s of them, and all that it wrote later", FormatBytes(h.Lacks))
	} else {
		h.Text += " since"
	}
	return h
}

// adviceFor says, on a node without a quorum, what it waits for, who may have
// newer data, and what to do. answering are the other members that answer.
func adviceFor(self string, role cluster.NodeRole, members []cluster.Member, answering []string, k known) []string {
	var missing, data []string
	for _, m := range members {
		if m.Name == self || slices.Contains(answering, m.Name) {
			continue
		}
		missing = append(missing, m.Name)
		if m.Role == cluster.RoleData {
			data = append(data, m.Name)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	out := []string{"start " + strings.Join(missing, " or ") + ": nobody can write before a majority of the voters is up"}
	if role != cluster.RoleData {
		if len(data) > 0 {
			out = append(out, fmt.Sprintf("this witness has no data; if the others are lost for good, the cluster is recovered on a data node (pgha recover quorum there): here it is not possible; that needs one of %s", strings.Join(data, ", ")))
		}
		return out
	}
	h := decideHolding(self, k)
	newer := "; what others have acknowledged after that without this node would be on their disks alone"
	out = append(out, h.Text+newer)
	if len(missing) == len(members)-1 {
		out = append(out, fmt.Sprintf("only if %s are lost for good (destroyed, or powered off and never to return as they are): pgha recover quorum", strings.Join(missing, " and ")))
	}
	return out
}

// hasMajority says whether most of etcd's voters answer, and one of them leads.
func hasMajority(o observation) bool {
	voters, answering := countVoters(o.members)
	return o.quorum && answering > voters/2
}

// advice is adviceFor on this node, with the members that answer it.
func (n *Node) advice(members []cluster.Member, reports map[string]Report) []string {
	var answering []string
	for name := range reports {
		answering = append(answering, name)
	}
	return adviceFor(n.cfg.Name, n.cfg.Role, members, answering, n.lastKnown())
}

// tellWaiting says, while etcd waits for a quorum, what it waits for.
func (n *Node) tellWaiting() {
	if text := n.advice(n.snapshot().Members, n.seen.lately()); len(text) > 0 {
		n.problem("quorum", errors.New(strings.Join(text, "; ")))
	}
}
