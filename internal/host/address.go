package host

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// HasAddress reports whether one of the host's interfaces carries the address.
func HasAddress(a netip.Addr) (bool, error) {
	addrs, err := addresses()
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(addrs, func(h hostAddr) bool { return h.addr == a.Unmap().WithZone("") }), nil
}

// DefaultAddress gives the address by which other hosts most likely know this
// one: that of the interface with the default route, IPv4 before IPv6. Where
// there are several to choose from, or none, the error lists them.
func DefaultAddress() (netip.Addr, error) {
	addrs, err := addresses()
	if err != nil {
		return netip.Addr{}, err
	}
	routes, err := defaultRoutes()
	if err != nil {
		return netip.Addr{}, err
	}
	return chooseAddress(routes, addrs)
}

// hostAddr is an address of the host.
type hostAddr struct {
	addr netip.Addr
	link int
	// usable says that other hosts can reach it and that it is there to stay.
	usable bool
}

// defaultRoute is a way to everywhere.
type defaultRoute struct {
	link   int
	v6     bool
	metric int
	source netip.Addr // the address that the route asks for, if any
}

// chooseAddress is the decision behind DefaultAddress.
func chooseAddress(routes []defaultRoute, addrs []hostAddr) (netip.Addr, error) {
	for _, v6 := range []bool{false, true} {
		best := bestRoutes(routes, v6)
		if len(best) == 0 {
			continue
		}
		if src := best[0].source; src.IsValid() && len(best) == 1 {
			return src, nil
		}
		return only(addrs, func(a hostAddr) bool {
			return a.addr.Is6() == v6 && slices.ContainsFunc(best, func(r defaultRoute) bool { return r.link == a.link })
		})
	}
	return only(addrs, func(hostAddr) bool { return true })
}

// bestRoutes gives the routes of one family with the lowest metric.
func bestRoutes(routes []defaultRoute, v6 bool) []defaultRoute {
	var best []defaultRoute
	for _, r := range routes {
		switch {
		case r.v6 != v6 || len(best) > 0 && r.metric > best[0].metric:
		case len(best) > 0 && r.metric == best[0].metric:
			best = append(best, r)
		default:
			best = []defaultRoute{r}
		}
	}
	return best
}

// only gives the one usable address among the candidates.
func only(addrs []hostAddr, candidate func(hostAddr) bool) (netip.Addr, error) {
	var found []netip.Addr
	var texts []string
	for _, a := range addrs {
		if a.usable && candidate(a) && !slices.Contains(found, a.addr) {
			found = append(found, a.addr)
			texts = append(texts, a.addr.String())
		}
	}
	switch len(found) {
	case 0:
		return netip.Addr{}, errors.New("this host has no address that others can reach: configure the network, or name the address")
	case 1:
		return found[0], nil
	}
	return netip.Addr{}, fmt.Errorf("this host has several addresses (%s): name the one that the other nodes can reach", strings.Join(texts, ", "))
}

func addresses() ([]hostAddr, error) {
	list, err := netlink.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil, fmt.Errorf("list addresses: %w", err)
	}
	const passing = unix.IFA_F_TENTATIVE | unix.IFA_F_DADFAILED | unix.IFA_F_DEPRECATED
	var out []hostAddr
	for _, a := range list {
		addr, ok := netip.AddrFromSlice(a.IP)
		if !ok {
			continue
		}
		addr = addr.Unmap()
		flags := passing
		if addr.Is6() {
			flags |= unix.IFA_F_TEMPORARY // for IPv4 the same bit says "secondary"
		}
		out = append(out, hostAddr{
			addr: addr, link: a.LinkIndex,
			usable: addr.IsGlobalUnicast() && a.Scope == unix.RT_SCOPE_UNIVERSE && a.Flags&flags == 0,
		})
	}
	return out, nil
}

func defaultRoutes() ([]defaultRoute, error) {
	var out []defaultRoute
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		list, err := netlink.RouteList(nil, family)
		if err != nil {
			return nil, fmt.Errorf("list routes: %w", err)
		}
		for _, r := range list {
			if r.Dst != nil {
				if ones, _ := r.Dst.Mask.Size(); ones != 0 {
					continue
				}
			}
			if r.Type != unix.RTN_UNICAST {
				continue
			}
			route := defaultRoute{link: r.LinkIndex, v6: family == netlink.FAMILY_V6, metric: r.Priority}
			if src, ok := netip.AddrFromSlice(r.Src); ok {
				route.source = src.Unmap()
			}
			if len(r.MultiPath) == 0 {
				out = append(out, route)
			}
			for _, hop := range r.MultiPath {
				route.link = hop.LinkIndex
				out = append(out, route)
			}
		}
	}
	return out, nil
}
