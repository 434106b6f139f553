package embedded

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

func TestClassify(t *testing.T) {
	tests := []struct {
		msg  string
		err  error
		want error
	}{
		{"failed to save Raft hard state and entries", &os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, ErrDiskFull},
		{"failed to commit tx", errors.New("file resize error: truncate db: no space left on device"), ErrDiskFull},
		{"failed to commit tx", &os.PathError{Op: "write", Path: "x", Err: syscall.EDQUOT}, ErrDiskFull},
		{"failed to save Raft hard state and entries", &os.PathError{Op: "write", Path: "x", Err: syscall.EIO}, ErrIO},
		{"failed to open WAL", &os.PathError{Op: "open", Path: "x", Err: syscall.EROFS}, ErrIO},
		{"failed to read WAL, cannot be repaired", wal.ErrCRCMismatch, ErrCorrupt},
		{"failed to open database", errors.New("invalid database"), ErrCorrupt},
		{"tocommit(208) is out of range [lastIndex(0)]. Was the raft log corrupted, truncated, or lost?", nil, ErrNeedsRejoin},
		{"removed all voters", nil, ErrInternal},
	}
	for _, tt := range tests {
		fields := []zapcore.Field{zap.String("path", "p")}
		if tt.err != nil {
			fields = append(fields, zap.Error(tt.err))
		}
		got := classify(tt.msg, fields)
		if !errors.Is(got, tt.want) || !strings.Contains(got.Error(), tt.msg) {
			t.Errorf("%s (%v): %v, want %v", tt.msg, tt.err, got, tt.want)
		}
	}
}

func TestRecordRoundTrip(t *testing.T) {
	path := filepath.Join(t.TempDir(), "etcd-fatal.json")
	if r, err := readRecord(path); r != nil || err != nil {
		t.Fatalf("no record: %v, %v", r, err)
	}
	for _, c := range causes {
		if err := writeRecord(path, "ab", fmt.Errorf("%w: because", c.err)); err != nil {
			t.Fatal(err)
		}
		r, err := readRecord(path)
		if err != nil || !errors.Is(r.err(), c.err) || r.Cause != c.name {
			t.Errorf("%s: %+v, %v", c.name, r, err)
		}
		stands := errors.Is(c.err, ErrCorrupt) || errors.Is(c.err, ErrRemoved) || errors.Is(c.err, ErrNeedsRejoin)
		if r.refuses("ab") != stands || r.refuses("cd") {
			t.Errorf("%s: refuses own data %v, other data %v", c.name, r.refuses("ab"), r.refuses("cd"))
		}
	}
	for range 2 {
		if err := clearRecord(path); err != nil {
			t.Fatal(err)
		}
	}
}

func TestZapToSlog(t *testing.T) {
	var out bytes.Buffer
	var stopping atomic.Bool
	h := slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})
	lg := newZap(h, &stopping, zapcore.WriteThenPanic)
	tests := []struct {
		log  func()
		want string // "" = nothing
	}{
		{func() { lg.Debug("noise") }, ""},
		{func() { lg.Info("talk", zap.Int("n", 3)) }, `level=DEBUG msg=talk n=3`},
		{func() { lg.Warn("careful", zap.Strings("urls", []string{"a", "b"})) }, `level=WARN msg=careful urls="[a b]"`},
		{func() { lg.Named("raft").Error("bad", zap.Error(errors.New("why"))) }, `level=ERROR msg=bad logger=raft error=why`},
		{func() { lg.With(zap.String("k", "v")).Warn("with") }, `level=WARN msg=with k=v`},
		{func() { lg.Error("setting up serving from embedded etcd failed.") }, `level=DEBUG`},
		{func() { stopping.Store(true); lg.Error("listener closed") }, `level=DEBUG msg="listener closed"`},
	}
	for _, tt := range tests {
		out.Reset()
		tt.log()
		got := out.String()
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("got %q, want %q", got, tt.want)
		}
	}
	out.Reset()
	func() {
		defer func() {
			if recover() == nil {
				t.Error("the hook did not run for Fatal")
			}
		}()
		lg.Fatal("dead")
	}()
	if !strings.Contains(out.String(), `level=ERROR msg=dead`) {
		t.Errorf("fatal while stopping logged as %q", out.String())
	}
}
