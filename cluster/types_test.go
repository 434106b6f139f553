package cluster

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestValidateName(t *testing.T) {
	for name, ok := range map[string]bool{
		"a": true, "node_1": true, "n" + strings.Repeat("1", 30): true,
		"": false, "1node": false, "Node": false, "node-1": false, "node.1": false, "_n": false,
		"n" + strings.Repeat("1", 31): false, "node1\n": false, "nöde": false, "node 1": false,
	} {
		err := ValidateName("node name", name)
		if (err == nil) != ok {
			t.Errorf("ValidateName(%q) = %v, want ok=%v", name, err, ok)
		}
		if err != nil && (!strings.HasPrefix(err.Error(), "node name") || !strings.Contains(err.Error(), "1 to 31 of a-z, 0-9 and _")) {
			t.Errorf("ValidateName(%q): %q does not say what is allowed", name, err)
		}
	}
}

// A node's name becomes a certificate's common name, by which PostgreSQL maps
// certificates to users.
func TestNodeNameIsNoOtherCertificatesName(t *testing.T) {
	for _, cn := range []string{HAProxyCN, PatroniCN, AdminCN, "localhost", "postgres", "replicator"} {
		if err := ValidateNodeName(cn); err == nil {
			t.Errorf("a node may be called %q", cn)
		}
	}
}

func TestNewIdentity(t *testing.T) {
	a := must[Identity](t)(NewIdentity("shop", time.Now()))
	b := must[Identity](t)(NewIdentity("shop", time.Now()))
	if a.ID == b.ID {
		t.Error("two clusters have the same id")
	}
	if err := a.Validate(); err != nil {
		t.Error(err)
	}
	if _, err := NewIdentity("Shop!", time.Now()); err == nil {
		t.Error("a bad cluster name was accepted")
	}
	if err := (Identity{ID: strings.ToUpper(a.ID), Name: "shop"}).Validate(); err == nil {
		t.Error("an id in upper case was accepted")
	}
}

func TestPortsValidate(t *testing.T) {
	if err := DefaultPorts().Validate(); err != nil {
		t.Errorf("default ports: %v", err)
	}
	p := DefaultPorts()
	p.Stats, p.Patroni = p.API, 0
	err := p.Validate()
	if err == nil || !strings.Contains(err.Error(), "stats and api are both 8432") || !strings.Contains(err.Error(), "port patroni is 0") {
		t.Errorf("got %v, want both faults named", err)
	}
}

func TestSettingsValidate(t *testing.T) {
	good := Settings{
		Profile: "steady", SANs: []string{"db.example.com", "10.0.0.9", "*.db.example.com", "::1"},
		ClientNets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, ProbeAddrs: []netip.Addr{netip.MustParseAddr("168.63.129.16")},
	}
	if err := good.Validate(); err != nil {
		t.Errorf("good settings: %v", err)
	}
	for want, s := range map[string]Settings{
		`profile "slow"`:    {Profile: "slow"},
		`"db example"`:      {Profile: "fast", SANs: []string{"db example"}},
		`10.0.0.0/8`:        {Profile: "fast", ClientNets: []netip.Prefix{netip.MustParsePrefix("10.1.2.3/8")}},
		`0.0.0.0`:           {Profile: "fast", ProbeAddrs: []netip.Addr{netip.IPv4Unspecified()}},
		`"-db.example.com"`: {Profile: "fast", SANs: []string{"-db.example.com"}},
	} {
		if err := s.Validate(); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("settings %+v: got %v, want %s named", s, err, want)
		}
	}
}

func TestMemberURLs(t *testing.T) {
	m := Member{Addr: netip.MustParseAddr("fd00::1"), Ports: DefaultPorts()}
	if m.PeerURL() != "https://[fd00::1]:2380" || m.ClientURL() != "https://[fd00::1]:2379" || m.APIAddr() != "[fd00::1]:8432" {
		t.Errorf("got %s, %s, %s", m.PeerURL(), m.ClientURL(), m.APIAddr())
	}
}

func TestCompatibleVersions(t *testing.T) {
	for _, c := range []struct {
		a, b string
		want bool
	}{
		{"1.2.0", "1.2.9", true}, {"v1.2.0", "1.3.0-rc1", true}, {"1.3.0", "1.2.0", true}, {"1.2.0", "1.4.0", false},
		{"1.9.0", "2.0.0", false}, {"dev", "1.2.0", true}, {"", "", true}, {"1.2", "1.4", false},
	} {
		if got := CompatibleVersions(c.a, c.b); got != c.want {
			t.Errorf("CompatibleVersions(%q, %q) = %v", c.a, c.b, got)
		}
	}
}
