package supervisor

import (
	"math"
	"time"
)

// budget counts failures that fade with time.
type budget struct {
	count float64
	last  time.Time
}

// fail returns the budget after one more failure at now, how long to wait before
// the next attempt, and whether the budget is spent. random is in [0,1).
func (b budget) fail(p RestartPolicy, now time.Time, random float64) (next budget, wait time.Duration, spent bool) {
	if dt := now.Sub(b.last); dt > 0 && b.count > 0 {
		b.count *= math.Exp2(-float64(dt) / float64(p.Budget.HalfLife))
	}
	b.count++
	b.last = now
	wait = p.MaxBackoff
	// The counter decays, so that the wait shrinks again after a calm time.
	if d := float64(p.MinBackoff) * math.Exp2(b.count-1); d < float64(p.MaxBackoff) {
		wait = time.Duration(d)
	}
	if spent = b.count > float64(p.Budget.Failures); spent {
		wait = p.MaxBackoff
	}
	return b, wait - time.Duration(random*float64(wait)/4), spent
}
