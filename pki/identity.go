package pki

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"strings"
)

// Role is what a leaf certificate is for.
type Role string

// The roles. A witness holds RoleNode alone.
const (
	RoleNode     Role = "node"     // pgha itself: its API and its etcd member
	RolePostgres Role = "postgres" // the PostgreSQL server
	RoleHAProxy  Role = "haproxy"  // HAProxy's health checks and status page
	RolePatroni  Role = "patroni"  // Patroni: REST API, etcd client, replication
	RoleAdmin    Role = "admin"    // the administrator's database sessions
)

// Valid reports whether r is one of the roles above.
func (r Role) Valid() bool {
	switch r {
	case RoleNode, RolePostgres, RoleHAProxy, RolePatroni, RoleAdmin:
		return true
	}
	return false
}

// Errors that callers tell apart with errors.Is; the messages that wrap them
// show both values.
var (
	// ErrOtherCluster: a certificate belongs to another cluster than expected.
	ErrOtherCluster = errors.New("certificate belongs to another cluster")
	// ErrPinMismatch: the server does not prove that it is backed by the CA
	// that the pin names. Wrong address, or someone in the middle.
	ErrPinMismatch = errors.New("server is not backed by the pinned CA")
	// ErrNoIdentity: a certificate carries no pgha identity, or the peer of a
	// connection presented no verified certificate.
	ErrNoIdentity = errors.New("no pgha identity")
)

const urnPrefix = "urn:pgha:"

var (
	clusterIDRE = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	nodeRE      = regexp.MustCompile(`^[a-z][a-z0-9_]{0,62}$`)
)

// Identity is what a leaf certificate says of its holder. It is carried as the
// URI SAN urn:pgha:CLUSTER-UUID:NODE:ROLE; no part can contain a colon.
type Identity struct {
	ClusterID string // UUID in its usual lower-case form
	Node      string // [a-z][a-z0-9_]{0,62}
	Role      Role
}

// String returns the identity as it stands in the certificate.
func (id Identity) String() string {
	return urnPrefix + id.ClusterID + ":" + id.Node + ":" + string(id.Role)
}

// Validate returns an error that names the first part that is malformed.
func (id Identity) Validate() error {
	if err := validClusterID(id.ClusterID); err != nil {
		return err
	}
	if !nodeRE.MatchString(id.Node) {
		return fmt.Errorf("node name %q: use 1 to 63 of a-z, 0-9 and _, beginning with a letter", id.Node)
	}
	if !id.Role.Valid() {
		return fmt.Errorf("role %q is unknown", id.Role)
	}
	return nil
}

func validClusterID(s string) error {
	if !clusterIDRE.MatchString(s) {
		return fmt.Errorf("cluster ID %q is not a lower-case UUID", s)
	}
	return nil
}

// ParseIdentity reads what Identity.String wrote.
func ParseIdentity(s string) (Identity, error) {
	rest, ok := strings.CutPrefix(s, urnPrefix)
	parts := strings.Split(rest, ":")
	if !ok || len(parts) != 3 {
		return Identity{}, fmt.Errorf("parse identity %q: not of the form %sCLUSTER:NODE:ROLE", s, urnPrefix)
	}
	id := Identity{ClusterID: parts[0], Node: parts[1], Role: Role(parts[2])}
	if err := id.Validate(); err != nil {
		return Identity{}, fmt.Errorf("parse identity %q: %w", s, err)
	}
	return id, nil
}

// IdentityOf returns the identity in cert. It says nothing about who signed
// cert: see PeerIdentity for connections. The error wraps ErrNoIdentity when
// there is none; two identities in one certificate are an error as well.
func IdentityOf(cert *x509.Certificate) (Identity, error) {
	var found []string
	for _, u := range cert.URIs {
		if s := u.String(); strings.HasPrefix(s, urnPrefix) {
			found = append(found, s)
		}
	}
	switch len(found) {
	case 0:
		return Identity{}, fmt.Errorf("certificate %q: %w", cert.Subject, ErrNoIdentity)
	case 1:
		return ParseIdentity(found[0])
	}
	return Identity{}, fmt.Errorf("certificate %q carries %d identities, want one", cert.Subject, len(found))
}

// PeerIdentity returns the identity that the other side of a connection has
// proved. A certificate that the TLS configuration did not verify does not
// count; the error wraps ErrNoIdentity when there is no verified one.
func PeerIdentity(cs tls.ConnectionState) (Identity, error) {
	if len(cs.VerifiedChains) == 0 {
		return Identity{}, fmt.Errorf("peer presented no verified certificate: %w", ErrNoIdentity)
	}
	return IdentityOf(cs.VerifiedChains[0][0])
}

// uri returns the identity as a SAN entry.
func (id Identity) uri() *url.URL {
	return &url.URL{Scheme: "urn", Opaque: strings.TrimPrefix(id.String(), "urn:")}
}
