package gate

import "time"

// label names the instants between two actions of a process.
type label int

const (
	atWant label = iota
	atKernel
	atApplied
	atAnswer
	atProbe
	atSworn
	atAdmit
	atPromote
	atPatroni
	atSync
	atSend // and the kinds of transaction that follow
	atSendBeat
	atSendCreate
	atSendClaim
	atSendTakeover
	atSendRelease
	lastLabel
)

// what names a kind of fault.
type what int

const (
	stopPgha what = iota
	killPgha
	stopAll
	powerOff
	cutHost
	cutEtcd
	cutDirect
	loseQuorum
	slowEtcd
	stopPatroni
	killPatroni
	killPostgres
	stopPostgres
	planned
	profile
	switchover
	operator
	setClock
	refuse
	restartPostgres
	stopHere   // the process that has come to the instant
	stall      // no transaction of the gate's is sent
	loseAnswer // of the transaction that is about to be sent
	lastWhat
)

var faultNames = [lastWhat]string{"stop pgha", "kill pgha", "stop all processes", "power off", "cut host", "cut from etcd",
	"cut direct link", "lose quorum", "slow etcd", "stop Patroni", "kill Patroni", "kill PostgreSQL", "stop PostgreSQL",
	"planned restart", "profile", "switchover", "operator's pause", "set clock", "kernel refuses", "restart PostgreSQL",
	"stop the process", "stall", "lose the answer"}

// fault is something that goes wrong at a time, or at the nth instant of a kind.
type fault struct {
	kind    what
	host    int // -1 = the owner's, -2 = another data node, -3 = wherever the instant is
	at      time.Duration
	label   label // -1 = at the time
	nth     int
	lasts   time.Duration
	promise time.Duration // of a planned restart; 0 = any
	done    bool
	chain   *fault // comes right with it, or a little later
}

// horizon is when the last fault has begun.
const horizon = 16 * time.Second

// plan draws the faults of a schedule.
func (w *world) plan() {
	n := w.rng.IntN(7)
	if w.chance(400_000) {
		w.theme()
		n = w.rng.IntN(3)
	}
	var last *fault
	for range n {
		f := &fault{kind: what(w.rng.IntN(int(lastWhat))), label: -1, lasts: w.between(0, 3*time.Second)}
		if w.chance(400_000) {
			f.lasts = w.between(w.t.Promise, w.t.Promise+3*time.Second)
		} else if w.chance(400_000) {
			f.lasts = w.between(2*time.Second, 12*time.Second)
		}
		if w.chance(250_000) { // the faults that matter most
			f.kind = []what{stopPgha, killPgha, stopAll, cutHost, cutEtcd, loseQuorum}[w.rng.IntN(6)]
		}
		switch w.rng.IntN(10) {
		case 0, 1, 2, 3, 4:
			f.host = -1
		case 5, 6, 7:
			f.host = -2
		default:
			f.host = w.rng.IntN(len(w.hosts))
		}
		if last != nil && w.chance(450_000) {
			f.at = w.between(0, 1500*time.Millisecond)
			if w.chance(300_000) {
				f.at = w.between(0, 6*time.Second)
			}
			last.chain, last = f, f
			continue
		}
		f.at = w.between(500*time.Millisecond, horizon)
		if w.chance(450_000) {
			f.label, f.nth = label(w.rng.IntN(int(lastLabel))), 1+w.rng.IntN(3)
			if f.label < atSendCreate && f.label != atAdmit && f.label != atPromote && f.label != atSync && f.label != atSworn {
				f.nth = 1 + w.rng.IntN(150)
			}
			if w.chance(700_000) {
				f.host = -3
			}
			if w.chance(300_000) {
				f.kind = stopHere
			}
		}
		w.faults, last = append(w.faults, f), f
	}
	for _, f := range w.faults {
		if f.label < 0 {
			w.at(f.at, func() { w.strike(f, nil) })
		}
	}
}

// step is where the faults of an instant come in.
func (w *world) step(h *host, p *proc, l label) {
	w.nth[l]++
	if w.healed != 0 {
		return
	}
	for _, f := range w.faults {
		if f.label != l || f.done || w.nth[l] < f.nth || (f.kind == stopHere && f.host == -1 && w.pick(f, h) != h) {
			continue
		}
		if f.kind == stopHere {
			p.pause(f.lasts)
		}
		w.strike(f, h)
	}
}

func (w *world) pick(f *fault, here *host) *host {
	owner := w.data[0]
	if r := w.etcd.rec; r != nil {
		for _, h := range w.data {
			if h.name == r.Owner {
				owner = h
			}
		}
	}
	switch f.host {
	case -3:
		if here != nil {
			return here
		}
		return owner
	case -2:
		return w.data[(owner.id+1+w.rng.IntN(len(w.data)-1))%len(w.data)]
	case -1:
		return owner
	}
	return w.hosts[f.host]
}

// strike makes f happen, now.
func (w *world) strike(f *fault, here *host) {
	if f.done || w.healed != 0 {
		return
	}
	f.done = true
	h := w.pick(f, here)
	w.counts.faults++
	w.logf(h, "FAULT: %s for %s", faultNames[f.kind], f.lasts)
	if f.chain != nil {
		w.after(f.chain.at, func() { w.strike(f.chain, here) })
	}
	if f.kind != cutDirect && f.kind != loseQuorum && f.kind != slowEtcd {
		h.sick++
		w.after(f.lasts, func() {
			h.sick--
			h.trouble = max(h.trouble, w.now)
		})
	}
	w.effect(f, h)
}

func (w *world) effect(f *fault, h *host) {
	e := &w.etcd
	switch f.kind {
	case stopPgha:
		h.pgha.pause(f.lasts)
	case stall:
		h.pgha.stalled = w.now + f.lasts
	case loseAnswer:
		h.pgha.loses = true
	case killPgha:
		h.pgha.crash(f.lasts)
	case cutHost, cutEtcd:
		h.cut(f.kind == cutHost, f.lasts)
	case cutDirect:
		o := w.hosts[(h.id+1+w.rng.IntN(len(w.hosts)-1))%len(w.hosts)]
		w.direct[h.id][o.id] = true
		w.after(f.lasts, func() { w.direct[h.id][o.id] = false })
	case loseQuorum:
		e.lost = max(e.lost, w.now+f.lasts)
		e.elect()
	case slowEtcd:
		w.flaky = max(w.flaky, w.now+f.lasts)
		w.troubleFlaky = w.flaky + time.Second
	case profile:
		t := TimersOf([]string{"fast", "steady", "wide"}[w.rng.IntN(3)])
		w.t = t
		for _, o := range w.data { // each learns of it in its time, and never goes back to an older one
			w.after(w.between(0, 2*time.Second), func() {
				if o.pgha.alive {
					o.pgha.after(0, func() { o.pgha.m.SetTimers(w.t) })
				}
			})
		}
		w.troubleFlaky = w.now + 8*time.Second
	case operator:
		e.rev++
		e.paused, e.configRev = true, e.rev
		w.after(f.lasts, w.unpause)
	case setClock:
		step := int64(w.between(-2*time.Hour, 2*time.Hour))
		if w.chance(500_000) {
			step /= 1000
		}
		if !h.pgha.inLoop { // not while a write to the kernel is under way
			h.wall += step
			w.check()
		}
	case refuse:
		h.broken = max(h.broken, w.now+f.lasts)
	default:
		if h.data {
			w.effectOnData(f, h)
		} else if f.kind == powerOff {
			h.powerOff(f.lasts)
		}
	}
}

func (w *world) effectOnData(f *fault, h *host) {
	pg := &h.pg
	switch f.kind {
	case stopAll:
		h.pgha.pause(f.lasts)
		h.pat.pause(f.lasts)
		h.stopPostgres(f.lasts)
	case stopPostgres:
		h.stopPostgres(2 * f.lasts)
	case powerOff:
		h.powerOff(f.lasts)
	case stopPatroni:
		h.pat.pause(2 * f.lasts)
	case killPatroni:
		h.pat.crash(f.lasts)
	case killPostgres:
		if pg.alive {
			pg.stop()
		}
	case restartPostgres:
		if pg.state == Primary && pg.running() && !h.pat.busy {
			pg.restarts = true
			pg.stop()
			w.after(w.between(100*time.Millisecond, 2*time.Second), func() { pg.restarts = false })
		}
	case planned:
		promise := f.promise
		if promise == 0 {
			promise = w.between(3*time.Second, 30*time.Second)
		}
		h.pgha.restart(promise, f.lasts)
	case switchover:
		w.switchover(h)
	}
}

// switchover is an operator's wish, carried out by Patroni.
func (w *world) switchover(h *host) {
	e := &w.etcd
	if e.leader == "" || e.leader == h.name || e.paused {
		return
	}
	for _, o := range w.data {
		if o.name != e.leader || !o.pat.running() || !e.reachable(o) || o.pg.state != Primary || h.pg.source() != &o.pg {
			continue
		}
		e.target = h.name
		o.pat.after(w.between(0, time.Second), func() {
			if o.pg.state != Primary || !o.pg.running() || e.leader != o.name {
				e.target = ""
				return
			}
			h.pg.stream() // the checkpoint of the shutdown
			w.logf(o, "Patroni hands over to %s", e.target)
			o.pat.demote(true)
			o.pat.after(500*time.Millisecond, func() {
				if e.reachable(o) && e.leader == o.name {
					e.setLeader("", 0)
				}
			})
		})
		w.after(15*time.Second, func() { e.target = "" })
	}
}

func (w *world) unpause() {
	if e := &w.etcd; e.paused {
		e.rev++
		e.paused, e.configRev = false, e.rev
	}
}

func (h *host) stopPostgres(d time.Duration) {
	if !h.pg.alive {
		return
	}
	if h.pg.running() {
		h.pg.hungAt = h.clock().Mono
	}
	h.pg.pause(d)
	h.w.at(h.pg.resume, h.w.check)
	h.w.check()
}

func (h *host) cut(direct bool, d time.Duration) {
	w := h.w
	h.net = false
	if direct {
		for i := range w.hosts {
			w.direct[h.id][i] = true
		}
	}
	w.etcd.elect()
	w.after(d, func() {
		h.net = true
		if direct {
			for i := range w.hosts {
				w.direct[h.id][i] = false
			}
		}
	})
}

// powerOff ends everything on the host; the kernel comes back shut.
func (h *host) powerOff(d time.Duration) {
	if !h.up {
		return
	}
	w := h.w
	h.up = false
	h.pgha.kill()
	h.pat.kill()
	h.pg.kill()
	h.pg.waits, h.pg.state = nil, Gone
	h.kern = fence{}
	w.check()
	w.etcd.elect()
	h.trouble = max(h.trouble, w.now+d+2*time.Second)
	w.after(d+w.between(time.Second, 5*time.Second), func() {
		h.up = true
		h.pgha.boot()
		if h.data {
			h.pat.boot()
		}
	})
}
