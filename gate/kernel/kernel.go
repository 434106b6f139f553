package kernel

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"pgha/gate"
	"pgha/internal/nftwatch"
)

// MinRemaining is the shortest time for which Open opens the gate. Kernels
// round shorter timeouts to a tick (up to 10 ms), and some of them down to
// nothing, which to them means "for ever".
const MinRemaining = 10 * time.Millisecond

var (
	// ErrLate says that the gate was to be opened until a moment that has
	// already passed, or is less than MinRemaining away. The gate is shut.
	ErrLate = errors.New("the promise has run out")
	// ErrNotInstalled says that the kernel has no gate to open.
	ErrNotInstalled = errors.New("the gate's table is not in the kernel or not whole: install it")
)

const changedMeanwhile = "somebody has just changed it"

// Role says as what a node's PostgreSQL serves its clients.
type Role string

// The roles.
const (
	Owner   Role = "owner"
	Replica Role = "replica"
)

// Counter is what a rule has matched since the table was written.
type Counter struct {
	Packets uint64
	Bytes   uint64
}

// State is the gate as the kernel holds it.
type State struct {
	// Installed says that the table is there and exactly right. Where it is
	// false the other fields are zero, and the port must be taken for ungated.
	Installed bool
	// Open says that traffic passes at this moment.
	Open bool
	// Role is the role whose element the kernel holds, empty for none. An
	// element that the guard overrules has a role and is not open.
	Role Role
	// Remaining is the time until the kernel shuts the gate by itself: the
	// shorter one of the element's timeout and the guard. Zero when shut.
	Remaining time.Duration
	// Moved says that a shut gate answers with resets.
	Moved bool
	// Dropped and Reset count the packets refused, in either direction.
	Dropped, Reset Counter
}

// Kernel is the gate of one port. Its methods may be called from several
// goroutines; one works at a time. They check their context before they begin,
// and then take well under a millisecond, so it cannot end them in the middle.
type Kernel struct {
	log   *slog.Logger
	port  uint16
	netns int // file descriptor of a network namespace, 0 for the process's own
	clock gate.Clock

	beforeSend func() // tests stop here between computing and sending

	mu   sync.Mutex // one transaction at a time
	link *link      // nil when there is none yet, or after an error

	// address is the link's netlink address, by which Watch knows our changes.
	address atomic.Uint32
}

// Option changes how a Kernel works.
type Option func(*Kernel)

// InNetNS makes the Kernel work in the network namespace that fd refers to. fd
// must stay open as long as the Kernel is used.
func InNetNS(fd int) Option { return func(k *Kernel) { k.netns = fd } }

// WithClock replaces the host's clock in Open. The kernel's own clock, with
// which it compares the wall time, stays what it is.
func WithClock(c gate.Clock) Option { return func(k *Kernel) { k.clock = c } }

// New makes the gate of the TCP port. It fails where the kernel has no
// nf_tables or the process has no CAP_NET_ADMIN; it changes nothing.
func New(log *slog.Logger, port uint16, opts ...Option) (*Kernel, error) {
	if port == 0 {
		return nil, errors.New("make gate: the port is 0")
	}
	k := &Kernel{log: log.With("component", "gate"), port: port, clock: gate.SystemClock{}, beforeSend: func() {}}
	for _, opt := range opts {
		opt(k)
	}
	if _, err := k.Read(context.Background()); err != nil {
		return nil, errors.Join(err, k.Close())
	}
	return k, nil
}

// Close ends the connection to the kernel and leaves the gate as it is. A
// Kernel that is used again connects again.
func (k *Kernel) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.disconnect()
}

// Install puts the table into the kernel, shut. Where it is there and right,
// nothing is written, and an open gate stays open for the rest of its time;
// where it is there and wrong (another port, altered rules), it is replaced in
// one batch.
func (k *Kernel) Install(ctx context.Context) error {
	err := k.transaction(ctx, func(l *link) error {
		_, diff, err := l.state(k.port)
		if err != nil || diff == "" {
			return err
		}
		return k.replace(l, diff, false)
	})
	if err != nil {
		return fmt.Errorf("install gate: %w", err)
	}
	return nil
}

// Open lets traffic pass until the moment given and no longer, in place of
// whatever was allowed before, and ends the state of Moved. Repeating it in
// time is a refresh that no packet notices. After an error other than ErrLate
// the kernel holds what it held before.
//
// The monotonic part of the moment is what counts; the wall part goes to the
// kernel as it is. Where the wall clock has meanwhile been set beyond it, Open
// succeeds and the kernel lets nothing pass.
//
// Where less than MinRemaining is left, the gate is shut, as by Shut, and the
// error is ErrLate.
func (k *Kernel) Open(ctx context.Context, role Role, until gate.Moment) error {
	if role != Owner && role != Replica {
		return fmt.Errorf("open gate: unknown role %q", role)
	}
	late := false
	err := k.transaction(ctx, func(l *link) error {
		l.flushSets(setReplica, setOwner)
		// The rest of the time is computed last: everything that follows delays
		// the end of the element.
		remaining := until.Sub(k.clock.Now()).Truncate(time.Millisecond)
		if late = remaining < MinRemaining; late {
			l.setGuard(0)
		} else {
			l.setGuard(until.Wall)
			l.flushSets(setMoved)
			if err := l.addPort(string(role), k.port, remaining); err != nil {
				return err
			}
		}
		k.beforeSend()
		err := l.nft.Flush()
		if late {
			return k.settle(l, err, isShut, nil)
		}
		return err
	})
	if errors.Is(err, unix.ENOENT) {
		err = fmt.Errorf("%w (%w)", ErrNotInstalled, err)
	}
	if late {
		err = errors.Join(ErrLate, err)
	}
	if err != nil {
		return fmt.Errorf("open gate as %s: %w", role, err)
	}
	return nil
}

// Shut lets no traffic pass from now on, and proves it by reading the table
// back. A table that is missing or wrong is replaced. After an error the gate
// may be open until the last moment given to Open.
func (k *Kernel) Shut(ctx context.Context) error {
	err := k.transaction(ctx, func(l *link) error {
		l.flushSets(setReplica, setOwner)
		l.setGuard(0)
		return k.settle(l, l.nft.Flush(), isShut, nil)
	})
	if err != nil {
		return fmt.Errorf("shut gate: %w", err)
	}
	return nil
}

// Moved says whether ownership is known to have moved to another node. While it
// has, the gate is shut, and TCP to the port is answered with a reset, so that
// clients, those with established connections too, give up instead of waiting.
// With on false a shut gate drops again. The next Open ends it as well. The
// result is read back; a table that is missing or wrong is replaced.
func (k *Kernel) Moved(ctx context.Context, on bool) error {
	err := k.transaction(ctx, func(l *link) error {
		l.flushSets(setMoved)
		if on {
			l.flushSets(setReplica, setOwner)
			l.setGuard(0)
			if err := l.addPort(setMoved, k.port, 0); err != nil {
				return err
			}
		}
		return k.settle(l, l.nft.Flush(), func(s State) bool { return s.Moved == on && (!on || isShut(s)) }, &on)
	})
	if err != nil {
		return fmt.Errorf("set gate's moved to %t: %w", on, err)
	}
	return nil
}

// Read gives the gate as the kernel holds it. A kernel without the table is no
// error.
func (k *Kernel) Read(ctx context.Context) (State, error) {
	var s State
	err := k.transaction(ctx, func(l *link) (err error) {
		s, _, err = l.state(k.port)
		return err
	})
	if err != nil {
		return State{}, fmt.Errorf("read gate: %w", err)
	}
	return s, nil
}

// Remove deletes the table, and with it the gate: from then on everything
// passes. A table that is not there is no error.
func (k *Kernel) Remove(ctx context.Context) error {
	err := k.transaction(ctx, func(l *link) error {
		l.deleteTable()
		return l.nft.Flush()
	})
	if err != nil {
		return fmt.Errorf("remove gate: %w", err)
	}
	return nil
}

// isShut asks for more than that nothing passes now: that nothing can, whatever
// the clocks do.
func isShut(s State) bool { return s.Role == "" }

// settle proves after a batch, which ended with err, that the kernel's table is
// right and in the state wanted. If not, it replaces the table by a shut one,
// which answers with resets if moved says so or, where that is nil, if the old
// one did.
func (k *Kernel) settle(l *link, err error, wanted func(State) bool, moved *bool) error {
	s, diff, lookErr := l.state(k.port)
	switch {
	case lookErr != nil:
		return errors.Join(err, lookErr)
	case diff == "" && wanted(s):
		return nil
	case diff == "":
		diff = changedMeanwhile
	}
	if moved == nil {
		moved = &s.Moved
	}
	if replaceErr := k.replace(l, diff, *moved); replaceErr != nil {
		return errors.Join(err, replaceErr)
	}
	return nil
}

// replace writes the whole table anew, shut, and proves that the kernel holds
// it.
func (k *Kernel) replace(l *link, because string, moved bool) error {
	if err := l.writeTable(k.port, moved); err != nil {
		return fmt.Errorf("write table: %w", err)
	}
	k.log.Info("gate written to the kernel, shut", "port", k.port, "moved", moved, "because", because)
	s, diff, err := l.state(k.port)
	if err == nil && diff == "" && (!isShut(s) || s.Moved != moved) {
		diff = changedMeanwhile
	}
	if err == nil && diff != "" {
		err = fmt.Errorf("the kernel does not hold what was written: %s", diff)
	}
	return err
}

// transaction runs do with the connection to the kernel, alone.
func (k *Kernel) transaction(ctx context.Context, do func(*link) error) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return err
	}
	if k.link == nil {
		l, address, err := connect(k.netns)
		if err != nil {
			return fmt.Errorf("connect to nf_tables: %w", nftwatch.Explain(err))
		}
		k.link = l
		k.address.Store(address)
	}
	err := do(k.link)
	if err != nil {
		// Answers that nobody has read may be left in it.
		return errors.Join(nftwatch.Explain(err), k.disconnect())
	}
	return err
}

func (k *Kernel) disconnect() error {
	if k.link == nil {
		return nil
	}
	l := k.link
	k.link = nil
	return l.close()
}
