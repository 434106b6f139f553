package pki

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"net"
	"testing"
	"time"
)

func TestPinnedConfig(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	evil := newCA(t, clusterA, now) // same cluster ID and name, other key
	foreign := newCA(t, clusterB, now)
	pinOf := func(ca *CA) [32]byte {
		pin, err := PinOf(ca.CertPEM())
		if err != nil {
			t.Fatal(err)
		}
		return pin
	}
	node := specFor(clusterA, "n1", RoleNode)
	good := pair(t, issue(t, ca, node, now))
	short := node
	short.Lifetime = time.Nanosecond
	evilKey, err := evil.KeyPEM()
	if err != nil {
		t.Fatal(err)
	}
	altered, err := parseCert(reissued(t, ca, evilKey))
	if err != nil {
		t.Fatal(err)
	}
	with := func(c tls.Certificate, chain ...[]byte) tls.Certificate {
		return tls.Certificate{Certificate: chain, PrivateKey: c.PrivateKey}
	}
	evilLeaf := pair(t, issue(t, evil, node, now))
	untyped := func(err error) bool {
		return err != nil && !errors.Is(err, ErrPinMismatch) && !errors.Is(err, ErrOtherCluster)
	}
	is := func(want error) func(error) bool { return func(err error) bool { return errors.Is(err, want) } }
	for _, tc := range []struct {
		name    string
		server  tls.Certificate
		pin     [32]byte
		cluster string
		want    func(error) bool
	}{
		{"good", good, pinOf(ca), clusterA, func(err error) bool { return err == nil }},
		{"wrong pin", good, pinOf(evil), clusterA, is(ErrPinMismatch)},
		{"zero pin", good, [32]byte{}, clusterA, is(ErrPinMismatch)},
		{"man in the middle with a CA of the same name", evilLeaf, pinOf(ca), clusterA, is(ErrPinMismatch)},
		{"man in the middle who shows the real CA", with(evilLeaf, evilLeaf.Certificate[0], ca.cert.Raw), pinOf(ca), clusterA, is(ErrPinMismatch)},
		{"man in the middle with both CAs", with(evilLeaf, evilLeaf.Certificate[0], evil.cert.Raw, ca.cert.Raw), pinOf(ca), clusterA, is(ErrPinMismatch)},
		{"real CA key in an altered CA certificate", with(good, good.Certificate[0], altered.Raw), pinOf(ca), clusterA, is(ErrPinMismatch)},
		{"no CA in the chain", with(good, good.Certificate[0]), pinOf(ca), clusterA, is(ErrPinMismatch)},
		{"pin of the leaf", with(good, good.Certificate[0]), spkiHash(good.Leaf), clusterA, is(ErrPinMismatch)},
		{"other cluster than the token says", good, pinOf(ca), clusterB, is(ErrOtherCluster)},
		{"server of another cluster", pair(t, issue(t, foreign, specFor(clusterB, "n1", RoleNode), now)), pinOf(foreign), clusterA, is(ErrOtherCluster)},
		{"CA of another cluster with a leaf that fits the token", pair(t, issue(t, misled(ca), specFor(clusterB, "n1", RoleNode), now)), pinOf(ca), clusterB, is(ErrOtherCluster)},
		{"leaf of another cluster by this CA", pair(t, issue(t, misled(ca), specFor(clusterB, "n1", RoleNode), now)), pinOf(ca), clusterA, is(ErrOtherCluster)},
		{"expired", pair(t, issue(t, ca, short, now)), pinOf(ca), clusterA, func(err error) bool {
			return untyped(err) && isA[x509.CertificateInvalidError](err)
		}},
		{"another role's certificate", pair(t, issue(t, ca, specFor(clusterA, "n1", RoleAdmin), now)), pinOf(ca), clusterA, untyped},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var got []byte
			addr := serve(t, &tls.Config{Certificates: []tls.Certificate{tc.server}}, nil)
			_, err := shake(addr, PinnedConfig(tc.pin, tc.cluster, func(caPEM []byte) { got = caPEM }))
			if !tc.want(err) {
				t.Fatalf("got %v", err)
			}
			if err == nil && !bytes.Equal(got, ca.CertPEM()) {
				t.Fatal("the CA that was handed over is not the cluster's")
			}
			if err != nil && got != nil {
				t.Fatal("a CA was handed over although the server was refused")
			}
		})
	}
}

// TestJoinerMeetsReloader is the joiner's first contact: no certificate, the
// server asks for one and does without.
func TestJoinerMeetsReloader(t *testing.T) {
	ca := newCA(t, clusterA, time.Now())
	d := newDir(t, ca, nil, RoleNode)
	addr := serve(t, newReloader(t, d, RoleNode).ServerConfig(tls.VerifyClientCertIfGiven), nil)
	pin, err := PinOf(ca.CertPEM())
	if err != nil {
		t.Fatal(err)
	}
	joiner := Dir{Path: openTempDir(t) + "/pki"}
	if _, err := shake(addr, PinnedConfig(pin, clusterA, func(caPEM []byte) {
		if err := joiner.WriteCA(caPEM); err != nil {
			t.Error(err)
		}
	})); err != nil {
		t.Fatal(err)
	}
	if got, err := joiner.CACert(); err != nil || !bytes.Equal(got, ca.CertPEM()) {
		t.Fatalf("saved CA differs: %v", err)
	}
}

// TestPinnedSendsNothingToAStranger shows that a refused server never sees a
// byte of what the joiner wants to say.
func TestPinnedSendsNothingToAStranger(t *testing.T) {
	now := time.Now()
	evil := pair(t, issue(t, newCA(t, clusterA, now), specFor(clusterA, "n1", RoleNode), now))
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	heard := make(chan int, 1)
	go func() {
		conn, err := ln.Accept()
		if err != nil {
			heard <- -1
			return
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(patience))
		n, _ := tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{evil}}).Read(make([]byte, 16))
		heard <- n
	}()
	conn, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = tls.Client(conn, PinnedConfig([32]byte{1}, clusterA, nil)).Write([]byte("the token"))
	if !errors.Is(err, ErrPinMismatch) {
		t.Errorf("got %v, want ErrPinMismatch", err)
	}
	conn.Close()
	if n := <-heard; n != 0 {
		t.Errorf("the stranger read %d bytes", n)
	}
}
