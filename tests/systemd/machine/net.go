package machine

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"runtime"
	"sync"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// subnet may be the same in every network: none is connected to anything else.
var subnet = netip.MustParsePrefix("10.124.0.0/24")

// firstHost is the last byte of the first machine's address; the bridge has 1.
const firstHost = 11

const bridgeName = "br0"

// Net is a bridge in a network namespace of its own, to which machines are
// connected. It has no way out.
type Net struct {
	root string
	ns   netns.NsHandle
	nl   *netlink.Handle

	mu   sync.Mutex
	next byte
}

// Network makes an empty network and, on the first use on this host, the root
// file system of the machines, which takes a minute or two. The network goes
// with the test. It fails the test when the host lacks what the package needs.
func Network(t testing.TB) *Net {
	t.Helper()
	if err := checkHost(); err != nil {
		t.Fatalf("this host cannot boot machines: %v", err)
	}
	root, err := Root(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	n := &Net{root: root, next: firstHost}
	if n.ns, err = newNetns(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = n.ns.Close() })
	if n.nl, err = netlink.NewHandleAt(n.ns); err != nil {
		t.Fatalf("open netlink in bridge namespace: %v", err)
	}
	t.Cleanup(n.nl.Close)
	if err := n.makeBridge(); err != nil {
		t.Fatalf("make bridge: %v", err)
	}
	return n
}

// checkHost says what is missing, all at once, and where to get it.
func checkHost() error {
	var errs []error
	if os.Geteuid() != 0 {
		errs = append(errs, errors.New("run the tests as root"))
	}
	for program, pkg := range map[string]string{
		"systemd-nspawn": "systemd-container", "debootstrap": "debootstrap",
		"nsenter": "util-linux", "mount": "mount", "apt-get": "apt",
	} {
		if _, err := exec.LookPath(program); err != nil {
			errs = append(errs, fmt.Errorf("no %s: install the Debian package %s", program, pkg))
		}
	}
	if _, err := cgroupMount(); err != nil {
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// Dial connects from the bridge, that is from outside every machine. The host
// part of addr must be a numeric address. It fits http.Transport.DialContext
// and its like.
func (n *Net) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	// A name would be looked up by other threads, in the host's network.
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("dial from bridge: %w", err)
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so that no other
		// goroutine can find itself in the bridge's namespace.
		runtime.LockOSThread()
		if err := netns.Set(n.ns); err != nil {
			done <- result{err: fmt.Errorf("enter bridge namespace: %w", err)}
			return
		}
		conn, err := new(net.Dialer).DialContext(ctx, network, addr)
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

func (n *Net) makeBridge() error {
	if err := setUp(n.nl, "lo"); err != nil {
		return err
	}
	if err := n.nl.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: bridgeName}}); err != nil {
		return fmt.Errorf("add %s: %w", bridgeName, err)
	}
	if err := addAddr(n.nl, bridgeName, hostAddr(1)); err != nil {
		return err
	}
	return setUp(n.nl, bridgeName)
}

// connect returns a new network namespace whose eth0, with that address, is on
// the bridge. The connection of an earlier namespace with the address is cut.
func (n *Net) connect(addr netip.Addr) (netns.NsHandle, error) {
	host := addr.As4()[3]
	port := fmt.Sprintf("port%d", host)
	if old, err := n.nl.LinkByName(port); err == nil {
		// The kernel clears a dead namespace away in its own time, perhaps just now.
		if err := n.nl.LinkDel(old); err != nil && !errors.Is(err, unix.ENODEV) {
			return netns.None(), fmt.Errorf("delete old %s: %w", port, err)
		}
	}
	ns, err := newNetns()
	if err != nil {
		return netns.None(), err
	}
	if err := n.plug(ns, port, addr); err != nil {
		return netns.None(), errors.Join(fmt.Errorf("connect %s: %w", addr, err), ns.Close())
	}
	return ns, nil
}

func (n *Net) plug(ns netns.NsHandle, port string, addr netip.Addr) error {
	bridge, err := n.nl.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("find %s: %w", bridgeName, err)
	}
	veth := &netlink.Veth{
		LinkAttrs:     netlink.LinkAttrs{Name: port, MasterIndex: bridge.Attrs().Index},
		PeerName:      "eth0",
		PeerNamespace: netlink.NsFd(ns),
		// The same on each boot, as a network card's, so that neighbours need not learn it anew.
		PeerHardwareAddr: net.HardwareAddr{0x02, 0, 10, 124, 0, addr.As4()[3]},
	}
	if err := n.nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("add %s: %w", port, err)
	}
	if err := setUp(n.nl, port); err != nil {
		return err
	}
	nl, err := netlink.NewHandleAt(ns)
	if err != nil {
		return fmt.Errorf("open netlink in machine namespace: %w", err)
	}
	defer nl.Close()
	for _, link := range []string{"lo", "eth0"} {
		if err := setUp(nl, link); err != nil {
			return err
		}
	}
	if err := addAddr(nl, "eth0", addr); err != nil {
		return err
	}
	gateway := hostAddr(1)
	if err := nl.RouteAdd(&netlink.Route{Gw: gateway.AsSlice()}); err != nil {
		return fmt.Errorf("add default route: %w", err)
	}
	return nil
}

func (n *Net) nextAddr() (netip.Addr, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.next == 255 {
		return netip.Addr{}, fmt.Errorf("no address left in %s", subnet)
	}
	n.next++
	return hostAddr(n.next - 1), nil
}

func hostAddr(host byte) netip.Addr {
	b := subnet.Addr().As4()
	b[3] = host
	return netip.AddrFrom4(b)
}

func setUp(nl *netlink.Handle, name string) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	if err := nl.LinkSetUp(link); err != nil {
		return fmt.Errorf("set %s up: %w", name, err)
	}
	return nil
}

func addAddr(nl *netlink.Handle, name string, addr netip.Addr) error {
	link, err := nl.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find %s: %w", name, err)
	}
	ipnet := &net.IPNet{IP: addr.AsSlice(), Mask: net.CIDRMask(subnet.Bits(), 32)}
	if err := nl.AddrAdd(link, &netlink.Addr{IPNet: ipnet}); err != nil {
		return fmt.Errorf("add %s to %s: %w", addr, name, err)
	}
	return nil
}

// newNetns returns a new network namespace that lives while it is open or in use.
func newNetns() (netns.NsHandle, error) {
	type result struct {
		ns  netns.NsHandle
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread() // never unlocked, see Dial
		ns, err := netns.New()
		done <- result{ns, err}
	}()
	r := <-done
	if r.err != nil {
		return netns.None(), fmt.Errorf("make network namespace: %w", r.err)
	}
	return r.ns, nil
}
