package e2e

import (
	"fmt"
	"testing"
	"time"

	"pgha/lab/testbed"
	"pgha/node"
)

// A primary whose host stands still for longer than its lease, and then goes
// on, must not take the leadership back from the one that was promoted
// meanwhile. Patroni before 3.0.3 does just that, in most tries, unless it is
// started by the launcher.
func TestFrozenPrimaryDoesNotReturnAsPrimary(t *testing.T) {
	bed := newBed(t)
	if err := bed.Three(within(t, 5*time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := bed.CreateApp(within(t, time.Minute), "n1"); err != nil {
		t.Fatal(err)
	}
	// Twice, because the flaw does not show every time.
	old, next := "n1", "n2"
	for round := range 2 {
		t.Logf("round %d: freezing %s", round, old)
		freezeAndThaw(t, bed, round, old, next)
		old, next = next, old
	}
}

func freezeAndThaw(t *testing.T, bed *testbed.Bed, round int, old, next string) {
	t.Helper()
	w, err := bed.StartWriter(t.Context(), int64(round+1)<<32, old, next)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Stop()
	if _, err := w.WaitAck(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := bed.Host(old).Freeze(); err != nil {
		t.Fatal(err)
	}
	if _, err := bed.WaitStatus(within(t, 3*time.Minute), next, next+" to lead", func(s node.Status) bool { return s.Leader == next }); err != nil {
		t.Fatal(err)
	}
	if _, err := w.WaitAck(within(t, time.Minute)); err != nil {
		t.Fatal(err)
	}
	if err := bed.Host(old).Thaw(); err != nil {
		t.Fatal(err)
	}
	err = testbed.Until(within(t, 3*time.Minute), old+" to follow "+next, func() error {
		s, err := bed.Status(t.Context(), "witness")
		if err != nil {
			return err
		}
		if s.Leader == old {
			return testbed.Stop(fmt.Errorf("%s has taken the leadership back: %s", old, testbed.Members(s)))
		}
		if s.Health != node.Healthy || s.Leader != next {
			return fmt.Errorf("status is %s: %s; %s", s.Health, s.Verdict, testbed.Members(s))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	lost, err := bed.Lost(within(t, time.Minute), next, w.Stop())
	if err != nil {
		t.Fatal(err)
	}
	if len(lost) > 0 {
		t.Fatalf("%d acknowledged commits are lost, the first is %d", len(lost), lost[0])
	}
}
