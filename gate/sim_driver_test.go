package gate

import (
	"slices"
	"time"
)

// driver is a host's pgha: the Machine, and what Gate.Run does with it, step by
// step. Gate's lock is held where a step is between two actions of settle; as
// faults stop the process as a whole, nothing else runs then.
type driver struct {
	proc
	m *Machine

	busy, asking bool
	next         time.Duration // on the host's clock
	applied      Want
	sure         bool
	helped       int
	foreign      Moment
	gen          int // of the timer
	inLoop       bool
	again        bool
	longer       func()        // once a longer promise is in the kernel
	stalled      time.Duration // nothing is sent before
	loses        bool          // the next answer
}

// boot starts the daemon. The kernel is as an earlier one, or the boot, left it.
func (d *driver) boot() {
	h := d.h
	d.start()
	d.busy, d.asking, d.next, d.applied, d.sure = false, false, 0, Want{}, false
	d.helped, d.foreign, d.inLoop, d.again, d.longer = 0, Moment{}, false, false, nil
	if !h.data {
		return
	}
	d.m = NewMachine(h.name, h.w.t, h.held())
	d.m.off = h.w.off
	if h.pg.alive && h.permitted == h.pg.inc {
		d.m.Permitted(h.clock())
	}
	d.probe(false)
	d.after(0, d.loop)
}

func (d *driver) crash(back time.Duration) {
	h := d.h
	if !d.alive {
		return
	}
	h.w.counts.restarts++
	h.w.logf(h, "pgha dies")
	d.kill()
	h.trouble = max(h.trouble, h.w.now+back)
	h.w.after(back, func() {
		if h.up && !d.alive {
			h.w.logf(h, "pgha starts; the kernel holds %s for %s", h.kern.pass, h.held().Sub(h.clock()))
			h.trouble = max(h.trouble, h.w.now+time.Second)
			d.boot()
		}
	})
}

// probe is the watch over the local PostgreSQL. once: it was called by an event.
func (d *driver) probe(once bool) {
	h := d.h
	if !once {
		d.after(h.w.between(80*time.Millisecond, 120*time.Millisecond), func() { d.probe(false) })
	}
	pg := &h.pg
	pg.stream()
	pg.release()
	l := Local{At: h.clock(), Process: pg.state, PatroniUp: h.pat.running(), Restarting: pg.restarts}
	if pg.alive && !pg.running() {
		if l.Process = Unknown; h.clock().Mono-pg.hungAt > 3*time.Second {
			l.Process, l.WasPrimary = Hung, pg.state == Primary
		}
	} else {
		l.Timeline, l.Received, l.StreamedAt = pg.on.timeline, pg.lsn, pg.streamed
	}
	d.step(atProbe, func() {
		before := d.m.local
		d.m.Local(l)
		if before.writable() && !l.writable() {
			d.helped, d.foreign = 0, l.At
		}
		if before.Process != l.Process || before.Timeline != l.Timeline || before.PatroniUp != l.PatroniUp {
			d.kick()
		}
	})
}

func (d *driver) kick() {
	d.next = 0
	d.loop()
}

// loop is one round of Gate.Run.
func (d *driver) loop() {
	if d.m == nil || !d.alive {
		return
	}
	if d.inLoop {
		d.again = true
		return
	}
	d.inLoop = true
	d.settle(func() {
		now := d.h.clock()
		if d.busy || now.Mono < d.next {
			d.rest()
			return
		}
		op, why := d.m.Next(d.h.clock())
		d.next = now.Mono + d.m.timers.Poll
		if op.Kind == None {
			d.rest()
			return
		}
		d.busy = true
		if op.Kind != Read && op.Kind != Beat {
			d.h.w.logf(d.h, "sends %s: %s", op.Kind, why)
		}
		d.step(atSend+sendLabel(op.Kind), func() {
			d.send(op)
			d.rest()
		})
	})
}

func sendLabel(k Kind) label {
	return label(slices.Index([]Kind{Read, Beat, Create, Claim, Takeover, Release}, k))
}

// rest is the end of a round: it waits for something to happen.
func (d *driver) rest() {
	if !d.asking {
		d.ask()
	}
	d.help()
	d.inLoop = false
	if f := d.longer; f != nil && !d.m.Extending() && d.sure && d.applied.Pass == AsOwner && d.applied.Until.Mono >= d.m.lease.Mono {
		d.longer = nil
		f()
		return
	}
	d.gen++
	gen := d.gen
	wait := d.m.timers.Poll
	if !d.busy {
		wait = max(min(d.next-d.h.clock().Mono, wait), time.Millisecond)
	}
	if d.again {
		d.again, d.next, wait = false, 0, 0
	}
	d.after(d.h.real(wait), func() {
		if gen == d.gen {
			d.loop()
		}
	})
}

// settle makes the kernel do what the machine wants, and then goes on.
func (d *driver) settle(then func()) {
	w := d.m.Want(d.h.clock())
	if w.Pass == Keep || (d.sure && !d.differs(w)) {
		then()
		return
	}
	d.m.Applying(w)
	d.step(atWant, func() {
		read := d.h.clock().Mono
		d.step(atKernel, func() {
			if w.Pass != d.applied.Pass {
				d.h.w.logf(d.h, "kernel: %s for %s: %s", w.Pass, w.Until.Sub(d.h.clock()), w.Why)
			}
			err := d.h.setFence(w, read)
			d.step(atApplied, func() {
				if err == nil {
					d.m.Applied(w)
				}
				d.sure, d.applied = err == nil, w
				then()
			})
		})
	})
}

func (d *driver) differs(w Want) bool {
	g := Gate{m: d.m, applied: d.applied}
	return g.differs(w)
}

// send gives op to etcd and takes the answer, or none in time.
func (d *driver) send(op Op) {
	w := d.h.w
	over := false
	finish := func(r Result, err error) {
		if over {
			return
		}
		over = true
		d.step(atAnswer, func() { d.done(op, r, err) })
	}
	sent := w.now
	limit := d.h.real(d.m.timers.Attempt)
	inc := d.inc
	delay := max(d.stalled-w.now, 0)
	if w.chance(300) { // the goroutine does not get the processor
		delay = w.between(0, 3*time.Second)
		d.h.trouble = max(d.h.trouble, w.now+delay)
	}
	w.after(delay, func() {
		d.exec(inc, func() {
			w.etcd.send(d.h, op, func(r Result, err error) {
				d.exec(inc, func() {
					if w.now > sent+delay+limit && w.chance(500_000) {
						finish(Result{}, errNoAnswer)
						return
					}
					finish(r, err)
				})
			})
			d.after(limit, func() { finish(Result{}, errNoAnswer) })
		})
	})
}

func (d *driver) done(op Op, r Result, err error) {
	now := d.h.clock()
	before := d.m.view
	d.m.Done(op, r, err, now)
	d.busy = false
	if err != nil {
		d.loop()
		return
	}
	after := d.m.view
	changed := ownerOf(before) != ownerOf(after) || stateOf(before) != stateOf(after) || before.Leader != after.Leader
	if changed {
		if ownerOf(after) != "" && ownerOf(after) != d.h.name {
			d.foreign = now
		}
		d.helped = 0
		d.h.w.logf(d.h, "sees owner %s %s, leader key %q, sync %s %v", ownerOf(after), stateOf(after), after.Leader, after.Sync.Leader, after.Sync.Standbys)
	}
	if changed || (op.Kind != Read && op.Kind != Beat) {
		d.next = 0
	}
	d.loop()
}

// ask has the others keep off.
func (d *driver) ask() {
	at := d.h.clock()
	dur, ok := d.m.Asking(at)
	if !ok {
		return
	}
	w, epoch, limit := d.h.w, d.m.view.Record.Epoch, d.h.real(2*d.m.timers.Attempt)
	d.asking = true
	missing, refused := len(w.hosts)-1, false
	begun := w.now
	sworn := func() {
		if now := d.h.clock(); w.now-begun <= limit {
			if d.m.owner() && d.m.lease.Mono > now.Mono {
				w.counts.oaths++
				w.logf(d.h, "all keep off: open until %s from now", at.Add(dur).Sub(now))
			}
			d.m.Sworn(at, dur, now)
			d.kick()
		}
	}
	for _, o := range w.hosts {
		if o == d.h {
			continue
		}
		reply := func(yes bool) {
			d.after(w.between(time.Millisecond, 30*time.Millisecond), func() {
				if !w.linked(d.h, o) {
					return
				}
				if refused = refused || !yes; refused {
					return
				}
				if missing--; missing == 0 {
					d.step(atSworn, sworn)
				}
			})
		}
		d.after(w.between(time.Millisecond, 30*time.Millisecond), func() {
			if w.linked(d.h, o) && o.pgha.alive {
				o.pgha.after(0, func() { reply(o.pgha.swear(d.h.name, epoch, dur) == nil) })
			}
		})
	}
	if !w.off.on(guardAsk) {
		d.after(10*time.Millisecond, sworn)
	}
	d.after(limit, func() { d.asking = false; d.loop() })
}

// swear is a peer's question to this node. A witness never becomes the owner.
func (d *driver) swear(owner string, epoch uint64, dur time.Duration) error {
	if d.m == nil {
		return nil
	}
	err := d.m.Swear(owner, epoch, dur, d.h.clock())
	if err != nil {
		d.h.w.logf(d.h, "does not promise %s to keep off: %s", owner, err)
	} else {
		d.h.w.logf(d.h, "promises %s to keep off", owner)
	}
	return err
}

// help looks after Patroni.
func (d *driver) help() {
	if !d.m.viewed {
		return
	}
	now := d.h.clock()
	foreign := time.Duration(0)
	if d.foreign != (Moment{}) {
		foreign = now.Sub(d.foreign)
	}
	what, why := decideHelp(d.m.observe(now), d.helped, foreign)
	switch what {
	case helpNone:
		return
	case helpGiveUp:
		d.m.GiveUp(now)
	case helpRestartPatroni:
		d.h.w.logf(d.h, "kills Patroni: %s", why)
		d.h.pat.crash(300 * time.Millisecond)
	case helpStopPostgres:
		d.h.w.logf(d.h, "stops PostgreSQL: %s", why)
		d.h.pat.crash(300 * time.Millisecond)
		d.h.pg.stop()
	}
	d.helped++
}

// restart ends the daemon on purpose and starts it again, after a longer promise.
func (d *driver) restart(promise, back time.Duration) {
	if d.m == nil || !d.running() {
		return
	}
	if !d.m.owner() || !d.m.wasPrimary {
		d.crash(back)
		return
	}
	d.m.Extend(promise)
	inc := d.inc
	d.longer = func() {
		d.h.w.logf(d.h, "a longer promise is given")
		if d.inc == inc {
			d.crash(back)
		}
	}
	d.after(3*time.Second, func() { d.longer = nil })
	d.kick()
}
