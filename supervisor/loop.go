package supervisor

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

type opcode int

const (
	opStop opcode = iota
	opDetach
	opKill
	opSignal
	opRestart
)

// command is a request to the loop.
type command struct {
	op        opcode
	reason    string
	sig       syscall.Signal
	reply     chan error // accepted or not
	restarted chan error // opRestart: the outcome
}

// intent is what the loop is to do when the child has ended.
type intent int

const (
	intentRun     intent = iota // decide by verdict and budget
	intentStop                  // end
	intentRestart               // start again at once
	intentReplace               // the child is a leftover: on to the next, or start
	intentAdopt                 // of newLoop only: run what can be adopted, or nothing
)

// loop is one time of supervision, from Start to Stop. All its fields belong to
// the goroutine that runs it, except the channels and tail.
type loop struct {
	p    *Process
	cmds chan command
	done chan struct{}
	tail *tail
	lock *os.File

	ctx    context.Context // ends Before and Health
	cancel context.CancelFunc

	child    *child // nil when none runs
	intent   intent
	replace  []leftover // to be ended before the first start
	before   chan error // non-nil while Before runs
	started  bool       // there has been a start or an adoption
	hung     string     // why we killed the child, if a health check did
	why      string     // of intentRestart
	budget   budget
	timer    *time.Timer // back-off, or grace when Stopping
	waiters  []chan error
	finished bool

	health    healthLoop
	healthRes chan healthResult
}

// newLoop takes the lock and looks for leftovers. On error nothing is left of
// it; it is nil when there is nothing to adopt and want asks for no more.
func newLoop(p *Process, want intent) (*loop, error) {
	lk, err := lock(p.spec)
	if err != nil {
		return nil, err
	}
	found, err := findLeftovers(p.spec, p.log)
	if err != nil {
		return nil, errors.Join(err, lk.Close())
	}
	adopt := want != intentStop && len(found) == 1 && found[0].action == actAdopt
	if want == intentAdopt {
		if !adopt {
			for _, left := range found {
				left.release()
			}
			return nil, lk.Close()
		}
		want = intentRun
	}
	l := &loop{
		p: p, lock: lk, intent: want,
		cmds: make(chan command), done: make(chan struct{}), healthRes: make(chan healthResult, 1),
		tail: newTail(p.spec, p.log), timer: time.NewTimer(time.Hour),
	}
	l.timer.Stop()
	l.ctx, l.cancel = context.WithCancel(context.Background())
	if adopt {
		l.child = found[0].child
		l.child.adopted = true
		p.log.Info("adopting a process", "pid", l.child.pid, "reason", found[0].reason)
		if !found[0].recorded {
			l.record(l.child)
		}
	} else {
		l.replace = found
	}
	return l, nil
}

// first makes the first step, before the goroutine runs, so that an adoption is
// seen as soon as Start returns.
func (l *loop) first() {
	l.tail.poll(false)
	if c := l.child; c != nil {
		l.child = nil
		l.took(c, fmt.Sprintf("adopted pid %d", c.pid))
		return
	}
	l.next()
}

// next ends the next leftover, or else does what is intended.
func (l *loop) next() {
	if len(l.replace) > 0 {
		old := l.replace[0]
		l.replace = l.replace[1:]
		l.child = old.child
		if l.intent != intentStop {
			l.intent = intentReplace
		}
		l.p.update(func(s *Status) { s.PID, s.Adopted, s.StartedAt = old.pid, true, old.startedAt })
		if err := old.watch(); err != nil {
			l.p.log.Warn("cannot watch a leftover", "pid", old.pid, "err", err)
		}
		sig := l.p.spec.ReplaceSignal
		if l.intent == intentStop {
			sig = l.p.spec.StopSignal
		}
		l.terminate(sig, fmt.Sprintf("ending leftover pid %d: %s", old.pid, old.reason))
		return
	}
	if l.intent == intentStop {
		l.finish(Stopped, "stopped")
		return
	}
	l.intent = intentRun
	l.prepare("")
}

func (l *loop) run() {
	for !l.finished {
		var exited chan ExitStatus
		if l.child != nil {
			exited = l.child.exited
		}
		select {
		case c := <-l.cmds:
			c.reply <- l.command(c)
		case err := <-l.before:
			l.before = nil
			l.launch(err)
		case st := <-exited:
			l.ended(st)
		case <-l.timer.C:
			l.timeout()
		case <-l.health.due():
			l.checkHealth()
		case r := <-l.healthRes:
			l.healthResult(r)
		}
	}
	close(l.done)
}

// send hands c to the loop and waits until it has been accepted or refused.
func (l *loop) send(c command) error {
	c.reply = make(chan error, 1)
	select {
	case l.cmds <- c:
		return <-c.reply
	case <-l.done:
		return ErrNotRunning
	}
}

func (l *loop) command(c command) error {
	switch c.op {
	case opStop:
		l.stop(c.sig)
	case opDetach:
		reason := "detached"
		if l.child != nil {
			reason = fmt.Sprintf("detached, pid %d is left running", l.child.pid)
		}
		l.finish(Stopped, reason)
	case opRestart:
		l.restart(c)
	case opKill:
		if l.child == nil {
			return ErrNotRunning
		}
		l.p.log.Warn("killing", "pid", l.child.pid, "reason", c.reason)
		if err := l.child.signal(syscall.SIGKILL); err != nil {
			return err
		}
		if l.intent == intentRun {
			l.intent, l.why = intentRestart, "killed: "+c.reason
		}
	case opSignal:
		if l.child == nil {
			return ErrNotRunning
		}
		return l.child.signal(c.sig)
	}
	return nil
}

func (l *loop) stop(sig syscall.Signal) {
	was := l.intent
	l.intent = intentStop
	switch {
	case was == intentStop:
	case l.child != nil && was != intentRun: // its end is under way
		l.p.setState(Stopping, "stop asked for")
	case l.child != nil:
		l.terminate(sig, "stop asked for")
	case l.before != nil:
		l.cancel() // launch goes on when Before has returned
		l.p.setState(Stopping, "stop asked for")
	default:
		l.finish(Stopped, "stopped")
	}
}

func (l *loop) restart(c command) {
	if l.intent == intentStop {
		c.restarted <- errors.New("it is being stopped")
		return
	}
	l.waiters = append(l.waiters, c.restarted)
	switch {
	case l.child == nil && l.before == nil:
		l.prepare("restart: " + c.reason)
	case l.child != nil && l.intent == intentRun:
		l.intent, l.why = intentRestart, "restart: "+c.reason
		l.terminate(l.p.spec.StopSignal, "restart: "+c.reason)
	}
	// Otherwise a start is under way already.
}

// terminate asks the child to end and sets the time after which it is killed.
func (l *loop) terminate(sig syscall.Signal, reason string) {
	l.p.setState(Stopping, reason)
	l.timer.Reset(l.p.spec.Grace)
	err := l.child.signal(sig)
	if err == nil && sig != syscall.SIGKILL {
		// A frozen process would not see the signal.
		err = l.child.signal(syscall.SIGCONT)
	}
	if err != nil && !errors.Is(err, unix.ESRCH) {
		l.p.setState(Stopping, reason+"; "+err.Error())
	}
}

// timeout follows the timer.
func (l *loop) timeout() {
	if l.child == nil {
		if l.before == nil && l.intent == intentRun {
			l.prepare("")
		}
		return
	}
	reason := fmt.Sprintf("still alive after %v, killing pid %d", l.p.spec.Grace, l.child.pid)
	if err := l.child.signal(syscall.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
		reason += "; " + err.Error()
	}
	l.p.setState(Stopping, reason)
}

// prepare runs Before, if there is one, and then launches the child.
func (l *loop) prepare(reason string) {
	l.timer.Stop()
	l.p.setState(Starting, reason)
	before := l.p.spec.Before
	if before == nil {
		l.launch(nil)
		return
	}
	ch, ctx := make(chan error, 1), l.ctx
	l.before = ch
	go func() { ch <- before(ctx) }()
}

// launch starts the child after Before has given err.
func (l *loop) launch(err error) {
	if l.intent == intentStop {
		l.finish(Stopped, "stopped")
		return
	}
	l.intent = intentRun
	if err != nil {
		l.failed(fmt.Sprintf("prepare: %v", err))
		return
	}
	c, err := l.spawn()
	if err != nil {
		l.failed(err.Error())
		return
	}
	if l.started {
		l.p.update(func(s *Status) { s.Restarts++ })
	}
	l.record(c)
	l.took(c, fmt.Sprintf("pid %d", c.pid))
}

// record writes the pid file of c.
func (l *loop) record(c *child) {
	if err := writePIDFile(l.p.spec, c); err != nil && c.alive() {
		// The child is worth more than the file: a scan would find it as well.
		l.p.log.Warn("cannot write pid file", "err", err)
	}
}

func (l *loop) spawn() (*child, error) {
	out, err := openOutput(l.p.spec)
	if err != nil {
		return nil, err
	}
	defer func() { _ = out.Close() }()
	l.tail.poll(true) // finds its position before the child writes
	l.tail.begin()
	return spawn(l.p.spec, out)
}

// took makes c, started or adopted, the running child.
func (l *loop) took(c *child, reason string) {
	l.child, l.hung, l.started = c, "", true
	if adj := l.p.spec.OOMScoreAdj; adj != nil {
		if err := setOOMScore(c.pid, *adj); err != nil && c.alive() {
			l.p.log.Warn("cannot protect the process from the OOM killer as wished", "err", err)
		}
	}
	if err := c.watch(); err != nil {
		l.p.log.Error("cannot watch the process", "err", err)
	}
	l.health.begin(l.p.spec, c.startedAt)
	l.p.update(func(s *Status) {
		s.PID, s.Adopted, s.StartedAt, s.Health = c.pid, c.adopted, c.startedAt, HealthStatus{}
	})
	l.p.setState(Running, reason)
	l.answer(nil)
}

// ended follows the end of the child.
func (l *loop) ended(st ExitStatus) {
	c := l.child
	l.timer.Stop()
	l.health.end()
	if l.p.spec.KillGroup {
		if err := killGroup(c, l.p.spec.Marker); err != nil {
			l.p.log.Warn("cannot end the rest of the process group", "err", err)
		}
	}
	l.tail.poll(true)
	st.LastLog = l.tail.last()
	c.release()
	l.child = nil
	if err := os.Remove(l.p.spec.file(".pid")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		l.p.log.Warn("cannot remove pid file", "err", err)
	}
	l.p.update(func(s *Status) { s.PID, s.Adopted, s.StartedAt, s.LastExit = 0, false, time.Time{}, &st })

	switch l.intent {
	case intentReplace:
		l.next()
	case intentStop:
		if len(l.replace) > 0 {
			l.next()
			return
		}
		l.finish(Stopped, "stopped: "+st.String())
	case intentRestart:
		l.prepare(l.why)
	case intentRun:
		l.judge(st)
	}
}

// judge decides about an exit that nobody asked for.
func (l *loop) judge(st ExitStatus) {
	reason := st.String()
	if st.Signal == syscall.SIGKILL {
		reason = "killed from outside, by an operator or by the kernel for want of memory: " + reason
	}
	switch {
	case l.hung != "":
		reason = "hung, was killed: " + l.hung
	case l.p.spec.Exit != nil:
		if v := l.p.spec.Exit(st); v.Stop {
			l.finish(Failed, fmt.Sprintf("not restarted: %s (%s)", v.Reason, reason))
			return
		}
	}
	l.failed(reason)
}

// failed counts a failure and sets the time of the next attempt.
func (l *loop) failed(reason string) {
	l.answer(errors.New(reason))
	var wait time.Duration
	var spent bool
	l.budget, wait, spent = l.budget.fail(l.p.spec.Restart, time.Now(), rand.Float64())
	switch {
	case spent && l.p.spec.Restart.GiveUp:
		l.finish(Failed, fmt.Sprintf("given up, more than %d failures: %s", l.p.spec.Restart.Budget.Failures, reason))
		return
	case spent:
		l.p.setState(Failed, fmt.Sprintf("more than %d failures, next attempt in %v: %s",
			l.p.spec.Restart.Budget.Failures, wait.Round(time.Millisecond), reason))
	default:
		l.p.setState(BackingOff, fmt.Sprintf("restart in %v: %s", wait.Round(time.Millisecond), reason))
	}
	l.timer.Reset(wait)
}

// answer tells those who wait for a restart how it went.
func (l *loop) answer(err error) {
	for _, w := range l.waiters {
		w <- err
	}
	l.waiters = nil
}

// finish ends the loop. A child that still runs is left alone.
func (l *loop) finish(to State, reason string) {
	l.finished = true
	l.timer.Stop()
	l.cancel()
	l.health.end()
	l.tail.end()
	if l.child != nil {
		l.child.release()
		l.child = nil
	}
	for _, left := range l.replace {
		left.release()
	}
	if err := l.lock.Close(); err != nil {
		l.p.log.Warn("cannot release the lock", "err", err)
	}
	l.answer(errors.New(reason))
	l.p.update(func(s *Status) { s.PID, s.Adopted, s.StartedAt, s.Health = 0, false, time.Time{}, HealthStatus{} })
	l.p.setState(to, reason)
}
