package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
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

// probeTimeout bounds the look whether a port of another member answers.
const probeTimeout = 1500 * time.Millisecond

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
	older           bool     // it is out of service because its disk was put back
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
	case o.outOfService != "" && !(o.older && o.req.AllowDataLoss):
		// Where every disk was put back, one of them is all there is.
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
		o.older = b.Kind == barOlder
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
	if o.older {
		o.holds = holding{Text: "this node's disk was put back to an older state: it lacks whatever was acknowledged since"}
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
