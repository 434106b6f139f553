package node

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"sync"
	"time"
)

// door is the one etcd address that Patroni knows: it listens on loopback and
// passes TCP on to an etcd member. While the local member is a learner, which
// refuses clients, the door leads to a voter; afterwards it leads to the local
// member for good, so that Patroni never depends on another host (see
// docs/adr/0003-etcd-door.md). TLS runs end to end through it.
type door struct {
	log *slog.Logger

	mu     sync.Mutex
	target string // host:port, "" while there is nowhere to lead
	conns  map[net.Conn]struct{}
}

func newDoor(log *slog.Logger) *door {
	return &door{log: log.With("component", "etcd-door"), conns: map[net.Conn]struct{}{}}
}

// lead sends connections to target from now on and ends those that lead
// elsewhere: their client connects again at once.
func (d *door) lead(target string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.target == target {
		return
	}
	d.log.Info("etcd door leads elsewhere", "from", d.target, "to", target, "ended", len(d.conns))
	d.target = target
	for c := range d.conns {
		// The copy loops see the error; there is nobody else to tell.
		_ = c.Close()
	}
}

// serve accepts connections until ctx ends.
func (d *door) serve(ctx context.Context, addr string) error {
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", addr)
	if err != nil {
		return fmt.Errorf("listen for Patroni's etcd connections: %w", err)
	}
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := context.AfterFunc(ctx, func() {
		_ = l.Close()
		d.lead("")
	})
	defer stop()
	for {
		c, err := l.Accept()
		if ctx.Err() != nil {
			if err == nil {
				_ = c.Close()
			}
			return nil
		}
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return fmt.Errorf("accept etcd connection: %w", err)
			}
			d.log.Warn("cannot accept a connection", "err", err)
			select { // out of file descriptors, most likely: do not spin
			case <-ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		wg.Go(func() { d.pass(ctx, c) })
	}
}

// pass joins one client to the current target until either side ends.
func (d *door) pass(ctx context.Context, client net.Conn) {
	target, ok := d.admit(client)
	defer d.dismiss(client)
	if !ok {
		return
	}
	dialer := net.Dialer{Timeout: 2 * time.Second}
	server, err := dialer.DialContext(ctx, "tcp", target)
	if err != nil {
		d.log.Debug("cannot reach etcd", "target", target, "err", err)
		return
	}
	if !d.adopt(target, server) {
		return
	}
	defer d.dismiss(server)
	var wg sync.WaitGroup
	wg.Go(func() { copyAndClose(server, client) })
	copyAndClose(client, server)
	wg.Wait()
}

// copyAndClose ends both sides once one direction has ended: etcd's clients
// never half-close.
func copyAndClose(dst, src net.Conn) {
	_, _ = io.Copy(dst, src) // the error is the end of the connection, whatever it says
	_ = dst.Close()
	_ = src.Close()
}

func (d *door) admit(c net.Conn) (string, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.conns[c] = struct{}{}
	return d.target, d.target != ""
}

// adopt adds the server side, unless the door leads elsewhere by now.
func (d *door) adopt(target string, c net.Conn) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.target != target {
		_ = c.Close()
		return false
	}
	d.conns[c] = struct{}{}
	return true
}

func (d *door) dismiss(c net.Conn) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.conns, c)
	_ = c.Close()
}
