package node

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/gate"
	"pgha/patroni"
)

// newAlone is a founder's node whose etcd runs in the place where the node has it.
func newAlone(t *testing.T) (*Node, *embedded.Server) {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { until(t, "etcd is gone", func() bool { return goleak.Find(before) == nil }) })
	n := opened(t)
	n.cfg.Address, n.cfg.Ports = netip.MustParseAddr("127.0.0.1"), cluster.DefaultPorts()
	for _, port := range []*uint16{&n.cfg.Ports.EtcdPeer, &n.cfg.Ports.EtcdClient} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		*port = uint16(l.Addr().(*net.TCPAddr).Port)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	srv := startAlone(t, n)
	if err := n.found(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n, srv
}

func startAlone(t *testing.T, n *Node) *embedded.Server {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	srv, err := embedded.Start(ctx, n.etcdConfig(make(chan error, 1)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(srv.Stop)
	if err := srv.WaitReady(ctx); err != nil {
		t.Fatal(err)
	}
	n.etcd.Store(srv)
	n.store.Store(cluster.NewStore(srv.Client(), n.state.ClusterID))
	return srv
}

// TestReplaceEtcd: a new generation has the cluster's state, none of what must
// not come back from the past, and a gate's record that nobody owns by default.
func TestReplaceEtcd(t *testing.T) {
	n, srv := newAlone(t)
	c := srv.Client()
	store := n.store.Load()
	lost := n.self()
	lost.Name, lost.Addr = "n2", netip.MustParseAddr("127.0.0.9")
	if err := store.PutMember(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	// The keyspace's roster may be ahead of what this node has read of it.
	unread := lost
	unread.Name, unread.Addr = "n3", netip.MustParseAddr("127.0.0.8")
	if err := store.PutMember(t.Context(), unread); err != nil {
		t.Fatal(err)
	}
	p := patroni.Prefix(n.cfg.Cluster)
	kept := map[string]string{p + "config": `{"ttl":60}`, p + "initialize": "7000000000000000001", p + "history": "[]"}
	past := []string{p + "leader", p + "members/n1", p + "members/n2", p + "failover", p + "sync", p + "status", p + "optime/leader",
		store.Prefix() + "tokens/00", n.operationKey()}
	put := func(key, value string) {
		t.Helper()
		if _, err := c.Put(t.Context(), key, value); err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range past {
		put(key, "{}")
	}
	for key, value := range kept {
		put(key, value)
	}
	record := gate.Record{Owner: "n2", Epoch: 7, Seq: 100, PromiseMS: 2500, State: gate.Open, Last: "n2"}
	put(gateStore{n}.key(), record.Encode())
	file, err := n.saveSnapshot(t.Context(), reasonManual)
	if err != nil {
		t.Fatal(err)
	}
	// Since then the gate has moved on, and a password was changed.
	record.Epoch, record.Owner, record.Last = 9, "n1", "n2"
	put(gateStore{n}.key(), record.Encode())
	put(store.Prefix()+"secrets", "new")
	keys, err := n.currentKeys(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	_, snapshot, err := n.openSnapshot(file)
	if err != nil {
		t.Fatal(err)
	}
	srv.Stop()
	n.etcd.Store(nil)
	n.store.Store(nil)
	n.remember(world{Members: []cluster.Member{n.self(), lost}})
	g := Generation{Number: 2, ID: "x", At: time.Now().UTC().Truncate(time.Second), By: "n1", Former: []cluster.Member{lost}}
	o := &Operation{kind: "snapshot-restore", actor: "root@n1", log: discardLog(), out: func(OperationLine) {}}
	aside := n.paths.etcd() + "-old"
	// What a cut off attempt has left is in nobody's way.
	if err := os.MkdirAll(filepath.Join(n.paths.etcd()+".new", "member"), 0o700); err != nil {
		t.Fatal(err)
	}
	b := basis{keys: keys, snapshot: snapshot, roster: []cluster.Member{n.self(), lost}, ids: map[string]uint64{lost.PeerURL(): 42}}
	if err := n.replaceEtcd(t.Context(), o, file, g, b, aside); err != nil {
		t.Fatal(err)
	}
	if m := n.snapshot().Members; len(m) != 1 || m[0].Name != n.cfg.Name {
		t.Errorf("the node goes on with the roster %v", m)
	}
	if n.generation().Number != 2 {
		t.Errorf("the node is of generation %d", n.generation().Number)
	}

	c = startAlone(t, n).Client()
	store = n.store.Load()
	get := func(key string) string {
		t.Helper()
		r, err := c.Get(t.Context(), key)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Kvs) == 0 {
			return ""
		}
		return string(r.Kvs[0].Value)
	}
	for _, key := range past {
		if v := get(key); v != "" {
			t.Errorf("%s came back from the past: %s", key, v)
		}
	}
	for key, want := range kept {
		if v := get(key); v != want {
			t.Errorf("%s is %q", key, v)
		}
	}
	if v := get(store.Prefix() + "secrets"); v != "new" {
		t.Errorf("the snapshot has brought older secrets back: %q", v)
	}
	got, err := gate.ParseRecord([]byte(get(gateStore{n}.key())))
	if err != nil {
		t.Fatal(err)
	}
	if want := (gate.Record{Owner: "n1", Epoch: 10, Seq: 101, PromiseMS: 2500, State: gate.Promoting, Last: "n2"}); got != want {
		t.Errorf("the gate's record is %+v, want %+v", got, want)
	}
	var stored Generation
	if err := json.Unmarshal([]byte(get(store.Prefix()+keyGeneration)), &stored); err != nil {
		t.Fatal(err)
	}
	if stored.Number != 2 || !named(stored.Former, "n2") || !named(stored.Former, "n3") || len(stored.Former) != 2 {
		t.Errorf("the generation in etcd is %+v", stored)
	}
	roster, _, err := store.Members(t.Context())
	if err != nil || len(roster) != 1 || roster[0].Name != n.cfg.Name {
		t.Errorf("the roster is %v (%v)", roster, err)
	}
	former, err := store.Former(t.Context())
	byName := map[string]cluster.FormerMember{}
	for _, f := range former {
		byName[f.Name] = f
	}
	if err != nil || len(former) != 2 || byName["n2"].MemberID != 42 || !strings.Contains(byName["n3"].Why, "generation 2") {
		t.Errorf("former members are %+v (%v)", former, err)
	}
	if _, err := os.Stat(aside); err != nil {
		t.Errorf("the old etcd was not kept: %v", err)
	}
	if !strings.HasPrefix(o.left, "generation 2 may have begun") {
		t.Errorf("an error after the exchange would say that %s", o.left)
	}
	for _, left := range []string{n.paths.etcd() + ".new", filepath.Join(n.paths.Lib, "recover.db")} {
		if _, err := os.Stat(left); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s was left: %v", left, err)
		}
	}
	if _, err := c.Put(t.Context(), "k", "v"); err != nil {
		t.Error(err)
	}

	// A node that may not run its etcd begins from the directory as it is.
	n.etcd.Load().Stop()
	n.etcd.Store(nil)
	n.lineage.barred = &barred{Kind: barOlder}
	// An attempt was cut off between the exchange and the move of the old etcd, and
	// of whom the last generation has lost only the keyspace knows.
	if err := os.CopyFS(n.paths.etcd()+".new", os.DirFS(aside)); err != nil {
		t.Fatal(err)
	}
	n.lineage.own.Former = nil
	g = Generation{Number: 3, ID: "y", At: g.At, By: n.cfg.Name}
	if err := n.replaceEtcd(t.Context(), o, "", g, basis{roster: roster}, aside+"-2"); err != nil {
		t.Fatal(err)
	}
	again, err := Open(Options{Paths: n.paths, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	if f := again.generation().Former; len(f) != 2 || !named(f, "n2") || !named(f, "n3") {
		t.Errorf("after a restart, without a quorum, it knows the former members %v", f)
	}
	if _, err := os.Stat(filepath.Join(aside+"-2-before", "member", "snap", "db")); err != nil {
		t.Errorf("the etcd that a cut off attempt had replaced was not kept: %v", err)
	}
	if again.isBarred() != nil || again.generation().Number != 3 {
		t.Errorf("after a restart it is of generation %d, barred %+v", again.generation().Number, again.isBarred())
	}
	c = startAlone(t, n).Client()
	if v := get("k"); v != "v" {
		t.Errorf("k is %q", v)
	}
	// Those of the last generation are on record as what they were.
	if again, err := n.store.Load().Former(t.Context()); err != nil || len(again) != 2 || !strings.Contains(again[0].Why, "generation 2") {
		t.Errorf("former members are %+v (%v)", again, err)
	}
}

// TestReplaceEtcdRefusesOtherData: a snapshot of another cluster changes nothing.
func TestReplaceEtcdRefusesOtherData(t *testing.T) {
	n, srv := newAlone(t)
	other := cluster.Root + "11111111-1111-4111-8111-111111111111/identity"
	if _, err := srv.Client().Delete(t.Context(), cluster.Root, clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
	if _, err := srv.Client().Put(t.Context(), other, "{}"); err != nil {
		t.Fatal(err)
	}
	file, err := n.saveSnapshot(t.Context(), reasonManual)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := n.openSnapshot(file); !errors.Is(err, embedded.ErrSnapshot) {
		t.Errorf("a snapshot that holds another cluster than it says: %v", err)
	}
	srv.Stop()
	n.etcd.Store(nil)
	n.store.Store(nil)
	o := &Operation{kind: "snapshot-restore", actor: "root@n1", log: discardLog(), out: func(OperationLine) {}}
	if err := n.replaceEtcd(t.Context(), o, file, Generation{Number: 2}, basis{}, n.paths.etcd()+"-old"); err == nil {
		t.Error("another cluster's keyspace was put in place")
	}
	if _, err := os.Stat(n.paths.etcd() + "-old"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the etcd directory was moved: %v", err)
	}
}

// TestBarOutlivesRestart: a node that was replaced knows it when it starts anew.
func TestBarOutlivesRestart(t *testing.T) {
	n := opened(t)
	if err := n.setGeneration(Generation{Number: 1}); err != nil {
		t.Fatal(err)
	}
	n.met("n2", meeting{Generation: Generation{Number: 1}})
	if n.isBarred() != nil {
		t.Fatal("barred by its equal")
	}
	n.met("n2", meeting{Generation: Generation{Number: 2, ID: "x", By: "n2", At: time.Unix(0, 0)}})
	until(t, "the node is barred", func() bool { return n.isBarred() != nil && n.leaving.Load() })
	again, err := Open(Options{Paths: n.paths, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	b := again.isBarred()
	if b == nil || !strings.Contains(b.Text, "generation 1 of cluster") || !strings.Contains(b.Text, "n2 has replaced by generation 2 at 1970-01-01 00:00:00Z") {
		t.Errorf("after a restart it says %+v", b)
	}
	if again.mayStartEtcd(t.Context()) {
		t.Error("its etcd may start")
	}
	if s := again.status(t.Context()); s.Health != Unknown || s.Verdict != b.Text || len(s.ToDo) == 0 {
		t.Errorf("status is %s: %s %v", s.Health, s.Verdict, s.ToDo)
	}
}
