package gate

import (
	"fmt"
	"math"
	"time"
)

// Pass is whom the kernel lets through to this node's PostgreSQL.
type Pass string

// What the kernel is asked for.
const (
	// Keep leaves the kernel as it is: a new daemon does not yet know.
	Keep Pass = "keep"
	// Nobody shuts the gate.
	Nobody Pass = "nobody"
	// AsOwner lets clients write.
	AsOwner Pass = "owner"
	// AsReplica lets clients read a PostgreSQL that is proved to be in recovery.
	AsReplica Pass = "replica"
)

// Want is what the kernel should do now.
type Want struct {
	Pass  Pass
	Until Moment // for AsOwner and AsReplica; the kernel shuts by itself then
	// Reset answers with resets instead of silence: another node is known to be
	// the owner, so that no session here can ever go on.
	Reset bool
	Why   string

	from Moment // when it was decided
}

// Machine is the gate of one node: it decides, and does nothing itself. Its
// driver feeds it with what happens and carries out what it asks for; the
// simulation is another such driver. It is not safe for concurrent use.
//
// The driver's part: Local for news of PostgreSQL; then Want, which is carried
// out and reported with Applied; then Next, whose Op is sent and whose answer is
// given to Done; and again. Between Next and Done the other calls are allowed.
type Machine struct {
	self   string
	timers Timers
	off    guards

	view   View
	viewed bool
	seenAt Moment // when the record was first seen at its present revision

	quorumSince Moment
	quorum      bool
	lastDone    Moment // when the last transaction that went through was sent

	local  Local
	hungAt Moment

	// As owner.
	lease       Moment // until when the gate may be open by the last commit
	beatAt      Moment // when the last beat was sent
	extend      time.Duration
	ownedAt     Moment // when this ownership began
	wasPrimary  bool   // PostgreSQL was seen writable under it
	wasOwner    bool   // this daemon was owner of the record before the present one
	gaveUp      Moment // when a promotion failed here
	outstanding Moment // the kernel may pass clients until then
	kernelShut  bool   // the kernel is known to be shut
	admitted    Moment // when a promotion was allowed that may still be to come

	oath  Moment // until when this node has promised to keep off
	sworn Moment // until when all others have promised this owner to

	banned string // why this node may not serve anybody; see Ban
}

// NewMachine returns the gate of the node self. kernel is until when the kernel
// may let clients through by what an earlier daemon told it, with a [Margin] for
// the kernel's clock, or the zero Moment if it is shut.
func NewMachine(self string, t Timers, kernel Moment) *Machine {
	return &Machine{self: self, timers: t, outstanding: kernel}
}

// SetTimers changes the timers. Promises given before stay good.
func (m *Machine) SetTimers(t Timers) { m.timers = t }

// Local takes news of this node's PostgreSQL and Patroni.
func (m *Machine) Local(l Local) {
	if l.Process == Hung && m.local.Process != Hung {
		m.hungAt = l.At
	}
	if m.owner() {
		switch {
		case l.Process == Primary:
			m.wasPrimary = true
		case l.Process == Recovery && (m.wasPrimary || m.local.Process == Gone || m.local.Process == Starting):
			// Demoted or started anew; it may be promoted again.
			m.wasPrimary, m.ownedAt = false, l.At
		case l.Process == Recovery && l.Replayed > m.local.Replayed:
			m.ownedAt = l.At // what it has received comes first
		}
	}
	// A promotion that was allowed is over when it has been seen, and comes to
	// nothing without a PostgreSQL. It does not end with the Patroni that began it.
	if l.At.Mono > m.admitted.Mono && (l.Process == Primary || l.Process == Gone) {
		m.admitted = Moment{}
	}
	m.local = l
}

// owner says whether the last view names this node.
func (m *Machine) owner() bool {
	return m.viewed && m.view.Record != nil && m.view.Record.Owner == m.self
}

func (m *Machine) observe(now Moment) observation {
	since := func(t Moment) time.Duration { return max(now.Sub(t), 0) }
	o := observation{
		self: m.self, now: now, view: m.view, t: m.timers, local: m.local, localAge: now.Sub(m.local.At),
		silent: since(m.seenAt), sinceBeat: since(m.beatAt), kernel: m.kernelShut,
		oath: max(m.oath.Sub(now), 0), admitted: m.admitted != (Moment{}) && m.off.on(guardPermit),
	}
	if !m.off.on(guardOath) {
		o.oath = 0
	}
	if m.quorum && !m.slept(now) {
		o.quorum = since(m.quorumSince)
	}
	if m.gaveUp != (Moment{}) {
		o.cooldown = max(10*m.timers.Help-since(m.gaveUp), 0)
	}
	if m.local.Process == Hung {
		o.hung = since(m.hungAt)
	}
	if m.owner() {
		if !m.wasPrimary {
			o.stalled = since(m.ownedAt)
		}
		o.wantOpen = m.extend > 0 || (m.view.Record.State != Open && m.local.Process == Primary)
	}
	return o
}

// Want says what the kernel should do now.
func (m *Machine) Want(now Moment) Want {
	w := m.want(now)
	w.from = now
	return w
}

func (m *Machine) want(now Moment) Want {
	if m.banned != "" {
		return Want{Pass: Nobody, Reset: true, Why: m.banned}
	}
	if !m.viewed {
		return Want{Pass: Keep, Why: "etcd has not been read yet"}
	}
	o := m.observe(now)
	if m.owner() {
		return m.wantAsOwner(o)
	}
	if o.admitted {
		return Want{Pass: Nobody, Why: "PostgreSQL may be promoted by a permission given before"}
	}
	if m.local.Process == Recovery {
		// Whoever is proved to be a replica now is one until pre_promote has asked.
		if until := m.local.At.Add(m.timers.Promise); until.Mono > now.Mono {
			return Want{Pass: AsReplica, Until: until, Why: "PostgreSQL is in recovery"}
		}
	}
	w := Want{Pass: Nobody, Why: "this node is not the owner"}
	w.Reset = m.view.Record != nil && m.wasOwner && m.local.Process != Recovery
	return w
}

func (m *Machine) wantAsOwner(o observation) Want {
	if why := surrender(o); why != "" {
		return Want{Pass: Nobody, Why: why}
	}
	switch {
	case m.local.Process == Recovery || (m.local.Process == Gone && m.local.Restarting):
		return Want{Pass: Nobody, Why: "PostgreSQL does not take writes yet"}
	case m.lease.Mono <= o.now.Mono:
		// Whatever is in the kernel runs out by itself, at a time that counts as
		// promised.
		return Want{Pass: Keep, Why: "no commit within the promise"}
	case m.view.Record.State != Open:
		return Want{Pass: Nobody, Why: "the record does not say yet that it opens"}
	case m.local.Process == Primary || m.wasPrimary:
		return Want{Pass: AsOwner, Until: m.lease, Why: "owner"}
	}
	return Want{Pass: Keep, Why: "PostgreSQL is " + string(m.local.Process)}
}

// Applied reports that the kernel does what w asked for. It must not be called
// unless the kernel has confirmed it.
func (m *Machine) Applied(w Want) {
	if m.kernelShut = w.Pass == Nobody; m.kernelShut {
		m.outstanding = Moment{}
	}
}

// Applying must be called before w is carried out: from then on the kernel may
// pass clients, whether it answers or not.
func (m *Machine) Applying(w Want) {
	m.kernelShut = false
	if w.Pass == AsOwner || w.Pass == AsReplica {
		// The kernel counts with a clock that may run slower than this one.
		m.outstanding = later(m.outstanding, w.Until.Add(Margin(w.Until.Sub(w.from))))
	}
}

// Admit says whether PostgreSQL here may be promoted now. Patroni asks before
// each promotion, whoever decided on it.
func (m *Machine) Admit(now Moment) (bool, string) {
	switch {
	case m.banned != "":
		return false, m.banned
	case !m.viewed:
		return false, "etcd has not been read yet"
	case !m.owner():
		_, why := decideClaim(m.observe(now), m.off)
		return false, why
	case m.lease.Mono <= now.Mono:
		return false, "no commit within the promise"
	case surrender(m.observe(now)) != "":
		return false, surrender(m.observe(now))
	case !m.kernelShut && !m.wasPrimary && m.off.on(guardShutFirst):
		return false, "the gate of the replica is not yet shut"
	}
	m.admitted = now
	return true, "this node is the owner"
}

// Permitted says that an earlier daemon has let the PostgreSQL that runs here be
// promoted, and that this has not been seen to happen.
func (m *Machine) Permitted(now Moment) { m.admitted = now }

// Next returns the transaction to send now, with Kind None if there is none. The
// clock must be read right before.
func (m *Machine) Next(now Moment) (Op, string) {
	op, why := m.next(now)
	if op.Kind != None {
		op.At = now
		switch op.Kind {
		case Beat:
			m.beatAt = now
		case Release:
			// From now on the record may say that the gate is shut, whether an
			// answer comes or not. Only another commit can open it again.
			m.lease = Moment{}
		}
	}
	return op, why
}

func (m *Machine) next(now Moment) (Op, string) {
	read := Op{Kind: Read}
	if m.banned != "" {
		return read, m.banned
	}
	if !m.viewed || (!m.quorum && !m.owner()) {
		return read, "etcd does not answer"
	}
	o := m.observe(now)
	if m.owner() {
		kind, why := decideOwner(o)
		switch kind {
		case Beat:
			return m.write(Beat, now, m.beatState()), why
		case Release:
			return m.write(Release, now, Shut), why
		}
		if why != "" || now.Sub(m.lastDone) >= m.timers.Beat {
			return read, why
		}
		return Op{}, ""
	}
	if ok, why := decideCreate(o); ok {
		return m.write(Create, now, Promoting), why
	}
	ok, why := decideClaim(o, m.off)
	kind := Claim
	if !ok && m.view.Leader != m.self {
		ok, why = decideTakeover(o, m.off)
		kind = Takeover
	}
	if !ok {
		return read, why
	}
	return m.write(kind, now, Promoting), why
}

func (m *Machine) beatState() State {
	switch {
	case m.local.Process == Primary || (m.wasPrimary && m.local.Process != Recovery):
		return Open
	case m.view.Record.State == Shut:
		return Promoting // a beat makes it possible to open again
	}
	return m.view.Record.State
}

// write makes the operation that puts a new record.
func (m *Machine) write(kind Kind, now Moment, state State) Op {
	op := Op{Kind: kind}
	v := m.view
	if m.off.on(guardRecord) {
		op.Record = &v.RecordRev
	}
	if m.off.on(guardLeader) && kind != Release {
		op.Leader = &v.Leader
	}
	var old Record
	if v.Record != nil {
		old = *v.Record
	}
	op.Put = Record{Owner: m.self, Epoch: old.Epoch, Seq: old.Seq + 1, State: state, Last: old.Last}
	if state == Open {
		op.Put.Last = m.self
	}
	promise := m.timers.Promise
	switch kind {
	case Beat:
		promise = max(promise, m.extend)
		// What the kernel is given is not what is promised to cover it, or each would
		// make the other longer for ever.
		op.hold = promise
		// The kernel may still have more time by an earlier, longer promise, and
		// nobody knows whether the next update will reach it.
		if m.off.on(guardOutstanding) {
			promise = max(promise, m.outstanding.Sub(now))
		}
	case Takeover, Claim, Create:
		op.Put.Epoch++
		if kind == Takeover {
			op.TakeLeader = v.Lease
			op.Config = &v.ConfigRev
			if m.off.on(guardLease) {
				op.Lease = &v.Lease
			}
			if v.Synchronous && m.off.on(guardSync) {
				op.Sync = &v.Sync.Rev
			}
		}
	}
	op.Put.PromiseMS = int64(math.Ceil(float64(promise) / float64(time.Millisecond)))
	return op
}

// Done takes the answer to op. now is the clock after it came. With an error it
// is unknown whether op was carried out.
func (m *Machine) Done(op Op, r Result, err error, now Moment) {
	if err != nil {
		m.quorum = false
		return
	}
	if !m.quorum || m.slept(op.At) {
		m.quorum, m.quorumSince = true, now
	}
	m.lastDone = op.At
	if !m.viewed || r.View.RecordRev != m.view.RecordRev {
		m.seenAt = now
	}
	before, leader := m.owner(), m.view.Leader
	m.view, m.viewed = r.View, true
	if !m.owner() {
		m.wasOwner = m.wasOwner || before
		m.lease = Moment{}
		return
	}
	if !before {
		m.ownedAt, m.wasPrimary, m.lease = now, m.local.Process == Primary, Moment{}
	} else if leader != m.self && m.view.Leader == m.self && !m.wasPrimary {
		m.ownedAt = now // Patroni has the key again, and another try
	}
	if r.Done && op.Kind != Read && op.Kind != Release {
		from := op.At
		if !m.off.on(guardSend) {
			from = now
		}
		m.lease = from.Add(op.Put.Promise())
		if op.hold > 0 {
			m.lease = from.Add(op.hold)
		}
		if op.Kind == Beat && op.Put.Promise() >= m.extend {
			m.extend = 0
		}
	}
	if op.Kind == Beat && !r.Done {
		// Most likely a beat of its own, whose answer was lost, has come through
		// after all. Others may be about to conclude that this node is gone.
		m.beatAt = Moment{}
	}
	if m.view.Record.State == Shut {
		m.lease = Moment{}
	}
}

// slept says whether this node had been stopped itself at the moment at: it has
// not been watching then.
func (m *Machine) slept(at Moment) bool {
	return at.Sub(m.lastDone) > m.timers.Attempt+2*m.timers.Beat
}

// Extend asks for one promise of d, for a planned restart. Extended says when it
// is given.
func (m *Machine) Extend(d time.Duration) { m.extend = d }

// Extending says whether that promise is still to be committed.
func (m *Machine) Extending() bool { return m.extend > 0 }

// Asking says whether the owner should now ask the others to keep off, because
// its beats fail while its gate is still open, and for how long.
func (m *Machine) Asking(now Moment) (time.Duration, bool) {
	// The gate of an owner that knows it has lost is never held open.
	ok := m.banned == "" && m.owner() && !m.quorum && m.wasPrimary && m.lease.Mono > now.Mono && m.view.Record.State == Open
	if !ok {
		return 0, false
	}
	// Not for longer than the record says: a member that is started anew forgets
	// that it was asked, and waits for that.
	return min(m.timers.Promise, m.view.Record.Promise()), true
}

// agreeFor is for how long a member that has a quorum itself agrees to an owner
// that has none: its own etcd is stuck, and will not come back by waiting.
const agreeFor = 30 * time.Second

// Swear is the other side: owner asks this node not to become owner for d. An
// error says that it will not promise.
//
// It makes no difference that a transaction of this node's own may be under way,
// or may have been lost on the way back. It was sent when the gate that it
// replaces was surely shut. Such a gate opens again with a commit alone, of a
// newer record, and then that transaction fails; until then an agreement holds
// nothing open, see Sworn.
func (m *Machine) Swear(owner string, epoch uint64, d time.Duration, now Moment) error {
	r := m.view.Record
	switch {
	case m.viewed && r != nil && (r.Owner != owner || r.Epoch != epoch):
		return fmt.Errorf("the gate is owned by %s since epoch %d", r.Owner, r.Epoch)
	case m.quorum && !m.slept(now) && min(now.Sub(m.quorumSince), now.Sub(m.seenAt)) >= agreeFor:
		return fmt.Errorf("this node has a quorum, and %s has not committed for %s", owner, now.Sub(m.seenAt).Round(time.Second))
	case d > time.Minute:
		return fmt.Errorf("%s is longer than any promise", d)
	}
	m.oath = later(m.oath, now.Add(d+Margin(d)))
	return nil
}

// Sworn takes the agreement of all others to a question sent at the moment at.
func (m *Machine) Sworn(at Moment, d time.Duration, now Moment) {
	// It holds an open gate open; it never opens one that has shut.
	if m.owner() && m.lease.Mono > now.Mono {
		m.sworn = at.Add(d)
		m.lease = later(m.lease, m.sworn)
	}
}

// Agreed says whether the gate is held open by the agreement of all others.
func (m *Machine) Agreed(now Moment) bool {
	return m.owner() && !m.quorum && min(m.sworn.Mono, m.lease.Mono) > now.Mono
}

// Ban shuts the gate for as long as this daemon lives: this node must not serve
// anybody, whatever etcd says. The kernel shuts at the next Want, and nothing is
// written to etcd any more.
func (m *Machine) Ban(why string) { m.banned = why }

// GiveUp makes this node leave promotions to others for a while.
func (m *Machine) GiveUp(now Moment) {
	if m.gaveUp == (Moment{}) || now.Sub(m.gaveUp) >= 10*m.timers.Help {
		m.gaveUp = now
	}
}

func later(a, b Moment) Moment {
	if a.Mono > b.Mono {
		return a
	}
	return b
}
