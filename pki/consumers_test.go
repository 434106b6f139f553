package pki

import (
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"
)

// The tests here hand the one bundle file, as certificate and as key, to the
// programs that use it in production.

// bareLeaf is signed by ca but lacks the key identifiers: what a strict
// verifier refuses. It proves that the strict checks below can fail.
func bareLeaf(t *testing.T, ca *CA) Bundle {
	t.Helper()
	b := issue(t, ca, specFor(ca.ClusterID(), "n1", RoleNode), time.Now())
	tmpl := *b.Leaf
	tmpl.SubjectKeyId, tmpl.AuthorityKeyId = nil, nil
	parent := *ca.cert
	parent.SubjectKeyId = nil
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, &parent, b.Leaf.PublicKey, ca.key)
	if err != nil {
		t.Fatal(err)
	}
	b.CertPEM = pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})
	return b
}

func TestOpenSSLVerifiesStrictly(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	d := newDir(t, ca, nil, RoleNode, RolePostgres, RoleHAProxy, RolePatroni, RoleAdmin)
	verify := func(leaf, purpose string) (string, error) {
		return run(t, "openssl", "verify", "-x509_strict", "-purpose", purpose, "-CAfile", d.CAPath(), leaf)
	}
	if out, err := run(t, "openssl", "verify", "-x509_strict", "-check_ss_sig", "-CAfile", d.CAPath(), d.CAPath()); err != nil {
		t.Errorf("the CA itself: %v\n%s", err, out)
	}
	for _, r := range []Role{RoleNode, RolePostgres, RoleHAProxy, RolePatroni, RoleAdmin} {
		b, err := d.Bundle(r)
		if err != nil {
			t.Fatal(err)
		}
		leaf := filepath.Join(t.TempDir(), "leaf.pem")
		if err := os.WriteFile(leaf, b.CertPEM, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, purpose := range []string{"sslserver", "sslclient"} {
			if out, err := verify(leaf, purpose); err != nil {
				t.Errorf("%s as %s: %v\n%s", r, purpose, err, out)
			}
		}
	}
	bare := filepath.Join(t.TempDir(), "bare.pem")
	if err := os.WriteFile(bare, bareLeaf(t, ca).CertPEM, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := verify(bare, "sslserver"); err == nil {
		t.Errorf("a leaf without key identifiers passed: the check is not strict\n%s", out)
	}
}

func TestOpenSSLTakesTheBundle(t *testing.T) {
	d := newDir(t, newCA(t, clusterA, time.Now()), nil, RoleNode, RolePatroni)
	node, client := d.BundlePath(RoleNode), d.BundlePath(RolePatroni)
	// As a server, asking for a client certificate. -www answers an HTTP request.
	out := start(t, exec.Command("openssl", "s_server", "-accept", "127.0.0.1:0", "-www", "-cert", node, "-key", node,
		"-CAfile", d.CAPath(), "-Verify", "1", "-verify_return_error", "-x509_strict"))
	addr := listening(t, out, regexp.MustCompile(`(?m)^ACCEPT (127\.0\.0\.1:\d+)`))
	conn, err := tls.Dial("tcp", addr, newReloader(t, d, RolePatroni).ClientConfig(nil))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	fmt.Fprint(conn, "GET / HTTP/1.0\r\n\r\n")
	buf := make([]byte, 15)
	if n, err := conn.Read(buf); err != nil || !strings.HasPrefix(string(buf[:n]), "HTTP/1.0 200") {
		t.Errorf("s_server answered %q, %v", buf[:n], err)
	}
	// As a client of our server.
	addr = serve(t, newReloader(t, d, RoleNode).ServerConfig(tls.RequireAndVerifyClientCert), nil)
	args := []string{"s_client", "-connect", addr, "-CAfile", d.CAPath(), "-verify_return_error", "-x509_strict",
		"-verify_hostname", serverName, "-ign_eof"}
	if got := mustRun(t, "openssl", append(args, "-cert", client, "-key", client)...); !strings.Contains(got, "\nok\n") {
		t.Errorf("s_client with the bundle was not served:\n%s", got)
	}
	if got, _ := run(t, "openssl", args...); strings.Contains(got, "\nok\n") {
		t.Errorf("s_client without a certificate was served:\n%s", got)
	}
}

// listening waits for a process to say where it listens.
func listening(t *testing.T, out *output, re *regexp.Regexp) (addr string) {
	t.Helper()
	eventually(t, "the listening address", func() bool {
		if m := re.FindStringSubmatch(out.String()); m != nil {
			addr = m[1]
		}
		return addr != "" || exited(out)
	})
	if addr == "" {
		t.Fatalf("process ended:\n%s", out)
	}
	return addr
}

func exited(out *output) bool {
	select {
	case <-out.exited:
		return true
	default:
		return false
	}
}

// The distribution's interpreter is the one that runs Patroni. From 3.13 on
// Python sets VERIFY_X509_STRICT by itself; here it is set on any version.
const (
	python = "/usr/bin/python3"

	pythonClient = `
import socket, ssl, sys
host, port, name, ca, bundle = sys.argv[1:]
c = ssl.create_default_context(cafile=ca)
c.verify_flags |= ssl.VERIFY_X509_STRICT
c.load_cert_chain(bundle)
with socket.create_connection((host, int(port))) as s, c.wrap_socket(s, server_hostname=name) as t:
    print(t.recv(3).decode(), t.getpeercert()["subjectAltName"])
`
	pythonServer = `
import socket, ssl, sys
ca, bundle = sys.argv[1:]
c = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=ca)
c.verify_flags |= ssl.VERIFY_X509_STRICT
c.verify_mode = ssl.CERT_REQUIRED
c.load_cert_chain(certfile=bundle, keyfile=bundle)
with socket.create_server(("127.0.0.1", 0)) as l:
    print("listening 127.0.0.1:%d" % l.getsockname()[1], flush=True)
    while True:
        s, _ = l.accept()
        try:
            with c.wrap_socket(s, server_side=True) as t:
                t.sendall(b"ok\n")
        except OSError as e:
            print("refused:", e, flush=True)
`
)

func TestPythonTakesTheBundleStrictly(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	d := newDir(t, ca, nil, RoleNode, RolePatroni)
	bundle := d.BundlePath(RolePatroni)

	addr := serve(t, newReloader(t, d, RoleNode).ServerConfig(tls.RequireAndVerifyClientCert), nil)
	ask := func(addr, name string) (string, error) {
		host, port, err := net.SplitHostPort(addr)
		if err != nil {
			t.Fatal(err)
		}
		return run(t, python, "-c", pythonClient, host, port, name, d.CAPath(), bundle)
	}
	for _, name := range []string{serverName, "127.0.0.1"} {
		out, err := ask(addr, name)
		if id := (Identity{clusterA, "n1", RoleNode}).String(); err != nil || !strings.HasPrefix(out, "ok") || !strings.Contains(out, id) {
			t.Errorf("client for %s: %v\n%s", name, err, out)
		}
	}
	if out, err := ask(addr, "other.example.test"); err == nil || !strings.Contains(out, "Hostname mismatch") {
		t.Errorf("client for a wrong name: %v\n%s", err, out)
	}
	bare := serve(t, &tls.Config{Certificates: []tls.Certificate{pair(t, bareLeaf(t, ca))}}, nil)
	if out, err := ask(bare, serverName); err == nil || !strings.Contains(out, "Missing Authority Key Identifier") {
		t.Errorf("a leaf without key identifiers passed: the check is not strict: %v\n%s", err, out)
	}

	out := start(t, exec.Command(python, "-c", pythonServer, d.CAPath(), bundle))
	addr = listening(t, out, regexp.MustCompile(`(?m)^listening (\S+)`))
	if _, err := shake(addr, newReloader(t, d, RoleNode).ClientConfig(nil)); err != nil {
		t.Errorf("python as server: %v", err)
	}
	stranger := pair(t, issue(t, newCA(t, clusterB, time.Now()), specFor(clusterB, "n1", RoleNode), time.Now()))
	if _, err := shake(addr, &tls.Config{InsecureSkipVerify: true, Certificates: []tls.Certificate{stranger}}); err == nil {
		t.Error("python as server let another cluster's certificate in")
	}
}

const haproxyConfig = `
global
    user haproxy
    group haproxy
    default-path origin %[1]s
defaults
    mode http
    timeout client 30s
    timeout server 30s
    timeout connect 30s
frontend f
    bind unix@%[1]s/f.sock mode 666 ssl crt %[2]s ca-file %[3]s verify required
    http-request return status 200 content-type text/plain lf-string "%%[ssl_c_s_dn(cn)]"
backend b
    server s 127.0.0.1:1 ssl verify required ca-file %[3]s crt %[2]s verifyhost n1
`

func TestHAProxyTakesTheBundle(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	uid, gid := ids(t, "haproxy")
	d := newDir(t, ca, map[Role]Owner{RoleHAProxy: {uid, gid}}, RoleHAProxy, RoleAdmin)
	dir := openTempDir(t)
	cfg := filepath.Join(dir, "haproxy.cfg")
	text := fmt.Sprintf(haproxyConfig, dir, d.BundlePath(RoleHAProxy), d.CAPath())
	if err := os.WriteFile(cfg, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := mustRun(t, "haproxy", "-c", "-f", cfg); strings.Contains(out, "WARNING") || strings.Contains(out, "ALERT") {
		t.Errorf("haproxy -c:\n%s", out)
	}

	out := start(t, exec.Command("haproxy", "-db", "-f", cfg))
	sock := filepath.Join(dir, "f.sock")
	var conn net.Conn
	eventually(t, "haproxy's socket", func() bool {
		var err error
		conn, err = net.Dial("unix", sock)
		return err == nil || exited(out)
	})
	if conn == nil {
		t.Fatalf("haproxy ended:\n%s", out)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	c := tls.Client(conn, named(newReloader(t, d, RoleAdmin).ClientConfig(nil), serverName))
	fmt.Fprint(c, "GET / HTTP/1.0\r\n\r\n")
	buf := make([]byte, 4096)
	n, err := c.Read(buf)
	if got := string(buf[:n]); err != nil || !strings.Contains(got, " 200 OK") || !strings.HasSuffix(got, "\r\n\r\nn1") {
		t.Errorf("haproxy answered %q, %v", got, err)
	}
}
