package pki

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A trust file (ca.crt) holds the certificates of all CAs that a cluster's
// members believe, one after the other. The first is the one that signs; there
// is a second while the CA is being replaced.

// maxTrusted is how many CAs a trust file may hold. There is never a reason for
// more than the former and the next.
const maxTrusted = 2

// Trusted returns the certificates of a trust file, PEM, the one that signs
// first. It refuses anything that is no cluster's CA, CAs of different clusters,
// one that is there twice, and more than two.
func Trusted(trustPEM []byte) ([][]byte, error) {
	cas, _, err := parseTrust(trustPEM)
	if err != nil {
		return nil, fmt.Errorf("read CA certificates: %w", err)
	}
	var out [][]byte
	for _, ca := range cas {
		out = append(out, certPEM(ca))
	}
	return out, nil
}

// TrustedCA describes a CA of a trust file.
type TrustedCA struct {
	Fingerprint string // see [Fingerprint]
	NotAfter    time.Time
}

// TrustedCAs describes the CAs of a trust file, the one that signs first.
func TrustedCAs(trustPEM []byte) ([]TrustedCA, error) {
	cas, _, err := parseTrust(trustPEM)
	if err != nil {
		return nil, fmt.Errorf("read CA certificates: %w", err)
	}
	var out []TrustedCA
	for _, ca := range cas {
		out = append(out, TrustedCA{Fingerprint: fingerprint(ca.Raw), NotAfter: ca.NotAfter})
	}
	return out, nil
}

// Signer returns the first certificate of a trust file, PEM: the CA that signs.
func Signer(trustPEM []byte) ([]byte, error) {
	all, err := Trusted(trustPEM)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// ClusterOf returns the UUID of the cluster that a trust file is of.
func ClusterOf(trustPEM []byte) (string, error) {
	_, id, err := parseTrust(trustPEM)
	return id, err
}

// TrustFile makes a trust file of CA certificates, PEM, the one that signs first.
func TrustFile(certs ...[]byte) []byte {
	var out []byte
	for _, c := range certs {
		out = append(append(out, bytes.TrimSpace(c)...), '\n')
	}
	return out
}

// SameTrust says whether two trust files believe the same CAs, in whatever order.
func SameTrust(a, b []byte) bool {
	as, _, aErr := parseTrust(a)
	bs, _, bErr := parseTrust(b)
	if aErr != nil || bErr != nil || len(as) != len(bs) {
		return false
	}
	for _, ca := range as {
		if !slices.ContainsFunc(bs, ca.Equal) {
			return false
		}
	}
	return true
}

// Fingerprint returns the first 16 digits of the SHA-256 of a certificate, as
// openssl x509 -fingerprint -sha256 begins; of a trust file, that of the CA that
// signs.
func Fingerprint(certPEM []byte) (string, error) {
	block, _ := pem.Decode(certPEM)
	if block == nil || block.Type != pemCertificate {
		return "", errors.New("take fingerprint: no certificate")
	}
	return fingerprint(block.Bytes), nil
}

func fingerprint(der []byte) string {
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:8])
}

// parseTrust returns the CAs of a trust file and the cluster that they are of.
func parseTrust(data []byte) ([]*x509.Certificate, string, error) {
	var cas []*x509.Certificate
	cluster, rest := "", data
	for len(bytes.TrimSpace(rest)) > 0 {
		block, next := pem.Decode(rest)
		if block == nil {
			if cas == nil {
				break // the message for what is no PEM at all
			}
			return nil, "", errors.New("data after the last PEM block: file cut off or damaged")
		}
		ca, id, err := parseCA(pem.EncodeToMemory(block))
		switch {
		case err != nil:
			return nil, "", err
		case cluster != "" && id != cluster:
			return nil, "", fmt.Errorf("%w: CAs of %s and of %s in one file", ErrOtherCluster, cluster, id)
		case slices.ContainsFunc(cas, ca.Equal):
			return nil, "", fmt.Errorf("the CA certificate %s is there twice", fingerprint(ca.Raw))
		case len(cas) == maxTrusted:
			return nil, "", fmt.Errorf("there are more than %d CA certificates", maxTrusted)
		}
		cas, cluster, rest = append(cas, ca), id, next
	}
	if cas == nil {
		_, _, err := parseCA(data)
		return nil, "", err
	}
	return cas, cluster, nil
}

// issuedByOne returns the CA of cas that has signed leaf. The error is about the
// first, when none has.
func issuedByOne(leaf *x509.Certificate, cas []*x509.Certificate) (*x509.Certificate, error) {
	var first error
	for _, ca := range cas {
		err := issuedBy(leaf, ca)
		if err == nil {
			return ca, nil
		}
		if first == nil {
			first = err
		}
	}
	return nil, first
}

func poolOf(cas []*x509.Certificate) *x509.CertPool {
	pool := x509.NewCertPool()
	for _, ca := range cas {
		pool.AddCert(ca)
	}
	return pool
}
