package e2e

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgha/cluster"
	"pgha/lab/testbed"
	"pgha/pki"
)

// ports: each port answers whom it should, and asks for what it should.
func (c *trio) ports(t *testing.T) {
	t.Run("reach", c.reach)
	t.Run("PostgreSQL", c.postgresPorts)
	t.Run("health", c.healthPort)
	t.Run("status page", c.statsPort)
	t.Run("client certificates", c.certificatePorts)
	t.Run("API", c.apiPort)
}

// strangerAddr belongs to no member, client or probe.
const strangerAddr = "192.0.2.9"

// reach: clients reach what is for clients, members everything, strangers
// nothing, but for the API while a join token is open.
func (c *trio) reach(t *testing.T) {
	forClients, inside := []string{"5432", "5433", "8404", "8405", "8432"}, []string{"5442", "8008", "2380"}
	var wg sync.WaitGroup
	defer wg.Wait()
	open := func(who string, dial trioDial, host string, ports ...string) {
		for _, p := range ports {
			wg.Go(func() {
				if err := tryDial(t, dial, net.JoinHostPort(c.Addr(host), p), time.Minute); err != nil {
					t.Errorf("%s cannot reach %s:%s: %v", who, host, p, err)
				}
			})
		}
	}
	shut := func(who string, dial trioDial, host string, ports ...string) {
		for _, p := range ports {
			wg.Go(func() {
				// Dropped, not refused: nobody is told that there is something.
				if err := tryDial(t, dial, net.JoinHostPort(c.Addr(host), p), 2*time.Second); !errors.Is(err, context.DeadlineExceeded) && !isTimeout(err) {
					t.Errorf("%s:%s is not closed to %s: %v", host, p, who, err)
				}
			})
		}
	}
	stranger := c.stranger(t)
	for _, h := range []string{"n1", "n2"} {
		open("a client", c.Lab.Dial, h, forClients...)
		shut("a client", c.Lab.Dial, h, append(inside, "2379")...)
		open("a member", c.Host("witness").Dial, h, append(forClients, inside...)...)
		shut("a stranger", stranger, h, append(append(forClients, inside...), "2379")...)
		// etcd's port for clients is for Patroni alone, and listens on loopback.
		if err := tryDial(t, c.Host("witness").Dial, c.Addr(h)+":2379", time.Minute); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a member asks for etcd's client port of %s: %v", h, err)
		}
	}
	open("a client", c.Lab.Dial, "witness", "8432")
	shut("a client", c.Lab.Dial, "witness", "2380")
	open("a member", c.Host("n1").Dial, "witness", "8432", "2380")
	shut("a stranger", stranger, "witness", "8432", "2380")
	wg.Wait()
	for _, h := range trioHosts {
		// The way there and back is open to a stranger: a port that is not pgha's
		// answers, by refusing.
		if err := tryDial(t, stranger, net.JoinHostPort(c.Addr(h), "9"), time.Minute); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("a stranger asks %s for a port that is not pgha's: %v", h, err)
		}
	}
	c.doorForJoins(t, stranger)
}

// doorForJoins: a token opens the API, and nothing else, to the host that is
// to join; its end closes it.
func (c *trio) doorForJoins(t *testing.T, stranger trioDial) {
	out, err := c.Pgha(within(t, trioWait), "n1", "token", "create", "--json")
	if err != nil {
		t.Fatal(err)
	}
	var token struct{ ID string }
	if err := json.Unmarshal([]byte(out), &token); err != nil || token.ID == "" {
		t.Fatalf("read token %s: %v", out, err)
	}
	for _, h := range []string{"n1", "n2"} {
		err := testbed.Until(within(t, trioWait), "the API of "+h+" to open for a join", func() error {
			return tryDial(t, stranger, c.Addr(h)+":8432", 2*time.Second)
		})
		if err != nil {
			t.Error(err)
		}
		if err := tryDial(t, stranger, c.Addr(h)+":5432", 2*time.Second); !isTimeout(err) {
			t.Errorf("a join token opened %s:5432: %v", h, err)
		}
	}
	if _, err := c.Pgha(within(t, trioWait), "n1", "token", "revoke", token.ID); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"n1", "n2"} {
		err := testbed.Until(within(t, trioWait), "the API of "+h+" to close", func() error {
			if err := tryDial(t, stranger, c.Addr(h)+":8432", 2*time.Second); !isTimeout(err) {
				return fmt.Errorf("it is open: %w", orOpen(err))
			}
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

func tryDial(t *testing.T, dial trioDial, addr string, d time.Duration) error {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	conn, err := dial(ctx, "tcp", addr)
	if err == nil {
		_ = conn.Close()
	}
	return err
}

// stranger adds a host whose packets come from strangerAddr; the nodes know
// the way back to it.
func (c *trio) stranger(t *testing.T) trioDial {
	t.Helper()
	if err := c.AddHosts(t.Context(), "stranger"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.PowerOff("stranger"); err != nil {
			t.Error(err)
		}
	})
	commands := map[string]string{"stranger": "ip address flush dev eth0 && ip address add " + strangerAddr + "/32 dev eth0"}
	for _, h := range trioHosts {
		commands["stranger"] += " && ip route add " + c.Addr(h) + "/32 dev eth0 src " + strangerAddr
		commands[h] = "ip route add " + strangerAddr + "/32 dev eth0"
	}
	for h, cmd := range commands {
		if _, err := c.Host(h).Run(t.Context(), "/bin/sh", "-c", cmd); err != nil {
			t.Fatal(err)
		}
	}
	return c.Host("stranger").Dial
}

// postgresPorts: no session without TLS, without the right password, or, where
// the client verifies, with a server that is not the cluster's.
func (c *trio) postgresPorts(t *testing.T) {
	other, err := pki.NewCA(uuid.NewString(), "other", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	wrong := x509.NewCertPool()
	wrong.AppendCertsFromPEM(other.CertPEM())
	fromMember := func(cfg *pgx.ConnConfig) { cfg.DialFunc = pgconn.DialFunc(c.Host("witness").Dial) }
	for _, h := range []string{"n1", "n2"} {
		for _, port := range []uint16{5432, 5433, 5442} {
			try := func(change func(*pgx.ConnConfig)) error {
				_, err := c.connect(t, h, port, func(cfg *pgx.ConnConfig) {
					if port == 5442 {
						fromMember(cfg)
					}
					change(cfg)
				})
				return err
			}
			if err := try(func(*pgx.ConnConfig) {}); err != nil {
				t.Errorf("%s:%d refuses a good client: %v", h, port, err)
			}
			for what, r := range map[string]struct {
				change func(*pgx.ConnConfig)
				code   string
				text   string
			}{
				"plain text":                  {func(cfg *pgx.ConnConfig) { cfg.TLSConfig = nil }, "28000", "no encryption"},
				"wrong password":              {func(cfg *pgx.ConnConfig) { cfg.Password = "wrong" }, "28P01", ""},
				"no password":                 {func(cfg *pgx.ConnConfig) { cfg.Password = "" }, "28P01", ""},
				"superuser by password":       {func(cfg *pgx.ConnConfig) { cfg.User, cfg.Password = "postgres", "postgres" }, "28000", "client certificate"},
				"replication by password":     {func(cfg *pgx.ConnConfig) { cfg.User, cfg.Password = "replicator", "replicator" }, "28000", ""},
				"superuser, in plain text":    {func(cfg *pgx.ConnConfig) { cfg.User, cfg.TLSConfig = "postgres", nil }, "28000", "no encryption"},
				"superuser as HAProxy":        {func(cfg *pgx.ConnConfig) { cfg.User = "postgres"; c.present(t, cfg.TLSConfig, h, pki.RoleHAProxy) }, "28000", ""},
				"replication as the admin":    {func(cfg *pgx.ConnConfig) { cfg.User = "replicator"; c.present(t, cfg.TLSConfig, h, pki.RoleAdmin) }, "28000", ""},
				"application by certificate":  {func(cfg *pgx.ConnConfig) { cfg.Password = ""; c.present(t, cfg.TLSConfig, h, pki.RoleAdmin) }, "28P01", ""},
				"superuser as another person": {func(cfg *pgx.ConnConfig) { cfg.User = "postgres"; c.present(t, cfg.TLSConfig, h, pki.RolePatroni) }, "28000", ""},
			} {
				var pg *pgconn.PgError
				if err := try(r.change); !errors.As(err, &pg) || pg.Code != r.code || !strings.Contains(pg.Message, r.text) {
					t.Errorf("%s to %s:%d: %v, want SQLSTATE %s %s", what, h, port, err, r.code, r.text)
				}
			}
			var unknown x509.UnknownAuthorityError
			if err := try(func(cfg *pgx.ConnConfig) { cfg.TLSConfig.RootCAs = wrong }); !errors.As(err, &unknown) {
				t.Errorf("%s:%d is taken for a server of another CA: %v", h, port, err)
			}
			var name x509.HostnameError
			if err := try(func(cfg *pgx.ConnConfig) { cfg.TLSConfig.ServerName = "elsewhere" }); !errors.As(err, &name) {
				t.Errorf("%s:%d is taken for another host: %v", h, port, err)
			}
		}
	}
}

// present has cfg present a certificate of host.
func (c *trio) present(t *testing.T, cfg *tls.Config, host string, role pki.Role) {
	t.Helper()
	b, err := c.pkiOf(host).Bundle(role)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(b.CertPEM, b.KeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	cfg.Certificates = []tls.Certificate{cert}
}

// asClient verifies host, and presents the certificate of role unless it is "".
func (c *trio) asClient(t *testing.T, host string, role pki.Role) *tls.Config {
	t.Helper()
	pool, err := c.CA(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: pool, ServerName: host}
	if role != "" {
		c.present(t, cfg, "n1", role)
	}
	return cfg
}

// answer is what an HTTP server said.
type answer struct {
	status int
	body   string
}

// ask does one request.
func ask(t *testing.T, client *http.Client, method, url string, change func(*http.Request)) (answer, error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	if change != nil {
		change(req)
	}
	resp, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(resp.Body)
	return answer{resp.StatusCode, string(body)}, err
}

// healthPort: a load balancer's probe asks by plain HTTP.
func (c *trio) healthPort(t *testing.T) {
	client := httpsFrom(c.Lab.Dial, nil)
	for _, h := range []string{"n1", "n2"} {
		for path, want := range map[string]int{"/rw": 200, "/ro": 200, "/": 404, "/metrics": 404} {
			if a, err := ask(t, client, http.MethodGet, "http://"+c.Addr(h)+":8405"+path, nil); err != nil || a.status != want {
				t.Errorf("%s:8405%s: %+v, %v, want %d", h, path, a, err, want)
			}
		}
	}
}

// statsPort: HAProxy's status page wants TLS and the password.
func (c *trio) statsPort(t *testing.T) {
	good := c.secretsOf(t, "n1").StatsPage
	for _, h := range []string{"n1", "n2"} {
		url := c.Addr(h) + ":8404"
		if a, err := ask(t, httpsFrom(c.Lab.Dial, nil), http.MethodGet, "http://"+url+"/", nil); err == nil && a.status < 400 {
			t.Errorf("%s answers plain HTTP: %+v", url, a)
		}
		client := httpsFrom(c.Lab.Dial, c.asClient(t, h, ""))
		for _, path := range []string{"/", "/metrics"} {
			for what, r := range map[string]struct {
				user, password string
				want           int
			}{
				"without a password": {"", "", 401}, "a wrong password": {cluster.StatsPageUser, "wrong", 401},
				"another user": {"admin", good, 401}, "the password": {cluster.StatsPageUser, good, 200},
			} {
				a, err := ask(t, client, http.MethodGet, "https://"+url+path, func(req *http.Request) {
					if r.user != "" {
						req.SetBasicAuth(r.user, r.password)
					}
				})
				if err != nil || a.status != r.want || (r.want == 200) != strings.Contains(a.body, "be_rw") {
					t.Errorf("%s%s, %s: status %d, %v, want %d", url, path, what, a.status, err, r.want)
				}
			}
		}
	}
}

// certificatePorts: what is for members alone wants a member's certificate of
// the right role, even from a member's address.
func (c *trio) certificatePorts(t *testing.T) {
	other := c.foreign(t)
	for h, peer := range map[string]string{"n1": "n2", "n2": "n1"} {
		for _, p := range []struct {
			from, addr, path string
			good             pki.Role // of the certificate
		}{
			{h, "127.0.0.1:2379", "/version", pki.RolePatroni},
			{peer, c.Addr(h) + ":2380", "/version", pki.RoleNode},
			{peer, c.Addr(h) + ":8008", "/liveness", pki.RoleHAProxy},
		} {
			url := "https://" + p.addr + p.path
			as := func(role pki.Role, change func(*tls.Config)) (answer, error) {
				cfg := c.asClient(t, h, "")
				if role != "" {
					c.present(t, cfg, p.from, role)
				}
				if change != nil {
					change(cfg)
				}
				return ask(t, httpsFrom(c.Host(p.from).Dial, cfg), http.MethodGet, url, nil)
			}
			if a, err := as(p.good, nil); err != nil || a.status != 200 {
				t.Errorf("%s refuses the certificate of role %s: %+v, %v", url, p.good, a, err)
			}
			if a, err := as("", nil); !refusedByTLS(err) {
				t.Errorf("%s answers without a certificate: %+v, %v", url, a, err)
			}
			if a, err := as("", func(cfg *tls.Config) { cfg.Certificates = []tls.Certificate{other} }); !refusedByTLS(err) {
				t.Errorf("%s answers to a certificate of another CA: %+v, %v", url, a, err)
			}
		}
		// A certificate lets one read; to change something takes the password.
		client := httpsFrom(c.Host(peer).Dial, c.asClient(t, h, pki.RoleHAProxy))
		for _, r := range []struct{ method, path string }{
			{http.MethodPost, "/reload"}, {http.MethodPost, "/restart"}, {http.MethodPost, "/switchover"}, {http.MethodPost, "/reinitialize"}, {http.MethodPatch, "/config"},
		} {
			if a, err := ask(t, client, r.method, "https://"+c.Addr(h)+":8008"+r.path, nil); err != nil || a.status != 401 {
				t.Errorf("%s %s of Patroni on %s without its password: %+v, %v", r.method, r.path, h, a, err)
			}
		}
	}
}

// refusedByTLS tells whether the server ended the handshake, for want of a
// certificate that it likes. A reset can overtake the alert that says so.
func refusedByTLS(err error) bool {
	var op *net.OpError
	return errors.Is(err, syscall.ECONNRESET) || errors.As(err, &op) && op.Op == "remote error" && strings.Contains(op.Error(), "certificate")
}

// foreign is a certificate that looks like n1's, of another CA.
func (c *trio) foreign(t *testing.T) tls.Certificate {
	t.Helper()
	mine, err := c.pkiOf("n1").Bundle(pki.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.IdentityOf(mine.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.NewCA(id.ClusterID, "main", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	key, csr, err := pki.NewKeyAndCSR("n1")
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := ca.Sign(csr, pki.LeafSpec{Identity: id, CommonName: "n1", DNSNames: []string{"n1"}, Lifetime: time.Hour}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(leaf, key)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// apiPort: without a certificate one may say hello and join; a member's node
// certificate opens what is for members; nothing of the local API is there.
func (c *trio) apiPort(t *testing.T) {
	other := c.foreign(t)
	for _, h := range trioHosts {
		base := "https://" + c.Addr(h) + ":8432"
		as := func(role pki.Role) *http.Client { return httpsFrom(c.Lab.Dial, c.asClient(t, h, role)) }
		a, err := ask(t, as(""), http.MethodGet, base+cluster.PathHello, nil)
		var hello cluster.Hello
		if err != nil || a.status != 200 || json.Unmarshal([]byte(a.body), &hello) != nil || hello.Node != h {
			t.Errorf("hello to %s: %+v, %v", h, a, err)
		}
		if a, err := ask(t, as(""), http.MethodPost, base+cluster.PathJoin, nil); err != nil || a.status < 400 || strings.Contains(a.body, string(cluster.CodeNoMember)) {
			t.Errorf("an empty join at %s: %+v, %v", h, a, err)
		}
		for _, r := range []struct {
			method, path          string
			nobody, patroni, node int
		}{
			{http.MethodGet, "/v1/node", 403, 403, 200},
			{http.MethodGet, "/v1/status", 403, 403, 200},
			{http.MethodPost, cluster.PathRenew, 403, 403, 0},
			{http.MethodGet, "/v1/tokens", 404, 404, 404},
			{http.MethodPost, "/v1/tokens", 404, 404, 404},
			{http.MethodPost, "/v1/leave", 404, 404, 404},
			{http.MethodGet, "/v1/alive", 403, 403, 200},
			{http.MethodPost, "/v1/gate/keep-off", 403, 403, 0},
			{http.MethodPost, "/v1/meet", 403, 403, 0},
			{http.MethodGet, "/v1/members/traces", 403, 403, 0},
			{http.MethodPost, "/v1/members/leave", 403, 403, 0},
			{http.MethodPost, "/v1/members/standing", 403, 403, 0},
			{http.MethodPost, "/v1/operations/switchover", 404, 404, 404},
			{http.MethodGet, "/v1/events", 404, 404, 404},
			{http.MethodGet, "/", 404, 404, 404},
		} {
			for role, want := range map[pki.Role]int{"": r.nobody, pki.RolePatroni: r.patroni, pki.RoleNode: r.node} {
				if want == 0 {
					continue
				}
				if a, err := ask(t, as(role), r.method, base+r.path, nil); err != nil || a.status != want {
					t.Errorf("%s %s of %s with the certificate %q: %+v, %v, want %d", r.method, r.path, h, role, a, err, want)
				}
			}
		}
		// For data nodes alone: what is asked of a witness's host is refused to it too.
		for _, r := range []struct{ method, path string }{
			{http.MethodPost, "/v1/certificates"}, {http.MethodPost, "/v1/members/retire"}, {http.MethodPut, "/v1/program"},
			{http.MethodPost, "/v1/program/check"}, {http.MethodPost, "/v1/program/trial"}, {http.MethodGet, "/v1/settings/state"},
			{http.MethodPost, "/v1/settings/try"}, {http.MethodPost, "/v1/checkpoint"}, {http.MethodPost, "/v1/tasks/restart"},
		} {
			witness := c.asClient(t, h, "")
			c.present(t, witness, "witness", pki.RoleNode)
			for name, cfg := range map[string]*tls.Config{
				"no": c.asClient(t, h, ""), "Patroni's": c.asClient(t, h, pki.RolePatroni), "the witness's": witness,
			} {
				if a, err := ask(t, httpsFrom(c.Lab.Dial, cfg), r.method, base+r.path, nil); err != nil || a.status != http.StatusForbidden {
					t.Errorf("%s %s of %s with %s certificate: %+v, %v, want 403", r.method, r.path, h, name, a, err)
				}
			}
		}
		cfg := c.asClient(t, h, "")
		cfg.Certificates = []tls.Certificate{other}
		if a, err := ask(t, httpsFrom(c.Lab.Dial, cfg), http.MethodGet, base+cluster.PathHello, nil); !refusedByTLS(err) {
			t.Errorf("%s answers to a certificate of another CA: %+v, %v", h, a, err)
		}
		if a, err := ask(t, httpsFrom(c.Lab.Dial, nil), http.MethodGet, "http://"+c.Addr(h)+":8432"+cluster.PathHello, nil); err == nil && a.status != http.StatusBadRequest {
			t.Errorf("the API of %s answers plain HTTP: %+v", h, a)
		}
	}
}

// secretsOf opens the secrets that a data node has on its disk.
func (c *trio) secretsOf(t *testing.T, host string) cluster.Secrets {
	t.Helper()
	key, err := cluster.LoadSealingKey(c.Host(host).Path("/var/lib/pgha/pki/sealing.key"))
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.IdentityOf(func() *x509.Certificate {
		b, err := c.pkiOf(host).Bundle(pki.RoleNode)
		if err != nil {
			t.Fatal(err)
		}
		return b.Leaf
	}())
	if err != nil {
		t.Fatal(err)
	}
	sealed := c.readFile(t, host, "/var/lib/pgha/secrets.sealed")
	s, err := cluster.OpenSecrets(key, id.ClusterID, sealed)
	if err != nil {
		t.Fatal(err)
	}
	if len(s.StatsPage) < 20 || len(s.PatroniREST) < 20 || bytes.Contains(sealed, []byte(s.StatsPage)) {
		t.Fatal("the secrets are too short, or not sealed")
	}
	return s
}

// orOpen gives the lack of an error a name.
func orOpen(err error) error {
	if err == nil {
		return errors.New("connected")
	}
	return err
}
