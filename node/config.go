package node

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
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

func (p Paths) etcd() string        { return filepath.Join(p.Lib, "etcd") }
func (p Paths) etcdFatal() string   { return filepath.Join(p.Lib, "etcd-fatal.json") }
func (p Paths) roster() string      { return filepath.Join(p.Lib, "roster.json") }
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
	if err := dec.Decode(&c); err != nil {
		var ye yaml.Error
		if errors.As(err, &ye) && ye.GetToken() != nil {
			t := ye.GetToken()
			return Config{}, fmt.Errorf("%s:%d: key %q: %s", path, t.Position.Line, keyAt(data, t.Position.Line), ye.GetMessage())
		}
		return Config{}, fmt.Errorf("%s: %w", path, err)
	}
	if key, err := c.check(); err != nil {
		return Config{}, fmt.Errorf("%s:%d: key %q: %w", path, lineOf(data, key), key, err)
	}
	return c, nil
}

// check returns the dotted key of the first value that makes no sense.
func (c Config) check() (string, error) {
	if err := cluster.ValidateName("cluster", c.Cluster); err != nil {
		return "cluster", err
	}
	if err := cluster.ValidateName("node", c.Name); err != nil {
		return "name", err
	}
	if c.Role != cluster.RoleData && c.Role != cluster.RoleWitness {
		return "role", fmt.Errorf("%q is no role: use %s or %s", c.Role, cluster.RoleData, cluster.RoleWitness)
	}
	if !c.Address.IsValid() || c.Address.IsUnspecified() || c.Address.IsLoopback() || c.Address.IsMulticast() {
		return "address", fmt.Errorf("%q is not an address that other nodes can reach", c.Address)
	}
	if key, err := checkPorts(c.Ports); err != nil {
		return "ports." + key, err
	}
	if c.Firewall.Mode != FirewallPorts && c.Firewall.Mode != FirewallOff {
		return "firewall.mode", fmt.Errorf("%q is no mode: use %s or %s", c.Firewall.Mode, FirewallPorts, FirewallOff)
	}
	if _, err := parseLevel(c.Log.Level); err != nil {
		return "log.level", err
	}
	if c.Postgres.Memory != "" {
		n, err := ParseBytes(c.Postgres.Memory)
		if err != nil {
			return "postgres.memory", err
		}
		if n < 128<<20 {
			return "postgres.memory", fmt.Errorf("%s is out of range: PostgreSQL needs at least 128MB", c.Postgres.Memory)
		}
	}
	for key, dir := range map[string]string{"postgres.data_dir": c.Postgres.DataDir, "postgres.bin_dir": c.Postgres.BinDir} {
		if dir != "" && !filepath.IsAbs(dir) {
			return key, fmt.Errorf("%q is not an absolute path", dir)
		}
	}
	return "", nil
}

func checkPorts(p cluster.Ports) (string, error) {
	seen := map[uint16]string{}
	for _, e := range portList(p) {
		if e.Port == 0 {
			return e.Key, errors.New("0 is out of range (1 to 65535)")
		}
		if other, taken := seen[e.Port]; taken {
			return e.Key, fmt.Errorf("%d is already the port of %s", e.Port, other)
		}
		seen[e.Port] = e.Key
	}
	return "", nil
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
			n, err := strconv.ParseUint(strings.TrimSpace(num), 10, 32)
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

// lineOf finds the line of a dotted key, or 1 where it is not written.
func lineOf(data []byte, key string) int {
	p, err := yaml.PathString("$." + key)
	if err != nil {
		return 1
	}
	n, err := p.ReadNode(bytes.NewReader(data))
	if err != nil || n.GetToken() == nil {
		return 1
	}
	return n.GetToken().Position.Line
}

// keyAt returns the key that stands on a line.
func keyAt(data []byte, line int) string {
	lines := strings.Split(string(data), "\n")
	if line < 1 || line > len(lines) {
		return ""
	}
	key, _, _ := strings.Cut(strings.TrimSpace(lines[line-1]), ":")
	return key
}

// SetPort sets a port as the command line gives it, as "patroni=8009".
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
	if key, err := checkPorts(c.Ports); err != nil {
		return fmt.Errorf("port %s: %w", key, err)
	}
	return nil
}
