package cluster

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"pgha/pki"
)

func TestJoinData(t *testing.T) {
	s := newSite(t)
	tok := s.token(t, TokenSpec{Role: RoleData})
	req := request(t, "node2", RoleData, 2)
	req.SANs = []string{"lb2.example.com"}
	var hello Hello
	resp, err := Join(testContext(t), tok, func(h Hello) (JoinRequest, error) {
		hello = h
		return req, nil
	}, oneRound)
	if err != nil {
		t.Fatal(err)
	}
	if hello.ClusterID != s.id.ID || hello.ClusterName != "shop" || hello.Version != "1.2.0" || hello.PGMajor != 15 || hello.Node != "node1" || !hello.Signs {
		t.Errorf("hello %+v", hello)
	}
	if resp.Identity != s.id || resp.Secrets == nil || *resp.Secrets != s.secrets {
		t.Error("identity or secrets differ")
	}
	key := must[SealingKey](t)(SealingKeyFrom(resp.ClusterKey))
	caKey := must[[]byte](t)(OpenCAKey(key, resp.ID, resp.SealedCAKey))
	if _, err := pki.LoadCA(resp.CAPEM, caKey); err != nil {
		t.Errorf("the new node cannot sign: %v", err)
	}
	want := map[string]string{"node1": s.self.PeerURL(), "node2": "https://10.0.0.2:2380"}
	if d := cmp.Diff(want, resp.InitialCluster); d != "" {
		t.Errorf("initial cluster:\n%s", d)
	}
	hash := must[string](t)(CSRHash(req.CSRs))
	ms, _, err := s.store.Members(testContext(t))
	if err != nil || len(ms) != 2 || ms[1].State != StateJoining || ms[1].TokenID != tok.ID || ms[1].CSRHash != hash {
		t.Errorf("roster %+v, %v", ms, err)
	}
	if d := cmp.Diff(ms, resp.Members, cmpOpts); d != "" {
		t.Errorf("roster in the answer:\n%s", d)
	}
	if !slices.Equal(s.opened, []string{"node2"}) {
		t.Errorf("the firewall was opened for %v", s.opened)
	}
	infos, err := s.store.Tokens(testContext(t))
	if err != nil || infos[0].State != TokenUsed || !slices.Equal(infos[0].UsedBy, []string{"node2"}) || infos[0].UsesLeft != 0 {
		t.Errorf("token %+v, %v", infos, err)
	}
	specs := LeafSpecs(s.id, ms[1], ms, Settings{Profile: "fast"})
	if len(resp.Certs) != 5 {
		t.Errorf("%d certificates", len(resp.Certs))
	}
	for role, certPEM := range resp.Certs {
		checkCert(t, certPEM, specs[role])
	}
	for what, secret := range map[string]string{"token": tok.Secret, "password": s.secrets.PatroniREST} {
		if strings.Contains(s.logs.String(), secret) {
			t.Errorf("the log holds a %s", what)
		}
	}
	if !strings.Contains(s.logs.String(), "node2") {
		t.Error("the join was not logged")
	}
}

// checkCert compares a certificate with what it must say, and no more.
func checkCert(t *testing.T, certPEM []byte, spec pki.LeafSpec) {
	t.Helper()
	b, _ := pem.Decode(certPEM)
	if b == nil {
		t.Fatal("no PEM")
	}
	c := must[*x509.Certificate](t)(x509.ParseCertificate(b.Bytes))
	id := must[pki.Identity](t)(pki.IdentityOf(c))
	if id != spec.Identity || c.Subject.CommonName != spec.CommonName {
		t.Errorf("certificate of %s, CN %q; want %s, %q", id, c.Subject.CommonName, spec.Identity, spec.CommonName)
	}
	var ips []string
	for _, ip := range c.IPAddresses {
		ips = append(ips, ip.String())
	}
	var want []string
	for _, ip := range spec.IPs {
		want = append(want, ip.String())
	}
	slices.Sort(ips)
	slices.Sort(want)
	if !slices.Equal(ips, want) || !slices.Equal(slices.Sorted(slices.Values(c.DNSNames)), spec.DNSNames) {
		t.Errorf("%s is valid for %v %v, want %v %v", id.Role, c.DNSNames, ips, spec.DNSNames, want)
	}
}

func TestJoinWitnessLearnsNoSecret(t *testing.T) {
	s := newSite(t)
	tok := s.token(t, TokenSpec{Role: RoleWitness})
	resp, err := join(t, tok, request(t, "w", RoleWitness, 3))
	if err != nil {
		t.Fatal(err)
	}
	if resp.Secrets != nil || resp.SealedCAKey != nil || resp.ClusterKey != nil {
		t.Error("a witness was given secrets")
	}
	if len(resp.Certs) != 1 || resp.Certs[pki.RoleNode] == nil {
		t.Errorf("a witness was given %d certificates", len(resp.Certs))
	}
	if resp.InitialCluster["w"] != "https://10.0.0.3:2380" || len(resp.Members) != 2 {
		t.Errorf("answer %v, %v", resp.InitialCluster, resp.Members)
	}
}

func TestJoinRefusedChangesNothing(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	ok := TokenSpec{Role: RoleData}
	for _, c := range []struct {
		name string
		spec TokenSpec
		do   func(t *testing.T, tok *Token, req *JoinRequest)
		want error
		says string
	}{
		{"unknown token", ok, func(_ *testing.T, tok *Token, _ *JoinRequest) { tok.ID = "0000000000000000" }, ErrTokenUnknown, "does not know this token"},
		{"token id that is a path", ok, func(_ *testing.T, tok *Token, _ *JoinRequest) { tok.ID = "../config" }, ErrTokenUnknown, ""},
		{"revoked token", ok, func(t *testing.T, tok *Token, _ *JoinRequest) {
			if err := s.store.RevokeToken(ctx, tok.ID); err != nil {
				t.Fatal(err)
			}
		}, ErrTokenRevoked, "revoked"},
		{"expired token", TokenSpec{Role: RoleData, TTL: time.Minute}, func(t *testing.T, _ *Token, req *JoinRequest) {
			t.Cleanup(func() { s.setNow(time.Now) })
			s.setNow(func() time.Time { return time.Now().Add(2 * time.Minute) })
		}, ErrTokenExpired, "expired at"},
		{"token of the other role", TokenSpec{Role: RoleWitness}, func(*testing.T, *Token, *JoinRequest) {}, ErrTokenRole, "for a witness"},
		{"token of another name", TokenSpec{Role: RoleData, Name: "node9"}, func(*testing.T, *Token, *JoinRequest) {}, ErrTokenName, "node9"},
		{"name taken", ok, func(_ *testing.T, _ *Token, req *JoinRequest) { req.Name = "node1" }, ErrNameTaken, "node1 already"},
		{"address taken", ok, func(_ *testing.T, _ *Token, req *JoinRequest) { req.Addr = s.self.Addr }, ErrAddressTaken, "node1 has the address"},
		{"bad name", ok, func(_ *testing.T, _ *Token, req *JoinRequest) { req.Name = "Node-2" }, ErrBadRequest, "a-z, 0-9 and _"},
		{"certificate that the role does not have", TokenSpec{Role: RoleWitness}, func(t *testing.T, _ *Token, req *JoinRequest) {
			req.Role, req.PGMajor = RoleWitness, 0
		}, ErrBadRequest, "a witness node gets no certificate"},
		{"request signed by another key", ok, func(t *testing.T, _ *Token, req *JoinRequest) {
			req.CSRs[pki.RoleAdmin] = breakSignature(t, req.CSRs[pki.RoleAdmin])
		}, ErrBadRequest, `"admin"`},
		{"other PostgreSQL", ok, func(_ *testing.T, _ *Token, req *JoinRequest) { req.PGMajor = 17 }, ErrPGMajor, "PostgreSQL 15"},
		{"other version", ok, func(_ *testing.T, _ *Token, req *JoinRequest) { req.Version = "3.0.0" }, ErrVersion, "same version"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.srv.fails = failures{}
			tok, req := s.token(t, c.spec), request(t, "node2", RoleData, 2)
			c.do(t, &tok, &req)
			before := dump(t)
			now := *s.now.Load()
			_, err := Join(ctx, tok, func(Hello) (JoinRequest, error) { return req, nil }, JoinOptions{RetryFor: -1, Now: now})
			if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %s %q", err, c.want, c.says)
			}
			sameDump(t, before)
		})
	}
	if s.members.adds != 0 || len(s.opened) != 0 {
		t.Errorf("%d members added, firewall opened for %v", s.members.adds, s.opened)
	}
}

func TestJoinClocksApart(t *testing.T) {
	s := newSite(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	before := dump(t)
	for _, off := range []time.Duration{-time.Hour, time.Hour} {
		asked := false
		_, err := Join(testContext(t), tok, func(Hello) (JoinRequest, error) {
			asked = true
			return req, nil
		}, JoinOptions{RetryFor: -1, Now: func() time.Time { return time.Now().Add(off) }})
		if !errors.Is(err, ErrClocksApart) || !strings.Contains(err.Error(), "on node1 it is") || !strings.Contains(err.Error(), "on this node it is") {
			t.Errorf("clock off by %s: %v", off, err)
		}
		if asked {
			t.Error("keys were made although the clocks are apart")
		}
	}
	if n := s.posts.Load(); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
	// The server checks for itself as well.
	req.TokenID, req.Secret, req.Time = tok.ID, tok.Secret, time.Now().Add(time.Minute)
	if _, err := s.srv.Join(testContext(t), netip.Addr{}, req); !errors.Is(err, ErrClocksApart) {
		t.Errorf("server: %v", err)
	}
	sameDump(t, before)
}

func TestJoinManInTheMiddle(t *testing.T) {
	s := newSite(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	before := dump(t)
	evil := *s.fixture
	built := false
	build := func(Hello) (JoinRequest, error) {
		built = true
		return req, nil
	}
	// Another CA for the same cluster; another CA with the true CA's certificate
	// behind a leaf that it did not sign; a CA of another cluster with its pin.
	evil.ca = must[*pki.CA](t)(pki.NewCA(s.id.ID, s.id.Name, time.Now()))
	forged := nodeCert(t, &evil, s.self)
	trueCA, _ := pem.Decode(s.ca.CertPEM())
	for name, cert := range map[string]tls.Certificate{
		"other CA":    forged,
		"borrowed CA": {Certificate: [][]byte{forged.Certificate[0], trueCA.Bytes}, PrivateKey: forged.PrivateKey},
	} {
		var seen atomic.Int32
		ts := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { seen.Add(1) }))
		ts.TLS = &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS12}
		ts.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
		ts.StartTLS()
		tok := tok
		tok.Addrs = []string{ts.Listener.Addr().String()}
		_, err := Join(testContext(t), tok, build, oneRound)
		if !errors.Is(err, ErrPinMismatch) || !strings.Contains(err.Error(), "someone in the middle") {
			t.Errorf("%s: %v", name, err)
		}
		ts.Close()
		if seen.Load() != 0 {
			t.Errorf("%s: %d requests reached the man in the middle", name, seen.Load())
		}
	}
	other := tok
	other.ClusterID = "6f1e7bde-0d3c-4b8e-9d0b-3f7a3d1f1a11"
	if _, err := Join(testContext(t), other, build, oneRound); !errors.Is(err, ErrOtherCluster) || !strings.Contains(err.Error(), s.id.ID) {
		t.Errorf("token of another cluster: %v", err)
	}
	if built || s.posts.Load() != 0 {
		t.Error("a request was made")
	}
	sameDump(t, before)
}

func TestJoinTriesEveryAddress(t *testing.T) {
	s := newSite(t)
	closed := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	dead := closed.Addr().String()
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)

	alone := tok
	alone.Addrs = []string{dead, "127.0.0.1:1"}
	_, err := join(t, alone, req)
	if !errors.Is(err, ErrUnreachable) || !strings.Contains(err.Error(), dead+": ") || !strings.Contains(err.Error(), "127.0.0.1:1: ") || !strings.Contains(err.Error(), "refused") {
		t.Errorf("unreachable: %v, want each address with its cause", err)
	}
	// A witness can be reached, but cannot sign: the secret is not sent to it.
	witness := &Server{Store: s.store, Identity: s.id, Node: "w", Version: "1.2.0", Membership: s.members}
	var wPosts atomic.Int32
	wAddr := serve(t, s.fixture, witness, &wPosts)
	alone.Addrs = []string{wAddr}
	if _, err := join(t, alone, req); !errors.Is(err, ErrCannotSign) {
		t.Errorf("witness alone: %v", err)
	}
	tok.Addrs = []string{dead, wAddr, s.addr}
	if _, err := join(t, tok, req); err != nil {
		t.Errorf("third address: %v", err)
	}
	if wPosts.Load() != 0 {
		t.Error("a witness was sent the token")
	}
	if _, err := witness.Join(testContext(t), netip.Addr{}, req); !errors.Is(err, ErrCannotSign) {
		t.Errorf("a witness that is asked nevertheless: %v", err)
	}
}

func TestJoinErrorOfBuildComesBack(t *testing.T) {
	s := newSite(t)
	mine := errors.New("no PostgreSQL here")
	_, err := Join(testContext(t), s.token(t, TokenSpec{Role: RoleData}), func(Hello) (JoinRequest, error) { return JoinRequest{}, mine }, oneRound)
	if !errors.Is(err, mine) {
		t.Errorf("got %v", err)
	}
}

func TestJoinRepeat(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	s.members.fail = func() error { return errors.New("etcdserver: too many learner members") }
	_, err := join(t, tok, req)
	if !errors.Is(err, ErrMembership) || !strings.Contains(err.Error(), "too many learner members") || !strings.Contains(err.Error(), "repeat the same command") {
		t.Fatalf("etcd refuses: %v", err)
	}
	// Another machine cannot take the token over, nor the name.
	if _, err := join(t, tok, request(t, "node3", RoleData, 3)); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("another node with the used token: %v", err)
	}
	if _, err := join(t, tok, request(t, "node2", RoleData, 2)); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("the same name with other keys: %v", err)
	}
	s.members.fail = nil
	first, err := join(t, tok, req)
	if err != nil {
		t.Fatalf("repeat after the failure: %v", err)
	}
	again, err := join(t, tok, req)
	if err != nil {
		t.Fatalf("repeat after the success: %v", err)
	}
	ignore := cmp.FilterPath(func(p cmp.Path) bool { return p.Last().String() == ".JoinedAt" }, cmp.Ignore())
	if !cmp.Equal(first.Members, again.Members, cmpOpts, ignore) || !cmp.Equal(first.InitialCluster, again.InitialCluster) || !bytes.Equal(first.ClusterKey, again.ClusterKey) {
		t.Error("the repeated answer differs")
	}
	if len(again.Members) != 2 || len(s.members.urls) != 2 {
		t.Errorf("%d in the roster, %d in etcd; want 2 and 2", len(again.Members), len(s.members.urls))
	}
	// A repeat by a finished member changes nothing any more.
	if err := s.store.UpdateMember(ctx, "node2", func(m *Member) error { m.State = StateMember; return nil }); err != nil {
		t.Fatal(err)
	}
	before := dump(t)
	if _, err := join(t, tok, req); err != nil {
		t.Errorf("repeat by a member: %v", err)
	}
	sameDump(t, before)
	// A removed member does not come back by its old token.
	if err := s.store.RemoveMember(ctx, "node2"); err != nil {
		t.Fatal(err)
	}
	if _, err := join(t, tok, req); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("a removed member came back: %v", err)
	}
}

func TestJoinWaitsWhileEtcdCannotTakeIt(t *testing.T) {
	s := newSite(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	left := 2
	s.members.fail = func() error {
		if left--; left >= 0 {
			return errors.New("too many learners")
		}
		return nil
	}
	var told []string
	built := 0
	_, err := Join(testContext(t), tok, func(Hello) (JoinRequest, error) {
		built++
		return req, nil
	}, JoinOptions{RetryFor: time.Minute, RetryEvery: time.Millisecond, Progress: func(m string) { told = append(told, m) }})
	if err != nil || built != 1 || len(told) != 2 || !strings.Contains(told[0], "too many learners") {
		t.Errorf("%v, built %d times, told %q", err, built, told)
	}
}

func TestAbandonedJoinFreesTheName(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	s.members.fail = func() error { return errors.New("down") }
	if _, err := join(t, tok, req); !errors.Is(err, ErrMembership) {
		t.Fatal(err)
	}
	gone, err := s.store.AbandonedJoins(ctx, time.Now().Add(AbandonAfter+time.Minute))
	if err != nil || len(gone) != 1 {
		t.Fatalf("abandoned %v, %v", gone, err)
	}
	s.members.fail = nil
	if err := s.store.DropAbandoned(ctx, gone[0]); err != nil {
		t.Fatal(err)
	}
	if _, err := join(t, tok, req); !errors.Is(err, ErrTokenUsed) {
		t.Errorf("the swept join went on: %v", err)
	}
	if _, err := join(t, s.token(t, TokenSpec{Role: RoleData}), req); err != nil {
		t.Errorf("the name is not free: %v", err)
	}
}

// race runs n joins at once and returns how many were taken in; the others
// must have been refused with one of the codes.
func race(t *testing.T, n int, one func(i int) error, codes ...error) int {
	t.Helper()
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = one(i) })
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !slices.ContainsFunc(codes, func(c error) bool { return errors.Is(err, c) }) {
			t.Errorf("unexpected refusal: %v", err)
		}
	}
	return won
}

func TestConcurrentJoins(t *testing.T) {
	s := newSite(t)
	roster := func() int {
		ms, _, err := s.store.Members(testContext(t))
		if err != nil {
			t.Fatal(err)
		}
		return len(ms)
	}
	t.Run("one token", func(t *testing.T) {
		tok := s.token(t, TokenSpec{Role: RoleData})
		reqs := []JoinRequest{request(t, "a1", RoleData, 11), request(t, "a2", RoleData, 12), request(t, "a3", RoleData, 13)}
		if n := race(t, 3, func(i int) error { _, err := join(t, tok, reqs[i]); return err }, ErrTokenUsed); n != 1 || roster() != 2 {
			t.Errorf("%d nodes joined, roster of %d", n, roster())
		}
	})
	t.Run("one name", func(t *testing.T) {
		toks := []Token{s.token(t, TokenSpec{Role: RoleData}), s.token(t, TokenSpec{Role: RoleData}), s.token(t, TokenSpec{Role: RoleData})}
		reqs := []JoinRequest{request(t, "b", RoleData, 21), request(t, "b", RoleData, 22), request(t, "b", RoleData, 23)}
		if n := race(t, 3, func(i int) error { _, err := join(t, toks[i], reqs[i]); return err }, ErrNameTaken); n != 1 || roster() != 3 {
			t.Errorf("%d nodes joined, roster of %d", n, roster())
		}
	})
	t.Run("one address", func(t *testing.T) {
		toks := []Token{s.token(t, TokenSpec{Role: RoleData}), s.token(t, TokenSpec{Role: RoleData})}
		reqs := []JoinRequest{request(t, "c1", RoleData, 31), request(t, "c2", RoleData, 31)}
		if n := race(t, 2, func(i int) error { _, err := join(t, toks[i], reqs[i]); return err }, ErrAddressTaken); n != 1 || roster() != 4 {
			t.Errorf("%d nodes joined, roster of %d", n, roster())
		}
	})
	t.Run("token of two uses", func(t *testing.T) {
		tok := s.token(t, TokenSpec{Role: RoleData, Uses: 2})
		reqs := []JoinRequest{request(t, "d1", RoleData, 41), request(t, "d2", RoleData, 42), request(t, "d3", RoleData, 43)}
		if n := race(t, 3, func(i int) error { _, err := join(t, tok, reqs[i]); return err }, ErrTokenUsed); n != 2 || roster() != 6 {
			t.Errorf("%d nodes joined, roster of %d", n, roster())
		}
	})
	t.Run("the same node twice", func(t *testing.T) {
		tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "e", RoleData, 51)
		if n := race(t, 3, func(int) error { _, err := join(t, tok, req); return err }); n != 3 || roster() != 7 {
			t.Errorf("%d requests answered, roster of %d", n, roster())
		}
	})
}

// What two servers have read before either writes: the second must not go
// through, whatever it is that has changed.
func TestAdmitRefusesAStaleView(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	now := time.Now()
	view := func(tok Token) joinView { return must[joinView](t)(s.store.joinView(ctx, tok.ID)) }
	entry := func(tok Token, name string, last byte) Member {
		r := request(t, name, RoleWitness, last)
		r.TokenID = tok.ID
		return r.member("hash", now)
	}
	admit := func(v joinView, m Member) bool { return must[bool](t)(s.store.admit(ctx, v, m, now)) }
	for _, c := range []struct {
		name   string
		change func(v joinView, tok Token)
	}{
		{"token revoked", func(_ joinView, tok Token) {
			if err := s.store.RevokeToken(ctx, tok.ID); err != nil {
				t.Fatal(err)
			}
		}},
		{"token used by another", func(v joinView, tok Token) {
			if !admit(v, entry(tok, "first", 11)) {
				t.Fatal("the first was not admitted")
			}
		}},
		{"address taken by another", func(joinView, Token) {
			other := s.token(t, TokenSpec{Role: RoleWitness})
			if !admit(view(other), entry(other, "second", 12)) {
				t.Fatal("the first was not admitted")
			}
		}},
		{"name taken by another", func(joinView, Token) {
			other := s.token(t, TokenSpec{Role: RoleWitness})
			if !admit(view(other), entry(other, "late", 13)) {
				t.Fatal("the first was not admitted")
			}
		}},
	} {
		tok := s.token(t, TokenSpec{Role: RoleWitness})
		v := view(tok)
		c.change(v, tok)
		before := dump(t)
		if admit(v, entry(tok, "late", 12)) {
			t.Errorf("%s: admitted nevertheless", c.name)
		}
		sameDump(t, before)
	}

	// A join that is repeated while its member is removed does not bring it back.
	tok := s.token(t, TokenSpec{Role: RoleWitness})
	if !admit(view(tok), entry(tok, "gone", 14)) {
		t.Fatal("not admitted")
	}
	v := view(tok)
	i := slices.IndexFunc(v.members, func(m Member) bool { return m.Name == "gone" })
	if err := s.store.RemoveMember(ctx, "gone"); err != nil {
		t.Fatal(err)
	}
	if admit(v, v.members[i]) {
		t.Error("a removed member came back")
	}
}

func TestWrongSecretsLockTheToken(t *testing.T) {
	s := newSite(t)
	good, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	bad := good
	bad.Secret = strings.Repeat("0", 32)
	for i := range maxWrongSecrets - 1 {
		s.srv.fails = failures{} // the limit by address is another test's
		if _, err := join(t, bad, req); !errors.Is(err, ErrTokenUnknown) {
			t.Fatalf("wrong secret %d: %v", i, err)
		}
	}
	infos, err := s.store.Tokens(testContext(t))
	if err != nil || infos[0].State != TokenValid || infos[0].WrongSecrets != maxWrongSecrets-1 {
		t.Fatalf("token %+v, %v", infos, err)
	}
	if !strings.Contains(s.logs.String(), "wrong secret for token "+good.ID) || strings.Contains(s.logs.String(), good.Secret) {
		t.Error("the log does not say what happened, or too much")
	}
	s.srv.fails = failures{}
	if _, err := join(t, bad, req); !errors.Is(err, ErrTokenUnknown) {
		t.Fatal(err)
	}
	if _, err := join(t, good, req); !errors.Is(err, ErrTokenLocked) {
		t.Errorf("the right secret after %d wrong ones: %v", maxWrongSecrets, err)
	}
}

func TestFailuresAreLimitedByAddress(t *testing.T) {
	s := newSite(t)
	now := time.Now()
	s.setNow(func() time.Time { return now })
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	req.TokenID, req.Secret, req.Time = "0000000000000000", tok.Secret, now
	attacker, other := netip.MustParseAddr("fd00::1"), netip.MustParseAddr("fd00:0:0:1::1")
	try := func(from netip.Addr, r JoinRequest) error {
		_, err := s.srv.Join(testContext(t), from, r)
		return err
	}
	for range failBurst {
		if err := try(attacker, req); !errors.Is(err, ErrTokenUnknown) {
			t.Fatal(err)
		}
	}
	if err := try(attacker.Next(), req); !errors.Is(err, ErrTooManyAttempts) {
		t.Errorf("attempt %d from the same network: %v", failBurst+1, err)
	}
	good := req
	good.TokenID = tok.ID
	if err := try(other, good); err != nil {
		t.Errorf("another network is held up: %v", err)
	}
	now = now.Add(failEvery)
	req.Time = now
	if err := try(attacker, req); !errors.Is(err, ErrTokenUnknown) {
		t.Errorf("after a pause: %v", err)
	}
}

func TestFailuresStayBounded(t *testing.T) {
	var f failures
	now := time.Now()
	a := netip.MustParseAddr("10.0.0.0")
	for range 3 * maxRemotes {
		a = a.Next()
		f.note(a, now)
	}
	if len(f.by) > maxRemotes {
		t.Errorf("%d remotes are remembered", len(f.by))
	}
	if f.note(netip.Addr{}, now); !f.allow(netip.Addr{}, now) {
		t.Error("one failure without an address is too many")
	}
}

func TestHandlerRefusesWhatIsNoRequest(t *testing.T) {
	s := newSite(t)
	c, done := newClient(pki.PinnedConfig(s.pin, s.id.ID, nil), nil)
	defer done()
	ctx := testContext(t)
	for name, body := range map[string][]byte{"not JSON": []byte("hello SECRET"), "empty": nil, "too large": bytes.Repeat([]byte(" "), maxBody+1)} {
		err := call(ctx, c, http.MethodPost, s.addr, PathJoin, body, &struct{}{})
		if !errors.Is(err, ErrBadRequest) || strings.Contains(err.Error(), "SECRET") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := call(ctx, c, http.MethodGet, s.addr, PathJoin, nil, &struct{}{}); !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "405") {
		t.Errorf("GET: %v", err)
	}
	if err := call(ctx, c, http.MethodPost, s.addr, PathRenew, []byte("{}"), &struct{}{}); !errors.Is(err, ErrNoMember) {
		t.Errorf("renewal without a certificate: %v", err)
	}
}

func TestRenew(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	w := Member{Name: "w", Role: RoleWitness, Addr: netip.MustParseAddr("127.0.0.3"), Ports: DefaultPorts(), State: StateMember}
	if err := s.store.PutMember(ctx, w); err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(s.ca.CertPEM())
	conf := &tls.Config{RootCAs: pool, Certificates: []tls.Certificate{nodeCert(t, s.fixture, w)}, MinVersion: tls.VersionTLS13}
	req := RenewRequest{CSRs: csrs(t, RoleWitness)}
	resp, err := Renew(ctx, conf, []string{"127.0.0.1:1", s.addr}, req)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(resp.CAPEM, s.ca.CertPEM()) || len(resp.Certs) != 1 {
		t.Errorf("answer with %d certificates", len(resp.Certs))
	}
	checkCert(t, resp.Certs[pki.RoleNode], LeafSpecs(s.id, w, nil, Settings{})[pki.RoleNode])

	peer := pki.Identity{ClusterID: s.id.ID, Node: "w", Role: pki.RoleNode}
	with := func(change func(*pki.Identity)) pki.Identity {
		p := peer
		change(&p)
		return p
	}
	for _, c := range []struct {
		name string
		peer pki.Identity
		req  RenewRequest
		want error
	}{
		{"a data node's roles", peer, RenewRequest{CSRs: map[pki.Role][]byte{pki.RolePostgres: csrs(t, RoleData)[pki.RolePostgres]}}, ErrBadRequest},
		{"no role", peer, RenewRequest{}, ErrBadRequest},
		{"bad request", peer, RenewRequest{CSRs: map[pki.Role][]byte{pki.RoleNode: []byte("x")}}, ErrBadRequest},
		{"other cluster", with(func(p *pki.Identity) { p.ClusterID = "x" }), req, ErrOtherCluster},
		{"not in the roster", with(func(p *pki.Identity) { p.Node = "gone" }), req, ErrNoMember},
		{"not by the node's certificate", with(func(p *pki.Identity) { p.Role = pki.RoleAdmin }), req, ErrBadRequest},
	} {
		if _, err := s.srv.Renew(ctx, c.peer, c.req); !errors.Is(err, c.want) {
			t.Errorf("%s: %v, want %s", c.name, err, c.want)
		}
	}
	if err := s.store.RemoveMember(ctx, "w"); err != nil {
		t.Fatal(err)
	}
	if _, err := Renew(ctx, conf, []string{s.addr}, req); !errors.Is(err, ErrNoMember) {
		t.Errorf("a removed member: %v", err)
	}
}

func TestInitialClusterNamesTheUnstarted(t *testing.T) {
	m := func(name string, last byte) Member {
		return Member{Name: name, Addr: netip.AddrFrom4([4]byte{10, 0, 0, last}), Ports: DefaultPorts()}
	}
	roster := []Member{m("node1", 1), m("node2", 2), m("node3", 3)}
	got := initialCluster(map[string]string{
		"node1": "https://10.0.0.1:2380", "unstarted-1": "https://10.0.0.2:2380", "unstarted-2": "https://10.0.0.3:2380", "left": "https://10.0.0.9:2380",
	}, roster, roster[2])
	want := map[string]string{
		"node1": "https://10.0.0.1:2380", "node2": "https://10.0.0.2:2380", "node3": "https://10.0.0.3:2380", "left": "https://10.0.0.9:2380",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

func TestJoinWhileTheStoreIsAway(t *testing.T) {
	s := newSite(t)
	tok, req := s.token(t, TokenSpec{Role: RoleData}), request(t, "node2", RoleData, 2)
	closed := must[*clientv3.Client](t)(clientv3.New(clientv3.Config{Endpoints: etcd.Endpoints(), Logger: zap.NewNop()}))
	if err := closed.Close(); err != nil {
		t.Fatal(err)
	}
	s.srv.Store = NewStore(closed, s.id.ID)
	_, err := join(t, tok, req)
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "node1 cannot do this now: read roster and token") {
		t.Errorf("got %v", err)
	}
}
