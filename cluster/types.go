package cluster

import (
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
)

// Identity says which cluster this is. It never changes after init.
type Identity struct {
	ID        string    `json:"id"`   // a UUID
	Name      string    `json:"name"` // also Patroni's scope
	CreatedAt time.Time `json:"created_at"`
}

// NewIdentity makes the identity of a new cluster.
func NewIdentity(name string, now time.Time) (Identity, error) {
	if err := ValidateName("cluster name", name); err != nil {
		return Identity{}, err
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return Identity{}, fmt.Errorf("make cluster id: %w", err)
	}
	return Identity{ID: id.String(), Name: name, CreatedAt: stamp(now)}, nil
}

// Validate reports what is wrong with the identity.
func (i Identity) Validate() error {
	if u, err := uuid.Parse(i.ID); err != nil || u.String() != i.ID {
		return fmt.Errorf("cluster id %q is not a UUID in lower case", i.ID)
	}
	return ValidateName("cluster name", i.Name)
}

// NodeRole is what a node does in the cluster.
type NodeRole string

// A data node runs PostgreSQL; a witness only votes.
const (
	RoleData    NodeRole = "data"
	RoleWitness NodeRole = "witness"
)

func (r NodeRole) validate() error {
	if r != RoleData && r != RoleWitness {
		return fmt.Errorf("role %q is not known: use %s or %s", string(r), RoleData, RoleWitness)
	}
	return nil
}

// Ports are the TCP ports of a node.
type Ports struct {
	Postgres   uint16 `json:"postgres" yaml:"postgres"`
	ReadWrite  uint16 `json:"read_write" yaml:"read_write"`
	ReadOnly   uint16 `json:"read_only" yaml:"read_only"`
	Patroni    uint16 `json:"patroni" yaml:"patroni"`
	EtcdClient uint16 `json:"etcd_client" yaml:"etcd_client"`
	EtcdPeer   uint16 `json:"etcd_peer" yaml:"etcd_peer"`
	Stats      uint16 `json:"stats" yaml:"stats"`
	Health     uint16 `json:"health" yaml:"health"`
	API        uint16 `json:"api" yaml:"api"`
}

// DefaultPorts returns the ports of a node whose config names none.
func DefaultPorts() Ports {
	return Ports{
		Postgres: 5442, ReadWrite: 5432, ReadOnly: 5433, Patroni: 8008,
		EtcdClient: 2379, EtcdPeer: 2380, Stats: 8404, Health: 8405, API: 8432,
	}
}

// Validate reports a port that is zero and one that is given twice.
func (p Ports) Validate() error {
	seen := map[uint16]string{}
	var errs []error
	for _, e := range []struct {
		name string
		port uint16
	}{
		{"postgres", p.Postgres}, {"read_write", p.ReadWrite}, {"read_only", p.ReadOnly},
		{"patroni", p.Patroni}, {"etcd_client", p.EtcdClient}, {"etcd_peer", p.EtcdPeer},
		{"stats", p.Stats}, {"health", p.Health}, {"api", p.API},
	} {
		if e.port == 0 {
			errs = append(errs, fmt.Errorf("port %s is 0: use 1 to 65535", e.name))
		} else if other, ok := seen[e.port]; ok {
			errs = append(errs, fmt.Errorf("ports %s and %s are both %d", other, e.name, e.port))
		} else {
			seen[e.port] = e.name
		}
	}
	return errors.Join(errs...)
}

// MemberState says how far a member's join has come.
type MemberState string

// A member is joining from the moment its token is consumed until its etcd
// member has started.
const (
	StateJoining MemberState = "joining"
	StateMember  MemberState = "member"
)

// Member is a node's entry in the roster.
type Member struct {
	Name     string      `json:"name"`
	Role     NodeRole    `json:"role"`
	Addr     netip.Addr  `json:"addr"`
	Ports    Ports       `json:"ports"`
	SANs     []string    `json:"sans,omitempty"` // extra names and addresses of the load balancer, given on this node
	JoinedAt time.Time   `json:"joined_at"`      // of a joining member: when its join was last repeated
	TokenID  string      `json:"token_id,omitempty"`
	CSRHash  string      `json:"csr_hash,omitempty"`
	State    MemberState `json:"state"`
	Version  string      `json:"version"` // of pgha
	// Maintenance is set while the node is not to be promoted.
	Maintenance *Maintenance `json:"maintenance,omitempty"`

	// Rev is the etcd revision of this entry as it was read; 0 means that it
	// was not read from the store. [Store.PutMember] compares it.
	Rev int64 `json:"-"`
}

// Maintenance says who has taken a node out of service for a while, and why.
type Maintenance struct {
	Since  time.Time `json:"since"`
	By     string    `json:"by"` // as root@n1
	Reason string    `json:"reason,omitempty"`
	// Primary says that it stays the primary, for want of a successor.
	Primary bool `json:"primary,omitempty"`
}

// PeerURL is the address at which other etcd members reach this one.
func (m Member) PeerURL() string {
	return "https://" + netip.AddrPortFrom(m.Addr, m.Ports.EtcdPeer).String()
}

// ClientURL is the address of this member's etcd for clients.
func (m Member) ClientURL() string {
	return "https://" + netip.AddrPortFrom(m.Addr, m.Ports.EtcdClient).String()
}

// APIAddr is host:port of the member's pgha API.
func (m Member) APIAddr() string {
	return netip.AddrPortFrom(m.Addr, m.Ports.API).String()
}

// Validate reports everything that is wrong with the entry.
func (m Member) Validate() error {
	errs := []error{ValidateNodeName(m.Name), m.Role.validate(), validateAddr(m.Addr), m.Ports.Validate(), validateSANs(m.SANs)}
	if m.State != StateJoining && m.State != StateMember {
		errs = append(errs, fmt.Errorf("member state %q is not known", m.State))
	}
	return errors.Join(errs...)
}

func validateAddr(a netip.Addr) error {
	switch {
	case !a.IsValid():
		return errors.New("the node's address is missing")
	case a.IsUnspecified(), a.IsMulticast(), a.Zone() != "", a.Is4In6():
		return fmt.Errorf("address %s cannot be a node's address: give the one at which the other nodes reach this one", a)
	}
	return nil
}

// Settings are the cluster-wide settings.
type Settings struct {
	Async      bool           `json:"async"`                 // replicate asynchronously
	Profile    string         `json:"profile"`               // of the timers; see Profiles
	SANs       []string       `json:"sans,omitempty"`        // names and addresses of the load balancer
	ClientNets []netip.Prefix `json:"client_nets,omitempty"` // from where clients may connect
	ProbeAddrs []netip.Addr   `json:"probe_addrs,omitempty"` // from where the load balancer probes
	// HBA are the operator's own lines of pg_hba.conf.
	HBA []string `json:"hba,omitempty"`
	// Postgres are parameters of PostgreSQL for all nodes, by name.
	Postgres map[string]string `json:"postgres,omitempty"`
	// Nodes are what single nodes have otherwise, by the node's name.
	Nodes map[string]NodeSettings `json:"nodes,omitempty"`
	// Change is the number of the change that made these settings; 0 since init.
	Change int64 `json:"change,omitempty"`
}

// NodeSettings are the settings of one node.
type NodeSettings struct {
	Memory   string            `json:"memory,omitempty"` // what its PostgreSQL is sized to, as "4GB"
	Postgres map[string]string `json:"postgres,omitempty"`
}

// Profiles are the known timer profiles, the default first.
var Profiles = []string{"fast", "steady", "wide"}

// Validate reports everything that is wrong with the settings.
func (s Settings) Validate() error {
	errs := []error{validateSANs(s.SANs)}
	if !slices.Contains(Profiles, s.Profile) {
		errs = append(errs, fmt.Errorf("profile %q is not known: use one of %s", s.Profile, strings.Join(Profiles, ", ")))
	}
	for _, p := range s.ClientNets {
		if !p.IsValid() || p != p.Masked() {
			errs = append(errs, fmt.Errorf("client network %s is not a network: did you mean %s", p, p.Masked()))
		}
	}
	for _, a := range s.ProbeAddrs {
		if !a.IsValid() || a.IsUnspecified() || a.IsMulticast() {
			errs = append(errs, fmt.Errorf("probe address %s is not the address of a host", a))
		}
	}
	for _, line := range s.HBA {
		errs = append(errs, validateText("hba rule", line))
	}
	errs = append(errs, validateParameters(s.Postgres))
	for name, n := range s.Nodes {
		errs = append(errs, ValidateName("node name", name), validateText("memory of node "+name, n.Memory), validateParameters(n.Postgres))
	}
	return errors.Join(errs...)
}

// maxText bounds a value, in bytes: settings travel in every join.
const maxText = 4096

// parameterRE also fits parameters of extensions, as auto_explain.log_analyze.
var parameterRE = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_$]*(\.[A-Za-z_][A-Za-z0-9_$]*)*$`)

func validateParameters(p map[string]string) error {
	var errs []error
	for name, value := range p {
		if len(name) > 128 || !parameterRE.MatchString(name) {
			errs = append(errs, fmt.Errorf("%q is not the name of a parameter of PostgreSQL", name))
		}
		errs = append(errs, validateText("value of "+name, value))
	}
	return errors.Join(errs...)
}

func validateText(what, s string) error {
	switch {
	case len(s) > maxText:
		return fmt.Errorf("%s is longer than %d bytes", what, maxText)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, unicode.IsControl):
		return fmt.Errorf("%s holds a line break or another control character", what)
	}
	return nil
}

var (
	nameRE = regexp.MustCompile(`^[a-z][a-z0-9_]{0,30}$`)
	dnsRE  = regexp.MustCompile(`^(\*\.)?([A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?\.)*[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?$`)
)

// reservedNames are common names of other certificates, or mean another host.
// PostgreSQL tells client certificates apart by common name alone: a node
// called "patroni" would be let in as Patroni.
var reservedNames = []string{"admin", "haproxy", "localhost", "patroni", "pgha", "pgha_admin", "postgres", "replicator"}

// ValidateName checks a name that becomes Patroni's, etcd's and a replication
// slot's name. kind ("cluster name") begins the error, which says what is
// allowed.
func ValidateName(kind, s string) error {
	if !nameRE.MatchString(s) {
		return fmt.Errorf("%s %q is not allowed: use 1 to 31 of a-z, 0-9 and _, beginning with a letter", kind, s)
	}
	return nil
}

// ValidateNodeName is ValidateName for a node; it refuses reserved names too.
func ValidateNodeName(s string) error {
	if slices.Contains(reservedNames, s) {
		return fmt.Errorf("node name %q is reserved: choose another", s)
	}
	return ValidateName("node name", s)
}

// ValidateSAN checks an extra name or address for PostgreSQL's certificate.
func ValidateSAN(s string) error {
	if a, err := netip.ParseAddr(s); err == nil && a.Zone() == "" && !a.IsUnspecified() {
		return nil
	}
	if len(s) > 253 || !dnsRE.MatchString(s) {
		return fmt.Errorf("%q is neither a host name nor an IP address", s)
	}
	return nil
}

func validateSANs(sans []string) error {
	var errs []error
	for _, s := range sans {
		errs = append(errs, ValidateSAN(s))
	}
	return errors.Join(errs...)
}

// stamp is a time as it is stored: it compares equal after a round trip.
func stamp(t time.Time) time.Time { return t.UTC().Truncate(time.Millisecond) }
