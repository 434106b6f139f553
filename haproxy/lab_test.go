package haproxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

const (
	roleNone int32 = iota
	rolePrimary
	roleReplica
)

// fakeNode plays a data node: Patroni's REST API over mutual TLS, and a server
// that says its name to every client and then echoes.
type fakeNode struct {
	Server
	role    atomic.Int32
	stalled atomic.Bool  // checks get no answer
	client  atomic.Value // serial number of the last check's certificate, string
	release chan struct{}
}

func newFakeNode(t *testing.T, ca *testCA, name, certName string) *fakeNode {
	t.Helper()
	n := &fakeNode{release: make(chan struct{})}
	n.Name, n.Addr = name, netip.MustParseAddr("127.0.0.1")

	bundle := ca.bundle(t, name+".pem", certName, os.Getuid(), os.Getgid())
	cfg := ca.clientTLS(t, bundle)
	cfg.ClientAuth, cfg.ClientCAs = tls.RequireAndVerifyClientCert, cfg.RootCAs
	// A new handshake for each check, so that the certificate is always seen.
	cfg.SessionTicketsDisabled = true
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	n.Patroni = netip.MustParseAddrPort(l.Addr().String()).Port()
	api := &http.Server{Handler: n, ErrorLog: discard}
	var wg sync.WaitGroup
	wg.Go(func() { _ = api.Serve(tls.NewListener(l, cfg)) })

	pg, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	n.Postgres = netip.MustParseAddrPort(pg.Addr().String()).Port()
	wg.Go(func() {
		for {
			conn, err := pg.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer conn.Close()
				_, _ = io.WriteString(conn, name+"\n")
				_, _ = io.Copy(conn, conn)
			})
		}
	})
	t.Cleanup(func() {
		close(n.release)
		must(t, api.Close())
		must(t, pg.Close())
		wg.Wait()
	})
	return n
}

func (n *fakeNode) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if n.stalled.Load() {
		select {
		case <-n.release:
		case <-r.Context().Done():
		}
		return
	}
	n.client.Store(r.TLS.PeerCertificates[0].SerialNumber.String())
	role := n.role.Load()
	if r.Method == http.MethodOptions && (r.URL.Path == "/primary" && role == rolePrimary || r.URL.Path == "/replica" && role == roleReplica) {
		return
	}
	w.WriteHeader(http.StatusServiceUnavailable)
}

// proxy is a real HAProxy under its own user.
type proxy struct {
	conf    Config
	file    string
	dir     string
	bin     string
	cmd     *exec.Cmd
	runtime Runtime
	master  Master
	uid     int
	gid     int
}

const statusUser, statusPassword = "pgha", "correct-horse-battery"

// newDir makes a directory that HAProxy's user can reach and owns.
func newDir(t *testing.T) (dir string, uid, gid int) {
	t.Helper()
	u, err := user.Lookup("haproxy")
	must(t, err)
	uid, err = strconv.Atoi(u.Uid)
	must(t, err)
	gid, err = strconv.Atoi(u.Gid)
	must(t, err)
	dir, err = os.MkdirTemp("", "pghaha")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	must(t, os.Chown(dir, uid, gid))
	return dir, uid, gid
}

func newProxy(t *testing.T, ca *testCA, dir string, uid, gid int, nodes ...*fakeNode) *proxy {
	t.Helper()
	bin, err := exec.LookPath("haproxy")
	must(t, err)
	p := &proxy{file: filepath.Join(dir, "haproxy.cfg"), dir: dir, bin: bin, uid: uid, gid: gid}
	p.conf = Config{
		Self: nodes[0].Name, Bind: netip.MustParseAddr("127.0.0.1"),
		Ports:  Ports{ReadWrite: freePort(t), ReadOnly: freePort(t), Stats: freePort(t), Health: freePort(t)},
		Bundle: ca.bundle(t, "haproxy.pem", "haproxy", uid, gid), StatsBundle: ca.bundle(t, "stats.pem", "status", uid, gid),
		CAFile: ca.file(), SocketPath: filepath.Join(dir, "run.sock"), StatsUser: statusUser, StatsPassword: statusPassword,
	}
	for _, n := range nodes {
		p.conf.Servers = append(p.conf.Servers, n.Server)
	}
	p.runtime, p.master = Runtime{p.conf.SocketPath}, Master{filepath.Join(dir, "master.sock")}
	p.write(t)
	must(t, Validate(t.Context(), bin, p.file))

	out, err := os.Create(filepath.Join(dir, "log"))
	must(t, err)
	defer out.Close()
	p.cmd = exec.Command(bin, "-W", "-S", p.master.Socket+",mode,600", "-f", p.file)
	p.cmd.Stdout, p.cmd.Stderr = out, out
	p.cmd.Dir = dir // the tests' own may be closed to its user
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, Setpgid: true}
	must(t, p.cmd.Start())
	t.Cleanup(func() {
		// The group holds the workers too; older ones would wait for their sessions.
		_ = syscall.Kill(-p.cmd.Process.Pid, syscall.SIGKILL)
		_ = p.cmd.Wait()
		if t.Failed() {
			data, _ := os.ReadFile(out.Name())
			t.Logf("haproxy's log:\n%s", data)
		}
	})
	waitFor(t, "HAProxy to answer", func(ctx context.Context) error {
		_, err := p.runtime.Info(ctx)
		return err
	})
	return p
}

func (p *proxy) write(t *testing.T) {
	t.Helper()
	data, err := Render(p.conf)
	must(t, err)
	must(t, os.WriteFile(p.file, data, 0o600))
	must(t, os.Chown(p.file, p.uid, p.gid))
}

// waitStatus waits until the servers' states are as wanted, such as
// {"be_rw/n1": true}.
func (p *proxy) waitStatus(t *testing.T, want map[string]bool) {
	t.Helper()
	waitFor(t, fmt.Sprint("servers to be ", want), func(ctx context.Context) error {
		stats, err := p.runtime.ShowStat(ctx)
		if err != nil {
			return err
		}
		got := map[string]bool{}
		for _, s := range stats {
			if _, ok := want[s.Backend+"/"+s.Server]; ok && s.CheckStatus != "" && s.CheckStatus != "INI" {
				got[s.Backend+"/"+s.Server] = s.Up
			}
		}
		if fmt.Sprint(got) != fmt.Sprint(want) {
			return fmt.Errorf("they are %+v", stats)
		}
		return nil
	})
}

// session is a connection through HAProxy.
type session struct {
	net.Conn
	node string // which node answered
}

func dialPort(port uint16) (*session, error) {
	conn, err := net.DialTimeout("tcp", fmt.Sprintf("127.0.0.1:%d", port), time.Minute)
	if err != nil {
		return nil, err
	}
	_ = conn.SetDeadline(time.Now().Add(time.Minute))
	var name []byte
	for b := make([]byte, 1); ; {
		if _, err := conn.Read(b); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		if b[0] == '\n' {
			return &session{conn, string(name)}, nil
		}
		name = append(name, b[0])
	}
}

func open(t *testing.T, port uint16) *session {
	t.Helper()
	s, err := dialPort(port)
	must(t, err)
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// echo reports whether the session is alive.
func (s *session) echo() error {
	if _, err := io.WriteString(s, "x"); err != nil {
		return err
	}
	_, err := io.ReadFull(s, make([]byte, 1))
	return err
}

func (p *proxy) get(t *testing.T, url string, tlsConfig *tls.Config, user, password string) (int, string, *x509.Certificate) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	must(t, err)
	if user != "" {
		req.SetBasicAuth(user, password)
	}
	c := &http.Client{Timeout: time.Minute, Transport: &http.Transport{TLSClientConfig: tlsConfig, DisableKeepAlives: true}}
	resp, err := c.Do(req)
	must(t, err)
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.TLS == nil {
		return resp.StatusCode, string(body), nil
	}
	return resp.StatusCode, string(body), resp.TLS.PeerCertificates[0]
}

func (p *proxy) health(t *testing.T, path string) int {
	t.Helper()
	code, _, _ := p.get(t, fmt.Sprintf("http://127.0.0.1:%d%s", p.conf.Ports.Health, path), nil, "", "")
	return code
}

func waitFor(t *testing.T, what string, check func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := check(ctx)
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

func freePort(t *testing.T) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer l.Close()
	return netip.MustParseAddrPort(l.Addr().String()).Port()
}
