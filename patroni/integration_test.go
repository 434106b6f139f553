package patroni

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// TestCluster runs real Patronis with the rendered configuration: the first
// makes the cluster, the second joins. The steps build on one another.
func TestCluster(t *testing.T) {
	l := newLab(t)
	m1, m2 := l.member(t, "node-1", "127.0.0.1"), l.member(t, "n2", "127.0.0.2")
	n1, n2 := l.node(t, m1, m1), l.node(t, m2, m1, m2)

	n1.write(t)
	must(t, Validate(t.Context(), l.bin, n1.yaml))
	if entries, err := os.ReadDir(filepath.Dir(n1.conf.DataDir)); err != nil || len(entries) > 0 {
		t.Fatalf("validation left %v in the data directory, error %v", entries, err)
	}
	n1.start(t)
	status := n1.waitRole(t, RoleLeader)
	if status.Scope != labScope || status.PatroniVersion != l.version.String() {
		t.Errorf("status is of %s, Patroni %s", status.Scope, status.PatroniVersion)
	}
	must(t, Validate(t.Context(), l.bin, n1.yaml)) // with its ports in use
	n1.testRESTAuth(t)
	n1.testLogins(t)

	info, err := InspectDataDir(n1.conf.DataDir)
	must(t, err)
	if info.State != DataDirValid || !info.Running || info.Major != l.pgMajor || info.SystemID != status.SystemID ||
		info.CleanShutdown || info.Standby || !info.Config || info.UID != l.uid {
		t.Errorf("InspectDataDir: %+v, want that of the running %s", info, status.SystemID)
	}
	id, err := SystemIdentifier(n1.conf.DataDir, l.pgBin)
	if err != nil || id != status.SystemID {
		t.Errorf("SystemIdentifier: %q, %v, want %s", id, err, status.SystemID)
	}
	if on, err := DataChecksums(n1.conf.DataDir, l.pgBin); err != nil || !on {
		t.Errorf("DataChecksums: %v, %v, want them on", on, err)
	}

	// The roster grows: the first node lets the second in before it comes.
	n1.conf.Members = n2.conf.Members
	n1.write(t)
	must(t, n1.client(t).Reload(t.Context()))
	patch := DynamicPatch(l.view(t).Config, n1.conf)
	if diff := cmp.Diff(map[string]any{"slots": map[string]any{"n2": map[string]any{"type": "physical"}}}, patch); diff != "" {
		t.Errorf("patch for a new member (-want +got):\n%s", diff)
	}
	must(t, n1.client(t).PatchConfig(t.Context(), patch))
	n2.write(t)
	n2.start(t)
	n2.waitRole(t, RoleReplica)
	waitStreaming(t, n1, n2)
	l.testView(t, n1, n2)
	l.testSlotOutlivesMember(t, n1, n2)
	l.testSwitchover(t, n1, n2)
	n2.testRoleSQL(t)
	for _, n := range []*node{n1, n2} {
		n.testLogClean(t)
	}
}

// waitStreaming waits until the standby streams from the leader and is its
// synchronous standby.
func waitStreaming(t *testing.T, leader, standby *node) {
	t.Helper()
	waitFor(t, standby.conf.Name+" to stream synchronously", func(ctx context.Context) error {
		s, err := leader.client(t).Status(ctx)
		if err != nil {
			return err
		}
		for _, r := range s.Replication {
			if r.ApplicationName == standby.conf.Name && r.User == ReplicationUser && r.State == "streaming" && r.SyncState == "sync" {
				if sync := leader.lab.view(t).Sync; !slices.Contains(sync.Standbys, standby.conf.Name) {
					return fmt.Errorf("the sync key says %+v", sync)
				}
				return nil
			}
		}
		return fmt.Errorf("replication is %+v", s.Replication)
	})
}

func (n *node) testRESTAuth(t *testing.T) {
	t.Helper()
	base := "https://" + hostPort(n.conf.Addr, n.conf.Ports.Patroni)
	if _, err := NewClient(base, n.lab.ca.clientTLS(t, ""), labUser, labPass).Status(t.Context()); err == nil {
		t.Error("the REST API answers without a client certificate")
	}
	if resp, err := http.Get("http" + strings.TrimPrefix(base, "https")); err == nil {
		resp.Body.Close()
		t.Error("the REST API answers without TLS")
	}
	err := NewClient(base, n.lab.ca.clientTLS(t, n.lab.other), labUser, "wrong").Wake(t.Context())
	var status *StatusError
	if !errors.As(err, &status) || status.Code != http.StatusUnauthorized {
		t.Errorf("a wrong password gives %v, want 401", err)
	}
	c := n.client(t)
	must(t, c.Wake(t.Context()))
	must(t, c.Reload(t.Context()))
	must(t, c.Liveness(t.Context()))
}

// connect logs in to the node's PostgreSQL over TCP; tlsConfig nil is plain text.
func (n *node) connect(t *testing.T, user, password, database string, tlsConfig *tls.Config, replication bool) (*pgx.Conn, error) {
	t.Helper()
	cfg, err := pgx.ParseConfig("host=" + n.conf.Addr.String() + " sslmode=disable")
	must(t, err)
	cfg.Port, cfg.User, cfg.Password, cfg.Database = n.conf.Ports.Postgres, user, password, database
	if tlsConfig != nil {
		cfg.TLSConfig = tlsConfig.Clone()
		cfg.TLSConfig.ServerName = n.conf.Addr.String()
	}
	if replication {
		cfg.RuntimeParams["replication"] = "true"
		cfg.DefaultQueryExecMode = pgx.QueryExecModeSimpleProtocol
	}
	return pgx.ConnectConfig(t.Context(), cfg)
}

// root logs in as the superuser over the socket, by the OS user alone.
func (n *node) root(t *testing.T) *pgx.Conn {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), fmt.Sprintf("host=%s port=%d user=%s database=postgres", n.conf.SocketDir, n.conf.Ports.Postgres, Superuser))
	must(t, err)
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	return conn
}

func (n *node) testLogins(t *testing.T) {
	t.Helper()
	for _, sql := range []string{
		"CREATE ROLE app LOGIN PASSWORD 'secret'",
		// What an operator must not be able to open by mistake.
		"ALTER ROLE postgres PASSWORD 'secret'", "ALTER ROLE replicator PASSWORD 'secret'",
	} {
		_, err := n.root(t).Exec(t.Context(), sql)
		must(t, err)
	}
	none := n.lab.ca.clientTLS(t, "")
	patroni := n.lab.ca.clientTLS(t, n.conf.Bundle)
	admin := n.lab.ca.clientTLS(t, n.lab.admin)
	other := n.lab.ca.clientTLS(t, n.lab.other)
	for _, tc := range []struct {
		what, user, password, database string
		tls                            *tls.Config
		replication                    bool
		refusal                        string // empty: let in
	}{
		{"app by password", "app", "secret", "postgres", none, false, ""},
		{"app with a wrong password", "app", "wrong", "postgres", none, false, "password authentication failed"},
		{"app in plain text", "app", "secret", "postgres", nil, false, "no encryption"},
		{"superuser in plain text", "postgres", "secret", "postgres", nil, false, "no encryption"},
		{"superuser by password", "postgres", "secret", "postgres", none, false, "client certificate"},
		{"superuser by the admin's certificate", "postgres", "", "postgres", admin, false, ""},
		{"superuser by Patroni's certificate", "postgres", "", "postgres", patroni, false, "authentication failed"},
		{"replication by certificate", "replicator", "", "", patroni, true, ""},
		{"replication by another's certificate", "replicator", "", "", other, true, "authentication failed"},
		{"replication by password", "replicator", "secret", "", none, true, "client certificate"},
		{"replication as app", "app", "secret", "", none, true, "no pg_hba.conf entry"},
		{"replicator into a database", "replicator", "secret", "postgres", patroni, false, "rejects connection"},
		{"rewinder by certificate", "rewinder", "", "postgres", patroni, false, ""},
		{"rewinder by the admin's certificate", "rewinder", "", "postgres", admin, false, "authentication failed"},
	} {
		t.Run(tc.what, func(t *testing.T) {
			conn, err := n.connect(t, tc.user, tc.password, tc.database, tc.tls, tc.replication)
			if err == nil {
				defer conn.Close(context.Background())
			}
			switch {
			case tc.refusal == "" && err != nil:
				t.Fatalf("refused: %v", err)
			case tc.refusal != "" && (err == nil || !strings.Contains(err.Error(), tc.refusal)):
				t.Fatalf("error %v, want one with %q", err, tc.refusal)
			case tc.replication && err == nil:
				_, err := conn.Exec(t.Context(), "IDENTIFY_SYSTEM")
				must(t, err)
			}
		})
	}
}

func (l *lab) view(t *testing.T) ClusterView {
	t.Helper()
	resp, err := l.etcd.Get(t.Context(), Prefix(labScope), clientv3.WithPrefix())
	must(t, err)
	var kvs []KV
	for _, kv := range resp.Kvs {
		kvs = append(kvs, KV{Key: string(kv.Key), Value: kv.Value, ModRevision: kv.ModRevision, Lease: kv.Lease})
	}
	v, err := ParseView(labScope, kvs)
	must(t, err)
	return v
}

func (l *lab) testView(t *testing.T, leader, standby *node) {
	t.Helper()
	var v ClusterView
	waitFor(t, "both members' keys to be complete", func(context.Context) error {
		v = l.view(t)
		a, _ := v.Member(leader.conf.Name)
		b, _ := v.Member(standby.conf.Name)
		if a.State != "running" || b.State != "running" || a.XLogLocation == 0 || b.XLogLocation == 0 || b.Timeline == 0 || len(v.Sync.Standbys) == 0 {
			return fmt.Errorf("the view is %+v", v)
		}
		return nil
	})
	a, _ := v.Member(leader.conf.Name)
	b, _ := v.Member(standby.conf.Name)
	id, err := SystemIdentifier(standby.conf.DataDir, "")
	must(t, err)
	if !v.Initialized || v.SystemID != id || v.Leader != a.Name || v.LeaderLease != a.LeaseID || a.LeaseID == 0 || v.Paused ||
		a.Role != RoleLeader || b.Role != RoleReplica || v.Status.Optime == 0 || v.ModRevisions[KeyLeader] == 0 ||
		a.APIURL != "https://"+hostPort(leader.conf.Addr, leader.conf.Ports.Patroni)+"/patroni" || a.Version != l.version.String() {
		t.Errorf("the view is %+v", v)
	}
	if diff := cmp.Diff(SyncState{Leader: a.Name, Standbys: []string{b.Name}}, v.Sync); diff != "" {
		t.Errorf("sync state (-want +got):\n%s", diff)
	}
	if patch := DynamicPatch(v.Config, leader.conf); len(patch) > 0 {
		t.Errorf("a new cluster wants the patch %v", patch)
	}
	members, err := standby.client(t).Cluster(t.Context())
	must(t, err)
	got := map[string]Role{}
	for _, m := range members {
		got[m.Name] = m.Role
	}
	if diff := cmp.Diff(map[string]Role{a.Name: RoleLeader, b.Name: RoleReplica}, got); diff != "" {
		t.Errorf("GET /cluster (-want +got):\n%s", diff)
	}
}

func (n *node) slots(t *testing.T) map[string]bool {
	t.Helper()
	rows, err := n.root(t).Query(t.Context(), "SELECT slot_name::text, active FROM pg_replication_slots")
	must(t, err)
	got := map[string]bool{}
	var name string
	var active bool
	_, err = pgx.ForEachRow(rows, []any{&name, &active}, func() error { got[name] = active; return nil })
	must(t, err)
	return got
}

// testSlotOutlivesMember takes the standby away and its key too, as the end of
// its lease would.
func (l *lab) testSlotOutlivesMember(t *testing.T, leader, standby *node) {
	t.Helper()
	standby.stop(t)
	_, err := l.etcd.Delete(t.Context(), Prefix(labScope)+KeyMembers+standby.conf.Name)
	must(t, err)
	// Twice: the first run of the loop may have begun before.
	for range 2 {
		seen := leader.lastRun(t)
		must(t, leader.client(t).Wake(t.Context()))
		waitFor(t, "the leader's loop", func(context.Context) error {
			if leader.lastRun(t) == seen {
				return errors.New("it has not run")
			}
			return nil
		})
	}
	if _, ok := l.view(t).Member(standby.conf.Name); ok {
		t.Fatal("the member's key is back")
	}
	if diff := cmp.Diff(map[string]bool{SlotName(standby.conf.Name): false}, leader.slots(t)); diff != "" {
		t.Errorf("slots on the leader (-want +got):\n%s", diff)
	}
	standby.start(t)
	standby.waitRole(t, RoleReplica)
	waitStreaming(t, leader, standby)
}

// lastRun returns the number of times that the main loop of Patroni has said
// what it did.
func (n *node) lastRun(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile(n.log)
	must(t, err)
	return bytes.Count(data, []byte("INFO: no action."))
}

func (l *lab) testSwitchover(t *testing.T, leader, standby *node) {
	t.Helper()
	must(t, leader.client(t).Switchover(t.Context(), leader.conf.Name, standby.conf.Name))
	standby.waitRole(t, RoleLeader)
	leader.waitRole(t, RoleReplica)
	waitStreaming(t, standby, leader)
	waitFor(t, "the slots to follow", func(context.Context) error {
		want := map[string]bool{SlotName(leader.conf.Name): true}
		if got := standby.slots(t); !maps.Equal(got, want) {
			return fmt.Errorf("the new leader has %v", got)
		}
		if got := leader.slots(t); len(got) > 0 {
			return fmt.Errorf("the new standby has %v", got)
		}
		return nil
	})
	if v := l.view(t); len(v.History) != 1 || v.History[0].Timeline != 1 || v.History[0].LSN == 0 {
		t.Errorf("history after one switchover: %+v", v.History)
	}

	// A third node comes and goes.
	conf := standby.conf
	conf.Members = append(conf.Members, Member{Name: "n3", Addr: netip.MustParseAddr("127.0.0.3"), Postgres: 1, Patroni: 1})
	patch := DynamicPatch(l.view(t).Config, conf)
	must(t, standby.client(t).PatchConfig(t.Context(), patch))
	waitFor(t, "the slot of n3", func(context.Context) error {
		if got := standby.slots(t); len(got) != 2 {
			return fmt.Errorf("slots are %v", got)
		}
		return nil
	})
	must(t, standby.client(t).PatchConfig(t.Context(), DynamicPatch(l.view(t).Config, standby.conf, "n3")))
	waitFor(t, "the slot of n3 to go", func(context.Context) error {
		if got := standby.slots(t); len(got) != 1 {
			return fmt.Errorf("slots are %v", got)
		}
		return nil
	})
}

// testRoleSQL runs the statements on a database that has the roles already, and
// looks at what is left: no password. Each change by hand is found.
func (n *node) testRoleSQL(t *testing.T) {
	t.Helper()
	conn := n.root(t)
	drift := func() string {
		var found string
		must(t, conn.QueryRow(t.Context(), "SELECT coalesce(string_agg(w, '; '), '') FROM ("+RoleDriftSQL()+") AS v (w)").Scan(&found))
		return found
	}
	for _, c := range []struct{ change, want string }{
		{"ALTER ROLE replicator PASSWORD 'x'", "replicator has a password"},
		{"ALTER ROLE replicator NOREPLICATION", "replicator may not replicate"},
		{"ALTER ROLE replicator SUPERUSER", "replicator is a superuser"},
		{"ALTER ROLE rewinder NOLOGIN", "rewinder may not log in"},
		{"ALTER ROLE rewinder REPLICATION", "rewinder may replicate"},
		{"ALTER ROLE rewinder CREATEROLE", "rewinder has rights that it needs not"},
		{"ALTER ROLE rewinder CONNECTION LIMIT 0", "rewinder has a limit of connections"},
		{"REVOKE EXECUTE ON FUNCTION pg_stat_file(text, boolean) FROM rewinder", "rewinder may not call pg_catalog.pg_stat_file(text, boolean)"},
		{"DROP OWNED BY rewinder; DROP ROLE rewinder", "rewinder does not exist"},
	} {
		_, err := conn.Exec(t.Context(), c.change)
		must(t, err)
		if got := drift(); got != c.want {
			t.Errorf("after %s the query finds %q, want %q", c.change, got, c.want)
		}
		for _, sql := range RoleSQL() {
			_, err := conn.Exec(t.Context(), sql)
			must(t, err)
		}
		if got := drift(); got != "" {
			t.Errorf("after %s was put right the query finds %q", c.change, got)
		}
	}
	for _, sql := range RoleSQL() {
		_, err := conn.Exec(t.Context(), sql)
		must(t, err)
	}
	var roles string
	must(t, conn.QueryRow(t.Context(), `SELECT string_agg(format('%s %s %s %s', rolname, rolsuper, rolreplication, rolpassword IS NULL), '; ' ORDER BY rolname)
		FROM pg_authid WHERE rolname IN ('replicator', 'rewinder')`).Scan(&roles))
	if want := "replicator f t t; rewinder f f t"; roles != want {
		t.Errorf("roles are %q, want %q", roles, want)
	}
}

// testLogClean looks for complaints about slots, settings and certificates.
func (n *node) testLogClean(t *testing.T) {
	t.Helper()
	data, err := os.ReadFile(n.log)
	must(t, err)
	for line := range strings.Lines(string(data)) {
		if strings.Contains(line, "ERROR") && (strings.Contains(line, "slot") || strings.Contains(line, "Invalid") || strings.Contains(line, "certificate")) {
			t.Errorf("%s logged: %s", n.conf.Name, line)
		}
	}
}
