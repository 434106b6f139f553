package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

// leadership is who has it, as one linearizable transaction shows it.
type leadership struct {
	View    patroni.ClusterView
	Record  gate.Record // the zero value when there is none
	Rev     int64       // of the record
	Request request     // what Patroni has been asked for and has not cleared away
}

// request is Patroni's failover key.
type request struct {
	Leader string `json:"leader"` // from whom; "" = whoever it is
	Member string `json:"member"` // to whom; "" = the best
	At     string `json:"scheduled_at"`
}

// pending says in words what a request asks of the present leader, "" where there
// is none, or one that is over: Patroni clears it away in its next round.
func (r request) pending(leader string) string {
	switch {
	case r == request{}, r.Leader != "" && r.Leader != leader, r.Member == leader:
		return ""
	case r.At != "":
		return "a switchover at " + r.At
	case r.Member != "":
		return "a switchover to " + r.Member
	}
	return "a switchover"
}

// serving is the node that may serve writes, "" for none: it owns the gate, has
// it open, and holds Patroni's leader key.
func (l leadership) serving() string {
	if l.Record.State == gate.Open && l.View.Leader == l.Record.Owner {
		return l.Record.Owner
	}
	return ""
}

// readLeadership needs a quorum.
func (n *Node) readLeadership(ctx context.Context) (leadership, error) {
	var l leadership
	c, err := n.etcdClient()
	if err != nil {
		return l, err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	r, err := c.Txn(ctx).Then(clientv3.OpGet(gateStore{n}.key()), clientv3.OpGet(patroni.Prefix(n.cfg.Cluster), clientv3.WithPrefix())).Commit()
	if err != nil {
		return l, fmt.Errorf("read who leads: %w", err)
	}
	for _, kv := range r.Responses[0].GetResponseRange().Kvs {
		if l.Record, err = gate.ParseRecord(kv.Value); err != nil {
			return l, err
		}
		l.Rev = kv.ModRevision
	}
	var kvs []patroni.KV
	failover := patroni.Prefix(n.cfg.Cluster) + patroni.KeyFailover
	for _, kv := range r.Responses[1].GetResponseRange().Kvs {
		kvs = append(kvs, patroni.KV{Key: string(kv.Key), Value: kv.Value, ModRevision: kv.ModRevision, Lease: kv.Lease})
		if string(kv.Key) == failover {
			_ = json.Unmarshal(kv.Value, &l.Request) // what cannot be read is nothing to Patroni either
		}
	}
	l.View, err = patroni.ParseView(n.cfg.Cluster, kvs)
	return l, err
}

// memberNamed returns a member of the roster.
func (n *Node) memberNamed(name string) (cluster.Member, error) {
	return pickMember(n.snapshot().Members, name)
}

func pickMember(members []cluster.Member, name string) (cluster.Member, error) {
	i := slices.IndexFunc(members, func(m cluster.Member) bool { return m.Name == name })
	if i < 0 {
		return cluster.Member{}, refused(cluster.CodeNoMember, "the cluster has no member %q", name)
	}
	return members[i], nil
}

// patroniOf speaks to the Patroni of a member.
func (n *Node) patroniOf(m cluster.Member) *patroni.Client {
	return n.restClient(n.snapshot(), m.Addr, m.Ports.Patroni)
}

// reportOf asks a member, which may be this node, for its report.
func (n *Node) reportOf(ctx context.Context, m cluster.Member) (Report, error) {
	if m.Name == n.cfg.Name {
		return n.report(ctx), nil
	}
	var r Report
	ctx, cancel := context.WithTimeout(ctx, 2*askTimeout)
	defer cancel()
	return r, n.seen.call(ctx, http.MethodGet, m.APIAddr(), "/v1/node", nil, &r)
}

// checkpointOn has the PostgreSQL of a member write a checkpoint.
func (n *Node) checkpointOn(ctx context.Context, m cluster.Member) error {
	ctx, cancel := context.WithTimeout(ctx, checkpointTimeout)
	defer cancel()
	if m.Name == n.cfg.Name {
		return n.checkpoint(ctx)
	}
	return n.seen.call(ctx, http.MethodPost, m.APIAddr(), pathCheckpoint, nil, nil)
}

// checkpoint writes one in this node's PostgreSQL.
func (n *Node) checkpoint(ctx context.Context) error {
	c, err := n.localPostgres(ctx)
	if err != nil {
		return fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	if _, err := c.Exec(ctx, "CHECKPOINT"); err != nil {
		return fmt.Errorf("write a checkpoint: %w", err)
	}
	return nil
}

func (n *Node) checkpointHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), checkpointTimeout)
	defer cancel()
	err := refused(cluster.CodeBadRequest, "a witness has no PostgreSQL")
	if n.cfg.Role == cluster.RoleData {
		err = n.checkpoint(ctx)
	}
	reply(w, struct{}{}, err)
}
