package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/pki"
)

const (
	// etcdTurn is for how many seconds a node that restarts its etcd member may
	// keep the others from restarting theirs.
	etcdTurn = 60
	keyTurn  = "etcd-turn"
)

// etcdTrustDiffers says what etcd waits for if it trusts other CAs than ca.crt
// holds; "" if it does not. It reads them when it starts.
func (n *Node) etcdTrustDiffers() string {
	loaded := n.etcdTrust.Load()
	trust, err := n.pki.Trust()
	switch {
	case loaded == nil || err != nil:
		return "its etcd is starting"
	case pki.SameTrust(*loaded, trust):
		return ""
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.turnWaits != "" {
		return "its etcd has not loaded the CA certificates: " + n.turnWaits
	}
	return "its etcd is loading the CA certificates"
}

// etcdTrustLoop starts this node's etcd member again when it trusts other CAs
// than the cluster has agreed on: one node after the other, and only while that
// leaves a quorum.
func (n *Node) etcdTrustLoop(ctx context.Context) error {
	for sleep(ctx, time.Second) {
		srv := n.etcd.Load()
		if srv == nil {
			continue
		}
		why, err := "", error(nil)
		if n.etcdTrustDiffers() != "" && n.snapshot().CA != nil {
			why, err = n.reloadEtcd(ctx, srv)
		}
		n.mu.Lock()
		n.turnWaits = why
		n.mu.Unlock()
		n.partProblem(ctx, "etcd restart", err)
	}
	return nil
}

// etcdTurnFacts is what the decision to restart an etcd member rests on.
type etcdTurnFacts struct {
	voter  bool     // this member is one
	silent []string // other voters that did not answer lately, or know no leader
	turn   string   // who restarts now; "" for nobody
}

// decideEtcdTurn says whether this node may restart its etcd member now, or why
// not.
func decideEtcdTurn(f etcdTurnFacts) (bool, string) {
	switch {
	case f.turn != "":
		return false, "it is the turn of " + f.turn
	case f.voter && len(f.silent) > 0:
		return false, "a restart now would cost the quorum, for " + strings.Join(f.silent, " and ") + " does not answer"
	}
	return true, ""
}

// reloadEtcd restarts the member if it may, and says otherwise what it waits for.
func (n *Node) reloadEtcd(ctx context.Context, srv *embedded.Server) (string, error) {
	try, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	st, err := srv.Status(try)
	if err != nil || !st.HasLeader {
		return "etcd has no leader", nil
	}
	c := srv.Client()
	key := cluster.NewStore(c, n.state.ClusterID).Prefix() + keyTurn
	f := etcdTurnFacts{voter: !st.Learner}
	now, err := c.Get(try, key)
	if err != nil { // as while another is becoming etcd's leader
		return "etcd does not answer: " + err.Error(), nil
	}
	if len(now.Kvs) > 0 && string(now.Kvs[0].Value) != n.cfg.Name {
		f.turn = string(now.Kvs[0].Value)
	}
	answers := map[uint64]bool{st.MemberID: true}
	// Asked now: an answer of some seconds ago may be of a node that is off.
	for _, r := range n.seen.ask(try, n.snapshot().Members) {
		answers[r.Etcd.MemberID] = r.Etcd.HasLeader
	}
	for _, m := range st.Members {
		if !m.Learner && !answers[m.ID] {
			f.silent = append(f.silent, m.Name)
		}
	}
	if ok, why := decideEtcdTurn(f); !ok {
		return why, nil
	}
	lease, err := c.Grant(try, etcdTurn)
	if err != nil {
		return "etcd does not answer: " + err.Error(), nil
	}
	r, err := c.Txn(try).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, n.cfg.Name, clientv3.WithLease(lease.ID))).Commit()
	if err != nil || !r.Succeeded {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = c.Revoke(end, lease.ID) // else it ends by itself
		return "it is the turn of another node", nil
	}
	return "", n.restartEtcd(ctx, srv, lease.ID)
}

// restartEtcd starts the member again in this process and gives the turn back
// once it serves.
func (n *Node) restartEtcd(ctx context.Context, srv *embedded.Server, turn clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, etcdTurn*time.Second)
	defer cancel()
	began := time.Now()
	if err := n.promiseRestart(); err != nil { // clients must not notice
		return err
	}
	if err := n.withoutEtcd(ctx, func(context.Context) error { return nil }); err != nil {
		return err
	}
	for sleep(ctx, 20*time.Millisecond) {
		next := n.etcd.Load()
		if next == nil || next == srv {
			continue
		}
		if err := next.WaitReady(ctx); err != nil {
			return fmt.Errorf("start etcd again: %w", err)
		}
		n.log.Info("etcd has started again with the new CA certificates", "took", time.Since(began).Round(time.Millisecond))
		n.wake()
		giveBack(ctx, next, turn)
		return nil
	}
	return fmt.Errorf("start etcd again: %w", ctx.Err())
}

// giveBack ends a turn, which ends by itself with ctx: there may be no leader
// for a moment.
func giveBack(ctx context.Context, srv *embedded.Server, turn clientv3.LeaseID) {
	for ctx.Err() == nil {
		try, cancel := context.WithTimeout(ctx, 2*time.Second)
		_, err := srv.Client().Revoke(try, turn)
		cancel()
		if err == nil || errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return
		}
		sleep(ctx, 100*time.Millisecond)
	}
}
