package gate

import (
	"strings"
	"testing"
	"time"
)

// owning returns the machine of an owner n1 that has just been answered a beat,
// and the view that it has.
func owning(state State, process Process) (*Machine, View, Moment) {
	m := NewMachine("n1", TimersOf("fast"), Moment{})
	now := Moment{Mono: time.Hour, Wall: int64(time.Hour)}
	v := View{Record: &Record{Owner: "n1", Epoch: 4, PromiseMS: 2500, State: state}, RecordRev: 8, Leader: "n1", Lease: 7, Timeline: 1}
	m.Local(Local{At: now, Process: process, Timeline: 1, PatroniUp: true})
	m.Done(Op{Kind: Read, At: now}, Result{View: v}, nil, now)
	m.Done(Op{Kind: Beat, At: now, Put: *v.Record}, Result{Done: true, View: v}, nil, now)
	return m, v, now
}

func TestAdmit(t *testing.T) {
	shut := func(m *Machine, now Moment) { m.Applied(Want{Pass: Nobody}) }
	for _, c := range []struct {
		name string
		with func(m *Machine, now Moment)
		at   time.Duration // after the beat
		ok   bool
		why  string
	}{
		{"the owner, shut", shut, 0, true, "is the owner"},
		{"the owner, at the end of its promise", shut, 2499 * ms, true, "is the owner"},
		{"the owner, after its promise", shut, 2500 * ms, false, "no commit within the promise"},
		{"not known to be shut", func(*Machine, Moment) {}, 0, false, "not yet shut"},
		{"shut, and then told to open", func(m *Machine, now Moment) {
			shut(m, now)
			m.Applying(Want{Pass: AsReplica, Until: now.Add(time.Second), from: now})
		}, 0, false, "not yet shut"},
		{"shut, and then somebody else has changed the rules", func(m *Machine, now Moment) {
			shut(m, now)
			m.Applying(Want{Pass: Keep})
		}, 0, false, "not yet shut"},
		{"another has the leader key", func(m *Machine, now Moment) { shut(m, now); m.view.Leader = "n2" }, 0, false, "names n2"},
		{"PostgreSQL is gone", func(m *Machine, now Moment) {
			shut(m, now)
			m.Local(Local{At: now.Add(ms), Process: Gone})
		}, 0, false, "PostgreSQL is gone"},
		{"not promoted for long", shut, 9 * time.Second, false, "no commit within the promise"},
		{"it says that it is shut", func(m *Machine, now Moment) {
			shut(m, now)
			m.view.Record.State = Shut
			m.Done(Op{Kind: Read, At: now}, Result{View: m.view}, nil, now)
		}, 0, false, "no commit within the promise"},
		{"nothing is read yet", func(m *Machine, now Moment) { shut(m, now); m.viewed = false }, 0, false, "not been read"},
		{"another is the owner", func(m *Machine, now Moment) { shut(m, now); m.view.Record.Owner = "n2" }, 0, false, "n2 may still be open"},
		{"another is the owner and has the leader key", func(m *Machine, now Moment) {
			shut(m, now)
			m.view.Record.Owner, m.view.Leader = "n2", "n2"
		}, 0, false, "does not hold the leader key"},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, _, now := owning(Promoting, Recovery)
			c.with(m, now)
			ok, why := m.Admit(now.Add(c.at))
			if ok != c.ok || !strings.Contains(why, c.why) {
				t.Errorf("got %t, %q; want %t, %q", ok, why, c.ok, c.why)
			}
			if w := m.Want(now.Add(c.at)); ok && w.Pass != Nobody {
				t.Errorf("after the permission the kernel is to pass %s", w.Pass)
			}
		})
	}
}

func TestSwear(t *testing.T) {
	d := 2500 * ms
	// reads is a candidate n2 that has read the record of n1 every 100 ms for as
	// long, while it did not change.
	reads := func(since time.Duration) (*Machine, Moment) {
		m := NewMachine("n2", TimersOf("fast"), Moment{})
		v := View{Record: &Record{Owner: "n1", Epoch: 4, PromiseMS: 2500, State: Open}, RecordRev: 8, Leader: "n1"}
		now := Moment{Mono: time.Hour}
		for end := now.Mono + since; ; now = now.Add(100 * ms) {
			m.Done(Op{Kind: Read, At: now}, Result{View: v}, nil, now)
			if now.Mono >= end {
				return m, now
			}
		}
	}
	for _, c := range []struct {
		name  string
		since time.Duration
		with  func(m *Machine, now Moment)
		owner string
		epoch uint64
		d     time.Duration
		why   string // "" = it promises
	}{
		{"the owner asks", 5 * time.Second, nil, "n1", 4, d, ""},
		{"nothing is known yet", 0, func(m *Machine, _ Moment) { m.viewed = false }, "n3", 1, d, ""},
		{"there is no record", 0, func(m *Machine, _ Moment) { m.view.Record = nil }, "n1", 4, d, ""},
		{"another owner", 0, nil, "n3", 4, d, "owned by n1 since epoch 4"},
		{"another epoch", 0, nil, "n1", 3, d, "owned by n1 since epoch 4"},
		{"this node itself is the owner", 0, func(m *Machine, _ Moment) { m.view.Record.Owner = "n2" }, "n1", 4, d, "owned by n2"},
		{"for a minute", 0, nil, "n1", 4, time.Minute, ""},
		{"for longer", 0, nil, "n1", 4, time.Minute + ms, "longer than any promise"},
		{"the owner has been silent for long, and here is a quorum", agreeFor, nil, "n1", 4, d, "n1 has not committed for 30s"},
		{"not yet so long", agreeFor - 100*ms, nil, "n1", 4, d, ""},
		{"silent for long, and no quorum here either", agreeFor, func(m *Machine, now Moment) {
			m.Done(Op{Kind: Read, At: now}, Result{}, errNoAnswer, now)
		}, "n1", 4, d, ""},
		{"silent for long, and a quorum here of late", agreeFor, func(m *Machine, now Moment) {
			m.Done(Op{Kind: Read, At: now}, Result{}, errNoAnswer, now)
			m.Done(Op{Kind: Read, At: now}, Result{View: m.view}, nil, now)
		}, "n1", 4, d, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			m, now := reads(c.since)
			if c.with != nil {
				c.with(m, now)
			}
			err := m.Swear(c.owner, c.epoch, c.d, now)
			if c.why != "" {
				if err == nil || !strings.Contains(err.Error(), c.why) || m.observe(now).oath != 0 {
					t.Errorf("got %v and an oath of %s, want %q and none", err, m.observe(now).oath, c.why)
				}
				return
			}
			if want := c.d + Margin(c.d); err != nil || m.observe(now).oath != want {
				t.Errorf("got %v and an oath of %s, want %s", err, m.observe(now).oath, want)
			}
			if err := m.Swear(c.owner, c.epoch, time.Millisecond, now); err != nil || m.observe(now).oath < c.d {
				t.Errorf("a shorter oath replaces a longer one: %v, %s", err, m.observe(now).oath)
			}
		})
	}
}

// TestSworn: an agreement holds an open gate open, and opens none.
func TestSworn(t *testing.T) {
	m, _, now := owning(Open, Primary)
	m.Done(Op{Kind: Beat, At: now}, Result{}, errNoAnswer, now)
	asked := now.Add(2 * time.Second)
	d, ok := m.Asking(asked)
	if !ok || d != 2500*ms || m.Agreed(asked) {
		t.Fatalf("without a quorum the owner asks %t for %s, agreed %t", ok, d, m.Agreed(asked))
	}
	m.Sworn(asked, d, asked.Add(300*ms))
	if w := m.Want(asked.Add(300 * ms)); w.Pass != AsOwner || w.Until != asked.Add(d) || !m.Agreed(asked.Add(300*ms)) {
		t.Errorf("agreed by all, the kernel is to pass %s until %s after the question", w.Pass, w.Until.Sub(asked))
	}
	end := asked.Add(d)
	if _, ok := m.Asking(end); ok || m.Agreed(end) {
		t.Error("an owner asks, or counts on an agreement, whose gate has shut")
	}
	m.Sworn(asked.Add(d-ms), d, end)
	if w := m.Want(end); w.Pass != Keep || m.Agreed(end) {
		t.Errorf("an agreement that comes too late makes the kernel pass %s", w.Pass)
	}
}

// TestBeatThatFailed: an owner whose record has changed under it, by an earlier
// beat of its own that was carried out late, beats again at once.
func TestBeatThatFailed(t *testing.T) {
	m, v, now := owning(Open, Primary)
	now = now.Add(m.timers.Beat)
	op, why := m.Next(now)
	if op.Kind != Beat {
		t.Fatalf("the owner sends %q: %s", op.Kind, why)
	}
	late := *v.Record
	late.Seq++
	v.Record, v.RecordRev = &late, v.RecordRev+1
	now = now.Add(ms)
	m.Done(op, Result{View: v}, nil, now)
	op, why = m.Next(now)
	if op.Kind != Beat || *op.Record != v.RecordRev || op.Put.Seq != late.Seq+1 {
		t.Errorf("then it sends %q of seq %d: %s", op.Kind, op.Put.Seq, why)
	}
}
