package firewall

import (
	"flag"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"pgregory.net/rapid"
)

var update = flag.Bool("update", false, "write the golden files anew")

var testPorts = Ports{
	Postgres: 5442, ReadWrite: 5432, ReadOnly: 5433, Patroni: 8008,
	EtcdClient: 2379, EtcdPeer: 2380, Stats: 8404, Health: 8405, API: 8432,
}

func testPolicies() map[string]Policy {
	return map[string]Policy{
		"off": {Mode: ModeOff},
		"members": {
			Mode: ModePorts, Ports: testPorts,
			Members: addrs("10.0.0.12", "10.0.0.11", "::ffff:10.0.0.13", "10.0.0.11"),
		},
		"full": {
			Mode: ModePorts, Ports: testPorts,
			Members:  addrs("10.0.0.11", "fd00::11", "fd00::12"),
			Clients:  prefixes("10.1.0.0/16", "10.1.7.0/24", "10.2.0.0/16", "192.0.2.7/32", "10.4.0.0/24", "10.4.1.0/25", "2001:db8::/32"),
			Probes:   addrs("168.63.129.16", "fe80::1"),
			JoinOpen: true,
		},
		"everybody": {
			Mode: ModePorts, Ports: testPorts,
			Members: addrs("10.0.0.11"), Clients: prefixes("0.0.0.0/0", "::/0"),
		},
		"witness": {
			Mode: ModePorts, Ports: Ports{EtcdClient: 2379, EtcdPeer: 2380, API: 8432},
			Members: addrs("10.0.0.11", "10.0.0.12", "10.0.0.13"),
		},
		"former": {
			Mode: ModePorts, Ports: testPorts,
			Members: addrs("10.0.0.11"), Former: addrs("10.0.0.12", "10.0.0.12", "fd00::13"),
		},
	}
}

func TestCompileGolden(t *testing.T) {
	for name, policy := range testPolicies() {
		t.Run(name, func(t *testing.T) {
			r, err := Compile(policy)
			if err != nil {
				t.Fatal(err)
			}
			golden := filepath.Join("testdata", name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(r.String()), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(string(want), r.String()); d != "" {
				t.Errorf("ruleset differs from %s (-want +got):\n%s", golden, d)
			}
		})
	}
}

func TestValidate(t *testing.T) {
	with := func(change func(*Policy)) Policy {
		p := testPolicies()["members"]
		change(&p)
		return p
	}
	tests := map[string]struct {
		policy Policy
		want   string // part of the error; "" for none
	}{
		"good":               {with(func(*Policy) {}), ""},
		"off needs nothing":  {Policy{Mode: ModeOff}, ""},
		"no mode":            {Policy{}, `unknown firewall mode ""`},
		"unknown mode":       {with(func(p *Policy) { p.Mode = "host" }), `unknown firewall mode "host"`},
		"no ports":           {with(func(p *Policy) { p.Ports = Ports{} }), "names no port"},
		"port twice":         {with(func(p *Policy) { p.Ports.ReadOnly = 5432 }), "port 5432 is given to both readwrite and readonly"},
		"join without API":   {with(func(p *Policy) { p.Ports.API = 0; p.JoinOpen = true }), "names no API port"},
		"no members":         {with(func(p *Policy) { p.Members = nil }), "names no member"},
		"empty member":       {with(func(p *Policy) { p.Members = append(p.Members, netip.Addr{}) }), "member address is empty"},
		"member with zone":   {with(func(p *Policy) { p.Members = addrs("fe80::1%eth0") }), "has a zone"},
		"unspecified member": {with(func(p *Policy) { p.Members = addrs("0.0.0.0") }), "not the address of a host"},
		"multicast probe":    {with(func(p *Policy) { p.Probes = addrs("ff02::1") }), "probe source address ff02::1 is not"},
		"empty client":       {with(func(p *Policy) { p.Clients = []netip.Prefix{{}} }), "CIDR notation"},
		"mapped client":      {with(func(p *Policy) { p.Clients = prefixes("::ffff:10.0.0.0/104") }), "write it as IPv4"},
		"multicast client":   {with(func(p *Policy) { p.Clients = prefixes("224.0.0.0/4") }), "multicast"},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			err := tc.policy.Validate()
			_, compileErr := Compile(tc.policy)
			if (err == nil) != (compileErr == nil) {
				t.Errorf("Validate says %v, Compile says %v", err, compileErr)
			}
			switch {
			case tc.want == "" && err != nil:
				t.Errorf("unexpected error: %v", err)
			case tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)):
				t.Errorf("error is %v, want one that says %q", err, tc.want)
			}
		})
	}
}

func TestAggregate(t *testing.T) {
	tests := map[string]struct {
		in   []netip.Prefix
		v6   bool
		want []string
	}{
		"none":             {nil, false, nil},
		"other family":     {prefixes("::/0"), false, nil},
		"not masked":       {prefixes("10.0.0.7/8"), false, []string{"10.0.0.0/8"}},
		"contained":        {prefixes("10.1.0.0/16", "10.0.0.0/8"), false, []string{"10.0.0.0/8"}},
		"adjacent":         {prefixes("10.0.1.0/24", "10.0.0.0/24"), false, []string{"10.0.0.0/23"}},
		"adjacent, no net": {prefixes("10.0.1.0/24", "10.0.2.0/24"), false, []string{"10.0.1.0-10.0.2.255"}},
		"gap":              {prefixes("10.0.2.0/24", "10.0.0.0/24"), false, []string{"10.0.0.0/24", "10.0.2.0/24"}},
		"up to the end":    {prefixes("255.255.255.255/32", "128.0.0.0/1"), false, []string{"128.0.0.0/1"}},
		"everything":       {prefixes("0.0.0.0/0", "10.0.0.0/8"), false, []string{"0.0.0.0/0"}},
		"ipv6":             {prefixes("2001:db8::/33", "2001:db8:8000::/33"), true, []string{"2001:db8::/32"}},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			var got []string
			for _, r := range aggregate(tc.in, tc.v6) {
				got = append(got, r.String())
			}
			if d := cmp.Diff(tc.want, got); d != "" {
				t.Errorf("-want +got:\n%s", d)
			}
		})
	}
}

// TestAggregateCovers draws prefixes from a small corner of the address space
// and asks of every address there whether both forms agree.
func TestAggregateCovers(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		for _, base := range []netip.Addr{netip.MustParseAddr("255.255.255.0"), netip.MustParseAddr("fd00::")} {
			in := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) netip.Prefix {
				b := base.AsSlice()
				b[len(b)-1] = rapid.Byte().Draw(t, "host")
				a, _ := netip.AddrFromSlice(b)
				return netip.PrefixFrom(a, base.BitLen()-rapid.IntRange(0, 8).Draw(t, "bits"))
			}), 0, 12).Draw(t, "prefixes")
			ranges := aggregate(in, base.Is6())
			for i := 1; i < len(ranges); i++ {
				if ranges[i-1].last.Next().Compare(ranges[i].first) >= 0 {
					t.Fatalf("%v and %v touch", ranges[i-1], ranges[i])
				}
			}
			for a, n := base, 0; n < 256; a, n = a.Next(), n+1 {
				want, got := false, false
				for _, p := range in {
					want = want || p.Contains(a)
				}
				for _, r := range ranges {
					got = got || a.Compare(r.first) >= 0 && a.Compare(r.last) <= 0
				}
				if got != want {
					t.Fatalf("%v: covered %v, want %v by %v", a, got, want, in)
				}
			}
		}
	})
}
