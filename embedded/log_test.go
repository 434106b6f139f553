package embedded

import (
	"bytes"
	"fmt"
	"log/slog"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// clock is a time that a test sets.
type clock struct{ at time.Time }

func (c *clock) Now() time.Time                       { return c.at }
func (c *clock) NewTicker(time.Duration) *time.Ticker { panic("not used") }

// TestRepeatedLines: what etcd says again and again of one peer is told at once,
// and then once a minute with a count. Nothing is lost of it at Debug.
func TestRepeatedLines(t *testing.T) {
	var out bytes.Buffer
	var stopping atomic.Bool
	h := slog.NewTextHandler(&out, &slog.HandlerOptions{Level: slog.LevelDebug})
	now := &clock{at: time.Unix(1_800_000_000, 0)}
	lg := newZap(h, &stopping, zapcore.WriteThenPanic).WithOptions(zap.WithClock(now))
	const dropped = "dropped internal Raft message since sending buffer is full"
	var got []string
	tell := func(after time.Duration, f func()) {
		now.at = now.at.Add(after)
		out.Reset()
		f()
		_, line, _ := strings.Cut(strings.TrimSpace(out.String()), " ")
		got = append(got, strings.ReplaceAll(line, `"`+dropped+`"`, "dropped"))
	}
	drop := func(peer string) func() { return func() { lg.Warn(dropped, zap.String("remote-peer-id", peer)) } }
	tell(0, drop("a"))
	tell(time.Second, drop("a"))
	tell(0, drop("b"))
	tell(0, func() { lg.With(zap.Int("n", 1)).Warn(dropped, zap.String("remote-peer-id", "a")) })
	tell(0, func() { lg.Warn("other", zap.String("remote-peer-id", "a")) })
	tell(58*time.Second, drop("a"))
	tell(time.Second, drop("a"))
	tell(time.Second, drop("a"))
	tell(time.Minute, drop("a"))
	tell(time.Hour, drop("a"))
	for range 2 {
		tell(0, func() { lg.Info("as always") })
	}
	want := []string{
		"level=WARN msg=dropped remote-peer-id=a",
		"level=DEBUG msg=dropped remote-peer-id=a",
		"level=WARN msg=dropped remote-peer-id=b",
		"level=DEBUG msg=dropped n=1 remote-peer-id=a",
		"level=WARN msg=other remote-peer-id=a",
		"level=DEBUG msg=dropped remote-peer-id=a",
		"level=WARN msg=dropped remote-peer-id=a repeated=3",
		"level=DEBUG msg=dropped remote-peer-id=a",
		"level=WARN msg=dropped remote-peer-id=a repeated=1",
		"level=WARN msg=dropped remote-peer-id=a",
		`level=DEBUG msg="as always"`,
		`level=DEBUG msg="as always"`,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("lines (-want +got):\n%s", diff)
	}
	memory := &told{by: map[string]*repeats{}}
	for i := range 3 * toldMost {
		memory.again(fmt.Sprint(i), "", now.at)
	}
	if len(memory.by) > toldMost {
		t.Errorf("%d messages are remembered", len(memory.by))
	}
}
