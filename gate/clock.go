package gate

import (
	"time"

	"golang.org/x/sys/unix"
)

// Moment is one reading of a host's clocks. Moments of different hosts, and
// of one host before and after a boot, have nothing to do with each other.
type Moment struct {
	// Mono is the time on a monotonic clock since a point that stays the same
	// while the host runs. Everything is reckoned with it.
	Mono time.Duration
	// Wall is the wall clock read just before Mono, in nanoseconds since 1970.
	// It serves one purpose: the kernel can compare it by itself, at each
	// packet, so that a process that is stopped between reading the clocks and
	// writing to the kernel cannot open the gate too late.
	Wall int64
}

// Add returns the moment d later on both clocks.
func (m Moment) Add(d time.Duration) Moment {
	return Moment{Mono: m.Mono + d, Wall: m.Wall + int64(d)}
}

// Sub returns the time from o to m on the monotonic clock.
func (m Moment) Sub(o Moment) time.Duration { return m.Mono - o.Mono }

// Clock reads the host's clocks.
type Clock interface {
	Now() Moment
}

// SystemClock is the host's own clock. Its monotonic part is the kernel's raw
// one: the adjusted one may run up to 8.3% fast or slow while chrony corrects the
// time.
type SystemClock struct{}

// Now implements Clock. The wall clock is read first: whoever is stopped
// between the two readings gets a wall deadline that is too early, never one
// that is too late.
func (SystemClock) Now() Moment {
	wall := time.Now().UnixNano()
	var raw unix.Timespec
	// It cannot fail for a clock that every kernel has.
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC_RAW, &raw)
	return Moment{Wall: wall, Mono: time.Duration(raw.Nano())}
}
