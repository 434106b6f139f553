package gate

import (
	"fmt"
	"time"
)

// Timers of the gate. All nodes of a cluster have the same.
type Timers struct {
	Promise time.Duration // T: how long an owner's gate stays open without a commit
	Beat    time.Duration // how often the owner commits
	Poll    time.Duration // how often a candidate reads
	Attempt time.Duration // after this, a transaction is given up
	Settle  time.Duration // for how long a candidate's own reads must have gone through
	Help    time.Duration // a promotion that takes longer is helped once, and then given up
	Hung    time.Duration // a PostgreSQL that hangs for longer is handed over
}

// TimersOf returns the timers of a profile: fast, steady or wide. An unknown
// name gives fast.
func TimersOf(profile string) Timers {
	t := Timers{Promise: 2500 * time.Millisecond, Beat: 500 * time.Millisecond, Poll: 100 * time.Millisecond,
		Attempt: 400 * time.Millisecond, Settle: time.Second, Help: 3 * time.Second, Hung: 15 * time.Second}
	switch profile {
	case "steady":
		t.Promise, t.Beat, t.Attempt = 6*time.Second, time.Second, 900*time.Millisecond
		t.Settle, t.Hung = 2*time.Second, 20*time.Second
	case "wide":
		t.Promise, t.Beat, t.Poll, t.Attempt = 15*time.Second, 2*time.Second, 250*time.Millisecond, 1900*time.Millisecond
		t.Settle, t.Help, t.Hung = 4*time.Second, 6*time.Second, 30*time.Second
	}
	return t
}

// Margin is what a candidate waits beyond a promise, for clocks that do not run
// at the same rate. The kernel's timers follow the owner's clock, which chrony
// slews by up to 8.3% (its maxslewrate); the candidate counts with a clock that
// nobody slews (see SystemClock). A fast owner needs 9.1% of the promise then;
// the rest is for crystals and for the timers' granularity.
func Margin(promise time.Duration) time.Duration { return 50*time.Millisecond + promise*11/100 }

// Validate checks what the protocol needs of the timers: room for three beats
// in a promise, so that one lost message never shuts a gate, and a settling
// time in which a living owner comes first.
func (t Timers) Validate() error {
	switch {
	case t.Beat <= 0 || t.Poll <= 0 || t.Attempt <= 0:
		return fmt.Errorf("gate timers: beat %s, poll %s and attempt %s must be above 0", t.Beat, t.Poll, t.Attempt)
	case t.Attempt > t.Beat:
		return fmt.Errorf("gate timers: an attempt of %s does not fit between beats %s apart", t.Attempt, t.Beat)
	case t.Promise < 3*t.Beat+t.Attempt:
		return fmt.Errorf("gate timers: a promise of %s has no room for three beats of %s and an attempt of %s", t.Promise, t.Beat, t.Attempt)
	case t.Settle < t.Beat+t.Attempt:
		return fmt.Errorf("gate timers: a settling time of %s leaves a living owner no beat of %s", t.Settle, t.Beat)
	}
	return nil
}
