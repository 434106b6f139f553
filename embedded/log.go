package embedded

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapCore passes etcd's log to slog. etcd tells at Info what an operator reads
// at Debug, and at Debug what nobody reads; both go down one level.
type zapCore struct {
	h        slog.Handler
	stopping *atomic.Bool
}

func newZap(h slog.Handler, stopping *atomic.Bool, hook zapcore.CheckWriteHook) *zap.Logger {
	return zap.New(&zapCore{h: h, stopping: stopping}, zap.WithFatalHook(hook), zap.WithPanicHook(hook))
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
	return &zapCore{h: c.h.WithAttrs(attrs(fields)), stopping: c.stopping}
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
	rec := slog.NewRecord(ent.Time, c.level(ent), ent.Message, 0)
	if ent.LoggerName != "" {
		rec.AddAttrs(slog.String("logger", ent.LoggerName))
	}
	rec.AddAttrs(attrs(fields)...)
	return c.h.Handle(context.Background(), rec)
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
