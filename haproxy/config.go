package haproxy

import (
	"bytes"
	"errors"
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"text/template"

	"pgha/assets"
)

// Names of the backends: the primary and the replicas.
const (
	BackendReadWrite = "be_rw"
	BackendReadOnly  = "be_ro"
)

// Profiles move the timers of a cluster together.
const (
	ProfileFast   = "fast"
	ProfileSteady = "steady"
	ProfileWide   = "wide"
)

// defaultMaxConn is a number of sessions that a default limit of open files
// carries (two files a session).
const defaultMaxConn = 2000

// Server is a data node.
type Server struct {
	Name     string // also the name in its Patroni certificate
	Addr     netip.Addr
	Postgres uint16 // PostgreSQL's port
	Patroni  uint16 // the port of Patroni's REST API
}

// Ports are the ports that HAProxy listens on.
type Ports struct {
	ReadWrite uint16 // to the primary
	ReadOnly  uint16 // to a replica, to the primary when there is none
	Stats     uint16 // status page and /metrics: TLS, password
	Health    uint16 // /rw and /ro for a load balancer: plain HTTP
}

// Config is all that HAProxy's configuration depends on.
type Config struct {
	Servers []Server // all data nodes, this one included
	Self    string
	Ports   Ports
	// Bind is the address to listen on. When it is zero, that is every address:
	// of both families if this node's own is IPv6, of IPv4 otherwise.
	Bind netip.Addr

	// Bundle is one PEM file with key, certificate and CA: the client certificate
	// of the health checks. HAProxy's user must be able to read it.
	Bundle string
	// StatsBundle is the server certificate of the status page; Bundle when empty.
	StatsBundle string
	CAFile      string

	// SocketPath is where HAProxy makes its runtime socket; its directory must be
	// HAProxy's user's.
	SocketPath string
	// StateFile keeps the servers' states over a reload, see Runtime.SaveState;
	// SocketPath with ".state" when empty.
	StateFile string

	StatsUser     string
	StatsPassword string

	MaxConn int    // sessions at a time; 2000 when 0
	Profile string // ProfileFast when empty
	// User makes HAProxy, started as root, become that user. Leave it empty when
	// HAProxy is started as its user; no port of ours needs root.
	User string
}

// timers of a profile, in HAProxy's notation.
type timers struct {
	Connect, Check              string
	Inter, FastInter, DownInter string
	Fall                        int
	// A peer that is silent for KeepIdle is probed three times, 2s apart. Data
	// that it has not acknowledged within UserTimeout means the same.
	KeepIdle, UserTimeout string
}

func (c Config) timers() timers {
	switch c.Profile {
	case ProfileSteady:
		return timers{"1s", "4s", "2s", "1s", "1s", 3, "10s", "20s"}
	case ProfileWide:
		return timers{"2s", "8s", "3s", "1s", "1s", 3, "20s", "40s"}
	default:
		return timers{"500ms", "2s", "1s", "500ms", "500ms", 2, "5s", "10s"}
	}
}

var (
	namePattern = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	// HAProxy's file has its own quoting; nothing that would need it gets in.
	pathPattern = regexp.MustCompile(`^/[A-Za-z0-9._/+@-]+$`)
)

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }

	if len(c.Servers) == 0 {
		bad("there are no data nodes")
	}
	seen := map[string]bool{}
	for _, s := range c.Servers {
		switch {
		case !namePattern.MatchString(s.Name):
			bad("server name %q must be letters, digits, '-', '_' and '.'", s.Name)
		case seen[s.Name]:
			bad("server %q is named twice", s.Name)
		case !s.Addr.IsValid() || s.Addr.Zone() != "" || s.Postgres == 0 || s.Patroni == 0:
			bad("address %q and ports %d and %d of server %q are not all valid", s.Addr, s.Postgres, s.Patroni, s.Name)
		}
		seen[s.Name] = true
	}
	if !namePattern.MatchString(c.Self) {
		bad("own name %q must be letters, digits, '-', '_' and '.'", c.Self)
	}
	ports := []uint16{c.Ports.ReadWrite, c.Ports.ReadOnly, c.Ports.Stats, c.Ports.Health}
	slices.Sort(ports)
	if ports[0] == 0 || len(slices.Compact(ports)) != 4 {
		bad("the four ports must be set and different, not %+v", c.Ports)
	}
	for _, p := range []struct{ what, path string }{
		{"certificate", c.Bundle}, {"status page's certificate", c.StatsBundle}, {"CA file", c.CAFile},
		{"runtime socket", c.SocketPath}, {"state file", c.StateFile},
	} {
		if !pathPattern.MatchString(p.path) {
			bad("path of the %s must be absolute and plain, not %q", p.what, p.path)
		}
	}
	if !namePattern.MatchString(c.StatsUser) || c.StatsPassword == "" {
		bad("user and password of the status page must be set, and the user a plain name")
	}
	if c.User != "" && !namePattern.MatchString(c.User) {
		bad("user %q is not a plain name", c.User)
	}
	switch c.Profile {
	case "", ProfileFast, ProfileSteady, ProfileWide:
	default:
		bad("profile %q is none of fast, steady, wide", c.Profile)
	}
	return errors.Join(errs...)
}

func (c Config) withDefaults() Config {
	if c.StatsBundle == "" {
		c.StatsBundle = c.Bundle
	}
	if c.StateFile == "" {
		c.StateFile = c.SocketPath + ".state"
	}
	if c.MaxConn <= 0 {
		c.MaxConn = defaultMaxConn
	}
	// In a fixed order, so that the same roster renders the same file.
	c.Servers = slices.SortedFunc(slices.Values(c.Servers), func(a, b Server) int { return strings.Compare(a.Name, b.Name) })
	return c
}

// Render returns HAProxy's configuration file. It holds a hash of the status
// page's password: write it with mode 0600, owned by HAProxy's user.
func Render(c Config) ([]byte, error) {
	c = c.withDefaults()
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("render HAProxy's configuration: %w", err)
	}
	type backend struct {
		Name, Check string
		CutWhenDown bool
	}
	data := struct {
		Config
		T         timers
		StatsHash string
		Backends  []backend
	}{
		Config: c, T: c.timers(), StatsHash: statusHash(c.StatsUser, c.StatsPassword),
		Backends: []backend{
			// A Patroni that is being restarted, or hangs, fails its checks while
			// PostgreSQL serves on: only Runtime.ShutdownSessions ends sessions to a
			// primary, when another has taken over. A primary that is demoted ends
			// them itself, and the keepalives find one that is gone.
			{Name: BackendReadWrite, Check: "/primary"},
			{Name: BackendReadOnly, Check: "/replica", CutWhenDown: true},
		},
	}
	t, err := template.New("haproxy.cfg.tmpl").Funcs(template.FuncMap{
		"bind": c.bind,
		"hostport": func(a netip.Addr, port uint16) string {
			return netip.AddrPortFrom(a.Unmap(), port).String()
		},
	}).ParseFS(assets.Templates, "haproxy.cfg.tmpl")
	if err != nil {
		return nil, fmt.Errorf("read the template of HAProxy's configuration: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, data); err != nil {
		return nil, fmt.Errorf("render HAProxy's configuration: %w", err)
	}
	return out.Bytes(), nil
}

// bind returns the address part of a bind line.
func (c Config) bind(port uint16) string {
	if c.Bind.IsValid() {
		return netip.AddrPortFrom(c.Bind.Unmap(), port).String()
	}
	i := slices.IndexFunc(c.Servers, func(s Server) bool { return s.Name == c.Self })
	if i >= 0 && c.Servers[i].Addr.Is6() && !c.Servers[i].Addr.Is4In6() {
		return fmt.Sprintf("[::]:%d v4v6", port)
	}
	return fmt.Sprintf(":%d", port)
}
