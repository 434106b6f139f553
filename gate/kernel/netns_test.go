package kernel

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"

	"pgha/gate"
)

const (
	testPort uint16 = 5442
	// patience is for what must happen, moment for what must not.
	patience = 60 * time.Second
	moment   = 150 * time.Millisecond
	// long is a promise that outlasts every test.
	long = time.Hour
)

// host is a host with a gate, a server behind it, and another host beside it.
type host struct {
	t    *testing.T
	ns   netns.NsHandle
	k    *Kernel
	ways []way
	// conns are the server's ends of the connections, in order.
	conns chan net.Conn
}

// way is one way to the server.
type way struct {
	name string
	from netns.NsHandle
	addr string
}

// newHost makes the host, its gate installed, and listens on the port on all
// addresses.
func newHost(t *testing.T) *host {
	t.Helper()
	server, client := newNS(t), newNS(t)
	hs, hc := handle(t, server), handle(t, client)
	err := hs.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(client),
	})
	if err != nil {
		t.Fatalf("make veth: %v", err)
	}
	plug(t, hs, "10.9.0.1/24", "fd00:9::1/64")
	plug(t, hc, "10.9.0.2/24", "fd00:9::2/64")
	h := &host{t: t, ns: server, k: newKernel(t, server, testPort), conns: make(chan net.Conn, 64), ways: []way{
		{"loopback4", server, "127.0.0.1"}, {"loopback6", server, "::1"},
		{"veth4", client, "10.9.0.1"}, {"veth6", client, "fd00:9::1"},
	}}
	must(t, h.k.Install(t.Context()))
	var l net.Listener
	inNS(t, server, func() (err error) {
		l, err = net.Listen("tcp", fmt.Sprintf(":%d", testPort))
		return err
	})
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.conns <- c
		}
	}()
	return h
}

func newKernel(t testing.TB, ns netns.NsHandle, port uint16, opts ...Option) *Kernel {
	t.Helper()
	k, err := New(slog.New(slog.NewTextHandler(t.Output(), nil)), port, append(opts, InNetNS(int(ns)))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := k.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return k
}

func in(d time.Duration) gate.Moment { return gate.SystemClock{}.Now().Add(d) }

func (h *host) open(role Role, d time.Duration) {
	h.t.Helper()
	must(h.t, h.k.Open(context.Background(), role, in(d)))
}

// openBriefly opens the gate for so short a time that a busy machine may be too
// late for it.
func (h *host) openBriefly(role Role) {
	h.t.Helper()
	eventually(h.t, "the gate is opened in time", func() bool {
		err := h.k.Open(context.Background(), role, in(2*MinRemaining))
		if err != nil && !errors.Is(err, ErrLate) {
			h.t.Fatal(err)
		}
		return err == nil
	})
}

func (h *host) state() State {
	h.t.Helper()
	s, err := h.k.Read(context.Background())
	must(h.t, err)
	return s
}

func (h *host) dropped() uint64 {
	h.t.Helper()
	return h.state().Dropped.Packets
}

// untilShut waits until the kernel has shut the gate.
func (h *host) untilShut() {
	h.t.Helper()
	eventually(h.t, "the gate is shut", func() bool { return !h.state().Open })
}

// session is a connection to the server, seen from both ends.
type session struct {
	t              *testing.T
	way            way
	client, server net.Conn
	fromClient     *bufio.Reader
	fromServer     *bufio.Reader
}

func (h *host) dial(w way, timeout time.Duration) (net.Conn, error) {
	h.t.Helper()
	var conn net.Conn
	var dialErr error
	inNS(h.t, w.from, func() error {
		conn, dialErr = (&net.Dialer{Timeout: timeout}).Dial("tcp", net.JoinHostPort(w.addr, strconv.Itoa(int(testPort))))
		return nil
	})
	if conn != nil {
		h.t.Cleanup(func() { _ = conn.Close() })
	}
	return conn, dialErr
}

func (h *host) connect(w way) *session {
	h.t.Helper()
	c, err := h.dial(w, patience)
	if err != nil {
		h.t.Fatalf("%s: connect: %v", w.name, err)
	}
	s := &session{t: h.t, way: w, client: c, server: <-h.conns, fromServer: bufio.NewReader(c)}
	h.t.Cleanup(func() { _ = s.server.Close() })
	s.fromClient = bufio.NewReader(s.server)
	return s
}

func (h *host) connectAll() []*session {
	h.t.Helper()
	var all []*session
	for _, w := range h.ways {
		all = append(all, h.connect(w))
	}
	return all
}

// exchange sends a line from one end to the other and reads it there.
func exchange(from, to net.Conn, r *bufio.Reader, timeout time.Duration) error {
	const line = "COMMIT\n"
	if _, err := from.Write([]byte(line)); err != nil {
		return err
	}
	return receive(to, r, line, timeout)
}

func receive(conn net.Conn, r *bufio.Reader, line string, timeout time.Duration) error {
	if err := conn.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	got, err := r.ReadString('\n')
	if err == nil && got != line {
		err = fmt.Errorf("received %q, want %q", got, line)
	}
	return err
}

// ask has the client send and the server receive, answer the other way round.
func (s *session) ask(timeout time.Duration) error {
	return exchange(s.client, s.server, s.fromClient, timeout)
}

func (s *session) answer(timeout time.Duration) error {
	return exchange(s.server, s.client, s.fromServer, timeout)
}

func (s *session) mustTalk() {
	s.t.Helper()
	if err := errors.Join(s.ask(patience), s.answer(patience)); err != nil {
		s.t.Fatalf("%s: talk: %v", s.way.name, err)
	}
}

// passesNothing checks that both directions of open sessions are dead, and that
// no way lets a new one in.
func (h *host) passesNothing(sessions []*session) {
	h.t.Helper()
	for _, s := range sessions {
		before := h.dropped()
		if err := s.ask(moment); !timedOut(err) {
			h.t.Errorf("%s: the server received a request (error %v)", s.way.name, err)
		}
		if err := s.answer(moment); !timedOut(err) {
			h.t.Errorf("%s: the client received an answer (error %v)", s.way.name, err)
		}
		if h.dropped() < before+2 {
			h.t.Errorf("%s: nothing was counted as dropped", s.way.name)
		}
	}
	for _, w := range h.ways {
		before := h.dropped()
		if _, err := h.dial(w, moment); !timedOut(err) {
			h.t.Errorf("%s: connecting gives %v, want a timeout", w.name, err)
		}
		if h.dropped() == before {
			h.t.Errorf("%s: nothing was counted as dropped", w.name)
		}
	}
}

func timedOut(err error) bool { return errors.Is(err, os.ErrDeadlineExceeded) || isTimeout(err) }

func isTimeout(err error) bool {
	var ne net.Error
	return errors.As(err, &ne) && ne.Timeout()
}

// inNS runs do on a thread of its own inside the namespace. The thread is never
// given back, so no other goroutine can wake up in the namespace.
func inNS(t testing.TB, ns netns.NsHandle, do func() error) {
	t.Helper()
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- err
			return
		}
		done <- do()
	}()
	must(t, <-done)
}

// newNS makes an empty network namespace with loopback up. It ends with the
// test.
func newNS(t testing.TB) netns.NsHandle {
	t.Helper()
	var ns netns.NsHandle
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		var err error
		ns, err = netns.New()
		done <- err
	}()
	if err := <-done; err != nil {
		t.Fatalf("make network namespace: %v", err)
	}
	t.Cleanup(func() {
		if err := ns.Close(); err != nil {
			t.Errorf("close network namespace: %v", err)
		}
	})
	h := handle(t, ns)
	lo, err := h.LinkByName("lo")
	must(t, err)
	must(t, h.LinkSetUp(lo))
	return ns
}

func handle(t testing.TB, ns netns.NsHandle) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatalf("open netlink in namespace: %v", err)
	}
	t.Cleanup(h.Close)
	return h
}

func plug(t *testing.T, h *netlink.Handle, addrs ...string) {
	t.Helper()
	link, err := h.LinkByName("eth0")
	must(t, err)
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		must(t, err)
		addr.Flags = 0x02 // IFA_F_NODAD: usable at once
		must(t, h.AddrAdd(link, addr))
	}
	must(t, h.LinkSetUp(link))
}

// nft runs the nft tool, which product code never does.
func nft(t testing.TB, ns netns.NsHandle, commands ...string) string {
	t.Helper()
	var out []byte
	inNS(t, ns, func() (err error) {
		cmd := exec.Command("nft", "-f", "-")
		cmd.Stdin = strings.NewReader(strings.Join(commands, "\n"))
		if out, err = cmd.CombinedOutput(); err != nil {
			t.Logf("nft: %s", out)
		}
		return err
	})
	return string(out)
}

// eventually polls until ok, or fails the test after a generous time.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting: %s", what)
		}
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
