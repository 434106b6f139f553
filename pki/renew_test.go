package pki

import (
	"net/netip"
	"strings"
	"testing"
	"time"
)

func TestNeedsRenewal(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca, twin := newCA(t, clusterA, now), newCA(t, clusterA, now)
	base := specFor(clusterA, "n1", RolePostgres)
	b := issue(t, ca, base, now)
	life := b.Leaf.NotAfter.Sub(b.Leaf.NotBefore)
	at := func(share float64) time.Time { return b.Leaf.NotBefore.Add(time.Duration(share * float64(life))) }
	addr := netip.MustParseAddr
	cert := *ca.cert
	cert.RawSubject, cert.Subject.CommonName = nil, "pgha CA other"
	renamed := CA{cert: &cert, key: ca.key, clusterID: clusterA}
	for _, tc := range []struct {
		name string
		edit func(*LeafSpec)
		ca   []byte
		b    *Bundle
		now  time.Time
		want string // "" = no renewal
	}{
		{name: "fresh"},
		{name: "before its time", now: at(2.0/3 - 0.0201)},
		{name: "two thirds", now: at(2.0 / 3), want: "two thirds"},
		{name: "just before expiry", now: b.Leaf.NotAfter.Add(-time.Second), want: "two thirds"},
		{name: "expired", now: b.Leaf.NotAfter, want: "expired"},
		{name: "no certificate", b: &Bundle{}, want: "no certificate"},
		{name: "names in another order and case", edit: func(s *LeafSpec) { s.DNSNames = []string{"N1", strings.ToUpper(serverName), "n1"} }},
		{name: "addresses in another order and form", edit: func(s *LeafSpec) { s.IPs = []netip.Addr{addr("::1"), addr("::ffff:127.0.0.1")} }},
		{name: "another lifetime alone", edit: func(s *LeafSpec) { s.Lifetime = time.Hour }},
		{name: "name added", edit: func(s *LeafSpec) { s.DNSNames = append(s.DNSNames, "lb.example.test") }, want: "lb.example.test"},
		{name: "name removed", edit: func(s *LeafSpec) { s.DNSNames = s.DNSNames[:1] }, want: "its names"},
		{name: "address added", edit: func(s *LeafSpec) { s.IPs = append(s.IPs, addr("192.0.2.7")) }, want: "192.0.2.7"},
		{name: "address removed", edit: func(s *LeafSpec) { s.IPs = nil }, want: "its addresses"},
		{name: "common name", edit: func(s *LeafSpec) { s.CommonName = "x" }, want: "common name"},
		{name: "node", edit: func(s *LeafSpec) { s.Identity.Node = "n2" }, want: ":n2:"},
		{name: "role", edit: func(s *LeafSpec) { s.Identity.Role = RoleAdmin }, want: ":admin"},
		{name: "cluster", edit: func(s *LeafSpec) { s.Identity.ClusterID = clusterB }, want: clusterB},
		{name: "other CA", ca: twin.CertPEM(), want: "does not chain"},
		{name: "CA of another cluster", ca: newCA(t, clusterB, now).CertPEM(), want: "does not chain"},
		{name: "CA renewed with its key", ca: selfRenewed(t, ca), want: "beside it"},
		{name: "CA renamed with its key", ca: selfRenewed(t, &renamed), want: "issued by"},
		{name: "broken CA", ca: []byte("x"), want: "cannot be used"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bundle, spec, caPEM, when := b, base, ca.CertPEM(), now
			spec.DNSNames, spec.IPs = append([]string{}, base.DNSNames...), append([]netip.Addr{}, base.IPs...)
			if tc.edit != nil {
				tc.edit(&spec)
			}
			if tc.ca != nil {
				caPEM = tc.ca
			}
			if tc.b != nil {
				bundle = *tc.b
			}
			if !tc.now.IsZero() {
				when = tc.now
			}
			got, reason := NeedsRenewal(bundle, spec, caPEM, when)
			if got != (tc.want != "") || !strings.Contains(reason, tc.want) || got != (reason != "") {
				t.Fatalf("got %v, %q; want a reason with %q", got, reason, tc.want)
			}
		})
	}
}

// selfRenewed is ca's certificate made anew with the same key, self-signed as it should be.
func selfRenewed(t *testing.T, ca *CA) []byte {
	t.Helper()
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	return reissued(t, ca, key)
}

func TestRenewalJitter(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, clusterA, now)
	spec := specFor(clusterA, "n1", RoleNode)
	moments := map[time.Time]bool{}
	for range 200 {
		b := issue(t, ca, spec, now)
		due := renewAt(b.Leaf)
		life := b.Leaf.NotAfter.Sub(b.Leaf.NotBefore)
		latest := b.Leaf.NotBefore.Add(life * 2 / 3)
		if due.After(latest) || due.Before(latest.Add(-life/50)) {
			t.Fatalf("due %s, want within 2%% of the life before %s", due, latest)
		}
		if again, err := ParseBundle(b.Encode()); err != nil || !renewAt(again.Leaf).Equal(due) {
			t.Fatalf("the moment changed with a second reading: %v", err)
		}
		if early, _ := NeedsRenewal(b, spec, ca.CertPEM(), due.Add(-time.Nanosecond)); early {
			t.Fatal("renewed before it is due")
		}
		if at, _ := NeedsRenewal(b, spec, ca.CertPEM(), due); !at {
			t.Fatal("not renewed when due")
		}
		moments[due] = true
	}
	if len(moments) < 190 {
		t.Fatalf("200 certificates are due at %d different moments", len(moments))
	}
}
