package embedded

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
)

const (
	// joinRetries: the membership may change between our question and etcd's.
	joinRetries = 5
	// handoverTime is what a leader gets to hand over before it stops; measured
	// 10 to 20 ms, up to a heartbeat more when it has to be polled for.
	handoverTime = 500 * time.Millisecond
	// drainTime is how long Stop waits for etcd.Close once raft, data and
	// listeners are closed. Clients' connections end in some milliseconds. Peers
	// dial again over connections that they have, and a race between net/http
	// and etcd's per-read deadlines then keeps those open for up to 5 s; they
	// hold nothing, and end by themselves.
	drainTime = 200 * time.Millisecond
	// stopTime bounds each part of a stop. Nothing should take that long.
	stopTime = 3 * time.Second
	// readyPoll is how often WaitReady looks. All it reads is in memory.
	readyPoll = 20 * time.Millisecond
)

// Server is a running etcd member. Its methods may be called from several
// goroutines, and after its end, when they fail with Err or ErrStopped.
type Server struct {
	cfg    Config
	log    *slog.Logger
	etcd   *embed.Etcd
	es     *etcdserver.EtcdServer
	client *clientv3.Client
	hook   *fatalHook
	rpc    *interceptor

	stopping  *atomic.Bool
	stopOnce  sync.Once
	stopc     chan struct{}
	done      chan struct{}
	err       error // set before done is closed
	defragMu  sync.Mutex
	defrag    atomic.Bool
	lastSizes atomic.Pointer[dbSizes]
}

// Start starts the member and returns when its listeners are up; it is not
// ready then, see WaitReady. ctx bounds the start alone.
//
// With data in cfg.DataDir the member continues from that and InitialCluster is
// not looked at. Without, it makes a new cluster (Bootstrap) or joins the one
// of InitialCluster, which must list it as a learner (AddLearner).
//
// It fails with one of this package's errors: ErrConfig, ErrCorrupt,
// ErrDiskFull, ErrInUse, ErrPortInUse, ErrAddress, ErrOtherCluster,
// ErrNeedsRejoin, ErrNotMember, ErrNoPeer, ErrRemoved. Of these ErrNoPeer,
// ErrDiskFull and ErrNotMember are worth another try later.
func Start(ctx context.Context, cfg Config) (*Server, error) {
	cfg, err := cfg.complete()
	if err != nil {
		return nil, err
	}
	setSegmentSize(cfg.WALSegmentBytes)
	for try := 1; ; try++ {
		p, err := prepare(ctx, cfg)
		if err != nil {
			return nil, err
		}
		s, err := start(ctx, cfg, p)
		if errors.Is(err, errMembershipMoved) && try < joinRetries && ctx.Err() == nil {
			cfg.Log.Debug("membership changed while joining, asking again", "error", err)
			continue
		}
		return s, err
	}
}

func start(ctx context.Context, cfg Config, p plan) (*Server, error) {
	s := &Server{
		cfg: cfg, log: cfg.Log,
		hook: newFatalHook(cfg), rpc: newInterceptor(), stopping: new(atomic.Bool),
		stopc: make(chan struct{}), done: make(chan struct{}),
	}
	if p.memberID != "" {
		s.hook.memberID.Store(&p.memberID)
	}
	ec, err := cfg.embedConfig(p.state, p.cluster, s.rpc.options()...)
	if err != nil {
		return nil, err
	}
	ec.ZapLoggerBuilder = embed.NewZapLoggerBuilder(newZap(s.log.Handler(), s.stopping, s.hook))

	// StartEtcd knows no context, and its goroutine does not come back from a
	// fatal error.
	type result struct {
		etcd *embed.Etcd
		err  error
	}
	started := make(chan result, 1)
	go func() {
		e, err := startEtcd(ec)
		started <- result{e, err}
	}()
	select {
	case r := <-started:
		if r.err != nil {
			return nil, startError(cfg, r.err)
		}
		s.etcd = r.etcd
	case <-s.hook.ch:
		return nil, fmt.Errorf("start etcd: %w", s.hook.err)
	}
	s.es = s.etcd.Server
	id := memberIDString(uint64(s.es.MemberID()))
	s.hook.memberID.Store(&id)
	s.rpc.open(s.es)
	s.client = v3client.New(s.es)
	go s.watch()
	go s.tunePeers()
	if err := ctx.Err(); err != nil {
		s.Stop()
		return nil, fmt.Errorf("start etcd: %w", err)
	}
	s.log.Info("etcd started", "member", id, "data", p.memberID != "", "peer_url", cfg.PeerURL, "client_url", cfg.ClientURL)
	return s, nil
}

// startEtcd turns a panic on this goroutine, where etcd reads its data, into an
// error.
func startEtcd(ec *embed.Config) (e *embed.Etcd, err error) {
	defer func() {
		if r := recover(); r != nil {
			e, err = nil, fmt.Errorf("%w: panic while starting: %v", ErrInternal, r)
		}
	}()
	return embed.StartEtcd(ec)
}

var errMembershipMoved = errors.New("etcd membership changed")

// startError names the cause of a failed StartEtcd. Several of its errors have
// no type, only a text.
func startError(cfg Config, err error) error {
	has := func(part string) bool { return strings.Contains(err.Error(), part) }
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Errorf("%w: %w; find the other process with 'ss -ltnp' and stop it, or change the port", ErrPortInUse, err)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fmt.Errorf("%w: %w; use an address of this host (ip addr)", ErrAddress, err)
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT):
		return fmt.Errorf("%w: %w; free space and start again", ErrDiskFull, err)
	case has("already been bootstrapped"):
		return fmt.Errorf("%w: %w, but %s is empty; %s", ErrNeedsRejoin, err, cfg.DataDir, adviceRejoin)
	case has("does not match with snapshot"), has("of the backend is missing"):
		return fmt.Errorf("%w: %w; %s", ErrCorrupt, err, adviceRejoin)
	case has("error validating peerURLs"), has("member count is unequal"):
		return fmt.Errorf("%w: %w", errMembershipMoved, err)
	case has("cannot fetch cluster info"):
		return fmt.Errorf("%w: %w", ErrNoPeer, err)
	default:
		return fmt.Errorf("start etcd: %w", err)
	}
}

// watch waits for the member's end, wanted or not, and cleans up after it.
func (s *Server) watch() {
	defer close(s.done)
	stopped, errc := s.es.StopNotify(), s.etcd.Err()
	changed := s.es.LeaderChangedNotify()
	for {
		select {
		case <-s.stopc:
			s.shutdown()
			return
		case <-s.hook.ch:
			s.err = s.hook.err
			s.abandon()
			return
		case <-stopped:
			// Nothing but a removal makes etcd stop by itself: it saw its own
			// in the log, or a peer turned it away for it.
			s.err = s.removed()
			s.shutdown()
			return
		case err := <-errc:
			select {
			case <-s.es.StoppingNotify(): // the listeners hear of it first
				errc = nil
				continue
			default:
			}
			s.err = fmt.Errorf("%w: serve clients or peers: %w", ErrInternal, err)
			s.shutdown()
			return
		case <-changed:
			changed = s.es.LeaderChangedNotify()
			s.log.Info("etcd leader changed", "leader", memberIDString(uint64(s.es.Leader())), "self", s.es.Leader() == s.es.MemberID())
		}
	}
}

// removed records the removal: the next Start must refuse this data even when
// the member was away at the time and never saw it in its own log.
func (s *Server) removed() error {
	id := memberIDString(uint64(s.es.MemberID()))
	err := removedError(id)
	if werr := writeRecord(s.cfg.FatalFile, id, err); werr != nil {
		s.log.Error("cannot record that this member was removed", "error", werr)
	}
	return err
}

// shutdown ends a member whose goroutines still answer. The order matters:
// Close alone waits 7 s for a client's open watch, and for ever when the
// cluster has no leader.
func (s *Server) shutdown() {
	s.stopping.Store(true)
	s.rpc.close()
	// Closed here and not by Close, so that the port is free when Stop returns.
	for _, p := range s.etcd.Peers {
		if err := p.Close(); err != nil {
			s.log.Debug("close peer listener", "error", err)
		}
	}
	clientClosed := inTime(stopTime, func() {
		if err := s.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
			s.log.Debug("close in-process client", "error", err)
		}
	})
	go s.es.Stop() // hands leadership over, then stops
	select {
	case <-s.es.StopNotify():
	case <-time.After(handoverTime):
		if !inTime(stopTime, s.es.HardStop) || !clientClosed {
			s.log.Warn("etcd does not stop, leaving it behind", "client_closed", clientClosed)
		}
	}
	inTime(drainTime, s.etcd.Close)
}

// inTime reports whether f ended within limit; else f goes on in the background.
func inTime(limit time.Duration, f func()) bool {
	done := make(chan struct{})
	go func() { defer close(done); f() }()
	select {
	case <-done:
		return true
	case <-time.After(limit):
		return false
	}
}

// abandon frees the ports of a member that has failed. Its goroutines are
// blocked; to wait for any of them would be to wait for ever.
func (s *Server) abandon() {
	s.stopping.Store(true)
	s.rpc.close()
	for _, l := range s.etcd.Clients {
		_ = l.Close() // the process is about to end
	}
	for _, p := range s.etcd.Peers {
		_ = p.Close()
	}
}

// Stop ends the member and returns when it has let go of data and ports; a
// leader hands over first. It takes well under a second, and a few at the very
// most, without quorum and with clients' streams open too. Err stays nil. It
// may be called more than once.
func (s *Server) Stop() {
	s.stopOnce.Do(func() { close(s.stopc) })
	<-s.done
}

// Done is closed when the member has ended.
func (s *Server) Done() <-chan struct{} { return s.done }

// Err tells why the member ended by itself: ErrRemoved, or after a fatal error
// ErrDiskFull, ErrCorrupt, ErrIO, ErrNeedsRejoin or ErrInternal. It is nil while
// the member runs and after Stop.
func (s *Server) Err() error {
	select {
	case <-s.done:
		return s.err
	default:
		return nil
	}
}

// ended returns the error for a call on a member that has ended, else nil.
func (s *Server) ended() error {
	select {
	case <-s.done:
		if s.err != nil {
			return s.err
		}
		return ErrStopped
	case <-s.hook.ch:
		return s.hook.err
	default:
		return nil
	}
}

// Client is the in-process client: no socket, no certificate. It works without
// a client listener, and on a learner for everything, linearizable reads and
// writes included (they go through the leader). It ends with the Server; do not
// close it.
func (s *Server) Client() *clientv3.Client { return s.client }

// LeaderChanged returns a channel that is closed when a member becomes leader.
// Losing a leader does not close it (see Status.HasLeader). Take a new channel
// for each change; changes in between can be missed.
func (s *Server) LeaderChanged() <-chan struct{} { return s.es.LeaderChangedNotify() }

// WaitReady waits until the member can be used: it knows a leader, the cluster's
// version is decided (Patroni crashes on an undecided one) and, with a client
// listener, that port serves. When ctx ends first the error says what was
// missing; when the member ends it is Err or ErrStopped.
func (s *Server) WaitReady(ctx context.Context) error {
	tick := time.NewTicker(readyPoll)
	defer tick.Stop()
	for {
		missing := s.missing()
		if missing == "" {
			return nil
		}
		select {
		case <-tick.C:
		case <-s.done:
			return fmt.Errorf("wait for etcd: %w", s.ended())
		case <-ctx.Done():
			return fmt.Errorf("wait for etcd: %s: %w", missing, ctx.Err())
		}
	}
}

func (s *Server) missing() string {
	if err := s.ended(); err != nil {
		return "etcd has ended"
	}
	if s.es.Leader() == 0 {
		return fmt.Sprintf("no leader yet: a majority of the %d voters must run and reach each other",
			len(voters(s.members())))
	}
	if s.es.ClusterVersion() == nil {
		return "the cluster version is not decided yet"
	}
	if s.cfg.ClientURL != "" {
		select {
		case <-s.es.ReadyNotify():
		default:
			return "the client port does not serve yet: this member has not made itself known through the leader"
		}
	}
	return ""
}
