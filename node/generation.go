package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/netip"
	"path/filepath"
	"slices"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sync/errgroup"

	"pgha/cluster"
	"pgha/internal/fsx"
)

// A cluster has a generation, which counts how often it was begun anew from one
// of its nodes after the others were lost, or from a snapshot. Nodes of an older
// generation can still have a quorum among themselves. They must not serve
// anybody once they hear that they were replaced (docs/adr/0016-generations.md).

const (
	// meetEvery is the pause between two meetings with the same node.
	meetEvery = 3 * time.Second
	// formerEvery is the same with a node that was lost: it may never come back.
	formerEvery = 9 * time.Second

	keyGeneration = "generation"
	pathMeet      = "/v1/meet"
)

// Generation is what a cluster has been since it was last begun anew.
type Generation struct {
	Number uint64    `json:"number"`       // 1 since init; 0 = not known
	ID     string    `json:"id,omitempty"` // random: two nodes may begin anew without knowing of each other
	At     time.Time `json:"at,omitzero"`
	By     string    `json:"by,omitempty"` // the node that it was begun on
	// Former are the members of the generations before, as they were. They are told.
	Former []cluster.Member `json:"former,omitempty"`
}

// replaces says whether g stands in the place of old. Of two that were begun
// without knowing of each other the later one does; any order would do, as long
// as all nodes see the same.
func (g Generation) replaces(old Generation) bool {
	switch {
	case old.Number == 0 || g.Number == 0:
		return false // who does not know yet to which one it belongs cannot tell
	case g.Number != old.Number:
		return g.Number > old.Number
	case g.ID == old.ID:
		return false
	case !g.At.Equal(old.At):
		return g.At.After(old.At)
	}
	return g.ID > old.ID
}

// Reasons for which a node may not serve.
const (
	barReplaced = "replaced" // another generation stands in the place of this node's
	barOlder    = "older"    // this disk is older than what others have seen of it
)

// barred says why a node must do nothing any more. It outlives a restart.
type barred struct {
	Kind string    `json:"kind"`
	At   time.Time `json:"at"`
	Text string    `json:"text"`
	ToDo []string  `json:"to_do"`
}

// generationFile is what a node keeps of this on disk.
type generationFile struct {
	// Own is with Former: a recovery begins where no quorum can be asked for it.
	Own    Generation `json:"own"`
	Barred *barred    `json:"barred,omitempty"`
}

// lineage is what a node knows of its place in the cluster's history.
type lineage struct {
	mu     sync.Mutex
	own    Generation
	barred *barred
	marks  marks
	acks   map[string]string // by name: the run of this node that it has spoken of, and that is known here
	bar    chan struct{}     // closed when barred
	jobs   chan etcdJob
}

func (p Paths) generation() string { return filepath.Join(p.Lib, "generation.json") }

// loadLineage reads what this node knows from before.
func (n *Node) loadLineage() error {
	var f generationFile
	if err := fsx.ReadJSON(n.paths.generation(), &f); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read generation: %w", err)
	}
	l := &n.lineage
	l.own, l.barred = f.Own, f.Barred
	l.acks = map[string]string{}
	l.bar, l.jobs = make(chan struct{}), make(chan etcdJob)
	if l.barred != nil {
		close(l.bar)
	}
	return l.marks.load(n.paths.marks(), n.state.TokenID)
}

// isBarred returns why this node may not serve, or nil.
func (n *Node) isBarred() *barred {
	n.lineage.mu.Lock()
	defer n.lineage.mu.Unlock()
	return n.lineage.barred
}

func (n *Node) generation() Generation {
	n.lineage.mu.Lock()
	defer n.lineage.mu.Unlock()
	return n.lineage.own
}

// setGeneration makes g this node's own, durably. A node that begins a new one is
// barred no more from its next start on.
func (n *Node) setGeneration(g Generation) error {
	l := &n.lineage
	l.mu.Lock()
	defer l.mu.Unlock()
	bar := l.barred
	if g.By == n.cfg.Name && g.Number > l.own.Number {
		bar = nil
	}
	if err := fsx.WriteJSON(n.paths.generation(), generationFile{Own: g, Barred: bar}, 0o600); err != nil {
		return fmt.Errorf("note generation: %w", err)
	}
	l.own = g
	return nil
}

// barNode takes this node out of service for good: its gate shuts at once, then
// etcd, PostgreSQL and HAProxy are stopped.
func (n *Node) barNode(b barred) {
	l := &n.lineage
	l.mu.Lock()
	if l.barred != nil {
		l.mu.Unlock()
		return
	}
	b.At = time.Now().UTC()
	l.barred = &b
	// The gate first; whether it can be noted comes after.
	if n.keeper != nil {
		n.keeper.gate.Ban(b.Text)
	}
	close(l.bar)
	err := fsx.WriteJSON(n.paths.generation(), generationFile{Own: l.own, Barred: &b}, 0o600)
	l.mu.Unlock()
	if b.Kind == barReplaced { // it is no member any more, and can be reset as any other that is none
		err = errors.Join(err, n.changeState(func(s *State) { s.Removed = &Removal{At: b.At.Truncate(time.Second), Why: b.Text} }))
	}
	n.log.Error("this node is out of service", "kind", b.Kind, "why", b.Text)
	n.problem("note that this node is out of service", err)
	go func() { _ = n.endService(context.Background()) }() // its troubles are problems
}

// endService stops what serves, and keeps it stopped. The reconciler starts
// nothing on a barred node.
func (n *Node) endService(ctx context.Context) error {
	b := n.isBarred()
	if b == nil {
		return nil
	}
	n.leaving.Store(true)
	n.setEtcdState("out of service")
	n.setWaiting("out of service: " + b.Text)
	n.problem("service", errors.New(b.Text))
	if n.keeper != nil {
		n.keeper.gate.Ban(b.Text)
	}
	ctx, cancel := context.WithTimeout(ctx, obeyTimeout)
	defer cancel()
	n.partProblem(ctx, "end of service", n.stopServing(ctx))
	return nil
}

// barredStatus is the status of a node that is out of service.
func (n *Node) barredStatus(b barred) Status {
	return Status{
		Cluster: n.state.ClusterName, ClusterID: n.state.ClusterID, SeenBy: n.cfg.Name, At: time.Now(), Health: Unknown,
		Members: []MemberStatus{}, Verdict: b.Text, ToDo: b.ToDo, Problems: []string{b.Text},
	}
}

// replacedBy is what a node says that belongs to a generation of the past.
func replacedBy(clusterName string, own, by Generation) barred {
	return barred{
		Kind: barReplaced,
		Text: fmt.Sprintf("this node belongs to generation %d of cluster %s, which %s has replaced by generation %d at %s",
			own.Number, clusterName, by.By, by.Number, by.At.UTC().Format("2006-01-02 15:04:05Z")),
		ToDo: []string{"pgha reset here (its data is moved aside, not deleted), then join again with a token of " + by.By + " (pgha token create)"},
	}
}

// olderThan is what a node says whose disk was put back.
func olderThan(name, witness string, seen, has mark) barred {
	return barred{
		Kind: barOlder,
		Text: fmt.Sprintf("this node's disk is older than what %s has seen of it (start %d beat %d there, start %d beat %d here): it was put back from a snapshot or a copy, and must not vote or serve as what it was then",
			witness, seen.Start, seen.Beat, has.Start, has.Beat),
		ToDo: []string{
			fmt.Sprintf("if the others have a quorum: pgha reset --force here, pgha member replace %s on another node, then pgha join here with the token that it prints; the data is copied anew", name),
			"if no other node can go on: pgha recover quorum on the data node that was never put back, or least far",
		},
	}
}

// meeting is what two nodes tell each other.
type meeting struct {
	Generation Generation `json:"generation"`
	Mark       mark       `json:"mark"`          // of the one who speaks
	Seen       mark       `json:"seen"`          // the newest that it has had from the one spoken to
	Ack        string     `json:"ack,omitempty"` // the run that the one spoken to had seen of the one who speaks, and that this one knows
}

func (n *Node) tell(name string) meeting {
	l := &n.lineage
	l.mu.Lock()
	defer l.mu.Unlock()
	g := l.own
	g.Former = nil
	return meeting{Generation: g, Mark: l.marks.now(), Seen: l.marks.seenOf(name), Ack: l.acks[name]}
}

// met takes what another node says, which has proved to be the node name of this
// cluster.
func (n *Node) met(name string, m meeting) {
	l := &n.lineage
	l.mu.Lock()
	own, has := l.own, l.marks.now()
	lacks := l.marks.lacks(m.Seen)
	if !lacks {
		l.acks[name] = m.Seen.Run
	}
	l.marks.saw(name, m.Mark, m.Ack)
	l.mu.Unlock()
	switch {
	case m.Generation.replaces(own):
		n.barNode(replacedBy(n.state.ClusterName, own, m.Generation))
	case own.replaces(m.Generation):
		// It hears of it with the answer, or has spoken of the past.
	case lacks:
		n.barNode(olderThan(n.cfg.Name, name, m.Seen, has))
	}
}

// meetHandler serves a node that introduces itself. It may be on the roster no
// more: who was replaced has to hear of it.
func (n *Node) meetHandler(w http.ResponseWriter, r *http.Request) {
	var in meeting
	id, err := n.caller(r)
	if err == nil {
		err = decode(w, r, &in)
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	out := n.tell(id.Node) // before what it says of itself is noted
	if !named(n.snapshot().Members, id.Node) || n.ofThisLife(r, id.Node) != nil {
		// It is told what it is not any more. What it says must not stop this node,
		// and what this node knows of its successor is not for it.
		reply(w, meeting{Generation: out.Generation}, nil)
		return
	}
	n.met(id.Node, in)
	reply(w, out, nil)
}

// meet introduces this node to another one, and says whether that one answered.
func (n *Node) meet(ctx context.Context, m cluster.Member) bool {
	ctx, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	var out meeting
	err := n.seen.call(ctx, http.MethodPost, m.APIAddr(), pathMeet, n.tell(m.Name), &out)
	if err == nil {
		n.met(m.Name, out)
		return true
	}
	return answered(err) // an older pgha knows nothing of this
}

// errAnswered is in an error of a peer that is there and has no answer.
var errAnswered = errors.New("answered")

// answered says whether an error came from a pgha that is there.
func answered(err error) bool {
	var refusal *cluster.Error
	return errors.As(err, &refusal) || errors.Is(err, errAnswered)
}

// meetAll meets the nodes at the same time and says whether any of them answered.
func (n *Node) meetAll(ctx context.Context, whom []cluster.Member) bool {
	var all errgroup.Group
	got := make([]bool, len(whom))
	for i, m := range whom {
		all.Go(func() error {
			got[i] = n.meet(ctx, m)
			return nil
		})
	}
	_ = all.Wait() // nothing fails
	return slices.Contains(got, true)
}

// others are the members of the roster but this node.
func (n *Node) others() []cluster.Member {
	return slices.DeleteFunc(slices.Clone(n.snapshot().Members), func(m cluster.Member) bool { return m.Name == n.cfg.Name })
}

// former are the members of past generations that have not joined again.
func (n *Node) former() []cluster.Member {
	roster := n.snapshot().Members
	return slices.DeleteFunc(slices.Clone(n.generation().Former), func(f cluster.Member) bool {
		return slices.ContainsFunc(roster, func(m cluster.Member) bool { return m.Name == f.Name || m.Addr == f.Addr })
	})
}

// formerAddrs may reach the API, to hear what they are not any more.
func (n *Node) formerAddrs() []netip.Addr {
	var out []netip.Addr
	for _, m := range n.former() {
		out = append(out, m.Addr)
	}
	return out
}

// mayStartEtcd meets the other members before this node takes part in anything,
// and returns false when it must not. Who is alone cannot do harm: without an
// answer of anybody it goes on after a moment, and hears later.
func (n *Node) mayStartEtcd(ctx context.Context) bool {
	for range 2 {
		others := n.others()
		if len(others) == 0 || ctx.Err() != nil || n.meetAll(ctx, others) {
			break
		}
	}
	if n.isBarred() != nil {
		return false
	}
	l := &n.lineage
	l.mu.Lock()
	defer l.mu.Unlock()
	n.problem("start mark", l.marks.begin(n.paths.marks()))
	return true
}

// meetLoop keeps the nodes acquainted until ctx ends or this node is barred.
func (n *Node) meetLoop(ctx context.Context) error {
	t := time.NewTicker(meetEvery)
	defer t.Stop()
	lastFormer := time.Time{}
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-n.lineage.bar:
			<-ctx.Done()
			return nil
		case <-t.C:
		}
		l := &n.lineage
		l.mu.Lock()
		err := l.marks.beat(n.paths.marks())
		l.mu.Unlock()
		n.partProblem(ctx, "start mark", err)
		whom := n.others()
		if time.Since(lastFormer) >= formerEvery {
			lastFormer = time.Now()
			whom = append(whom, n.former()...)
		}
		n.meetAll(ctx, whom)
	}
}

// follow takes over the generation that this node's etcd says it belongs to, and
// keeps in mind what the cluster looked like. Its reads need a quorum: what a
// member that lags behind has of it may be of the past.
func (n *Node) follow(ctx context.Context, w world) error {
	c, err := n.etcdClient()
	store := n.store.Load()
	if err != nil || store == nil || !w.Viewed {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	r, err := c.Txn(ctx).Then(clientv3.OpGet(store.Prefix()+keyGeneration), clientv3.OpGet(gateStore{n}.key())).Commit()
	if err != nil {
		return nil // without a quorum there is nothing to follow
	}
	g := Generation{Number: 1}
	if kvs := r.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		if err := json.Unmarshal(kvs[0].Value, &g); err != nil {
			return fmt.Errorf("decode generation: %w", err)
		}
	}
	own := n.generation()
	if own.Number == 0 || g.replaces(own) || (g.ID == own.ID && !sameJSON(g.Former, own.Former)) {
		if err := n.setGeneration(g); err != nil {
			return err
		}
	}
	var record []byte
	if kvs := r.Responses[1].GetResponseRange().Kvs; len(kvs) > 0 {
		record = kvs[0].Value
	}
	return n.keepKnown(w, record, r.Header.Revision)
}
