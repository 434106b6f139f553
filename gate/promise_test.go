package gate

import (
	"testing"
	"time"
)

// TestPromiseComesDownAgain: after a longer promise, for a planned restart or
// from a slower profile, the owner's promises cover what the kernel may still
// have of it, and then are what the timers say.
func TestPromiseComesDownAgain(t *testing.T) {
	for _, tc := range []struct {
		name     string
		from, to string
		extend   time.Duration
	}{
		{"wide to steady", "wide", "steady", 0},
		{"wide to fast", "wide", "fast", 0},
		{"fast to wide", "fast", "wide", 0},
		{"a restart, fast", "fast", "fast", 12 * time.Second},
		{"a restart, wide", "wide", "wide", time.Minute},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := NewMachine("n1", TimersOf(tc.from), Moment{})
			now := Moment{Mono: time.Hour, Wall: int64(time.Hour)}
			v := View{Record: &Record{Owner: "n1", Epoch: 1, State: Open}, RecordRev: 1, Leader: "n1", Lease: 7, Timeline: 1}
			m.Local(Local{At: now, Process: Primary, Timeline: 1, PatroniUp: true})
			m.Done(Op{Kind: Read, At: now}, Result{View: v}, nil, now)
			var open time.Duration // until when the kernel may pass clients, by its own slow clock
			beat := func() time.Duration {
				t.Helper()
				now = now.Add(m.timers.Beat)
				m.Local(Local{At: now, Process: Primary, Timeline: 1, PatroniUp: true})
				op, why := m.Next(now)
				if op.Kind != Beat {
					t.Fatalf("the owner sends %q: %s", op.Kind, why)
				}
				if left := open - now.Mono; op.Put.Promise() < left {
					t.Errorf("promises %s while the kernel may be open for %s", op.Put.Promise(), left)
				}
				sent := now
				now = now.Add(3 * time.Millisecond)
				r := op.Put
				v.Record, v.RecordRev = &r, v.RecordRev+1
				m.Done(op, Result{Done: true, View: v}, nil, now)
				if w := m.Want(now); w.Pass == AsOwner {
					if w.Until.Sub(sent) > op.Put.Promise() {
						t.Errorf("open for %s by a promise of %s", w.Until.Sub(sent), op.Put.Promise())
					}
					m.Applying(w)
					m.Applied(w)
					open = max(open, w.Until.Mono+w.Until.Sub(now)/12)
				}
				return op.Put.Promise()
			}
			for range 5 {
				beat()
			}
			m.SetTimers(TimersOf(tc.to))
			m.Extend(tc.extend)
			if got := beat(); got < tc.extend {
				t.Errorf("promises %s, asked for %s", got, tc.extend)
			}
			end := now.Mono + 2*(TimersOf(tc.from).Promise+tc.extend)
			for now.Mono < end {
				beat()
			}
			if got, want := beat(), TimersOf(tc.to).Promise; got != want {
				t.Errorf("in the end it promises %s, want %s", got, want)
			}
		})
	}
}
