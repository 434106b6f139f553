package faults

import (
	"slices"
	"sync"
	"time"
)

// Kind is what an operation does.
type Kind string

// Kinds of operations. Append adds a row with an id of its own; the others work
// on a register.
const (
	Append Kind = "append"
	Read   Kind = "read"
	Write  Kind = "write"
	CAS    Kind = "cas"
)

// Outcome is what the client knows of its operation.
type Outcome string

// Outcomes. Only Done has a server and a result; Unknown may yet take effect at
// any later time.
const (
	Done    Outcome = "done"    // acknowledged
	Refused Outcome = "refused" // certainly without effect
	Unknown Outcome = "unknown"
)

// Op is one operation of a client.
type Op struct {
	Client  string
	Routed  bool  // by way of HAProxy; else straight to a PostgreSQL
	ID      int64 // of the row that Append adds
	Kind    Kind
	Key     int
	Old     int  // what CAS expects
	Value   int  // what Write and CAS put, and Read found
	Swapped bool // CAS found what it expected

	Invoke, Return time.Duration // since the history's beginning
	Outcome        Outcome
	Server         string // that took it
	Timeline       int    // on which it did; 0 for Read and a CAS in vain
	Err            string
}

// History collects operations. Its methods may be called from several
// goroutines at once.
type History struct {
	begin time.Time

	mu  sync.Mutex
	ops []Op
}

// NewHistory begins an empty history now.
func NewHistory() *History { return &History{begin: time.Now()} }

// Now is the time since the history's beginning, on the monotonic clock.
func (h *History) Now() time.Duration { return time.Since(h.begin) }

// At converts a reading of the clock.
func (h *History) At(t time.Time) time.Duration { return t.Sub(h.begin) }

func (h *History) add(op Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, op)
}

// Ops returns what has ended so far, in that order.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ops)
}
