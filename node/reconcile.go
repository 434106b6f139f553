package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/firewall"
	"pgha/internal/fsx"
	"pgha/patroni"
)

const (
	// reconcileEvery is the pause between rounds when nothing wakes the loop.
	reconcileEvery = 2 * time.Second
	// reconcileStuck is how long a round may last before the watchdog is no
	// longer pinged; the slowest step (validating a configuration on a busy
	// host) takes a few seconds.
	reconcileStuck = 2 * time.Minute
)

// reconcileLoop brings the host to what the cluster's state asks for, on every
// change and every two seconds.
func (n *Node) reconcileLoop(ctx context.Context) error {
	t := time.NewTicker(reconcileEvery)
	defer t.Stop()
	tick := func() {
		n.mu.Lock()
		n.lastTick = time.Now()
		n.mu.Unlock()
	}
	for tick(); ; tick() {
		n.reconcile(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-n.kick:
		case <-t.C:
		}
	}
}

// reconcile does one round. A part that fails is a problem in status and is
// tried again in the next round; it never keeps the other parts from theirs.
func (n *Node) reconcile(ctx context.Context) {
	if n.removal.Load() != nil || n.isBarred() != nil {
		n.applyFirewall(ctx)
		return // nothing is served here any more
	}
	w, err := n.observe(ctx)
	n.observed(err)
	if len(w.Members) == 0 {
		return // nothing known yet: leave the host as it is
	}
	n.applyFirewall(ctx)
	n.partProblem(ctx, "generation", n.follow(ctx, w))
	n.partProblem(ctx, "CA", n.followCA(w))
	n.partProblem(ctx, "certificates", n.renewCertificates(ctx, w))
	if n.cfg.Role != cluster.RoleData {
		if err == nil {
			n.setWaiting("")
		}
		n.partProblem(ctx, "rotation", n.confirm(ctx, w))
		return
	}
	patroniErr, haproxyErr := n.reconcilePatroni(ctx, w), n.reconcileHAProxy(ctx, w)
	n.partProblem(ctx, "patroni configuration", patroniErr)
	n.partProblem(ctx, "haproxy configuration", haproxyErr)
	if patroniErr == nil && haproxyErr == nil {
		n.partProblem(ctx, "rotation", n.confirm(ctx, w))
	}
	n.partProblem(ctx, "gate", n.keeper.reconcile(ctx, w))
	n.told.children(n)
	n.followed(w)
}

// partProblem is problem for what was done under ctx: that it was cut short
// because the daemon stops is none.
func (n *Node) partProblem(ctx context.Context, part string, err error) {
	if ctx.Err() == nil {
		n.problem(part, err)
	}
}

// observe reads the world from etcd through the local member. What is pgha's own
// needs a quorum, and is as it was while there is none; a write wakes the next
// round.
func (n *Node) observe(ctx context.Context) (world, error) {
	w := n.snapshot()
	w.Viewed = false
	store, srv := n.store.Load(), n.etcd.Load()
	if store == nil || srv == nil {
		n.remember(w)
		return w, nil
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	err := func() error {
		members, _, err := store.Members(ctx)
		if err != nil {
			return err
		}
		if w.Former, err = store.Former(ctx); err != nil {
			return err
		}
		settings, rev, err := store.Settings(ctx)
		if err != nil {
			return err
		}
		tokens, err := store.Tokens(ctx)
		if err != nil {
			return err
		}
		w.JoinOpen = false
		for _, t := range tokens {
			w.JoinOpen = w.JoinOpen || t.State == cluster.TokenValid
		}
		w.Members, w.Settings, w.SettingsRev = members, settings, rev
		if w.Planned, err = n.plannedSwitchover(ctx); err != nil {
			return err
		}
		if err := n.readSecrets(ctx, store, &w); err != nil {
			return err
		}
		if err := n.readRotations(ctx, store, &w); err != nil {
			return err
		}
		got, err := srv.Client().Get(ctx, patroni.Prefix(n.cfg.Cluster), clientv3.WithPrefix(), clientv3.WithSerializable())
		if err != nil {
			return fmt.Errorf("read Patroni's keys: %w", err)
		}
		kvs := make([]patroni.KV, 0, len(got.Kvs))
		for _, kv := range got.Kvs {
			kvs = append(kvs, patroni.KV{Key: string(kv.Key), Value: kv.Value, ModRevision: kv.ModRevision, Lease: kv.Lease})
		}
		if w.View, err = patroni.ParseView(n.cfg.Cluster, kvs); err != nil {
			return err
		}
		w.Viewed, w.ViewedAt = true, time.Now()
		return nil
	}()
	if err == nil {
		err = n.saveCache(w)
	}
	n.remember(w)
	return w, err
}

// observed reports a state that cannot be read. One failed round is the normal
// price of a change of etcd's leader.
func (n *Node) observed(err error) {
	n.mu.Lock()
	n.unread++
	if err == nil {
		n.unread = 0
	}
	report := err == nil || n.unread > 2
	n.mu.Unlock()
	if report {
		n.problem("cluster state", err)
	}
}

func (n *Node) remember(w world) {
	n.mu.Lock()
	w.Members = n.withAdmitted(w.Members, time.Now())
	n.world = w
	n.mu.Unlock()
}

// readSecrets keeps the node's secrets as etcd has them; a witness has none.
func (n *Node) readSecrets(ctx context.Context, store *cluster.Store, w *world) error {
	if n.sealing == nil {
		return nil
	}
	sealed, err := store.SealedSecrets(ctx)
	if err != nil {
		return err
	}
	secrets, err := cluster.OpenSecrets(*n.sealing, n.state.ClusterID, sealed)
	if err != nil {
		return err
	}
	w.Secrets = &secrets
	if err := n.writeStatsPassword(secrets.StatsPage); err != nil {
		return err
	}
	old, err := os.ReadFile(n.paths.secrets())
	if err == nil && string(old) == string(sealed) {
		return nil
	}
	return fsx.WriteFile(n.paths.secrets(), sealed, 0o600, fsx.Keep, fsx.Keep)
}

// writeStatsPassword keeps the status page's password where root can read it:
// nothing ever prints it.
func (n *Node) writeStatsPassword(password string) error {
	old, err := os.ReadFile(n.paths.StatsPassword())
	if err == nil && string(old) == password+"\n" {
		return nil
	}
	return fsx.WriteFile(n.paths.StatsPassword(), []byte(password+"\n"), 0o600, fsx.Keep, fsx.Keep)
}

// cache is what a node must know at start, before it can ask anybody: whom
// the firewall has to let in so that a quorum can form at all.
type cache struct {
	Members  []cluster.Member `json:"members"`
	Settings cluster.Settings `json:"settings"`
}

func (n *Node) loadCache() {
	var c cache
	if err := fsx.ReadJSON(n.paths.roster(), &c); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.problem("roster", err)
		}
		return
	}
	n.remember(world{Members: c.Members, Settings: c.Settings})
}

func (n *Node) saveCache(w world) error {
	var old cache
	next := cache{Members: w.Members, Settings: w.Settings}
	if err := fsx.ReadJSON(n.paths.roster(), &old); err == nil && sameJSON(old, next) {
		return nil
	}
	return fsx.WriteJSON(n.paths.roster(), next, 0o600)
}

// applyFirewall opens this node's ports to whom the roster names.
func (n *Node) applyFirewall(ctx context.Context) {
	if n.fw == nil {
		return
	}
	p := n.firewallPolicy(n.snapshot())
	n.fwMu.Lock()
	defer n.fwMu.Unlock()
	if n.fwApplied != nil && sameJSON(*n.fwApplied, p) {
		if ok, err := n.fw.InSync(ctx); err == nil && ok {
			return
		}
	}
	err := n.fw.Apply(ctx, p)
	if err == nil {
		n.fwApplied = &p
	}
	n.partProblem(ctx, "firewall", err)
}

func (n *Node) firewallPolicy(w world) firewall.Policy {
	p := firewall.Policy{
		Mode: n.cfg.Firewall.Mode,
		Ports: firewall.Ports{
			Postgres: n.cfg.Ports.Postgres, ReadWrite: n.cfg.Ports.ReadWrite, ReadOnly: n.cfg.Ports.ReadOnly,
			Patroni: n.cfg.Ports.Patroni, EtcdClient: n.cfg.Ports.EtcdClient, EtcdPeer: n.cfg.Ports.EtcdPeer,
			Stats: n.cfg.Ports.Stats, Health: n.cfg.Ports.Health, API: n.cfg.Ports.API,
		},
		Clients: w.Settings.ClientNets, Probes: w.Settings.ProbeAddrs, JoinOpen: w.JoinOpen,
		Former: formerAddrs(w, n.formerAddrs()),
	}
	if n.cfg.Role == cluster.RoleWitness {
		// A witness uses two ports; what else listens there is the host's own.
		p.Ports = firewall.Ports{EtcdPeer: n.cfg.Ports.EtcdPeer, API: n.cfg.Ports.API}
	}
	for _, m := range w.Members {
		p.Members = append(p.Members, m.Addr)
	}
	if len(w.Members) == 0 { // first start: the roster is not readable yet
		p.Members = append(p.Members, n.cfg.Address)
		for _, u := range n.state.InitialCluster {
			if a, err := peerAddr(u); err == nil && a != n.cfg.Address {
				p.Members = append(p.Members, a)
			}
		}
	}
	return p
}

// watchFirewall puts the ruleset back as soon as somebody else removes it.
func (n *Node) watchFirewall(ctx context.Context) error {
	if n.fw == nil {
		return nil
	}
	for ctx.Err() == nil {
		err := n.fw.Watch(ctx, func() { n.applyFirewall(ctx) })
		if ctx.Err() != nil {
			return nil
		}
		n.problem("firewall watch", err)
		sleep(ctx, time.Second)
	}
	return nil
}

func peerAddr(url string) (netip.Addr, error) {
	const scheme = "https://"
	if len(url) < len(scheme) || url[:len(scheme)] != scheme {
		return netip.Addr{}, fmt.Errorf("parse peer URL %q: no https", url)
	}
	ap, err := netip.ParseAddrPort(url[len(scheme):])
	if err != nil {
		return netip.Addr{}, fmt.Errorf("parse peer URL: %w", err)
	}
	return ap.Addr(), nil
}
