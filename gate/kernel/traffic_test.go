package kernel

import (
	"errors"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

func TestShutAfterInstall(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	h.passesNothing(nil)
}

func TestOpenPasses(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, role := range []Role{Owner, Replica, Owner} {
		h.open(role, long)
		for _, s := range h.connectAll() {
			s.mustTalk()
		}
		s := h.state()
		if !s.Open || s.Role != role || s.Remaining <= 0 || s.Remaining > long || s.Moved || s.Dropped.Packets != 0 {
			t.Errorf("state is %+v, want open as %s and nothing dropped", s, role)
		}
	}
	sessions := h.connectAll()
	must(t, h.k.Shut(t.Context()))
	h.passesNothing(sessions)
	if s := h.state(); s.Open || s.Role != "" || s.Dropped.Bytes == 0 {
		t.Errorf("state is %+v, want shut and bytes counted", s)
	}
}

// TestOtherTables has other people's tables accept everything before and after
// the gate.
func TestOtherTables(t *testing.T) {
	t.Parallel()
	h := newHost(t)
	for _, priority := range []int{-300, -21, -20, -19, 0, 100} {
		name := fmt.Sprintf("other%d", priority+1000)
		for _, hook := range []string{"input", "output"} {
			nft(t, h.ns,
				"add table inet "+name,
				fmt.Sprintf("add chain inet %s %s { type filter hook %s priority %d; policy accept; }", name, hook, hook, priority),
				fmt.Sprintf("add rule inet %s %s ct state established,related accept", name, hook),
				fmt.Sprintf("add rule inet %s %s tcp dport 5442 accept", name, hook))
		}
	}
	h.open(Owner, long)
	sessions := h.connectAll()
	for _, s := range sessions {
		s.mustTalk()
	}
	must(t, h.k.Shut(t.Context()))
	h.passesNothing(sessions)
}

// TestOtherConnections keeps a shut gate from getting in the way of anything
// else: another port of this host, and the same port of another.
func TestOtherConnections(t *testing.T) {
	h := newHost(t)
	for _, tc := range []struct {
		from, at netns.NsHandle
		address  string
	}{
		{h.ways[2].from, h.ns, "10.9.0.1:5432"}, {h.ns, h.ns, "[::1]:5432"},
		{h.ns, h.ways[2].from, "10.9.0.2:5442"}, {h.ns, h.ways[2].from, "[fd00:9::2]:5442"},
	} {
		var l net.Listener
		inNS(t, tc.at, func() (err error) {
			l, err = net.Listen("tcp", tc.address)
			return err
		})
		inNS(t, tc.from, func() error {
			c, err := net.DialTimeout("tcp", tc.address, patience)
			if err == nil {
				err = c.Close()
			}
			return err
		})
		must(t, l.Close())
	}
	if n := h.dropped(); n != 0 {
		t.Errorf("%d packets were dropped", n)
	}
}

// TestAnswerInFlight is a COMMIT that reached the old primary in time and was
// finished too late: the client must not hear of it, unless the gate opens
// again.
func TestAnswerInFlight(t *testing.T) {
	h := newHost(t)
	for _, w := range h.ways {
		t.Run(w.name, func(t *testing.T) {
			h.open(Owner, long)
			s := h.connect(w)
			must(t, s.ask(patience))
			// From now on the gate shuts by itself.
			h.openBriefly(Owner)
			h.untilShut()
			before := h.dropped()
			if err := s.answer(moment); !timedOut(err) {
				t.Errorf("the client received an answer after the gate had shut (error %v)", err)
			}
			if h.dropped() == before {
				t.Error("the answer was not counted as dropped")
			}
			h.open(Owner, long)
			if err := receive(s.client, s.fromServer, "COMMIT\n", patience); err != nil {
				t.Errorf("the client did not receive the answer when the gate was open again: %v", err)
			}
			s.mustTalk()
		})
	}
}

// traffic has every session talk without a pause, except while the caller
// holds the lock, until stop is called; turns tells how often they did.
func (h *host) traffic(hold *sync.RWMutex) (turns func() int64, stop func()) {
	h.t.Helper()
	var done atomic.Bool
	var count atomic.Int64
	var wg sync.WaitGroup
	for _, s := range h.connectAll() {
		wg.Go(func() {
			for !done.Load() {
				hold.RLock()
				err := errors.Join(s.ask(patience), s.answer(patience))
				hold.RUnlock()
				if err != nil {
					h.t.Errorf("%s: talk: %v", s.way.name, err)
					return
				}
				count.Add(1)
				runtime.Gosched() // loopback never makes them wait, but others want a turn
			}
		})
	}
	return count.Load, func() {
		done.Store(true)
		wg.Wait()
	}
}

func TestRefreshDropsNothing(t *testing.T) {
	const refreshes, turnsEach = 2000, 10
	h := newHost(t)
	h.open(Owner, long)
	turns, stop := h.traffic(new(sync.RWMutex))
	for i := range refreshes {
		h.open(Owner, long)
		if i%100 == 0 {
			eventually(t, "the traffic keeps up with the refreshes", func() bool { return t.Failed() || turns() >= int64(i*turnsEach) })
		}
	}
	stop()
	t.Logf("%d turns of question and answer during %d refreshes", turns(), refreshes)
	if s := h.state(); s.Dropped.Packets != 0 || !s.Open {
		t.Errorf("state is %+v, want open and nothing dropped", s)
	}
}

// TestPromotion goes from replica to owner under traffic. On the way back,
// which no cluster takes without shutting first, the traffic pauses.
func TestPromotion(t *testing.T) {
	const promotions = 500
	h := newHost(t)
	h.open(Replica, long)
	var hold sync.RWMutex
	turns, stop := h.traffic(&hold)
	for range promotions {
		h.open(Owner, long)
		if s := h.state(); s.Role != Owner || !s.Open || s.Dropped.Packets != 0 {
			t.Errorf("state is %+v, want open as owner and nothing dropped", s)
			break
		}
		hold.Lock()
		h.open(Replica, long)
		hold.Unlock()
		if s := h.state(); s.Role != Replica || !s.Open {
			t.Errorf("state is %+v, want open as replica", s)
			break
		}
	}
	stop()
	t.Logf("%d turns of question and answer during %d promotions", turns(), promotions)
}

func TestMoved(t *testing.T) {
	h := newHost(t)
	for _, w := range h.ways {
		t.Run(w.name, func(t *testing.T) {
			h.open(Owner, long)
			idle, busy := h.connect(w), h.connect(w)
			must(t, busy.ask(patience))
			must(t, h.k.Moved(t.Context(), true))
			if s := h.state(); !s.Installed || s.Open || s.Role != "" || !s.Moved {
				t.Fatalf("state is %+v, want shut and moved", s)
			}
			before := h.state()
			if err := busy.answer(moment); !timedOut(err) {
				t.Errorf("the client received an answer from the old owner (error %v)", err)
			}
			if h.dropped() == before.Dropped.Packets {
				t.Error("the answer was not counted as dropped")
			}
			for _, s := range []*session{idle, busy} {
				if _, err := s.client.Write([]byte("SELECT 1\n")); err != nil {
					t.Fatal(err)
				}
				if err := receive(s.client, s.fromServer, "", patience); !errors.Is(err, unix.ECONNRESET) {
					t.Errorf("an established session ends with %v, want a reset", err)
				}
			}
			if _, err := h.dial(w, patience); !errors.Is(err, unix.ECONNREFUSED) {
				t.Errorf("connecting gives %v, want a refusal", err)
			}
			if s := h.state(); s.Reset.Packets < before.Reset.Packets+3 || s.Reset.Bytes <= before.Reset.Bytes {
				t.Errorf("resets went from %+v to %+v, want at least 3 more", before.Reset, s.Reset)
			}
			must(t, h.k.Moved(t.Context(), false))
			if s := h.state(); s.Open || s.Moved {
				t.Errorf("state is %+v, want plainly shut", s)
			}
			if _, err := h.dial(w, moment); !timedOut(err) {
				t.Errorf("connecting gives %v, want a timeout", err)
			}
		})
	}
}

func TestMovedAndOpen(t *testing.T) {
	h := newHost(t)
	must(t, h.k.Moved(t.Context(), true))
	must(t, h.k.Install(t.Context()))
	must(t, h.k.Shut(t.Context()))
	if err := h.k.Open(t.Context(), Owner, in(0)); !errors.Is(err, ErrLate) {
		t.Errorf("error is %v, want ErrLate", err)
	}
	if s := h.state(); !s.Moved || s.Open {
		t.Errorf("state is %+v: Install, Shut and a late Open must leave moved alone", s)
	}
	h.open(Replica, long)
	if s := h.state(); s.Moved || !s.Open {
		t.Errorf("state is %+v, want open and not moved", s)
	}
	must(t, h.k.Moved(t.Context(), false))
	if s := h.state(); !s.Open {
		t.Errorf("state is %+v: moved off must leave an open gate open", s)
	}
	must(t, h.k.Moved(t.Context(), true))
	h.open(Owner, long)
	h.openBriefly(Owner)
	h.untilShut()
	if _, err := h.dial(h.ways[2], moment); !timedOut(err) {
		t.Errorf("after Open has ended moved, connecting to a gate that ran out gives %v, want a timeout", err)
	}
}
