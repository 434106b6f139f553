package node

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/gate"
	"pgha/patroni"
)

const (
	// probeTimeout bounds the look whether a port of another member answers.
	probeTimeout = 1500 * time.Millisecond
	// beginTimeout bounds the start of the new etcd, which is alone.
	beginTimeout = 2 * time.Minute
	// primaryTimeout is for how long a recovery waits for the primary.
	primaryTimeout = 5 * time.Minute
)

// RecoverRequest asks to begin the cluster anew from this node.
type RecoverRequest struct {
	// File is the snapshot to restore; "" = what this node's etcd holds.
	File string `json:"file,omitempty"`
	// AllowDataLoss goes on where acknowledged commits may be missing here.
	AllowDataLoss bool `json:"allow_data_loss,omitempty"`
	// Older restores a snapshot although a newer one is at hand.
	Older bool `json:"older,omitempty"`
}

// RecoverPlan says what would be done, or why not.
type RecoverPlan struct {
	Refusal    string        `json:"refusal,omitempty"`
	Node       string        `json:"node"`
	Cluster    string        `json:"cluster"`
	Generation uint64        `json:"generation"` // that would begin
	Lost       []string      `json:"lost"`       // members that would be declared lost
	Complete   bool          `json:"complete"`   // this node has every acknowledged commit, as far as it can know
	Holds      string        `json:"holds"`      // the same in words
	Snapshot   *SnapshotInfo `json:"snapshot,omitempty"`
	Warnings   []string      `json:"warnings,omitempty"`
}

// RecoverResult is what a recovery has done.
type RecoverResult struct {
	Generation uint64   `json:"generation"`
	Lost       []string `json:"lost"`
	Snapshot   string   `json:"snapshot,omitempty"` // of the state before
	OldEtcd    string   `json:"old_etcd"`           // where its directory is now
	Leader     string   `json:"leader,omitempty"`   // "" = not within the time
}

// recoverObservation is all that decideRecover looks at.
type recoverObservation struct {
	self, clusterID string
	witness         bool
	dataNodes       []string // of the roster
	outOfService    string   // why, or ""
	quorum          bool
	answering       []string // other members whose ports answer, with the port
	etcd            string   // why this node's own etcd cannot be read, or ""
	database        string   // why there is no PostgreSQL here to go on with, or ""
	holds           holding
	restore         *SnapshotInfo // nil: recover from this node's own etcd
	inSnapshot      bool          // this node is on the snapshot's roster
	newer           *SnapshotInfo // the newest at hand, if newer than that
	req             RecoverRequest
}

// decideRecover says why the cluster must not be begun anew from this node, or
// "". It never guesses that a member is lost because it is silent: the operator
// says so.
func decideRecover(o recoverObservation) string {
	r := o.restore
	switch {
	case o.witness:
		return fmt.Sprintf("this is a witness: it has no data and cannot open the cluster's secrets, so there is nothing to begin from. Run it on a data node (%s). If no data node is left, make a new cluster and restore the database from a backup",
			strings.Join(o.dataNodes, ", "))
	case o.outOfService != "":
		return o.outOfService
	case r != nil && r.ClusterID != o.clusterID:
		return fmt.Sprintf("the snapshot is of cluster %s (%s), this node belongs to cluster %s", r.Cluster, r.ClusterID, o.clusterID)
	case r != nil && !o.inSnapshot:
		return fmt.Sprintf("%s is not on the roster of the snapshot: restore a later one, or run it on a node that is", o.self)
	case r == nil && o.quorum:
		return "the cluster has a quorum: there is nothing to recover (pgha status)"
	case len(o.answering) > 0:
		return fmt.Sprintf("%s: the members that are left must be used, or be powered off, before this one begins without them", strings.Join(o.answering, "; "))
	case r == nil && o.etcd != "":
		return fmt.Sprintf("this node's etcd cannot be read (%s): restore a snapshot (pgha snapshot list, pgha snapshot restore FILE)", o.etcd)
	case o.database != "":
		return o.database
	case r != nil && o.newer != nil && !o.req.Older:
		return fmt.Sprintf("there is a newer snapshot, %s of %s: restore that, or add --older", o.newer.File, o.newer.At.Local().Format(time.DateTime))
	case !o.holds.Complete && !o.req.AllowDataLoss:
		return o.holds.Text + ". To go on all the same, and lose them: --allow-data-loss"
	}
	return ""
}

// planHandler says what a recovery would do.
func (n *Node) planHandler(w http.ResponseWriter, r *http.Request) {
	var req RecoverRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	p, _, err := n.planRecovery(r.Context(), req)
	reply(w, p, err)
}

// PlanRecovery asks the daemon what a recovery would do.
func (l *Local) PlanRecovery(ctx context.Context, req RecoverRequest) (RecoverPlan, error) {
	var p RecoverPlan
	return p, l.call(ctx, http.MethodPost, "/v1/recovery", req, &p)
}

// basis is what a recovery begins from.
type basis struct {
	keys     map[string][]byte // of this node's etcd; nil = cannot be read
	snapshot map[string][]byte // of the snapshot to restore
	known    known             // the newest that is known of the cluster
	roster   []cluster.Member  // the one that the new generation begins with
	ids      map[string]uint64 // etcd members, by peer URL
}

// planRecovery looks at everything and changes nothing.
func (n *Node) planRecovery(ctx context.Context, req RecoverRequest) (RecoverPlan, basis, error) {
	p := RecoverPlan{Node: n.cfg.Name, Cluster: n.state.ClusterName, Lost: []string{}}
	o := recoverObservation{
		self: n.cfg.Name, clusterID: n.state.ClusterID, witness: n.cfg.Role != cluster.RoleData, dataNodes: n.dataNodes(), req: req,
	}
	if b := n.isBarred(); b != nil {
		o.outOfService = b.Text + ": " + strings.Join(b.ToDo, "; ")
	}
	if r := n.removal.Load(); r != nil {
		o.outOfService = r.RemovalText(n.state.ClusterName) + ": " + RemovalToDo
	}
	b := basis{roster: n.snapshot().Members, known: n.lastKnown(), ids: map[string]uint64{}}
	o.quorum = n.hasQuorum(ctx)
	keys, err := n.currentKeys(ctx)
	if err != nil {
		o.etcd = err.Error()
	} else {
		b.keys = keys
		b.known = n.knownFrom(keys, b.known)
	}
	if srv := n.etcd.Load(); srv != nil {
		if st, err := srv.Status(ctx); err == nil {
			for _, m := range st.Members {
				b.ids[m.PeerURL] = m.ID
			}
		}
	}
	if req.File != "" {
		if err := n.planRestore(req.File, &o, &b); err != nil {
			return p, b, err
		}
		p.Snapshot = o.restore
	}
	o.holds = decideHolding(n.cfg.Name, b.known)
	if b.keys == nil && b.known.Record == nil {
		o.holds = holding{Text: "nothing is known of this cluster but what the snapshot says, so nobody can say whether this node has every acknowledged commit"}
	}
	o.database = n.noDatabase()
	others := slices.DeleteFunc(slices.Clone(b.roster), func(m cluster.Member) bool { return m.Name == n.cfg.Name })
	// Those that the node itself knows count too: a snapshot may be from before.
	for _, m := range n.others() {
		if !named(others, m.Name) {
			others = append(others, m)
		}
	}
	o.answering, p.Warnings = probeMembers(ctx, others)
	for _, m := range others {
		p.Lost = append(p.Lost, m.Name)
	}
	p.Generation, p.Complete, p.Holds = n.nextGeneration(o.restore), o.holds.Complete, o.holds.Text
	p.Refusal = decideRecover(o)
	return p, b, nil
}

// planRestore adds what the snapshot says.
func (n *Node) planRestore(file string, o *recoverObservation, b *basis) error {
	info, keys, err := n.openSnapshot(file)
	if err != nil {
		return &cluster.Error{Code: cluster.CodeBadRequest, Message: err.Error()}
	}
	o.restore, b.snapshot = &info, keys
	if info.ClusterID != n.state.ClusterID {
		return nil
	}
	b.roster = nil
	for key, value := range keys {
		if !strings.HasPrefix(key, cluster.Root+n.state.ClusterID+"/members/") {
			continue
		}
		var m cluster.Member
		if err := json.Unmarshal(value, &m); err != nil {
			return fmt.Errorf("read snapshot: decode %s: %w", key, err)
		}
		b.roster = append(b.roster, m)
	}
	o.inSnapshot = named(b.roster, n.cfg.Name)
	all, err := ListSnapshots(n.paths)
	if err != nil {
		return err
	}
	for _, s := range all {
		if s.Damaged == "" && s.ClusterID == info.ClusterID && s.At.After(info.At) && (o.newer == nil || s.At.After(o.newer.At)) {
			o.newer = &s
		}
	}
	return nil
}

func (n *Node) nextGeneration(s *SnapshotInfo) uint64 {
	last := max(n.generation().Number, 1)
	if s != nil {
		last = max(last, s.Generation)
	}
	return last + 1
}

// hasQuorum says whether etcd answers what only a majority can.
func (n *Node) hasQuorum(ctx context.Context) bool {
	store := n.store.Load()
	if store == nil {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	_, err := store.Identity(ctx)
	return err == nil
}

// currentKeys reads what this node's etcd holds, with or without a quorum.
func (n *Node) currentKeys(ctx context.Context) (map[string][]byte, error) {
	srv := n.etcd.Load()
	if srv == nil {
		keys, _, err := embedded.KeysOf(n.etcdConfig(nil))
		return keys, err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	r, err := srv.Client().Get(ctx, "\x00", clientv3.WithFromKey(), clientv3.WithSerializable())
	if err != nil {
		return nil, fmt.Errorf("read etcd: %w", err)
	}
	keys := make(map[string][]byte, len(r.Kvs))
	for _, kv := range r.Kvs {
		keys[string(kv.Key)] = kv.Value
	}
	return keys, nil
}

// knownFrom brings what was last known up to what the keys say.
func (n *Node) knownFrom(keys map[string][]byte, k known) known {
	var kvs []patroni.KV
	for key, value := range keys {
		kvs = append(kvs, patroni.KV{Key: key, Value: value})
	}
	v, _ := patroni.ParseView(n.cfg.Cluster, kvs) // what makes no sense is at its zero
	k.Leader, k.Sync, k.Optime = v.Leader, v.Sync, v.Status.Optime
	k.Async = !v.Synchronous()
	if r, err := gate.ParseRecord(keys[gateStore{n}.key()]); err == nil {
		k.Record = &r
	} else {
		k.Record = nil
	}
	if n.keeper != nil {
		p := n.keeper.watcher.Latest()
		k.Position = max(k.Position, p.ReceivedLSN, p.WriteLSN)
	}
	return k
}

// noDatabase says why there is nothing to go on with, or "".
func (n *Node) noDatabase() string {
	if n.cfg.Role != cluster.RoleData {
		return ""
	}
	info, err := patroni.InspectDataDir(n.cfg.Postgres.DataDir)
	switch {
	case err != nil:
		return "this node's database cannot be read: " + err.Error()
	case info.SystemID == "":
		return fmt.Sprintf("this node has no database in %s: it never had, or has lost, its copy of the data", n.cfg.Postgres.DataDir)
	}
	return ""
}

// probeMembers looks who answers. A host that refuses a connection is up, and is
// worth a warning: what runs on it without pgha nobody can say.
func probeMembers(ctx context.Context, members []cluster.Member) (answering, warnings []string) {
	type port struct {
		name string
		port uint16
	}
	var mu sync.Mutex
	var wg sync.WaitGroup
	for _, m := range members {
		ports := []port{{"pgha", m.Ports.API}, {"etcd", m.Ports.EtcdPeer}}
		if m.Role == cluster.RoleData {
			ports = append(ports, port{"Patroni", m.Ports.Patroni})
		}
		wg.Go(func() {
			refused := false
			for _, p := range ports {
				d := net.Dialer{Timeout: probeTimeout}
				c, err := d.DialContext(ctx, "tcp", hostPort(m.Addr, p.port))
				if err == nil {
					_ = c.Close() // it was a look
					mu.Lock()
					answering = append(answering, fmt.Sprintf("%s answers on %s (%s)", m.Name, hostPort(m.Addr, p.port), p.name))
					mu.Unlock()
					return
				}
				refused = refused || errors.Is(err, syscall.ECONNREFUSED)
			}
			if refused {
				mu.Lock()
				warnings = append(warnings, fmt.Sprintf("the host of %s (%s) is up, though nothing of pgha answers on it: if it is still that node, start pgha there instead", m.Name, m.Addr))
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	slices.Sort(answering)
	slices.Sort(warnings)
	return answering, warnings
}

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
	g := Generation{Number: p.Generation, ID: hex.EncodeToString(raw), At: time.Now().UTC().Truncate(time.Second), By: n.cfg.Name, Former: old.Former}
	for _, m := range append(slices.Clone(b.roster), n.others()...) {
		if m.Name != n.cfg.Name {
			g.Former = slices.DeleteFunc(slices.Clone(g.Former), func(f cluster.Member) bool { return f.Name == m.Name })
			g.Former = append(g.Former, m)
		}
	}
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
	r.Leader = n.awaitPrimary(ctx, o)
	return r, nil
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
			o.Say("PostgreSQL here is no primary yet: pgha status says why")
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

// replaceEtcd puts a new etcd with the source's keyspace in the place of this
// node's. The new one is made and put right beside the old one, so that until the
// exchange nothing has changed.
func (n *Node) replaceEtcd(ctx context.Context, o *Operation, source string, g Generation, b basis, aside string) (err error) {
	ctx, cancel := context.WithTimeout(ctx, beginTimeout)
	defer cancel()
	if source == "" {
		return errors.New("there is neither an etcd that runs here nor a snapshot to begin from")
	}
	fresh, db := n.paths.etcd()+".new", filepath.Join(n.paths.Lib, "recover.db")
	for _, left := range []string{fresh, db} { // of an attempt that was cut off
		if err := os.RemoveAll(left); err != nil {
			return fmt.Errorf("clean up: %w", err)
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(db)) }()
	var info SnapshotInfo
	if err := embedded.UnpackSnapshot(source, db, &info); err != nil {
		return err
	}
	cfg := n.etcdConfig(make(chan error, 1))
	// Nobody may see it before it is right: Patroni waits on the client's port.
	segment := int64(16 << 20)
	cfg.DataDir, cfg.ClientURL, cfg.WALSegmentBytes, cfg.Bootstrap = fresh, "", segment, false
	cfg.FatalFile = filepath.Join(fresh, "fatal.json")
	o.Say("making a new etcd of one member from %s", source)
	if err := embedded.Restore(db, cfg); err != nil {
		return err
	}
	srv, err := embedded.Start(ctx, cfg)
	if err != nil {
		return err
	}
	err = srv.WaitReady(ctx)
	if err == nil {
		err = n.amend(ctx, srv.Client(), o, g, b)
	}
	srv.Stop()
	if err != nil {
		return fmt.Errorf("prepare the new etcd: %w", err)
	}
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

// amend takes out of a keyspace what must not come back from the past, and
// writes what the new generation begins with.
func (n *Node) amend(ctx context.Context, c *clientv3.Client, o *Operation, g Generation, b basis) error {
	store := cluster.NewStore(c, n.state.ClusterID)
	id, err := store.Identity(ctx)
	if err != nil {
		return err
	}
	if id.ID != n.state.ClusterID {
		return fmt.Errorf("%w: it holds cluster %s", cluster.ErrOtherCluster, id.ID)
	}
	p := patroni.Prefix(n.cfg.Cluster)
	drop := []clientv3.Op{
		// Who leads is decided anew. With the sync key gone Patroni lets this node
		// alone be promoted, which is what was decided on.
		clientv3.OpDelete(p + patroni.KeyLeader), clientv3.OpDelete(p+patroni.KeyMembers, clientv3.WithPrefix()),
		clientv3.OpDelete(p + patroni.KeyFailover), clientv3.OpDelete(p + patroni.KeySync), clientv3.OpDelete(p + patroni.KeyStatus),
		clientv3.OpDelete(p+"optime/", clientv3.WithPrefix()),
		clientv3.OpDelete(store.Prefix()+"tokens/", clientv3.WithPrefix()),
		clientv3.OpDelete(n.operationKey()),
	}
	for _, m := range b.roster {
		if m.Name != n.cfg.Name {
			drop = append(drop, clientv3.OpDelete(store.Prefix()+"members/"+m.Name))
		}
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
	for _, m := range g.Former {
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
	r.Epoch, r.Seq, r.State = max(r.Epoch, n.keeper.gate.Status().Epoch)+1, r.Seq+1, gate.Promoting
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
