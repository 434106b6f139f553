package faults

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"time"
)

// expectation is what becomes of the primary.
type expectation string

const (
	moves  expectation = "failover"
	stays  expectation = "no failover"
	either expectation = "either"
)

// fault is one kind of trial.
type fault struct {
	name   string
	what   string // in the report
	quick  bool   // part of every test run, not of the soak alone
	expect expectation
	lasts  time.Duration // at least
	bound  time.Duration // of the longest gap
	// inject begins the fault and returns what ends it.
	inject func(r *trial) (heal func())
	// whole, if set, is all of the trial between its beginning and its end.
	whole func(r *trial)
}

// run does the fault once.
func (f fault) run(c *cluster, t *testing.T, seed uint64) result {
	r := c.begin(t, seed)
	t.Logf("primary %s, seed %d", r.leader, seed)
	r.injected = r.history.Now()
	if f.whole != nil {
		f.whole(r)
		return r.end(f.expect, f.bound)
	}
	heal := f.inject(r)
	switch f.expect {
	case moves:
		r.servedBy(r.replica)
		r.lasts(f.lasts)
	case stays:
		r.lasts(f.lasts)
		r.servedBy(r.leader)
	case either:
		r.lasts(f.lasts)
		r.ack("any row", r.history.Now(), func(Op) bool { return true })
	}
	heal()
	return r.end(f.expect, f.bound)
}

// TestFaults does each quick fault once, or with PGHA_SOAK=N every fault N times
// and writes the report. All share one cluster, until one of them breaks it.
func TestFaults(t *testing.T) {
	rounds, all := 1, false
	if n := os.Getenv("PGHA_SOAK"); n != "" {
		var err error
		if rounds, err = strconv.Atoi(n); err != nil {
			t.Fatalf("PGHA_SOAK must be a number of rounds: %v", err)
		}
		all = true
	}
	seed := uint64(1) // the same faults at each run, but for the soak
	if all {
		seed = uint64(time.Now().UnixNano())
	}
	if s := os.Getenv("PGHA_SEED"); s != "" {
		var err error
		if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
			t.Fatalf("PGHA_SEED must be a number: %v", err)
		}
	}
	t.Logf("seed %d; to repeat: PGHA_SEED=%d", seed, seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	report := report{}
	var c *cluster
	defer func() {
		if c != nil {
			c.close(t)
		}
	}()
	for round := range rounds {
		for _, f := range faults {
			s := rng.Uint64()
			if !all && !f.quick {
				continue
			}
			if c == nil {
				c = newCluster(t)
			}
			ok := t.Run(fmt.Sprintf("%s/%d", f.name, round+1), func(t *testing.T) {
				var res result
				defer func() {
					report.add(f, res, t.Failed())
					if t.Failed() && os.Getenv("PGHA_FAULTS_KEEP") == "" {
						c.showLogs(t)
					}
				}()
				res = f.run(c, t, s)
			})
			if !ok { // it may be broken
				c.close(t)
				c = nil
			}
		}
	}
	if all {
		if err := report.write(); err != nil {
			t.Error(err)
		}
	}
}
