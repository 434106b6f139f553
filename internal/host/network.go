package host

import (
	"fmt"
	"net"
	"net/netip"
)

// NetworkOf returns the network that an address of this host is in, as its
// interface has it: 10.0.1.0/24 for 10.0.1.5/24.
func NetworkOf(a netip.Addr) (netip.Prefix, error) {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("list addresses: %w", err)
	}
	for _, x := range addrs {
		p, err := netip.ParsePrefix(x.String())
		if err == nil && p.Addr().Unmap() == a {
			return p.Masked(), nil
		}
	}
	return netip.Prefix{}, fmt.Errorf("address %s is not on this host", a)
}
