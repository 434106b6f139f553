package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestMutualTLS(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	d := newDir(t, ca, nil, RoleNode, RoleAdmin)
	peer := make(chan Identity, 1)
	cfg := newReloader(t, d, RoleNode).ServerConfig(tls.RequireAndVerifyClientCert)
	cfg.VerifyConnection = func(cs tls.ConnectionState) error {
		id, err := PeerIdentity(cs)
		peer <- id
		return err
	}
	addr := serve(t, cfg, nil)
	var seen Identity
	cs, err := shake(addr, newReloader(t, d, RoleAdmin).ClientConfig(func(id Identity) error { seen = id; return nil }))
	if err != nil {
		t.Fatal(err)
	}
	if want := (Identity{clusterA, "n1", RoleNode}); seen != want {
		t.Errorf("client saw %v, want %v", seen, want)
	}
	if got, want := <-peer, (Identity{clusterA, "n1", RoleAdmin}); got != want {
		t.Errorf("server saw %v, want %v", got, want)
	}
	if n := len(cs.PeerCertificates); n != 2 || !bytes.Equal(cs.PeerCertificates[1].Raw, ca.cert.Raw) {
		t.Errorf("server sent %d certificates, want the leaf and the CA", n)
	}
	if cs.Version != tls.VersionTLS13 {
		t.Errorf("version %s", tls.VersionName(cs.Version))
	}
}

func TestProtocolFloor(t *testing.T) {
	d := newDir(t, newCA(t, clusterA, time.Now()), nil, RoleNode)
	r := newReloader(t, d, RoleNode)
	addr := serve(t, r.ServerConfig(tls.NoClientCert), nil)
	for _, tc := range []struct {
		name  string
		edit  func(*tls.Config)
		works bool
	}{
		{"TLS 1.1", func(c *tls.Config) { c.MinVersion, c.MaxVersion = tls.VersionTLS10, tls.VersionTLS11 }, false},
		{"TLS 1.2", func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, true},
		{"TLS 1.2 with CBC", func(c *tls.Config) {
			c.MaxVersion, c.CipherSuites = tls.VersionTLS12, []uint16{tls.TLS_ECDHE_ECDSA_WITH_AES_128_CBC_SHA}
		}, false},
		{"TLS 1.3", func(c *tls.Config) { c.MinVersion = tls.VersionTLS13 }, true},
	} {
		cfg := r.ClientConfig(nil)
		tc.edit(cfg)
		if _, err := shake(addr, cfg); (err == nil) != tc.works {
			t.Errorf("%s: %v, want works=%v", tc.name, err, tc.works)
		}
	}
}

func TestNoSessionIsResumed(t *testing.T) {
	d := newDir(t, newCA(t, clusterA, time.Now()), nil, RoleNode)
	r := newReloader(t, d, RoleNode)
	addr := serve(t, r.ServerConfig(tls.RequireAndVerifyClientCert), nil)
	for _, version := range []uint16{tls.VersionTLS12, tls.VersionTLS13} {
		cfg := r.ClientConfig(nil)
		cfg.MaxVersion = version
		cfg.ClientSessionCache = tls.NewLRUClientSessionCache(4)
		for range 2 {
			if cs, err := shake(addr, cfg); err != nil || cs.DidResume {
				t.Errorf("%s: resumed %v, %v", tls.VersionName(version), cs.DidResume, err)
			}
		}
	}
}

func TestClientRefusesServer(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	d := newDir(t, ca, nil, RoleAdmin)
	client := newReloader(t, d, RoleAdmin)
	refusal := errors.New("not this one")
	expired := specFor(clusterA, "n1", RoleNode)
	expired.Lifetime = time.Nanosecond
	for _, tc := range []struct {
		name   string
		ca     *CA
		spec   LeafSpec
		host   string
		verify func(Identity) error
		want   func(error) bool
	}{
		{name: "good, by address", want: func(err error) bool { return err == nil }},
		{name: "good, by name", host: serverName, want: func(err error) bool { return err == nil }},
		{name: "wrong name", host: "other.example.test", want: isA[x509.HostnameError]},
		{name: "wrong address", host: "192.0.2.1", want: isA[x509.HostnameError]},
		{name: "refused by the caller", verify: func(Identity) error { return refusal }, want: func(err error) bool { return errors.Is(err, refusal) }},
		{name: "man in the middle with a CA of the same name", ca: newCA(t, clusterA, now), want: isA[x509.UnknownAuthorityError]},
		{name: "other cluster", ca: newCA(t, clusterB, now), spec: specFor(clusterB, "n1", RoleNode), want: isA[x509.UnknownAuthorityError]},
		{name: "leaf of another cluster by this CA", ca: misled(ca), spec: specFor(clusterB, "n1", RoleNode), want: func(err error) bool { return errors.Is(err, ErrOtherCluster) }},
		{name: "expired", spec: expired, want: func(err error) bool {
			var e x509.CertificateInvalidError
			return errors.As(err, &e) && e.Reason == x509.Expired
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			signer, spec, host := ca, specFor(clusterA, "n1", RoleNode), "127.0.0.1"
			if tc.ca != nil {
				signer = tc.ca
			}
			if tc.spec.CommonName != "" {
				spec = tc.spec
			}
			if tc.host != "" {
				host = tc.host
			}
			addr := serve(t, &tls.Config{Certificates: []tls.Certificate{pair(t, issue(t, signer, spec, now))}}, nil)
			if _, err := shake(addr, named(client.ClientConfig(tc.verify), host)); !tc.want(err) {
				t.Fatalf("got %v", err)
			}
		})
	}
}

func isA[T error](err error) bool {
	var e T
	return errors.As(err, &e)
}

// pair is a bundle as a server without any of this package's checks has it.
func pair(t *testing.T, b Bundle) tls.Certificate {
	t.Helper()
	c, err := tls.X509KeyPair(append(bytes.Clone(b.CertPEM), b.CAPEM...), b.KeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestServerRefusesClient(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	d := newDir(t, ca, nil, RoleNode)
	shakes := make(chan error, 1)
	addr := serve(t, newReloader(t, d, RoleNode).ServerConfig(tls.RequireAndVerifyClientCert), func(err error) { shakes <- err })
	expired := specFor(clusterA, "n1", RoleAdmin)
	expired.Lifetime = time.Nanosecond
	good := pair(t, issue(t, ca, specFor(clusterA, "n1", RoleAdmin), now))
	for _, tc := range []struct {
		name  string
		cert  *tls.Certificate
		works bool
	}{
		{"good", &good, true},
		{"none", &tls.Certificate{}, false},
		{"expired", ptr(pair(t, issue(t, ca, expired, now))), false},
		{"other CA of the same name", ptr(pair(t, issue(t, newCA(t, clusterA, now), specFor(clusterA, "n1", RoleAdmin), now))), false},
		{"other cluster", ptr(pair(t, issue(t, newCA(t, clusterB, now), specFor(clusterB, "n1", RoleAdmin), now))), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			_, err := shake(addr, &tls.Config{
				InsecureSkipVerify:   true,
				GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return tc.cert, nil },
			})
			if server := <-shakes; (server == nil) != tc.works || (err == nil) != tc.works {
				t.Fatalf("server %v, client %v; want works=%v", server, err, tc.works)
			}
		})
	}
}

// TestServesHTTP2 serves from a TLS listener, where net/http does not get to add
// protocols to the configuration.
func TestServesHTTP2(t *testing.T) {
	d := newDir(t, newCA(t, clusterA, time.Now()), nil, RoleNode)
	r := newReloader(t, d, RoleNode)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{
		Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "ok\n") }),
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = srv.Serve(tls.NewListener(ln, r.ServerConfig(tls.RequireAndVerifyClientCert)))
	}()
	defer func() { srv.Close(); <-done }()
	tr := &http.Transport{TLSClientConfig: r.ClientConfig(nil), ForceAttemptHTTP2: true}
	defer tr.CloseIdleConnections()
	resp, err := (&http.Client{Transport: tr, Timeout: patience}).Get("https://" + ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.ProtoMajor != 2 {
		t.Errorf("spoke %s, want HTTP/2", resp.Proto)
	}
}

func ptr[T any](v T) *T { return &v }

func TestNewReloaderRefuses(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	log := slog.New(slog.DiscardHandler)
	if _, err := NewReloader(newDir(t, ca, nil), RoleNode, log); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no bundle: %v", err)
	}
	d := newDir(t, ca, nil, RoleNode)
	if err := d.WriteCA(newCA(t, clusterA, now).CertPEM()); err != nil {
		t.Fatal(err)
	}
	if _, err := NewReloader(d, RoleNode, log); err == nil || !strings.Contains(err.Error(), "does not chain") {
		t.Errorf("another CA: %v", err)
	}
}

// TestReloaderKeepsTheLastGood walks one server through good and bad files and
// asks which certificate it serves after each step.
func TestReloaderKeepsTheLastGood(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	d := newDir(t, ca, nil, RoleNode)
	var logged bytes.Buffer
	r, err := NewReloader(d, RoleNode, slog.New(slog.NewTextHandler(&logged, nil)))
	if err != nil {
		t.Fatal(err)
	}
	addr := serve(t, r.ServerConfig(tls.RequireAndVerifyClientCert), nil)
	served := func() string {
		t.Helper()
		cs, err := shake(addr, r.ClientConfig(nil))
		if err != nil {
			t.Fatal(err)
		}
		return cs.PeerCertificates[0].SerialNumber.String()
	}
	write := func(path, content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	fresh := func(ca *CA) Bundle { return issue(t, ca, specFor(clusterA, "n1", RoleNode), now) }

	first, second := served(), fresh(ca)
	if err := d.WriteBundle(RoleNode, second); err != nil {
		t.Fatal(err)
	}
	want := second.Leaf.SerialNumber.String()
	if got := served(); got != want || got == first {
		t.Fatalf("serves %s after replacement, want %s", got, want)
	}
	for _, bad := range []struct{ name, path, content string }{
		{"garbage", d.BundlePath(RoleNode), "x"},
		{"empty", d.BundlePath(RoleNode), ""},
		{"bundle of another CA", d.BundlePath(RoleNode), string(fresh(newCA(t, clusterA, now)).Encode())},
	} {
		write(bad.path, bad.content)
		if got := served(); got != want {
			t.Fatalf("%s: serves %s, want the last good %s", bad.name, got, want)
		}
	}
	if err := os.Remove(d.BundlePath(RoleNode)); err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if got := served(); got != want {
			t.Fatalf("removed: serves %s, want the last good %s", got, want)
		}
	}
	if n := strings.Count(logged.String(), "no such file"); n != 1 {
		t.Errorf("the missing file was logged %d times, want once:\n%s", n, &logged)
	}
	if err := d.WriteBundle(RoleNode, second); err != nil {
		t.Fatal(err)
	}

	// A new CA: between the two writes the old pair serves, afterwards the new.
	next := newCA(t, clusterA, now)
	if err := d.WriteCA(next.CertPEM()); err != nil {
		t.Fatal(err)
	}
	if got := served(); got != want {
		t.Fatalf("CA replaced first: serves %s, want the last good %s", got, want)
	}
	third := fresh(next)
	if err := d.WriteBundle(RoleNode, third); err != nil {
		t.Fatal(err)
	}
	if got := served(); got != third.Leaf.SerialNumber.String() {
		t.Fatalf("serves %s, want the new CA's %s", got, third.Leaf.SerialNumber)
	}

	// The CA alone, made anew with its key: the bundle still belongs to it.
	renewed := selfRenewed(t, next)
	if err := d.WriteCA(renewed); err != nil {
		t.Fatal(err)
	}
	if served(); !bytes.Equal(r.current().caRaw, renewed) {
		t.Error("the renewed CA is not in use")
	}
	if strings.Contains(logged.String(), "PRIVATE") {
		t.Error("a key was logged")
	}
}

func TestNoFailedHandshakeWhileBundlesAreReplaced(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	d := newDir(t, ca, nil, RoleNode)
	r := newReloader(t, d, RoleNode)
	var failed atomic.Int64
	addr := serve(t, r.ServerConfig(tls.RequireAndVerifyClientCert), func(err error) {
		if err != nil {
			failed.Add(1)
		}
	})
	var (
		wg       sync.WaitGroup
		replaced = make(chan struct{})
		shaken   atomic.Int64
		mu       sync.Mutex
		serials  = map[string]bool{}
	)
	for range 4 {
		wg.Go(func() {
			for {
				cs, err := shake(addr, r.ClientConfig(nil))
				if err != nil {
					t.Errorf("handshake %d: %v", shaken.Load(), err)
					return
				}
				shaken.Add(1)
				mu.Lock()
				serials[cs.PeerCertificates[0].SerialNumber.String()] = true
				mu.Unlock()
				select {
				case <-replaced:
					return
				default:
				}
			}
		})
	}
	var last Bundle
	for range 100 {
		last = issue(t, ca, specFor(clusterA, "n1", RoleNode), now)
		before := shaken.Load()
		if err := d.WriteBundle(RoleNode, last); err != nil {
			t.Error(err)
			break
		}
		// Handshakes and replacements interleave however fast the disk is.
		eventually(t, "a handshake", func() bool { return shaken.Load() > before || t.Failed() })
	}
	close(replaced)
	wg.Wait()
	cs, err := shake(addr, r.ClientConfig(nil))
	if err != nil || cs.PeerCertificates[0].SerialNumber.Cmp(last.Leaf.SerialNumber) != 0 {
		t.Errorf("the last bundle is not the one served: %v", err)
	}
	if n := failed.Load(); n != 0 {
		t.Errorf("%d handshakes failed", n)
	}
	if len(serials) < 10 {
		t.Errorf("%d different certificates served in %d handshakes over 100 replacements", len(serials), shaken.Load())
	}
	t.Logf("%d handshakes, %d different certificates", shaken.Load(), len(serials))
}
