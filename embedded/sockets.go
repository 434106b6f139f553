package embedded

import (
	"fmt"
	"net/url"
	"os"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// tuneEvery is how often the connections between members are looked at.
	tuneEvery = time.Second
	// peerUserTimeout is for how long a peer's kernel may leave data unanswered.
	// Longer than an election, so that a short cut costs no connection.
	peerUserTimeout = 5 * time.Second
	// keepalive of a connection on which nothing is sent, in seconds.
	peerIdle, peerInterval = 2, 1
)

// tunePeers has the kernel end this process's connections to and from peers when
// nobody answers on them. etcd means to give up after a read timeout of 5 s, but
// its transport (3.7.3, client/pkg/transport/timeout_transport.go) sets net/http's
// Dial, which DialContext, set before, overrides. After a silent cut the kernel
// then goes on with an exponential backoff, and members did not find each other
// for up to two minutes after it was over.
func (s *Server) tunePeers() {
	t := time.NewTicker(tuneEvery)
	defer t.Stop()
	for {
		select {
		case <-s.stopc:
			return
		case <-s.done:
			return
		case <-t.C:
		}
		ports := map[uint16]bool{}
		for _, m := range s.members() {
			if port, ok := portOf(m.PeerURL); ok {
				ports[port] = true
			}
		}
		if err := tuneSockets(ports); err != nil {
			s.log.Debug("cannot tune connections to peers", "err", err)
		}
	}
}

func portOf(peerURL string) (uint16, bool) {
	u, err := url.Parse(peerURL)
	if err != nil {
		return 0, false
	}
	port, err := strconv.ParseUint(u.Port(), 10, 16)
	return uint16(port), err == nil
}

// tuneSockets sets the timeouts of this process's TCP connections with one of
// these ports at either end. A descriptor may be closed and used anew meanwhile;
// to set the timeouts of another connection would do no harm.
func tuneSockets(ports map[uint16]bool) error {
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	for _, e := range entries {
		fd, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		remote, err := unix.Getpeername(fd)
		if err != nil {
			continue // no connection
		}
		local, err := unix.Getsockname(fd)
		if err != nil || !ports[portAt(remote)] && !ports[portAt(local)] {
			continue
		}
		for _, o := range []struct{ level, name, value int }{
			{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(peerUserTimeout.Milliseconds())},
			{unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1},
			{unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, peerIdle},
			{unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, peerInterval},
		} {
			if err := unix.SetsockoptInt(fd, o.level, o.name, o.value); err != nil {
				break // it has been closed
			}
		}
	}
	return nil
}

// portAt is the TCP port of a socket's end, 0 where it has none.
func portAt(a unix.Sockaddr) uint16 {
	switch a := a.(type) {
	case *unix.SockaddrInet4:
		return uint16(a.Port)
	case *unix.SockaddrInet6:
		return uint16(a.Port)
	}
	return 0
}
