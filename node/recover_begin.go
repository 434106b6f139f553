package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/gate"
	"pgha/patroni"
)

const (
	// beginTimeout bounds the start of the new etcd, which is alone.
	beginTimeout = 2 * time.Minute
	// primaryTimeout is for how long a recovery waits for the primary.
	primaryTimeout = 5 * time.Minute
)

// recoverQuorum begins the cluster anew from this node's own etcd.
func (n *Node) recoverQuorum(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req RecoverRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	if req.File != "" || req.Older {
		return nil, refused(cluster.CodeBadRequest, "recover quorum takes no snapshot: pgha snapshot restore FILE")
	}
	return n.beginAnew(ctx, o, req)
}

// restoreSnapshot begins the cluster anew from a snapshot.
func (n *Node) restoreSnapshot(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req RecoverRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	if req.File == "" {
		return nil, refused(cluster.CodeBadRequest, "name the snapshot to restore: pgha snapshot list shows those there are")
	}
	return n.beginAnew(ctx, o, req)
}

// beginAnew makes this node the only one of a new generation.
func (n *Node) beginAnew(ctx context.Context, o *Operation, req RecoverRequest) (RecoverResult, error) {
	var r RecoverResult
	o.Say("looking whether any other member answers")
	p, b, err := n.planRecovery(ctx, req)
	if err != nil {
		return r, err
	}
	if p.Refusal != "" {
		return r, refused(cluster.CodeConflict, "%s", p.Refusal)
	}
	o.Say("%s", p.Holds)
	barred := n.isBarred() != nil
	if req.File == "" && !barred {
		n.awaitEtcd(ctx) // right after a start it is not there yet
	}
	if n.etcd.Load() != nil {
		if r.Snapshot, err = n.saveSnapshot(ctx, reasonBefore+"-"+o.kind); err != nil {
			return r, fmt.Errorf("save the present state first: %w", err)
		}
		o.Say("the present state is saved in %s", r.Snapshot)
	}
	source := r.Snapshot
	if req.File != "" {
		source = req.File
	}
	raw := make([]byte, 8)
	if _, err := rand.Read(raw); err != nil {
		return r, fmt.Errorf("make generation: %w", err)
	}
	old := n.generation()
	held, err := n.generationIn(b.keys)
	if err != nil { // a snapshot may be restored just for that
		n.log.Warn("cannot read which members this node's etcd knows to be lost", "err", err)
	}
	// lostMembers adds those of the keyspace that it begins with.
	g := Generation{Number: p.Generation, ID: hex.EncodeToString(raw), At: time.Now().UTC().Truncate(time.Second), By: n.cfg.Name,
		Former: mergeFormer(n.cfg.Name, old.Former, held.Former)}
	r.Generation, r.Lost, r.OldEtcd = g.Number, p.Lost, fmt.Sprintf("%s-generation%d-%s", n.paths.etcd(), max(old.Number, 1), g.At.Format("20060102T150405"))
	o.Leaves("nothing has changed but that a snapshot was saved: run the command again")
	// From here on it goes to its end, whoever hangs up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), beginTimeout+primaryTimeout)
	defer cancel()
	o.Say("stopping this node's etcd")
	if err := n.withoutEtcd(ctx, func(ctx context.Context) error { return n.replaceEtcd(ctx, o, source, g, b, r.OldEtcd) }); err != nil {
		return r, err
	}
	o.Leaves("generation %d has begun on this node; pgha status says how far it has come", g.Number)
	n.event(EventRecovery, n.cfg.Name, o.Actor(), "generation %d was begun on %s without %s. %s", g.Number, n.cfg.Name, strings.Join(p.Lost, ", "), p.Holds)
	o.Say("generation %d has begun; the old etcd directory is %s", g.Number, r.OldEtcd)
	if barred { // what it has stopped stays so in this daemon
		o.Say("restart pgha on this node now: systemctl restart pgha")
		return r, nil
	}
	if r.Leader = n.awaitPrimary(ctx, o); r.Leader == "" {
		return r, refused(cluster.CodeUnavailable, "there is no primary after %s", primaryTimeout)
	}
	return r, nil
}

// generationIn is the generation that a keyspace says it is of, or none.
func (n *Node) generationIn(keys map[string][]byte) (Generation, error) {
	var g Generation
	value, ok := keys[cluster.Root+n.state.ClusterID+"/"+keyGeneration]
	if !ok {
		return g, nil
	}
	if err := json.Unmarshal(value, &g); err != nil {
		return g, fmt.Errorf("decode generation: %w", err)
	}
	return g, nil
}

// mergeFormer is all members of the lists but self. Of one that is in several of
// them the last list says what it was.
func mergeFormer(self string, lists ...[]cluster.Member) []cluster.Member {
	var out []cluster.Member
	for _, m := range slices.Concat(lists...) {
		if m.Name == self {
			continue
		}
		out = slices.DeleteFunc(out, func(f cluster.Member) bool { return f.Name == m.Name })
		out = append(out, m)
	}
	return out
}

// awaitEtcd waits a moment for this node's etcd member to run.
func (n *Node) awaitEtcd(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for n.etcd.Load() == nil && sleep(ctx, 100*time.Millisecond) {
	}
}

// awaitPrimary waits until this node's PostgreSQL takes writes, by the way that
// every promotion goes.
func (n *Node) awaitPrimary(ctx context.Context, o *Operation) string {
	ctx, cancel := context.WithTimeout(ctx, primaryTimeout)
	defer cancel()
	o.Say("waiting until PostgreSQL here is the primary")
	for {
		if s := n.keeper.gate.Status(); s.Self && s.State == gate.Open && n.store.Load() != nil {
			o.Say("%s is the primary", n.cfg.Name)
			return n.cfg.Name
		}
		if !sleep(ctx, 100*time.Millisecond) {
			return ""
		}
	}
}

// etcdJob is done while no etcd member runs in this daemon.
type etcdJob struct {
	run  func(context.Context) error
	done chan error
}

// errEtcdJob ends the supervision of etcd for a job.
type errEtcdJob struct{ etcdJob }

func (errEtcdJob) Error() string { return "etcd is stopped for a recovery" }

// withoutEtcd stops the etcd member, runs f, and has it started again.
func (n *Node) withoutEtcd(ctx context.Context, f func(context.Context) error) error {
	job := etcdJob{run: f, done: make(chan error, 1)}
	wait, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	select {
	case n.lineage.jobs <- job:
	case <-wait.Done():
		return fmt.Errorf("stop etcd: %w", wait.Err())
	}
	return <-job.done
}

// etcdPause waits before etcd is started again; a job is done meanwhile. It says
// whether to go on.
func (n *Node) etcdPause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case job := <-n.lineage.jobs:
		job.done <- job.run(ctx)
	case <-n.lineage.bar:
	case <-t.C:
	}
	return ctx.Err() == nil
}

// jobsOnly does jobs until ctx ends, on a node whose etcd must not run.
func (n *Node) jobsOnly(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case job := <-n.lineage.jobs:
			job.done <- job.run(ctx)
		}
	}
}

// replaceEtcd puts a new etcd with the source's keyspace in the place of this
// node's. The new one is made and put right beside the old one, so that until the
// exchange nothing has changed.
func (n *Node) replaceEtcd(ctx context.Context, o *Operation, source string, g Generation, b basis, aside string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, beginTimeout)
	defer cancel()
	fresh, db := n.paths.etcd()+".new", filepath.Join(n.paths.Lib, "recover.db")
	cfg := n.etcdConfig(make(chan error, 1))
	old := cfg
	cfg.DataDir = fresh
	if embedded.HoldsMember(cfg) {
		// An attempt was cut off, maybe right after the exchange: then this is the
		// old etcd, and nothing else has what it holds.
		o.Say("an attempt was cut off; what it left is kept as %s", aside+"-before")
		if err := os.Rename(fresh, aside+"-before"); err != nil {
			return fmt.Errorf("keep what an attempt left: %w", err)
		}
	}
	for _, left := range []string{fresh, db} { // of an attempt that was cut off
		if err := os.RemoveAll(left); err != nil {
			return fmt.Errorf("clean up: %w", err)
		}
	}
	unpacked := db
	defer func() { err = errors.Join(err, os.RemoveAll(unpacked)) }()
	var info SnapshotInfo
	if source == "" { // no member has run that could have saved it
		source, db = old.Database(), old.Database()
	} else if err := embedded.UnpackSnapshot(source, db, &info); err != nil {
		return err
	}
	// Nobody may see it before it is right: Patroni waits on the client's port.
	segment := int64(16 << 20)
	cfg.ClientURL, cfg.WALSegmentBytes, cfg.Bootstrap = "", segment, false
	cfg.FatalFile = filepath.Join(fresh, "fatal.json")
	o.Say("making a new etcd of one member from %s", source)
	if g, err = n.prepareEtcd(ctx, db, cfg, o, g, b); err != nil {
		return errors.Join(fmt.Errorf("prepare the new etcd: %w", err), os.RemoveAll(fresh))
	}
	o.Leaves("generation %d may have begun on this node: restart pgha here and see what pgha status says before anything is repeated. The old etcd is kept as %s or %s",
		g.Number, aside, fresh)
	if err := embedded.Exchange(fresh, n.paths.etcd(), aside); err != nil {
		return err
	}
	// A record of the old member's end says nothing of the new one.
	if err := os.Remove(n.paths.etcdFatal()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("cannot remove the record of etcd's last failure", "err", err)
	}
	if err := n.setGeneration(g); err != nil {
		return err
	}
	w := n.snapshot()
	w.Members = slices.DeleteFunc(slices.Clone(w.Members), func(m cluster.Member) bool { return m.Name != n.cfg.Name })
	n.remember(w)
	return n.saveCache(w)
}

// prepareEtcd makes the member of cfg from the database db, and puts its keyspace
// right. It returns the generation as it is written there.
func (n *Node) prepareEtcd(ctx context.Context, db string, cfg embedded.Config, o *Operation, g Generation, b basis) (Generation, error) {
	if err := embedded.Restore(db, cfg); err != nil {
		return g, err
	}
	srv, err := embedded.Start(ctx, cfg)
	if err != nil {
		return g, err
	}
	defer srv.Stop()
	if err := srv.WaitReady(ctx); err != nil {
		return g, err
	}
	lost, err := n.lostMembers(ctx, srv.Client(), &g, b)
	if err != nil {
		return g, err
	}
	return g, n.amend(ctx, srv.Client(), o, g, b, lost)
}

// lostMembers are those that are lost with this recovery: of the keyspace's
// roster and of those that the node knows. They and whom the keyspace knows from
// earlier recoveries are added to the former members of g.
func (n *Node) lostMembers(ctx context.Context, c *clientv3.Client, g *Generation, b basis) ([]cluster.Member, error) {
	store := cluster.NewStore(c, n.state.ClusterID)
	roster, _, err := store.Members(ctx)
	if err != nil {
		return nil, err
	}
	key := store.Prefix() + keyGeneration
	r, err := c.Get(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("read generation: %w", err)
	}
	keys := map[string][]byte{}
	for _, kv := range r.Kvs {
		keys[key] = kv.Value
	}
	past, err := n.generationIn(keys)
	if err != nil {
		return nil, err
	}
	lost := mergeFormer(n.cfg.Name, roster, b.roster, n.others())
	g.Former = mergeFormer(n.cfg.Name, past.Former, g.Former, lost)
	return lost, nil
}

// amend takes out of a keyspace what must not come back from the past, and
// writes what the new generation begins with.
func (n *Node) amend(ctx context.Context, c *clientv3.Client, o *Operation, g Generation, b basis, lost []cluster.Member) error {
	store := cluster.NewStore(c, n.state.ClusterID)
	id, err := store.Identity(ctx)
	if err != nil {
		return err
	}
	if id.ID != n.state.ClusterID {
		return fmt.Errorf("%w: it holds cluster %s", cluster.ErrOtherCluster, id.ID)
	}
	p := patroni.Prefix(n.cfg.Cluster)
	members := store.Prefix() + "members/"
	drop := []clientv3.Op{
		// Who leads is decided anew. With the sync key gone Patroni lets this node
		// alone be promoted, which is what was decided on.
		clientv3.OpDelete(p + patroni.KeyLeader), clientv3.OpDelete(p+patroni.KeyMembers, clientv3.WithPrefix()),
		clientv3.OpDelete(p + patroni.KeyFailover), clientv3.OpDelete(p + patroni.KeySync), clientv3.OpDelete(p + patroni.KeyStatus),
		clientv3.OpDelete(p+"optime/", clientv3.WithPrefix()),
		clientv3.OpDelete(store.Prefix()+"tokens/", clientv3.WithPrefix()),
		clientv3.OpDelete(n.operationKey()),
		// The whole roster but this node, whatever was known of it here.
		clientv3.OpDelete(members, clientv3.WithRange(members+n.cfg.Name)),
		clientv3.OpDelete(members+n.cfg.Name+"\x00", clientv3.WithRange(clientv3.GetPrefixRangeEnd(members))),
	}
	if _, err := c.Txn(ctx).Then(drop...).Commit(); err != nil {
		return fmt.Errorf("drop what is of the past: %w", err)
	}
	generation, err := json.Marshal(g)
	if err != nil {
		return fmt.Errorf("encode generation: %w", err)
	}
	put := []clientv3.Op{clientv3.OpPut(store.Prefix()+keyGeneration, string(generation))}
	if r, ok := n.nextRecord(b); ok {
		o.Say("the gate's record begins at epoch %d", r.Epoch)
		put = append(put, clientv3.OpPut(gateStore{n}.key(), r.Encode()))
	}
	put = append(put, n.keptSecrets(store.Prefix(), b)...)
	if _, err := c.Txn(ctx).Then(put...).Commit(); err != nil {
		return fmt.Errorf("write the new generation: %w", err)
	}
	err = store.UpdateMember(ctx, n.cfg.Name, func(m *cluster.Member) error {
		m.State, m.Maintenance = cluster.StateMember, nil // it is the only one left
		return nil
	})
	if err != nil {
		return err
	}
	recorded, err := store.Former(ctx)
	if err != nil {
		return err
	}
	for _, m := range g.Former {
		if !named(lost, m.Name) && slices.ContainsFunc(recorded, func(f cluster.FormerMember) bool { return f.Name == m.Name }) {
			continue // it was lost earlier, as is written there
		}
		f := cluster.FormerMember{Name: m.Name, Addr: m.Addr, Role: m.Role, MemberID: b.ids[m.PeerURL()], RemovedAt: g.At, By: o.Actor(),
			Why: fmt.Sprintf("lost when generation %d was begun on %s", g.Number, g.By)}
		if err := store.PutFormer(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

// nextRecord is the gate's record for the new generation: the newest that is
// known anywhere, an epoch on. It presumes nothing of its owner's gate: whoever
// comes next waits until every promise in it is over, as for any other.
func (n *Node) nextRecord(b basis) (gate.Record, bool) {
	var newest *gate.Record
	consider := func(r *gate.Record) {
		if r != nil && (newest == nil || r.Epoch > newest.Epoch || r.Epoch == newest.Epoch && r.Seq > newest.Seq) {
			newest = r
		}
	}
	for _, keys := range []map[string][]byte{b.keys, b.snapshot} {
		if r, err := gate.ParseRecord(keys[gateStore{n}.key()]); err == nil {
			consider(&r)
		}
	}
	consider(n.lastKnown().Record)
	if newest == nil {
		return gate.Record{}, false
	}
	r := *newest
	if n.keeper != nil {
		r.Epoch = max(r.Epoch, n.keeper.gate.Status().Epoch)
	}
	r.Epoch, r.Seq, r.State = r.Epoch+1, r.Seq+1, gate.Promoting
	return r, true
}

// keptSecrets are what a snapshot must not bring back: passwords and CAs that
// have been replaced since it was taken.
func (n *Node) keptSecrets(prefix string, b basis) []clientv3.Op {
	if b.snapshot == nil {
		return nil
	}
	var out []clientv3.Op
	if b.keys != nil {
		for _, key := range []string{"secrets", "ca-key", "ca"} {
			if value, ok := b.keys[prefix+key]; ok {
				out = append(out, clientv3.OpPut(prefix+key, string(value)))
			}
		}
		return out
	}
	for key, path := range map[string]string{"secrets": n.paths.secrets(), "ca-key": n.paths.sealedCAKey()} {
		if value, err := os.ReadFile(path); err == nil {
			out = append(out, clientv3.OpPut(prefix+key, string(value)))
		}
	}
	return out
}
