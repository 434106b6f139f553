package gate

import "time"

// Status is what a gate believes. What the kernel does must be read from the
// kernel.
type Status struct {
	Owner string `json:"owner"` // "" = none yet
	Epoch uint64 `json:"epoch"`
	State State  `json:"state"`
	// Promise is the owner's present one.
	Promise time.Duration `json:"promise"`
	// Leader is Patroni's leader key in the same view.
	Leader string `json:"leader"`
	// Self is true on the owner.
	Self bool `json:"self"`
	// Passes is what the kernel was asked for last, and Why what holds now.
	Passes Pass   `json:"passes"`
	Why    string `json:"why,omitempty"`
	// Held is for how long yet the owner's gate is open without another commit.
	Held time.Duration `json:"held,omitempty"`
	// Beat is how long the last beat's commit took, on the owner.
	Beat time.Duration `json:"beat,omitempty"`
	// Silent is for how long the record has not changed, as this node sees it.
	Silent time.Duration `json:"silent"`
	// Quorum says whether the last transaction went through, and Lost for how long
	// none has.
	Quorum bool          `json:"quorum"`
	Lost   time.Duration `json:"lost,omitempty"`
	// Agreed says, on an owner without a quorum, that all other members keep off,
	// and KeptOff, on another node, that it has promised to.
	Agreed  bool `json:"agreed,omitempty"`
	KeptOff bool `json:"kept_off,omitempty"`
	// Waits says why this node does not take over, or what it waits for.
	Waits string `json:"waits,omitempty"`
	// Error is the kernel's, if it could not be told.
	Error string `json:"error,omitempty"`
}

// Status returns what the gate believes now.
func (g *Gate) Status() Status {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.status(g.cfg.Clock.Now())
}

func (g *Gate) status(now Moment) Status {
	v := g.m.view
	s := Status{
		Owner: ownerOf(v), State: stateOf(v), Leader: v.Leader, Self: g.m.owner(), Passes: g.applied.Pass, Why: g.m.Want(now).Why,
		Silent: max(now.Sub(g.m.seenAt), 0), Quorum: g.m.quorum, Waits: g.why,
	}
	s.Agreed, s.KeptOff = g.m.Agreed(now), g.m.oath.Mono > now.Mono
	if !s.Quorum {
		s.Lost = max(now.Sub(g.m.lastDone), 0)
	}
	if v.Record != nil {
		s.Epoch, s.Promise = v.Record.Epoch, v.Record.Promise()
	}
	if s.Self {
		s.Held, s.Beat = max(g.m.lease.Sub(now), 0), g.beat
	}
	if g.failed != nil {
		s.Error = g.failed.Error()
	}
	return s
}

// publish tells whoever waits that something has changed. g.mu is held.
func (g *Gate) publish(now Moment) {
	close(g.change)
	g.change = make(chan struct{})
	if g.cfg.Changed != nil {
		g.cfg.Changed(g.status(now))
	}
}

// Failover is one change of owner, as the new owner has seen it.
type Failover struct {
	At    time.Time `json:"at"` // when the old owner was last heard of, by this node's clock
	From  string    `json:"from"`
	To    string    `json:"to"`
	Epoch uint64    `json:"epoch"`
	Kind  Kind      `json:"kind"` // takeover, or claim where Patroni decided
	// The phases, each from the end of the one before.
	Detect  time.Duration `json:"detect"`  // until a beat was overdue
	Fence   time.Duration `json:"fence"`   // until the old owner's gate was surely shut
	Admit   time.Duration `json:"admit"`   // until the ownership was committed
	Promote time.Duration `json:"promote"` // until PostgreSQL took writes
	Route   time.Duration `json:"route"`   // until the gate was open and the others knew
}

// Total is the time from the old owner's last sign to the open gate.
func (f Failover) Total() time.Duration { return f.Detect + f.Fence + f.Admit + f.Promote + f.Route }

// tracer follows a change of owner through its phases.
type tracer struct {
	self string
	done func(Failover)

	f                         Failover
	running                   bool
	seen, sent0, owned, ready Moment
}

// sent notes the transaction that would make this node the owner.
func (t *tracer) sent(op Op, m *Machine) {
	if op.Kind != Takeover && op.Kind != Claim {
		return
	}
	t.f = Failover{From: ownerOf(m.view), To: t.self, Epoch: op.Put.Epoch, Kind: op.Kind}
	t.seen, t.sent0 = m.seenAt, op.At
	t.f.At = time.Unix(0, t.seen.Wall)
	if stateOf(m.view) != Shut {
		t.f.Detect = min(m.timers.Beat, op.At.Sub(t.seen))
	}
	t.f.Fence = op.At.Sub(t.seen) - t.f.Detect
	if stateOf(m.view) == Shut { // it said so itself: nothing was waited for
		t.f.At, t.f.Fence = time.Unix(0, op.At.Wall), 0
		t.seen = op.At
	}
}

func (t *tracer) answered(a answer, m *Machine, now Moment) {
	switch {
	case a.res.Done && (a.op.Kind == Takeover || a.op.Kind == Claim):
		t.running, t.owned, t.ready = true, now, Moment{}
		t.f.Admit = now.Sub(t.sent0)
	case t.running && !m.owner():
		t.running = false
	case t.running && a.res.Done && a.op.Kind == Beat && a.op.Put.State == Open && t.ready != (Moment{}):
		t.running = false
		t.f.Route = now.Sub(t.ready)
		if t.done != nil {
			t.done(t.f)
		}
	}
}

func (t *tracer) local(l Local, m *Machine) {
	if t.running && t.ready == (Moment{}) && l.Process == Primary && m.owner() {
		t.ready = later(l.At, t.owned)
		t.f.Promote = t.ready.Sub(t.owned)
	}
}
