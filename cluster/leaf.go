package cluster

import (
	"net/netip"
	"slices"

	"pgha/pki"
)

// Roles returns the certificates that a node of this role holds, in a fixed
// order. A witness has the node's own alone: it serves no data.
func (r NodeRole) Roles() []pki.Role {
	if r == RoleData {
		return []pki.Role{pki.RoleNode, pki.RolePostgres, pki.RoleHAProxy, pki.RolePatroni, pki.RoleAdmin}
	}
	return []pki.Role{pki.RoleNode}
}

// Common names of the roles that are not called like their node.
const (
	HAProxyCN = "haproxy"
	PatroniCN = "patroni"
	AdminCN   = "pgha-admin"
)

// LeafSpecs is the one source of what the certificates of self say, at init,
// at join and at renewal. members is the roster; self counts whether or not it
// is in there. The same input always gives the same output.
//
// Each certificate names its node, its address and localhost. PostgreSQL's
// names every member and the load balancer besides, because a client that
// checks the name may reach any of them. The administrator's names nobody: it
// is a client's only.
func LeafSpecs(id Identity, self Member, members []Member, s Settings) map[pki.Role]pki.LeafSpec {
	own := names{}
	own.add(self.Name, "localhost", "127.0.0.1", "::1", self.Addr.String())
	all := names{}
	all.add(self.SANs...)
	all.add(s.SANs...)
	for _, m := range members {
		all.add(m.Name, m.Addr.String())
		all.add(m.SANs...)
	}
	all.add(own.dns...)
	for _, ip := range own.ips {
		all.add(ip.String())
	}

	specs := map[pki.Role]pki.LeafSpec{}
	for _, role := range self.Role.Roles() {
		spec := pki.LeafSpec{
			Identity:   pki.Identity{ClusterID: id.ID, Node: self.Name, Role: role},
			CommonName: self.Name,
			Lifetime:   pki.LeafLifetime,
		}
		n := own
		switch role {
		case pki.RolePostgres:
			n = all
		case pki.RoleHAProxy:
			spec.CommonName = HAProxyCN
		case pki.RolePatroni:
			spec.CommonName = PatroniCN
		case pki.RoleAdmin:
			spec.CommonName = AdminCN
			n = names{}
		}
		spec.DNSNames, spec.IPs = n.sorted()
		specs[role] = spec
	}
	return specs
}

// names collects what a certificate is valid for.
type names struct {
	dns []string
	ips []netip.Addr
}

func (n *names) add(values ...string) {
	for _, v := range values {
		if ip, err := netip.ParseAddr(v); err == nil {
			n.ips = append(n.ips, ip.Unmap())
		} else if v != "" {
			n.dns = append(n.dns, v)
		}
	}
}

func (n names) sorted() ([]string, []netip.Addr) {
	dns, ips := slices.Clone(n.dns), slices.Clone(n.ips)
	slices.Sort(dns)
	slices.SortFunc(ips, netip.Addr.Compare)
	return slices.Compact(dns), slices.Compact(ips)
}
