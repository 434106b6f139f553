package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/pki"
)

// servedRoles says which certificate each port of a node serves.
func servedRoles(host string) map[string]pki.Role {
	if host == "witness" {
		return map[string]pki.Role{"2380": pki.RoleNode, "8432": pki.RoleNode}
	}
	return map[string]pki.Role{
		"5442": pki.RolePostgres, "5432": pki.RolePostgres, "8008": pki.RolePatroni,
		"2379": pki.RoleNode, "2380": pki.RoleNode, "8404": pki.RoleHAProxy, "8432": pki.RoleNode,
	}
}

// served returns the certificate that a port of host serves, to another member
// or, where no other can ask, to the host itself.
func (c *trio) served(ctx context.Context, host, port string) (*x509.Certificate, error) {
	from := "witness"
	if host == "witness" {
		from = "n1"
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	addr := net.JoinHostPort(c.Addr(host), port)
	if port == "2379" {
		from, addr = host, "127.0.0.1:2379"
	}
	conn, err := c.Host(from).Dial(ctx, "tcp", addr)
	if err != nil {
		return nil, err
	}
	defer func() { _ = conn.Close() }()
	deadline, _ := ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if strings.HasPrefix(port, "54") {
		if err := askPostgresForTLS(conn); err != nil {
			return nil, err
		}
	}
	// What is served is looked at, not trusted.
	s := tls.Client(conn, &tls.Config{InsecureSkipVerify: true})
	if err := s.HandshakeContext(ctx); err != nil {
		return nil, fmt.Errorf("speak TLS to %s:%s: %w", host, port, err)
	}
	return s.ConnectionState().PeerCertificates[0], nil
}

// askPostgresForTLS sends an SSLRequest.
func askPostgresForTLS(conn io.ReadWriter) error {
	req := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 8), 80877103)
	if _, err := conn.Write(req); err != nil {
		return fmt.Errorf("ask PostgreSQL for TLS: %w", err)
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(conn, answer); err != nil {
		return fmt.Errorf("ask PostgreSQL for TLS: %w", err)
	}
	if answer[0] != 'S' {
		return fmt.Errorf("PostgreSQL refused TLS: %q", answer)
	}
	return nil
}

// certificatesRenewed: every certificate is replaced, on the wire, under load,
// with no restart and no error.
func (c *trio) certificatesRenewed(t *testing.T) {
	before := c.state(t)
	near, far := c.writer(t, before.leader), c.writer(t, replicaOf(node.Status{Leader: before.leader}))
	commit := c.session(t, before.leader)
	old := map[string]*x509.Certificate{}
	admin := map[string]string{}
	for _, h := range trioHosts {
		for port, role := range servedRoles(h) {
			cert, err := c.served(t.Context(), h, port)
			if err != nil {
				t.Fatal(err)
			}
			if id, err := pki.IdentityOf(cert); err != nil || id.Role != role {
				t.Errorf("%s:%s serves the certificate of %v (%v), want role %s", h, port, id, err, role)
			}
			old[h+":"+port] = cert
		}
		if h != "witness" {
			admin[h] = c.serialOnDisk(t, h, pki.RoleAdmin)
		}
	}
	for _, h := range trioHosts {
		if _, err := c.Pgha(within(t, trioWait), h, "cert", "renew"); err != nil {
			t.Fatal(err)
		}
		c.goesOn(t, near)
		c.goesOn(t, far)
	}
	for _, h := range trioHosts {
		for port := range servedRoles(h) {
			was := old[h+":"+port]
			err := testbed.Until(within(t, trioWait), "a new certificate at "+h+":"+port, func() error {
				// Through HAProxy the certificate is the primary's, as on 5442.
				now, err := c.served(t.Context(), h, port)
				if err == nil && now.SerialNumber.Cmp(was.SerialNumber) == 0 {
					err = fmt.Errorf("it is still number %x", was.SerialNumber)
				}
				if err == nil && now.URIs[0].String() != was.URIs[0].String() {
					err = testbed.Stop(fmt.Errorf("it is of %s, it was of %s", now.URIs[0], was.URIs[0]))
				}
				return err
			})
			if err != nil {
				t.Error(err)
			}
		}
		if h != "witness" && c.serialOnDisk(t, h, pki.RoleAdmin) == admin[h] {
			t.Errorf("the administrator's certificate on %s was not renewed", h)
		}
	}
	now := c.sameReign(t, before)
	for _, h := range []string{"n1", "n2"} {
		if !samePIDs(now.data[h], before.data[h]) {
			t.Errorf("the renewal restarted something on %s: %+v, before %+v", h, now.data[h], before.data[h])
		}
	}
	commit()
	c.unharmed(t, near)
	c.unharmed(t, far)
	// New sessions, and the administrator's, stand on the new ones.
	for _, h := range []string{"n1", "n2"} {
		c.unharmed(t, c.writer(t, h))
		if out, err := c.Pgha(within(t, trioWait), h, "psql", "-X", "-A", "-t", "-c", "SELECT current_user"); err != nil || strings.TrimSpace(out) != "postgres" {
			t.Errorf("pgha psql on %s: %v: %s", h, err, out)
		}
	}
}

// pkiOf is a host's certificate directory, seen from the test.
func (c *trio) pkiOf(host string) pki.Dir {
	return pki.Dir{Path: c.Host(host).Path("/var/lib/pgha/pki")}
}

func (c *trio) serialOnDisk(t *testing.T, host string, role pki.Role) string {
	t.Helper()
	b, err := c.pkiOf(host).Bundle(role)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", b.Leaf.SerialNumber)
}
