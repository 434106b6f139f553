package pki

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"sync"
	"testing"
	"time"
)

const (
	clusterA = "0b8f9b5e-4a3e-4c0e-9a53-0d6c1f6f2a11"
	clusterB = "7d1f3c22-91c4-4b7b-8f0e-55a4b1c2d3e4"
	// serverName stands in every certificate made by specFor.
	serverName = "db.example.test"
	patience   = time.Minute
)

func newCA(t *testing.T, clusterID string, now time.Time) *CA {
	t.Helper()
	ca, err := NewCA(clusterID, "main", now)
	if err != nil {
		t.Fatal(err)
	}
	return ca
}

func specFor(clusterID, node string, r Role) LeafSpec {
	return LeafSpec{
		Identity:   Identity{ClusterID: clusterID, Node: node, Role: r},
		CommonName: node,
		DNSNames:   []string{node, serverName},
		IPs:        []netip.Addr{netip.MustParseAddr("127.0.0.1"), netip.MustParseAddr("::1")},
	}
}

func issue(t *testing.T, ca *CA, spec LeafSpec, now time.Time) Bundle {
	t.Helper()
	key, csr, err := NewKeyAndCSR(spec.CommonName)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Sign(csr, spec, now)
	if err != nil {
		t.Fatal(err)
	}
	b, err := ParseBundle(Bundle{KeyPEM: key, CertPEM: leaf, CAPEM: ca.CertPEM()}.Encode())
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// openTempDir is a directory that other users may pass through.
func openTempDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgha-pki-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// newDir holds the CA and a fresh bundle for each role.
func newDir(t *testing.T, ca *CA, owners map[Role]Owner, roles ...Role) Dir {
	t.Helper()
	d := Dir{Path: openTempDir(t) + "/pki", Owners: owners}
	if err := d.WriteCA(ca.CertPEM()); err != nil {
		t.Fatal(err)
	}
	for _, r := range roles {
		if err := d.WriteBundle(r, issue(t, ca, specFor(ca.ClusterID(), "n1", r), time.Now())); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func newReloader(t *testing.T, d Dir, r Role) *Reloader {
	t.Helper()
	rl, err := NewReloader(d, r, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return rl
}

// serve answers every connection whose handshake succeeds with "ok\n". The
// error of each handshake, nil or not, goes to onShake unless that is nil.
func serve(t *testing.T, cfg *tls.Config, onShake func(error)) string {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				conn.SetDeadline(time.Now().Add(patience))
				c := tls.Server(conn, cfg)
				err := c.Handshake()
				if onShake != nil {
					onShake(err)
				}
				if err == nil {
					_, _ = io.WriteString(c, "ok\n") // the client tells of its failure
					c.Close()
				}
			})
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait() })
	return ln.Addr().String()
}

// shake dials addr as net/http would, with the host of addr as server name
// unless cfg has one, and reads the answer of serve: in TLS 1.3 that is when a
// client learns that it was refused.
func shake(addr string, cfg *tls.Config) (tls.ConnectionState, error) {
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", addr, cfg)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	buf := make([]byte, 3)
	if _, err := io.ReadFull(conn, buf); err != nil {
		return tls.ConnectionState{}, err
	}
	if string(buf) != "ok\n" {
		return tls.ConnectionState{}, fmt.Errorf("server answered %q", buf)
	}
	return conn.ConnectionState(), nil
}

func named(cfg *tls.Config, name string) *tls.Config {
	c := cfg.Clone()
	c.ServerName = name
	return c
}

// run returns the combined output of a command.
func run(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C") // messages are compared
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func mustRun(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := run(t, name, args...)
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

// start runs a command until the test ends and returns what it writes.
func start(t *testing.T, cmd *exec.Cmd) *output {
	t.Helper()
	out := &output{exited: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(out.exited)
		_ = cmd.Wait() // most are killed
	}()
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // an error means that it has ended already
		<-out.exited
		if t.Failed() {
			t.Logf("%s:\n%s", cmd.Path, out)
		}
	})
	return out
}

// output collects what a process writes.
type output struct {
	mu     sync.Mutex
	buf    bytes.Buffer
	exited chan struct{}
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(p)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// eventually polls until ok, and fails the test when that takes too long.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited %s in vain for %s", patience, what)
		}
	}
}
