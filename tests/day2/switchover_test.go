package day2

import (
	"encoding/json"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgha/lab/testbed"
	"pgha/node"
)

// TestSwitchover moves the primary to and fro in every way in which an operator
// does it on purpose.
func TestSwitchover(t *testing.T) {
	r := three(t)
	r.step(t, "switchover", r.switchover)
	r.step(t, "planned switchover", r.plannedSwitchover)
	r.step(t, "pause and resume", r.pause)
	r.step(t, "maintenance of the primary", r.maintenance)
	r.step(t, "stop of the primary", r.stopPrimary)
	r.failover(t)
}

// operated is what an operation prints with --json.
type operated struct {
	Result node.HandOverResult `json:"result"`
	Status node.Status         `json:"status"`
}

// operate runs an operation that must succeed.
func (r *rig) operate(t *testing.T, host, command string, args ...string) operated {
	t.Helper()
	var o operated
	if err := json.Unmarshal([]byte(r.do(t, host, append([]string{command, "--json"}, args...)...)), &o); err != nil {
		t.Fatal(err)
	}
	return o
}

// switchedTo checks that the operation has ended with a new primary, and that the
// old one follows it in sync.
func (r *rig) switchedTo(t *testing.T, o operated, want string) {
	t.Helper()
	t.Logf("%s -> %s, nobody took writes for about %s", o.Result.From, o.Result.To, o.Result.Paused)
	s := o.Status
	if o.Result.To != want || s.Leader != want || s.Gate.Owner != want || !s.Gate.Open || !s.Promise.Holds {
		t.Errorf("the command has ended with %+v, primary %s, gate %+v, %s; want %s", o.Result, s.Leader, s.Gate, s.Promise.Text, want)
	}
}

func (r *rig) switchover(t *testing.T, w *testbed.Writer) {
	from := r.healthy(t).Leader
	r.refused(t, from, []string{"switchover", "n9"}, "no node \"n9\"", "n1, n2, witness")
	r.refused(t, from, []string{"switchover", from}, from+" is the primary already")
	r.refused(t, from, []string{"switchover", "witness"}, "is a witness")
	r.refused(t, "witness", []string{"switchover"}, "run it on n1 or n2")
	r.refused(t, from, []string{"switchover", "--cancel"}, "no switchover is planned")
	r.refused(t, from, []string{"failover", "--timeout", "1m"}, from+" is the primary and serves", "pgha switchover")

	r.switchedTo(t, r.operate(t, from, "switchover"), other(from))
	r.goesOn(t, w)
	// From the node that is not the primary, to a named one.
	r.switchedTo(t, r.operate(t, from, "switchover", from), from)
	r.told(t, "witness", node.EventOperation, "", "switchover is done")

	// Whatever an operator who does not wait has left, it is said, and it is whole.
	r.refused(t, from, []string{"switchover", "--timeout", "700ms"}, "not done within 700ms")
}

func (r *rig) plannedSwitchover(t *testing.T, w *testbed.Writer) {
	from := r.healthy(t).Leader
	r.refused(t, from, []string{"switchover", "--at", "yesterday"}, "is no time")
	r.refused(t, from, []string{"switchover", "--at", "2020-01-01T00:00:00Z"}, "is not in the future")
	r.do(t, from, "switchover", "--at", "+2h", other(from))
	r.refused(t, other(from), []string{"switchover", "--at", "+3h"}, "already", "--cancel")
	s := r.await(t, "witness", "the plan", func(s node.Status) bool { return s.Planned != nil })
	if s.Planned.Target != other(from) || s.Health != node.Healthy {
		t.Errorf("the plan is %+v, and the cluster is %s", s.Planned, s.Health)
	}
	r.do(t, other(from), "switchover", "--cancel")
	r.await(t, "witness", "no plan", func(s node.Status) bool { return s.Planned == nil })

	r.do(t, from, "switchover", "--at", "+8s")
	// The plan outlives the daemon.
	if err := r.Kill(from); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	r.await(t, "witness", "the planned switchover", func(s node.Status) bool { return s.Planned == nil })
	r.told(t, "witness", node.EventOperation, "", "planned switchover")
	r.healthy(t)
}

func (r *rig) pause(t *testing.T, w *testbed.Writer) {
	from := r.healthy(t).Leader
	r.do(t, other(from), "pause")
	s := r.await(t, "witness", "the pause", func(s node.Status) bool { return s.Paused })
	if s.Survives {
		t.Error("status says that any node may be lost while automatic failover is off")
	}
	r.refused(t, from, []string{"switchover"}, "is paused", "pgha resume")
	r.do(t, from, "pause") // again
	r.goesOn(t, w)
	r.do(t, from, "resume")
	r.await(t, "witness", "no pause", func(s node.Status) bool { return !s.Paused })
}

func (r *rig) maintenance(t *testing.T, w *testbed.Writer) {
	from := r.healthy(t).Leader
	to := other(from)
	r.refused(t, from, []string{"maintenance", "enter", "n9"}, "no node \"n9\"")
	r.do(t, from, "maintenance", "enter", "--reason", "kernel update")
	s := r.await(t, "witness", "maintenance", func(s node.Status) bool { return s.Leader == to })
	todo := strings.Join(s.ToDo, "; ")
	if s.Survives || !strings.Contains(todo, from+" is in maintenance since") || !strings.Contains(todo, "kernel update") || !strings.Contains(todo, "pgha maintenance leave "+from) {
		t.Errorf("status in maintenance: survives %t, to do %s", s.Survives, todo)
	}
	r.refused(t, to, []string{"switchover", from}, "is in maintenance")
	r.refused(t, to, []string{"maintenance", "enter"}, from+" is in maintenance already")
	r.refused(t, to, []string{"maintenance", "enter", "--force"}, from+" is in maintenance already")
	// A reboot in between; no commit waits for it.
	if err := r.Signal(from, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r.goesOn(t, w)
	if err := r.Run(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	r.await(t, "witness", "the node in maintenance", func(s node.Status) bool {
		for _, m := range s.Members {
			if m.Name == from {
				return m.Maintenance != nil && m.Postgres == "replica" && m.NoFailover && !m.Sync
			}
		}
		return false
	})
	r.do(t, to, "maintenance", "leave", from)
	if s := r.healthy(t); s.Leader != to {
		t.Errorf("the primary is %s after maintenance, want %s", s.Leader, to)
	}
}

func (r *rig) stopPrimary(t *testing.T, w *testbed.Writer) {
	from := r.healthy(t).Leader
	began := time.Now()
	if err := r.Signal(from, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s has stopped in %s", from, time.Since(began).Round(time.Millisecond))
	r.goesOn(t, w)
	r.told(t, "witness", node.EventRole, from, "handing the primary over to "+other(from))
	if err := r.Run(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	if s := r.healthy(t); s.Leader != other(from) {
		t.Errorf("the primary is %s, want %s", s.Leader, other(from))
	}
}

// failover loses a primary that had gone on without its replica: nobody takes over
// by itself, and an operator decides what that is worth.
func (r *rig) failover(t *testing.T) {
	lost := r.healthy(t).Leader
	next := other(lost)
	r.nextID += 1 << 32
	w, err := r.StartWriter(t.Context(), r.nextID, lost)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Stop() })
	r.goesOn(t, w)
	if err := r.Signal(next, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	r.unharmed(t, w)
	gap, _, _ := testbed.Outage(w.Stop())
	t.Logf("stop of the replica: the longest time without a commit %s", gap.Round(time.Millisecond))
	r.await(t, "witness", "the primary alone", func(s node.Status) bool { return s.Leader == lost && !s.Promise.Holds })
	r.insert(t, lost, -1) // which no replica has
	if err := r.PowerOff(lost); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(t.Context(), next); err != nil {
		t.Fatal(err)
	}
	r.await(t, next, "a replica without a primary", func(s node.Status) bool {
		for _, m := range s.Members {
			if m.Name == next {
				return m.Postgres == "replica" && s.Leader == ""
			}
		}
		return false
	})
	r.refused(t, next, []string{"switchover"}, "pgha failover")
	r.refused(t, next, []string{"failover", lost}, lost+" cannot be promoted")
	r.refused(t, next, []string{"failover"}, next+": timeline", "may lose what "+lost+" acknowledged", "--allow-data-loss")
	r.refused(t, next, []string{"failover", "--allow-data-loss"}, "--yes")
	o := r.operate(t, next, "failover", "--allow-data-loss", "--yes")
	if o.Status.Leader != next {
		t.Errorf("the primary is %q, want %s", o.Status.Leader, next)
	}
	if err := r.PowerOn(t.Context(), lost); err != nil {
		t.Fatal(err)
	}
	if s := r.healthy(t); s.Leader != next {
		t.Errorf("the primary is %s, want %s", s.Leader, next)
	}
	r.nothingLost(t) // of what both had
}

// insert commits one row on a host.
func (r *rig) insert(t *testing.T, host string, id int64) {
	t.Helper()
	r.do(t, host, "psql", "-d", testbed.AppDatabase, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", fmt.Sprintf("INSERT INTO t (id) VALUES (%d)", id))
}
