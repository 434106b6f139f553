package gate

import (
	"errors"
	"time"
)

// fence is what a host's kernel holds: one element with a timeout, and the
// guard. It does not know of the processes.
type fence struct {
	pass  Pass // "" = no element
	until time.Duration
	wall  int64
	reset bool
}

// passes says whether the kernel lets packets of clients through now.
func (h *host) passes() bool {
	k := &h.kern
	if !h.up || k.pass == "" {
		return false
	}
	now := h.clock()
	return h.timer() < k.until && (!h.w.off.on(guardPause) || now.Wall < k.wall)
}

// held is what a new daemon reads back: until when clients may pass.
func (h *host) held() Moment {
	if k, now := &h.kern, h.timer(); k.pass != "" && k.until > now {
		return h.clock().Add(k.until - now + Margin(k.until-now))
	}
	return Moment{}
}

// setFence does what w asks for. read is the clock when the timeout was
// computed, which may be long ago.
func (h *host) setFence(w Want, read time.Duration) error {
	refused := h.w.now < h.broken
	if refused && h.w.chance(500_000) {
		return errors.New("refused")
	}
	var err error
	if refused {
		err = errors.New("no answer")
	}
	if w.Pass == Nobody {
		h.kern = fence{reset: w.Reset}
		h.w.check()
		return err
	}
	left := (w.Until.Mono - read).Truncate(time.Millisecond)
	if left < 10*time.Millisecond {
		h.kern = fence{reset: h.kern.reset}
		return errors.New("the promise has run out")
	}
	h.kern = fence{pass: w.Pass, until: h.timer() + left, wall: w.Until.Wall}
	h.w.check()
	return err
}

// check holds what must be so at each moment. What can break it begins with an
// event: a write to a kernel, a PostgreSQL that becomes writable, a process or
// a clock that changes. Between events gates only shut.
func (w *world) check() {
	var first *host
	for _, h := range w.data {
		writable := h.pg.state == Primary && h.pg.running() && h.passes()
		if writable && h.kern.pass != AsOwner {
			w.fail("I6", "the replica's element lets clients reach the writable PostgreSQL of %s", h.name)
		}
		if writable && first != nil {
			w.fail("I1", "clients reach a writable PostgreSQL on %s and on %s", first.name, h.name)
		}
		if writable {
			first = h
			if !h.open {
				w.opener = h
				w.logf(h, "OPEN: clients reach the primary")
			}
		}
		h.open = writable
	}
}

// checkAck holds that an answer to a write comes from the last one to open.
func (w *world) checkAck(h *host) {
	if w.opener != nil && w.opener != h {
		w.fail("I1", "%s acknowledges a write after %s has begun to take writes", h.name, w.opener.name)
	}
}

// checkCommits holds, with synchronous replication, that h has every commit
// that a client was told of.
func (w *world) checkCommits(h *host, what string) {
	if !w.etcd.synchronous {
		return
	}
	for _, b := range w.branches {
		if b.acked > b.start && !h.pg.has(b, b.acked) {
			w.fail("I3", "%s %s and lacks acknowledged commits: %d on timeline %d (it has %d on %d)",
				h.name, what, b.acked, b.timeline, h.pg.lsn, h.pg.on.timeline)
		}
	}
}

// checkLiving holds that an owner that is well is not taken over from.
func (w *world) checkLiving(by *host) {
	e := &w.etcd
	var old *host
	for _, h := range w.data {
		if h.name == e.rec.Owner {
			old = h
		}
	}
	if e.rec.State == Shut || e.leader != old.name || old.sick > 0 || !old.pgha.running() || old.pg.state != Primary || !old.pg.running() {
		return
	}
	// It has had time for a beat, or nothing but the quorum was ever missing.
	beat := w.t.Settle*103/100 + 50*time.Millisecond
	whole := e.rec.Promise() + 2*Margin(e.rec.Promise()) + 2*time.Second
	well := w.now - max(old.trouble, w.troubleFlaky)
	if well > beat && w.now-w.troubleQuorum > beat {
		w.fail("I2", "%s takes over from %s, which has been well for %s", by.name, old.name, well)
	}
	if well > whole {
		w.fail("I2", "%s takes over from %s, which only missed a quorum", by.name, old.name)
	}
}
