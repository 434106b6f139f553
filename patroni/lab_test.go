package patroni

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
)

// lab is one etcd and any number of Patronis on this host, all over TLS.
type lab struct {
	dir      string
	ca       *testCA
	uid, gid int
	bin      string
	version  Version
	pgMajor  int
	pgBin    string
	etcdAddr string
	etcd     *clientv3.Client
	admin    string // bundle of the operator
	other    string // bundle of the same CA with a name that may do nothing
}

const (
	labScope = "lab-one"
	labUser  = "pgha"
	labPass  = `p"a'ss: #{on} \1`
)

func newLab(t *testing.T) *lab {
	t.Helper()
	// Not t.TempDir: PostgreSQL's user must be able to reach it, and a socket's
	// path is short.
	dir, err := os.MkdirTemp("", "pghapt")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.Chmod(dir, 0o755))
	cred, err := osCredential()
	must(t, err)
	bin, err := exec.LookPath("patroni")
	must(t, err)
	version, err := InstalledVersion(t.Context(), bin)
	must(t, err)
	l := &lab{dir: dir, ca: newTestCA(t, dir), uid: int(cred.Uid), gid: int(cred.Gid), bin: bin, version: version}
	for major := newestPostgres; major >= oldestPostgres && l.pgBin == ""; major-- {
		path := fmt.Sprintf("/usr/lib/postgresql/%d/bin", major)
		if _, err := os.Stat(filepath.Join(path, "postgres")); err == nil {
			l.pgBin, l.pgMajor = path, major
		}
	}
	if l.pgBin == "" {
		t.Fatal("PostgreSQL is not installed")
	}
	l.admin = l.ca.bundle(t, "admin.pem", CNAdmin, 0, 0)
	l.other = l.ca.bundle(t, "other.pem", "haproxy", 0, 0)
	l.startEtcd(t)
	return l
}

func (l *lab) startEtcd(t *testing.T) {
	t.Helper()
	bundle := l.ca.bundle(t, "etcd.pem", "etcd", 0, 0, "127.0.0.1")
	l.etcdAddr = freeAddr(t, "127.0.0.1").String()
	clientURL := url.URL{Scheme: "https", Host: l.etcdAddr}
	peerURL := url.URL{Scheme: "http", Host: freeAddr(t, "127.0.0.1").String()}
	cfg := embed.NewConfig()
	cfg.Dir = filepath.Join(l.dir, "etcd")
	cfg.Name = "lab"
	cfg.LogLevel = "error"
	cfg.UnsafeNoFsync = true
	cfg.ListenClientUrls, cfg.AdvertiseClientUrls = []url.URL{clientURL}, []url.URL{clientURL}
	cfg.ListenPeerUrls, cfg.AdvertisePeerUrls = []url.URL{peerURL}, []url.URL{peerURL}
	cfg.InitialCluster = cfg.Name + "=" + peerURL.String()
	cfg.ClientTLSInfo.CertFile, cfg.ClientTLSInfo.KeyFile = bundle, bundle
	cfg.ClientTLSInfo.TrustedCAFile = l.ca.file()
	cfg.ClientTLSInfo.ClientCertAuth = true
	server, err := embed.StartEtcd(cfg)
	must(t, err)
	t.Cleanup(server.Close)
	select {
	case <-server.Server.ReadyNotify():
	case <-time.After(2 * time.Minute):
		t.Fatal("etcd is not ready after two minutes")
	}
	l.etcd, err = clientv3.New(clientv3.Config{Endpoints: []string{clientURL.String()}, TLS: l.ca.clientTLS(t, l.other)})
	must(t, err)
	t.Cleanup(func() { must(t, l.etcd.Close()) })
}

// member reserves the ports of a node on addr.
func (l *lab) member(t *testing.T, name, addr string) Member {
	return Member{
		Name: name, Addr: netip.MustParseAddr(addr),
		Postgres: freeAddr(t, addr).Port(), Patroni: freeAddr(t, addr).Port(),
	}
}

// node is a Patroni of the lab.
type node struct {
	lab  *lab
	conf Config
	yaml string
	cmd  *exec.Cmd
	done chan struct{}
	log  string
}

func (l *lab) node(t *testing.T, m Member, members ...Member) *node {
	t.Helper()
	dir := filepath.Join(l.dir, m.Name)
	for _, d := range []string{dir, dir + "/data", dir + "/run", dir + "/log", dir + "/log/postgres"} {
		must(t, os.Mkdir(d, 0o750))
		must(t, os.Chown(d, l.uid, l.gid))
	}
	must(t, os.Chmod(dir, 0o755))
	return &node{
		lab: l, yaml: filepath.Join(dir, "patroni.yml"), log: filepath.Join(dir, "patroni.log"),
		conf: Config{
			Version: l.version, Scope: labScope, Name: m.Name, Addr: m.Addr,
			Ports:   Ports{Postgres: m.Postgres, Patroni: m.Patroni},
			DataDir: dir + "/data/pg", BinDir: l.pgBin, PGMajor: l.pgMajor,
			SocketDir: dir + "/run", LogDir: dir + "/log",
			Bundle:         l.ca.bundle(t, m.Name+"-patroni.pem", CNPatroni, l.uid, l.gid, m.Addr.String()),
			PostgresBundle: l.ca.bundle(t, m.Name+"-postgres.pem", m.Name, l.uid, l.gid, m.Addr.String()),
			CAFile:         l.ca.file(), EtcdAddr: l.etcdAddr,
			RESTUser: labUser, RESTPassword: labPass, Members: members,
			MemoryBytes: 256 * mib, CPUs: 2, DiskBytes: 4 * gib,
		},
	}
}

func (n *node) write(t *testing.T) {
	t.Helper()
	data, err := Render(n.conf)
	must(t, err)
	must(t, os.WriteFile(n.yaml, data, 0o600))
	must(t, os.Chown(n.yaml, n.lab.uid, n.lab.gid))
}

func (n *node) start(t *testing.T) {
	t.Helper()
	out, err := os.OpenFile(n.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	must(t, err)
	defer out.Close()
	cred, err := osCredential()
	must(t, err)
	n.cmd = exec.Command(n.lab.bin, n.yaml)
	n.cmd.Stdout, n.cmd.Stderr = out, out
	n.cmd.Dir = "/"
	n.cmd.Env = []string{"PATH=/usr/bin:/bin", "LANG=C.UTF-8", "HOME=" + n.conf.SocketDir}
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred, Setsid: true}
	must(t, n.cmd.Start())
	again := n.done != nil
	n.done = make(chan struct{})
	go func(cmd *exec.Cmd, done chan struct{}) { _ = cmd.Wait(); close(done) }(n.cmd, n.done)
	if again {
		return
	}
	t.Cleanup(func() {
		n.stop(t)
		if t.Failed() {
			data, _ := os.ReadFile(n.log)
			t.Logf("log of %s:\n%s", n.conf.Name, data)
		}
	})
}

// stop ends Patroni, which stops PostgreSQL, and makes sure that neither lives.
// PostgreSQL is no child of Patroni's.
func (n *node) stop(t *testing.T) {
	t.Helper()
	_ = n.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-n.done:
	case <-time.After(time.Minute):
		t.Errorf("patroni of %s did not stop within a minute", n.conf.Name)
		_ = n.cmd.Process.Kill()
		<-n.done
	}
	if pid, running := postmaster(n.conf.DataDir); running {
		_ = syscall.Kill(pid, syscall.SIGQUIT)
		waitFor(t, "postmaster of "+n.conf.Name+" to end", func(context.Context) error {
			if _, running := postmaster(n.conf.DataDir); running {
				return fmt.Errorf("pid %d lives", pid)
			}
			return nil
		})
	}
}

func (n *node) client(t *testing.T) *Client {
	return NewClient("https://"+hostPort(n.conf.Addr, n.conf.Ports.Patroni), n.lab.ca.clientTLS(t, n.lab.other), labUser, labPass)
}

// waitRole waits until the node runs in the role.
func (n *node) waitRole(t *testing.T, role Role) NodeStatus {
	t.Helper()
	var s NodeStatus
	waitFor(t, fmt.Sprintf("%s to be %s", n.conf.Name, role), func(ctx context.Context) (err error) {
		select {
		case <-n.done:
			t.Fatalf("patroni of %s has ended: %s", n.conf.Name, n.cmd.ProcessState)
		default:
		}
		if s, err = n.client(t).Status(ctx); err != nil {
			return err
		}
		if s.Role != role || s.State != "running" {
			return fmt.Errorf("it is %s, %s", s.Role, s.State)
		}
		if s.SystemID == "" { // a new leader may be one before it has said so
			return errors.New("it tells no system identifier")
		}
		return nil
	})
	return s
}

// waitFor polls check until it returns nil.
func waitFor(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for {
		attempt, done := context.WithTimeout(ctx, 20*time.Second)
		err := check(attempt)
		done()
		if err == nil {
			return
		}
		select {
		case <-ctx.Done():
			t.Fatalf("gave up waiting for %s: %v", what, err)
		case <-tick.C:
		}
	}
}

func freeAddr(t *testing.T, ip string) netip.AddrPort {
	t.Helper()
	l, err := net.Listen("tcp", net.JoinHostPort(strings.Trim(ip, "[]"), "0"))
	must(t, err)
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String())
}
