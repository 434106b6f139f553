package main

import (
	"fmt"
	"net"
	"net/netip"
)

// localRoute returns the address from which this host speaks to hostport. No
// packet is sent: connecting a UDP socket only asks the routing table.
func localRoute(hostport string) (netip.Addr, error) {
	c, err := net.Dial("udp", hostport)
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find route to %s: %w", hostport, err)
	}
	defer func() { _ = c.Close() }()
	ap, err := netip.ParseAddrPort(c.LocalAddr().String())
	if err != nil {
		return netip.Addr{}, fmt.Errorf("find route to %s: %w", hostport, err)
	}
	return ap.Addr().Unmap(), nil
}
