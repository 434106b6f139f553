package gate

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// The simulation runs a whole cluster in virtual time on one goroutine. All
// that happens follows from the seed, so that a schedule that fails can be
// played again.
//
// It assumes what the gate assumes: the clocks of a host run up to 2% too fast
// or too slow, or the adjusted one alone by up to 8.3%; kernel timers and packet filters run while the host does, and no
// element or guard is touched by anybody but the gate. A host of which
// everything stands still, the kernel's timers too (a paused VM), is outside of
// that; here a frozen host is one whose processes are all stopped while its
// kernel goes on.
//
// Not simulated: rules of others that open the port, and Doubt; sessions on local
// sockets; the wall clock being set while a write to the kernel is under way;
// TCP, so that an answer that the gate has dropped is not sent again; tags and
// nodes that leave; more than one synchronous standby; disks that fill up or
// lose what they have acknowledged; a Patroni that takes a lost key back. etcd's
// members are whole or away: a host either takes part in a quorum or does not.

// event is something that happens at a time of the world.
type event struct {
	at  time.Duration
	seq uint64
	do  func()
}

// schedule is a binary heap of events.
type schedule []event

func (s schedule) before(i, j int) bool {
	return s[i].at < s[j].at || (s[i].at == s[j].at && s[i].seq < s[j].seq)
}

func (s *schedule) push(e event) {
	*s = append(*s, e)
	for i := len(*s) - 1; i > 0; {
		up := (i - 1) / 2
		if !s.before(i, up) {
			break
		}
		(*s)[i], (*s)[up] = (*s)[up], (*s)[i]
		i = up
	}
}

func (s *schedule) pop() event {
	h := *s
	top, n := h[0], len(h)-1
	h[0] = h[n]
	h[n] = event{}
	*s = h[:n]
	for i := 0; ; {
		least := i
		for c := 2*i + 1; c <= 2*i+2 && c < n; c++ {
			if s.before(c, least) {
				least = c
			}
		}
		if least == i {
			return top
		}
		h[i], h[least] = h[least], h[i]
		i = least
	}
}

// counts are what has happened in one or many schedules.
type counts struct {
	schedules, events, takeovers, claims, creates, releases, oaths, restarts int
	admissions, promotions, acks, stopped, faults                            int
}

func (c *counts) add(o counts) {
	c.schedules += o.schedules
	c.events += o.events
	c.takeovers += o.takeovers
	c.claims += o.claims
	c.creates += o.creates
	c.releases += o.releases
	c.oaths += o.oaths
	c.restarts += o.restarts
	c.admissions += o.admissions
	c.promotions += o.promotions
	c.acks += o.acks
	c.stopped += o.stopped
	c.faults += o.faults
}

// world is a cluster under simulation.
type world struct {
	seed uint64
	rng  *rand.Rand
	off  guards

	now  time.Duration
	seq  uint64
	todo schedule

	t      Timers
	hosts  []*host
	data   []*host
	direct [4][4]bool // the links between hosts that are cut
	etcd   etcd
	faults []*fault
	nth    [lastLabel]int
	healed time.Duration // when all faults were over
	flaky  time.Duration // etcd is slow and loses answers until then
	troubleFlaky,
	troubleQuorum time.Duration // when last
	opener *host // whose clients were the last to begin to reach a writable PostgreSQL

	branches []*branch
	newest   *branch // of the last commit that was acknowledged
	counts   counts
	bad      string // the first invariant that was broken
	tracing  bool
	lines    []string
}

func (w *world) after(d time.Duration, do func()) { w.at(w.now+d, do) }

func (w *world) at(t time.Duration, do func()) {
	w.seq++
	w.todo.push(event{max(t, w.now), w.seq, do})
}

// chance is true in p of a million cases.
func (w *world) chance(p int) bool { return w.rng.IntN(1_000_000) < p }

// between returns a time from lo to hi.
func (w *world) between(lo, hi time.Duration) time.Duration {
	if hi <= lo {
		return lo
	}
	return lo + time.Duration(w.rng.Int64N(int64(hi-lo)))
}

// run lets the world go on until an invariant is broken or the end has come.
func (w *world) run(end time.Duration) {
	for w.bad == "" && len(w.todo) > 0 && w.todo[0].at <= end {
		e := w.todo.pop()
		w.now = e.at
		w.counts.events++
		e.do()
	}
}

func (w *world) fail(invariant, format string, args ...any) {
	if w.bad == "" {
		w.bad = invariant + ": " + fmt.Sprintf(format, args...)
		w.logf(nil, "BROKEN %s", w.bad)
	}
}

// logf adds to the trace. Callers check w.tracing first where it costs time.
func (w *world) logf(h *host, format string, args ...any) {
	if !w.tracing {
		return
	}
	name := "-"
	if h != nil {
		name = h.name
	}
	w.lines = append(w.lines, fmt.Sprintf("%10.4f %s  %s", w.now.Seconds(), name, fmt.Sprintf(format, args...)))
}

func (w *world) trace(last int) string {
	lines := w.lines
	if last > 0 && len(lines) > last {
		lines = lines[len(lines)-last:]
	}
	return strings.Join(lines, "\n")
}

// host is one machine.
type host struct {
	w    *world
	id   int
	name string
	data bool

	rate float64
	slew float64       // of the clock of its kernel's timers, against that of its processes
	mono time.Duration // of its clock at the world's start
	wall int64

	up   bool
	net  bool // connected to the other members of etcd
	kern fence
	pgha driver
	pat  patroni
	pg   postgres

	trouble   time.Duration // when something was last wrong with it
	sick      int           // faults that are under way here
	broken    time.Duration // until when its kernel refuses changes
	permitted int           // the PostgreSQL that was let be promoted
	open      bool          // clients reached a writable PostgreSQL at the last look
}

func (h *host) clock() Moment {
	m := h.mono + time.Duration(float64(h.w.now)*h.rate)
	return Moment{Mono: m, Wall: h.wall + int64(h.timer())}
}

// timer is the adjusted clock, with which the kernel's timers and the wall clock
// go.
func (h *host) timer() time.Duration {
	return h.mono + time.Duration(float64(h.w.now)*h.rate*h.slew)
}

// real turns a time on the host's clock into the world's.
func (h *host) real(d time.Duration) time.Duration { return time.Duration(float64(d) / h.rate) }

// linked says whether two hosts reach each other.
func (w *world) linked(a, b *host) bool {
	return a.up && b.up && !w.direct[a.id][b.id] && !w.direct[b.id][a.id]
}

// proc is a process: it can be stopped for a while, and killed.
type proc struct {
	h      *host
	alive  bool
	inc    int // grows with each start and end
	resume time.Duration
}

func (p *proc) kill() { p.alive, p.inc = false, p.inc+1 }

func (p *proc) start() { p.alive, p.inc, p.resume = true, p.inc+1, 0 }

func (p *proc) running() bool { return p.alive && p.h.w.now >= p.resume }

func (p *proc) pause(d time.Duration) {
	p.resume = max(p.resume, p.h.w.now+d)
	p.h.trouble = max(p.h.trouble, p.resume)
}

// after does something in the process, later, if it then still lives.
func (p *proc) after(d time.Duration, do func()) {
	inc := p.inc
	p.h.w.after(d, func() { p.exec(inc, do) })
}

// exec does something in the process now, or when it is no longer stopped.
func (p *proc) exec(inc int, do func()) {
	switch {
	case !p.alive || p.inc != inc:
	case p.h.w.now < p.resume:
		p.h.w.at(p.resume, func() { p.exec(inc, do) })
	default:
		do()
	}
}

// step is an instant between two actions of a process. Faults may come here,
// so that the second action is late or never comes.
func (p *proc) step(l label, do func()) {
	inc := p.inc
	p.h.w.step(p.h, p, l)
	p.exec(inc, do)
}
