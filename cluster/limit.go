package cluster

import (
	"net/netip"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// failures limits failed attempts by remote address: ten at once, then ten a
// minute. The zero value is ready.
type failures struct {
	mu sync.Mutex
	by map[netip.Prefix]*rate.Limiter
}

const (
	failBurst  = 10
	failEvery  = 6 * time.Second
	maxRemotes = 1024
)

// network groups what one attacker can choose freely.
func network(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	bits := 32
	if a.Is6() {
		bits = 64
	}
	p, err := a.Prefix(bits)
	if err != nil {
		return netip.Prefix{} // no address: one bucket for all of those
	}
	return p
}

func (f *failures) allow(remote netip.Addr, now time.Time) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	l := f.by[network(remote)]
	return l == nil || l.TokensAt(now) >= 1
}

func (f *failures) note(remote netip.Addr, now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.by == nil {
		f.by = map[netip.Prefix]*rate.Limiter{}
	}
	n := network(remote)
	l := f.by[n]
	if l == nil {
		f.makeRoom(now)
		l = rate.NewLimiter(rate.Every(failEvery), failBurst)
		f.by[n] = l
	}
	l.AllowN(now, 1)
}

// makeRoom forgets remotes that have not failed for a while, any other one if
// there are none: memory stays bounded whatever arrives.
func (f *failures) makeRoom(now time.Time) {
	if len(f.by) < maxRemotes {
		return
	}
	for n, l := range f.by {
		if l.TokensAt(now) >= failBurst {
			delete(f.by, n)
		}
	}
	for n := range f.by {
		if len(f.by) < maxRemotes {
			break
		}
		delete(f.by, n)
	}
}
