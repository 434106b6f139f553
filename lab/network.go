package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Clients stands for everything that Dial and Command run from, in Cut and Heal
// and as a name in the hosts' /etc/hosts.
const Clients = "clients"

const (
	maxHosts = 16
	bridge   = "br0"
	// clientHost and firstHost are last bytes of addresses and of MACs.
	clientHost, firstHost = 1, 11
)

var subnet = netip.MustParsePrefix("10.123.0.0/24")

// Subnet is the network of every lab. Labs do not clash: each is alone in its
// namespaces.
func Subnet() netip.Prefix { return subnet }

// ClientAddr is the address that Dial and Command come from.
func ClientAddr() netip.Addr { return addrOf(clientHost) }

func addrOf(n int) netip.Addr {
	b := subnet.Addr().As4()
	b[3] = byte(n)
	return netip.AddrFrom4(b)
}

// macOf is fixed, as a machine's is: others go on knowing it over a power cycle.
func macOf(n int) net.HardwareAddr { return net.HardwareAddr{0x02, 0, 0, 0, 0, byte(n)} }

func portName(host string) string { return "p-" + host }

// setUpSwitch runs on the lab's thread.
func (l *Lab) setUpSwitch() error {
	// Bridged packets are no business of the ip family here; without
	// br_netfilter there are no such files.
	for _, name := range []string{"iptables", "ip6tables", "arptables"} {
		err := os.WriteFile("/proc/sys/net/bridge/bridge-nf-call-"+name, []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("set up bridge: %w", err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = bridge, macOf(clientHost)
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return fmt.Errorf("add bridge: %w", err)
	}
	if err := setUpLink(bridge, clientHost); err != nil {
		return err
	}
	return l.applyCuts()
}

// setUpLink gives the link of the current network namespace its address and
// permanent neighbours, so that a host that is gone is met with silence and not,
// after three seconds, with "no route to host".
func setUpLink(name string, own int) error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find loopback: %w", err)
	}
	if err := netlink.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set up loopback: %w", err)
	}
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("find link %s: %w", name, err)
	}
	ipNet := func(a netip.Addr) *net.IPNet {
		return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(subnet.Bits(), 32)}
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: ipNet(addrOf(own))}); err != nil {
		return fmt.Errorf("add address to %s: %w", name, err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return fmt.Errorf("set up link %s: %w", name, err)
	}
	others := []int{clientHost}
	for i := range maxHosts {
		others = append(others, firstHost+i)
	}
	for _, n := range others {
		if n == own {
			continue
		}
		err := netlink.NeighSet(&netlink.Neigh{
			LinkIndex: link.Attrs().Index, Family: netlink.FAMILY_V4, State: netlink.NUD_PERMANENT,
			IP: addrOf(n).AsSlice(), HardwareAddr: macOf(n),
		})
		if err != nil {
			return fmt.Errorf("add neighbour to %s: %w", name, err)
		}
	}
	return nil
}

// plugIn connects the network namespace of pid with the switch, as eth0. It
// runs on the lab's thread.
func (h *Host) plugIn(pid int) error {
	if err := h.unplug(); err != nil { // an init that died by itself
		return err
	}
	br, err := netlink.LinkByName(bridge)
	if err != nil {
		return fmt.Errorf("find bridge: %w", err)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.MasterIndex = portName(h.name), br.Attrs().Index
	veth := netlink.NewVeth(attrs)
	veth.PeerName, veth.PeerHardwareAddr, veth.PeerNamespace = "eth0", macOf(firstHost+h.index), netlink.NsPid(pid)
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("add link: %w", err)
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return fmt.Errorf("set up link: %w", err)
	}
	return nil
}

// port finds the host's link in the switch, nil if there is none.
func (h *Host) port() (netlink.Link, error) {
	link, err := netlink.LinkByName(portName(h.name))
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find link: %w", err)
	}
	return link, nil
}

// linkDown stops the host's traffic both ways. It runs on the lab's thread.
func (h *Host) linkDown() error {
	link, err := h.port()
	if link == nil || err != nil {
		return err
	}
	if err := netlink.LinkSetDown(link); err != nil {
		return fmt.Errorf("set link down: %w", err)
	}
	return nil
}

// unplug removes the host's link, if there is one. It runs on the lab's thread.
func (h *Host) unplug() error {
	link, err := h.port()
	if link == nil || err != nil {
		return err
	}
	// A host's namespace on its way out takes the link with it.
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove link: %w", err)
	}
	return nil
}

// pair is a link between two hosts: their names in order.
type pair [2]string

func pairOf(a, b string) pair {
	if a > b {
		a, b = b, a
	}
	return pair{a, b}
}

// Cut drops everything between a and b, both ways, until Heal. Either can be
// Clients. It changes nothing if the link is cut.
func (l *Lab) Cut(a, b string) error {
	return l.change(fmt.Sprintf("cut %s from %s", a, b), []string{a, b}, func() { l.cuts[pairOf(a, b)] = true })
}

// Heal undoes Cut. A host that is isolated stays so.
func (l *Lab) Heal(a, b string) error {
	return l.change(fmt.Sprintf("heal %s to %s", a, b), []string{a, b}, func() { delete(l.cuts, pairOf(a, b)) })
}

// Isolate drops everything to and from the host, until Rejoin.
func (l *Lab) Isolate(a string) error {
	return l.change("isolate "+a, []string{a}, func() { l.isolated[a] = true })
}

// Rejoin undoes Isolate. Links that are cut stay so.
func (l *Lab) Rejoin(a string) error {
	return l.change("rejoin "+a, []string{a}, func() { delete(l.isolated, a) })
}

func (l *Lab) change(what string, names []string, change func()) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	for i, n := range names {
		known := slices.ContainsFunc(l.hosts, func(h *Host) bool { return h.name == n })
		if !known && (n != Clients || len(names) == 1) {
			return fmt.Errorf("%s: no host %q", what, n)
		}
		if slices.Contains(names[:i], n) {
			return fmt.Errorf("%s: a host has no link to itself", what)
		}
	}
	change()
	if err := l.do(l.applyCuts); err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	l.log.Info("network changed", "change", what)
	return nil
}

// drop is a rule: what comes in by iif and goes out by oif, "" being any, is
// dropped on that hook of the bridge.
type drop struct {
	hook     string
	iif, oif string
}

// drops says which packets the switch must drop.
func drops(cuts map[pair]bool, isolated map[string]bool) []drop {
	var rules []drop
	for cut := range cuts {
		for _, d := range []pair{cut, {cut[1], cut[0]}} {
			switch {
			case d[0] == Clients:
				rules = append(rules, drop{hook: "output", oif: portName(d[1])})
			case d[1] == Clients:
				rules = append(rules, drop{hook: "input", iif: portName(d[0])})
			default:
				rules = append(rules, drop{hook: "forward", iif: portName(d[0]), oif: portName(d[1])})
			}
		}
	}
	for name := range isolated {
		p := portName(name)
		rules = append(rules, drop{hook: "input", iif: p}, drop{hook: "output", oif: p},
			drop{hook: "forward", iif: p}, drop{hook: "forward", oif: p})
	}
	return rules
}

// applyCuts replaces the switch's rules in one transaction. It runs on the
// lab's thread; l.mu is held or the lab is not yet out.
func (l *Lab) applyCuts() error {
	conn, err := nftables.New()
	if err != nil {
		return fmt.Errorf("open nftables: %w", err)
	}
	table := &nftables.Table{Family: nftables.TableFamilyBridge, Name: "pghalab"}
	conn.AddTable(table) // so that there is one to delete
	conn.DelTable(table)
	conn.AddTable(table)
	chains := map[string]*nftables.Chain{}
	for name, hook := range map[string]*nftables.ChainHook{
		"input": nftables.ChainHookInput, "forward": nftables.ChainHookForward, "output": nftables.ChainHookOutput,
	} {
		chains[name] = conn.AddChain(&nftables.Chain{
			Name: name, Table: table, Type: nftables.ChainTypeFilter,
			Hooknum: hook, Priority: nftables.ChainPriorityFilter,
		})
	}
	for _, d := range slices.Concat(drops(l.cuts, l.isolated), oneWayDrops(l.oneWay)) {
		exprs := slices.Concat(matchName(expr.MetaKeyIIFNAME, d.iif), matchName(expr.MetaKeyOIFNAME, d.oif),
			[]expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}})
		conn.AddRule(&nftables.Rule{Table: table, Chain: chains[d.hook], Exprs: exprs})
	}
	for port := range l.ports {
		for _, exprs := range dropPort(port) {
			conn.AddRule(&nftables.Rule{Table: table, Chain: chains["forward"], Exprs: exprs})
		}
	}
	if err := conn.Flush(); err != nil {
		return fmt.Errorf("replace the switch's rules (the kernel needs nftables' bridge family): %w", err)
	}
	return nil
}

func matchName(key expr.MetaKey, name string) []expr.Any {
	if name == "" {
		return nil
	}
	data := make([]byte, unix.IFNAMSIZ)
	copy(data, name)
	return []expr.Any{
		&expr.Meta{Key: key, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: data},
	}
}

// dialIn dials from the network namespace at nsPath.
func (l *Lab) dialIn(ctx context.Context, nsPath, network, addr string) (net.Conn, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", addr, err)
	}
	if h := l.Host(host); h != nil {
		host = h.Addr().String()
	}
	// With a name the dialer would ask the machine's resolver, and from other
	// threads.
	if _, err := netip.ParseAddr(host); err != nil {
		return nil, fmt.Errorf("dial %s: neither an IP address nor a host of the lab", addr)
	}
	type result struct {
		conn net.Conn
		err  error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		conn, restored, err := dialThread(ctx, nsPath, network, net.JoinHostPort(host, port))
		if restored {
			runtime.UnlockOSThread()
		} // else the thread ends with the goroutine
		done <- result{conn, err}
	}()
	r := <-done
	return r.conn, r.err
}

// dialThread dials from nsPath on the current thread, which the socket is made
// on, and tells whether the thread is back where it was.
func dialThread(ctx context.Context, nsPath, network, addr string) (_ net.Conn, restored bool, err error) {
	own, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		return nil, true, fmt.Errorf("open own namespace: %w", err)
	}
	defer func() { _ = own.Close() }()
	target, err := os.Open(nsPath)
	if err != nil {
		return nil, true, fmt.Errorf("open namespace to dial from: %w", err)
	}
	defer func() { _ = target.Close() }()
	if err := unix.Setns(int(target.Fd()), unix.CLONE_NEWNET); err != nil {
		return nil, true, fmt.Errorf("enter namespace to dial from: %w", err)
	}
	var d net.Dialer
	conn, err := d.DialContext(ctx, network, addr)
	if unix.Setns(int(own.Fd()), unix.CLONE_NEWNET) == nil {
		restored = true
	}
	return conn, restored, err
}
