package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"slices"
	"strings"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"pgha/lab"
	"pgha/pki"
)

// edgeDialEtcd connects to the etcd member of a data node from its own host, with
// the node's own certificate.
func edgeDialEtcd(h *lab.Host) (*clientv3.Client, error) {
	b, err := pki.Dir{Path: h.Path("/var/lib/pgha/pki")}.Bundle(pki.RoleNode)
	if err != nil {
		return nil, err
	}
	cert, err := tls.X509KeyPair(b.CertPEM, b.KeyPEM)
	if err != nil {
		return nil, fmt.Errorf("read node certificate: %w", err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b.CAPEM) {
		return nil, errors.New("read node certificate: it has no CA")
	}
	const addr = "127.0.0.1:2379" // etcd serves nobody else
	return clientv3.New(clientv3.Config{
		Endpoints:   []string{"https://" + addr},
		Logger:      zap.NewNop(),
		DialTimeout: 10 * time.Second,
		TLS:         &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: h.Addr().String(), MinVersion: tls.VersionTLS13},
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return h.Dial(ctx, "tcp", addr)
		})},
	})
}

// etcd is a client of a data node's etcd until the test ends.
func (e edge) etcd(host string) *clientv3.Client {
	e.t.Helper()
	c, err := edgeDialEtcd(e.bed.Host(host))
	e.must(err)
	e.t.Cleanup(func() {
		if err := c.Close(); err != nil && !errors.Is(err, context.Canceled) {
			e.t.Errorf("close etcd client: %v", err)
		}
	})
	return c
}

// etcdMembers lists etcd's members by name, or by URL where one has never run;
// learners have a question mark.
func (e edge) etcdMembers(c *clientv3.Client) string {
	e.t.Helper()
	r, err := c.MemberList(e.long())
	e.must(err)
	var out []string
	for _, m := range r.Members {
		name := m.Name
		if name == "" {
			name = strings.Join(m.PeerURLs, ",")
		}
		if m.IsLearner {
			name += "?"
		}
		out = append(out, name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}
