package faults

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"
)

// Packet is a TCP segment that left a host, with content or as the answer to a
// session's beginning.
type Packet struct {
	At       time.Duration // when the kernel handed it to the link, since the history's beginning
	Link     string        // eth0 or lo
	From, To netip.AddrPort
	Bytes    int  // of content
	Begin    bool // of the session: the segment carries SYN
}

// session is one TCP connection, as seen from the server.
type session struct{ from, to netip.AddrPort }

func (p Packet) session() session { return session{p.From, p.To} }

// Capture watches what leaves a host.
type Capture struct {
	fd    int
	links map[int]string
	at    func(time.Time) time.Duration
	stop  chan struct{}
	done  chan struct{}
	ended sync.Once

	mu      sync.Mutex
	packets []Packet
	err     error
}

const (
	capturePoll   = 200 * time.Millisecond
	captureBuffer = 32 << 20
	etherLen      = 14
)

// StartCapture watches TCP over IPv4 from a port on every link of the network
// namespace that inNetwork calls a function in. The kernel takes a packet's
// time after its output rules have let it pass; at converts it.
func StartCapture(inNetwork func(func() error) error, port uint16, at func(time.Time) time.Duration) (*Capture, error) {
	c := &Capture{at: at, links: map[int]string{}, stop: make(chan struct{}), done: make(chan struct{})}
	if err := inNetwork(func() error { return c.open(port) }); err != nil {
		return nil, fmt.Errorf("capture packets: %w", err)
	}
	go c.run()
	return c, nil
}

func (c *Capture) open(port uint16) (err error) {
	links, err := net.Interfaces()
	if err != nil {
		return fmt.Errorf("list links: %w", err)
	}
	for _, l := range links {
		c.links[l.Index] = l.Name
	}
	// With protocol 0 nothing arrives before the filter is there.
	if c.fd, err = unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open packet socket: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, unix.Close(c.fd))
		}
	}()
	filter, err := fromPort(port)
	if err != nil {
		return err
	}
	prog := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	wait := unix.NsecToTimeval(capturePoll.Nanoseconds())
	err = errors.Join(
		unix.SetsockoptSockFprog(c.fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &prog),
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_TIMESTAMPNS, 1),
		unix.SetsockoptInt(c.fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, captureBuffer),
		unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &wait),
	)
	if err != nil {
		return fmt.Errorf("set up packet socket: %w", err)
	}
	all := uint16(unix.ETH_P_ALL<<8&0xff00 | unix.ETH_P_ALL>>8)
	if err := unix.Bind(c.fd, &unix.SockaddrLinklayer{Protocol: all}); err != nil {
		return fmt.Errorf("bind packet socket: %w", err)
	}
	return nil
}

// fromPort lets TCP over IPv4 pass that has the source port, and is no later
// fragment.
func fromPort(port uint16) ([]unix.SockFilter, error) {
	raw, err := bpf.Assemble([]bpf.Instruction{
		bpf.LoadAbsolute{Off: 12, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.ETH_P_IP, SkipFalse: 8},
		bpf.LoadAbsolute{Off: etherLen + 9, Size: 1},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: unix.IPPROTO_TCP, SkipFalse: 6},
		bpf.LoadAbsolute{Off: etherLen + 6, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpBitsSet, Val: 0x1fff, SkipTrue: 4},
		bpf.LoadMemShift{Off: etherLen},
		bpf.LoadIndirect{Off: etherLen, Size: 2},
		bpf.JumpIf{Cond: bpf.JumpEqual, Val: uint32(port), SkipFalse: 1},
		bpf.RetConstant{Val: 160}, // the headers at their longest
		bpf.RetConstant{Val: 0},
	})
	if err != nil {
		return nil, fmt.Errorf("assemble packet filter: %w", err)
	}
	var out []unix.SockFilter
	for _, r := range raw {
		out = append(out, unix.SockFilter{Code: r.Op, Jt: r.Jt, Jf: r.Jf, K: r.K})
	}
	return out, nil
}

func (c *Capture) run() {
	defer close(c.done)
	frame, control := make([]byte, 256), make([]byte, 256)
	for {
		n, cn, _, from, err := unix.Recvmsg(c.fd, frame, control, 0)
		switch {
		case err == nil:
			c.take(frame[:n], control[:cn], from)
			continue
		case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.ENETDOWN): // a link that goes down says so once
			select { // only now, as everything that came before is read then
			case <-c.stop:
				return
			default:
			}
		case errors.Is(err, unix.EINTR):
		default:
			c.fail(fmt.Errorf("read packet socket: %w", err))
			return
		}
	}
}

func (c *Capture) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = errors.Join(c.err, err)
}

func (c *Capture) take(frame, control []byte, from unix.Sockaddr) {
	link, ok := from.(*unix.SockaddrLinklayer)
	if !ok || link.Pkttype != unix.PACKET_OUTGOING {
		return // on lo, the same packet once more as it comes in
	}
	p, ok := parsePacket(frame)
	if !ok || p.Bytes == 0 && !p.Begin {
		return
	}
	sent, err := timestamp(control)
	if err != nil {
		c.fail(err)
		return
	}
	// The stamp is the wall clock's, which may have been set: only its distance
	// from now is used.
	now := time.Now()
	p.At = c.at(now) - time.Duration(now.UnixNano()-sent)
	p.Link = c.links[link.Ifindex]
	c.mu.Lock()
	c.packets = append(c.packets, p)
	c.mu.Unlock()
}

func timestamp(control []byte) (int64, error) {
	messages, err := unix.ParseSocketControlMessage(control)
	if err != nil {
		return 0, fmt.Errorf("read packet's time: %w", err)
	}
	for _, m := range messages {
		if m.Header.Level == unix.SOL_SOCKET && m.Header.Type == unix.SCM_TIMESTAMPNS && len(m.Data) >= 16 {
			return int64(binary.NativeEndian.Uint64(m.Data))*1e9 + int64(binary.NativeEndian.Uint64(m.Data[8:])), nil
		}
	}
	return 0, errors.New("read packet's time: the kernel gave none")
}

// parsePacket reads the headers of a TCP segment over IPv4 over Ethernet.
func parsePacket(frame []byte) (p Packet, ok bool) {
	if len(frame) < etherLen+20 {
		return p, false
	}
	ip := frame[etherLen:]
	ihl, total := int(ip[0]&15)*4, int(binary.BigEndian.Uint16(ip[2:]))
	if len(ip) < ihl+20 {
		return p, false
	}
	tcp := ip[ihl:]
	addr := func(b []byte) netip.Addr { a, _ := netip.AddrFromSlice(b); return a }
	p.From = netip.AddrPortFrom(addr(ip[12:16]), binary.BigEndian.Uint16(tcp))
	p.To = netip.AddrPortFrom(addr(ip[16:20]), binary.BigEndian.Uint16(tcp[2:]))
	p.Begin = tcp[13]&0x02 != 0
	p.Bytes = total - ihl - int(tcp[12]>>4)*4
	return p, true
}

// Stop ends the capture and returns its packets in the order of their times. It
// fails if any may have been missed. It may be called again.
func (c *Capture) Stop() ([]Packet, error) {
	c.ended.Do(func() {
		close(c.stop)
		<-c.done
		stats, err := unix.GetsockoptTpacketStats(c.fd, unix.SOL_PACKET, unix.PACKET_STATISTICS)
		c.err = errors.Join(err, unix.Close(c.fd), c.err)
		if c.err == nil && stats.Drops > 0 {
			c.err = fmt.Errorf("%d packets were missed", stats.Drops)
		}
		slices.SortFunc(c.packets, func(a, b Packet) int { return int(a.At - b.At) })
	})
	if c.err != nil {
		return nil, fmt.Errorf("capture packets: %w", c.err)
	}
	return c.packets, nil
}
