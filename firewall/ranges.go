package firewall

import (
	"cmp"
	"net/netip"
	"slices"
)

// ipRange is a range of addresses of one family, both ends included.
type ipRange struct {
	first, last netip.Addr
}

// String gives the shortest notation that nft reads: an address, a network, or
// first-last.
func (r ipRange) String() string {
	if r.first == r.last {
		return r.first.String()
	}
	for bits := r.first.BitLen() - 1; bits >= 0; bits-- {
		p := netip.PrefixFrom(r.first, bits)
		if p.Masked().Addr() != r.first {
			break
		}
		if lastOf(p) == r.last {
			return p.String()
		}
	}
	return r.first.String() + "-" + r.last.String()
}

// aggregate gives the sorted, disjoint, non-adjacent ranges that cover exactly
// the prefixes of one family. The kernel refuses a batch with overlapping
// intervals, so nothing else may reach it.
func aggregate(prefixes []netip.Prefix, v6 bool) []ipRange {
	var in []ipRange
	for _, p := range prefixes {
		if p.Addr().Is6() == v6 {
			in = append(in, ipRange{p.Masked().Addr(), lastOf(p)})
		}
	}
	slices.SortFunc(in, func(a, b ipRange) int {
		return cmp.Or(a.first.Compare(b.first), a.last.Compare(b.last))
	})
	var out []ipRange
	for _, r := range in {
		if n := len(out) - 1; n >= 0 {
			// Next is invalid after the family's last address: nothing can follow.
			next := out[n].last.Next()
			if !next.IsValid() || r.first.Compare(next) <= 0 {
				if r.last.Compare(out[n].last) > 0 {
					out[n].last = r.last
				}
				continue
			}
		}
		out = append(out, r)
	}
	return out
}

// lastOf gives the last address of p.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	last, _ := netip.AddrFromSlice(b)
	return last
}

// hosts gives the sorted, distinct addresses of one family; an IPv4 address in
// IPv6 form counts as IPv4, as it appears on the wire.
func hosts(addrs []netip.Addr, v6 bool) []ipRange {
	var out []ipRange
	for _, a := range addrs {
		if a = a.Unmap(); a.Is6() == v6 {
			out = append(out, ipRange{a, a})
		}
	}
	slices.SortFunc(out, func(a, b ipRange) int { return a.first.Compare(b.first) })
	return slices.Compact(out)
}
