package postgres

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/internal/pgdata"
)

const (
	// tryNewEvery is how often it is tried whether new connections are served.
	tryNewEvery = 2 * time.Second
	// lastPoll is how often it is looked whether the last process of a server
	// without postmaster has gone, unless the look costs much.
	lastPoll = 5 * time.Millisecond
	// reproveEvery is how long a proof of Gone holds while the pid file stays as it
	// was in the proof: a server that starts writes it first.
	reproveEvery = time.Second
)

// ErrRunning says that Run runs already.
var ErrRunning = errors.New("already running")

// ErrNoServer says that there is no PostgreSQL to ask.
var ErrNoServer = errors.New("PostgreSQL is not running")

// Watcher watches one PostgreSQL. Its methods may be called from any goroutine.
type Watcher struct {
	cfg         Config
	tryNewEvery time.Duration

	turn       chan struct{} // held by who asks; guards what follows
	running    bool
	pm         *postmaster
	conn       *pgx.Conn // to a child of pm
	proof      proof
	streamedAt time.Duration

	mu     sync.Mutex // guards what follows
	latest Probe
	subs   map[chan Probe]struct{}
}

// proof is one of Gone.
type proof struct {
	valid bool
	at    time.Duration
	file  pgdata.PIDFile
}

// New returns a watcher. It does nothing before Run or Now is called.
func New(cfg Config) *Watcher {
	cfg = cfg.withDefaults()
	return &Watcher{
		cfg:         cfg,
		tryNewEvery: tryNewEvery,
		turn:        make(chan struct{}, 1),
		latest:      Probe{At: cfg.Now(), Kind: Unknown, Err: "not asked yet"},
		subs:        map[chan Probe]struct{}{},
	}
}

// Run probes until ctx ends, and returns nil then. It fails with ErrRunning.
func (w *Watcher) Run(ctx context.Context) error {
	if err := w.take(ctx); err != nil {
		return nil
	}
	if w.running {
		w.give()
		return fmt.Errorf("watch PostgreSQL: %w", ErrRunning)
	}
	w.running = true
	w.give()

	var wg sync.WaitGroup
	wg.Go(func() { w.tryNew(ctx) })
	w.loop(ctx)
	wg.Wait()

	w.turn <- struct{}{}
	w.running = false
	w.give()
	return nil
}

func (w *Watcher) loop(ctx context.Context) {
	t := time.NewTimer(0)
	defer t.Stop()
	var ended <-chan struct{} // of the postmaster that was seen last
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		case <-ended:
		}
		if w.take(ctx) != nil {
			return
		}
		from := w.cfg.Now()
		p := w.probe(ctx)
		took := w.cfg.Now() - from
		ended = nil
		if w.pm != nil {
			ended = w.pm.life.Done()
		}
		dying := w.pm == nil && p.Kind == Unknown
		w.give()
		next := w.cfg.Every
		if dying { // a tenth of one processor at most
			next = min(next, max(lastPoll, 9*took))
		}
		t.Reset(next)
	}
}

// Latest returns the last probe. Before the first it is Unknown.
func (w *Watcher) Latest() Probe {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.latest
}

// Subscribe returns a channel with the last probe and then each one that is
// made, and a function that ends the subscription and closes the channel. To a
// reader that is slow the newest is kept and the ones before are lost.
func (w *Watcher) Subscribe() (<-chan Probe, func()) {
	ch := make(chan Probe, 1)
	w.mu.Lock()
	defer w.mu.Unlock()
	ch <- w.latest
	w.subs[ch] = struct{}{}
	return ch, func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		if _, ok := w.subs[ch]; ok {
			delete(w.subs, ch)
			close(ch)
		}
	}
}

// Follow hands each the last probe and then those that are made, as
// [Watcher.Subscribe] does, until ctx ends.
func (w *Watcher) Follow(ctx context.Context, each func(Probe)) {
	news, stop := w.Subscribe()
	defer stop()
	for {
		select {
		case <-ctx.Done():
			return
		case p := <-news:
			each(p)
		}
	}
}

// Now makes one fresh probe: its At is later than the call. It may be used
// without Run. When ctx ends before the answer comes, the probe is Unknown.
func (w *Watcher) Now(ctx context.Context) Probe {
	if err := w.take(ctx); err != nil {
		return Probe{At: w.cfg.Now(), Kind: Unknown, Err: fmt.Sprintf("ask PostgreSQL: %v", err)}
	}
	defer w.give()
	return w.probe(ctx)
}

// TerminateWalSenders ends the replication connections of the standby that calls
// itself applicationName, and returns how many there were. Commits that wait for
// a synchronous standby that is lost wait no longer once it is not in the list of
// synchronous standbys either. It fails with ErrNoServer.
func (w *Watcher) TerminateWalSenders(ctx context.Context, applicationName string) (int, error) {
	if err := w.take(ctx); err != nil {
		return 0, fmt.Errorf("terminate walsenders of %s: %w", applicationName, err)
	}
	defer w.give()
	pm, err := w.findPostmaster()
	if err == nil && pm == nil {
		err = ErrNoServer
	}
	n := 0
	if err == nil {
		err = w.use(ctx, pm, func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, terminateSQL, applicationName).Scan(&n)
		})
	}
	if err != nil {
		return 0, fmt.Errorf("terminate walsenders of %s: %w", applicationName, err)
	}
	return n, nil
}

func (w *Watcher) take(ctx context.Context) error {
	select {
	case w.turn <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *Watcher) give() {
	if !w.running {
		w.letGo()
	}
	<-w.turn
}

func (w *Watcher) letGo() {
	w.dropConn()
	if w.pm != nil {
		w.pm.release()
		w.pm = nil
	}
}

// probe looks once and publishes what it saw, unless ctx cut it short.
func (w *Watcher) probe(ctx context.Context) Probe {
	p := w.look(ctx, Probe{At: w.cfg.Now(), Kind: Unknown, StreamedAt: w.streamedAt})
	p.DiskFree, p.DiskTotal = diskSpace(w.cfg.DataDir)
	w.streamedAt = p.StreamedAt
	if ctx.Err() == nil {
		w.publish(p)
	}
	return p
}

func (w *Watcher) look(ctx context.Context, p Probe) Probe {
	pm, err := w.findPostmaster()
	if err != nil {
		p.Err = err.Error()
		return p
	}
	if pm != nil {
		q := w.ask(ctx, pm, p)
		if pm.alive() {
			w.proof.valid = false
			return q
		}
		// It has ended meanwhile: whatever it said is over.
		p.StreamedAt = q.StreamedAt
		w.letGo()
	}
	file, err := readPIDFile(w.cfg.DataDir)
	if err == nil && w.proof.valid && w.proof.file == file && p.At-w.proof.at < reproveEvery {
		p.Kind = Gone
		return p
	}
	w.proof.valid = false
	file, left, err := proveGone(w.cfg.DataDir)
	switch {
	case err != nil:
		p.Err = fmt.Sprintf("see whether PostgreSQL is gone: %v", err)
	case left != "":
		p.Err = left
	default:
		p.Kind, w.proof = Gone, proof{valid: true, at: p.At, file: file}
	}
	return p
}

// findPostmaster returns the living postmaster of the data directory, or nil.
func (w *Watcher) findPostmaster() (*postmaster, error) {
	if w.pm != nil {
		if w.pm.alive() {
			return w.pm, nil
		}
		w.letGo()
	}
	file, err := readPIDFile(w.cfg.DataDir)
	if err != nil || file.PID <= 0 {
		return nil, err
	}
	w.pm, err = holdPostmaster(file, w.cfg.DataDir)
	return w.pm, err
}

// ask asks the server of a postmaster for its role and judges the answer.
func (w *Watcher) ask(ctx context.Context, pm *postmaster, p Probe) Probe {
	p.PID, p.Started = pm.pid, pm.started
	empty := p
	err := w.use(ctx, pm, func(ctx context.Context, conn *pgx.Conn) error {
		q, err := question(ctx, conn, empty)
		if q.Kind != Unknown {
			p = q
		}
		return err
	})
	if err != nil {
		p.Err = err.Error()
	}
	if ctx.Err() != nil {
		return p // cut short by the caller: no fault of the server
	}
	pm.kept.note(p.At, w.cfg.Now(), err == nil || answered(err) || p.Kind != Unknown, w.cfg.Every+2*w.cfg.Timeout)
	switch {
	case pm.kept.hung(w.cfg.HungAfter):
		p.Kind, p.Err = Hung, fmt.Sprintf("no answer for %v: %s", pm.kept.total.Round(time.Millisecond), p.Err)
	case pm.fresh.hung(w.cfg.HungAfter):
		p.Kind, p.Err = Hung, fmt.Sprintf("new connections get no answer for %v", pm.fresh.total.Round(time.Millisecond))
	case p.Kind == Unknown && refused(err):
		p.Kind = Starting
	}
	return p
}

// tryNew tries time and again whether a new connection is served. While the
// kept one is silent, that one is made anew, which is trial enough.
func (w *Watcher) tryNew(ctx context.Context) {
	t := time.NewTicker(w.tryNewEvery)
	defer t.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		if w.take(ctx) != nil {
			return
		}
		pm := w.pm
		if pm != nil && pm.kept.count > 0 {
			pm = nil
		}
		w.give()
		if pm == nil {
			continue
		}
		from := w.cfg.Now()
		ok := w.served(ctx, pm)
		to := w.cfg.Now()
		if w.take(ctx) != nil {
			return
		}
		pm.fresh.note(from, to, ok, w.tryNewEvery+2*w.cfg.Timeout)
		w.give()
	}
}

// served reports whether a new connection gets any answer.
func (w *Watcher) served(ctx context.Context, pm *postmaster) bool {
	ctx, cancel := context.WithTimeout(ctx, w.cfg.Timeout)
	defer cancel()
	defer context.AfterFunc(pm.life, cancel)()
	conn, err := w.connect(ctx, pm)
	if err != nil {
		return answered(err)
	}
	discard(conn)
	return true
}

// publish is called with the turn held, so that probes come in order.
func (w *Watcher) publish(p Probe) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if was := w.latest; was.Kind != p.Kind || was.PID != p.PID {
		w.cfg.Log.Info("PostgreSQL is "+string(p.Kind), "was", string(was.Kind), "pid", p.PID, "timeline", p.Timeline, "err", p.Err)
	}
	w.latest = p
	for ch := range w.subs {
		select {
		case <-ch: // an older one that nobody has read
		default:
		}
		ch <- p
	}
}
