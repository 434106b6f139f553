package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/patroni"
	"pgha/pki"
)

// retryEtcd is the pause before etcd is started again after an error that an
// operator has to mend, such as a full disk.
const retryEtcd = 5 * time.Second

// runEtcd starts the etcd member and keeps it. What an operator can mend is
// tried again without a restart of the daemon; a fatal error inside etcd ends
// the daemon, because etcd's own state is then undefined.
func (n *Node) runEtcd(ctx context.Context) error {
	fatal := make(chan error, 1)
	if !n.mayStartEtcd(ctx) {
		n.jobsOnly(ctx)
		return nil
	}
	for ctx.Err() == nil {
		if n.isBarred() != nil {
			n.jobsOnly(ctx)
			return nil
		}
		if n.removal.Load() != nil {
			<-ctx.Done()
			return nil
		}
		trust, err := n.pki.Trust()
		if err != nil {
			return err
		}
		n.etcdTrust.Store(&trust) // read before etcd does: in doubt it is started once too often
		srv, err := embedded.Start(ctx, n.etcdConfig(fatal))
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			n.setEtcdState(err.Error())
			n.problem("etcd", err)
			if errors.Is(err, embedded.ErrRemoved) {
				n.etcdRemoved(ctx)
			}
			if !n.etcdPause(ctx, retryEtcd) {
				return nil
			}
			continue
		}
		n.etcd.Store(srv)
		n.store.Store(cluster.NewStore(srv.Client(), n.state.ClusterID))
		err = n.superviseEtcd(ctx, srv, fatal)
		if ctx.Err() != nil {
			if job := (errEtcdJob{}); errors.As(err, &job) {
				job.done <- ctx.Err() // somebody waits for it
			}
			return nil // stop() ends the server, after the children
		}
		n.etcd.Store(nil)
		n.store.Store(nil)
		if errors.Is(err, errEtcdFatal) {
			return err
		}
		srv.Stop()
		if job := (errEtcdJob{}); errors.As(err, &job) {
			job.done <- job.run(ctx)
			continue
		}
		if n.isBarred() != nil {
			continue // it was stopped for that
		}
		if n.removal.Load() != nil {
			continue // it was stopped for that
		}
		n.setEtcdState(err.Error())
		n.problem("etcd", err)
		if errors.Is(err, embedded.ErrRemoved) {
			// Nothing that waiting could mend: stay up, say so, serve status.
			n.etcdRemoved(ctx)
			<-ctx.Done()
			return nil
		}
		if !n.etcdPause(ctx, retryEtcd) {
			return nil
		}
	}
	return nil
}

var errEtcdFatal = errors.New("etcd met a fatal error")

// superviseEtcd waits until the member is of use, then until it ends.
func (n *Node) superviseEtcd(ctx context.Context, srv *embedded.Server, fatal <-chan error) error {
	ready := make(chan error, 1)
	readyCtx, cancel := context.WithCancel(ctx)
	defer cancel()
	// It is not waited for: after a fatal error in etcd its calls may never return.
	go func() { ready <- n.etcdReady(readyCtx, srv) }()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-fatal:
			return fmt.Errorf("%w: %w", errEtcdFatal, err)
		case job := <-n.lineage.jobs:
			return errEtcdJob{job}
		case <-n.lineage.bar:
			return errors.New("this node is out of service")
		case <-srv.Done():
			if err := srv.Err(); err != nil {
				return err
			}
			return errors.New("etcd has stopped by itself")
		case err := <-ready:
			if err != nil {
				return err
			}
			ready = nil
		}
	}
}

// etcdReady waits for a leader, founds the cluster's record if this is the
// founder's first start, and lets the rest of the node begin.
func (n *Node) etcdReady(ctx context.Context, srv *embedded.Server) error {
	n.setEtcdState("waiting for a quorum")
	n.setWaiting("waiting for etcd: " + n.votersNeeded())
	for {
		wait, cancel := context.WithTimeout(ctx, 10*time.Second)
		err := srv.WaitReady(wait)
		cancel()
		if err == nil {
			break
		}
		if ctx.Err() != nil {
			return nil
		}
		n.problem("etcd", err)
		n.tellWaiting()
	}
	n.problem("quorum", nil)
	for n.state.Founder {
		err := n.found(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			break
		}
		if errors.Is(err, cluster.ErrOtherCluster) {
			return err
		}
		n.problem("etcd", err)
		if !sleep(ctx, time.Second) {
			return nil
		}
	}
	n.problem("etcd", nil)
	n.setEtcdState("running")
	n.setWaiting("reading the cluster's state")
	n.wake()
	n.watchGate(ctx, srv.Client())
	return n.watchKeys(ctx, srv)
}

func (n *Node) etcdConfig(fatal chan<- error) embedded.Config {
	bundle := n.pki.BundlePath(pki.RoleNode)
	c := embedded.Config{
		Name: n.cfg.Name, DataDir: n.paths.etcd(),
		PeerURL:  peerURL(n.cfg.Address, n.cfg.Ports),
		CertFile: bundle, KeyFile: bundle, CAFile: n.pki.CAPath(),
		Token: n.state.ClusterID, InitialCluster: maps.Clone(n.state.InitialCluster),
		Bootstrap: n.state.Founder && !n.founded.Load(), Profile: raft,
		FatalFile: n.paths.etcdFatal(),
		OnFatal: func(err error) {
			select {
			case fatal <- err:
			default:
			}
		},
		Log: n.opts.Log,
	}
	if n.founded.Load() { // whom to ask if this member's data is lost
		for _, m := range n.snapshot().Members {
			c.InitialCluster[m.Name] = m.PeerURL()
		}
	}
	if n.cfg.Role == cluster.RoleData {
		c.ClientURL = "https://" + n.etcdAddr()
	}
	return c
}

// watchKeys wakes the reconciler whenever the roster, the settings or one of
// Patroni's keys change. It ends with ctx.
func (n *Node) watchKeys(ctx context.Context, srv *embedded.Server) error {
	go func() {
		for ctx.Err() == nil {
			watched, cancel := context.WithCancel(clientv3.WithRequireLeader(ctx))
			c := srv.Client()
			own := c.Watch(watched, cluster.NewStore(c, n.state.ClusterID).Prefix(), clientv3.WithPrefix())
			theirs := c.Watch(watched, patroni.Prefix(n.cfg.Cluster), clientv3.WithPrefix())
			for open := true; open; {
				var r clientv3.WatchResponse
				select {
				case r, open = <-own:
				case r, open = <-theirs:
				}
				open = open && r.Err() == nil
				n.wake()
			}
			cancel()
			sleep(ctx, 500*time.Millisecond) // a lost watch costs one poll, no more
		}
	}()
	return nil
}

func (n *Node) setEtcdState(s string) {
	n.mu.Lock()
	n.etcdState = s
	n.mu.Unlock()
}

// etcdClient returns the local member's client, or says why there is none now:
// the member can end at any time.
func (n *Node) etcdClient() (*clientv3.Client, error) {
	if srv := n.etcd.Load(); srv != nil {
		return srv.Client(), nil
	}
	return nil, n.notReady()
}

// votersNeeded names the members that etcd may be waiting for.
func (n *Node) votersNeeded() string {
	w := n.snapshot()
	if len(w.Members) <= 1 {
		return "starting this member"
	}
	s := "a majority of its voters must be up ("
	for i, m := range w.Members {
		if i > 0 {
			s += ", "
		}
		s += m.Name
	}
	return s + ")"
}

// etcdAddr is where Patroni finds etcd on this host, and the only address at
// which etcd serves clients: nobody else needs it (docs/adr/0003-local-etcd.md).
func (n *Node) etcdAddr() string {
	return hostPort(netip.AddrFrom4([4]byte{127, 0, 0, 1}), n.cfg.Ports.EtcdClient)
}

func peerURL(a netip.Addr, p cluster.Ports) string { return "https://" + hostPort(a, p.EtcdPeer) }

func hostPort(a netip.Addr, port uint16) string { return netip.AddrPortFrom(a, port).String() }

// sleep waits for d and says whether ctx is still alive.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
