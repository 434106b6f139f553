package node

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"pgha/cluster"
	"pgha/internal/fsx"
)

// Paths are the directories a node uses. Nothing else on the host is written,
// but for the systemd unit and an adopted PostgreSQL data directory.
type Paths struct {
	Etc string // the node's configuration
	Lib string // state that must survive a reboot
	Run string // sockets and pid files, gone after a reboot
	Log string // logs of pgha and its children
}

// DefaultPaths returns the paths of an installed node.
func DefaultPaths() Paths {
	return Paths{Etc: "/etc/pgha", Lib: "/var/lib/pgha", Run: "/run/pgha", Log: "/var/log/pgha"}
}

// Config returns the path of the node's configuration file.
func (p Paths) Config() string { return filepath.Join(p.Etc, "pgha.yml") }

// State returns the path of the file that says which node of which cluster
// this host is.
func (p Paths) State() string { return filepath.Join(p.Lib, "state.json") }

// Socket returns the path of the local API's unix socket.
func (p Paths) Socket() string { return filepath.Join(p.Run, "pgha.sock") }

// PKI returns the directory of certificates and keys.
func (p Paths) PKI() string { return filepath.Join(p.Lib, "pki") }

// DaemonLog returns the path of the daemon's log: one JSON record a line.
func (p Paths) DaemonLog() string { return filepath.Join(p.Log, "pgha.log") }

func (p Paths) lock() string        { return filepath.Join(p.Run, "pgha.lock") }
func (p Paths) etcd() string        { return filepath.Join(p.Lib, "etcd") }
func (p Paths) etcdFatal() string   { return filepath.Join(p.Lib, "etcd-fatal.json") }
func (p Paths) roster() string      { return filepath.Join(p.Lib, "roster.json") }
func (p Paths) events() string      { return filepath.Join(p.Lib, "events.json") }
func (p Paths) trial() string       { return filepath.Join(p.Lib, "trial.json") }
func (p Paths) sealingKey() string  { return filepath.Join(p.PKI(), "sealing.key") }
func (p Paths) sealedCAKey() string { return filepath.Join(p.PKI(), "ca.key.sealed") }
func (p Paths) secrets() string     { return filepath.Join(p.Lib, "secrets.sealed") }
func (p Paths) patroniDir() string  { return filepath.Join(p.Lib, "patroni") }
func (p Paths) haproxyDir() string  { return filepath.Join(p.Lib, "haproxy") }
func (p Paths) pgSocket() string    { return filepath.Join(p.Run, "postgres") }

// Firewall modes.
const (
	FirewallPorts = "ports"
	FirewallOff   = "off"
)

// Config is the node's own configuration, /etc/pgha/pgha.yml. Settings that
// all nodes share live in etcd (cluster.Settings) and are not repeated here.
type Config struct {
	Cluster  string           `yaml:"cluster"`
	Name     string           `yaml:"name"`
	Role     cluster.NodeRole `yaml:"role"`
	Address  netip.Addr       `yaml:"address"`
	Ports    cluster.Ports    `yaml:"ports,omitempty"`
	Postgres PostgresConfig   `yaml:"postgres,omitempty"`
	Firewall FirewallConfig   `yaml:"firewall,omitempty"`
	Log      LogConfig        `yaml:"log,omitempty"`
}

// PostgresConfig says where PostgreSQL's programs and data are on this node.
type PostgresConfig struct {
	DataDir string `yaml:"data_dir,omitempty"`
	BinDir  string `yaml:"bin_dir,omitempty"`
	// Memory is what PostgreSQL's settings are sized to, as "4GB" or "512MB";
	// empty means all of the host's memory.
	Memory string `yaml:"memory,omitempty"`
}

// FirewallConfig chooses what pgha does with nftables.
type FirewallConfig struct {
	Mode string `yaml:"mode,omitempty"`
}

// LogConfig sets how much the daemon logs.
type LogConfig struct {
	Level string `yaml:"level,omitempty"`
}

// NewConfig returns a configuration with every default set.
func NewConfig() Config {
	return Config{
		Cluster:  "main",
		Role:     cluster.RoleData,
		Ports:    cluster.DefaultPorts(),
		Firewall: FirewallConfig{Mode: FirewallPorts},
		Log:      LogConfig{Level: "info"},
	}
}

// LoadConfig reads and checks the file at path. Every error names the file,
// the line and the key.
func LoadConfig(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Config{}, fmt.Errorf("%s does not exist: this host is not a node yet (pgha init, or pgha join TOKEN)", path)
	}
	if err != nil {
		return Config{}, fmt.Errorf("read configuration: %w", err)
	}
	return parseConfig(path, data)
}

func parseConfig(path string, data []byte) (Config, error) {
	c := NewConfig()
	dec := yaml.NewDecoder(bytes.NewReader(data), yaml.Strict())
	switch err := dec.Decode(&c); {
	case errors.Is(err, io.EOF):
		c = NewConfig() // an empty file lacks keys, as any other may
	case err != nil:
		return Config{}, decodeError(path, data, err)
	}
	if err := dec.Decode(new(any)); !errors.Is(err, io.EOF) {
		return Config{}, fmt.Errorf("%s: there is more than one YAML document in it: only the first would count", path)
	}
	if err := c.check(); err != nil {
		key, line := err.keys[0], 1
		for _, k := range err.keys {
			if n := lineOf(data, k); n > 0 {
				key, line = k, n
				break
			}
		}
		return Config{}, fmt.Errorf("%s:%d: key %q: %w", path, line, key, err.err)
	}
	return c, nil
}

// decodeError names the place of a value that does not fit, and what would.
func decodeError(path string, data []byte, err error) error {
	var ye yaml.Error
	if !errors.As(err, &ye) || ye.GetToken() == nil {
		// Only an address decodes itself; its errors have no place.
		return fmt.Errorf("%s:%d: key %q: this is not an IP address: write it as 10.0.0.5", path, max(1, lineOf(data, "address")), "address")
	}
	message := ye.GetMessage()
	var overflow *yaml.OverflowError
	var typ *yaml.TypeError
	var unknown *yaml.UnknownFieldError
	switch {
	case errors.As(err, &overflow):
		message = fmt.Sprintf("%s is out of range: it must be %s", overflow.SrcNum, kindOf(overflow.DstType))
	case errors.As(err, &typ):
		message = fmt.Sprintf("a %s stands here: it must be %s", typ.SrcType, kindOf(typ.DstType))
	case errors.As(err, &unknown):
		message = "there is no such key"
	}
	line := ye.GetToken().Position.Line
	return fmt.Errorf("%s:%d: key %q: %s", path, line, keyAt(data, line), message)
}

// kindOf says in words what a key takes.
func kindOf(t reflect.Type) string {
	if t != nil && t.Kind() == reflect.Uint16 {
		return "a number from 1 to 65535"
	}
	return "text"
}

// configError is a value that makes no sense. keys are dotted; where two values
// contradict each other there are two.
type configError struct {
	keys []string
	err  error
}

// Validate returns an error that names the key of the first value that makes no
// sense.
func (c Config) Validate() error {
	if err := c.check(); err != nil {
		return fmt.Errorf("%s: %w", err.keys[0], err.err)
	}
	return nil
}

func (c Config) check() *configError {
	wrong := func(key string, err error) *configError { return &configError{keys: []string{key}, err: err} }
	if err := cluster.ValidateName("cluster name", c.Cluster); err != nil {
		return wrong("cluster", err)
	}
	if err := cluster.ValidateNodeName(c.Name); err != nil {
		return wrong("name", err)
	}
	if c.Role != cluster.RoleData && c.Role != cluster.RoleWitness {
		return wrong("role", fmt.Errorf("%q is no role: use %s or %s", c.Role, cluster.RoleData, cluster.RoleWitness))
	}
	if err := checkAddress(c.Address); err != nil {
		return wrong("address", err)
	}
	if err := checkPorts(c.Ports); err != nil {
		return err
	}
	if c.Firewall.Mode != FirewallPorts && c.Firewall.Mode != FirewallOff {
		return wrong("firewall.mode", fmt.Errorf("%q is no mode: use %s or %s", c.Firewall.Mode, FirewallPorts, FirewallOff))
	}
	if _, err := parseLevel(c.Log.Level); err != nil {
		return wrong("log.level", err)
	}
	if c.Postgres.Memory != "" {
		if err := checkMemory(c.Postgres.Memory); err != nil {
			return wrong("postgres.memory", err)
		}
	}
	if dir := c.Postgres.DataDir; dir != "" && !filepath.IsAbs(dir) {
		return wrong("postgres.data_dir", fmt.Errorf("%q is not an absolute path", dir))
	}
	if dir := c.Postgres.BinDir; dir != "" && !filepath.IsAbs(dir) {
		return wrong("postgres.bin_dir", fmt.Errorf("%q is not an absolute path", dir))
	}
	return nil
}

// checkAddress refuses what cannot stand in the roster and in certificates as
// the way to this node.
func checkAddress(a netip.Addr) error {
	switch {
	case !a.IsValid():
		return errors.New("it is missing: give the address at which the other nodes reach this one")
	case a.IsUnspecified(), a.IsLoopback(), a.IsMulticast(), a.Zone() != "", a.Is4In6():
		return fmt.Errorf("%q is not an address that other nodes can reach", a)
	}
	return nil
}

func checkPorts(p cluster.Ports) *configError {
	seen := map[uint16]string{}
	for _, e := range portList(p) {
		key := "ports." + e.Key
		if e.Port == 0 {
			return &configError{[]string{key}, errors.New("0 is out of range: it must be a number from 1 to 65535")}
		}
		if other, taken := seen[e.Port]; taken {
			return &configError{[]string{key, "ports." + other}, fmt.Errorf("%d is the port of both %s and %s", e.Port, other, e.Key)}
		}
		seen[e.Port] = e.Key
	}
	return nil
}

// portUse is one of a node's ports, with its key in the configuration.
type portUse struct {
	Key     string
	Port    uint16
	Witness bool // a witness listens on it too
}

func portList(p cluster.Ports) []portUse {
	return []portUse{
		{"postgres", p.Postgres, false}, {"read_write", p.ReadWrite, false}, {"read_only", p.ReadOnly, false},
		{"patroni", p.Patroni, false}, {"etcd_client", p.EtcdClient, false}, {"etcd_peer", p.EtcdPeer, true},
		{"stats", p.Stats, false}, {"health", p.Health, false}, {"api", p.API, true},
	}
}

// Save writes the configuration, with a line that says who reads it.
func (c Config) Save(path string) error {
	body, err := yaml.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode configuration: %w", err)
	}
	head := "# This node's own settings. pgha reads them at start: systemctl restart pgha\n" +
		"# (PostgreSQL goes on running). Settings of the whole cluster are kept in the cluster.\n"
	return fsx.WriteFile(path, append([]byte(head), body...), 0o644, fsx.Keep, fsx.Keep)
}

// ParseBytes reads a size such as "512MB", "4GB" or "1048576" into bytes;
// units are powers of 1024.
func ParseBytes(s string) (uint64, error) {
	for i, unit := range []string{"KB", "MB", "GB", "TB"} {
		if num, ok := strings.CutSuffix(s, unit); ok {
			n, err := strconv.ParseUint(strings.TrimSpace(num), 10, 64-10*(i+1))
			if err != nil {
				return 0, fmt.Errorf("%q is not a size: write it as 512MB or 4GB", s)
			}
			return n << (10 * (i + 1)), nil
		}
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		return 0, fmt.Errorf("%q is not a size: write it as 512MB or 4GB", s)
	}
	return n, nil
}

// checkMemory checks what PostgreSQL is to be sized to.
func checkMemory(s string) error {
	n, err := ParseBytes(s)
	if err == nil && n < 128<<20 {
		err = fmt.Errorf("%s is out of range: PostgreSQL needs at least 128MB", s)
	}
	return err
}

// lineOf finds the line of a dotted key, or 0 where it is not written.
func lineOf(data []byte, key string) int {
	p, err := yaml.PathString("$." + key)
	if err != nil {
		return 0
	}
	n, err := p.ReadNode(bytes.NewReader(data))
	if err != nil || n.GetToken() == nil {
		return 0
	}
	return n.GetToken().Position.Line
}

// keyAt returns the dotted key that stands on a line: its own, behind those of
// the lines above it that are indented less.
func keyAt(data []byte, line int) string {
	lines := strings.Split(string(data), "\n")
	path, limit := "", math.MaxInt
	for i := min(line, len(lines)) - 1; i >= 0 && limit > 0; i-- {
		text := strings.TrimLeft(lines[i], " \t")
		indent := len(lines[i]) - len(text)
		if text = strings.TrimSpace(text); text == "" || text[0] == '#' || indent >= limit {
			continue
		}
		key, _, _ := strings.Cut(text, ":")
		if limit = indent; path != "" {
			key += "." + path
		}
		path = key
	}
	return path
}

// SetPort sets a port as the command line gives it, as "patroni=8009". Whether
// the ports go together is for Validate to say, once all are set.
func (c *Config) SetPort(s string) error {
	name, num, ok := strings.Cut(s, "=")
	n, err := strconv.ParseUint(num, 10, 16)
	if !ok || err != nil || n == 0 {
		return errors.New("write it as NAME=N with N from 1 to 65535")
	}
	fields := map[string]*uint16{
		"postgres": &c.Ports.Postgres, "read_write": &c.Ports.ReadWrite, "read_only": &c.Ports.ReadOnly,
		"patroni": &c.Ports.Patroni, "etcd_client": &c.Ports.EtcdClient, "etcd_peer": &c.Ports.EtcdPeer,
		"stats": &c.Ports.Stats, "health": &c.Ports.Health, "api": &c.Ports.API,
	}
	f, known := fields[name]
	if !known {
		return fmt.Errorf("there is no port %q: use one of %s", name, strings.Join(slices.Sorted(maps.Keys(fields)), ", "))
	}
	*f = uint16(n)
	return nil
}
