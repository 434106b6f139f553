package day2

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/lab/testbed"
	"pgha/node"
)

// TestRestart restarts PostgreSQL in every way that an operator can ask for.
func TestRestart(t *testing.T) {
	r := three(t)
	r.step(t, "what is refused", func(t *testing.T, _ *testbed.Writer) {
		s := r.healthy(t)
		r.refused(t, "n1", []string{"restart"}, "Name one of n1, n2", "--rolling")
		r.refused(t, "n1", []string{"restart", "n9"}, `no node "n9"`, "n1, n2, witness")
		r.refused(t, "n1", []string{"restart", "witness"}, "witness is a witness")
		r.refused(t, "witness", []string{"restart", "--rolling"}, "run it on n1 or n2")
		r.refused(t, "n1", []string{"restart", s.Leader}, s.Leader+" is the primary", "--yes")
		r.refused(t, "n1", []string{"reinit"}, "name of a replica")
		r.refused(t, "n1", []string{"reinit", "--yes", s.Leader}, s.Leader+" is the primary", "pgha switchover")
		r.refused(t, "n1", []string{"reinit", other(s.Leader)}, "--yes")
		r.refused(t, "n1", []string{"reload", "witness"}, "nothing to reload")
	})
	r.step(t, "a replica restarts", func(t *testing.T, w *testbed.Writer) {
		replica := other(r.healthy(t).Leader)
		before := r.postmasters(t)
		r.do(t, "n1", "restart", replica)
		after := r.postmasters(t)
		if before[replica] == after[replica] || before[other(replica)] != after[other(replica)] {
			t.Errorf("postmasters before %v and after %v, and %s was to restart", before, after, replica)
		}
		r.unharmed(t, w)
	})
	r.step(t, "all read their configuration again", func(t *testing.T, w *testbed.Writer) {
		before := r.postmasters(t)
		s := r.session(t, "n1", 5432)
		workers := r.processes(t, "n1", "haproxy")
		r.do(t, "n2", "reload")
		if now := r.processes(t, "n1", "haproxy"); slices.Equal(workers, now) {
			t.Errorf("HAProxy on n1 has the processes %v, as before", now)
		}
		if after := r.postmasters(t); fmt.Sprint(before) != fmt.Sprint(after) {
			t.Errorf("postmasters before %v and after %v", before, after)
		}
		if err := s.Ping(within(t, wait)); err != nil {
			t.Errorf("a session did not survive: %v", err)
		}
		r.unharmed(t, w)
	})
	r.step(t, "the primary restarts in its place", func(t *testing.T, _ *testbed.Writer) {
		leader := r.healthy(t).Leader
		before := r.postmasters(t)
		r.do(t, "n1", "restart", "--yes", leader)
		if s := r.healthy(t); s.Leader != leader {
			t.Errorf("%s leads after %s has restarted", s.Leader, leader)
		}
		if after := r.postmasters(t); before[leader] == after[leader] {
			t.Errorf("PostgreSQL on %s has not restarted", leader)
		}
	})
	r.step(t, "packages are upgraded", r.newPackages)
	r.step(t, "a replica is copied anew", func(t *testing.T, w *testbed.Writer) {
		replica := other(r.healthy(t).Leader)
		var out struct {
			Result node.ReinitResult `json:"result"`
		}
		r.read(t, &out, "n1", "reinit", "--yes", "--json", replica)
		if out.Result.Aside == "" || out.Result.Bytes == 0 {
			t.Fatalf("reinit says %+v", out.Result)
		}
		r.do(t, replica, "version") // the host is as it was
		if _, err := r.Host(replica).Run(within(t, wait), "test", "-f", filepath.Join(out.Result.Aside, "PG_VERSION")); err != nil {
			t.Errorf("the old data is not in %s: %v", out.Result.Aside, err)
		}
		r.unharmed(t, w)

		out.Result.Aside = ""
		r.read(t, &out, other(replica), "reinit", "--yes", "--json", "--discard", replica)
		if out.Result.Aside != "" {
			t.Errorf("data that was to be deleted is in %s", out.Result.Aside)
		}
		r.unharmed(t, w)
	})
	r.step(t, "databases and users", r.users)
	r.step(t, "a rolling restart brings a setting in", func(t *testing.T, _ *testbed.Writer) {
		leader := r.healthy(t).Leader
		before := r.postmasters(t)
		r.do(t, "n1", "config", "set", "--yes", "postgresql.max_connections=150")
		r.await(t, "n1", "both nodes to wait for a restart", func(s node.Status) bool {
			return strings.Contains(strings.Join(s.ToDo, "\n"), "restart of PostgreSQL on n1 and n2: pgha restart --rolling --pending") && s.Health == node.Healthy
		})
		t.Log(r.do(t, "n1", "restart", "--rolling", "--pending", "--json"))
		r.await(t, "n1", "the other to lead, and nothing to wait", func(s node.Status) bool {
			return s.Leader == other(leader) && len(s.ToDo) == 0
		})
		after := r.postmasters(t)
		for _, h := range []string{"n1", "n2"} {
			if before[h] == after[h] {
				t.Errorf("PostgreSQL on %s has not restarted", h)
			}
			if got := strings.TrimSpace(r.do(t, "n1", "psql", "--node", h, "-XAtc", "SHOW max_connections")); got != "150" {
				t.Errorf("max_connections on %s is %s", h, got)
			}
		}
		r.do(t, "n2", "restart", "--rolling", "--pending") // there is nothing left to do
		if now := r.postmasters(t); fmt.Sprint(now) != fmt.Sprint(after) {
			t.Errorf("a restart of what is pending, and nothing was: postmasters before %v and after %v", after, now)
		}
	})
}

// read runs a pgha command and decodes what it prints.
func (r *rig) read(t *testing.T, v any, host string, args ...string) {
	t.Helper()
	out := r.do(t, host, args...)
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("pgha %s printed %q: %v", strings.Join(args, " "), out, err)
	}
}

// postmasters tells by host when PostgreSQL started.
func (r *rig) postmasters(t *testing.T) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, h := range []string{"n1", "n2"} {
		out[h] = strings.TrimSpace(r.do(t, "n1", "psql", "--node", h, "-XAtc", "SELECT pg_postmaster_start_time()"))
	}
	return out
}

// processes returns the ids of a program's processes on a host, in order.
func (r *rig) processes(t *testing.T, host, program string) []string {
	t.Helper()
	out, err := r.Host(host).Run(within(t, wait), "pgrep", "-x", program)
	if err != nil {
		t.Fatal(err)
	}
	pids := strings.Fields(out)
	slices.Sort(pids)
	return pids
}

// newPackages puts copies of the programs in their places on both hosts, as an
// upgrade of their packages does. Nothing may restart by itself.
func (r *rig) newPackages(t *testing.T, _ *testbed.Writer) {
	leader := r.healthy(t).Leader
	before := r.postmasters(t)
	patronis := r.children(t, "patroni")
	out, err := r.Host("n1").Run(within(t, wait), "sh", "-c", "ls /usr/lib/postgresql/*/bin/postgres | tail -n1")
	if err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"n1", "n2"} {
		for _, file := range []string{strings.TrimSpace(out), "/usr/sbin/haproxy", "/var/lib/dpkg/info/patroni.list"} {
			copied := "/run/pgha/" + filepath.Base(file) + ".new"
			script := fmt.Sprintf("cp -p %[1]s %[2]s && chmod o+rx %[2]s && mount --bind %[2]s %[1]s", file, copied)
			if _, err := r.Host(h).Run(within(t, wait), "sh", "-c", script); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := r.await(t, "witness", "all parts of both nodes to wait for a restart, and no harm", func(s node.Status) bool {
		return s.Health == node.Healthy && strings.Contains(strings.Join(s.ToDo, "\n"), "new versions are installed on n1 (postgresql, patroni, haproxy) and n2 (postgresql, patroni, haproxy)")
	})
	t.Log(s.ToDo)
	if now := r.postmasters(t); fmt.Sprint(now) != fmt.Sprint(before) {
		t.Errorf("PostgreSQL restarted by itself: %v, then %v", before, now)
	}
	r.refused(t, "witness", []string{"upgrade", "postgres", "--yes"}, "run it on n1 or n2")
	r.do(t, "n1", "upgrade", "postgres", "--yes", "--no-download")
	r.await(t, "n1", "the other to lead, and nothing to wait", func(s node.Status) bool {
		return s.Leader == other(leader) && len(s.ToDo) == 0
	})
	after := r.postmasters(t)
	for h, pid := range r.children(t, "patroni") {
		if before[h] == after[h] || pid == patronis[h] {
			t.Errorf("%s: PostgreSQL started at %s and then at %s, Patroni is %d and then %d", h, before[h], after[h], patronis[h], pid)
		}
	}
}

// children tells by host the process id of a child of the daemon.
func (r *rig) children(t *testing.T, name string) map[string]int {
	t.Helper()
	out := map[string]int{}
	for _, h := range []string{"n1", "n2"} {
		pid, err := r.Host(h).Run(within(t, wait), "sh", "-c", "cat /run/pgha/"+name+".pid")
		if err != nil {
			t.Fatal(err)
		}
		var file struct {
			PID int `json:"pid"`
		}
		if err := json.Unmarshal([]byte(pid), &file); err != nil {
			t.Fatalf("read pid file %q: %v", pid, err)
		}
		out[h] = file.PID
	}
	return out
}

// users makes a database with its users, and logs in as they would.
func (r *rig) users(t *testing.T, _ *testbed.Writer) {
	var owner, reader struct {
		User, URL, Password string
	}
	replica := other(r.healthy(t).Leader)
	r.read(t, &owner, replica, "user", "create", "--json", "shop") // not where the primary is
	r.do(t, "n1", "db", "create", "--owner", "shop", "shop")
	login := func(host string, port uint16, user, password, sql string) error {
		return r.asUser(t, host, port, user, password, sql)
	}
	for _, h := range []string{"n1", "n2"} {
		if err := login(h, 5432, "shop", owner.Password, "CREATE TABLE IF NOT EXISTS goods (n int)"); err != nil {
			t.Errorf("the owner, through %s: %v", h, err)
		}
		if u, err := url.Parse(owner.URL); err != nil || !strings.Contains(u.Host, r.Addr(h)+":5432") || u.Query().Get("sslmode") != "verify-full" || u.User.Username() != "shop" {
			t.Errorf("the URL is %s (%v)", owner.URL, err)
		}
	}
	r.read(t, &reader, "n2", "user", "create", "--json", "--db", "shop", "--read-only", "auditor")
	err := testbed.Until(within(t, wait), "the reader on a replica", func() error {
		return login("n2", 5433, "auditor", reader.Password, "SELECT * FROM goods")
	})
	if err != nil {
		t.Error(err)
	}
	if err := login("n1", 5432, "auditor", reader.Password, "INSERT INTO goods VALUES (1)"); err == nil {
		t.Error("a reader has written")
	}
	if err := login("n1", 5432, testbed.AppUser, testbed.AppPassword, "SELECT"); err == nil {
		t.Error("another application's user connects to the database")
	}

	// A password of one's own comes from a file, and replaces the old one.
	file := "/run/pgha/password"
	if _, err := r.Host("n1").Run(within(t, wait), "sh", "-c", "echo 'chosen by an operator' >"+file); err != nil {
		t.Fatal(err)
	}
	if out := r.do(t, "n1", "user", "passwd", "--password-file", file, "shop"); strings.Contains(out, "chosen") {
		t.Errorf("a password that was given is shown: %s", out)
	}
	if err := login("n1", 5432, "shop", owner.Password, "SELECT"); err == nil {
		t.Error("the old password lets in")
	}
	if err := login("n1", 5432, "shop", "chosen by an operator", "SELECT"); err != nil {
		t.Errorf("the new password: %v", err)
	}
	r.refused(t, "n1", []string{"user", "create", "shop"}, "already", "pgha user passwd shop")
	r.refused(t, "n1", []string{"user", "create", "replicator"}, "own")
	r.refused(t, "n1", []string{"db", "create", "Shop"}, "lower-case")
	r.refused(t, "witness", []string{"user", "list"}, "run it on n1 or n2")
	r.refused(t, "n1", []string{"user", "drop", "--yes", "shop"}, "owns", "goods", "REASSIGN OWNED")
	r.do(t, "n1", "user", "drop", "--yes", "auditor")
	if out := r.do(t, "n2", "user", "list"); strings.Contains(out, "auditor") || !strings.Contains(out, "shop") {
		t.Errorf("the users are:\n%s", out)
	}
	t.Log("\n" + r.do(t, "n2", "user", "list") + "\n" + r.do(t, "n2", "db", "list"))
	for _, h := range []string{"n1", "n2"} {
		out, err := r.Host(h).Run(within(t, wait), "sh", "-c", "cat /var/log/pgha/*.log /var/log/pgha/postgres/*")
		if err != nil {
			t.Fatal(err)
		}
		for _, secret := range []string{owner.Password, reader.Password, "chosen by an operator"} {
			if strings.Contains(out, secret) {
				t.Errorf("a log of %s holds a password", h)
			}
		}
	}
}

// asUser runs a statement in the database shop with sslmode=verify-full.
func (r *rig) asUser(t *testing.T, host string, port uint16, user, password, sql string) error {
	t.Helper()
	pool, err := r.CA(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	c, err := testbed.AppConfig(r.Lab, pool, r.Addr(host), port)
	if err != nil {
		t.Fatal(err)
	}
	c.User, c.Password, c.Database, c.ConnectTimeout = user, password, "shop", time.Minute
	ctx := within(t, wait)
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return fmt.Errorf("connect as %s: %w", user, err)
	}
	_, err = conn.Exec(ctx, sql)
	return errors.Join(err, conn.Close(context.WithoutCancel(ctx)))
}
