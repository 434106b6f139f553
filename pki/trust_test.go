package pki

import (
	"bytes"
	"crypto/tls"
	"errors"
	"strings"
	"testing"
	"time"
)

func TestTrustFile(t *testing.T) {
	now := time.Now()
	old, next, third := newCA(t, clusterA, now), newCA(t, clusterA, now), newCA(t, clusterA, now)
	foreign := newCA(t, clusterB, now)
	leaf := issue(t, old, specFor(clusterA, "n1", RoleNode), now)
	for _, tc := range []struct {
		name string
		file []byte
		want int    // CAs
		err  string // part of the message
	}{
		{"one", TrustFile(old.CertPEM()), 1, ""},
		{"two", TrustFile(next.CertPEM(), old.CertPEM()), 2, ""},
		{"two, with blank lines", append(append([]byte("\n"), next.CertPEM()...), append([]byte("\n\n"), old.CertPEM()...)...), 2, ""},
		{"none", nil, 0, "no PEM block"},
		{"garbage", []byte("x"), 0, "no PEM block"},
		{"cut off", append(TrustFile(old.CertPEM()), "-----BEGIN CERT"...), 0, "cut off"},
		{"a leaf", TrustFile(old.CertPEM(), leaf.CertPEM), 0, "no CA"},
		{"a key", TrustFile(old.CertPEM(), leaf.KeyPEM), 0, "PRIVATE KEY"},
		{"another cluster's", TrustFile(old.CertPEM(), foreign.CertPEM()), 0, clusterB},
		{"twice the same", TrustFile(old.CertPEM(), old.CertPEM()), 0, "twice"},
		{"three", TrustFile(old.CertPEM(), next.CertPEM(), third.CertPEM()), 0, "more than 2"},
	} {
		got, err := Trusted(tc.file)
		if len(got) != tc.want || (tc.err == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.err) {
			t.Errorf("%s: %d CAs, %v; want %d, %q", tc.name, len(got), err, tc.want, tc.err)
		}
	}
	if first, err := Signer(TrustFile(next.CertPEM(), old.CertPEM())); err != nil || !bytes.Equal(first, next.CertPEM()) {
		t.Errorf("the first CA is not the one that signs: %v", err)
	}
	both, turned := TrustFile(old.CertPEM(), next.CertPEM()), TrustFile(next.CertPEM(), old.CertPEM())
	if !SameTrust(both, turned) || SameTrust(both, old.CertPEM()) || SameTrust(old.CertPEM(), next.CertPEM()) || SameTrust(nil, nil) {
		t.Error("SameTrust does not tell files that believe the same CAs")
	}
}

// TestReplacementOfTheCA walks a server and a client that lives on through a
// replacement of the CA, each changing its files at another time, and shakes
// hands at every step.
func TestReplacementOfTheCA(t *testing.T) {
	now := time.Now()
	old, next := newCA(t, clusterA, now), newCA(t, clusterA, now)
	server, client := newDir(t, old, nil, RoleNode), newDir(t, old, nil, RoleNode)
	sr, cr := newReloader(t, server, RoleNode), newReloader(t, client, RoleNode)
	addr := serve(t, sr.ServerConfig(tls.RequireAndVerifyClientCert), nil)
	dial := cr.DialTLS(10*time.Second, nil)
	trust := func(d Dir, cas ...*CA) {
		t.Helper()
		var certs [][]byte
		for _, ca := range cas {
			certs = append(certs, ca.CertPEM())
		}
		if err := d.WriteCA(TrustFile(certs...)); err != nil {
			t.Fatal(err)
		}
	}
	reissue := func(d Dir, ca *CA) {
		t.Helper()
		if err := d.WriteBundle(RoleNode, issue(t, ca, specFor(clusterA, "n1", RoleNode), now)); err != nil {
			t.Fatal(err)
		}
	}
	shakes := func(when string) {
		t.Helper()
		conn, err := dial(t.Context(), "tcp", addr)
		if err != nil {
			t.Errorf("%s: %v", when, err)
			return
		}
		// In TLS 1.3 the server judges the client after the client's handshake.
		one := make([]byte, 1)
		if _, err := conn.Write(one); err == nil {
			_, err = conn.Read(one)
			if err != nil {
				t.Errorf("%s: the server refuses the client: %v", when, err)
			}
		}
		_ = conn.Close()
	}
	verified := func(when string, d Dir) {
		t.Helper()
		if err := d.Verify(clusterA, "n1", RoleNode); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	shakes("before")
	trust(server, old, next)
	shakes("the server trusts both")
	trust(client, old, next)
	shakes("both trust both")
	trust(server, next, old)
	verified("the next signs, the leaf is of the former", server)
	reissue(server, next)
	verified("reissued", server)
	shakes("the server has a new certificate")
	trust(client, next, old)
	reissue(client, next)
	shakes("both have new certificates")
	trust(server, next)
	verified("the former is dropped", server)
	shakes("the server trusts the next alone")
	trust(client, next)
	shakes("after")

	// Whoever stayed behind is shut out, and shuts out.
	behind := newDir(t, old, nil, RoleNode)
	if conn, err := newReloader(t, behind, RoleNode).DialTLS(10*time.Second, nil)(t.Context(), "tcp", addr); err == nil {
		t.Error("a client that trusts the former CA alone accepts the server")
		_ = conn.Close()
	}
	trust(behind, old, next)
	conn, err := newReloader(t, behind, RoleNode).DialTLS(10*time.Second, nil)(t.Context(), "tcp", addr)
	if err == nil {
		_, err = conn.Write([]byte{1})
		if err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		_ = conn.Close()
	}
	if err == nil {
		t.Error("the server accepts a certificate of the former CA")
	}
}

func TestNeedsRenewalByTheNextCA(t *testing.T) {
	now := time.Now()
	old, next := newCA(t, clusterA, now), newCA(t, clusterA, now)
	spec := specFor(clusterA, "n1", RolePostgres)
	b := issue(t, old, spec, now)
	if due, why := NeedsRenewal(b, spec, TrustFile(old.CertPEM(), next.CertPEM()), now); due {
		t.Errorf("the CA that has signed still signs: %s", why)
	}
	if due, why := NeedsRenewal(b, spec, TrustFile(next.CertPEM(), old.CertPEM()), now); !due || !strings.Contains(why, "signs no more") {
		t.Errorf("another CA signs now: %v %q", due, why)
	}
}

func TestPinOfATrustFile(t *testing.T) {
	old, next := newCA(t, clusterA, time.Now()), newCA(t, clusterA, time.Now())
	want, err := PinOf(next.CertPEM())
	got, err2 := PinOf(TrustFile(next.CertPEM(), old.CertPEM()))
	if err := errors.Join(err, err2); err != nil || got != want {
		t.Errorf("the pin is not that of the CA that signs: %v", err)
	}
}
