package pki

import (
	"crypto/subtle"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"
)

// PinnedConfig returns the configuration of a joiner, which holds no CA and no
// certificate yet and knows the CA's pin (see PinOf) and the cluster from its
// token. The handshake succeeds only if the server's chain ends in the CA with
// that pin, of that cluster, and its leaf is a node's, signed by that CA and
// valid now. onCA, unless nil, is then given the CA certificate; nothing has
// been sent to the server before that. Names are not compared: the joiner dials
// whatever address reaches a member, and the pin is the stronger proof.
//
// Errors wrap ErrPinMismatch (also for a leaf that the pinned CA did not sign)
// or ErrOtherCluster; others are an expired certificate or a wrong role.
func PinnedConfig(pin [32]byte, clusterID string, onCA func(caPEM []byte)) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS13,
		// The usual verification needs the CA beforehand; verifyPinned replaces
		// it, in VerifyConnection, which runs at every handshake.
		InsecureSkipVerify: true,
		VerifyConnection: func(cs tls.ConnectionState) error {
			ca, err := verifyPinned(cs.PeerCertificates, pin, clusterID, time.Now())
			if err != nil {
				return fmt.Errorf("verify server: %w", err)
			}
			if onCA != nil {
				onCA(certPEM(ca))
			}
			return nil
		},
	}
}

// verifyPinned returns the CA that chain ends in once everything holds.
func verifyPinned(chain []*x509.Certificate, pin [32]byte, clusterID string, now time.Time) (*x509.Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("no certificate presented")
	}
	leaf, ca := chain[0], chain[len(chain)-1]
	if have := spkiHash(ca); subtle.ConstantTimeCompare(have[:], pin[:]) != 1 {
		return nil, fmt.Errorf("%w: pin of %q is %x, want %x: wrong address, or someone in the middle", ErrPinMismatch, ca.Subject, have, pin)
	}
	caCluster, err := checkCA(ca)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrPinMismatch, err)
	}
	if caCluster != clusterID {
		return nil, fmt.Errorf("%w: CA of %s, want %s", ErrOtherCluster, caCluster, clusterID)
	}
	if err := issuedBy(leaf, ca); err != nil {
		return nil, fmt.Errorf("%w: certificate of %q: %w", ErrPinMismatch, leaf.Subject, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	if _, err := leaf.Verify(x509.VerifyOptions{
		Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}); err != nil {
		return nil, fmt.Errorf("certificate valid from %s to %s, clock says %s: %w", stamp(leaf.NotBefore), stamp(leaf.NotAfter), stamp(now), err)
	}
	id, err := IdentityOf(leaf)
	if err != nil {
		return nil, err
	}
	if id.ClusterID != clusterID {
		return nil, fmt.Errorf("%w: certificate of %s, want %s", ErrOtherCluster, id, clusterID)
	}
	if id.Role != RoleNode {
		return nil, fmt.Errorf("certificate is of role %q, want %q", id.Role, RoleNode)
	}
	return ca, nil
}
