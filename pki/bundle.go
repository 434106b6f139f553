package pki

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
)

// Bundle is what the holder of a role needs: private key, leaf certificate and
// the CA certificate that signed it. It is one file on disk, in this order,
// that etcd, PostgreSQL, libpq, Python and HAProxy take as certificate and as
// key alike; being one file, it is replaced at once.
type Bundle struct {
	KeyPEM, CertPEM, CAPEM []byte
	// Leaf is the parsed CertPEM. ParseBundle sets it; Encode does not read it.
	Leaf *x509.Certificate
}

// ParseBundle reads a file of one PKCS8 key, the leaf and its CA. It refuses
// anything else, a key that does not belong to the leaf, and a leaf that this
// CA did not sign. Validity times are left to NeedsRenewal.
func ParseBundle(data []byte) (Bundle, error) {
	b, err := splitBundle(data)
	if err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: %w", err)
	}
	if b.Leaf, err = parseCert(b.CertPEM); err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: %w", err)
	}
	key, err := parseKey(b.KeyPEM)
	if err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: %w", err)
	}
	if err := keyFits(key, b.Leaf); err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: %w", err)
	}
	ca, _, err := parseCA(b.CAPEM)
	if err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: CA: %w", err)
	}
	if err := issuedBy(b.Leaf, ca); err != nil {
		return Bundle{}, fmt.Errorf("parse bundle: leaf: %w", err)
	}
	return b, nil
}

// splitBundle sorts the PEM blocks of a bundle into its three parts.
func splitBundle(data []byte) (Bundle, error) {
	var b Bundle
	rest := data
	for {
		var block *pem.Block
		if block, rest = pem.Decode(rest); block == nil {
			break
		}
		part := pem.EncodeToMemory(block)
		switch {
		case block.Type == pemKey && b.KeyPEM == nil:
			b.KeyPEM = part
		case block.Type == pemCertificate && b.CertPEM == nil:
			b.CertPEM = part
		case block.Type == pemCertificate && b.CAPEM == nil:
			b.CAPEM = part
		default:
			return Bundle{}, fmt.Errorf("unexpected PEM block %q, want one key, the leaf and its CA", block.Type)
		}
	}
	if len(bytes.TrimSpace(rest)) > 0 {
		return Bundle{}, errors.New("data after the last PEM block: file cut off or damaged")
	}
	if b.KeyPEM == nil || b.CertPEM == nil || b.CAPEM == nil {
		return Bundle{}, errors.New("incomplete: want one key, the leaf and its CA")
	}
	return b, nil
}

// Encode returns the bundle as it stands on disk.
func (b Bundle) Encode() []byte {
	var out []byte
	for _, part := range [][]byte{b.KeyPEM, b.CertPEM, b.CAPEM} {
		out = append(out, bytes.TrimSpace(part)...)
		out = append(out, '\n')
	}
	return slices.Clip(out)
}
