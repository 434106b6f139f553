package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"
)

// NeedsRenewal decides whether a role's certificate is to be replaced now, and
// says why. It is true when there is no certificate, when it was not signed by
// the first CA in trustPEM, when it says anything else than spec, and when two thirds of its life
// have passed. That moment comes up to 2% of the life earlier, by an amount
// that its serial number fixes, so that the certificates of a cluster made in
// one minute are not all renewed in one minute.
func NeedsRenewal(b Bundle, spec LeafSpec, trustPEM []byte, now time.Time) (bool, string) {
	if b.Leaf == nil {
		return true, "there is no certificate"
	}
	if reason := chainDiffers(b, trustPEM); reason != "" {
		return true, reason
	}
	if reason := specDiffers(b.Leaf, spec); reason != "" {
		return true, reason
	}
	if !now.Before(b.Leaf.NotAfter) {
		return true, "it expired at " + stamp(b.Leaf.NotAfter)
	}
	if due := renewAt(b.Leaf); !now.Before(due) {
		return true, fmt.Sprintf("two thirds of its life have passed: due %s, expires %s", stamp(due), stamp(b.Leaf.NotAfter))
	}
	return false, ""
}

// RenewAt returns the moment from which a certificate is renewed by itself.
func RenewAt(leaf *x509.Certificate) time.Time { return renewAt(leaf) }

func renewAt(leaf *x509.Certificate) time.Time {
	life := leaf.NotAfter.Sub(leaf.NotBefore)
	sum := sha256.Sum256(leaf.SerialNumber.Bytes())
	// Divided first: life times a 16 bit number would not fit.
	jitter := life / 50 / (1 << 16) * time.Duration(binary.BigEndian.Uint16(sum[:]))
	return leaf.NotBefore.Add(life*2/3 - jitter)
}

func chainDiffers(b Bundle, trustPEM []byte) string {
	cas, _, err := parseTrust(trustPEM)
	if err != nil {
		return fmt.Sprintf("the CA certificate cannot be used: %v", err)
	}
	ca := cas[0]
	if err := issuedBy(b.Leaf, ca); err != nil {
		if _, former := issuedByOne(b.Leaf, cas[1:]); len(cas) > 1 && former == nil {
			return "it was signed by a CA that signs no more"
		}
		return fmt.Sprintf("it does not chain to the cluster's CA: %v", err)
	}
	// A CA renewed with its old key: the leaf verifies, yet the chain that is
	// served still ends in the old certificate.
	if inside, err := parseCert(b.CAPEM); err != nil || !bytes.Equal(inside.Raw, ca.Raw) {
		return "the CA certificate beside it is not the cluster's"
	}
	return ""
}

func specDiffers(leaf *x509.Certificate, spec LeafSpec) string {
	id, err := IdentityOf(leaf)
	if err != nil {
		return err.Error()
	}
	if id != spec.Identity {
		return fmt.Sprintf("it is of %s, want %s", id, spec.Identity)
	}
	if leaf.Subject.CommonName != spec.CommonName {
		return fmt.Sprintf("its common name is %q, want %q", leaf.Subject.CommonName, spec.CommonName)
	}
	have := LeafSpec{DNSNames: leaf.DNSNames}
	for _, ip := range leaf.IPAddresses {
		addr, _ := netip.AddrFromSlice(ip)
		have.IPs = append(have.IPs, addr)
	}
	if h, w := have.dnsNames(), spec.dnsNames(); !slices.Equal(h, w) {
		return fmt.Sprintf("its names are %v, want %v", h, w)
	}
	if h, w := have.ips(), spec.ips(); !slices.Equal(h, w) {
		return fmt.Sprintf("its addresses are %v, want %v", h, w)
	}
	return ""
}

// dnsNames and ips return the names and addresses in the one form in which they
// are signed and compared: lower case, unmapped, sorted, each once.
func (s LeafSpec) dnsNames() []string {
	out := make([]string, 0, len(s.DNSNames))
	for _, n := range s.DNSNames {
		out = append(out, strings.ToLower(n))
	}
	slices.Sort(out)
	return slices.Compact(out)
}

func (s LeafSpec) ips() []netip.Addr {
	out := make([]netip.Addr, 0, len(s.IPs))
	for _, a := range s.IPs {
		out = append(out, a.Unmap())
	}
	slices.SortFunc(out, netip.Addr.Compare)
	return slices.Compact(out)
}
