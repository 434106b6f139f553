package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net/url"
	"strings"
	"testing"
	"time"
)

func TestIdentityEncoding(t *testing.T) {
	long := "a" + strings.Repeat("z", 62)
	for _, tc := range []struct {
		name string
		id   Identity
		ok   bool
	}{
		{"plain", Identity{clusterA, "n1", RoleNode}, true},
		{"one letter", Identity{clusterA, "a", RoleAdmin}, true},
		{"underscore", Identity{clusterA, "db_1_", RolePostgres}, true},
		{"63 characters", Identity{clusterA, long, RolePatroni}, true},
		{"64 characters", Identity{clusterA, long + "z", RolePatroni}, false},
		{"no node", Identity{clusterA, "", RoleNode}, false},
		{"digit first", Identity{clusterA, "1n", RoleNode}, false},
		{"underscore first", Identity{clusterA, "_n", RoleNode}, false},
		{"upper case", Identity{clusterA, "N1", RoleNode}, false},
		{"hyphen", Identity{clusterA, "n-1", RoleNode}, false},
		{"colon", Identity{clusterA, "n:1", RoleNode}, false},
		{"percent", Identity{clusterA, "n%31", RoleNode}, false},
		{"line break", Identity{clusterA, "n1\n", RoleNode}, false},
		{"unknown role", Identity{clusterA, "n1", "root"}, false},
		{"no role", Identity{clusterA, "n1", ""}, false},
		{"no cluster", Identity{"", "n1", RoleNode}, false},
		{"cluster no UUID", Identity{"main", "n1", RoleNode}, false},
		{"cluster in upper case", Identity{strings.ToUpper(clusterA), "n1", RoleNode}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if err := tc.id.Validate(); (err == nil) != tc.ok {
				t.Fatalf("Validate: %v, want ok=%v", err, tc.ok)
			}
			got, err := ParseIdentity(tc.id.String())
			if (err == nil) != tc.ok {
				t.Fatalf("ParseIdentity(%s): %v, want ok=%v", tc.id, err, tc.ok)
			}
			if tc.ok && got != tc.id {
				t.Fatalf("got %+v, want %+v", got, tc.id)
			}
		})
	}
}

func TestIdentityText(t *testing.T) {
	const want = "urn:pgha:" + clusterA + ":n1:haproxy"
	if got := (Identity{clusterA, "n1", RoleHAProxy}).String(); got != want {
		t.Fatalf("got %s, want %s", got, want)
	}
	for _, bad := range []string{"", "urn:pgha:", "urn:other:" + clusterA + ":n1:node", want + ":x", strings.TrimSuffix(want, ":haproxy")} {
		if id, err := ParseIdentity(bad); err == nil {
			t.Errorf("%q parsed as %+v", bad, id)
		}
	}
}

func TestIdentityOfCertificate(t *testing.T) {
	uri := func(s string) *url.URL {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		return u
	}
	id := Identity{clusterA, "n1", RoleNode}
	for _, tc := range []struct {
		name string
		uris []*url.URL
		ok   bool
	}{
		{"one", []*url.URL{id.uri()}, true},
		{"beside a foreign one", []*url.URL{uri("spiffe://example.test/x"), id.uri()}, true},
		{"none", nil, false},
		{"two", []*url.URL{id.uri(), id.uri()}, false},
		{"malformed", []*url.URL{uri("urn:pgha:x")}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := IdentityOf(&x509.Certificate{URIs: tc.uris})
			if (err == nil) != tc.ok || tc.ok && got != id {
				t.Fatalf("got %v, %v; want ok=%v", got, err, tc.ok)
			}
		})
	}
	if _, err := IdentityOf(&x509.Certificate{}); !errors.Is(err, ErrNoIdentity) {
		t.Fatalf("got %v, want ErrNoIdentity", err)
	}
	ca := newCA(t, clusterA, time.Now())
	for _, r := range []Role{RoleNode, RolePostgres, RoleHAProxy, RolePatroni, RoleAdmin} {
		want := Identity{clusterA, "n1", r}
		if got, err := IdentityOf(issue(t, ca, specFor(clusterA, "n1", r), time.Now()).Leaf); err != nil || got != want {
			t.Errorf("signed certificate: got %v, %v; want %v", got, err, want)
		}
	}
}

func TestPeerIdentityCountsVerifiedOnly(t *testing.T) {
	leaf := &x509.Certificate{URIs: []*url.URL{Identity{clusterA, "n1", RoleNode}.uri()}}
	if id, err := PeerIdentity(tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}); !errors.Is(err, ErrNoIdentity) {
		t.Fatalf("unverified certificate: got %v, %v; want ErrNoIdentity", id, err)
	}
	got, err := PeerIdentity(tls.ConnectionState{VerifiedChains: [][]*x509.Certificate{{leaf}}})
	if want := (Identity{clusterA, "n1", RoleNode}); err != nil || got != want {
		t.Fatalf("got %v, %v; want %v", got, err, want)
	}
}
