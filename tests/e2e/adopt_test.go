package e2e

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"pgha/lab/testbed"
	"pgha/node"
)

const adoptedDir = "/var/lib/pgha/old/data"

// An existing data directory becomes a cluster's first member without a dump;
// its data and its settings stay, and it fails over like any other. The second
// node's join is killed on the way and repeated.
func TestAdoptAndInterruptedJoin(t *testing.T) {
	bed := newBed(t)
	ctx := within(t, 10*time.Minute)
	if err := bed.AddHosts(ctx, "n1", "n2", "witness"); err != nil {
		t.Fatal(err)
	}
	makeOldDatabase(t, bed, "n1")
	r, err := bed.Init(ctx, "n1", "--adopt", adoptedDir)
	if err != nil {
		t.Fatal(err)
	}
	wantSQL(t, bed, "n1", "SELECT count(*) FROM old", "1000")
	wantSQL(t, bed, "n1", "SHOW deadlock_timeout", "7s")
	wantSQL(t, bed, "n1", "SHOW maintenance_work_mem", "77MB") // which pgha would size
	wantSQL(t, bed, "n1", "SHOW max_connections", "123")
	wantSQL(t, bed, "n1", "SHOW ssl", "on")

	interruptJoin(t, bed, "n2", r.Data.Token)
	if _, err := bed.Join(ctx, "n2", r.Data.Token); err != nil {
		t.Fatalf("the repeated join: %v", err)
	}
	if _, err := bed.Join(ctx, "witness", r.Witness.Token, "--witness"); err != nil {
		t.Fatal(err)
	}
	s, err := bed.WaitHealthy(ctx, "n1")
	if err != nil {
		t.Fatal(err)
	}
	if len(s.Members) != 3 || len(s.ToDo) != 0 {
		t.Errorf("after an interrupted join: %s, to do %v", testbed.Members(s), s.ToDo)
	}
	wantSQL(t, bed, "n1", "SELECT string_agg(rolname, ' ' ORDER BY rolname) FROM pg_roles WHERE rolname IN ('replicator', 'rewinder')", "replicator rewinder")

	if err := bed.PowerOff("n1"); err != nil {
		t.Fatal(err)
	}
	if _, err := bed.WaitStatus(ctx, "n2", "n2 to lead", func(s node.Status) bool { return s.Leader == "n2" }); err != nil {
		t.Fatal(err)
	}
	wantSQL(t, bed, "n2", "SELECT count(*) FROM old", "1000")
	if err := bed.PowerOn(ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	if s, err = bed.WaitHealthy(ctx, "n2"); err != nil {
		t.Fatal(err)
	}
	if s.Leader != "n2" {
		t.Errorf("the primary is %s, want n2", s.Leader)
	}
}

// makeOldDatabase makes a PostgreSQL that was shut down in order, with a table
// and a setting of its own.
func makeOldDatabase(t *testing.T, bed *testbed.Bed, host string) {
	t.Helper()
	ctx := within(t, 2*time.Minute)
	h := bed.Host(host)
	if _, err := h.Run(ctx, "install", "-d", "-o", "postgres", "-m", "0750", "/var/lib/pgha/old"); err != nil {
		t.Fatal(err)
	}
	script := fmt.Sprintf(`set -e
PATH=$(ls -d /usr/lib/postgresql/*/bin | tail -n 1):$PATH
cd /var/lib/pgha/old
initdb -D %[1]s >/dev/null
echo "deadlock_timeout = 7s" >> %[1]s/postgresql.conf
echo "maintenance_work_mem = 77MB  # chosen" >> %[1]s/postgresql.conf
echo "max_connections = 123" >> %[1]s/postgresql.conf
pg_ctl -D %[1]s -w -s -l log -o "-c listen_addresses= -k /var/lib/pgha/old" start
psql -h /var/lib/pgha/old -X -q -c "CREATE TABLE old AS SELECT generate_series(1, 1000) AS n"
pg_ctl -D %[1]s -w -s -m fast stop`, adoptedDir)
	if _, err := h.RunAs(ctx, "postgres", "/bin/sh", "-c", script); err != nil {
		t.Fatal(err)
	}
}

// interruptJoin kills a join as soon as it has written the keys that the
// cluster knows it by.
func interruptJoin(t *testing.T, bed *testbed.Bed, host, token string) {
	t.Helper()
	ctx := within(t, 2*time.Minute)
	if err := bed.Start(ctx, host, "join", "--no-service", "--yes", "--json", "--memory", testbed.Memory,
		"--name", host, "--address", bed.Addr(host), token); err != nil {
		t.Fatal(err)
	}
	// They are there for a tenth of a second: what they are for is quickly done.
	keys := bed.Host(host).Path("/var/lib/pgha/pki/joining-node.key")
	look := time.NewTicker(time.Millisecond)
	defer look.Stop()
	for _, err := os.Stat(keys); err != nil; _, err = os.Stat(keys) {
		select {
		case <-ctx.Done():
			t.Fatalf("the join's keys were not seen: %v", err)
		case <-look.C:
		}
	}
	if err := bed.Kill(host); err != nil {
		t.Fatal(err)
	}
}

func wantSQL(t *testing.T, bed *testbed.Bed, host, query, want string) {
	t.Helper()
	out, err := bed.Pgha(within(t, time.Minute), host, "psql", "-XAtqc", query)
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.TrimSpace(out); got != want {
		t.Errorf("%s gave %q, want %q", query, got, want)
	}
}
