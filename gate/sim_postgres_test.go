package gate

import (
	"slices"
	"time"
)

// branch is a timeline: where it leaves the one before it, and how far its
// commits have been acknowledged to clients.
type branch struct {
	timeline int
	from     *branch
	start    uint64
	acked    uint64
}

// waiting is a commit that waits for the synchronous standby.
type waiting struct {
	on  *branch
	lsn uint64
}

// postgres is a host's PostgreSQL. Its process stands for all of its processes.
type postgres struct {
	proc
	state    Process // Gone, Starting, Recovery or Primary
	on       *branch
	lsn      uint64
	primary  bool     // its data directory is a primary's
	sync     []string // synchronous_standby_names
	syncAt   uint64   // its position when they were set
	waits    []waiting
	streamed time.Duration // on the host's clock
	hungAt   time.Duration
	restarts bool // Patroni restarts it on purpose
}

// has says whether the position lsn of b is in this data directory.
func (p *postgres) has(b *branch, lsn uint64) bool {
	end := p.lsn
	for x := p.on; x != nil; x = x.from {
		if x == b {
			return lsn <= end
		}
		end = min(end, x.start)
	}
	return false
}

func (p *postgres) set(s Process) {
	if p.state != s {
		p.h.w.logf(p.h, "PostgreSQL: %s", s)
	}
	p.state = s
	p.h.w.check()
}

// stop ends it at once; whatever it was doing is not acknowledged.
func (p *postgres) stop() {
	p.kill()
	p.waits = p.waits[:0]
	p.set(Gone)
	if d := &p.h.pgha; d.alive { // the death of a process is seen at once
		d.after(p.h.w.between(time.Millisecond, 20*time.Millisecond), func() { d.probe(true) })
	}
}

// launch starts it, as a replica or as the primary that it was.
func (p *postgres) launch(primary bool, took time.Duration) {
	p.start()
	p.set(Starting)
	p.after(took, func() {
		if primary {
			p.primary = true
			p.set(Primary)
			return
		}
		p.primary = false
		p.set(Recovery)
	})
}

// promote makes a primary of a replica, on a new timeline.
func (p *postgres) promote() {
	w := p.h.w
	if p.state != Recovery {
		return
	}
	w.counts.promotions++
	b := &branch{timeline: p.on.timeline + 1, from: p.on, start: p.lsn}
	w.branches = append(w.branches, b)
	p.on, p.primary = b, true
	w.checkCommits(p.h, "is promoted")
	p.set(Primary)
}

// source is the primary that this replica streams from, or nil.
func (p *postgres) source() *postgres {
	if p.state != Recovery || !p.running() {
		return nil
	}
	for _, o := range p.h.w.data {
		if o != p.h && o.pg.state == Primary && o.pg.running() && p.h.w.linked(p.h, o) && p.follows(&o.pg) {
			return &o.pg
		}
	}
	return nil
}

// follows says whether what this replica has is a part of what the primary o has.
func (p *postgres) follows(o *postgres) bool { return o.has(p.on, p.lsn) }

// stream takes over what its primary has.
func (p *postgres) stream() {
	if o := p.source(); o != nil {
		p.on, p.lsn = o.on, max(p.lsn, o.lsn)
		p.streamed = p.h.clock().Mono
		o.release()
	}
}

// release acknowledges the commits that need not wait any longer.
func (p *postgres) release() {
	if p.state != Primary || !p.running() {
		return
	}
	keep := p.waits[:0]
	for _, c := range p.waits {
		if p.synced(c) {
			p.ack(c)
		} else {
			keep = append(keep, c)
		}
	}
	p.waits = keep
}

func (p *postgres) synced(c waiting) bool {
	if len(p.sync) == 0 {
		return true
	}
	for _, o := range p.h.w.data {
		if slices.Contains(p.sync, o.name) && o.pg.has(c.on, c.lsn) && p.h.w.linked(p.h, o) && o.pg.running() && o.pg.state == Recovery {
			return true
		}
	}
	return false
}

// ack sends the answer to the client, which the fence may stop.
func (p *postgres) ack(c waiting) {
	w := p.h.w
	if !p.h.passes() && w.off.on(guardOutput) {
		w.counts.stopped++
		return
	}
	w.counts.acks++
	c.on.acked, w.newest = max(c.on.acked, c.lsn), c.on
	w.checkAck(p.h)
}

// client writes now and then. Its statement reaches PostgreSQL if the gate lets
// it, and takes its time.
func (h *host) client() {
	w := h.w
	w.after(w.between(80*time.Millisecond, 500*time.Millisecond), h.client)
	if !h.passes() || h.pg.state != Primary || !h.pg.running() {
		return
	}
	d := w.between(time.Millisecond, 20*time.Millisecond)
	if w.chance(150_000) {
		d = w.between(0, 6*time.Second)
	}
	p := &h.pg
	on := p.on
	p.after(d, func() {
		if p.state != Primary || p.on != on {
			return
		}
		p.lsn++
		c := waiting{p.on, p.lsn}
		for _, o := range w.data {
			if o != h && o.pg.source() == p {
				o.pg.after(w.between(time.Millisecond, 10*time.Millisecond), o.pg.stream)
			}
		}
		if len(p.sync) == 0 {
			p.ack(c)
			return
		}
		p.waits = append(p.waits, c)
	})
}
