package node

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"pgha/cluster"
	"pgha/pki"
)

// opened is a data node that is not running: it has its files and no etcd.
func opened(t *testing.T) *Node {
	t.Helper()
	p, _ := founder(t)
	n, err := Open(Options{Paths: p, Log: discardLog()})
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// run runs a part of a node until the test ends, and waits for that.
func run(t *testing.T, f func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- f(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

// until calls f until it says that the condition holds.
func until(t *testing.T, what string, f func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !f(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within a minute", what)
		}
	}
}

func TestLocalAPI(t *testing.T) {
	defer goleak.VerifyNone(t)
	t.Run("", func(t *testing.T) { // its cleanup comes before the check
		n := opened(t)
		local := NewLocal(n.paths)
		if _, err := local.Status(t.Context()); !errors.Is(err, ErrNotRunning) {
			t.Fatalf("without a daemon: %v", err)
		}
		write(t, n.paths.Socket(), "") // of a daemon that died
		run(t, n.serveLocal)
		until(t, "the daemon answers", func() bool {
			_, err := local.Report(t.Context())
			return err == nil
		})
		if st, err := os.Stat(n.paths.Socket()); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("the socket's mode is %v, %v", st.Mode(), err)
		}
		r, err := local.Report(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if r.Name != "n1" || r.PID != os.Getpid() || r.Waiting != "starting" || len(r.Certs) != 5 || len(r.Children) != 2 {
			t.Errorf("report is %+v", r)
		}
		s, err := local.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if s.Health != Unknown || s.SeenBy != "n1" || s.Cluster != "shop" {
			t.Errorf("status is %+v", s)
		}
		// Nothing that needs etcd waits for it.
		for what, f := range map[string]func() error{
			"create token": func() error {
				_, err := local.CreateToken(t.Context(), TokenRequest{Role: cluster.RoleData})
				return err
			},
			"tokens":  func() error { _, err := local.Tokens(t.Context()); return err },
			"revoke":  func() error { return local.RevokeToken(t.Context(), "a/b") },
			"members": func() error { _, err := local.MemberList(t.Context()); return err },
			"renew":   func() error { return local.RenewCertificates(t.Context()) },
		} {
			if err := f(); !errors.Is(err, cluster.ErrUnavailable) || !strings.Contains(err.Error(), "not ready: starting") {
				t.Errorf("%s: %v", what, err)
			}
		}
		err = local.call(t.Context(), http.MethodPost, "/v1/tokens", map[string]string{"rolle": "data"}, nil)
		if !errors.Is(err, cluster.ErrBadRequest) || !strings.Contains(err.Error(), "rolle") {
			t.Errorf("an unknown field: %v", err)
		}
		if err := local.call(t.Context(), http.MethodGet, "/v2/status", nil, nil); err == nil || !strings.Contains(err.Error(), "404") {
			t.Errorf("an unknown path: %v", err)
		}
	})
}

// Over the network only the nodes of the roster may ask; anybody may say hello
// and try to join.
func TestRemoteAPI(t *testing.T) {
	n := opened(t)
	n.cfg.Ports.API = 0
	stranger := opened(t) // of another cluster
	mine := n.certs.ClientConfig(nil)
	admin, err := pki.NewReloader(n.pki, pki.RoleAdmin, discardLog())
	if err != nil {
		t.Fatal(err)
	}
	pin, err := n.pki.CACert()
	if err != nil {
		t.Fatal(err)
	}
	hash, err := pki.PinOf(pin)
	if err != nil {
		t.Fatal(err)
	}
	pinned := func(certs func(*tls.CertificateRequestInfo) (*tls.Certificate, error)) *tls.Config {
		c := pki.PinnedConfig(hash, n.state.ClusterID, nil)
		c.GetClientCertificate = certs
		return c
	}
	h := n.peersOnly(func(w http.ResponseWriter, r *http.Request) { reply(w, "secret", nil) })
	l, err := tls.Listen("tcp", "127.0.0.1:0", n.certs.ServerConfig(tls.VerifyClientCertIfGiven))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.Handle("GET /v1/node", h)
	mux.Handle("GET "+cluster.PathHello, n.joinHandler())
	run(t, func(ctx context.Context) error { return serveHTTP(ctx, l, mux, discardLog()) })

	for _, tc := range []struct {
		name    string
		conf    *tls.Config
		members []cluster.Member
		want    string // part of the error; "" = it is answered
	}{
		{"a member", pinned(mine.GetClientCertificate), roster(), ""},
		{"a member, before the roster is read", pinned(mine.GetClientCertificate), nil, ""},
		{"a host that was replaced by another of its name", pinned(mine.GetClientCertificate), joinedAgain(time.Hour), "this host was replaced"},
		{"a host whose clock was behind when it joined", pinned(mine.GetClientCertificate), joinedAgain(time.Minute), ""},
		{"a node that was removed", pinned(mine.GetClientCertificate), roster()[1:], `node \"n1\" is not a member`},
		{"no certificate", pinned(nil), roster(), "needs the certificate of a node"},
		{"the operator's certificate", pinned(admin.ClientConfig(nil).GetClientCertificate), roster(), "not of a node"},
		{"another cluster's node", pinned(stranger.certs.ClientConfig(nil).GetClientCertificate), roster(), "bad certificate"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.remember(world{Members: tc.members})
			c := &http.Client{Transport: &http.Transport{TLSClientConfig: tc.conf, DisableKeepAlives: true}}
			var got string
			err := callAPI(t.Context(), c, http.MethodGet, "https://"+l.Addr().String()+"/v1/node", nil, &got)
			switch {
			case tc.want == "" && (err != nil || got != "secret"):
				t.Errorf("answer %q, %v", got, err)
			case tc.want != "" && (err == nil || got != ""):
				t.Errorf("answer %q, %v", got, err)
			case tc.want == "bad certificate":
				// What TLS says depends on who notices first.
			case tc.want != "" && !strings.Contains(err.Error(), strings.ReplaceAll(tc.want, `\`, "")):
				t.Errorf("error %q does not say %q", err, tc.want)
			}
		})
	}
	t.Run("hello without etcd", func(t *testing.T) {
		c := &http.Client{Transport: &http.Transport{TLSClientConfig: pinned(nil), DisableKeepAlives: true}}
		err := callAPI(t.Context(), c, http.MethodGet, "https://"+l.Addr().String()+cluster.PathHello, nil, nil)
		if !errors.Is(err, cluster.ErrUnavailable) {
			t.Errorf("error %v", err)
		}
	})
}

// joinedAgain is the roster with an n1 that has joined a while from now.
func joinedAgain(d time.Duration) []cluster.Member {
	out := slices.Clone(roster())
	out[0].JoinedAt = time.Now().Add(d)
	return out
}

func TestIsPeer(t *testing.T) {
	n := &Node{state: State{ClusterID: "here"}}
	for _, tc := range []struct {
		id   pki.Identity
		want string
	}{
		{pki.Identity{ClusterID: "here", Node: "n2", Role: pki.RoleNode}, ""},
		{pki.Identity{ClusterID: "there", Node: "n2", Role: pki.RoleNode}, "of cluster there, this is cluster here"},
		{pki.Identity{ClusterID: "here", Node: "n2", Role: pki.RolePatroni}, "of role patroni"},
	} {
		err := n.isPeer(tc.id)
		if (tc.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.want) {
			t.Errorf("isPeer(%v) = %v, want %q", tc.id, err, tc.want)
		}
	}
}

// asFounder is the roster with the addresses that the certificates were made for.
func asFounder(n *Node) world {
	return world{Members: []cluster.Member{n.self()}, Settings: testSettings}
}

func TestDueCertificates(t *testing.T) {
	n := opened(t)
	w := asFounder(n)
	now := time.Now()
	roles := func(w world, now time.Time) (out []pki.Role) {
		t.Helper()
		due, err := n.dueCertificates(w, now)
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range cluster.RoleData.Roles() {
			if why, ok := due[r]; ok && why != "" {
				out = append(out, r)
			}
		}
		return out
	}
	if got := roles(w, now); got != nil {
		t.Errorf("fresh certificates are due: %v", got)
	}
	if got := roles(world{Members: roster()[1:]}, now.Add(pki.LeafLifetime)); got != nil {
		t.Errorf("a node that is not on the roster renews %v", got)
	}
	if diff := cmp.Diff(cluster.RoleData.Roles(), roles(w, now.Add(pki.LeafLifetime*2/3+time.Hour))); diff != "" {
		t.Errorf("due after two thirds of their life (-want +got):\n%s", diff)
	}
	// A new member belongs into PostgreSQL's certificate: clients reach it by any.
	w.Members = append(w.Members, cluster.Member{Name: "n2", Role: cluster.RoleData, Addr: netip.MustParseAddr("10.0.0.2"), Ports: cluster.DefaultPorts()})
	got := roles(w, now)
	if len(got) == 0 || len(got) == len(cluster.RoleData.Roles()) {
		t.Errorf("with a new member %v are due", got)
	}
}

func TestRenew(t *testing.T) {
	n := opened(t)
	n.remember(asFounder(n))
	before := map[pki.Role][]byte{}
	for _, r := range cluster.RoleData.Roles() {
		b, err := n.pki.Bundle(r)
		if err != nil {
			t.Fatal(err)
		}
		before[r] = b.Encode()
	}
	if err := n.renewNow(t.Context()); err != nil {
		t.Fatal(err)
	}
	for r, old := range before {
		b, err := n.pki.Bundle(r)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Equal(b.Encode(), old) {
			t.Errorf("%s was not renewed", r)
		}
	}
	if err := open(n.paths); err != nil {
		t.Errorf("open with the new certificates: %v", err)
	}
}

// A node without the CA's key asks the data nodes, and says which did not sign.
func TestRenewRemotely(t *testing.T) {
	n := opened(t)
	n.sealing = nil
	w := asFounder(n)
	w.Members = append(w.Members, cluster.Member{Name: "w", Role: cluster.RoleWitness, Addr: netip.MustParseAddr("127.0.0.1")})
	w.Members[0].Addr, w.Members[0].Ports.API = netip.MustParseAddr("127.0.0.1"), 1 // nobody listens there
	err := n.reissue(t.Context(), w, map[pki.Role]string{pki.RoleNode: "asked for"})
	if err == nil || !strings.Contains(err.Error(), "no data node signs") || !strings.Contains(err.Error(), "n1: ") || strings.Contains(err.Error(), "w: ") {
		t.Errorf("error %v", err)
	}
	if _, err := n.ca(); err == nil {
		t.Error("a witness opened the CA's key")
	}
}

// A second daemon would take the socket and the children of the first.
func TestOneDaemon(t *testing.T) {
	n := opened(t)
	unlock, err := lockDaemon(n.paths)
	if err != nil {
		t.Fatal(err)
	}
	err = n.Run(t.Context())
	if want := fmt.Sprintf("runs on this host already (pid %d)", os.Getpid()); err == nil || !strings.Contains(err.Error(), want) {
		t.Errorf("a second daemon: %v", err)
	}
	unlock()
	unlock, err = lockDaemon(n.paths)
	if err != nil {
		t.Fatalf("after the first: %v", err)
	}
	unlock()
}

// A node without etcd leaves the host as it is.
func TestReconcileKnowsNothing(t *testing.T) {
	n := opened(t)
	before := files(t, n.paths)
	n.reconcile(t.Context())
	if diff := cmp.Diff(before, files(t, n.paths)); diff != "" {
		t.Errorf("files (-before +after):\n%s", diff)
	}
	if len(n.problems) > 0 {
		t.Errorf("problems: %v", n.problems)
	}
}

// What needs etcd's client says so when the member has just ended.
func TestEtcdGone(t *testing.T) {
	n := opened(t)
	if _, err := n.etcdClient(); !errors.Is(err, cluster.ErrUnavailable) {
		t.Errorf("client: %v", err)
	}
	if err := n.found(t.Context()); !errors.Is(err, cluster.ErrUnavailable) {
		t.Errorf("found: %v", err)
	}
	if _, err := n.AddLearner(t.Context(), "https://10.0.0.2:2380"); err == nil {
		t.Error("a learner was added")
	}
	if err := n.beforePatroni(t.Context()); err == nil || !strings.Contains(err.Error(), "cannot be read yet") {
		t.Errorf("before Patroni: %v", err)
	}
}

func TestMarkFounded(t *testing.T) {
	n := opened(t)
	if !n.etcdConfig(nil).Bootstrap {
		t.Error("a founder does not begin the cluster")
	}
	for range 2 {
		if err := n.markFounded(); err != nil {
			t.Fatal(err)
		}
	}
	if s, err := LoadState(n.paths); err != nil || !s.Founded {
		t.Errorf("state is %+v, %v", s, err)
	}
	n.remember(world{Members: roster()})
	c := n.etcdConfig(nil)
	if c.Bootstrap {
		t.Error("a cluster that exists would be begun again")
	}
	want := map[string]string{"n1": "https://10.0.0.1:2380", "n2": "https://10.0.0.2:2380", "w": "https://10.0.0.3:2380"}
	if diff := cmp.Diff(want, c.InitialCluster); diff != "" {
		t.Errorf("whom a lost member asks (-want +got):\n%s", diff)
	}
	if len(n.state.InitialCluster) != 1 {
		t.Errorf("the state was changed: %v", n.state.InitialCluster)
	}
}

func TestAdmit(t *testing.T) {
	n := opened(t)
	n.remember(world{Members: roster()[:1:1]})
	before := n.snapshot()
	n.admit(roster()[1])
	n.admit(roster()[1])
	if got := len(n.snapshot().Members); got != 2 {
		t.Errorf("%d members, want 2", got)
	}
	if len(before.Members) != 1 {
		t.Error("an earlier snapshot has changed")
	}
	select {
	case <-n.kick:
	default:
		t.Error("the reconciler was not woken")
	}
}

// A round that has read the roster before a member was let in must not shut the
// firewall to it again.
func TestAdmitDuringARound(t *testing.T) {
	n := opened(t)
	old, x := world{Members: roster()[:1:1]}, roster()[1]
	names := func() (out []string) {
		for _, m := range n.snapshot().Members {
			out = append(out, m.Name)
		}
		return out
	}
	n.remember(old)
	n.admit(x)
	n.admit(x) // its join is repeated
	n.remember(old)
	if diff := cmp.Diff([]string{"n1", "n2"}, names()); diff != "" || len(old.Members) != 1 {
		t.Errorf("after a round that had not read it (-want +got):\n%s", diff)
	}
	n.remember(world{Members: roster()})
	if diff := cmp.Diff([]string{"n1", "n2", "w"}, names()); diff != "" {
		t.Errorf("after a round that had (-want +got):\n%s", diff)
	}
	n.remember(old)
	if diff := cmp.Diff([]string{"n1"}, names()); diff != "" {
		t.Errorf("once it has left (-want +got):\n%s", diff)
	}
	n.admit(x)
	n.admitted[x.Name] = admission{x, time.Now().Add(-time.Second)}
	n.remember(old)
	if diff := cmp.Diff([]string{"n1"}, names()); diff != "" || len(n.admitted) != 0 {
		t.Errorf("when no roster shows it (-want +got):\n%s", diff)
	}
}

// What fails because the daemon stops is no problem, in the log least of all.
func TestProblemWhileStopping(t *testing.T) {
	n := opened(t)
	ctx, cancel := context.WithCancel(t.Context())
	n.partProblem(ctx, "firewall", context.DeadlineExceeded)
	if len(n.problems) != 1 {
		t.Errorf("problems: %v", n.problems)
	}
	cancel()
	n.partProblem(ctx, "certificates", context.Canceled)
	if len(n.problems) != 1 {
		t.Errorf("problems after the end: %v", n.problems)
	}
}
