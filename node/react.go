package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/gate"
	"pgha/internal/procstat"
	"pgha/patroni"
	"pgha/postgres"
	"pgha/supervisor"
)

const (
	reactEvery = 100 * time.Millisecond
	// pingTimeout bounds a question to the node of a standby that is silent. It
	// is answered from memory.
	pingTimeout = 200 * time.Millisecond
	// wakeTimeout bounds the waking of Patroni.
	wakeTimeout = 3 * time.Second
	// sessionEvery is how often it is asked when Patroni renewed its session, for
	// which etcd's leader is asked.
	sessionEvery, sessionTimeout = time.Second, 300 * time.Millisecond

	pathAlive = "/v1/alive"
)

// reactor does what a data node does at once about its own PostgreSQL and
// Patroni; the decisions are in reactions.go.
type reactor struct {
	n       *Node
	watcher *postgres.Watcher
	gate    *gate.Gate

	// Patroni has to wait: for disk space, for a quorum of etcd.
	diskHeld, quorumHeld atomic.Bool
}

// run reacts until ctx ends.
func (r *reactor) run(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { r.watchStandbys(ctx) })
	wg.Go(func() { every(ctx, r.patroniRounds(ctx)) })
	wg.Go(func() { every(ctx, r.serverRounds(ctx)) })
	wg.Go(func() { every(ctx, r.diskRounds(ctx)) })
	wg.Go(func() { every(ctx, r.quorumRounds(ctx)) })
	wg.Wait()
}

// every calls f every 100 ms until ctx ends.
func every(ctx context.Context, f func()) {
	for {
		f()
		if !sleep(ctx, reactEvery) {
			return
		}
	}
}

func monotonic() time.Duration { return gate.SystemClock{}.Now().Mono }

// watchStandbys sees to it that commits do not wait for a standby that is gone.
func (r *reactor) watchStandbys(ctx context.Context) {
	var watch standbyWatch
	r.watcher.Follow(ctx, func(p postgres.Probe) {
		v := r.n.snapshot().View
		var standbys []string
		if v.Sync.Leader == r.n.cfg.Name {
			standbys = v.Sync.Standbys
		}
		primary := p.Kind == postgres.Primary && r.gate.Status().Self
		for name, o := range watch.see(p, primary, standbys) {
			what, why := decideStandbyLost(o)
			r.aboutStandby(ctx, name, watch.by[name], what, why)
		}
	})
}

func (r *reactor) aboutStandby(ctx context.Context, name string, s *standbyState, what standbyAction, why string) {
	switch what {
	case standbyAsk:
		if r.ping(ctx, name) {
			s.asked, s.spare = 0, monotonic()+standbySpared
		} else {
			s.asked++
		}
	case standbyDrop:
		s.asked = 0 // if it is not enough, from the beginning
		ended, err := r.watcher.TerminateWalSenders(ctx, name)
		r.n.log.Warn("a synchronous standby is lost", "standby", name, "why", why, "connections_ended", ended, "err", err)
		r.watcher.Now(ctx) // which Patroni sees too is what this shows
	case standbyWake:
		s.woken = monotonic()
		r.wakePatroni(ctx, why, "standby", name)
	}
}

// ping asks the node of a member whether it is there, and takes any answer for
// one, a refusal by its kernel included.
func (r *reactor) ping(ctx context.Context, name string) bool {
	for _, m := range r.n.snapshot().Members {
		if m.Name != name {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, pingTimeout)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "https://"+m.APIAddr()+pathAlive, nil)
		if err != nil {
			return true
		}
		resp, err := r.n.seen.client.Do(req)
		if err != nil {
			return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.ECONNRESET)
		}
		_ = resp.Body.Close() // that it came is all
		return true
	}
	return true // no member: nothing is known
}

func (r *reactor) wakePatroni(ctx context.Context, why string, args ...any) {
	ctx, cancel := context.WithTimeout(ctx, wakeTimeout)
	defer cancel()
	err := r.n.restClient(r.n.snapshot(), r.n.cfg.Address, r.n.cfg.Ports.Patroni).Wake(ctx)
	r.n.log.Info("Patroni is woken", append(args, "why", why, "err", err)...)
}

// patroniRounds looks whether Patroni does its part.
func (r *reactor) patroniRounds(ctx context.Context) func() {
	var (
		o               patroniObservation
		pid             int
		looked, quorate time.Duration
		asked           time.Duration
	)
	return func() {
		now, st := monotonic(), r.n.patroni.Status()
		took := now - looked
		looked = now
		if st.PID != pid || st.State != supervisor.Running {
			pid, o.stopped, o.session = st.PID, 0, 0
		}
		o.running, o.up = st.State == supervisor.Running && pid != 0, time.Since(st.StartedAt)
		if stat, err := procstat.Read(pid); o.running && err == nil && stat.State == 'T' {
			// This process may have been stopped too, with the whole host.
			o.stopped += min(took, 2*reactEvery)
		} else {
			o.stopped = 0
		}
		if !r.gate.Status().Quorum {
			quorate = now
		}
		o.quorum = now - quorate
		o.hung = r.watcher.Latest().Kind == postgres.Hung
		if now-asked >= sessionEvery {
			asked = now
			o.session, o.loop = r.sessionAge(ctx)
		}
		if restart, why := decidePatroni(o); restart && ctx.Err() == nil {
			r.n.log.Warn("restarting Patroni; PostgreSQL goes on", "pid", pid, "why", why)
			r.n.problem("patroni restart", r.n.patroni.Kill(why))
			o.stopped, o.session = 0, 0
		}
	}
}

// sessionAge asks etcd how long ago the local Patroni renewed its session, which
// it does in every round; 0 when that cannot be told.
func (r *reactor) sessionAge(ctx context.Context) (age, loop time.Duration) {
	v := r.n.snapshot().View
	m, ok := v.Member(r.n.cfg.Name)
	seconds, _ := v.Config["loop_wait"].(float64)
	c, err := r.n.etcdClient()
	if !ok || m.LeaseID == 0 || seconds <= 0 || err != nil {
		return 0, 0
	}
	ctx, cancel := context.WithTimeout(ctx, sessionTimeout)
	defer cancel()
	l, err := c.TimeToLive(ctx, clientv3.LeaseID(m.LeaseID))
	if err != nil || l.TTL < 0 || l.TTL > l.GrantedTTL {
		return 0, 0
	}
	return time.Duration(l.GrantedTTL-l.TTL) * time.Second, time.Duration(seconds * float64(time.Second))
}

// serverRounds looks after a PostgreSQL that has crashed.
func (r *reactor) serverRounds(ctx context.Context) func() {
	var down, woken time.Duration // when it was last up, and Patroni last woken
	return func() {
		now, p, s := monotonic(), r.watcher.Latest(), r.gate.Status()
		leads := s.Self && s.Leader == r.n.cfg.Name
		if !leads || (p.Kind != postgres.Gone && p.Kind != postgres.Recovery) {
			down = now
		}
		o := serverObservation{
			kind: p.Kind, self: r.n.cfg.Name, owner: s.Owner, leader: s.Leader, down: now - down,
			// Patroni is not to be woken while it is kept from starting PostgreSQL.
			stopping: r.n.leaving.Load() || r.n.stopping.Load() || r.held() != "",
			woken:    now - woken,
		}
		if wake, why := decideServer(o); wake {
			woken = now
			r.wakePatroni(ctx, why)
		}
	}
}

// quorumRounds keeps Patroni from demoting a primary that all members leave
// alone while etcd has no quorum.
func (r *reactor) quorumRounds(ctx context.Context) func() {
	return func() {
		s, v := r.gate.Status(), r.n.snapshot().View
		retry, _ := v.Config["retry_timeout"].(float64)
		o := quorumObservation{
			held: r.quorumHeld.Load(), quorum: s.Quorum, agreed: s.Agreed, paused: v.Paused,
			primary: s.Self && s.State == gate.Open && r.watcher.Latest().Kind == postgres.Primary,
			lost:    s.Lost, retry: time.Duration(retry * float64(time.Second)),
		}
		hold, _ := decideWithoutQuorum(o)
		if hold == o.held || ctx.Err() != nil || r.n.stopping.Load() || r.n.leaving.Load() {
			return
		}
		r.quorumHeld.Store(hold)
		var err error
		if hold {
			stop, cancel := context.WithTimeout(ctx, 10*time.Second)
			defer cancel()
			err = errors.Join(errors.New(r.held()), r.n.patroni.StopBy(stop, syscall.SIGKILL))
		}
		r.n.partProblem(ctx, "patroni held", err)
		r.n.wake()
	}
}

// diskRounds hands the primary over before its disk is full, and keeps Patroni
// from starting a PostgreSQL that has no room.
func (r *reactor) diskRounds(ctx context.Context) func() {
	up := monotonic()            // when PostgreSQL last answered
	switched := up - switchAgain // when the primary was last handed over
	var ends diskEnds
	return func() {
		p, s, now := r.watcher.Latest(), r.gate.Status(), monotonic()
		if p.Kind == postgres.Primary || p.Kind == postgres.Recovery || p.Kind == postgres.Hung {
			up = now
		}
		r.holdBack(ctx, holdObservation{held: r.diskHeld.Load(), kind: p.Kind, down: now - up, ends: ends.see(p, now), free: p.DiskFree, total: p.DiskTotal})

		w := r.n.snapshot()
		o := diskObservation{
			primary: s.Self && p.Kind == postgres.Primary, paused: w.View.Paused, underWay: w.View.ModRevisions[patroni.KeyFailover] != 0,
			free: p.DiskFree, total: p.DiskTotal, since: now - switched,
		}
		for name, report := range r.n.seen.lately() {
			if report.Role == cluster.RoleData {
				o.replicas = append(o.replicas, diskReplica{
					name: name, unfit: unfit(name, report.Postgres, w, p), free: report.Postgres.DiskFree, total: report.Postgres.DiskTotal,
				})
			}
		}
		candidate, low, why := decideDisk(o)
		var err error
		if low {
			err = fmt.Errorf("%s: free some room in %s, or PostgreSQL stops", why, r.n.cfg.Postgres.DataDir)
		}
		r.n.partProblem(ctx, "disk", err)
		if candidate != "" && ctx.Err() == nil {
			switched = now
			r.n.event(EventRole, r.n.cfg.Name, actorPgha, "handing the primary over to %s: %s", candidate, why)
			ctx, cancel := context.WithTimeout(ctx, time.Minute)
			defer cancel()
			_, err := r.n.moveLeadership(ctx, r.n.logSteps("hand-over for want of disk"), candidate, false)
			r.n.partProblem(ctx, "hand-over for want of disk", err)
		}
	}
}

// unfit says why a replica could not take over from the primary that p is of.
func unfit(name string, r PostgresReport, w world, p postgres.Probe) string {
	m, _ := w.View.Member(name)
	switch {
	case r.Role != pgReplica:
		return "it is not a running replica"
	case m.Tags["nofailover"] == true:
		return "it is tagged nofailover"
	case r.DiskTotal == 0:
		return "its disk is not known"
	case r.Timeline != p.Timeline:
		return "it is on another timeline"
	case w.View.Synchronous() && !slices.Contains(w.View.Sync.Standbys, name):
		return "it is not in sync"
	case p.WriteLSN > r.LSN && p.WriteLSN-r.LSN > w.View.MaxLag() && !w.View.Synchronous():
		return "it lags too far behind"
	}
	return ""
}

// holdBack stops a Patroni that would start PostgreSQL for nothing, and lets it
// start again when there is room.
func (r *reactor) holdBack(ctx context.Context, o holdObservation) {
	hold, why := decideHold(o)
	if hold == o.held || ctx.Err() != nil || r.n.stopping.Load() || r.n.leaving.Load() {
		return
	}
	r.diskHeld.Store(hold)
	var err error
	if hold {
		err = errors.New(why)
		stop, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		err = errors.Join(err, r.n.patroni.Stop(stop))
	}
	r.n.partProblem(ctx, "PostgreSQL", err)
	r.n.wake()
}

// held says why Patroni has to wait, or "".
func (r *reactor) held() string {
	switch {
	case r == nil:
	case r.diskHeld.Load():
		p := r.watcher.Latest()
		_, why := decideHold(holdObservation{held: true, free: p.DiskFree, total: p.DiskTotal})
		return why
	case r.quorumHeld.Load():
		_, why := decideWithoutQuorum(quorumObservation{held: true})
		return why + ", and PostgreSQL goes on without Patroni"
	}
	return ""
}
