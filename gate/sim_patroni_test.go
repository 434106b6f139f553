package gate

import (
	"slices"
	"time"
)

// patroni is a host's Patroni: of a version that gives a lost leader key up
// instead of taking it back.
type patroni struct {
	proc
	lease    int64
	answered time.Duration // when etcd last answered
	busy     bool          // a promotion, demotion or start is under way
	shy      time.Duration // stays out of the race until then
	gen      int           // of its timer
	asking   int           // the script's questions
	why      string        // the last refusal traced
	retry    time.Duration // retry_timeout
	starts   bool          // starts a crashed primary as one, without pre_promote
}

const patroniLoop = time.Second

func (p *patroni) boot() {
	p.start()
	p.lease, p.busy, p.answered = 0, false, p.h.w.now
	p.after(p.h.w.between(300*time.Millisecond, 1200*time.Millisecond), p.wake)
}

func (p *patroni) crash(back time.Duration) {
	p.kill()
	h := p.h
	h.w.after(back, func() {
		if h.up && !p.alive {
			p.boot()
		}
	})
}

func (p *patroni) wake() {
	p.gen++
	gen := p.gen
	p.after(p.h.w.between(patroniLoop*9/10, patroniLoop*11/10), func() {
		if gen == p.gen {
			p.wake()
		}
	})
	p.cycle()
}

// snapshot is what one cycle of Patroni has read.
type snapshot struct {
	leader, target string
	sync           Sync
	paused         bool
}

func (p *patroni) cycle() {
	e := &p.h.w.etcd
	if !e.reachable(p.h) {
		if p.h.w.now-p.answered > p.retry && p.h.pg.state == Primary && !e.paused {
			p.demote(false)
		}
		return
	}
	e.expire()
	s := snapshot{e.leader, e.target, e.sync, e.paused}
	p.step(atPatroni, func() {
		if e.reachable(p.h) {
			p.answered = p.h.w.now
			p.act(s)
		}
	})
}

// keep renews the session and the member key.
func (p *patroni) keep() {
	e := &p.h.w.etcd
	e.expire()
	if _, ok := e.leases[p.lease]; !ok || p.lease == 0 {
		p.lease = e.grant()
	}
	e.leases[p.lease] = p.h.w.now + session
	timeline := p.h.pg.on.timeline
	if p.h.pg.state == Gone {
		timeline = 0 // it is asked for it
	}
	e.members[p.h.id] = member{p.lease, timeline}
}

func (p *patroni) act(s snapshot) {
	w, e, pg := p.h.w, &p.h.w.etcd, &p.h.pg
	p.keep()
	switch {
	case s.leader == p.h.name:
		if e.leader != p.h.name {
			p.lost()
			return
		}
		e.leaderLease = p.lease
		p.lead(s)
	case s.leader != "":
		if !s.paused || pg.state != Primary {
			p.lost()
		}
	case pg.state == Primary && !p.busy && s.target == "":
		if s.sync.listed(p.h.name) || !e.synchronous {
			p.acquire(s)
		} else if !s.paused {
			p.demote(false)
		}
	case pg.state == Gone && !p.busy:
		p.asReplica()
	case pg.state == Recovery && !p.busy && !s.paused && p.healthiest(s):
		p.after(w.between(0, 50*time.Millisecond), func() { p.acquire(s) })
	}
}

// acquire takes an absent leader key.
func (p *patroni) acquire(s snapshot) {
	e := &p.h.w.etcd
	if e.expire(); !e.reachable(p.h) || e.leader != "" {
		return
	}
	if _, ok := e.leases[p.lease]; !ok {
		return
	}
	p.h.w.logf(p.h, "Patroni takes the leader key")
	e.setLeader(p.h.name, p.lease)
	s.leader = p.h.name
	p.lead(s)
}

// lost is what a Patroni does that does not hold the leader key.
func (p *patroni) lost() {
	switch pg := &p.h.pg; {
	case p.busy:
	case pg.state == Primary:
		p.demote(false)
	case pg.state == Gone:
		p.asReplica()
	case pg.state == Recovery && pg.source() == nil && p.diverged() != nil:
		pg.stop() // to be rewound
	}
}

// lead is the part of the cycle of the holder of the leader key.
func (p *patroni) lead(s snapshot) {
	e, pg := &p.h.w.etcd, &p.h.pg
	if p.busy || (pg.alive && !pg.running()) {
		return
	}
	switch pg.state {
	case Primary:
		e.optime = pg.lsn
		if e.target == p.h.name {
			e.target = ""
		}
		p.keepSync(s)
	case Gone:
		if pg.primary && p.starts {
			pg.launch(true, p.h.w.between(300*time.Millisecond, 3*time.Second))
			return
		}
		p.asReplica()
	case Recovery:
		if p.h.w.now < p.shy {
			e.setLeader("", 0)
			return
		}
		if e.synchronous {
			if e.sync.Rev != s.sync.Rev {
				return // postponed: somebody else has changed it
			}
			e.setSync(p.h.name, nil)
		}
		pg.sync = nil
		p.busy = true
		p.ask(p.h.w.now + 10*time.Second)
	}
}

// ask is pre_promote: the daemon's answer decides.
func (p *patroni) ask(until time.Duration) {
	w, d, e := p.h.w, &p.h.pgha, &p.h.w.etcd
	switch {
	case !w.off.on(guardAdmission):
		p.step(atPromote, p.promote)
		return
	case e.reachable(p.h) && e.leader != p.h.name: // terminated
		p.busy = false
		return
	case !d.alive || w.now > until:
		p.busy, p.shy = false, w.now+session
		if e.reachable(p.h) && e.leader == p.h.name {
			w.logf(p.h, "pre_promote fails: Patroni gives the leader key back")
			e.setLeader("", 0)
		}
		return
	}
	p.asking++
	asked, asking := w.now, p.asking
	d.after(0, func() {
		ok, why := d.m.Admit(p.h.clock())
		if !ok {
			if w.tracing && why != p.why {
				p.why = why
				w.logf(p.h, "not admitted: %s", why)
			}
			d.loop()
			p.after(d.m.timers.Poll, func() {
				if asking == p.asking {
					p.ask(until)
				}
			})
			return
		}
		w.counts.admissions++
		p.h.permitted = p.h.pg.inc
		w.logf(p.h, "ADMITTED")
		if e.rec == nil || e.rec.Owner != p.h.name {
			w.fail("I4", "%s is admitted while the record does not name it", p.h.name)
		}
		d.step(atAdmit, func() {
			p.after(0, func() {
				if asking == p.asking && w.now-asked <= time.Second { // not too old to be used
					p.asking++
					p.step(atPromote, p.promote)
				}
			})
		})
	})
	// A daemon that hangs or dies never answers; the script asks again.
	p.after(1100*time.Millisecond, func() {
		if p.busy && asking == p.asking {
			p.ask(until)
		}
	})
}

func (p *patroni) promote() {
	w, e := p.h.w, &p.h.w.etcd
	if !w.off.on(guardAdmission) && (e.rec == nil || e.rec.Owner != p.h.name) {
		w.fail("I4", "%s promotes while the record does not name it", p.h.name)
	}
	// pg_ctl has been told: Patroni cannot take it back.
	took := w.between(2*time.Millisecond, 250*time.Millisecond)
	if w.chance(50_000) { // much to replay
		took = w.between(0, 8*time.Second)
	}
	p.h.pg.after(took, func() {
		p.h.pg.promote()
		p.busy = false
	})
	p.after(2*time.Second, func() { p.busy = false })
}

// demote stops a primary and starts it again as a replica.
func (p *patroni) demote(keepKey bool) {
	if p.busy {
		return
	}
	w := p.h.w
	w.logf(p.h, "Patroni demotes")
	p.busy = true
	p.after(w.between(20*time.Millisecond, 400*time.Millisecond), func() {
		p.h.pg.stop()
		p.busy = false
		if keepKey {
			p.h.pg.primary = false
		}
		p.after(w.between(100*time.Millisecond, 600*time.Millisecond), p.wake)
	})
}

// diverged is the running primary that this node cannot follow as it is, or nil.
func (p *patroni) diverged() *postgres {
	for _, o := range p.h.w.data {
		if o != p.h && o.pg.state == Primary && o.pg.running() && p.h.w.linked(p.h, o) && !p.h.pg.follows(&o.pg) {
			return &o.pg
		}
	}
	return nil
}

// asReplica starts PostgreSQL as a replica, rewound where it must be.
func (p *patroni) asReplica() {
	w, pg := p.h.w, &p.h.pg
	if pg.state != Gone || p.busy {
		return
	}
	took := w.between(200*time.Millisecond, 1500*time.Millisecond)
	if o := p.diverged(); o != nil && w.etcd.leader == o.h.name {
		w.logf(p.h, "rewound to %s", o.h.name)
		pg.on, pg.lsn = o.on, o.lsn
		took += w.between(0, 2*time.Second)
	}
	pg.launch(false, took)
}

// healthiest is Patroni's own check before it takes an absent leader key.
func (p *patroni) healthiest(s snapshot) bool {
	w, e := p.h.w, &p.h.w.etcd
	if w.now < p.shy || (s.target != "" && s.target != p.h.name) || (e.synchronous && !s.sync.listed(p.h.name)) {
		return false
	}
	for _, o := range w.data {
		if o == p.h || !w.linked(p.h, o) || !o.pat.running() {
			continue
		}
		if o.pg.state == Primary || (o.pg.state == Recovery && (!e.synchronous || s.sync.listed(o.name)) &&
			(o.pg.on.timeline > p.h.pg.on.timeline || (o.pg.on.timeline == p.h.pg.on.timeline && o.pg.lsn > p.h.pg.lsn))) {
			return false
		}
	}
	return true
}

// keepSync is the primary's care for the sync key.
func (p *patroni) keepSync(s snapshot) {
	w, e, pg := p.h.w, &p.h.w.etcd, &p.h.pg
	if !e.synchronous {
		return
	}
	// Whoever was listed in what this cycle has read is checked against it.
	cas := func(standbys []string, then func()) {
		p.step(atSync, func() {
			if e.expire(); !e.reachable(p.h) || e.sync.Rev != s.sync.Rev {
				return
			}
			e.setSync(p.h.name, standbys)
			p.step(atSync, then)
		})
	}
	clear := func() {
		pg.sync = nil
		pg.release()
	}
	var fit []string
	for _, o := range w.data {
		if o.pg.source() == pg {
			fit = append(fit, o.name)
		}
	}
	switch listed := s.sync.Standbys; {
	case s.sync.Leader != p.h.name:
		cas(nil, clear)
	case len(listed) > 0 && !slices.Contains(fit, listed[0]):
		cas(nil, clear)
	case len(listed) > 0:
	case len(pg.sync) > 0 && !slices.Contains(fit, pg.sync[0]):
		clear()
	case len(pg.sync) == 0 && len(fit) > 0:
		pg.sync, pg.syncAt = fit[:1:1], pg.lsn
	case len(pg.sync) > 0:
		for _, o := range w.data {
			if o.name == pg.sync[0] && o.pg.has(pg.on, pg.syncAt) {
				cas(pg.sync, func() {})
			}
		}
	}
}
