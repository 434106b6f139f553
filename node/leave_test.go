package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/pki"
)

// leaving is a node, n1, whose etcd has three voters that all run here. n4 is a
// learner that has never started.
type leaving struct {
	t       *testing.T
	n       *Node
	servers map[string]*embedded.Server
}

func newLeaving(t *testing.T) leaving {
	t.Helper()
	before := goleak.IgnoreCurrent()
	t.Cleanup(func() { // connections to members that have stopped take seconds to notice
		until(t, "etcd is gone", func() bool { return goleak.Find(before) == nil })
	})
	n := opened(t)
	n.cfg.Address = netip.MustParseAddr("127.0.0.1")
	l := leaving{t, n, map[string]*embedded.Server{}}
	initial := map[string]string{}
	ctx := l.long()
	for _, name := range []string{"n1", "n2", "n3"} {
		m := l.member(name)
		if name != "n1" {
			_, _, err := l.servers["n1"].AddLearner(ctx, m.PeerURL())
			l.must(err)
		}
		bundle := n.pki.BundlePath(pki.RoleNode)
		srv, err := embedded.Start(ctx, embedded.Config{
			Name: name, DataDir: filepath.Join(t.TempDir(), "etcd"), PeerURL: m.PeerURL(),
			CertFile: bundle, KeyFile: bundle, CAFile: n.pki.CAPath(), Token: n.state.ClusterID,
			InitialCluster: initial, Bootstrap: name == "n1", WALSegmentBytes: 1 << 20, Log: discardLog(),
		})
		l.must(err)
		t.Cleanup(srv.Stop)
		l.servers[name] = srv
		initial[name] = m.PeerURL()
		l.must(srv.WaitReady(ctx)) // the next one may ask this one who is there
		if name == "n1" {
			n.etcd.Store(srv)
			n.store.Store(cluster.NewStore(srv.Client(), n.state.ClusterID))
			n.cfg.Ports = m.Ports
			l.must(n.found(ctx))
		} else {
			l.must(n.store.Load().PutMember(ctx, m))
		}
	}
	for _, name := range []string{"n2", "n3"} {
		l.must(l.servers["n1"].Promote(ctx, l.id(name)))
	}
	m := l.member("n4")
	_, _, err := l.servers["n1"].AddLearner(ctx, m.PeerURL())
	l.must(err)
	l.must(n.store.Load().PutMember(ctx, m))
	return l
}

func (l leaving) long() context.Context {
	ctx, cancel := context.WithTimeout(l.t.Context(), 2*time.Minute)
	l.t.Cleanup(cancel)
	return ctx
}

func (l leaving) must(err error) {
	l.t.Helper()
	if err != nil {
		l.t.Fatal(err)
	}
}

// member is the roster's entry of a node on a free port.
func (l leaving) member(name string) cluster.Member {
	l.t.Helper()
	m := l.n.self()
	m.Name, m.Ports = name, cluster.DefaultPorts()
	sock, err := net.Listen("tcp", "127.0.0.1:0")
	l.must(err)
	defer sock.Close()
	m.Ports.EtcdPeer = uint16(sock.Addr().(*net.TCPAddr).Port)
	return m
}

// id is the etcd member of a node that runs.
func (l leaving) id(name string) uint64 {
	l.t.Helper()
	st, err := l.servers[name].Status(l.long())
	l.must(err)
	return st.MemberID
}

// answers makes n1 see that nodes answer.
func (l leaving) answers(names ...string) {
	l.n.seen.mu.Lock()
	defer l.n.seen.mu.Unlock()
	clear(l.n.seen.last)
	for _, name := range names {
		// For the rest of the test: nobody asks here again.
		l.n.seen.last[name] = Report{At: time.Now().Add(time.Hour), Etcd: EtcdReport{MemberID: l.id(name)}}
	}
}

// known lists whom etcd and the roster have, learners with a question mark.
func (l leaving) known() string {
	l.t.Helper()
	roster, _, err := l.n.store.Load().Members(l.long())
	l.must(err)
	st, err := l.servers["n1"].Status(l.long())
	l.must(err)
	var entries, members []string
	for _, m := range roster {
		entries = append(entries, m.Name)
		for _, e := range st.Members {
			switch {
			case e.PeerURL != m.PeerURL():
			case e.Learner:
				members = append(members, m.Name+"?")
			default:
				members = append(members, m.Name)
			}
		}
	}
	if len(members) != len(st.Members) {
		l.t.Errorf("etcd has %d members, %v of them are on the roster", len(st.Members), members)
	}
	return strings.Join(entries, " ") + ", etcd " + strings.Join(members, " ")
}

func TestTakeOut(t *testing.T) {
	l := newLeaving(t)
	const all = "n1 n2 n3 n4, etcd n1 n2 n3 n4?"
	refused := func(name string, id uint64, want string) {
		t.Helper()
		err := l.n.takeOut(l.long(), departure{name: name, member: id})
		if !errors.Is(err, cluster.ErrConflict) || !strings.Contains(err.Error(), want) {
			t.Errorf("take out %s: %v, want %q", name, err, want)
		}
		if got := l.known(); got != all {
			t.Errorf("a refusal has left %q", got)
		}
	}
	l.answers("n2", "n3")
	refused("n1", 0, "another member has to")
	refused("n2", l.id("n3"), "it has joined anew")
	l.n.leaving.Store(true)
	refused("n2", 0, "another member has to")
	l.n.leaving.Store(false)
	l.answers("n2") // and n3 is away
	refused("n2", l.id("n2"), "only 2 of 3 voters answer")
	l.answers()
	refused("n2", l.id("n2"), "only 1 of 3 voters answer")

	// A learner is of no account for the quorum.
	for range 2 { // repeatable
		l.must(l.n.takeOut(l.long(), departure{name: "n4"}))
	}
	if got, want := l.known(), "n1 n2 n3, etcd n1 n2 n3"; got != want {
		t.Errorf("without n4: %q, want %q", got, want)
	}
	lock := func(node string) {
		t.Helper()
		_, err := l.servers["n1"].Client().Put(l.long(), l.n.operationKey(), `{"kind":"leave","node":"`+node+`"}`)
		l.must(err)
	}
	locked := func() bool {
		t.Helper()
		r, err := l.servers["n1"].Client().Get(l.long(), l.n.operationKey())
		l.must(err)
		return len(r.Kvs) > 0
	}
	lock("n2")
	// A leader that leaves hands over first; a member that does not answer may
	// be taken out as long as the rest does.
	id := l.id("n2")
	l.must(l.servers["n1"].MoveLeader(l.long(), id))
	l.answers("n3")
	for range 2 {
		l.must(l.n.takeOut(l.long(), departure{name: "n2", member: id, by: "root@n1", why: "a test"}))
	}
	if got, want := l.known(), "n1 n3, etcd n1 n3"; got != want {
		t.Errorf("without n2: %q, want %q", got, want)
	}
	<-l.servers["n2"].Done()
	if err := l.servers["n2"].Err(); !errors.Is(err, embedded.ErrRemoved) {
		t.Errorf("n2 has ended with %v", err)
	}
	if st, err := l.servers["n1"].Status(l.long()); err != nil || !st.IsLeader {
		t.Errorf("n1 does not lead etcd: %+v, %v", st, err)
	}

	if locked() {
		t.Error("nobody could end the lock of n2's operation any more")
	}
	lock("n1")
	// It is remembered as what it was, once, and what it could come back with is gone.
	former, err := l.n.store.Load().Former(l.long())
	l.must(err)
	if len(former) != 2 || former[0].Name != "n2" || former[0].MemberID != id || former[0].By != "root@n1" || former[0].Why != "a test" || former[1].Name != "n4" {
		t.Errorf("the former members are %+v", former)
	}
	for _, tc := range []struct {
		name    string
		id      uint64
		removed bool
	}{{"n2", id, true}, {"n2", 0, true}, {"n3", l.id("n3"), false}, {"n3", 0, false}, {"gone", 7, true}} {
		st, err := l.n.standing(l.long(), tc.name, tc.id)
		l.must(err)
		if removed := st.Removed != nil; removed != tc.removed {
			t.Errorf("%s with member %x was removed: %t, want %t", tc.name, tc.id, removed, tc.removed)
		}
	}

	// Half of the work was done by a member that died.
	id = l.id("n3")
	l.must(l.servers["n1"].Remove(l.long(), id))
	l.must(l.n.takeOut(l.long(), departure{name: "n3", member: id, by: "root@n1", why: "a test"}))
	if got, want := l.known(), "n1, etcd n1"; got != want {
		t.Errorf("without n3: %q, want %q", got, want)
	}
	if !locked() {
		t.Error("an operation of n1 has lost its lock")
	}
}

// Whom the certificate names is taken out, and nobody else.
func TestMemberLeaveAPI(t *testing.T) {
	l := newLeaving(t)
	ca, err := l.n.ca()
	l.must(err)
	as := func(name string, role pki.Role) *http.Client {
		t.Helper()
		key, csr, err := pki.NewKeyAndCSR(string(role))
		l.must(err)
		m := l.member(name)
		cert, err := ca.Sign(csr, cluster.LeafSpecs(l.n.identity(), m, nil, testSettings)[role], time.Now())
		l.must(err)
		pair, err := tls.X509KeyPair(cert, key)
		l.must(err)
		conf := l.n.certs.ClientConfig(l.n.isPeer)
		conf.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &pair, nil }
		return &http.Client{Transport: &http.Transport{TLSClientConfig: conf, DisableKeepAlives: true}}
	}
	stranger := as("n2", pki.RoleNode)
	stranger.Transport.(*http.Transport).TLSClientConfig.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &tls.Certificate{}, nil }

	sock, err := net.Listen("tcp", "127.0.0.1:0")
	l.must(err)
	addr := sock.Addr().String()
	sock.Close()
	l.n.cfg.Ports.API = netip.MustParseAddrPort(addr).Port()
	run(t, l.n.serveRemote)
	until(t, "the API serves", func() bool {
		conn, err := net.Dial("tcp", addr)
		if err == nil {
			conn.Close()
		}
		return err == nil
	})
	l.answers("n2", "n3")
	ask := func(c *http.Client, in any) error {
		return callAPI(l.long(), c, http.MethodPost, "https://"+addr+pathMemberLeave, in, nil)
	}
	n2 := MemberLeave{MemberID: l.id("n2")}
	for _, tc := range []struct {
		name string
		c    *http.Client
		in   any
		want error
		says string
	}{
		{"no etcd member", as("n2", pki.RoleNode), MemberLeave{}, cluster.ErrBadRequest, "must name its etcd member"},
		{"no certificate", stranger, n2, cluster.ErrNoMember, "needs the certificate of a node"},
		{"the operator's certificate", as("n2", pki.RoleAdmin), n2, cluster.ErrNoMember, "not of a node"},
		{"another node's member", as("n3", pki.RoleNode), n2, cluster.ErrConflict, "joined anew"},
		{"a name in the question", as("n3", pki.RoleNode), map[string]string{"name": "n2"}, cluster.ErrBadRequest, "name"},
		{"the one that is asked", as("n1", pki.RoleNode), n2, cluster.ErrConflict, "another member has to"},
	} {
		if err := ask(tc.c, tc.in); !errors.Is(err, tc.want) || !strings.Contains(err.Error(), tc.says) {
			t.Errorf("%s: %v, want %q", tc.name, err, tc.says)
		}
	}
	if got, want := l.known(), "n1 n2 n3 n4, etcd n1 n2 n3 n4?"; got != want {
		t.Fatalf("refusals have left %q", got)
	}
	for _, what := range []string{"the question", "the question, whose answer was lost, on no roster any more"} {
		if err := ask(as("n2", pki.RoleNode), n2); err != nil {
			t.Errorf("%s: %v", what, err)
		}
		if got, want := l.known(), "n1 n3 n4, etcd n1 n3 n4?"; got != want {
			t.Errorf("%s has left %q, want %q", what, got, want)
		}
		l.n.remember(world{Members: []cluster.Member{l.n.self()}})
	}
}

// helper is a remaining member that answers the questions of askOut.
func helper(t *testing.T, n *Node, name string, answer func(MemberLeave) error) cluster.Member {
	t.Helper()
	sock, err := tls.Listen("tcp", "127.0.0.1:0", n.certs.ServerConfig(tls.RequireAndVerifyClientCert))
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST "+pathMemberLeave, func(w http.ResponseWriter, r *http.Request) {
		var req MemberLeave
		if err := decode(w, r, &req); err != nil {
			t.Error(err)
		}
		reply(w, struct{}{}, answer(req))
	})
	run(t, func(ctx context.Context) error { return serveHTTP(ctx, sock, mux, discardLog()) })
	at := netip.MustParseAddrPort(sock.Addr().String())
	m := cluster.Member{Name: name, Addr: at.Addr()}
	m.Ports.API = at.Port()
	return m
}

func TestAskOut(t *testing.T) {
	n := opened(t)
	var asked, fail atomic.Int32 // questions so far; which of them fail
	answer := func(req MemberLeave) error {
		if req.MemberID != 7 || req.By != "root@n1" || req.Why != "it has left" {
			t.Errorf("%+v leaves", req)
		}
		if asked.Add(1) <= fail.Load() {
			return fmt.Errorf("not now")
		}
		return nil
	}
	dead := cluster.Member{Name: "dead", Addr: netip.MustParseAddr("127.0.0.1")}
	dead.Ports.API = 1 // nobody listens there
	whom := []cluster.Member{dead, helper(t, n, "a", answer), helper(t, n, "b", answer)}
	never, ever := func() bool { return false }, func() bool { return true }
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	for _, tc := range []struct {
		name    string
		ctx     context.Context
		whom    []cluster.Member
		fail    int32
		removed func() bool
		asked   int32
		want    string // "" = it has left
	}{
		{"the first that answers", t.Context(), whom, 0, never, 1, ""},
		{"the next one", t.Context(), whom, 1, never, 2, ""},
		{"again", t.Context(), whom, 3, never, 4, ""},
		{"removed, but its entry may be there", t.Context(), whom, 3, ever, 4, ""},
		{"removed, and nobody answers", t.Context(), whom[:1], 0, ever, 0, ""},
		{"removed, and no time left", ended, whom, 0, ever, 0, ""},
		{"no time left", ended, whom, 0, never, 0, "no other member has taken this node out: dead: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			asked.Store(0)
			fail.Store(tc.fail)
			err := n.askOut(tc.ctx, tc.whom, MemberLeave{MemberID: 7, By: "root@n1", Why: "it has left"}, tc.removed)
			if tc.want == "" && err != nil || tc.want != "" && (!errors.Is(err, cluster.ErrUnavailable) || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if got := asked.Load(); got != tc.asked {
				t.Errorf("%d questions, want %d", got, tc.asked)
			}
		})
	}
	n.seen.client.CloseIdleConnections()
}

func TestWhomToAsk(t *testing.T) {
	var members []cluster.Member
	for _, name := range []string{"dead", "learner", "self", "voter", "leader", "joining"} {
		members = append(members, cluster.Member{Name: name})
	}
	var got []string
	for _, m := range whomToAsk("self", members, []MemberStatus{
		{Name: "self", Etcd: etcdVoter, Reachable: true},
		{Name: "dead", Etcd: etcdVoter, EtcdLeader: true},
		{Name: "learner", Etcd: etcdLearner, Reachable: true},
		{Name: "voter", Etcd: etcdVoter, Reachable: true},
		{Name: "leader", Etcd: etcdVoter, EtcdLeader: true, Reachable: true},
	}) {
		got = append(got, m.Name)
	}
	if diff := cmp.Diff([]string{"leader", "voter", "learner", "dead", "joining"}, got); diff != "" {
		t.Errorf("in this order (-want +got):\n%s", diff)
	}
}
