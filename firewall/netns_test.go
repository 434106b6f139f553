package firewall

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

// inNS runs do on a thread of its own inside the namespace. The thread is never
// given back, so no other goroutine can wake up in the namespace.
func inNS(t *testing.T, ns netns.NsHandle, do func() error) {
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
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// newNS makes an empty network namespace with loopback up. It ends with the
// test.
func newNS(t *testing.T) netns.NsHandle {
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
	if err == nil {
		err = h.LinkSetUp(lo)
	}
	if err != nil {
		t.Fatalf("set loopback up: %v", err)
	}
	return ns
}

func handle(t *testing.T, ns netns.NsHandle) *netlink.Handle {
	t.Helper()
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		t.Fatalf("open netlink in namespace: %v", err)
	}
	t.Cleanup(h.Close)
	return h
}

// The addresses of the two hosts of a test.
var (
	serverAddrs = []string{"10.9.0.1/24", "fd00:9::1/64"}
	// The client has several addresses, to be several clients.
	clientAddrs = []string{"10.9.0.2/24", "10.9.0.3/24", "10.9.0.4/24", "10.9.0.5/24", "fd00:9::2/64", "fd00:9::3/64"}
)

// newPair makes two namespaces joined by a cable.
func newPair(t *testing.T) (server, client netns.NsHandle) {
	t.Helper()
	server, client = newNS(t), newNS(t)
	hs, hc := handle(t, server), handle(t, client)
	err := hs.LinkAdd(&netlink.Veth{
		LinkAttrs: netlink.LinkAttrs{Name: "eth0"}, PeerName: "eth0", PeerNamespace: netlink.NsFd(client),
	})
	if err != nil {
		t.Fatalf("make veth: %v", err)
	}
	plug(t, hs, serverAddrs)
	plug(t, hc, clientAddrs)
	return server, client
}

func plug(t *testing.T, h *netlink.Handle, addrs []string) {
	t.Helper()
	link, err := h.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range addrs {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			t.Fatal(err)
		}
		addr.Flags = 0x02 // IFA_F_NODAD: usable at once
		if err := h.AddrAdd(link, addr); err != nil {
			t.Fatalf("add address %s: %v", a, err)
		}
	}
	if err := h.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
}

// echo answers every line on the ports, on all addresses of the namespace.
func echo(t *testing.T, ns netns.NsHandle, ports ...uint16) {
	t.Helper()
	for _, port := range ports {
		var l net.Listener
		inNS(t, ns, func() (err error) {
			l, err = net.Listen("tcp", ":"+strconv.Itoa(int(port)))
			return err
		})
		t.Cleanup(func() { _ = l.Close() })
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer func() { _ = c.Close() }()
					_, _ = io.Copy(c, c)
				}()
			}
		}()
	}
}

// dial connects from one address to another inside the namespace.
func dial(t *testing.T, ns netns.NsHandle, from, to string, port uint16, timeout time.Duration) (net.Conn, error) {
	t.Helper()
	var conn net.Conn
	var dialErr error
	inNS(t, ns, func() error {
		d := net.Dialer{Timeout: timeout}
		if from != "" {
			d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		conn, dialErr = d.Dial("tcp", net.JoinHostPort(to, strconv.Itoa(int(port))))
		return nil
	})
	if conn != nil {
		t.Cleanup(func() { _ = conn.Close() })
	}
	return conn, dialErr
}

// nft runs the nft tool, which product code never does.
func nft(t *testing.T, ns netns.NsHandle, stdin string, args ...string) string {
	t.Helper()
	var out []byte
	inNS(t, ns, func() (err error) {
		cmd := exec.Command("nft", args...)
		cmd.Stdin = strings.NewReader(stdin)
		if out, err = cmd.CombinedOutput(); err != nil {
			t.Logf("nft %s: %s", strings.Join(args, " "), out)
		}
		return err
	})
	return string(out)
}

func newFirewall(t *testing.T, ns netns.NsHandle) *Firewall {
	t.Helper()
	f, err := New(slog.New(slog.NewTextHandler(t.Output(), nil)), InNetNS(int(ns)))
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func apply(t *testing.T, f *Firewall, p Policy) {
	t.Helper()
	if err := f.Apply(context.Background(), p); err != nil {
		t.Fatal(err)
	}
}

func dropped(t *testing.T, f *Firewall, counter string) uint64 {
	t.Helper()
	counters, err := f.Counters(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	c, ok := counters[counter]
	if !ok {
		t.Fatalf("no counter %s in %v", counter, counters)
	}
	return c.Packets
}

// eventually polls until ok, or fails the test after a generous time.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting: %s", what)
		}
	}
}

func addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func prefixes(ss ...string) []netip.Prefix {
	var out []netip.Prefix
	for _, s := range ss {
		out = append(out, netip.MustParsePrefix(s))
	}
	return out
}
