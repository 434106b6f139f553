package faults

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"
)

const (
	// unstreamed is for how long the primary acknowledges rows that no replica gets.
	unstreamed = 500 * time.Millisecond
	// behind is how old the last row may be that a replica has got until then.
	behind = time.Second
)

// TestAsynchronous: an asynchronous primary is lost with rows that it has
// acknowledged and not yet streamed. The replica is promoted without them, no
// other row is lost, never do two servers take writes in turns, and the old
// primary gives up what it had for itself and follows.
func TestAsynchronous(t *testing.T) {
	c := newCluster(t, "--async")
	defer c.close(t)
	r := c.begin(t, rand.Uint64())
	cut := r.history.Now()
	r.must(r.Lab.Cut(r.leader, r.replica))
	r.ack("a row that cannot be streamed", r.history.Now()+unstreamed, func(op Op) bool { return op.Server == r.leader })
	r.injected = r.history.Now()
	r.powerOff(r.leader)
	r.must(r.Lab.Heal(r.leader, r.replica))
	r.servedBy(r.replica)
	r.powerOn(r.leader)

	rec := r.finish()
	lost := Lost(rec.ops, rec.have)
	if len(lost) == 0 {
		t.Error("nothing is lost: the old primary streamed what it could not")
	}
	if err := LostTail(rec.ops, lost, cut-behind); err != nil {
		t.Error(err)
	}
	if rec.primary != r.replica || len(rec.reigns) != 2 {
		t.Errorf("the primary is %s; reigns: %s; want one after the other of %s and %s", rec.primary, describeReigns(rec.reigns), r.leader, r.replica)
	}
	// Nothing is written any more, so the old primary has all that the new one has.
	r.until("the old primary to have what the new one has, and no more", func() error {
		rows, err := r.rows(within(t, time.Minute), r.leader, r.first)
		if err != nil {
			return err
		}
		if extra, missing := less(rows, rec.have), less(rec.have, rows); extra+missing > 0 {
			return fmt.Errorf("it has %d rows more and %d less", extra, missing)
		}
		return nil
	})
	gap, _ := Gap(rec.ops, r.injected, r.ended)
	t.Logf("%d operations; %s; %d acknowledged rows were not streamed and are lost; longest gap %s", len(rec.ops), describeReigns(rec.reigns),
		len(lost), gap.Round(time.Millisecond))
}

// less counts what a has and b has not.
func less(a, b map[int64]bool) int {
	n := 0
	for id := range a {
		if !b[id] {
			n++
		}
	}
	return n
}
