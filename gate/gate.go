package gate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"
)

// Store carries out transactions on etcd. Do must be linearizable, must send op
// once, and must return a View in both outcomes of the conditions.
type Store interface {
	Do(ctx context.Context, op Op) (Result, error)
}

// Kernel is the fence. Its methods return only after the kernel has confirmed;
// after an error it is unknown what the kernel does.
type Kernel interface {
	// Open lets clients through until the moment at the latest, in place of
	// whatever it did before.
	Open(ctx context.Context, as Pass, until Moment) error
	// Shut lets nobody through.
	Shut(ctx context.Context) error
	// Reset says whether clients are answered with resets while it is shut.
	Reset(ctx context.Context, on bool) error
}

// Peers asks all other members of the cluster to keep off for d. It returns nil
// only if every one of them has agreed, and knows the same members.
type Peers interface {
	KeepOff(ctx context.Context, epoch uint64, d time.Duration) error
}

// Actor helps a Patroni that does not do its part.
type Actor interface {
	// RestartPatroni kills Patroni and starts it again; PostgreSQL goes on.
	RestartPatroni(why string)
	// StopPostgres ends a PostgreSQL that should long have been demoted, be it that
	// it hangs.
	StopPostgres(why string)
}

// Config makes a Gate.
type Config struct {
	Self   string
	Timers Timers
	Store  Store
	Kernel Kernel
	Peers  Peers
	Actor  Actor
	Clock  Clock
	// Held is until when the kernel may let clients through by what an earlier
	// daemon told it; the zero Moment if it is shut.
	Held Moment
	// Permit, if not nil, is called before PostgreSQL is let be promoted. It must
	// note this so that it outlives the daemon, for as long as the same postmaster
	// runs: a daemon that starts then has Permitted set. Without it a promotion
	// that comes late could find the replica's gate of a new daemon open.
	Permit    func() error
	Permitted bool
	// Changed is called, from the gate's own goroutine, when the owner, the
	// record's state or what the kernel is asked for has changed. It must not
	// block.
	Changed func(Status)
	// Failover is called once a change of owner to this node is complete.
	Failover func(Failover)
	Log      *slog.Logger
}

// Gate drives a Machine.
type Gate struct {
	cfg  Config
	log  *slog.Logger
	kick chan struct{}

	mu      sync.Mutex
	m       *Machine
	applied Want   // what the kernel has confirmed
	sure    bool   // applied is still so, as far as is known
	why     string // of what is not done
	told    string // the last write that was logged
	beat    time.Duration
	helped  int
	foreign Moment // since when another node has been the owner
	failed  error  // the kernel's last error
	change  chan struct{}
	trace   tracer
}

// New makes a Gate. It does nothing before Run.
func New(c Config) *Gate {
	if c.Clock == nil {
		c.Clock = SystemClock{}
	}
	m := NewMachine(c.Self, c.Timers, c.Held)
	if c.Permitted {
		m.Permitted(c.Clock.Now())
	}
	return &Gate{
		cfg: c, log: c.Log.With("component", "gate"), kick: make(chan struct{}, 1),
		m: m, change: make(chan struct{}),
		trace: tracer{self: c.Self, done: c.Failover},
	}
}

type answer struct {
	op  Op
	res Result
	err error
}

// Run drives the gate until ctx ends. It leaves the kernel as it is: an owner's
// gate then shuts by itself when its promise has run out.
func (g *Gate) Run(ctx context.Context) error {
	answers, sworn := make(chan answer, 1), make(chan bool, 1)
	busy, asking := false, false
	t := time.NewTimer(0)
	defer t.Stop()
	var next time.Duration // on the clock: when the next transaction may go out
	for {
		g.settle(ctx)
		now := g.cfg.Clock.Now()
		if !busy && now.Mono >= next {
			if op := g.next(); op.Kind != None {
				busy = true
				go func() { answers <- g.do(ctx, op) }()
			}
			next = now.Mono + g.timers().Poll
		}
		if !asking {
			asking = g.ask(ctx, sworn)
		}
		g.help(now)
		wait := g.timers().Poll
		if !busy {
			wait = max(min(next-now.Mono, wait), time.Millisecond)
		}
		t.Reset(wait)
		select {
		case <-ctx.Done():
			return nil
		case a := <-answers:
			busy = false
			if g.done(a) {
				next = 0 // something has changed: go on at once
			}
		case <-sworn:
			asking = false
		case <-g.kick:
			next = 0
		case <-t.C:
		}
	}
}

func (g *Gate) timers() Timers {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.m.timers
}

func (g *Gate) next() Op {
	g.mu.Lock()
	defer g.mu.Unlock()
	op, why := g.m.Next(g.cfg.Clock.Now())
	if why != g.why && why != "due" {
		g.why = why
	}
	if op.Kind != None && op.Kind != Read && op.Kind != Beat {
		level := slog.LevelInfo
		if told := string(op.Kind) + why; told == g.told { // without a quorum it is tried again and again
			level = slog.LevelDebug
		} else {
			g.told = told
		}
		g.log.Log(context.Background(), level, "writing the gate's record", "kind", string(op.Kind), "state", string(op.Put.State), "epoch", op.Put.Epoch, "why", why)
		g.trace.sent(op, g.m)
	}
	return op
}

func (g *Gate) do(ctx context.Context, op Op) answer {
	ctx, cancel := context.WithTimeout(ctx, g.timers().Attempt)
	defer cancel()
	res, err := g.cfg.Store.Do(ctx, op)
	return answer{op, res, err}
}

// done takes an answer and says whether it changed anything.
func (g *Gate) done(a answer) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.cfg.Clock.Now()
	if a.err == nil {
		g.told = ""
	}
	before := g.m.view
	had := g.m.quorum
	g.m.Done(a.op, a.res, a.err, now)
	if a.err != nil {
		if had {
			g.log.Warn("etcd does not answer the gate", "kind", string(a.op.Kind), "err", a.err)
		}
		return false
	}
	if a.op.Kind == Beat && a.res.Done {
		g.beat = now.Sub(a.op.At)
	}
	g.trace.answered(a, g.m, now)
	after := g.m.view
	if !a.res.Done && a.op.Kind != Read {
		g.log.Warn("the gate's record was not written: something else had changed first", "kind", string(a.op.Kind), "leader", after.Leader)
	}
	changed := ownerOf(before) != ownerOf(after) || stateOf(before) != stateOf(after) || before.Leader != after.Leader
	if changed {
		g.log.Info("gate", "owner", ownerOf(after), "state", string(stateOf(after)), "leader", after.Leader)
		if ownerOf(after) != "" && ownerOf(after) != g.cfg.Self {
			g.foreign = now
		}
		g.helped = 0
		g.publish(now)
	}
	return changed || (a.op.Kind != Read && a.op.Kind != Beat)
}

func ownerOf(v View) string {
	if v.Record == nil {
		return ""
	}
	return v.Record.Owner
}

func stateOf(v View) State {
	if v.Record == nil {
		return ""
	}
	return v.Record.State
}

// settle makes the kernel do what the machine wants.
func (g *Gate) settle(ctx context.Context) {
	g.mu.Lock()
	defer g.mu.Unlock()
	now := g.cfg.Clock.Now()
	w := g.m.Want(now)
	if w.Pass == Keep || (g.sure && !g.differs(w)) {
		return
	}
	g.m.Applying(w)
	err := g.apply(ctx, w)
	if err == nil {
		g.m.Applied(w)
	}
	if err != nil && (g.failed == nil || err.Error() != g.failed.Error()) && ctx.Err() == nil {
		g.log.Error("cannot set the gate", "want", string(w.Pass), "err", err)
	}
	passed := g.applied.Pass
	g.sure, g.failed, g.applied = err == nil, err, w
	if passed != w.Pass {
		g.log.Info("kernel", "passes", string(w.Pass), "until", w.Until.Sub(now).Round(time.Millisecond).String(), "why", w.Why)
		g.publish(now)
	}
}

// differs says whether w asks for more than what the kernel already does. A
// replica's proof is newer at every probe; a few of them a second are enough.
func (g *Gate) differs(w Want) bool {
	a := g.applied
	if a.Pass != w.Pass || a.Reset != w.Reset {
		return true
	}
	step := time.Duration(0)
	if w.Pass == AsReplica {
		step = g.m.timers.Beat
	}
	return w.Pass != Nobody && w.Until.Mono > a.Until.Mono+step
}

func (g *Gate) apply(ctx context.Context, w Want) error {
	if w.Pass != Nobody {
		if err := g.cfg.Kernel.Open(ctx, w.Pass, w.Until); err != nil {
			return err
		}
		if g.applied.Reset {
			return g.cfg.Kernel.Reset(ctx, false)
		}
		return nil
	}
	return errors.Join(g.cfg.Kernel.Shut(ctx), g.cfg.Kernel.Reset(ctx, w.Reset))
}

// ask has the others keep off while there is no quorum, and says whether it
// has begun to.
func (g *Gate) ask(ctx context.Context, sworn chan<- bool) bool {
	g.mu.Lock()
	at := g.cfg.Clock.Now()
	d, ok := g.m.Asking(at)
	epoch := uint64(0)
	if ok {
		epoch = g.m.view.Record.Epoch
	}
	g.mu.Unlock()
	if !ok {
		return false
	}
	go func() {
		ctx, cancel := context.WithTimeout(ctx, g.timers().Attempt*2)
		defer cancel()
		err := g.cfg.Peers.KeepOff(ctx, epoch, d)
		g.mu.Lock()
		if err == nil {
			g.m.Sworn(at, d, g.cfg.Clock.Now())
		} else {
			g.why = "no quorum, and not everybody agrees to keep off: " + err.Error()
		}
		g.mu.Unlock()
		g.Kick()
		<-ctx.Done() // a question every now and then is enough
		sworn <- err == nil
	}()
	return true
}

// help looks after a Patroni that does not do its part.
func (g *Gate) help(now Moment) {
	g.mu.Lock()
	o := g.m.observe(now)
	foreign := time.Duration(0)
	if g.foreign != (Moment{}) {
		foreign = now.Sub(g.foreign)
	}
	what, why := helpNone, ""
	if g.m.viewed {
		what, why = decideHelp(o, g.helped, foreign)
	}
	switch what {
	case helpNone:
		g.mu.Unlock()
		return
	case helpGiveUp:
		g.m.GiveUp(now)
	}
	g.helped++
	g.mu.Unlock()
	switch what {
	case helpRestartPatroni:
		g.log.Warn("helping Patroni", "by", "restarting it", "why", why)
		g.cfg.Actor.RestartPatroni(why)
	case helpStopPostgres:
		g.log.Warn("helping Patroni", "by", "stopping PostgreSQL", "why", why)
		g.cfg.Actor.StopPostgres(why)
	}
}

// Local takes news of this node's PostgreSQL and acts on it at once.
func (g *Gate) Local(l Local) {
	g.mu.Lock()
	before := g.m.local
	g.m.Local(l)
	if before.writable() && !l.writable() { // help has come; the next trouble is another
		g.helped, g.foreign = 0, l.At
	}
	g.trace.local(l, g.m)
	g.mu.Unlock()
	if before.Process != l.Process || before.Timeline != l.Timeline || before.PatroniUp != l.PatroniUp || before.Restarting != l.Restarting {
		g.Kick()
	}
}

// SetTimers changes the timers of a running gate.
func (g *Gate) SetTimers(t Timers) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.m.SetTimers(t)
}

// Kick makes the gate look again at once, as when the leader key has changed.
func (g *Gate) Kick() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// Ban shuts the gate for as long as this daemon lives, because of why.
func (g *Gate) Ban(why string) {
	g.mu.Lock()
	g.m.Ban(why)
	g.mu.Unlock()
	g.Kick()
}

// Doubt says that somebody else has changed the kernel's rules: what was
// confirmed counts no more.
func (g *Gate) Doubt() {
	g.mu.Lock()
	g.sure = false
	g.m.Applying(Want{Pass: Keep})
	g.mu.Unlock()
	g.Kick()
}

// Swear is a peer's question to keep off.
func (g *Gate) Swear(owner string, epoch uint64, d time.Duration) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.m.Swear(owner, epoch, d, g.cfg.Clock.Now())
}

// Admit waits until PostgreSQL here may be promoted. It returns an error with
// the reason when ctx ends first.
func (g *Gate) Admit(ctx context.Context) error {
	for {
		g.mu.Lock()
		ok, why := g.m.Admit(g.cfg.Clock.Now())
		change := g.change
		g.mu.Unlock()
		if ok && g.cfg.Permit != nil {
			if err := g.cfg.Permit(); err != nil {
				return fmt.Errorf("note that this node may be promoted: %w", err)
			}
		}
		if ok {
			return nil
		}
		g.Kick()
		t := time.NewTimer(g.timers().Poll)
		select {
		case <-ctx.Done():
			t.Stop()
			return errors.New("this node may not be promoted: " + why)
		case <-change:
		case <-t.C:
		}
		t.Stop()
	}
}

// Extend makes one promise of d, for a planned restart of the daemon, and
// returns when it is committed and the kernel knows. A node that is not the
// owner has nothing to promise.
func (g *Gate) Extend(ctx context.Context, d time.Duration) error {
	g.mu.Lock()
	if !g.m.owner() || !g.m.wasPrimary {
		g.mu.Unlock()
		return nil
	}
	g.m.Extend(d)
	g.mu.Unlock()
	for {
		g.Kick()
		g.mu.Lock()
		ok := !g.m.Extending() && g.sure && g.applied.Pass == AsOwner && g.applied.Until.Mono >= g.m.lease.Mono
		owner := g.m.owner()
		g.mu.Unlock()
		if ok || !owner {
			return nil
		}
		t := time.NewTimer(10 * time.Millisecond)
		select {
		case <-ctx.Done():
			t.Stop()
			return errors.New("promise a longer gate: " + ctx.Err().Error())
		case <-t.C:
		}
	}
}
