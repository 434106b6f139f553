package gate

import "time"

// theme draws faults that belong together. Each is a situation for which a rule
// was made; when and for how long is left to chance.
func (w *world) theme() {
	t := w.t.Promise
	span := t + Margin(t)
	add := func(f fault) { w.faults = append(w.faults, &f) }
	begin := w.between(3*time.Second, 12*time.Second)
	// How an owner is lost, with and without its Patroni.
	lose := []what{stopPgha, killPgha, stopAll, powerOff, cutHost, cutEtcd, killPostgres, switchover, stopPatroni}[w.rng.IntN(9)]
	long := w.between(span, span+10*time.Second)
	lost := fault{kind: lose, host: -1, label: -1, at: begin, lasts: long}
	if lose == switchover {
		lost.host = -2
	}
	switch w.rng.IntN(9) {
	case 0: // whoever follows is stopped on the way
		add(lost)
		l := []label{atSendClaim, atSendTakeover, atSendRelease, atAdmit, atPromote, atSworn, atSync, atSendCreate}[w.rng.IntN(8)]
		stop := w.between(0, 3*time.Second)
		if w.chance(500_000) {
			stop = w.between(3*time.Second, 15*time.Second)
		}
		add(fault{kind: stopHere, host: -3, label: l, nth: 1 + w.rng.IntN(2), lasts: stop})
	case 1: // the owner is stopped between two actions until another has followed
		l := []label{atSendBeat, atAnswer, atWant, atKernel, atApplied, atProbe}[w.rng.IntN(6)]
		add(fault{kind: stopHere, host: -1, label: l, nth: 1 + w.rng.IntN(80), lasts: w.between(span, span+3*time.Second)})
		if w.chance(300_000) {
			add(fault{kind: stopPatroni, host: -1, label: -1, at: begin, lasts: 10 * time.Second})
		}
	case 2: // no quorum, and not all can be asked
		d := w.between(span, span+4*time.Second)
		add(fault{kind: loseQuorum, label: -1, at: begin, lasts: d})
		add(fault{kind: cutDirect, host: -1, label: -1, at: begin - w.between(0, time.Second), lasts: d + 2*time.Second})
		add(fault{kind: cutDirect, host: -1, label: -1, at: begin - w.between(0, time.Second), lasts: d + 2*time.Second})
	case 3: // the follower's transaction is lost or comes late, and its Patroni is another by then
		add(lost)
		l := []label{atSendClaim, atSendTakeover}[w.rng.IntN(2)]
		add(fault{kind: loseAnswer, host: -3, label: l, nth: 1})
		back := w.between(0, 300*time.Millisecond)
		if w.chance(400_000) {
			back = session + w.between(0, 2*time.Second)
		}
		add(fault{kind: killPatroni, host: -3, label: l, nth: 1, lasts: back})
	case 4: // the owner does not get to its beats, and the follower misses what goes on meanwhile
		blind := w.t.Attempt + 2*w.t.Beat
		back := span - w.t.Beat + w.between(0, 400*time.Millisecond)
		stop := blind * w.between(70, 95) / 100
		add(fault{kind: stall, host: -1, label: atSendBeat, nth: 8 + w.rng.IntN(12), lasts: span + 2*time.Second,
			chain: &fault{kind: stopAll, host: -2, at: back - stop, lasts: stop,
				chain: &fault{kind: cutDirect, host: -1, lasts: 10 * time.Second}}})
	case 5: // a longer promise than the timers say, and then the owner is lost
		f := fault{kind: []what{planned, profile}[w.rng.IntN(2)], host: -1, label: -1, at: begin, lasts: w.between(0, 2*time.Second)}
		lost.at += w.between(0, 6*time.Second)
		if w.chance(500_000) { // near its end
			f.promise = w.between(t, t+10*time.Second)
			lost.at = begin + f.promise - t + w.between(-500*time.Millisecond, time.Second)
		}
		add(f)
		add(lost)
	case 7: // a permission to promote is used long after it was given
		lost.lasts = w.between(span, span+3*time.Second)
		add(lost)
		w.etcd.synchronous = w.chance(300_000) // then the old owner is seldom fit
		stop := w.between(span, span+10*time.Second)
		add(fault{kind: stopHere, host: -3, label: atPromote, nth: 1, lasts: stop})
		add(fault{kind: []what{stopPgha, cutEtcd, cutHost, stall}[w.rng.IntN(4)], host: -3, label: atPromote, nth: 1, lasts: w.between(span, stop)})
	case 8: // an oath counts for longer than the record says, and is forgotten
		add(fault{kind: profile, label: -1, at: begin})
		add(fault{kind: cutEtcd, host: -1, label: -1, at: begin + w.between(0, 2*time.Second), lasts: w.between(span, span+10*time.Second)})
		forget := begin + w.between(t/2, 2*t)
		add(fault{kind: killPgha, host: -2, label: -1, at: forget, lasts: w.between(0, time.Second)})
		if w.chance(500_000) {
			add(fault{kind: stopPgha, host: -1, label: -1, at: forget + w.between(-500*time.Millisecond, 500*time.Millisecond), lasts: long})
		}
	case 6: // the follower's kernel does not obey
		add(lost)
		add(fault{kind: refuse, host: -2, label: -1, at: begin + w.between(0, span), lasts: w.between(span, 2*span)})
	}
}
