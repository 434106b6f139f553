package pki

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"net"
	"net/netip"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestNewCA(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, clusterA, now)
	c := ca.cert
	if ca.ClusterID() != clusterA || c.Subject.CommonName != "pgha CA main" {
		t.Errorf("cluster %s, subject %s", ca.ClusterID(), c.Subject)
	}
	if !c.IsCA || !c.BasicConstraintsValid || !c.MaxPathLenZero || c.MaxPathLen != 0 {
		t.Errorf("basic constraints: CA %v, path length %d", c.IsCA, c.MaxPathLen)
	}
	if c.KeyUsage != x509.KeyUsageCertSign|x509.KeyUsageCRLSign {
		t.Errorf("key usage %b", c.KeyUsage)
	}
	if !c.NotAfter.Equal(now.Add(CALifetime)) || !c.NotBefore.Equal(now.Add(-5*time.Minute)) {
		t.Errorf("valid from %s to %s", c.NotBefore, c.NotAfter)
	}
	if len(c.SubjectKeyId) == 0 || !bytes.Equal(c.SubjectKeyId, c.AuthorityKeyId) {
		t.Errorf("SKI %x, AKI %x", c.SubjectKeyId, c.AuthorityKeyId)
	}
	if pub, ok := c.PublicKey.(*ecdsa.PublicKey); !ok || pub.Curve != elliptic.P256() {
		t.Errorf("key is %T", c.PublicKey)
	}
}

func TestNewCARefuses(t *testing.T) {
	for _, tc := range []struct{ name, id, cluster string }{
		{"no UUID", "main", "main"},
		{"no name", clusterA, ""},
		{"name too long", clusterA, strings.Repeat("x", 57)},
		{"control character", clusterA, "a\nb"},
	} {
		if _, err := NewCA(tc.id, tc.cluster, time.Now()); err == nil {
			t.Errorf("%s: accepted", tc.name)
		}
	}
}

func TestLoadCA(t *testing.T) {
	now := time.Now()
	ca, other := newCA(t, clusterA, now), newCA(t, clusterA, now)
	key, err := ca.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	otherKey, err := other.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	leaf := issue(t, ca, specFor(clusterA, "n1", RoleNode), now)
	for _, tc := range []struct {
		name      string
		cert, key []byte
		want      string // "" = accepted
	}{
		{"its own", ca.CertPEM(), key, ""},
		{"key of another CA", ca.CertPEM(), otherKey, "does not belong"},
		{"a leaf", leaf.CertPEM, leaf.KeyPEM, "is no CA"},
		{"two certificates", append(ca.CertPEM(), other.CertPEM()...), key, "data after"},
		{"swapped", key, ca.CertPEM(), "want CERTIFICATE"},
		{"empty certificate", nil, key, "no PEM block"},
		{"empty key", ca.CertPEM(), nil, "no PEM block"},
		{"altered", reissued(t, ca, otherKey), key, "not self-signed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := LoadCA(tc.cert, tc.key)
			if tc.want != "" {
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("got %v, want an error with %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if got.ClusterID() != clusterA || !bytes.Equal(got.CertPEM(), ca.CertPEM()) {
				t.Fatal("loaded CA differs from the saved one")
			}
			// What the loaded one signs must verify against the first one.
			b := issue(t, got, specFor(clusterA, "n2", RoleNode), now)
			if err := issuedBy(b.Leaf, ca.cert); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// reissued is ca's certificate with ca's public key, but another validity,
// signed with a key that is not ca's: what a pin alone cannot tell apart.
func reissued(t *testing.T, ca *CA, signerKey []byte) []byte {
	t.Helper()
	signer, err := parseKey(signerKey)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := *ca.cert
	tmpl.NotAfter = tmpl.NotAfter.Add(time.Hour)
	parent := tmpl
	parent.PublicKey = &signer.PublicKey // CreateCertificate checks that it fits the signer
	der, err := x509.CreateCertificate(rand.Reader, &tmpl, &parent, &ca.key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der})
}

// misled is ca in the hands of somebody who makes it sign for clusterB.
func misled(ca *CA) *CA { return &CA{cert: ca.cert, key: ca.key, clusterID: clusterB} }

func csrWith(t *testing.T, key crypto.Signer, tmpl x509.CertificateRequest) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der})
}

func TestSignIgnoresTheRequest(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, clusterA, now)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// BasicConstraints CA:TRUE, and names that the joiner has no right to.
	csr := csrWith(t, key, x509.CertificateRequest{
		Subject:         pkix.Name{CommonName: "postgres", Organization: []string{"evil"}},
		DNSNames:        []string{"other.example.test"},
		IPAddresses:     []net.IP{net.IPv4(192, 0, 2, 1)},
		EmailAddresses:  []string{"a@example.test"},
		URIs:            []*url.URL{Identity{clusterA, "n9", RoleAdmin}.uri()},
		ExtraExtensions: []pkix.Extension{{Id: []int{2, 5, 29, 19}, Critical: true, Value: []byte{0x30, 0x03, 0x01, 0x01, 0xff}}},
	})
	spec := specFor(clusterA, "n1", RoleNode)
	out, err := ca.Sign(csr, spec, now)
	if err != nil {
		t.Fatal(err)
	}
	c, err := parseCert(out)
	if err != nil {
		t.Fatal(err)
	}
	type facts struct {
		Subject        string
		DNS, URI, IP   []string
		Mail           []string
		CA, BC         bool
		KU             x509.KeyUsage
		EKU            []x509.ExtKeyUsage
		From, To       time.Time
		AKI            []byte
		Key, SKILength bool
	}
	got := facts{
		Subject: c.Subject.String(), DNS: c.DNSNames, Mail: c.EmailAddresses, CA: c.IsCA, BC: c.BasicConstraintsValid,
		KU: c.KeyUsage, EKU: c.ExtKeyUsage, From: c.NotBefore, To: c.NotAfter, AKI: c.AuthorityKeyId,
		Key: key.PublicKey.Equal(c.PublicKey), SKILength: len(c.SubjectKeyId) == 20,
	}
	for _, u := range c.URIs {
		got.URI = append(got.URI, u.String())
	}
	for _, ip := range c.IPAddresses {
		got.IP = append(got.IP, ip.String())
	}
	want := facts{
		Subject: "CN=n1", DNS: []string{serverName, "n1"}, URI: []string{spec.Identity.String()}, IP: []string{"127.0.0.1", "::1"},
		BC: true, KU: x509.KeyUsageDigitalSignature,
		EKU:  []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		From: now.Add(-5 * time.Minute).UTC(), To: now.Add(LeafLifetime).UTC(), AKI: ca.cert.SubjectKeyId, Key: true, SKILength: true,
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Fatalf("certificate differs (-want +got):\n%s", diff)
	}
	if len(c.Extensions) != 6 {
		t.Errorf("%d extensions, want KU, EKU, BC, SKI, AKI, SAN", len(c.Extensions))
	}
}

func TestSignRules(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, clusterA, now)
	_, good, err := NewKeyAndCSR("n1")
	if err != nil {
		t.Fatal(err)
	}
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	small, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	big, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(good)
	forged := bytes.Clone(block.Bytes)
	forged[len(forged)-1] ^= 1
	for _, tc := range []struct {
		name string
		csr  []byte
		edit func(*LeafSpec)
		now  time.Time
		want string // "" = signed
	}{
		{name: "plain"},
		{name: "P-384", csr: csrWith(t, big, x509.CertificateRequest{})},
		{name: "no names, as for a client", edit: func(s *LeafSpec) { s.DNSNames, s.IPs = nil, nil }},
		{name: "wildcard of the load balancer", edit: func(s *LeafSpec) { s.DNSNames = []string{"*.db.example.test"} }},
		{name: "node name with an underscore", edit: func(s *LeafSpec) { s.DNSNames = []string{"n_1"} }},
		{name: "RSA", csr: csrWith(t, rsaKey, x509.CertificateRequest{}), want: "want ECDSA"},
		{name: "P-224", csr: csrWith(t, small, x509.CertificateRequest{}), want: "want 256"},
		{name: "forged signature", csr: pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: forged}), want: "check signature"},
		{name: "no PEM", csr: []byte("x"), want: "no PEM block"},
		{name: "a certificate", csr: ca.CertPEM(), want: "want CERTIFICATE REQUEST"},
		{name: "two requests", csr: append(bytes.Clone(good), good...), want: "data after"},
		{name: "other cluster", edit: func(s *LeafSpec) { s.Identity.ClusterID = clusterB }, want: clusterB},
		{name: "bad node", edit: func(s *LeafSpec) { s.Identity.Node = "N" }, want: "node name"},
		{name: "bad role", edit: func(s *LeafSpec) { s.Identity.Role = "ca" }, want: "role"},
		{name: "no common name", edit: func(s *LeafSpec) { s.CommonName = "" }, want: "common name"},
		{name: "long common name", edit: func(s *LeafSpec) { s.CommonName = strings.Repeat("x", 65) }, want: "common name"},
		{name: "negative lifetime", edit: func(s *LeafSpec) { s.Lifetime = -1 }, want: "negative"},
		{name: "address as name", edit: func(s *LeafSpec) { s.DNSNames = []string{"192.0.2.1"} }, want: "belongs among the addresses"},
		{name: "empty name", edit: func(s *LeafSpec) { s.DNSNames = []string{""} }, want: "no DNS name"},
		{name: "name with a space", edit: func(s *LeafSpec) { s.DNSNames = []string{"a b"} }, want: "no DNS name"},
		{name: "inner wildcard", edit: func(s *LeafSpec) { s.DNSNames = []string{"a.*.b"} }, want: "no DNS name"},
		{name: "invalid address", edit: func(s *LeafSpec) { s.IPs = []netip.Addr{{}} }, want: "cannot stand"},
		{name: "any address", edit: func(s *LeafSpec) { s.IPs = []netip.Addr{netip.IPv4Unspecified()} }, want: "cannot stand"},
		{name: "zone", edit: func(s *LeafSpec) { s.IPs = []netip.Addr{netip.MustParseAddr("fe80::1%eth0")} }, want: "cannot stand"},
		{name: "before the CA", now: now.Add(-time.Hour), want: "check the clock"},
		{name: "after the CA", now: now.Add(CALifetime + time.Hour), want: "check the clock"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			spec, csr, at := specFor(clusterA, "n1", RoleNode), good, now
			if tc.edit != nil {
				tc.edit(&spec)
			}
			if tc.csr != nil {
				csr = tc.csr
			}
			if !tc.now.IsZero() {
				at = tc.now
			}
			out, err := ca.Sign(csr, spec, at)
			if tc.want != "" {
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("got %v, want an error with %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if c, err := parseCert(out); err != nil || issuedBy(c, ca.cert) != nil {
				t.Fatalf("certificate does not verify: %v", err)
			}
		})
	}
	spec := specFor(clusterB, "n1", RoleNode)
	if _, err := ca.Sign(good, spec, now); !errors.Is(err, ErrOtherCluster) {
		t.Fatalf("got %v, want ErrOtherCluster", err)
	}
}

func TestSignLifetime(t *testing.T) {
	now := time.Now().Truncate(time.Second)
	ca := newCA(t, clusterA, now)
	end := now.Add(CALifetime)
	for _, tc := range []struct {
		name     string
		at       time.Time
		lifetime time.Duration
		want     time.Time
	}{
		{"default", now, 0, now.Add(LeafLifetime)},
		{"given", now, time.Hour, now.Add(time.Hour)},
		{"never beyond the CA", end.Add(-time.Hour), 0, end},
	} {
		spec := specFor(clusterA, "n1", RoleNode)
		spec.Lifetime = tc.lifetime
		if got := issue(t, ca, spec, tc.at).Leaf.NotAfter; !got.Equal(tc.want) {
			t.Errorf("%s: valid to %s, want %s", tc.name, got, tc.want)
		}
	}
}

func TestSerialsAreRandomAndWide(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	_, csr, err := NewKeyAndCSR("n1")
	if err != nil {
		t.Fatal(err)
	}
	seen, widest := map[string]bool{}, 0
	for range 64 {
		out, err := ca.Sign(csr, specFor(clusterA, "n1", RoleNode), time.Now())
		if err != nil {
			t.Fatal(err)
		}
		c, err := parseCert(out)
		if err != nil {
			t.Fatal(err)
		}
		seen[c.SerialNumber.String()] = true
		widest = max(widest, c.SerialNumber.BitLen())
	}
	if len(seen) != 64 || widest < 120 || widest > 128 {
		t.Fatalf("%d different serials of 64, widest %d bits", len(seen), widest)
	}
}

func TestPinOf(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	pin, err := PinOf(ca.CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	spki, err := x509.MarshalPKIXPublicKey(&ca.key.PublicKey)
	if err != nil {
		t.Fatal(err)
	}
	if pin != sha256.Sum256(spki) {
		t.Fatal("pin is not the hash of the public key info")
	}
	if _, err := PinOf([]byte("x")); err == nil {
		t.Fatal("no error for garbage")
	}
}
