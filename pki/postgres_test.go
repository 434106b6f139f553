package pki

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

func ids(t *testing.T, name string) (uid, gid int) {
	t.Helper()
	u, err := user.Lookup(name)
	if err != nil {
		t.Fatal(err)
	}
	if uid, err = strconv.Atoi(u.Uid); err != nil {
		t.Fatal(err)
	}
	if gid, err = strconv.Atoi(u.Gid); err != nil {
		t.Fatal(err)
	}
	return uid, gid
}

// postgres is a real server that takes the bundle as certificate and as key and
// lets in nobody without a certificate of the cluster's CA.
type postgres struct {
	bin, addr, port string
	dir             Dir
	cmd             *exec.Cmd
}

func startPostgres(t *testing.T, d Dir) *postgres {
	t.Helper()
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		t.Fatalf("no PostgreSQL under /usr/lib/postgresql: %v", err)
	}
	root := openTempDir(t)
	data := filepath.Join(root, "data")
	sockets := filepath.Join(root, "run")
	p := &postgres{bin: bins[len(bins)-1], dir: d}
	p.addr, p.port = freePort(t)
	o := d.Owners[RolePostgres]
	for _, path := range []string{data, sockets} {
		if err := os.Mkdir(path, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, o.UID, o.GID); err != nil {
			t.Fatal(err)
		}
	}
	as := &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(o.UID), Gid: uint32(o.GID)}}
	ctx, cancel := context.WithTimeout(t.Context(), 2*patience)
	defer cancel()
	initdb := exec.CommandContext(ctx, filepath.Join(p.bin, "initdb"), "--no-sync", "--auth=reject", "--username=postgres", "-D", data)
	initdb.SysProcAttr = as
	initdb.Env = append(os.Environ(), "LC_ALL=C")
	if out, err := initdb.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v\n%s", err, out)
	}
	hba := "hostssl all all all cert\n"
	if err := os.WriteFile(filepath.Join(data, "pg_hba.conf"), []byte(hba), 0o644); err != nil {
		t.Fatal(err)
	}
	args := []string{"-D", data}
	for k, v := range map[string]string{
		"listen_addresses": p.addr, "port": p.port, "unix_socket_directories": sockets, "fsync": "off",
		"ssl": "on", "ssl_cert_file": d.BundlePath(RolePostgres), "ssl_key_file": d.BundlePath(RolePostgres), "ssl_ca_file": d.CAPath(),
	} {
		args = append(args, "-c", k+"="+v)
	}
	p.cmd = exec.Command(filepath.Join(p.bin, "postgres"), args...)
	p.cmd.SysProcAttr = as
	p.cmd.Env = append(os.Environ(), "LC_ALL=C")
	out := start(t, p.cmd)
	// Before start's own clean-up, which kills: an immediate shutdown takes
	// PostgreSQL's children along.
	t.Cleanup(func() {
		_ = p.cmd.Process.Signal(syscall.SIGQUIT) // an error means that it has ended already
		select {
		case <-out.exited:
		case <-time.After(patience):
			t.Error("postgres did not stop")
		}
	})
	eventually(t, "PostgreSQL", func() bool {
		return exited(out) || exec.Command(filepath.Join(p.bin, "pg_isready"), "-q", "-h", sockets, "-p", p.port).Run() == nil
	})
	if exited(out) {
		t.Fatalf("postgres ended:\n%s", out)
	}
	return p
}

// freePort returns a port that is free on a loopback address of the test's own:
// on 127.0.0.1 somebody else could take it before PostgreSQL does.
func freePort(t *testing.T) (addr, port string) {
	t.Helper()
	addr = fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	ln, err := net.Listen("tcp", net.JoinHostPort(addr, "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return addr, strconv.Itoa(ln.Addr().(*net.TCPAddr).Port)
}

// psql runs one query; settings replace or extend the good connection string.
func (p *postgres) psql(t *testing.T, query string, settings ...string) (string, error) {
	t.Helper()
	admin := p.dir.BundlePath(RoleAdmin)
	conn := append([]string{
		"host=" + serverName, "hostaddr=" + p.addr, "port=" + p.port, "user=postgres", "dbname=postgres",
		"sslmode=verify-full", "sslrootcert=" + p.dir.CAPath(), "sslcert=" + admin, "sslkey=" + admin, "connect_timeout=30",
	}, settings...) // libpq takes the last of two
	out, err := run(t, filepath.Join(p.bin, "psql"), "-XAtq", "-d", strings.Join(conn, " "), "-c", query)
	return strings.TrimSpace(out), err
}

// serial is that of the certificate which the server presents now.
func (p *postgres) serial(t *testing.T, cfg *tls.Config) string {
	t.Helper()
	conn, err := net.Dial("tcp", net.JoinHostPort(p.addr, p.port))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(patience))
	const sslRequest = 80877103 // PostgreSQL protocol, "SSLRequest"
	req := binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(nil, 8), sslRequest)
	if _, err := conn.Write(req); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 1)
	if _, err := io.ReadFull(conn, answer); err != nil || answer[0] != 'S' {
		t.Fatalf("answer to SSLRequest: %q, %v", answer, err)
	}
	c := tls.Client(conn, named(cfg, serverName))
	if err := c.Handshake(); err != nil {
		t.Fatal(err)
	}
	return c.ConnectionState().PeerCertificates[0].SerialNumber.String()
}

func TestPostgreSQLTakesTheBundle(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	uid, gid := ids(t, "postgres")
	d := newDir(t, ca, map[Role]Owner{RolePostgres: {uid, gid}}, RolePostgres)
	// Method "cert" takes the common name for the database user.
	write := func(d Dir, ca *CA) {
		t.Helper()
		spec := specFor(ca.ClusterID(), "n1", RoleAdmin)
		spec.CommonName, spec.DNSNames, spec.IPs = "postgres", nil, nil
		if err := d.WriteBundle(RoleAdmin, issue(t, ca, spec, now)); err != nil {
			t.Fatal(err)
		}
	}
	write(d, ca)
	other := Dir{Path: openTempDir(t) + "/pki"}
	write(other, newCA(t, clusterB, now))
	p := startPostgres(t, d)

	const query = "select ssl, version >= 'TLSv1.3', client_dn from pg_stat_ssl where pid = pg_backend_pid()"
	if out, err := p.psql(t, query); err != nil || out != "t|t|/CN=postgres" {
		t.Errorf("verify-full with the bundle: %v: %s", err, out)
	}
	for _, tc := range []struct {
		name, want string
		settings   []string
	}{
		{"plain text", "no encryption", []string{"sslmode=disable"}},
		{"wrong name", "does not match host name", []string{"host=other.example.test"}},
		{"wrong address", "does not match host name", []string{"host=192.0.2.1"}},
		{"another user than the certificate's", "certificate authentication failed", []string{"user=replicator"}},
		// The alert can be lost to a reset, so only that TLS failed is asked for.
		{"certificate of another cluster", "SSL", []string{"sslcert=" + other.BundlePath(RoleAdmin), "sslkey=" + other.BundlePath(RoleAdmin)}},
		{"server of another cluster", "certificate verify failed", []string{"sslrootcert=" + writeCA(t, newCA(t, clusterA, now))}},
		{"no certificate", "requires a valid client certificate", []string{"sslcert=/nonexistent", "sslkey=/nonexistent"}},
	} {
		if out, err := p.psql(t, "select 1", tc.settings...); err == nil || !strings.Contains(out, tc.want) {
			t.Errorf("%s: %v: %s; want %q", tc.name, err, out, tc.want)
		}
	}
	if out, err := p.psql(t, "select 1", "host=127.0.0.1"); err != nil {
		t.Errorf("by address: %v: %s", err, out)
	}

	// Renewal: the file is replaced, a reload makes the new leaf the one served.
	client := newReloader(t, d, RoleAdmin).ClientConfig(nil)
	before := p.serial(t, client)
	next := issue(t, ca, specFor(clusterA, "n1", RolePostgres), now)
	if err := d.WriteBundle(RolePostgres, next); err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	want := next.Leaf.SerialNumber.String()
	if before == want {
		t.Fatal("serial number did not change")
	}
	eventually(t, "the renewed certificate", func() bool { return p.serial(t, client) == want })
}

func writeCA(t *testing.T, ca *CA) string {
	t.Helper()
	d := Dir{Path: openTempDir(t)}
	if err := d.WriteCA(ca.CertPEM()); err != nil {
		t.Fatal(err)
	}
	return d.CAPath()
}
