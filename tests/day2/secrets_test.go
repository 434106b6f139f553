package day2

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/lab/testbed"
	"pgha/node"
	"pgha/pki"
)

// TestSecrets rotates everything that is secret, under load, with sessions that
// are held open throughout: nothing restarts and no session ends.
func TestSecrets(t *testing.T) {
	r := three(t)
	s := r.healthy(t)
	leader, replica := s.Leader, other(s.Leader)

	r.step(t, "roles changed by hand are put right", func(t *testing.T, _ *testbed.Writer) {
		r.rolesPutRight(t, leader)
	})
	held := r.hold(t, s)
	r.step(t, "certificates are listed and renewed", func(t *testing.T, w *testbed.Writer) {
		r.certificatesRenewed(t, leader)
		held.check(t)
		r.unharmed(t, w)
	})
	r.step(t, "the CA is replaced", func(t *testing.T, w *testbed.Writer) {
		r.replaceCA(t, leader, held)
		held.check(t)
		r.unharmed(t, w)
	})
	if now := r.healthy(t); now.Gate.Epoch != s.Gate.Epoch || now.Leader != leader {
		t.Errorf("the primary was %s in epoch %d and is %s in epoch %d", leader, s.Gate.Epoch, now.Leader, now.Gate.Epoch)
	}
	held.forget(replica)
	r.step(t, "passwords are rotated while a node is off", func(t *testing.T, _ *testbed.Writer) {
		r.rotatePasswords(t, leader, replica)
		held.check(t)
	})
}

// holding is what must outlive every rotation.
type holding struct {
	r        *rig
	sessions map[string]*pgx.Conn // by host and port
	backends map[string]int
	pids     map[string][]int // of PostgreSQL and HAProxy, by host
}

// hold opens sessions through HAProxy and past it, on both nodes.
func (r *rig) hold(t *testing.T, s node.Status) *holding {
	t.Helper()
	h := &holding{r: r, sessions: map[string]*pgx.Conn{}, backends: map[string]int{}, pids: map[string][]int{}}
	for _, host := range []string{"n1", "n2"} {
		h.pids[host] = r.pids(t, host)
		for _, port := range []uint16{5432, 5433, 5442} {
			key := fmt.Sprintf("%s:%d", host, port)
			h.sessions[key] = r.direct(t, host, port)
			h.backends[key] = backend(t, h.sessions[key], key)
		}
	}
	return h
}

// direct opens a session as the application: through HAProxy from where clients
// are, and to PostgreSQL itself from the other data node, which the firewall lets
// in.
func (r *rig) direct(t *testing.T, host string, port uint16) *pgx.Conn {
	t.Helper()
	p, err := r.CA(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	conn, err := r.connect(t, host, port, p)
	if err != nil {
		t.Fatalf("connect to %s:%d: %v", host, port, err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // its host may be off by then
	return conn
}

func (r *rig) connect(t *testing.T, host string, port uint16, p *x509.CertPool) (*pgx.Conn, error) {
	t.Helper()
	var from testbed.Dialer = r.Lab
	if port == 5442 {
		from = r.Host(other(host))
	}
	cfg, err := testbed.AppConfig(from, p, r.Addr(host), port)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnectTimeout = time.Minute
	return pgx.ConnectConfig(within(t, wait), cfg)
}

func backend(t *testing.T, c *pgx.Conn, key string) (pid int) {
	t.Helper()
	if err := c.QueryRow(within(t, wait), "SELECT pg_backend_pid()").Scan(&pid); err != nil {
		t.Errorf("the session to %s does not answer: %v", key, err)
	}
	return pid
}

// check asks every session, and whether anything was restarted.
func (h *holding) check(t *testing.T) {
	t.Helper()
	for key, c := range h.sessions {
		if got := backend(t, c, key); got != h.backends[key] {
			t.Errorf("the session to %s is with backend %d, it was %d", key, got, h.backends[key])
		}
	}
	for host, was := range h.pids {
		if now := h.r.pids(t, host); !slices.Equal(was, now) {
			t.Errorf("PostgreSQL and HAProxy on %s were %v and are %v", host, was, now)
		}
	}
}

// forget lets go of what a host has, which will be switched off.
func (h *holding) forget(host string) {
	delete(h.pids, host)
	for key := range h.sessions {
		// One through another host's HAProxy may end here, and one past HAProxy to
		// the other host begins here.
		if strings.HasPrefix(key, host+":") || strings.HasSuffix(key, ":5433") || strings.HasSuffix(key, ":5442") {
			delete(h.sessions, key)
		}
	}
}

// pids are those of the postmaster and of HAProxy's master.
func (r *rig) pids(t *testing.T, host string) []int {
	t.Helper()
	files, err := filepath.Glob(r.Host(host).Path("/var/lib/pgha/postgres/*/data/postmaster.pid"))
	if err != nil || len(files) != 1 {
		t.Fatalf("find the postmaster's pid file on %s: %v, %v", host, files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	postmaster, err := strconv.Atoi(line)
	if err != nil {
		t.Fatalf("read %s: %v", files[0], err)
	}
	procs, err := r.Host(host).Processes()
	if err != nil {
		t.Fatal(err)
	}
	proxies := map[int]bool{}
	for _, p := range procs {
		if p.Comm == "haproxy" {
			proxies[p.PID] = true
		}
	}
	for _, p := range procs {
		if p.Comm == "haproxy" && !proxies[p.PPID] {
			return []int{postmaster, p.NSPID}
		}
	}
	t.Fatalf("no HAProxy runs on %s", host)
	return nil
}

// rolesPutRight changes pgha's own database roles by hand.
func (r *rig) rolesPutRight(t *testing.T, leader string) {
	for _, sql := range []string{
		"ALTER ROLE replicator NOREPLICATION PASSWORD 'x'",
		"ALTER ROLE rewinder NOLOGIN CREATEDB",
		"REVOKE EXECUTE ON FUNCTION pg_read_binary_file(text) FROM rewinder",
	} {
		r.do(t, leader, "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", sql)
	}
	err := testbed.Until(within(t, wait), "the roles to be put right", func() error {
		out, err := r.Pgha(t.Context(), leader, "psql", "-X", "-A", "-t", "-c",
			"SELECT rolname, rolcanlogin, rolreplication, rolcreatedb, rolpassword IS NULL FROM pg_authid WHERE rolname IN ('replicator', 'rewinder') ORDER BY 1")
		if err == nil && strings.TrimSpace(out) != "replicator|t|t|f|t\nrewinder|t|f|f|t" {
			err = fmt.Errorf("they are %s", out)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	if out := strings.TrimSpace(r.do(t, leader, "psql", "-X", "-A", "-t", "-c", "SELECT has_function_privilege('rewinder', 'pg_read_binary_file(text)', 'EXECUTE')")); out != "t" {
		t.Errorf("rewinder may call pg_read_binary_file: %s", out)
	}
	for _, word := range []string{"replicator has a password", "replicator may not replicate", "rewinder may not log in", "rewinder has rights", "rewinder may not call pg_catalog.pg_read_binary_file(text)"} {
		r.eventSays(t, "witness", word)
	}
}

// eventSays waits until a host tells an event with these words.
func (r *rig) eventSays(t *testing.T, host, words string) {
	t.Helper()
	err := testbed.Until(within(t, wait), "an event on "+host, func() error {
		out, err := r.Pgha(t.Context(), host, "events", "-n", "0")
		if err == nil && !strings.Contains(out, words) {
			err = fmt.Errorf("none says %q: %s", words, out)
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// certs are the certificates of all nodes as a host lists them.
func (r *rig) certs(t *testing.T, host string) map[string]node.CertsReport {
	t.Helper()
	var all []node.CertsReport
	if err := json.Unmarshal([]byte(r.do(t, host, "cert", "list", "--json")), &all); err != nil {
		t.Fatal(err)
	}
	out := map[string]node.CertsReport{}
	for _, n := range all {
		if !n.Reachable {
			t.Errorf("%s lists no certificates of %s", host, n.Node)
		}
		out[n.Node] = n
	}
	if len(out) != 3 || len(out["n1"].Certs) != 5 || len(out["n2"].Certs) != 5 || len(out["witness"].Certs) != 1 {
		t.Errorf("%s lists %+v", host, all)
	}
	return out
}

// serials are the serial numbers of a node's certificates, by role.
func serials(n node.CertsReport) map[pki.Role]string {
	out := map[pki.Role]string{}
	for _, c := range n.Certs {
		out[c.Role] = c.Serial
	}
	return out
}

func (r *rig) certificatesRenewed(t *testing.T, leader string) {
	before := r.certs(t, leader)
	r.refused(t, leader, []string{"cert", "renew", "n9"}, "n9", "n1, n2, witness")
	r.refused(t, "witness", []string{"cert", "renew", "--all"}, "n1")
	r.do(t, leader, "cert", "renew", "witness")
	one := r.certs(t, leader)
	r.do(t, leader, "cert", "renew", "--all")
	all := r.certs(t, "witness")
	for _, host := range []string{"n1", "n2", "witness"} {
		for role, was := range serials(before[host]) {
			if now := serials(one[host])[role]; (now != was) != (host == "witness") {
				t.Errorf("renewing the witness alone: certificate %s of %s was %s, is %s", role, host, was, now)
			}
			if now := serials(all[host])[role]; now == serials(one[host])[role] {
				t.Errorf("certificate %s of %s was not renewed with all", role, host)
			}
		}
	}
}

// replaceCA goes through all steps, with the witness off at first, and once back.
func (r *rig) replaceCA(t *testing.T, leader string, held *holding) {
	old, err := r.CA(t.Context(), leader)
	if err != nil {
		t.Fatal(err)
	}
	r.accepts(t, "before", old, true)
	r.refused(t, leader, []string{"rotate", "ca", "--sign", "--yes"}, "begin one with pgha rotate ca")
	r.refused(t, "witness", []string{"rotate", "ca"}, "n1", "n2")

	if err := r.PowerOff("witness"); err != nil {
		t.Fatal(err)
	}
	// It has led etcd: until there is another leader nothing can begin.
	r.await(t, leader, "another to lead etcd", func(s node.Status) bool {
		return slices.ContainsFunc(s.Members, func(m node.MemberStatus) bool { return m.EtcdLeader && m.Name != "witness" })
	})
	r.refused(t, leader, []string{"rotate", "ca", "--timeout", "15s"}, "witness does not answer", "pgha rotate ca goes on waiting")
	r.refused(t, leader, []string{"rotate", "ca", "--sign", "--yes"}, "confirmed the step before (", "witness)")
	if err := r.PowerOn(t.Context(), "witness"); err != nil {
		t.Fatal(err)
	}
	r.do(t, leader, "rotate", "ca")
	both := r.caFile(t, leader, 2)
	r.accepts(t, "both trusted, the file of the former", old, true)
	r.accepts(t, "both trusted, the file of both", pool(both), true)
	held.check(t)
	s := r.await(t, "witness", "a reminder in status", func(s node.Status) bool { return strings.Contains(strings.Join(s.ToDo, " "), "--sign") })
	if s.Health != node.Healthy {
		t.Errorf("status is %s while both CAs are trusted: %s", s.Health, s.Verdict)
	}
	r.refused(t, leader, []string{"rotate", "ca", "--finish", "--yes"}, "does not sign yet")

	next := pool(pem2(t, both)[1:])
	r.do(t, leader, "rotate", "ca", "--sign", "--yes")
	r.accepts(t, "the next signs, the file of the former", old, false)
	r.accepts(t, "the next signs, the file of both", pool(both), true)
	r.accepts(t, "the next signs, its own file", next, true)
	held.check(t)
	r.do(t, other(leader), "rotate", "ca", "--back", "--yes")
	r.accepts(t, "back, the file of the former", old, true)
	r.do(t, other(leader), "rotate", "ca", "--sign", "--yes")

	r.do(t, leader, "rotate", "ca", "--finish", "--yes")
	last := r.caFile(t, leader, 1)
	r.accepts(t, "the end, the file of the former", old, false)
	r.accepts(t, "the end, the new file", pool(last), true)
	for host, n := range r.certs(t, "witness") {
		for _, c := range n.Certs {
			if want, err := pki.Fingerprint(last[0]); err != nil || c.Issuer != want || len(n.Trusted) != 1 || n.Trusted[0].Fingerprint != want {
				t.Errorf("%s: certificate %s is of %s and it trusts %v, want %s (%v)", host, c.Role, c.Issuer, n.Trusted, want, err)
			}
		}
	}
	r.refused(t, leader, []string{"rotate", "ca", "--back", "--yes"}, "nothing to go back from")
	// Whatever is made from now on stands on the new CA.
	r.do(t, leader, "psql", "-X", "-c", "SELECT 1")
	r.do(t, leader, "token", "create")
	// Replication has to connect again some day: it can.
	r.do(t, leader, "psql", "-X", "-c", "SELECT pg_terminate_backend(pid) FROM pg_stat_replication")
}

// caFile is what pgha cert ca prints, by certificate.
func (r *rig) caFile(t *testing.T, host string, want int) [][]byte {
	t.Helper()
	out := pem2(t, [][]byte{[]byte(r.do(t, host, "cert", "ca"))})
	if len(out) != want {
		t.Fatalf("pgha cert ca on %s prints %d certificates, want %d", host, len(out), want)
	}
	return out
}

func pem2(t *testing.T, parts [][]byte) [][]byte {
	t.Helper()
	out, err := pki.Trusted(bytes.Join(parts, []byte("\n")))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func pool(certs [][]byte) *x509.CertPool {
	p := x509.NewCertPool()
	for _, c := range certs {
		p.AppendCertsFromPEM(c)
	}
	return p
}

// accepts tries a new session with a client's CA file, through HAProxy and past
// it, on both nodes.
func (r *rig) accepts(t *testing.T, when string, p *x509.CertPool, want bool) {
	t.Helper()
	for _, host := range []string{"n1", "n2"} {
		for _, port := range []uint16{5432, 5442} {
			conn, err := r.connect(t, host, port, p)
			if err == nil {
				_ = conn.Close(context.Background())
			}
			if (err == nil) != want || err != nil && !strings.Contains(err.Error(), "certificate signed by unknown authority") {
				t.Errorf("%s: a client at %s:%d gets %v", when, host, port, err)
			}
		}
	}
}

// rotatePasswords does so while a node is off.
func (r *rig) rotatePasswords(t *testing.T, leader, off string) {
	before := r.secrets(t, leader)
	if err := r.PowerOff(off); err != nil {
		t.Fatal(err)
	}
	r.do(t, leader, "rotate", "passwords", "--json")
	now := r.secrets(t, leader)
	if now.PatroniREST == before.PatroniREST || now.StatsPage == before.StatsPage || now.FormerPasswords()[0] != before.PatroniREST {
		t.Error("the passwords were not rotated, or the former one is not known any more while a node is off")
	}
	r.usesPassword(t, leader, now)
	if err := r.PowerOn(t.Context(), off); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{off, leader} {
		err := testbed.Until(within(t, wait), "the former passwords to be forgotten on "+host, func() error {
			if n := len(r.secrets(t, host).FormerPasswords()); n > 0 {
				return fmt.Errorf("%d are still known", n)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if back := r.secrets(t, off); back.PatroniREST != now.PatroniREST || back.StatsPage != now.StatsPage {
		t.Errorf("%s came back with other passwords", off)
	}
	r.usesPassword(t, off, now)
	r.eventSays(t, "witness", "the former ones are forgotten")
}

// usesPassword: what a node's children are configured with.
func (r *rig) usesPassword(t *testing.T, host string, s cluster.Secrets) {
	t.Helper()
	yml, err := os.ReadFile(r.Host(host).Path("/var/lib/pgha/patroni/patroni.yml"))
	if err != nil || !bytes.Contains(yml, []byte(s.PatroniREST)) {
		t.Errorf("Patroni on %s is not configured with the new password (%v)", host, err)
	}
	page, err := os.ReadFile(r.Host(host).Path("/var/lib/pgha/stats-password"))
	if err != nil || string(bytes.TrimSpace(page)) != s.StatsPage {
		t.Errorf("the status page of %s does not have the new password (%v)", host, err)
	}
}

// secrets are the passwords as a host has them.
func (r *rig) secrets(t *testing.T, host string) cluster.Secrets {
	t.Helper()
	read := func(path string) []byte {
		data, err := os.ReadFile(r.Host(host).Path(path))
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	raw, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(read("/var/lib/pgha/pki/sealing.key"))))
	if err != nil {
		t.Fatal(err)
	}
	key, err := cluster.SealingKeyFrom(raw)
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.ClusterOf(read("/var/lib/pgha/pki/ca.crt"))
	if err != nil {
		t.Fatal(err)
	}
	s, err := cluster.OpenSecrets(key, id, read("/var/lib/pgha/secrets.sealed"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}
