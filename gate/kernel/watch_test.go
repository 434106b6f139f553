package kernel

import (
	"context"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// watch runs Watch until the test ends. Each change takes a token from changes
// when it has been dealt with.
func (h *host) watch(changed func()) (changes <-chan struct{}) {
	h.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	tokens := make(chan struct{}, 1000)
	go func() {
		ended <- h.k.Watch(ctx, func() {
			changed()
			tokens <- struct{}{}
		})
	}()
	h.t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			h.t.Errorf("watch: %v", err)
		}
	})
	return tokens
}

func (h *host) install() {
	if err := h.k.Install(context.Background()); err != nil {
		h.t.Errorf("install: %v", err)
	}
}

func await(t *testing.T, changes <-chan struct{}) {
	t.Helper()
	select {
	case <-changes:
	case <-time.After(patience):
		t.Fatal("gave up waiting for Watch to notice a change")
	}
}

func TestWatchPutsBack(t *testing.T) {
	for _, change := range []string{
		"flush ruleset", "delete table inet pgha_gate", "flush table inet pgha_gate",
		"insert rule inet pgha_gate input tcp dport 5442 accept",
	} {
		t.Run(change, func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			t.Cleanup(func() { goleak.VerifyNone(t, before) }) // after all that newHost cleans up
			h := newHost(t)
			h.open(Owner, long)
			sessions := h.connectAll()
			changes := h.watch(h.install)
			nft(t, h.ns, change)
			await(t, changes)
			if s := h.state(); !s.Installed || s.Open {
				t.Errorf("state is %+v, want installed and shut", s)
			}
			h.passesNothing(sessions)
		})
	}
}

func TestWatchLooksAtStart(t *testing.T) {
	h := &host{t: t, ns: newNS(t)}
	h.k = newKernel(t, h.ns, testPort)
	await(t, h.watch(h.install))
	if s := h.state(); !s.Installed {
		t.Errorf("state is %+v, want installed", s)
	}
}

// TestWatchOthersOnly counts on the kernel announcing changes in order: had one
// of those that do not count been reported, the count would be higher when the
// one that does has been.
func TestWatchOthersOnly(t *testing.T) {
	h := &host{t: t, ns: newNS(t)}
	h.k = newKernel(t, h.ns, testPort)
	must(t, h.k.Install(t.Context()))
	changes := h.watch(func() {})
	nft(t, h.ns, "add table inet first")
	for range 20 {
		h.open(Replica, long)
		h.openBriefly(Owner)
		h.untilShut()
		must(t, h.k.Shut(t.Context()))
		must(t, h.k.Moved(t.Context(), true))
		must(t, h.k.Moved(t.Context(), false))
		must(t, h.k.Remove(t.Context()))
		must(t, h.k.Install(t.Context()))
	}
	nft(t, h.ns, "add table ip pgha_gate")
	nft(t, h.ns, "delete table inet first")
	// A hand that opens the gate changes no rule.
	nft(t, h.ns, "add element inet pgha_gate owner { 5442 timeout 1h }")
	await(t, changes)
	select {
	case <-changes:
		t.Error("more was reported than somebody else's change")
	default:
	}
}
