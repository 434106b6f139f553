package cluster

import (
	"net/netip"
	"testing"

	"github.com/google/go-cmp/cmp"

	"pgha/pki"
)

func addrs(ss ...string) []netip.Addr {
	var out []netip.Addr
	for _, s := range ss {
		out = append(out, netip.MustParseAddr(s))
	}
	return out
}

func TestLeafSpecs(t *testing.T) {
	id := Identity{ID: "6f1e7bde-0d3c-4b8e-9d0b-3f7a3d1f1a11", Name: "shop"}
	n1 := Member{Name: "node1", Role: RoleData, Addr: netip.MustParseAddr("10.0.0.1"), SANs: []string{"db.example.com"}}
	n2 := Member{Name: "node2", Role: RoleData, Addr: netip.MustParseAddr("10.0.0.2"), SANs: []string{"10.0.0.9"}}
	w := Member{Name: "w", Role: RoleWitness, Addr: netip.MustParseAddr("10.0.0.3")}
	set := Settings{SANs: []string{"rw.example.com", "::ffff:10.0.0.8"}}
	spec := func(role pki.Role, node, cn string, dns []string, ips []netip.Addr) pki.LeafSpec {
		return pki.LeafSpec{
			Identity: pki.Identity{ClusterID: id.ID, Node: node, Role: role}, CommonName: cn, DNSNames: dns, IPs: ips, Lifetime: pki.LeafLifetime,
		}
	}
	own, ownIPs := []string{"localhost", "node2"}, addrs("10.0.0.2", "127.0.0.1", "::1")
	want := map[pki.Role]pki.LeafSpec{
		pki.RoleNode:    spec(pki.RoleNode, "node2", "node2", own, ownIPs),
		pki.RoleHAProxy: spec(pki.RoleHAProxy, "node2", "haproxy", own, ownIPs),
		pki.RolePatroni: spec(pki.RolePatroni, "node2", "patroni", own, ownIPs),
		pki.RoleAdmin:   spec(pki.RoleAdmin, "node2", "pgha-admin", nil, nil),
		pki.RolePostgres: spec(pki.RolePostgres, "node2", "node2",
			[]string{"db.example.com", "localhost", "node1", "node2", "rw.example.com", "w"},
			addrs("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.8", "10.0.0.9", "127.0.0.1", "::1")),
	}
	got := LeafSpecs(id, n2, []Member{n1, n2, w}, set)
	if d := cmp.Diff(want, got, cmpOpts); d != "" {
		t.Errorf("data node:\n%s", d)
	}
	// Neither the order of the roster nor self's place in it matters.
	if d := cmp.Diff(got, LeafSpecs(id, n2, []Member{w, n1}, set), cmpOpts); d != "" {
		t.Errorf("other order:\n%s", d)
	}
	wantW := map[pki.Role]pki.LeafSpec{
		pki.RoleNode: spec(pki.RoleNode, "w", "w", []string{"localhost", "w"}, addrs("10.0.0.3", "127.0.0.1", "::1")),
	}
	if d := cmp.Diff(wantW, LeafSpecs(id, w, []Member{n1, n2, w}, set), cmpOpts); d != "" {
		t.Errorf("witness:\n%s", d)
	}
}
