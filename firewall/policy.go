package firewall

import (
	"errors"
	"fmt"
	"net/netip"
)

// The values of [Policy.Mode].
const (
	// ModePorts closes pgha's own ports to everyone but those named.
	ModePorts = "ports"
	// ModeOff leaves no table in the kernel.
	ModeOff = "off"
)

// Ports are the TCP ports that the policy guards. Zero means that this node
// does not use the port (a witness has no PostgreSQL): it is left alone, as any
// other port of the host.
type Ports struct {
	Postgres   uint16
	ReadWrite  uint16
	ReadOnly   uint16
	Patroni    uint16
	EtcdClient uint16
	EtcdPeer   uint16
	Stats      uint16
	Health     uint16
	API        uint16
}

// named is a port with its name in texts and counters.
type named struct {
	name string
	port uint16
}

// all lists the ports in use, in the order of the rules.
func (p Ports) all() []named {
	return inUse([]named{
		{"postgres", p.Postgres},
		{"readwrite", p.ReadWrite},
		{"readonly", p.ReadOnly},
		{"patroni", p.Patroni},
		{"etcdclient", p.EtcdClient},
		{"etcdpeer", p.EtcdPeer},
		{"stats", p.Stats},
		{"health", p.Health},
		{"api", p.API},
	})
}

func inUse(ports []named) []named {
	var used []named
	for _, n := range ports {
		if n.port != 0 {
			used = append(used, n)
		}
	}
	return used
}

// Policy says who may reach which port.
type Policy struct {
	// Mode is ModePorts or ModeOff.
	Mode string
	// Ports are the ports to guard.
	Ports Ports
	// Members holds the address of every member of the cluster, this one and
	// the witness included. They may reach every port.
	Members []netip.Addr
	// Clients may reach ReadWrite, ReadOnly, Stats, Health and API. Empty means
	// nobody, not everybody.
	Clients []netip.Prefix
	// Probes are the sources of a load balancer's health probes. They may reach
	// Health, ReadWrite and ReadOnly.
	Probes []netip.Addr
	// Former holds the addresses of former members. They may reach API, where they
	// are told that they are members no more.
	Former []netip.Addr
	// JoinOpen opens API to everyone, with new connections limited in rate, so
	// that a host which is no member yet can join.
	JoinOpen bool
}

// Validate reports everything that is wrong with the policy, joined into one
// error. A policy with ModeOff needs nothing else.
func (p Policy) Validate() error {
	switch p.Mode {
	case ModeOff:
		return nil
	case ModePorts:
	default:
		return fmt.Errorf("unknown firewall mode %q: use %q or %q", p.Mode, ModePorts, ModeOff)
	}
	var errs []error
	ports := p.Ports.all()
	if len(ports) == 0 {
		errs = append(errs, errors.New("firewall policy names no port"))
	}
	seen := map[uint16]string{}
	for _, n := range ports {
		if other, ok := seen[n.port]; ok {
			errs = append(errs, fmt.Errorf("port %d is given to both %s and %s", n.port, other, n.name))
		}
		seen[n.port] = n.name
	}
	if p.JoinOpen && p.Ports.API == 0 {
		errs = append(errs, errors.New("firewall policy opens the API for joining but names no API port"))
	}
	if len(p.Members) == 0 {
		errs = append(errs, errors.New("firewall policy names no member: it would cut this node off from its cluster"))
	}
	for _, a := range p.Members {
		errs = append(errs, checkAddr("member", a))
	}
	for _, a := range p.Probes {
		errs = append(errs, checkAddr("probe source", a))
	}
	for _, a := range p.Former {
		errs = append(errs, checkAddr("former member", a))
	}
	for _, c := range p.Clients {
		errs = append(errs, checkPrefix(c))
	}
	return errors.Join(errs...)
}

func checkAddr(what string, a netip.Addr) error {
	switch {
	case !a.IsValid():
		return fmt.Errorf("%s address is empty", what)
	case a.Zone() != "":
		return fmt.Errorf("%s address %s has a zone: the firewall cannot match it, use an address without one", what, a)
	case a.IsUnspecified() || a.IsMulticast():
		return fmt.Errorf("%s address %s is not the address of a host", what, a)
	}
	return nil
}

func checkPrefix(c netip.Prefix) error {
	switch {
	case !c.IsValid():
		return fmt.Errorf("client network %q is not a network in CIDR notation", c)
	case c.Addr().Is4In6():
		return fmt.Errorf("client network %s is an IPv4 network in IPv6 form: write it as IPv4", c)
	case c.Addr().IsMulticast():
		return fmt.Errorf("client network %s is multicast", c)
	}
	return nil
}
