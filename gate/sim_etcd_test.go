package gate

import (
	"errors"
	"slices"
	"time"
)

var errNoAnswer = errors.New("no answer")

// member is what a Patroni tells of itself, on its session.
type member struct {
	lease    int64
	timeline int
}

// etcd is a linearizable store with revisions, sessions and a leader. Each of
// its members lives in one host's pgha.
type etcd struct {
	w    *world
	rev  int64
	rec  *Record
	rrev int64

	leader      string // Patroni's leader key
	leaderLease int64
	members     [3]member
	sync        Sync
	synchronous bool
	paused      bool
	configRev   int64
	optime      uint64
	target      string

	nextLease int64
	leases    map[int64]time.Duration // until when

	head     int // host of etcd's own leader; -1 = none
	electing bool
	lost     time.Duration // no quorum until then
}

// lateMost is how late a transaction without an answer may be carried out. It
// is below unsureFor by more than clocks can differ.
const lateMost = 28 * time.Second

// session is how long Patroni's session lives.
const session = 10 * time.Second

// part says whether a host's member of etcd takes part.
func (e *etcd) part(h *host) bool { return h.up && h.net && h.pgha.running() }

// reachable says whether transactions from h go through now.
func (e *etcd) reachable(h *host) bool {
	e.elect()
	return e.head >= 0 && e.part(h)
}

// elect notices that etcd's leader is gone.
func (e *etcd) elect() {
	if e.head >= 0 && e.w.now >= e.lost && e.part(e.w.hosts[e.head]) && e.quorum() {
		return
	}
	if e.head >= 0 {
		e.w.logf(nil, "etcd has no leader")
	}
	e.head = -1
	e.w.troubleQuorum = e.w.now
	if e.electing {
		return
	}
	e.electing = true
	e.w.at(max(e.lost, e.w.now)+e.w.between(300*time.Millisecond, 2500*time.Millisecond), e.vote)
}

func (e *etcd) quorum() bool {
	n := 0
	for _, h := range e.w.hosts {
		if e.part(h) {
			n++
		}
	}
	return n > len(e.w.hosts)/2
}

func (e *etcd) vote() {
	if e.w.troubleQuorum = e.w.now; e.w.now < e.lost || !e.quorum() {
		e.w.after(e.w.between(100*time.Millisecond, 800*time.Millisecond), e.vote)
		return
	}
	e.electing = false
	for e.head < 0 {
		if h := e.w.hosts[e.w.rng.IntN(len(e.w.hosts))]; e.part(h) {
			e.head = h.id
		}
	}
	for id := range e.leases { // each is independent of the others
		e.leases[id] = e.w.now + session
	}
	e.w.logf(nil, "etcd's leader is on %s", e.w.hosts[e.head].name)
}

// expire ends the sessions that are over. Without a leader none ends.
func (e *etcd) expire() {
	if e.head < 0 {
		return
	}
	for id, until := range e.leases {
		if e.w.now < until {
			continue
		}
		delete(e.leases, id)
		if e.leaderLease == id && e.leader != "" {
			e.w.logf(nil, "the leader key of %s expires", e.leader)
			e.setLeader("", 0)
		}
		for i := range e.members {
			if e.members[i].lease == id {
				e.members[i] = member{}
			}
		}
	}
}

func (e *etcd) grant() int64 {
	e.nextLease++
	e.leases[e.nextLease] = e.w.now + session
	return e.nextLease
}

func (e *etcd) setLeader(name string, lease int64) {
	changed := e.leader != name
	e.leader, e.leaderLease = name, lease
	e.rev++
	if !changed {
		return
	}
	for _, h := range e.w.data { // watches
		if h.pat.alive {
			h.pat.after(e.w.between(5*time.Millisecond, 150*time.Millisecond), h.pat.wake)
		}
		if h.pgha.alive {
			h.pgha.after(e.w.between(time.Millisecond, 20*time.Millisecond), h.pgha.loop)
		}
	}
}

func (e *etcd) setSync(leader string, standbys []string) {
	e.rev++
	e.sync = Sync{Leader: leader, Standbys: standbys, Rev: e.rev}
	e.w.logf(nil, "sync key: %s %v", leader, standbys)
}

func (e *etcd) view(h *host) View {
	v := View{Record: e.rec, RecordRev: e.rrev, Leader: e.leader, Sync: e.sync, Synchronous: e.synchronous,
		Paused: e.paused, ConfigRev: e.configRev, MaxLag: 3, Optime: e.optime, Target: e.target}
	if h.data {
		v.Lease = e.members[h.id].lease
	}
	for _, o := range e.w.data {
		if e.rec != nil && o.name == e.rec.Owner {
			v.Timeline = e.members[o.id].timeline
		} else if e.members[o.id].lease != 0 && o.pg.state == Recovery {
			v.Successor = true
		}
	}
	return v
}

// send carries op out at some time before the answer, or much later, or never.
func (e *etcd) send(h *host, op Op, answer func(Result, error)) {
	w := e.w
	there, back := w.between(300*time.Microsecond, 5*time.Millisecond), w.between(300*time.Microsecond, 5*time.Millisecond)
	lost := w.chance(300)
	if w.now < w.flaky {
		there, back = w.between(0, 350*time.Millisecond), w.between(0, 350*time.Millisecond)
		lost = w.chance(150_000)
	}
	if lost = lost || h.pgha.loses; lost {
		h.pgha.loses = false
		h.trouble = max(h.trouble, w.now+h.w.t.Attempt)
	}
	fate := 0 // carried out in time
	if lost {
		fate = w.rng.IntN(3) // or late, or never
	}
	w.after(there, func() {
		if fate == 0 && e.reachable(h) {
			r, err := e.apply(h, op)
			w.after(back, func() {
				if !lost && e.reachable(h) {
					answer(r, err)
				}
			})
			return
		}
		if op.Kind == Read || fate == 2 || (fate == 0 && w.chance(400_000)) {
			return
		}
		late := w.between(0, 2*time.Second)
		if w.chance(500_000) {
			late = w.between(0, lateMost-there)
		}
		w.after(late, func() {
			if e.elect(); e.head >= 0 {
				w.logf(h, "a late transaction arrives")
				_, _ = e.apply(h, op)
			}
		})
	})
}

func (e *etcd) apply(h *host, op Op) (Result, error) {
	e.expire()
	var lease int64
	if h.data {
		lease = e.members[h.id].lease
	}
	ok := op.Kind != Read &&
		(op.Record == nil || *op.Record == e.rrev) && (op.Leader == nil || *op.Leader == e.leader) &&
		(op.Lease == nil || *op.Lease == lease) && (op.Sync == nil || *op.Sync == e.sync.Rev) &&
		(op.Config == nil || *op.Config == e.configRev)
	dull := op.Kind == Beat && ok && e.rec.State == op.Put.State && e.rec.PromiseMS == op.Put.PromiseMS
	if op.Kind != Read && !dull && e.w.tracing {
		e.w.logf(h, "etcd: %s done=%t %s leader=%q", op.Kind, ok, op.Put.Encode(), e.leader)
	}
	if ok {
		if _, found := e.leases[op.TakeLeader]; op.TakeLeader != 0 && !found {
			return Result{}, errors.New("requested lease not found")
		}
		e.checkWrite(h, op)
		put := op.Put
		e.rev++
		e.rec, e.rrev = &put, e.rev
		if op.TakeLeader != 0 {
			e.setLeader(h.name, op.TakeLeader)
		}
	}
	return Result{Done: ok, View: e.view(h)}, nil
}

// checkWrite holds what must be so at each write of the record.
func (e *etcd) checkWrite(h *host, op Op) {
	w := e.w
	switch op.Kind {
	case Takeover:
		w.counts.takeovers++
	case Claim:
		w.counts.claims++
	case Create:
		w.counts.creates++
	case Release:
		w.counts.releases++
		if h.passes() {
			w.fail("I1", "%s says that its gate is shut, and it is open", h.name)
		}
	}
	if e.rec == nil || e.rec.Owner == op.Put.Owner {
		return
	}
	for _, o := range w.data {
		if o != h && o.kern.pass == AsOwner && o.passes() {
			w.fail("I1", "%s becomes the owner while clients still pass to %s", h.name, o.name)
		}
	}
	if op.TakeLeader != 0 {
		if e.leader != "" && e.leader != e.rec.Owner && e.leader != h.name {
			w.fail("I4", "%s takes the leader key from %s, which is not the owner %s", h.name, e.leader, e.rec.Owner)
		}
		if op.TakeLeader != e.members[h.id].lease {
			w.fail("I4", "%s takes the leader key on a session that is not its Patroni's", h.name)
		}
	} else if e.leader != h.name {
		w.fail("I4", "%s becomes the owner while the leader key names %q", h.name, e.leader)
	}
	if op.Kind == Takeover {
		w.checkLiving(h)
	}
	if op.Kind == Takeover || h.pg.state == Primary {
		w.checkCommits(h, "becomes the owner")
	}
	// Nothing of what the last to be open has acknowledged may be given up for a
	// primary that nobody has chosen.
	if b := w.newest; b != nil && h.pg.state == Primary && !h.pg.has(b, b.acked) {
		w.fail("I3", "%s becomes the owner as a primary and lacks what was acknowledged last", h.name)
	}
}

// listed says whether sync lets name be promoted.
func (s Sync) listed(name string) bool {
	return s.Leader == "" || s.Leader == name || slices.Contains(s.Standbys, name)
}
