package day2

import (
	"context"
	"errors"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/tests/undertest"
)

// wait bounds a wait for something that takes seconds on a machine that has
// nothing else to do.
const wait = 4 * time.Minute

func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	return undertest.Within(t, d)
}

// rig is a cluster of two data nodes, n1 and n2, and a witness, with an
// application that writes.
type rig struct {
	*testbed.Bed
	nextID int64
	writes []testbed.Write // of the steps that have ended
}

// three makes a healthy cluster with an application's database.
func three(t *testing.T, initArgs ...string) *rig {
	t.Helper()
	r := &rig{Bed: undertest.Bed(t, bin)}
	if err := r.Three(within(t, 2*wait), initArgs...); err != nil {
		t.Fatal(err)
	}
	if err := r.CreateApp(within(t, wait), "n1"); err != nil {
		t.Fatal(err)
	}
	return r
}

// step runs a step of a test while an application writes through both data
// nodes. Afterwards every commit that was ever acknowledged must be there, and
// the longest time without one is printed. It ends the test if the step fails:
// what follows would only say that the cluster is not as it should be.
func (r *rig) step(t *testing.T, name string, f func(t *testing.T, w *testbed.Writer)) {
	t.Helper()
	ok := t.Run(name, func(t *testing.T) {
		r.healthy(t)
		r.nextID += 1 << 32
		w, err := r.StartWriter(t.Context(), r.nextID, "n1", "n2")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { w.Stop() })
		r.goesOn(t, w)
		f(t, w)
		r.healthy(t)
		r.goesOn(t, w)
		writes := w.Stop()
		gap, _, _ := testbed.Outage(writes)
		t.Logf("%s: %d commits, %d errors, the longest time without a commit %s", name, len(testbed.Acked(writes)), len(testbed.Failed(writes)), gap.Round(time.Millisecond))
		r.writes = append(r.writes, writes...)
		r.nothingLost(t)
	})
	if !ok {
		t.FailNow()
	}
}

// healthy waits until every node that is up says that any one may be lost.
func (r *rig) healthy(t *testing.T) node.Status {
	t.Helper()
	var s node.Status
	for _, h := range []string{"witness", "n2", "n1"} {
		var err error
		if s, err = r.WaitHealthy(within(t, wait), h); err != nil {
			t.Fatalf("the cluster is not healthy, asked %s: %v", h, err)
		}
	}
	return s
}

// goesOn waits for a commit that is sent from now on.
func (r *rig) goesOn(t *testing.T, w *testbed.Writer) {
	t.Helper()
	if _, err := w.WaitAck(within(t, wait)); err != nil {
		t.Fatal(err)
	}
}

// unharmed fails if the writer has met any error.
func (r *rig) unharmed(t *testing.T, w *testbed.Writer) {
	t.Helper()
	r.goesOn(t, w)
	failed := testbed.Failed(w.Writes())
	for _, f := range failed[:min(3, len(failed))] {
		t.Errorf("a client saw an error, via %s at %s: %v", f.Via, f.Sent.Format(time.StampMilli), f.Err)
	}
	if len(failed) > 3 {
		t.Errorf("and %d errors more", len(failed)-3)
	}
}

// nothingLost checks that every commit that was ever acknowledged is there.
func (r *rig) nothingLost(t *testing.T) {
	t.Helper()
	lost, err := r.Lost(within(t, wait), "n1", r.writes)
	if err != nil {
		t.Fatal(err)
	}
	if len(lost) > 0 {
		t.Errorf("%d of %d acknowledged commits are lost, the first is %d", len(lost), len(testbed.Acked(r.writes)), lost[0])
	}
}

// do runs a pgha command that must succeed, and returns what it printed.
func (r *rig) do(t *testing.T, host string, args ...string) string {
	t.Helper()
	out, err := r.Pgha(within(t, wait), host, args...)
	if err != nil {
		t.Fatalf("pgha %s on %s: %v", strings.Join(args, " "), host, err)
	}
	return out
}

// refused runs a pgha command that must fail, and say each of the words.
func (r *rig) refused(t *testing.T, host string, args []string, words ...string) {
	t.Helper()
	r.refusedBy(t, host, bin, args, words...)
}

// refusedBy is refused with another program than the one under test.
func (r *rig) refusedBy(t *testing.T, host, program string, args []string, words ...string) {
	t.Helper()
	out, err := r.Host(host).Command(within(t, wait), program, args...).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		t.Fatalf("pgha %s on %s was not refused (%v): %s", strings.Join(args, " "), host, err, out)
	}
	for _, word := range words {
		if !strings.Contains(string(out), word) {
			t.Errorf("pgha %s on %s does not say %q: %s", strings.Join(args, " "), host, word, out)
		}
	}
}

// await asks host until ok accepts the status.
func (r *rig) await(t *testing.T, host, what string, ok func(node.Status) bool) node.Status {
	t.Helper()
	s, err := r.WaitStatus(within(t, wait), host, what, ok)
	if err != nil {
		t.Fatalf("waiting on %s for %s: %v", host, what, err)
	}
	return s
}

// session opens a session as the application through a port of a data node.
func (r *rig) session(t *testing.T, host string, port uint16) *pgx.Conn {
	t.Helper()
	pool, err := r.CA(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := testbed.AppConfig(r.Lab, pool, r.Addr(host), port)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnectTimeout = time.Minute
	conn, err := pgx.ConnectConfig(within(t, wait), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) }) // its host may be off by then
	return conn
}

// other is the data node that is not this one.
func other(name string) string {
	nodes := []string{"n1", "n2"}
	return nodes[1-slices.Index(nodes, name)]
}
