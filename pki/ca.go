package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/netip"
	"net/url"
	"regexp"
	"strings"
	"time"
)

// Lifetimes of certificates.
const (
	LeafLifetime = 90 * 24 * time.Hour
	CALifetime   = 10 * 365 * 24 * time.Hour
)

const (
	// backdate lets a peer whose clock is a little behind accept a new certificate.
	backdate = 5 * time.Minute

	pemCertificate = "CERTIFICATE"
	pemKey         = "PRIVATE KEY"
	pemRequest     = "CERTIFICATE REQUEST"

	// X.520 allows 64 characters in a common name.
	maxCommonName = 64
	caNamePrefix  = "pgha CA "
)

// dnsRE is wider than host names by the underscore, which node names may hold
// and verifiers accept, and by a leading wildcard label for load balancers.
var dnsRE = regexp.MustCompile(`^(\*\.)?[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]*[a-z0-9_])?)*$`)

// CA is a cluster's certificate authority with its private key. Its methods
// may be called from several goroutines.
type CA struct {
	cert      *x509.Certificate
	key       *ecdsa.PrivateKey
	clusterID string
}

// NewCA makes the authority of a new cluster: ECDSA P-256, path length 0, valid
// for CALifetime from now. clusterID is a lower-case UUID, clusterName one to
// 56 printable ASCII characters for people to read.
func NewCA(clusterID, clusterName string, now time.Time) (*CA, error) {
	if err := validClusterID(clusterID); err != nil {
		return nil, fmt.Errorf("create CA: %w", err)
	}
	if err := validText("cluster name", clusterName, maxCommonName-len(caNamePrefix)); err != nil {
		return nil, fmt.Errorf("create CA: %w", err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("generate CA key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	ski, err := keyID(&key.PublicKey)
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		// The UUID in the subject makes the issuer's name unique, so that two
		// clusters of one name are told apart by every verifier and in every log.
		Subject:               pkix.Name{CommonName: caNamePrefix + clusterName, SerialNumber: clusterID},
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(CALifetime),
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
		SubjectKeyId:          ski,
		AuthorityKeyId:        ski,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, &key.PublicKey, key)
	if err != nil {
		return nil, fmt.Errorf("create CA certificate: %w", err)
	}
	// The parsed certificate, not the template, becomes the parent of leaves:
	// only it holds the key identifier that leaves must refer to.
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse new CA certificate: %w", err)
	}
	return &CA{cert: cert, key: key, clusterID: clusterID}, nil
}

// LoadCA returns the authority made of a CA certificate and its PKCS8 key, both
// PEM. It refuses a certificate that is no cluster's CA and a key that does not
// belong to it; it does not look at the validity times (Sign does).
func LoadCA(certPEM, keyPEM []byte) (*CA, error) {
	cert, clusterID, err := parseCA(certPEM)
	if err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, fmt.Errorf("load CA key: %w", err)
	}
	if err := keyFits(key, cert); err != nil {
		return nil, fmt.Errorf("load CA: %w", err)
	}
	return &CA{cert: cert, key: key, clusterID: clusterID}, nil
}

// CertPEM returns the CA's certificate.
func (ca *CA) CertPEM() []byte { return certPEM(ca.cert) }

// KeyPEM returns the CA's private key as PKCS8, in the clear: the caller seals
// it before it is stored or sent.
func (ca *CA) KeyPEM() ([]byte, error) { return encodeKey(ca.key) }

// ClusterID returns the UUID of the cluster that the CA signs for.
func (ca *CA) ClusterID() string { return ca.clusterID }

// PinOf returns the SHA-256 of the subject public key info of the CA that signs,
// the first in a trust file. It stays the same when a CA is renewed with its key.
func PinOf(trustPEM []byte) ([32]byte, error) {
	cas, _, err := parseTrust(trustPEM)
	if err != nil {
		return [32]byte{}, fmt.Errorf("pin: %w", err)
	}
	return spkiHash(cas[0]), nil
}

// LeafSpec is what a leaf certificate shall say. The server decides it; the
// request contributes the public key alone.
type LeafSpec struct {
	Identity   Identity
	CommonName string // PostgreSQL maps it to a database user; at most 64 printable ASCII characters
	DNSNames   []string
	IPs        []netip.Addr
	Lifetime   time.Duration // 0 means LeafLifetime
}

// Sign issues the certificate that spec describes for the key in a PEM
// certificate request, valid from five minutes before now and never longer than
// the CA. Every attribute and extension of the request is ignored. It refuses a
// request whose signature does not verify or whose key is not ECDSA of at least
// 256 bits, a malformed spec, an identity of another cluster (ErrOtherCluster)
// and a now outside the CA's own validity.
func (ca *CA) Sign(csrPEM []byte, spec LeafSpec, now time.Time) ([]byte, error) {
	pub, err := requestKey(csrPEM)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", spec.Identity, err)
	}
	tmpl, err := ca.leafTemplate(spec, now)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", spec.Identity, err)
	}
	if tmpl.SubjectKeyId, err = keyID(pub); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, pub, ca.key)
	if err != nil {
		return nil, fmt.Errorf("sign certificate for %s: %w", spec.Identity, err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: der}), nil
}

// leafTemplate turns spec into a template, or says what is wrong with it.
func (ca *CA) leafTemplate(spec LeafSpec, now time.Time) (*x509.Certificate, error) {
	if err := spec.validate(); err != nil {
		return nil, err
	}
	if spec.Identity.ClusterID != ca.clusterID {
		return nil, fmt.Errorf("%w: asked for %s, this CA signs for %s", ErrOtherCluster, spec.Identity.ClusterID, ca.clusterID)
	}
	if now.Before(ca.cert.NotBefore) || now.After(ca.cert.NotAfter) {
		return nil, fmt.Errorf("the CA is valid from %s to %s and the clock says %s: check the clock",
			stamp(ca.cert.NotBefore), stamp(ca.cert.NotAfter), stamp(now))
	}
	life := spec.Lifetime
	if life == 0 {
		life = LeafLifetime
	}
	notAfter := now.Add(life)
	if notAfter.After(ca.cert.NotAfter) {
		notAfter = ca.cert.NotAfter
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		Subject:      pkix.Name{CommonName: spec.CommonName},
		NotBefore:    now.Add(-backdate),
		NotAfter:     notAfter,
		KeyUsage:     x509.KeyUsageDigitalSignature,
		// Both usages: etcd uses one certificate as peer server and client, and
		// its gateway as a client of itself.
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
		DNSNames:              spec.dnsNames(),
		URIs:                  []*url.URL{spec.Identity.uri()},
	}
	for _, ip := range spec.ips() {
		tmpl.IPAddresses = append(tmpl.IPAddresses, net.IP(ip.AsSlice()))
	}
	return tmpl, nil
}

func (s LeafSpec) validate() error {
	if err := s.Identity.Validate(); err != nil {
		return err
	}
	if err := validText("common name", s.CommonName, maxCommonName); err != nil {
		return err
	}
	if s.Lifetime < 0 {
		return fmt.Errorf("lifetime %s is negative", s.Lifetime)
	}
	for _, name := range s.DNSNames {
		if _, err := netip.ParseAddr(name); err == nil {
			return fmt.Errorf("name %q is an address: it belongs among the addresses", name)
		}
		if len(name) > 253 || !dnsRE.MatchString(strings.ToLower(name)) {
			return fmt.Errorf("name %q is no DNS name", name)
		}
	}
	for _, ip := range s.IPs {
		if !ip.IsValid() || ip.Zone() != "" || ip.IsUnspecified() {
			return fmt.Errorf("address %q cannot stand in a certificate", ip)
		}
	}
	return nil
}

// NewKeyAndCSR makes an ECDSA P-256 key (PKCS8) and a certificate request for it.
func NewKeyAndCSR(commonName string) (keyPEM, csrPEM []byte, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate key: %w", err)
	}
	if keyPEM, err = encodeKey(key); err != nil {
		return nil, nil, err
	}
	csrPEM, err = CSRFor(keyPEM, commonName)
	return keyPEM, csrPEM, err
}

// CSRFor makes a certificate request for a key that exists already, so that a
// repeated join is known by the same keys. keyPEM is as NewKeyAndCSR returns it.
func CSRFor(keyPEM []byte, commonName string) (csrPEM []byte, err error) {
	key, err := parseKey(keyPEM)
	if err != nil {
		return nil, err
	}
	req := &x509.CertificateRequest{Subject: pkix.Name{CommonName: commonName}}
	der, err := x509.CreateCertificateRequest(rand.Reader, req, key)
	if err != nil {
		return nil, fmt.Errorf("create certificate request: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemRequest, Bytes: der}), nil
}

// requestKey returns the public key of a request that proves possession of it.
func requestKey(csrPEM []byte) (*ecdsa.PublicKey, error) {
	der, err := onlyBlock(csrPEM, pemRequest)
	if err != nil {
		return nil, err
	}
	req, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate request: %w", err)
	}
	pub, ok := req.PublicKey.(*ecdsa.PublicKey)
	if !ok {
		return nil, fmt.Errorf("certificate request holds an %s key, want ECDSA", req.PublicKeyAlgorithm)
	}
	if bits := pub.Params().BitSize; bits < 256 {
		return nil, fmt.Errorf("certificate request holds a key of %d bits, want 256 or more", bits)
	}
	if err := req.CheckSignature(); err != nil {
		return nil, fmt.Errorf("check signature of certificate request: %w", err)
	}
	return pub, nil
}

// checkCA returns the cluster that cert is the CA of. The self-signature is
// checked because a pin covers the key alone: without it, a node's neighbour
// could hand out the CA's key in a certificate of its own wording.
func checkCA(cert *x509.Certificate) (clusterID string, err error) {
	if !cert.BasicConstraintsValid || !cert.IsCA {
		return "", fmt.Errorf("certificate %q is no CA", cert.Subject)
	}
	if err := issuedBy(cert, cert); err != nil {
		return "", fmt.Errorf("certificate %q is not self-signed: %w", cert.Subject, err)
	}
	if err := validClusterID(cert.Subject.SerialNumber); err != nil {
		return "", fmt.Errorf("certificate %q is no pgha CA: %w", cert.Subject, err)
	}
	return cert.Subject.SerialNumber, nil
}

func parseCA(data []byte) (*x509.Certificate, string, error) {
	cert, err := parseCert(data)
	if err != nil {
		return nil, "", err
	}
	clusterID, err := checkCA(cert)
	if err != nil {
		return nil, "", err
	}
	return cert, clusterID, nil
}

// issuedBy checks issuer name and signature; validity times are left alone.
func issuedBy(leaf, ca *x509.Certificate) error {
	if !bytes.Equal(leaf.RawIssuer, ca.RawSubject) {
		return fmt.Errorf("issued by %q, want %q", leaf.Issuer, ca.Subject)
	}
	if err := leaf.CheckSignatureFrom(ca); err != nil {
		return fmt.Errorf("issued by a CA with key %x, want %x: %w", leaf.AuthorityKeyId, ca.SubjectKeyId, err)
	}
	return nil
}

func newSerial() (*big.Int, error) {
	n, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 128))
	if err != nil {
		return nil, fmt.Errorf("generate serial number: %w", err)
	}
	return n, nil
}

// keyID is RFC 7093's method 1: 160 bits of the SHA-256 of the public key.
func keyID(pub *ecdsa.PublicKey) ([]byte, error) {
	point, err := pub.Bytes()
	if err != nil {
		return nil, fmt.Errorf("encode public key: %w", err)
	}
	sum := sha256.Sum256(point)
	return sum[:20], nil
}

func spkiHash(cert *x509.Certificate) [32]byte {
	return sha256.Sum256(cert.RawSubjectPublicKeyInfo)
}

func validText(what, s string, maxLen int) error {
	if s == "" || len(s) > maxLen {
		return fmt.Errorf("%s %q: use 1 to %d characters", what, s, maxLen)
	}
	for _, c := range []byte(s) {
		if c < ' ' || c > '~' {
			return fmt.Errorf("%s %q: use printable ASCII characters only", what, s)
		}
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
