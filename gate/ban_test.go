package gate

import (
	"testing"
	"time"
)

// TestBan: an owner that is banned shuts at once, stays shut, and writes nothing.
func TestBan(t *testing.T) {
	m := NewMachine("n1", TimersOf("fast"), Moment{})
	now := Moment{Mono: time.Hour, Wall: int64(time.Hour)}
	primary := func() { m.Local(Local{At: now, Process: Primary, Timeline: 1, PatroniUp: true}) }
	primary()
	v := View{Record: &Record{Owner: "n1", Epoch: 1, State: Open}, RecordRev: 1, Leader: "n1", Lease: 7, Timeline: 1}
	m.Done(Op{Kind: Read, At: now}, Result{View: v}, nil, now)
	now = now.Add(m.timers.Beat)
	primary()
	op, _ := m.Next(now)
	r := op.Put
	v.Record, v.RecordRev = &r, 2
	m.Done(op, Result{Done: true, View: v}, nil, now)
	if w := m.Want(now); w.Pass != AsOwner {
		t.Fatalf("the owner wants %+v", w)
	}
	m.Ban("replaced")
	for range 3 {
		w := m.Want(now)
		if w.Pass != Nobody || !w.Reset || w.Why != "replaced" {
			t.Errorf("wants %+v", w)
		}
		if ok, why := m.Admit(now); ok || why != "replaced" {
			t.Errorf("admits a promotion: %s", why)
		}
		if _, ok := m.Asking(now); ok {
			t.Error("asks the others to keep off")
		}
		now = now.Add(m.timers.Beat)
		primary()
		if op, _ := m.Next(now); op.Kind != Read {
			t.Errorf("sends %q", op.Kind)
		}
		m.Done(Op{Kind: Read, At: now}, Result{View: v}, nil, now)
	}
}
