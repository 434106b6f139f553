package supervisor

import (
	"context"
	"fmt"
	"syscall"
	"time"
)

// healthLoop says when the next check is due and counts failures. It belongs to
// the goroutine of the loop.
type healthLoop struct {
	timer    *time.Timer
	began    time.Time // start of the child
	healthy  bool      // there has been a success
	failures int       // in a row
	checking bool      // a check runs; its result may concern an earlier child
}

type healthResult struct {
	child *child
	err   error
}

// begin starts over for a new child.
func (h *healthLoop) begin(s Spec, childStarted time.Time) {
	if s.Health == nil {
		return
	}
	h.healthy, h.failures, h.began = false, 0, childStarted
	if h.timer == nil {
		h.timer = time.NewTimer(s.HealthEvery)
		return
	}
	h.timer.Reset(s.HealthEvery)
}

func (h *healthLoop) end() {
	if h.timer != nil {
		h.timer.Stop()
	}
}

func (h *healthLoop) due() <-chan time.Time {
	if h.timer == nil {
		return nil
	}
	return h.timer.C
}

// checkHealth starts one check. It is over after HealthTimeout even if the
// callback is not.
func (l *loop) checkHealth() {
	if l.child == nil || l.health.checking {
		return
	}
	l.health.checking = true
	c, check, timeout := l.child, l.p.spec.Health, l.p.spec.HealthTimeout
	ctx, cancel := context.WithTimeout(l.ctx, timeout)
	res := make(chan error, 1)
	go func() { res <- check(ctx) }()
	go func() {
		defer cancel()
		var err error
		select {
		case err = <-res:
		case <-ctx.Done():
			err = fmt.Errorf("no answer within %v", timeout)
		}
		l.healthRes <- healthResult{c, err} // one check at a time: there is room
	}()
}

func (l *loop) healthResult(r healthResult) {
	l.health.checking = false
	if l.child == nil {
		return
	}
	l.health.timer.Reset(l.p.spec.HealthEvery)
	if r.child != l.child || l.intent != intentRun {
		return
	}
	now, msg := time.Now(), ""
	if r.err != nil {
		msg = r.err.Error()
	}
	changed := false
	l.p.update(func(s *Status) {
		h := &s.Health
		if changed = h.Checked.IsZero() && msg != "" || !h.Checked.IsZero() && (h.Err == "") != (msg == ""); changed || h.Checked.IsZero() {
			h.Since = now
		}
		h.Err, h.Checked = msg, now
	})
	if changed {
		l.p.log.Info("health changed", "pid", r.child.pid, "healthy", r.err == nil, "err", msg)
	}
	if r.err == nil {
		l.health.healthy, l.health.failures = true, 0
		return
	}
	if !l.health.healthy && now.Sub(l.health.began) < l.p.spec.HealthGrace {
		return
	}
	l.health.failures++
	if l.health.failures < l.p.spec.HealthFailures || l.hung != "" {
		return
	}
	l.hung = fmt.Sprintf("%d health checks failed in a row: %s", l.health.failures, msg)
	l.p.log.Warn("killing a hung process", "pid", l.child.pid, "reason", l.hung)
	if err := l.child.signal(syscall.SIGKILL); err != nil {
		l.p.log.Error("cannot kill a hung process", "err", err)
		l.hung = "" // try again with the next failure
	}
}
