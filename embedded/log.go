package embedded

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapCore passes etcd's log to slog. etcd tells at Info what an operator reads
// at Debug, and at Debug what nobody reads; both go down one level.
type zapCore struct {
	h        slog.Handler
	stopping *atomic.Bool
	told     *told
}

func newZap(h slog.Handler, stopping *atomic.Bool, hook zapcore.CheckWriteHook) *zap.Logger {
	return zap.New(&zapCore{h: h, stopping: stopping, told: &told{by: map[string]*repeats{}}}, zap.WithFatalHook(hook), zap.WithPanicHook(hook))
}

// tellEvery is how often a message about a peer is told that comes again and
// again: while a member is away there are some every second.
const tellEvery = time.Minute

// told is what was told, by message and peer.
type told struct {
	mu sync.Mutex
	by map[string]*repeats
}

type repeats struct {
	at   time.Time // when it was told last
	kept int       // how many have been kept back since
}

// toldMost bounds the memory for messages that are each another.
const toldMost = 1000

// again says whether a message is to be kept back, and otherwise how many were.
func (t *told) again(message, peer string, at time.Time) (keep bool, kept int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	key := message + "\n" + peer
	r := t.by[key]
	if r != nil && at.Sub(r.at) < tellEvery {
		r.kept++
		return true, 0
	}
	if r == nil && len(t.by) == toldMost {
		clear(t.by)
	}
	if r != nil {
		kept = r.kept
	}
	t.by[key] = &repeats{at: at}
	return false, kept
}

func slogLevel(l zapcore.Level) slog.Level {
	switch {
	case l < zapcore.InfoLevel:
		return slog.LevelDebug - 4
	case l == zapcore.InfoLevel:
		return slog.LevelDebug
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	default:
		return slog.LevelError
	}
}

// harmless are messages that sound worse than they are.
var harmless = map[string]bool{
	// One port for gRPC and HTTP: Patroni needs that.
	"Running http and grpc server on single port. This is not recommended for production.": true,
	// Refusals that the caller gets as an error, tries again and reports.
	"rejecting promote learner: learner is not ready":                   true,
	"Validation on configuration change failed":                         true,
	"rejecting member promote; started member will be less than quorum": true,
	// What Server.watch reports in its own words.
	"setting up serving from embedded etcd failed.": true,
	// A new member before it has the leader's data.
	"failed to update storage version": true,
	"Failed to detect schema version":  true,
	// etcd's own user authentication, which is off, and addresses of a lab.
	"simple token is not cryptographically signed":                                 true,
	"unable to set a member local address due to lack of suitable local addresses": true,
}

// level demotes what is no news. While we stop, every listener and stream
// reports that it was closed, three of them as errors.
func (c *zapCore) level(ent zapcore.Entry) slog.Level {
	l := slogLevel(ent.Level)
	if ent.Level < zapcore.DPanicLevel && l > slog.LevelDebug && (c.stopping.Load() || harmless[ent.Message]) {
		return slog.LevelDebug
	}
	return l
}

// Enabled implements zapcore.Core.
func (c *zapCore) Enabled(l zapcore.Level) bool {
	return c.h.Enabled(context.Background(), slogLevel(l))
}

// With implements zapcore.Core.
func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	return &zapCore{h: c.h.WithAttrs(attrs(fields)), stopping: c.stopping, told: c.told}
}

// Check implements zapcore.Core.
func (c *zapCore) Check(ent zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.h.Enabled(context.Background(), c.level(ent)) {
		return ce.AddCore(ent, c)
	}
	return ce
}

// Write implements zapcore.Core.
func (c *zapCore) Write(ent zapcore.Entry, fields []zapcore.Field) error {
	level, all := c.level(ent), attrs(fields)
	kept := 0
	if ent.Level < zapcore.DPanicLevel && level > slog.LevelDebug {
		var keep bool
		if keep, kept = c.told.again(ent.Message, peerOf(all), ent.Time); keep {
			level = slog.LevelDebug
		}
	}
	if !c.h.Enabled(context.Background(), level) {
		return nil
	}
	rec := slog.NewRecord(ent.Time, level, ent.Message, 0)
	if ent.LoggerName != "" {
		rec.AddAttrs(slog.String("logger", ent.LoggerName))
	}
	rec.AddAttrs(all...)
	if kept > 0 {
		rec.AddAttrs(slog.Int("repeated", kept))
	}
	return c.h.Handle(context.Background(), rec)
}

// peerOf returns the member that a message is about, "" for none.
func peerOf(attrs []slog.Attr) string {
	for _, a := range attrs {
		if slices.Contains([]string{"remote-peer-id", "peer-id", "address"}, a.Key) {
			return a.Value.String()
		}
	}
	return ""
}

// Sync implements zapcore.Core.
func (c *zapCore) Sync() error { return nil }

func attrs(fields []zapcore.Field) []slog.Attr {
	out := make([]slog.Attr, 0, len(fields))
	for _, f := range fields {
		enc := zapcore.NewMapObjectEncoder()
		f.AddTo(enc)
		if v, ok := enc.Fields[f.Key]; ok { // not "errorVerbose" and its like
			out = append(out, slog.Any(f.Key, v))
		}
	}
	return out
}
