package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/goleak"
	"go.uber.org/zap"

	"pgha/pki"
)

// etcd is the one real etcd that all tests of the package share.
var etcd *clientv3.Client

func TestMain(m *testing.M) {
	code, err := runWithEtcd(m)
	if err == nil {
		err = goleak.Find()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		code = max(code, 1)
	}
	os.Exit(code)
}

func runWithEtcd(m *testing.M) (code int, err error) {
	dir, err := os.MkdirTemp("", "pgha-cluster-test")
	if err != nil {
		return 1, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	cfg := embed.NewConfig()
	cfg.Dir = dir
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(zap.NewNop())
	cfg.UnsafeNoFsync = true
	any := url.URL{Scheme: "http", Host: "127.0.0.1:0"}
	cfg.ListenPeerUrls, cfg.ListenClientUrls = []url.URL{any}, []url.URL{any}
	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return 1, fmt.Errorf("start etcd: %w", err)
	}
	defer e.Close()
	select {
	case <-e.Server.ReadyNotify():
	case <-time.After(time.Minute):
		return 1, fmt.Errorf("etcd was not ready within a minute")
	}
	etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{e.Clients[0].Addr().String()}, Logger: zap.NewNop()})
	if err != nil {
		return 1, err
	}
	defer etcd.Close()
	// The connection stands before any test looks for goroutines of its own.
	if _, err := etcd.Get(context.Background(), "x"); err != nil {
		return 1, err
	}
	return m.Run(), nil
}

// cmpOpts compares members as they come out of the store.
var cmpOpts = cmp.Options{
	cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{}),
	cmpopts.IgnoreFields(Member{}, "Rev"),
	cmpopts.EquateEmpty(),
}

func testContext(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func wipe(t testing.TB) {
	t.Helper()
	if _, err := etcd.Delete(testContext(t), "", clientv3.WithPrefix()); err != nil {
		t.Fatal(err)
	}
}

// fixture is a new cluster of one data node, node1, at 127.0.0.1.
type fixture struct {
	id      Identity
	store   *Store
	self    Member
	key     SealingKey
	secrets Secrets
	ca      *pki.CA
	pin     [32]byte
}

func newFixture(t testing.TB) *fixture {
	t.Helper()
	wipe(t)
	now := time.Now()
	f := &fixture{}
	f.id = must[Identity](t)(NewIdentity("shop", now))
	f.ca = must[*pki.CA](t)(pki.NewCA(f.id.ID, f.id.Name, now))
	f.pin = must[[32]byte](t)(pki.PinOf(f.ca.CertPEM()))
	f.key = must[SealingKey](t)(NewSealingKey())
	f.secrets = must[Secrets](t)(NewSecrets())
	f.self = Member{
		Name: "node1", Role: RoleData, Addr: netip.MustParseAddr("127.0.0.1"), Ports: DefaultPorts(),
		SANs: []string{"db.example.com"}, JoinedAt: stamp(now), State: StateMember, Version: "1.2.0",
	}
	f.store = NewStore(etcd, f.id.ID)
	sealed := must[[]byte](t)(SealSecrets(f.key, f.id.ID, f.secrets))
	caKey := must[[]byte](t)(SealCAKey(f.key, f.id.ID, must[[]byte](t)(f.ca.KeyPEM())))
	if err := f.store.Create(testContext(t), f.id, f.self, Settings{Profile: "fast"}, sealed, caKey); err != nil {
		t.Fatal(err)
	}
	return f
}

// dump returns everything that etcd holds but the time-dependent revision.
func dump(t testing.TB) map[string]string {
	t.Helper()
	resp, err := etcd.Get(testContext(t), "", clientv3.WithPrefix())
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]string{}
	for _, kv := range resp.Kvs {
		out[string(kv.Key)] = string(kv.Value)
	}
	return out
}

func sameDump(t testing.TB, before map[string]string) {
	t.Helper()
	if after := dump(t); !maps.Equal(before, after) {
		t.Errorf("etcd has changed:\n%s", cmp.Diff(before, after))
	}
}
