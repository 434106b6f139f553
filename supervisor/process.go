package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Errors of the methods of Process, to be compared with errors.Is.
var (
	ErrStarted    = errors.New("already started")
	ErrNotRunning = errors.New("not running")
	// ErrLocked means that a living process supervises the same name already.
	ErrLocked = errors.New("supervised by another process")
)

const (
	eventRing     = 64
	subscriberBuf = 64
)

// Process is one supervised process. Its methods may be called from any
// goroutine.
type Process struct {
	spec Spec
	log  *slog.Logger

	op chan struct{} // held by the method that starts or ends supervision

	mu     sync.Mutex // guards what follows
	loop   *loop      // the last one started; may have ended
	status Status
	events []Event
	subs   map[chan Event]struct{}
}

// New checks spec and returns a process that is not started. Log records carry
// component=spec.Name. The error names everything that is wrong with spec.
func New(spec Spec, log *slog.Logger) (*Process, error) {
	spec, err := spec.withDefaults()
	if err != nil {
		return nil, err
	}
	return &Process{
		spec:   spec,
		log:    log.With("component", spec.Name),
		op:     make(chan struct{}, 1),
		status: Status{Name: spec.Name, Since: time.Now()},
		subs:   map[chan Event]struct{}{},
	}, nil
}

// Start begins to supervise. A living leftover of an earlier supervisor is
// adopted when it is what the Spec asks for, and otherwise ended first. Start
// returns as soon as that is decided and the loop runs; whether the child comes
// up is seen in Status. ctx bounds this call alone: only Stop and Detach end the
// supervision.
//
// It fails with ErrStarted, with ErrLocked, or when it cannot be told whether a
// leftover is ours; then nothing has been started or ended.
func (p *Process) Start(ctx context.Context) error {
	_, err := p.start(ctx, intentRun)
	return err
}

// Adopt is Start if there is a leftover that can be adopted, and reports whether
// there was. Otherwise it starts nothing, ends nothing and changes no state.
func (p *Process) Adopt(ctx context.Context) (bool, error) { return p.start(ctx, intentAdopt) }

// StopLeftover ends what an earlier supervisor left running, without starting
// anything, and waits for it. It is Start for those who want nothing to run, and
// fails as Start does.
func (p *Process) StopLeftover(ctx context.Context) error {
	if _, err := p.start(ctx, intentStop); err != nil {
		return err
	}
	return p.Stop(ctx)
}

func (p *Process) start(ctx context.Context, want intent) (bool, error) {
	if err := p.begin(ctx); err != nil {
		return false, fmt.Errorf("start %s: %w", p.spec.Name, err)
	}
	defer p.end()
	if p.running() != nil {
		return false, fmt.Errorf("start %s: %w", p.spec.Name, ErrStarted)
	}
	l, err := newLoop(p, want)
	if err != nil {
		return false, fmt.Errorf("start %s: %w", p.spec.Name, err)
	}
	if l == nil {
		return false, nil
	}
	p.mu.Lock()
	p.loop = l
	p.status.Restarts, p.status.LastExit = 0, nil
	p.mu.Unlock()
	l.first()
	go l.run()
	return true, nil
}

// Stop asks the child to end with StopSignal, kills it after Grace, and waits
// until it is gone. A process that is not started is left as it is, except that
// Waiting and Failed become Stopped. If ctx ends first, Stop returns its error
// and the stopping goes on.
func (p *Process) Stop(ctx context.Context) error { return p.StopBy(ctx, p.spec.StopSignal) }

// StopBy is Stop with another signal: with SIGKILL the child has no say in what
// its end does.
func (p *Process) StopBy(ctx context.Context, sig syscall.Signal) error {
	if err := p.begin(ctx); err != nil {
		return fmt.Errorf("stop %s: %w", p.spec.Name, err)
	}
	defer p.end()
	l := p.running()
	if l == nil {
		if p.Status().State != Stopped {
			p.setState(Stopped, "stopped")
		}
		return nil
	}
	if err := l.send(command{op: opStop, sig: sig}); err != nil && !errors.Is(err, ErrNotRunning) {
		return fmt.Errorf("stop %s: %w", p.spec.Name, err)
	}
	select {
	case <-l.done:
	case <-ctx.Done():
		return fmt.Errorf("stop %s: it is still %s: %w", p.spec.Name, p.Status().State, ctx.Err())
	}
	if p.Status().State == Failed { // it ended just before by itself
		p.setState(Stopped, "stopped")
	}
	return nil
}

// Detach ends the supervision and leaves the child running, to be adopted by the
// next Start, in this program or in another. It is a no-op when not started.
func (p *Process) Detach() error {
	_ = p.begin(context.Background()) // cannot fail
	defer p.end()
	l := p.running()
	if l == nil {
		return nil
	}
	if err := l.send(command{op: opDetach}); err != nil && !errors.Is(err, ErrNotRunning) {
		return fmt.Errorf("detach from %s: %w", p.spec.Name, err)
	}
	<-l.done
	return nil
}

// Kill sends SIGKILL at once. The child is restarted without a wait and without
// a charge to the budget. It fails with ErrNotRunning when there is no child.
func (p *Process) Kill(reason string) error {
	return p.command("kill", command{op: opKill, reason: reason})
}

// Signal sends sig to the child. It fails with ErrNotRunning when there is none.
func (p *Process) Signal(sig syscall.Signal) error {
	return p.command("signal", command{op: opSignal, sig: sig})
}

func (p *Process) command(what string, c command) error {
	l := p.running()
	if l == nil {
		return fmt.Errorf("%s %s: %w", what, p.spec.Name, ErrNotRunning)
	}
	if err := l.send(c); err != nil {
		return fmt.Errorf("%s %s: %w", what, p.spec.Name, err)
	}
	return nil
}

// Restart stops the child as Stop does and starts it again, at once and without
// a charge to the budget; it returns when the new child runs or could not be
// started (attempts then go on). A process that is not started is started. If
// ctx ends first, Restart returns its error and the restart goes on.
func (p *Process) Restart(ctx context.Context, reason string) error {
	l := p.running()
	if l == nil {
		return p.Start(ctx)
	}
	restarted := make(chan error, 1)
	if err := l.send(command{op: opRestart, reason: reason, restarted: restarted}); err != nil {
		return fmt.Errorf("restart %s: %w", p.spec.Name, err)
	}
	var err error
	select {
	case err = <-restarted:
	case <-l.done:
		err = ErrNotRunning
		select {
		case err = <-restarted:
		default:
		}
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return fmt.Errorf("restart %s: %w", p.spec.Name, err)
	}
	return nil
}

// SetWaiting shows that the process is not started yet and what it waits for. It
// has no effect on one that is started.
func (p *Process) SetWaiting(reason string) {
	_ = p.begin(context.Background()) // cannot fail
	defer p.end()
	if st := p.Status(); p.running() != nil || st.State == Waiting && st.Reason == reason {
		return
	}
	p.setState(Waiting, reason)
}

// Status returns a snapshot.
func (p *Process) Status() Status {
	p.mu.Lock()
	st, l := p.status, p.loop
	p.mu.Unlock()
	if st.LastExit != nil {
		last := *st.LastExit
		st.LastExit = &last
	}
	if l != nil {
		st.LastLog = l.tail.last()
	}
	return st
}

// Events returns the last 64 changes of state, oldest first.
func (p *Process) Events() []Event {
	p.mu.Lock()
	defer p.mu.Unlock()
	return slices.Clone(p.events)
}

// Subscribe returns a channel that receives every change of state from now on,
// and a function that ends the subscription and closes the channel. A receiver
// that falls more than 64 events behind loses the oldest.
func (p *Process) Subscribe() (<-chan Event, func()) {
	ch := make(chan Event, subscriberBuf)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.subs[ch] = struct{}{}
	return ch, func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if _, ok := p.subs[ch]; ok {
			delete(p.subs, ch)
			close(ch)
		}
	}
}

// setState is the only place where the state changes. It is called by the loop,
// or while none runs by the holder of op.
func (p *Process) setState(to State, reason string) {
	p.mu.Lock()
	e := Event{At: time.Now(), Name: p.spec.Name, From: p.status.State, To: to, Reason: reason}
	if p.status.State != to {
		p.status.Since = e.At
	}
	p.status.State, p.status.Reason = to, reason
	pid := p.status.PID
	if p.events = append(p.events, e); len(p.events) > eventRing {
		p.events = p.events[1:]
	}
	for ch := range p.subs {
		select {
		case ch <- e:
			continue
		default:
		}
		select { // full, and we are the only sender: make room
		case <-ch:
		default:
		}
		ch <- e
	}
	p.mu.Unlock()
	level := slog.LevelInfo
	switch to {
	case Failed:
		level = slog.LevelError
	case BackingOff:
		level = slog.LevelWarn
	}
	p.log.Log(context.Background(), level, to.String(), "from", e.From.String(), "reason", reason, "pid", pid)
}

// update changes the rest of the status.
func (p *Process) update(f func(*Status)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.status)
}

// running returns the loop if it has not ended.
func (p *Process) running() *loop {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.loop == nil {
		return nil
	}
	select {
	case <-p.loop.done:
		return nil
	default:
		return p.loop
	}
}

func (p *Process) begin(ctx context.Context) error {
	select {
	case p.op <- struct{}{}: // even when ctx has ended
		return nil
	default:
	}
	select {
	case p.op <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (p *Process) end() { <-p.op }

// lock makes sure that no other living process supervises the same name. The
// lock ends with the file, and so with this process.
func lock(s Spec) (*os.File, error) {
	if err := os.MkdirAll(s.RunDir, 0o755); err != nil {
		return nil, fmt.Errorf("make run directory: %w", err)
	}
	f, err := os.OpenFile(s.file(".lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock file: %w", err)
	}
	for i := 0; ; i++ {
		if err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err == nil {
			return f, nil
		}
		// A supervisor that was killed while it forked has its lock held by the
		// fork until that has executed its program: wait a moment for it.
		if !errors.Is(err, unix.EWOULDBLOCK) || i == 20 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	_ = f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	return nil, fmt.Errorf("lock %s: %w", f.Name(), err)
}
