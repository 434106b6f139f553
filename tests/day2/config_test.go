package day2

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
)

// TestConfig changes settings of a cluster under load: what PostgreSQL would not
// take is refused before anything is stored, the nodes follow what is stored, and
// every change can be taken back.
func TestConfig(t *testing.T) {
	r := three(t)
	if err := r.AddHosts(within(t, wait), "outside"); err != nil {
		t.Fatal(err)
	}
	r.step(t, "parameters", r.configParameters)
	r.step(t, "refusals", r.configRefusals)
	r.step(t, "clients and rules", r.configClients)
	r.step(t, "asynchronous and back", r.configAsync)
	r.step(t, "restart", r.configRestart)
	r.step(t, "editor", r.configEditor)
	r.step(t, "history, diff and rollback", r.configHistory)
	r.step(t, "behind pgha's back", r.configForeign)
}

// setConfig changes settings and returns what came of it.
func (r *rig) setConfig(t *testing.T, args ...string) node.ConfigResult {
	t.Helper()
	var out struct {
		Result node.ConfigResult `json:"result"`
	}
	if err := json.Unmarshal([]byte(r.do(t, "n1", append([]string{"config"}, args...)...)), &out); err != nil {
		t.Fatal(err)
	}
	return out.Result
}

// show asks PostgreSQL on a node for a parameter, in a new session.
func (r *rig) show(t *testing.T, host, name string) string {
	t.Helper()
	return strings.TrimSpace(r.do(t, "n1", "psql", "--node", host, "-XAtqc", "SHOW "+name))
}

func (r *rig) wantShown(t *testing.T, name string, want map[string]string) {
	t.Helper()
	for _, host := range []string{"n1", "n2"} {
		if got := r.show(t, host, name); got != want[host] {
			t.Errorf("%s on %s is %s, want %s", name, host, got, want[host])
		}
	}
}

func both(value string) map[string]string { return map[string]string{"n1": value, "n2": value} }

// shown returns a setting's rows of config show.
func (r *rig) shown(t *testing.T, key string) []node.ConfigValue {
	t.Helper()
	var v node.ConfigView
	if err := json.Unmarshal([]byte(r.do(t, "n2", "config", "show", "--all", "--json")), &v); err != nil {
		t.Fatal(err)
	}
	return slices.DeleteFunc(v.Values, func(x node.ConfigValue) bool { return x.Key != key })
}

func (r *rig) configParameters(t *testing.T, w *testbed.Writer) {
	sized := r.show(t, "n1", "work_mem")
	got := r.setConfig(t, "set", "--json", "postgresql.work_mem=9MB", "postgresql.datestyle=iso, dmy")
	if got.Change != 1 || len(got.Restart) > 0 || !slices.Equal(got.Taken, []string{"n1", "n2"}) {
		t.Errorf("%+v", got)
	}
	r.wantShown(t, "work_mem", both("9MB"))
	r.wantShown(t, "DateStyle", both("ISO, DMY"))
	if rows := r.shown(t, "postgresql.DateStyle"); len(rows) != 1 || rows[0].Where != "cluster" || rows[0].Node != "" {
		t.Errorf("the parameter under PostgreSQL's own name: %+v", rows)
	}
	r.setConfig(t, "set", "--json", "--node", "n2", "postgresql.work_mem=10MB")
	r.wantShown(t, "work_mem", map[string]string{"n1": "9MB", "n2": "10MB"})
	rows := r.shown(t, "postgresql.work_mem")
	if len(rows) != 2 || rows[0].Where != "cluster" || rows[1].Where != "node n2" || rows[1].Value != "10MB" {
		t.Errorf("node-local and cluster-wide are not told apart: %+v", rows)
	}
	if again := r.setConfig(t, "set", "--json", "postgresql.work_mem=9MB"); again.Change != 0 || len(again.Diff) > 0 {
		t.Errorf("nothing was to change: %+v", again)
	}
	r.setConfig(t, "unset", "--json", "--node", "n2", "postgresql.work_mem")
	r.setConfig(t, "unset", "--json", "postgresql.work_mem")
	r.wantShown(t, "work_mem", both(sized))
	r.unharmed(t, w)
}

func (r *rig) configRefusals(t *testing.T, w *testbed.Writer) {
	before := r.history(t)
	for _, c := range []struct {
		args  []string
		words []string
	}{
		{[]string{"postgresql.work_men=9MB"}, []string{`no parameter "work_men"`, "did you mean postgresql.work_mem"}},
		{[]string{"postgresql.work_mem=9XB"}, []string{`invalid value for parameter "work_mem"`, "Valid units"}},
		{[]string{"postgresql.work_mem=1kB"}, []string{"outside the valid range", "64"}},
		{[]string{"postgresql.wal_compression=maybe"}, []string{"wal_compression", "Available values"}},
		{[]string{"postgresql.listen_addresses=*"}, []string{"listen_addresses cannot be set", "the gate"}},
		{[]string{"postgresql.ssl_ciphers=x"}, []string{"ssl_ciphers cannot be set"}},
		{[]string{"postgresql.synchronous_commit=off"}, []string{"a failover loses", "async=on"}},
		{[]string{"postgresql.server_version=9"}, []string{"cannot be set"}},
		{[]string{"postgresql.shared_buffers=4TB"}, []string{"shared memory", "this host has"}},
		{[]string{"postgresql.shared_preload_libraries=nosuchlib"}, []string{"n1 refuses", `could not access file "nosuchlib"`}},
		{[]string{"postgresql.max_connections=10"}, []string{"max_connections is 10", "25"}},
		{[]string{"postgresql.max_connections=4", "postgresql.superuser_reserved_connections=5"}, []string{"superuser_reserved_connections"}},
		{[]string{"postgresql.max_connections=0x64"}, []string{"whole number"}},
		{[]string{"--node", "n2", "postgresql.max_connections=99"}, []string{"the same on all nodes"}},
		{[]string{"--node", "n3", "postgresql.work_mem=9MB"}, []string{`no data node "n3"`, "n1, n2"}},
		{[]string{"--node", "n2", "profile=wide"}, []string{"whole cluster"}},
		{[]string{"profil=wide"}, []string{"did you mean profile"}},
		{[]string{"profile=slow"}, []string{"use one of fast, steady, wide"}},
		{[]string{"clients="}, []string{"cannot be empty"}},
		{[]string{"clients=10.0.0.1/8"}, []string{"did you mean 10.0.0.0/8"}},
		{[]string{"hba+=host all all all trust"}, []string{"only hostssl"}},
		{[]string{"hba+=hostssl all all all trust"}, []string{"trust would let anybody in"}},
		// One wrong among right ones: nothing is changed.
		{[]string{"postgresql.work_mem=9MB", "postgresql.nosuch=1"}, []string{`no parameter "nosuch"`}},
	} {
		r.refused(t, "n1", append([]string{"config", "set"}, c.args...), c.words...)
	}
	r.refused(t, "witness", []string{"config", "set", "postgresql.work_mem=9MB"}, "run it on n1 or n2")
	out := r.do(t, "n1", "config", "set", "--dry-run", "postgresql.work_mem=9MB", "postgresql.max_connections=150")
	if !strings.Contains(out, "max_connections needs a restart of PostgreSQL on n1, n2") || !strings.Contains(out, "dry run") {
		t.Errorf("a dry run says %s", out)
	}
	for _, args := range [][]string{{"show"}, {"get", "postgresql.work_mem"}} {
		r.refused(t, "n1", append([]string{"config"}, append(args, "--node", "n9")...), `no data node "n9"`, "n1, n2")
	}
	if after := r.history(t); len(after) != len(before) {
		t.Errorf("%d changes after refusals, %d before", len(after), len(before))
	}
	r.unharmed(t, w)
}

func (r *rig) history(t *testing.T) []cluster.SettingsChange {
	t.Helper()
	var h []cluster.SettingsChange
	if err := json.Unmarshal([]byte(r.do(t, "witness", "config", "history", "-n", "0", "--json")), &h); err != nil {
		t.Fatal(err)
	}
	return h
}

// A parameter that needs a restart waits for it, and config set --restart does it.
func (r *rig) configRestart(t *testing.T, _ *testbed.Writer) {
	got := r.setConfig(t, "set", "--json", "postgresql.max_locks_per_transaction=96")
	if !slices.Equal(got.Restart, []string{"max_locks_per_transaction"}) || !slices.Equal(got.Pending, []string{"n1", "n2"}) {
		t.Errorf("%+v", got)
	}
	if rows := r.shown(t, "postgresql.max_locks_per_transaction"); len(rows) != 1 || rows[0].Value != "96" || !slices.Equal(rows[0].Restart, []string{"n1", "n2"}) {
		t.Errorf("before the restart: %+v", rows)
	}
	r.wantShown(t, "max_locks_per_transaction", both("64"))
	var out struct {
		Result  node.ConfigResult `json:"result"`
		Restart json.RawMessage   `json:"restart"`
		Status  node.Status       `json:"status"`
	}
	r.read(t, &out, "n1", "config", "set", "--restart", "--yes", "--json", "postgresql.max_connections=111")
	if len(out.Result.Pending) != 2 || len(out.Restart) == 0 || out.Status.Leader == "" {
		t.Errorf("config set --restart --json says %+v", out)
	}
	r.wantShown(t, "max_connections", both("111"))
	r.wantShown(t, "max_locks_per_transaction", both("96"))
	if rows := r.shown(t, "postgresql.max_connections"); len(rows) != 1 || rows[0].Where != "cluster" || len(rows[0].Restart) > 0 {
		t.Errorf("after the restart: %+v", rows)
	}
}

// reaches says whether a host gets a connection to HAProxy on n1.
func (r *rig) reaches(t *testing.T, host string) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	c, err := r.Host(host).Dial(ctx, "tcp", r.Addr("n1")+":5432")
	if err == nil {
		err = c.Close()
	}
	return err
}

func (r *rig) configClients(t *testing.T, w *testbed.Writer) {
	if err := r.reaches(t, "outside"); err != nil {
		t.Fatalf("before the change: %v", err)
	}
	only := "clients=" + lab.ClientAddr().String() + "/32"
	r.refused(t, "n1", []string{"config", "set", only}, "cannot connect any more", "--yes")
	if err := r.reaches(t, "outside"); err != nil {
		t.Fatalf("before it was confirmed: %v", err)
	}
	r.setConfig(t, "set", "--json", "--yes", only)
	if r.reaches(t, "outside") == nil {
		t.Error("a host outside of clients reaches the database")
	}
	r.setConfig(t, "set", "--json", "--yes", "clients+="+r.Addr("outside")+"/32")
	if err := r.reaches(t, "outside"); err != nil {
		t.Errorf("a host that was let in: %v", err)
	}
	for _, host := range []string{"n1", "n2"} {
		data, err := os.ReadFile(r.postgresFile(t, host, "pg_hba.conf"))
		if err != nil || !strings.Contains(string(data), "hostssl all all "+r.Addr("outside")+"/32 scram-sha-256") {
			t.Errorf("pg_hba.conf of %s does not follow (%v):\n%s", host, err, data)
		}
	}

	r.do(t, "n1", "psql", "-XAtqc", "CREATE ROLE bob LOGIN PASSWORD '"+testbed.AppPassword+"'")
	if err := r.login(t, "bob"); err != nil {
		t.Fatalf("before the rule: %v", err)
	}
	rule := "hostssl all bob all reject"
	r.setConfig(t, "set", "--json", "--yes", "hba+="+rule)
	if err := r.login(t, "bob"); err == nil || !strings.Contains(err.Error(), "pg_hba.conf rejects") {
		t.Errorf("a login against the rule: %v", err)
	}
	// The product's own roles cannot be shut out.
	r.setConfig(t, "set", "--json", "--yes", "hba+=hostssl all alice all reject;hostssl all all fd00::/64 reject")
	r.refused(t, "n1", []string{"config", "set", "hba-=hostssl all carol all reject"}, "does not hold")
	r.setConfig(t, "set", "--json", "--yes", "hba-="+rule)
	if err := r.login(t, "bob"); err != nil {
		t.Errorf("after the rule was taken away: %v", err)
	}
	r.setConfig(t, "unset", "--json", "--yes", "hba")
	r.unharmed(t, w)
}

// postgresFile is where the machine sees a file of a host's data directory.
func (r *rig) postgresFile(t *testing.T, host, name string) string {
	t.Helper()
	dir := strings.TrimSpace(r.do(t, "n1", "psql", "--node", host, "-XAtqc", "SHOW data_directory"))
	return r.Host(host).Path(dir + "/" + name)
}

// login tries a role through the HAProxy of n1.
func (r *rig) login(t *testing.T, user string) error {
	t.Helper()
	pool, err := r.CA(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := testbed.AppConfig(r.Lab, pool, r.Addr("n1"), 5432)
	if err != nil {
		t.Fatal(err)
	}
	cfg.User, cfg.ConnectTimeout = user, time.Minute
	conn, err := pgx.ConnectConfig(within(t, wait), cfg)
	if err == nil {
		err = conn.Close(within(t, wait))
	}
	return err
}

func (r *rig) configAsync(t *testing.T, w *testbed.Writer) {
	r.setConfig(t, "set", "--json", "--yes", "async=on")
	s := r.await(t, "n1", "asynchronous replication", func(s node.Status) bool { return s.Promise.Mode == "async" })
	if got := r.show(t, s.Leader, "synchronous_standby_names"); got != "" {
		t.Errorf("commits still wait for %s", got)
	}
	r.setConfig(t, "set", "--json", "async=off")
	r.await(t, "n1", "synchronous replication", func(s node.Status) bool {
		return s.Promise.Mode == "sync" && s.Promise.Holds
	})
	if got := r.show(t, s.Leader, "synchronous_standby_names"); got != other(s.Leader) && got != `"`+other(s.Leader)+`"` {
		t.Errorf("commits wait for %q, want %s", got, other(s.Leader))
	}
	r.unharmed(t, w)
}

// The editor comes back with the mistake on top until the text is right.
func (r *rig) configEditor(t *testing.T, w *testbed.Writer) {
	script := `#!/bin/sh
if grep -q '^# MISTAKE: .*9XB' "$1"; then
	sed -i 's/9XB/9MB/' "$1"
else
	sed -i 's/^postgresql:$/postgresql:\n  maintenance_work_mem: 9XB\n  seq_page_cost: 1.50/' "$1"
fi
`
	if err := os.WriteFile(r.Host("n1").Path("/var/lib/pgha/editor"), []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := r.Host("n1").Command(within(t, wait), "/usr/bin/env", "EDITOR=/var/lib/pgha/editor", bin, "config", "edit", "--yes").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{"Valid units", "postgresql.maintenance_work_mem: (not set) -> 9MB", "postgresql.seq_page_cost: (not set) -> 1.50"} {
		if !strings.Contains(string(out), want) {
			t.Errorf("it does not say %q: %s", want, out)
		}
	}
	r.wantShown(t, "maintenance_work_mem", both("9MB"))
	r.wantShown(t, "seq_page_cost", both("1.5"))
	out, err = r.Host("n1").Command(within(t, wait), "/usr/bin/env", "EDITOR=true", bin, "config", "edit").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "Nothing was changed") {
		t.Errorf("an editor that was left at once: %v: %s", err, out)
	}
	r.unharmed(t, w)
}

func (r *rig) configHistory(t *testing.T, w *testbed.Writer) {
	h := r.history(t)
	last := h[0]
	if last.Actor != "root@n1" || !slices.Contains(last.What, "postgresql.seq_page_cost: (not set) -> 1.50") {
		t.Errorf("the last change: %+v", last)
	}
	if out := r.do(t, "witness", "config", "diff"); !strings.Contains(out, "postgresql.maintenance_work_mem: (not set) -> 9MB") {
		t.Errorf("the difference to before the last change: %s", out)
	}
	if out := r.do(t, "n2", "config", "diff", "1"); !strings.Contains(out, "postgresql.max_connections: (not set) -> 111") {
		t.Errorf("the difference to before change 1: %s", out)
	}
	r.refused(t, "n2", []string{"config", "rollback", "--yes", "9999"}, "there is no change 9999", "are kept")
	r.do(t, "n2", "config", "rollback", "--yes", fmt.Sprint(last.ID))
	r.wantShown(t, "seq_page_cost", both("1"))
	if after := r.history(t)[0]; after.ID != last.ID+1 || after.Actor != "root@n2" || !slices.Contains(after.What, fmt.Sprintf("(back to before change %d)", last.ID)) {
		t.Errorf("the rollback in the history: %+v", after)
	}
	if out := r.do(t, "n1", "config", "diff", fmt.Sprint(last.ID)); !strings.Contains(out, "as before change") {
		t.Errorf("after the rollback: %s", out)
	}
	r.unharmed(t, w)
}

// What somebody sets behind pgha's back is told, and not overwritten.
func (r *rig) configForeign(t *testing.T, w *testbed.Writer) {
	primary := r.healthy(t).Leader
	r.do(t, "n1", "psql", "--node", primary, "-XAtqc", "ALTER SYSTEM SET commit_delay = 7")
	r.do(t, "n1", "psql", "--node", primary, "-XAtqc", "SELECT pg_reload_conf()")
	r.awaitRow(t, "postgresql.commit_delay", func(x node.ConfigValue) bool {
		return x.Node == primary && x.Where == "not by pgha: ALTER SYSTEM" && x.Value == "7"
	})
	if _, err := r.Host("n1").Run(within(t, wait), "/usr/bin/patronictl", "-c", "/var/lib/pgha/patroni/patroni.yml", "edit-config", "--force",
		"-s", "postgresql.parameters.max_connections=112", "-s", "postgresql.parameters.log_duration=on"); err != nil {
		t.Fatal(err)
	}
	r.setConfig(t, "set", "--json", "postgresql.commit_siblings=6") // whatever else is changed
	for key, value := range map[string]string{"postgresql.max_connections": "112", "postgresql.log_duration": "on"} {
		r.awaitRow(t, key, func(x node.ConfigValue) bool {
			return x.Node == "" && x.Where == "not by pgha: Patroni's configuration" && x.Value == value
		})
	}
	r.setConfig(t, "set", "--json", "postgresql.max_connections=111")
	r.awaitRow(t, "postgresql.max_connections", func(x node.ConfigValue) bool { return x.Where == "cluster" && x.Value == "111" })
	r.unharmed(t, w)
}

// awaitRow waits for a row of config show.
func (r *rig) awaitRow(t *testing.T, key string, ok func(node.ConfigValue) bool) {
	t.Helper()
	err := testbed.Until(within(t, wait), key+" to be shown so", func() error {
		if rows := r.shown(t, key); !slices.ContainsFunc(rows, ok) {
			return fmt.Errorf("it is %+v", rows)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}
