package patroni

import (
	"errors"
	"fmt"
	"net/netip"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Names of database roles and of the certificates that may log in as them.
const (
	Superuser       = "postgres"
	ReplicationUser = "replicator"
	RewindUser      = "rewinder"

	// OSUser runs Patroni and PostgreSQL.
	OSUser = "postgres"

	// CNPatroni is the common name of the certificate in Config.Bundle.
	CNPatroni = "patroni"
	// CNAdmin is the common name of the operator's certificate.
	CNAdmin = "pgha-admin"
)

// Profiles move the timers of a cluster together.
const (
	ProfileFast   = "fast"
	ProfileSteady = "steady"
	ProfileWide   = "wide"
)

// Oldest and newest PostgreSQL that Render accepts.
const (
	oldestPostgres = 14
	newestPostgres = 18
)

// Member is a data node as the others see it.
type Member struct {
	Name     string
	Addr     netip.Addr
	Postgres uint16 // PostgreSQL's port
	Patroni  uint16 // the port of Patroni's REST API
}

// Ports are the ports of this node's own PostgreSQL and REST API. Both listen
// on Config.Addr alone.
type Ports struct{ Postgres, Patroni uint16 }

// Tags are Patroni's tags of a node.
type Tags struct {
	NoFailover    bool // never promoted
	NoLoadBalance bool // answers 503 to GET /replica
	NoSync        bool // never a synchronous standby
	CloneFrom     bool // preferred source of base backups
}

// Config is all that Patroni's configuration depends on.
type Config struct {
	Version Version // the installed Patroni
	Scope   string  // the cluster's name; the keys are under Prefix(Scope)
	Name    string  // this node
	Addr    netip.Addr
	Ports   Ports

	DataDir string // PostgreSQL's data directory
	BinDir  string // PostgreSQL's programs
	PGMajor int    // PostgreSQL's major version, 14 to 18

	SocketDir string // holds PostgreSQL's socket; 0750, owned by OSUser
	LogDir    string // PostgreSQL writes into its subdirectory "postgres", which OSUser must own

	// Bundle is one PEM file with key, certificate and CA, owned by OSUser with
	// mode 0600: the REST API's server and client certificate, the client
	// certificate for etcd and the one for replication. Its CN is CNPatroni.
	Bundle string
	// PostgresBundle is the same for the PostgreSQL server.
	PostgresBundle string
	CAFile         string

	EtcdAddr     string // the local etcd, host:port
	RESTUser     string
	RESTPassword string

	Members []Member // all data nodes, this one included
	// ClientNets are networks that may also connect straight to PostgreSQL.
	// Clients that come through HAProxy have a member's address.
	ClientNets []netip.Prefix

	Async   bool   // replication without waiting: what had not been sent is lost with the primary
	Profile string // ProfileFast when empty

	MemoryBytes uint64 // of the host
	CPUs        int
	DiskBytes   uint64 // size of the file system of DataDir

	Postgres     map[string]string // the operator's parameters for all nodes
	NodePostgres map[string]string // the operator's parameters for this node
	HBA          []string          // the operator's lines of pg_hba.conf; see ParseHBARule

	Tags Tags
	// PrePromote is a command that must exit 0 before this node is promoted;
	// none when empty.
	PrePromote string
}

var namePattern = regexp.MustCompile(`^[a-z0-9](?:[a-z0-9_.-]{0,61}[a-z0-9])?$`)

// SupportedPostgres returns an error when pgha cannot run this major version of
// PostgreSQL.
func SupportedPostgres(major int) error {
	if major < oldestPostgres || major > newestPostgres {
		return fmt.Errorf("PostgreSQL %d is not supported: install %d to %d", major, oldestPostgres, newestPostgres)
	}
	return nil
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if err := c.Version.Supported(); err != nil {
		errs = append(errs, err)
	}
	if err := SupportedPostgres(c.PGMajor); err != nil {
		errs = append(errs, err)
	}
	for what, name := range map[string]string{"scope": c.Scope, "name": c.Name} {
		if !namePattern.MatchString(name) {
			bad("%s %q must be lower-case letters, digits, '-', '_' and '.', at most 63", what, name)
		}
	}
	if !c.Addr.IsValid() || c.Addr.IsUnspecified() {
		bad("address %q is not one that other nodes can reach", c.Addr)
	}
	if c.Ports.Postgres == 0 || c.Ports.Patroni == 0 {
		bad("ports of PostgreSQL and Patroni must be set")
	}
	for what, path := range map[string]string{
		"data directory": c.DataDir, "program directory": c.BinDir, "socket directory": c.SocketDir,
		"log directory": c.LogDir, "certificate": c.Bundle, "PostgreSQL certificate": c.PostgresBundle, "CA file": c.CAFile,
	} {
		if !filepath.IsAbs(path) {
			bad("path of the %s must be absolute, not %q", what, path)
		}
	}
	if _, err := netip.ParseAddrPort(c.EtcdAddr); err != nil {
		bad("etcd address must be IP:PORT: %w", err)
	}
	if c.RESTUser == "" || c.RESTPassword == "" || strings.Contains(c.RESTUser, ":") {
		bad("user and password of the REST API must be set, and the user may hold no ':'")
	}
	switch c.Profile {
	case "", ProfileFast, ProfileSteady, ProfileWide:
	default:
		bad("profile %q is none of fast, steady, wide", c.Profile)
	}
	errs = append(errs, validateMembers(c.Members, c.Name)...)
	slices.SortFunc(errs, func(a, b error) int { return strings.Compare(a.Error(), b.Error()) })
	return errors.Join(errs...)
}

// validateMembers also refuses two names that share a replication slot.
func validateMembers(members []Member, self string) []error {
	var errs []error
	seen := map[string]string{}
	for _, m := range members {
		if !namePattern.MatchString(m.Name) || !m.Addr.IsValid() {
			errs = append(errs, fmt.Errorf("member %q with address %q is not valid", m.Name, m.Addr))
			continue
		}
		slot := SlotName(m.Name)
		if other, ok := seen[slot]; ok {
			errs = append(errs, fmt.Errorf("members %q and %q would share the replication slot %q: rename one", other, m.Name, slot))
		}
		seen[slot] = m.Name
	}
	if seen[SlotName(self)] != self {
		errs = append(errs, fmt.Errorf("this node %q is not among the members", self))
	}
	return errs
}

// SlotName returns the name of the replication slot that Patroni uses for the
// member name.
func SlotName(name string) string {
	return strings.NewReplacer("-", "_", ".", "_").Replace(name)
}

func hostPort(addr netip.Addr, port uint16) string {
	return netip.AddrPortFrom(addr, port).String()
}

func itoa[T ~int | ~uint64](n T) string {
	return strconv.FormatInt(int64(n), 10)
}
