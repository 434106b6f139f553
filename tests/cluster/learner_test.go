package cluster

import (
	"context"
	"io"
	"net/http"
	"strings"
	"testing"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/grpclog"
)

// TestLearnerServes: two nodes without a witness. The second is a learner, and
// its daemon (in process) and its Patroni (through the port) must work.
func TestLearnerServes(t *testing.T) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	c := newCluster(t)
	n1, n2 := &member{cfg: c.config(1, false)}, &member{cfg: c.config(2, false)}
	n1.cfg.Bootstrap = true
	n1.Server = start(t, n1.cfg)
	ready(t, n1.Server)
	if _, _, err := n1.AddLearner(within(t), n2.cfg.PeerURL); err != nil {
		t.Fatal(err)
	}
	n2.Server = start(t, n2.cfg)
	ready(t, n2.Server)
	if !status(t, n2.Server).Learner {
		t.Fatal("n2 is no learner")
	}
	tlsConfig := c.ca.Client(t, "patroni")
	dial := func(url string) *clientv3.Client {
		cl, err := clientv3.New(clientv3.Config{Endpoints: []string{url}, TLS: tlsConfig})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { cl.Close() })
		return cl
	}
	for name, cl := range map[string]*clientv3.Client{"in-process": n2.Client(), "grpc": dial(n2.cfg.ClientURL)} {
		t.Run(name, func(t *testing.T) { exercise(t, cl, n1.Client()) })
	}
	var watching <-chan struct{}
	t.Run("gateway", func(t *testing.T) {
		put(t, n1.Client(), "foo", "bar")
		transport := &http.Transport{TLSClientConfig: tlsConfig}
		defer transport.CloseIdleConnections()
		post := func(path, body, want string) {
			resp, err := (&http.Client{Transport: transport}).Post(n2.cfg.ClientURL+path, "application/json", strings.NewReader(body))
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			got, err := io.ReadAll(resp.Body)
			if err != nil || resp.StatusCode != http.StatusOK || !strings.Contains(string(got), want) {
				t.Errorf("%s: %s %s %v", path, resp.Status, got, err)
			}
		}
		post("/v3/kv/range", `{"key":"Zm9v"}`, "YmFy")
		post("/v3/kv/put", `{"key":"Zm9v","value":"YmF6"}`, "revision")
		post("/v3/lease/grant", `{"TTL":"30"}`, `"TTL":"30"`)
		post("/v3/cluster/member/list", `{}`, n2.cfg.Name)
		watching = gatewayWatch(t, c, n2.cfg.ClientURL)
		if got := get(t, n1.Client(), "foo"); got != "baz" {
			t.Errorf("foo is %q on n1", got)
		}
	})
	timeStop(t, "learner with a watch", n2.Server, watching)
}

// exercise uses what Patroni and pgha use. leader tells what really happened.
func exercise(t *testing.T, cl, leader *clientv3.Client) {
	ctx, cancel := context.WithCancel(within(t))
	defer cancel()
	events := cl.Watch(ctx, "k", clientv3.WithCreatedNotify())
	if resp := <-events; !resp.Created {
		t.Fatalf("watch: %+v", resp)
	}
	lease, err := cl.Grant(ctx, 30)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.KeepAliveOnce(ctx, lease.ID); err != nil {
		t.Fatalf("keep alive: %v", err)
	}
	if _, err := cl.TimeToLive(ctx, lease.ID); err != nil {
		t.Fatalf("time to live: %v", err)
	}
	put(t, leader, "k", "1")
	if got := get(t, cl, "k"); got != "1" { // linearizable: never stale
		t.Fatalf("k is %q", got)
	}
	txn, err := cl.Txn(ctx).If(clientv3.Compare(clientv3.Value("k"), "=", "1")).
		Then(clientv3.OpPut("k", "2", clientv3.WithLease(lease.ID))).Commit()
	if err != nil || !txn.Succeeded {
		t.Fatalf("transaction: %+v, %v", txn, err)
	}
	if got := get(t, leader, "k"); got != "2" {
		t.Fatalf("k is %q on the leader", got)
	}
	if _, err := cl.MemberList(ctx); err != nil {
		t.Fatalf("member list: %v", err)
	}
	if _, err := cl.Revoke(ctx, lease.ID); err != nil {
		t.Fatalf("revoke: %v", err)
	}
	var seen []string
	for len(seen) < 3 {
		resp, ok := <-events
		if !ok || resp.Err() != nil {
			t.Fatalf("watch ended after %v: %v", seen, resp.Err())
		}
		for _, ev := range resp.Events {
			seen = append(seen, ev.Type.String()+" "+string(ev.Kv.Value))
		}
	}
	if got := strings.Join(seen, ","); got != "PUT 1,PUT 2,DELETE " {
		t.Errorf("watch saw %q", got)
	}
}
