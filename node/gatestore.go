package node

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/gate"
	"pgha/patroni"
)

// gatePrefix is apart from the cluster's other keys: its record changes twice a
// second, and nobody who watches those should wake for it.
const gatePrefix = "/pgha-gate/"

// gateStore carries out the gate's transactions on the local etcd member.
type gateStore struct{ n *Node }

func (s gateStore) key() string { return gatePrefix + s.n.state.ClusterID + "/record" }

// Do implements gate.Store. Both branches of the transaction read everything,
// so that a condition that fails also says why.
func (s gateStore) Do(ctx context.Context, op gate.Op) (gate.Result, error) {
	c, err := s.n.etcdClient()
	if err != nil {
		return gate.Result{}, err
	}
	prefix := patroni.Prefix(s.n.cfg.Cluster)
	leader, member := prefix+patroni.KeyLeader, prefix+patroni.KeyMembers+s.n.cfg.Name
	reads := []clientv3.Op{clientv3.OpGet(s.key()), clientv3.OpGet(prefix, clientv3.WithPrefix())}
	var cmps []clientv3.Cmp
	revision := func(key string, want *int64) {
		if want != nil {
			cmps = append(cmps, clientv3.Compare(clientv3.ModRevision(key), "=", *want))
		}
	}
	revision(s.key(), op.Record)
	revision(prefix+patroni.KeySync, op.Sync)
	revision(prefix+patroni.KeyConfig, op.Config)
	switch {
	case op.Leader == nil:
	case *op.Leader == "":
		cmps = append(cmps, clientv3.Compare(clientv3.CreateRevision(leader), "=", 0))
	default:
		cmps = append(cmps, clientv3.Compare(clientv3.Value(leader), "=", *op.Leader))
	}
	if op.Lease != nil {
		cmps = append(cmps, clientv3.Compare(clientv3.LeaseValue(member), "=", *op.Lease))
	}
	var writes []clientv3.Op
	if op.Kind != gate.Read {
		writes = append(writes, clientv3.OpPut(s.key(), op.Put.Encode()))
	}
	if op.TakeLeader != 0 {
		writes = append(writes, clientv3.OpPut(leader, s.n.cfg.Name, clientv3.WithLease(clientv3.LeaseID(op.TakeLeader))))
	}
	resp, err := c.Txn(ctx).If(cmps...).Then(append(writes, reads...)...).Else(reads...).Commit()
	if err != nil {
		return gate.Result{}, fmt.Errorf("%s the gate's record: %w", op.Kind, err)
	}
	got := resp.Responses[len(resp.Responses)-len(reads):]
	r := gate.Result{Done: resp.Succeeded}
	r.View, err = s.view(got[0].GetResponseRange().Kvs, got[1].GetResponseRange().Kvs)
	return r, err
}

// view translates etcd's keys.
func (s gateStore) view(own, theirs []*mvccpb.KeyValue) (gate.View, error) {
	var v gate.View
	if len(own) > 0 {
		r, err := gate.ParseRecord(own[0].Value)
		if err != nil {
			return v, err
		}
		v.Record, v.RecordRev = &r, own[0].ModRevision
	}
	prefix := patroni.Prefix(s.n.cfg.Cluster)
	kvs := make([]patroni.KV, 0, len(theirs))
	for _, kv := range theirs {
		kvs = append(kvs, patroni.KV{Key: string(kv.Key), Value: kv.Value, ModRevision: kv.ModRevision, Lease: kv.Lease})
		if string(kv.Key) == prefix+patroni.KeyFailover {
			v.Target = switchoverTarget(kv.Value)
		}
	}
	// What cannot be read keeps nobody from owning what is theirs, but nobody
	// takes over by it.
	c, err := patroni.ParseView(s.n.cfg.Cluster, kvs)
	v.NoFailover = err != nil || c.Config == nil
	v.Sync.Rev, v.ConfigRev = c.ModRevisions[patroni.KeySync], c.ModRevisions[patroni.KeyConfig]
	v.Leader, v.Paused, v.Optime = c.Leader, c.Paused, c.Status.Optime
	v.Sync.Leader, v.Sync.Standbys, v.Sync.Quorum = c.Sync.Leader, c.Sync.Standbys, c.Sync.Quorum
	v.Synchronous, v.MaxLag = c.Synchronous(), c.MaxLag()
	owner := ""
	if v.Record != nil {
		owner = v.Record.Owner
	}
	for _, m := range c.Members {
		switch {
		case m.Name == owner:
			v.Timeline = m.Timeline
		case m.State == "running" || m.State == "streaming":
			if m.Role == patroni.RoleReplica && m.Tags["nofailover"] != true && (!v.Synchronous || slices.Contains(v.Sync.Standbys, m.Name)) {
				v.Successor = true
			}
		}
		if m.Name == s.n.cfg.Name {
			v.Lease, v.NoFailover = m.LeaseID, v.NoFailover || m.Tags["nofailover"] == true
		}
	}
	return v, nil
}

// switchoverTarget is whom Patroni's failover key names to be the next leader.
func switchoverTarget(value []byte) string {
	var f struct {
		Member string `json:"member"`
	}
	if json.Unmarshal(value, &f) != nil {
		return "" // Patroni ignores it as well
	}
	return f.Member
}
