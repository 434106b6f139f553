package faults

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
	"pgha/pki"
)

const (
	// patience bounds a wait for what takes seconds on an idle machine.
	patience  = 4 * time.Minute
	registers = 3

	postgresPort, readWritePort, etcdPort, etcdPeerPort = 5442, 5432, 2379, 2380

	postgresVolume, etcdVolume = "/var/lib/pgha/postgres", "/var/lib/pgha/etcd"
)

var (
	hosts     = []string{"n1", "n2", "witness"}
	dataHosts = hosts[:2]
)

// cluster is what the faults are done to, one after the other.
type cluster struct {
	*testbed.Bed
	dir  string
	pool *x509.CertPool
	ids  atomic.Int64
}

// newCluster brings up two data nodes and a witness, each with disks of its own
// for PostgreSQL and etcd, which end with the test. initArgs are more arguments
// of pgha init.
func newCluster(t *testing.T, initArgs ...string) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "pgha-faults-")
	if err != nil {
		t.Fatal(err)
	}
	// PostgreSQL's user has to pass through it.
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	bed, err := testbed.New(t.Context(), dir, bin)
	if err != nil {
		t.Fatal(err)
	}
	c := &cluster{Bed: bed, dir: dir}
	t.Cleanup(func() { _ = bed.Close() })
	if err := c.up(within(t, 3*patience), initArgs...); err != nil {
		c.showLogs(t)
		c.close(t)
		t.Fatal(err)
	}
	return c
}

// close ends the cluster. What a failed one has written is kept if that is
// asked for.
func (c *cluster) close(t *testing.T) {
	t.Helper()
	err := c.Close()
	if t.Failed() && os.Getenv("PGHA_FAULTS_KEEP") != "" {
		t.Logf("kept: %s", c.dir)
	} else {
		err = errors.Join(err, os.RemoveAll(c.dir))
	}
	if err != nil {
		t.Errorf("clean up: %v", err)
	}
}

func (c *cluster) up(ctx context.Context, initArgs ...string) (err error) {
	for _, name := range hosts {
		volumes := []lab.Volume{{Path: etcdVolume, Bytes: 512 << 20}}
		if name != "witness" {
			volumes = append(volumes, lab.Volume{Path: postgresVolume, Bytes: 2 << 30})
		}
		if _, err := c.Lab.AddHost(ctx, name, lab.HostOptions{Volumes: volumes}); err != nil {
			return err
		}
	}
	r, err := c.Init(ctx, "n1", initArgs...)
	if err != nil {
		return err
	}
	if _, err := c.Join(ctx, "n2", r.Data.Token); err != nil {
		return err
	}
	if _, err := c.Join(ctx, "witness", r.Witness.Token, "--witness"); err != nil {
		return err
	}
	if _, err := c.healthy(ctx); err != nil {
		return err
	}
	if err := c.CreateApp(ctx, "n1"); err != nil {
		return err
	}
	c.pool, err = c.CA(ctx, "n1")
	return err
}

// sql runs statements as the application's user, on the server of the data node.
func (c *cluster) sql(ctx context.Context, host string, statements ...string) (string, error) {
	return c.Pgha(ctx, host, "psql", "--node", host, "-d", testbed.AppDatabase, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1",
		"-c", "SET ROLE "+testbed.AppUser+"; "+strings.Join(statements, "; "))
}

// rows returns the ids that the server of a data node has, from first on.
func (c *cluster) rows(ctx context.Context, host string, first int64) (map[int64]bool, error) {
	out, err := c.sql(ctx, host, fmt.Sprintf("SELECT id FROM fault_rows WHERE id >= %d", first))
	if err != nil {
		return nil, err
	}
	have := map[int64]bool{}
	for line := range strings.Lines(out) {
		id, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
		if err != nil {
			return nil, fmt.Errorf("read rows back: %w", err)
		}
		have[id] = true
	}
	return have, nil
}

// healthy waits until every node says that any one may be lost, and all agree
// on the primary.
func (c *cluster) healthy(ctx context.Context) (first node.Status, err error) {
	err = testbed.Until(ctx, "a healthy cluster, as all nodes see it", func() error {
		for i, h := range hosts {
			s, err := c.WaitHealthy(ctx, h)
			if err != nil {
				return fmt.Errorf("asked %s: %w", h, err)
			}
			if i == 0 {
				first = s
			}
			if s.Leader != first.Leader {
				return fmt.Errorf("%s says that the primary is %s, %s says %s", h, s.Leader, hosts[0], first.Leader)
			}
		}
		return nil
	})
	return first, err
}

// target is what a client there works on.
func (c *cluster) target(host string, port uint16, dial func(context.Context, string, string) (net.Conn, error)) (Target, error) {
	cfg, err := testbed.AppConfig(c.Lab, c.pool, c.Addr(host), port)
	if err != nil {
		return Target{}, err
	}
	cfg.DialFunc = dial
	t := Target{Config: cfg, Names: map[string]string{}, Routed: port == readWritePort}
	for _, h := range dataHosts {
		t.Names[c.Addr(h)] = h
	}
	for k := range registers {
		t.Keys = append(t.Keys, k+1)
	}
	return t, nil
}

// leadEtcd makes the member of a data node etcd's leader. The witness, which is
// for choice, has to be out of reach.
func (c *cluster) leadEtcd(host string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	byID := map[uint64]string{}
	var target, leader uint64
	clients := map[string]*clientv3.Client{}
	for _, h := range dataHosts {
		client, err := c.etcd(h)
		if err != nil {
			return err
		}
		defer func() { _ = client.Close() }()
		st, err := client.Status(ctx, client.Endpoints()[0])
		if err != nil {
			return fmt.Errorf("ask etcd on %s: %w", h, err)
		}
		if h == host {
			target, leader = st.Header.MemberId, st.Leader
		}
		byID[st.Header.MemberId], clients[h] = h, client
	}
	switch {
	case leader == target:
		return nil
	case byID[leader] == "":
		return fmt.Errorf("etcd's leader is %x, not on a data node", leader)
	}
	if _, err := clients[byID[leader]].MoveLeader(ctx, target); err != nil {
		return fmt.Errorf("move etcd's leadership from %s to %s: %w", byID[leader], host, err)
	}
	return fmt.Errorf("etcd's leadership was just moved to %s", host)
}

// etcd opens a client of the member on a host, with that node's certificate.
func (c *cluster) etcd(host string) (*clientv3.Client, error) {
	h := c.Host(host)
	dir := pki.Dir{Path: h.Path(node.DefaultPaths().PKI())}
	bundle := dir.BundlePath(pki.RoleNode)
	cert, err := tls.LoadX509KeyPair(bundle, bundle)
	if err != nil {
		return nil, fmt.Errorf("read certificate of %s: %w", host, err)
	}
	client, err := clientv3.New(clientv3.Config{
		Endpoints:   []string{"https://" + net.JoinHostPort("127.0.0.1", strconv.Itoa(etcdPort))},
		TLS:         &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: c.pool, MinVersion: tls.VersionTLS12},
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, addr string) (net.Conn, error) { return h.Dial(ctx, "tcp", addr) })},
	})
	if err != nil {
		return nil, fmt.Errorf("open etcd client: %w", err)
	}
	return client, nil
}

// showLogs prints the ends of every host's logs, which are kept on disk.
func (c *cluster) showLogs(t *testing.T) {
	t.Helper()
	for _, pattern := range []string{"*.err", "hosts/*/log/pgha.log", "hosts/*/log/patroni.log"} {
		paths, err := filepath.Glob(filepath.Join(c.dir, pattern))
		if err != nil {
			t.Errorf("find logs: %v", err)
		}
		for _, path := range paths {
			data, err := os.ReadFile(path)
			if err != nil {
				t.Errorf("read log: %v", err)
				continue
			}
			lines := strings.Split(strings.TrimSpace(string(data)), "\n")
			t.Logf("the end of %s:\n%s", strings.TrimPrefix(path, c.dir), strings.Join(lines[max(0, len(lines)-40):], "\n"))
		}
	}
}

// within bounds one wait, generously: it ends a test that hangs and measures
// nothing.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("not within %s", d))
	t.Cleanup(cancel)
	return ctx
}

// Which processes a signal is for.
var (
	isPostgres = func(p lab.Proc) bool { return p.Comm == "postgres" }
	isDaemon   = func(p lab.Proc) bool {
		return len(p.Cmdline) > 1 && p.Cmdline[0] == bin && map[string]bool{"run": true, "init": true, "join": true}[p.Cmdline[1]]
	}
	isPatroni = func(p lab.Proc) bool {
		return p.Comm != "postgres" && strings.Contains(strings.Join(p.Cmdline, " "), "patroni.yml")
	}
	isAny = func(lab.Proc) bool { return true }
)

// isPostmaster picks the server's first process, whose parent is no other.
func (c *cluster) isPostmaster(t *testing.T, host string) func(lab.Proc) bool {
	t.Helper()
	procs, err := c.Host(host).Processes()
	if err != nil {
		t.Fatal(err)
	}
	all := map[int]lab.Proc{}
	for _, p := range procs {
		if isPostgres(p) {
			all[p.PID] = p
		}
	}
	masters := maps.Clone(all)
	maps.DeleteFunc(masters, func(_ int, p lab.Proc) bool { _, child := all[p.PPID]; return child })
	if len(masters) != 1 {
		t.Fatalf("%d of %d processes of PostgreSQL on %s have no other for their parent", len(masters), len(all), host)
	}
	return func(p lab.Proc) bool { _, ok := masters[p.PID]; return ok }
}
