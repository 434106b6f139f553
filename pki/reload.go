package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"
)

// suites are the TLS 1.2 suites that an ECDSA certificate can use with forward
// secrecy and authenticated encryption; TLS 1.3 chooses its own.
var suites = []uint16{
	tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256,
	tls.TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384,
	tls.TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256,
}

// material is one consistent reading of a bundle and ca.crt.
type material struct {
	bundleRaw, caRaw []byte
	cert             *tls.Certificate // leaf and CA, so that a joiner can check its pin
	pool             *x509.CertPool
	clusterID        string
}

// Reloader serves a role's certificate and trusts the CA as they stand on disk
// at each handshake. Two files of a kilobyte are read and compared: that is
// cheaper than the handshake's signature and, unlike time stamps, cannot miss a
// change. When the files cannot be used the last good ones stay in service and
// the reason is logged once. It starts no goroutine and holds no descriptor.
type Reloader struct {
	dir  Dir
	role Role
	log  *slog.Logger

	mu      sync.Mutex
	cur     *material
	lastErr string
}

// NewReloader reads the certificate of a role; it fails when the bundle or
// ca.crt is missing or broken, or when they do not belong together.
func NewReloader(d Dir, r Role, log *slog.Logger) (*Reloader, error) {
	m, err := loadMaterial(d, r, nil)
	if err != nil {
		return nil, fmt.Errorf("load %s certificate: %w", r, err)
	}
	return &Reloader{dir: d, role: r, log: log.With("component", "pki"), cur: m}, nil
}

// loadMaterial returns old itself when the files have not changed since.
func loadMaterial(d Dir, r Role, old *material) (*material, error) {
	bundleRaw, err := os.ReadFile(d.BundlePath(r))
	if err != nil {
		return nil, err
	}
	caRaw, err := os.ReadFile(d.CAPath())
	if err != nil {
		return nil, err
	}
	if old != nil && bytes.Equal(bundleRaw, old.bundleRaw) && bytes.Equal(caRaw, old.caRaw) {
		return old, nil
	}
	b, err := ParseBundle(bundleRaw)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.BundlePath(r), err)
	}
	cas, clusterID, err := parseTrust(caRaw)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", d.CAPath(), err)
	}
	// Between the writing of a new CA and of a new bundle the two do not match:
	// both old ones stay until both new ones are there.
	if _, err := issuedByOne(b.Leaf, cas); err != nil {
		return nil, fmt.Errorf("%s does not chain to %s: %w", d.BundlePath(r), d.CAPath(), err)
	}
	cert, err := tls.X509KeyPair(append(bytes.Clone(b.CertPEM), b.CAPEM...), b.KeyPEM)
	if err != nil {
		return nil, fmt.Errorf("use %s: %w", d.BundlePath(r), err)
	}
	return &material{bundleRaw: bundleRaw, caRaw: caRaw, cert: &cert, pool: poolOf(cas), clusterID: clusterID}, nil
}

// current returns what to use for a handshake that begins now.
func (r *Reloader) current() *material {
	r.mu.Lock()
	defer r.mu.Unlock()
	m, err := loadMaterial(r.dir, r.role, r.cur)
	if err != nil {
		if msg := err.Error(); msg != r.lastErr {
			r.lastErr = msg
			r.log.Error("certificate cannot be reloaded, the last good one stays in use", "role", r.role, "error", err)
		}
		return r.cur
	}
	r.lastErr = ""
	if m != r.cur {
		r.cur = m
		r.log.Info("certificate reloaded", "role", r.role, "serial", m.cert.Leaf.SerialNumber.Text(16), "expires", stamp(m.cert.Leaf.NotAfter))
	}
	return m
}

// ServerConfig returns the configuration of a TLS server: TLS 1.2 or later,
// this role's leaf with the CA behind it, client certificates treated as
// clientAuth says and verified against ca.crt. Certificate and CA are those on
// disk at each handshake. Use PeerIdentity to learn who called. Sessions are not
// resumed: a resumed one would outlive the certificates that it was made with.
//
// NextProtos offers HTTP/2 and HTTP/1.1; a server of another protocol sets its
// own on the returned value (not on a clone) before it serves.
func (r *Reloader) ServerConfig(clientAuth tls.ClientAuthType) *tls.Config {
	base := &tls.Config{
		MinVersion:             tls.VersionTLS12,
		CipherSuites:           suites,
		ClientAuth:             clientAuth,
		NextProtos:             []string{"h2", "http/1.1"},
		SessionTicketsDisabled: true,
	}
	base.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) {
		m := r.current()
		c := base.Clone()
		c.GetConfigForClient = nil
		c.Certificates = []tls.Certificate{*m.cert}
		c.ClientCAs = m.pool
		return c, nil
	}
	return base
}

// ClientConfig returns the configuration of a TLS client: TLS 1.2 or later,
// this role's leaf as it stands on disk at each handshake, the server's chain
// verified against ca.crt and its names against ServerName, which tls.Dial,
// net/http and grpc set to the host, name or address, that they dial (without
// one the handshake fails). Then the server's identity must be of this cluster
// (ErrOtherCluster), and verify, unless nil, must accept it. The CAs are those
// on disk when ClientConfig is called: see DialTLS for a client that lives on.
func (r *Reloader) ClientConfig(verify func(Identity) error) *tls.Config {
	m := r.current()
	return &tls.Config{
		MinVersion:   tls.VersionTLS12,
		CipherSuites: suites,
		RootCAs:      m.pool,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) {
			return r.current().cert, nil
		},
		VerifyConnection: func(cs tls.ConnectionState) error {
			id, err := PeerIdentity(cs)
			if err != nil {
				return fmt.Errorf("verify server: %w", err)
			}
			if id.ClusterID != m.clusterID {
				return fmt.Errorf("verify server: %w: found %s, want %s", ErrOtherCluster, id.ClusterID, m.clusterID)
			}
			if verify == nil {
				return nil
			}
			if err := verify(id); err != nil {
				return fmt.Errorf("verify server %s: %w", id, err)
			}
			return nil
		},
	}
}

// DialTLS returns a dialer for [net/http.Transport] that connects with a new
// ClientConfig each time, so that a client that lives long follows ca.crt too.
// timeout bounds connection and handshake together.
func (r *Reloader) DialTLS(timeout time.Duration, verify func(Identity) error) func(ctx context.Context, network, addr string) (net.Conn, error) {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, timeout)
		defer cancel()
		d := tls.Dialer{Config: r.ClientConfig(verify)}
		return d.DialContext(ctx, network, addr)
	}
}

// Trust returns the CA certificates that are in use now, as ca.crt holds them.
func (r *Reloader) Trust() []byte { return bytes.Clone(r.current().caRaw) }
