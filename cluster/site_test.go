package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"

	"pgha/pki"
)

func breakSignature(t testing.TB, csrPEM []byte) []byte {
	t.Helper()
	b, _ := pem.Decode(csrPEM)
	if b == nil {
		t.Fatal("no PEM")
	}
	der := bytes.Clone(b.Bytes)
	der[len(der)-1] ^= 1
	return pem.EncodeToMemory(&pem.Block{Type: b.Type, Bytes: der})
}

// members stands in for etcd's membership; like etcd it does not know the
// names of those that have not started.
type members struct {
	mu   sync.Mutex
	urls map[string]string
	fail func() error
	adds int
}

func (m *members) AddLearner(_ context.Context, url string) (map[string]string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.adds++
	if m.fail != nil {
		if err := m.fail(); err != nil {
			return nil, err
		}
	}
	for _, u := range m.urls {
		if u == url {
			return maps.Clone(m.urls), nil
		}
	}
	m.urls[fmt.Sprintf("unstarted-%d", len(m.urls))] = url
	return maps.Clone(m.urls), nil
}

// site is a member that serves the join API over real TLS.
type site struct {
	*fixture
	srv     *Server
	members *members
	addr    string
	posts   atomic.Int32
	opened  []string // names that OnMember was told
	mu      sync.Mutex
	logs    *lockedBuffer
	now     atomic.Pointer[func() time.Time]
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newSite(t *testing.T) *site {
	t.Helper()
	leaks := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, leaks) })
	f := newFixture(t)
	s := &site{fixture: f, members: &members{urls: map[string]string{"node1": f.self.PeerURL()}}, logs: &lockedBuffer{}}
	s.setNow(time.Now)
	s.srv = &Server{
		Store: f.store, Identity: f.id, Node: "node1", Version: "1.2.0", PGMajor: func() int { return 15 },
		CA:         func() (*pki.CA, error) { return f.ca, nil },
		Key:        func() (SealingKey, error) { return f.key, nil },
		Membership: s.members,
		OnMember: func(m Member) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.opened = append(s.opened, m.Name)
		},
		Now: func() time.Time { return (*s.now.Load())() },
		Log: slog.New(slog.NewTextHandler(s.logs, &slog.HandlerOptions{Level: slog.LevelDebug})),
	}
	s.addr = serve(t, f, s.srv, &s.posts)
	return s
}

func (s *site) setNow(now func() time.Time) { s.now.Store(&now) }

// serve starts the API of srv with node1's certificate and returns its address.
func serve(t *testing.T, f *fixture, srv *Server, posts *atomic.Int32) string {
	t.Helper()
	h := srv.Handler()
	ts := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodPost {
			posts.Add(1)
		}
		h.ServeHTTP(w, r)
	}))
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(f.ca.CertPEM())
	ts.TLS = &tls.Config{
		Certificates: []tls.Certificate{nodeCert(t, f, f.self)}, ClientAuth: tls.VerifyClientCertIfGiven, ClientCAs: pool, MinVersion: tls.VersionTLS12,
	}
	ts.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError)
	ts.StartTLS()
	t.Cleanup(ts.Close)
	return ts.Listener.Addr().String()
}

func nodeCert(t *testing.T, f *fixture, m Member) tls.Certificate {
	t.Helper()
	key, csr, err := pki.NewKeyAndCSR(m.Name)
	if err != nil {
		t.Fatal(err)
	}
	spec := LeafSpecs(f.id, m, nil, Settings{})[pki.RoleNode]
	cert := must[[]byte](t)(f.ca.Sign(csr, spec, time.Now()))
	return must[tls.Certificate](t)(tls.X509KeyPair(append(cert, f.ca.CertPEM()...), key))
}

func (s *site) token(t *testing.T, spec TokenSpec) Token {
	t.Helper()
	tok, text, err := s.store.CreateToken(testContext(t), spec, s.pin, []string{s.addr}, "node1", (*s.now.Load())())
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(text, tokenPrefix) {
		t.Fatalf("token %.10s", text)
	}
	return tok
}

// request is a good request of the node with this name and last address byte.
func request(t testing.TB, name string, role NodeRole, last byte) JoinRequest {
	t.Helper()
	r := JoinRequest{
		Name: name, Role: role, Addr: netip.AddrFrom4([4]byte{10, 0, 0, last}), Ports: DefaultPorts(), CSRs: csrs(t, role), Version: "1.2.0",
	}
	if role == RoleData {
		r.PGMajor = 15
	}
	return r
}

// oneRound makes tests of refusals end at once.
var oneRound = JoinOptions{RetryFor: -1}

func join(t testing.TB, tok Token, req JoinRequest) (JoinResponse, error) {
	t.Helper()
	return Join(testContext(t), tok, func(Hello) (JoinRequest, error) { return req, nil }, oneRound)
}
