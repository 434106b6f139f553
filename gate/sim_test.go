package gate

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"
	"sync"
	"testing"
	"time"
)

// newWorld makes the cluster of a seed.
func newWorld(seed uint64, off guards, tracing bool) *world {
	w := &world{seed: seed, rng: rand.New(rand.NewPCG(seed, 7)), off: off, t: TimersOf("fast"), tracing: tracing}
	switch n := w.rng.IntN(10); n {
	case 0:
		w.t = TimersOf("steady")
	case 1:
		w.t = TimersOf("wide")
	}
	names := []string{"a", "b", "w"}
	if w.chance(120_000) {
		names = []string{"a", "b", "c", "w"}
	}
	first := &branch{timeline: 1}
	w.branches = []*branch{first}
	e := &w.etcd
	*e = etcd{w: w, leases: map[int64]time.Duration{}, synchronous: w.chance(700_000), rev: 1, configRev: 1}
	for i, name := range names {
		h := &host{w: w, id: i, name: name, data: name != "w", up: true, net: true,
			rate: 0.98 + 0.04*w.rng.Float64(), mono: w.between(time.Hour, 100*time.Hour), wall: w.rng.Int64N(1e15)}
		h.slew = 1
		switch w.rng.IntN(4) {
		case 0: // the worst clocks
			h.rate = []float64{0.98, 1.02}[w.rng.IntN(2)]
		case 1: // the adjusted one is being corrected
			h.rate, h.slew = 0.9995+0.001*w.rng.Float64(), []float64{1 - 1/12., 1 + 1/12.}[w.rng.IntN(2)]
		}
		h.pgha.h, h.pat.h, h.pg.h = h, h, h
		w.hosts = append(w.hosts, h)
		if h.data {
			w.data = append(w.data, h)
		}
	}
	e.head = w.rng.IntN(len(w.hosts))
	newer := w.chance(500_000)
	retry := []time.Duration{4 * time.Second, 9 * time.Second}[w.rng.IntN(2)]
	for i, h := range w.data {
		h.pg.on, h.pg.state, h.pg.primary = first, Recovery, i == 0
		h.pg.start()
		h.pat.starts, h.pat.retry = newer, retry
		h.pat.start()
		h.pat.keep()
		h.pat.after(w.between(0, patroniLoop), h.pat.wake)
		w.after(w.between(0, 300*time.Millisecond), h.client)
	}
	w.data[0].pg.state = Primary
	e.leader, e.leaderLease = "a", w.data[0].pat.lease
	e.setSync("a", nil)
	if !w.chance(100_000) {
		e.rev++
		e.rec, e.rrev = &Record{Owner: "a", Epoch: 1, Seq: 1, PromiseMS: w.t.Promise.Milliseconds(), State: Promoting}, e.rev
	}
	for _, h := range w.hosts {
		h.pgha.boot()
	}
	w.counts.schedules = 1
	w.plan()
	return w
}

// play runs a schedule: first the faults, then the time to recover.
func (w *world) play() *world {
	w.run(horizon + 6*time.Second)
	if w.bad != "" {
		return w
	}
	w.heal()
	end := w.healed + 120*time.Second
	for good := 0; w.bad == "" && good < 3; {
		w.run(w.now + time.Second)
		if w.well() {
			good++
			continue
		}
		good = 0
		if w.now > end {
			w.fail("I5", "120 s after all faults were over: %s", w.describe())
		}
	}
	return w
}

func (w *world) heal() {
	w.healed = w.now
	w.logf(nil, "HEALED: no more faults")
	w.flaky, w.etcd.lost, w.direct = 0, 0, [4][4]bool{}
	w.unpause()
	w.etcd.target = ""
	for _, h := range w.hosts {
		h.net, h.broken, h.pg.restarts = true, 0, false
	}
	w.check()
}

// well says whether there is exactly one writable open primary, which the
// leader key and the record name.
func (w *world) well() bool {
	var open *host
	for _, h := range w.data {
		if h.pg.state == Primary && h.pg.running() && h.passes() {
			open = h
		}
		if h.pg.state == Primary && h.name != w.etcd.leader {
			return false
		}
	}
	r := w.etcd.rec
	return open != nil && w.etcd.leader == open.name && r != nil && r.Owner == open.name && r.State == Open
}

func (w *world) describe() string {
	s := fmt.Sprintf("leader key %q, sync %+v", w.etcd.leader, w.etcd.sync)
	if w.etcd.rec != nil {
		s += " record " + w.etcd.rec.Encode()
	}
	for _, h := range w.data {
		s += fmt.Sprintf("; %s: PostgreSQL %s, passes %t", h.name, h.pg.state, h.passes())
	}
	return s
}

// failure is a schedule in which an invariant was broken.
type failure struct {
	seed uint64
	what string
}

// explore plays the schedules of n seeds on all processors, until one fails. It
// returns the failure with the lowest seed of those found.
func explore(first uint64, n int, off guards) (counts, *failure) {
	const block = 64
	var (
		mu    sync.Mutex
		wg    sync.WaitGroup
		next  int
		total counts
		found *failure
	)
	for range runtime.GOMAXPROCS(0) {
		wg.Go(func() {
			var c counts
			for {
				mu.Lock()
				from := next
				next += block
				stop := found != nil || from >= n
				mu.Unlock()
				if stop {
					break
				}
				for i := from; i < min(from+block, n); i++ {
					w := newWorld(first+uint64(i), off, false).play()
					c.add(w.counts)
					if w.bad != "" {
						mu.Lock()
						if found == nil || w.seed < found.seed {
							found = &failure{w.seed, w.bad}
						}
						mu.Unlock()
						break
					}
				}
			}
			mu.Lock()
			total.add(c)
			mu.Unlock()
		})
	}
	wg.Wait()
	return total, found
}

// number reads a number from the environment.
func number(t *testing.T, name string, otherwise int) int {
	s := os.Getenv(name)
	if s == "" {
		return otherwise
	}
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatalf("%s=%s is not a number", name, s)
	}
	return n
}

// TestSimulation plays schedules of a cluster with faults in virtual time.
// PGHA_SCHEDULES sets their number, PGHA_FIRST the first seed; PGHA_SEED plays
// one and shows all of it.
func TestSimulation(t *testing.T) {
	if seed := number(t, "PGHA_SEED", -1); seed >= 0 {
		w := newWorld(uint64(seed), guards(number(t, "PGHA_OFF", 0)), true).play()
		t.Logf("%s\n%+v", w.trace(0), w.counts)
		if w.bad != "" {
			t.Fatal(w.bad)
		}
		return
	}
	// Little of what a schedule allocates is ever alive.
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	begun := time.Now()
	c, bad := explore(uint64(number(t, "PGHA_FIRST", 1)), number(t, "PGHA_SCHEDULES", simSchedules), 0)
	took := time.Since(begun)
	if bad != nil {
		w := newWorld(bad.seed, 0, true).play()
		t.Fatalf("PGHA_SEED=%d: %s\n%s", bad.seed, bad.what, w.trace(120))
	}
	t.Logf("%d schedules in %s (%.0f/s), %d events, %d faults: %d takeovers, %d claims, %d creations, %d releases, %d oaths, %d restarts of the daemon, %d admissions, %d promotions, %d writes acknowledged, %d answers stopped",
		c.schedules, took.Round(time.Second), float64(c.schedules)/took.Seconds(), c.events, c.faults, c.takeovers, c.claims, c.creates, c.releases,
		c.oaths, c.restarts, c.admissions, c.promotions, c.acks, c.stopped)
	// A simulation in which nothing happens proves nothing.
	for _, least := range []struct {
		what string
		got  int
		per  int // schedules
	}{
		{"faults", c.faults, 1}, {"takeovers", c.takeovers, 4}, {"claims", c.claims, 30}, {"creations", c.creates, 20},
		{"releases", c.releases, 5}, {"oaths", c.oaths, 10}, {"restarts of the daemon", c.restarts, 8},
		{"admissions", c.admissions, 4}, {"promotions", c.promotions, 4}, {"writes acknowledged", c.acks, 1}, {"answers stopped", c.stopped, 40},
	} {
		if least.got < c.schedules/least.per {
			t.Errorf("%d %s in %d schedules: fewer than one in %d", least.got, least.what, c.schedules, least.per)
		}
	}
}
