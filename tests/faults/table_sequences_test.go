package faults

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"

	"pgha/lab/testbed"
)

// sequences are faults that take several steps.
var sequences = append(returns(),
	fault{
		name: "lost-five-times", what: "the primary's host loses power five times in a row, each time returning as a replica", expect: moves, bound: failoverBound,
		whole: func(r *trial) {
			for i := range 5 {
				r.Logf("loss %d: %s", i+1, r.leader)
				lost := r.leader
				r.powerOff(lost)
				r.servedBy(otherThan(lost))
				r.powerOn(lost)
				s, err := r.healthy(within(r.T, patience))
				r.must(err)
				if r.leader = otherThan(lost); s.Leader != r.leader {
					r.Fatalf("the primary is %s, want %s", s.Leader, r.leader)
				}
			}
		},
	},
	fault{
		name: "nemesis", what: "two faults at once, drawn by a seed", quick: true, expect: either, bound: 75 * time.Second, whole: nemesis,
	},
)

// returns are the faults in which all hosts lose power and return in each order.
func returns() []fault {
	var all []fault
	for _, order := range [][]int{{0, 1, 2}, {0, 2, 1}, {1, 0, 2}, {1, 2, 0}, {2, 0, 1}, {2, 1, 0}} {
		roles := func(leader, replica string) []string {
			by := []string{leader, replica, "witness"}
			return []string{by[order[0]], by[order[1]], by[order[2]]}
		}
		names := roles("primary", "replica")
		all = append(all, fault{
			name: "all-off-" + strings.Join(names, "-"), what: "all hosts lose power; then return " + strings.Join(names, ", "),
			expect: either, bound: 4 * time.Minute,
			whole: func(r *trial) {
				for _, h := range hosts {
					r.powerOff(h)
				}
				for _, h := range roles(r.leader, r.replica) {
					r.powerOn(h)
					r.until("pgha on "+h+" to answer", func() error {
						_, err := r.Status(within(r.T, time.Minute), h)
						return err
					})
				}
			},
		})
	}
	return all
}

// elements are what the nemesis draws from: each can be done to any host, with
// another of them in force, and says how it is undone.
var elements = []struct {
	name string
	do   func(r *trial, host string) (heal func())
}{
	{"power off", func(r *trial, h string) func() {
		r.powerOff(h)
		return func() { r.powerOn(h) }
	}},
	{"freeze", func(r *trial, h string) func() {
		r.must(r.Host(h).Freeze())
		return func() { r.must(r.Host(h).Thaw()) }
	}},
	{"isolate", func(r *trial, h string) func() {
		r.must(r.Lab.Isolate(h))
		return func() { r.must(r.Lab.Rejoin(h)) }
	}},
	{"link down", func(r *trial, h string) func() {
		r.must(r.Host(h).LinkDown())
		return func() { r.must(r.Host(h).LinkUp()) }
	}},
	{"deaf", func(r *trial, h string) func() {
		var ways []pair
		for _, o := range hosts {
			if o != h {
				ways = append(ways, pair{o, h})
			}
		}
		return r.cutOneWay(ways...)
	}},
	{"dumb", func(r *trial, h string) func() {
		var ways []pair
		for _, o := range hosts {
			if o != h {
				ways = append(ways, pair{h, o})
			}
		}
		return r.cutOneWay(ways...)
	}},
	{"stop pgha", func(r *trial, h string) func() { return r.stop(h, isDaemon) }},
	{"cut etcd's peers", func(r *trial, _ string) func() { return cutPeers(r) }},
	{"stall disks", func(r *trial, h string) func() {
		if h == "witness" {
			return r.stall(5*time.Second, h, etcdVolume)
		}
		return r.stall(5*time.Second, h, postgresVolume, etcdVolume)
	}},
}

// nemesis does two different faults to two hosts, which may be the same, one
// some time after the other, and undoes them in either order. What needs a
// living host comes first if both meet on one.
func nemesis(r *trial) {
	rng := rand.New(rand.NewPCG(r.seed, 1))
	first := rng.IntN(len(elements))
	second := (first + 1 + rng.IntN(len(elements)-1)) % len(elements)
	if second > first { // power off is the first in the list, and comes last
		first, second = second, first
	}
	// The primary takes part in more than its share.
	at := []string{r.leader, hosts[rng.IntN(len(hosts))]}
	rng.Shuffle(2, func(i, j int) { at[i], at[j] = at[j], at[i] })
	between := time.Duration(rng.IntN(4000)) * time.Millisecond
	hold := 5*time.Second + time.Duration(rng.IntN(15000))*time.Millisecond
	r.Logf("nemesis: %s %s, after %s %s %s, for %s", elements[first].name, at[0], between, elements[second].name, at[1], hold)
	heals := []func(){elements[first].do(r, at[0])}
	r.lasts(between)
	heals = append(heals, elements[second].do(r, at[1]))
	r.lasts(between + hold)
	if at[0] == at[1] || rng.IntN(2) == 0 {
		heals[0], heals[1] = heals[1], heals[0]
	}
	for _, heal := range heals {
		heal()
	}
	for _, h := range hosts {
		r.revive(h)
	}
	r.must(testbed.Until(within(r.T, patience), "the cluster to serve again", func() error {
		if _, err := r.healthy(within(r.T, patience)); err != nil {
			return fmt.Errorf("after the nemesis: %w", err)
		}
		return nil
	}))
}
