package e2e

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/lab/testbed"
	"pgha/node"
)

// TestThree takes one cluster of two data nodes and a witness through its
// life. Every step begins and ends healthy, and after each all that was ever
// acknowledged must be there.
func TestThree(t *testing.T) {
	began := time.Now()
	c := &trio{Bed: newBed(t)}
	if err := c.Three(within(t, 2*trioWait)); err != nil {
		t.Fatal(err)
	}
	out, err := c.Output("n1")
	if err != nil {
		t.Fatal(err)
	}
	if err := json.NewDecoder(bytes.NewReader(out)).Decode(&c.founded); err != nil {
		t.Fatal(err)
	}
	if err := c.CreateApp(within(t, trioWait), "n1"); err != nil {
		t.Fatal(err)
	}
	t.Logf("three commands and an application's database: %s", time.Since(began).Round(100*time.Millisecond))
	for _, s := range []struct {
		name string
		run  func(*trio, *testing.T)
	}{
		{"journey", (*trio).journey},
		{"ports", (*trio).ports},
		{"secrets", (*trio).secrets},
		{"replica's host lost", (*trio).replicaLost},
		{"witness lost", (*trio).witnessLost},
		{"HAProxy killed", (*trio).haproxyKilled},
		{"Patroni killed", (*trio).patroniKilled},
		{"Patroni hung", (*trio).patroniHung},
		{"pgha killed", (*trio).daemonsKilled},
		{"certificates renewed", (*trio).certificatesRenewed},
		{"triangle", (*trio).triangle},
		{"leader powered off", (*trio).leaderLost},
		{"data nodes restarted", (*trio).dataRestarted},
		{"all powered off", (*trio).allLost},
		{"secrets, in the end", (*trio).secrets},
	} {
		ok := t.Run(s.name, func(t *testing.T) {
			c.healthy(t)
			s.run(c, t)
			c.healthy(t)
			c.nothingLost(t)
		})
		if !ok {
			return // what follows would only say that the cluster is not as it should be
		}
	}
}

// journey: the cluster serves clients on every node, and says of itself what
// an operator wants to know.
func (c *trio) journey(t *testing.T) {
	// What was never written is missed: the check after each step is one.
	if lost, err := c.Lost(within(t, trioWait), "n1", []testbed.Write{{ID: -1}}); err != nil || !slices.Equal(lost, []int64{-1}) {
		t.Errorf("a row that nobody wrote is not missed: %v, %v", lost, err)
	}
	for _, h := range []string{"n1", "n2"} {
		c.unharmed(t, c.writer(t, h))
		conn, err := c.connect(t, h, 5433, nil)
		if err != nil {
			t.Fatalf("connect to the read-only port of %s: %v", h, err)
		}
		var replica bool
		if err := conn.QueryRow(t.Context(), "SELECT pg_is_in_recovery()").Scan(&replica); err != nil || !replica {
			t.Errorf("the read-only port of %s leads to a replica: %t, %v", h, replica, err)
		}
		c.psqlByName(t, h)
	}
	for _, h := range trioHosts {
		s := c.witnessLeads(t, h)
		if s.Leader != "n1" || s.SeenBy != h || !s.Survives || !s.Promise.Holds || s.Promise.Mode != "sync" || len(s.ToDo)+len(s.Problems) > 0 {
			t.Errorf("status of %s: %+v", h, s)
		}
		for _, m := range s.Members {
			role, pg := cluster.RoleData, map[bool]string{true: "primary", false: "replica"}[m.Name == s.Leader]
			if m.Name == "witness" {
				role, pg = cluster.RoleWitness, ""
			}
			if m.Role != role || m.Postgres != pg || m.Etcd != "voter" || !m.Reachable || m.Sync != (pg == "replica") {
				t.Errorf("%s sees %s as %+v", h, m.Name, m)
			}
		}
		want := []string{c.Addr("n1") + ":5432", c.Addr("n2") + ":5432"}
		if got := slices.Sorted(slices.Values(s.ReadWrite)); !slices.Equal(got, want) {
			t.Errorf("%s names %v for writing, want %v", h, got, want)
		}
		if code, text := c.exitCode(t, h); code != int(node.Healthy) || !strings.Contains(text, "HEALTHY: the loss of any one node is survivable now") {
			t.Errorf("pgha status on %s: exit status %d\n%s", h, code, text)
		}
	}
}

// witnessLeads waits until etcd is led from the witness, where no data node's
// loss and no cut between the two can stop it.
func (c *trio) witnessLeads(t *testing.T, host string) node.Status {
	t.Helper()
	return c.await(t, host, "the witness to lead etcd", func(s node.Status) bool {
		return s.Health == node.Healthy && trioMember(t, s, "witness").EtcdLeader
	})
}

// psqlByName connects as people do: psql, by the node's name, verify-full.
func (c *trio) psqlByName(t *testing.T, host string) {
	t.Helper()
	ca := c.Host(host).Path("/var/lib/pgha/pki/ca.crt")
	cmd := c.Lab.Command(within(t, trioWait), "psql", "-X", "-A", "-t", "-c", "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()",
		fmt.Sprintf("host=%s hostaddr=%s port=5432 user=%s dbname=%s sslmode=verify-full sslrootcert=%s", host, c.Addr(host), testbed.AppUser, testbed.AppDatabase, ca))
	cmd.Env = append(cmd.Env, "PGPASSWORD="+c.password(t))
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "t" {
		t.Errorf("psql to %s with verify-full: %v: %s", host, err, out)
	}
}

// password is the application's.
func (c *trio) password(t *testing.T) string {
	t.Helper()
	cfg, err := testbed.AppConfig(c.Lab, nil, c.Addr("n1"), 5432)
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Password
}

// trioState is what a fault that needs no failover must leave as it is.
type trioState struct {
	leader   string
	timeline int
	data     map[string]trioPIDs
}

func (c *trio) state(t *testing.T) trioState {
	t.Helper()
	s := c.healthy(t)
	return trioState{
		leader: s.Leader, timeline: trioMember(t, s, s.Leader).Timeline,
		data: map[string]trioPIDs{"n1": c.pids(t, "n1"), "n2": c.pids(t, "n2")},
	}
}

// sameReign fails unless the primary and its timeline are as before.
func (c *trio) sameReign(t *testing.T, before trioState) trioState {
	t.Helper()
	now := c.state(t)
	if now.leader != before.leader || now.timeline != before.timeline {
		t.Errorf("there was a failover: from %s on timeline %d to %s on timeline %d", before.leader, before.timeline, now.leader, now.timeline)
	}
	return now
}

// session is a client's transaction, held open through HAProxy.
func (c *trio) session(t *testing.T, host string) func() {
	t.Helper()
	conn, err := c.connect(t, host, 5432, nil)
	if err != nil {
		t.Fatalf("connect through %s: %v", host, err)
	}
	var tx pgx.Tx
	if tx, err = conn.Begin(t.Context()); err == nil {
		_, err = tx.Exec(t.Context(), "SELECT 1")
	}
	if err != nil {
		t.Fatalf("begin a transaction through %s: %v", host, err)
	}
	return func() {
		t.Helper()
		if _, err := tx.Exec(t.Context(), "SELECT 1"); err != nil {
			t.Errorf("an open transaction through %s was lost: %v", host, err)
		} else if err := tx.Commit(t.Context()); err != nil {
			t.Errorf("an open transaction through %s cannot be committed: %v", host, err)
		}
	}
}
