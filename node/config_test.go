package node

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"pgha/cluster"
)

var cmpAddrs = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

// validConfig is a file that lacks nothing; cases append to it.
const validConfig = "cluster: shop\nname: n1\nrole: data\naddress: 10.0.0.1\n"

func TestConfigValid(t *testing.T) {
	base := NewConfig()
	base.Cluster, base.Name, base.Address = "shop", "n1", netip.MustParseAddr("10.0.0.1")
	for _, tc := range []struct {
		name, text string
		change     func(*Config)
	}{
		{"what is not written has its default", validConfig, func(*Config) {}},
		{"a default cluster and role", "name: n1\naddress: 10.0.0.1\n", func(c *Config) { c.Cluster = "main" }},
		{"one port; the others keep their defaults", validConfig + "ports:\n  postgres: 6543\n", func(c *Config) { c.Ports.Postgres = 6543 }},
		{"ports change places", validConfig + "ports: {read_write: 5433, read_only: 5432}\n", func(c *Config) { c.Ports.ReadWrite, c.Ports.ReadOnly = 5433, 5432 }},
		{"an empty section", validConfig + "ports:\nlog: {}\n", func(*Config) {}},
		{"everything", validConfig + "postgres:\n  data_dir: /data\n  bin_dir: /bin\n  memory: 4GB\nfirewall:\n  mode: 'off'\nlog:\n  level: debug\n", func(c *Config) {
			c.Postgres = PostgresConfig{DataDir: "/data", BinDir: "/bin", Memory: "4GB"}
			c.Firewall.Mode, c.Log.Level = FirewallOff, "debug"
		}},
		{"a witness with IPv6", "# mine\nname: w\nrole: witness\naddress: 2001:db8::1\n", func(c *Config) {
			c.Cluster, c.Name, c.Role, c.Address = "main", "w", cluster.RoleWitness, netip.MustParseAddr("2001:db8::1")
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := base
			tc.change(&want)
			got, err := parseConfig("pgha.yml", []byte(tc.text))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(want, got, cmpAddrs); diff != "" {
				t.Errorf("configuration (-want +got):\n%s", diff)
			}
		})
	}
}

func TestConfigErrors(t *testing.T) {
	const path = "/etc/pgha/pgha.yml"
	for _, tc := range []struct {
		name, text string
		line       int // 0: the message names no line
		key, why   string
	}{
		{"empty file", "", 1, "name", `node name "" is not allowed`},
		{"only a comment", "# nothing\n", 1, "name", "not allowed"},
		{"no address", "name: n1\n", 1, "address", "it is missing: give the address"},
		{"empty address", "name: n1\naddress: ''\n", 2, "address", "it is missing"},
		{"unknown key", validConfig + "postgress:\n  memory: 4GB\n", 5, "postgress", "there is no such key"},
		{"unknown key in a section", validConfig + "postgres:\n\n  # more\n  memroy: 4GB\n", 8, "postgres.memroy", "there is no such key"},
		{"a key twice", validConfig + "name: n2\n", 5, "name", "already defined"},
		{"text for a port", validConfig + "ports:\n  postgres: many\n", 6, "ports.postgres", "a string stands here: it must be a number from 1 to 65535"},
		{"a list for a name", "name: [n1]\naddress: 10.0.0.1\n", 1, "name", "text"},
		{"a section for a name", validConfig + "log:\n  level:\n    a: b\n", 7, "log.level.a", "text"},
		{"a number for a section", validConfig + "ports: 5\n", 5, "ports", "where mapping is expected"},
		{"port too large", validConfig + "ports:\n  api: 70000\n", 6, "ports.api", "70000 is out of range: it must be a number from 1 to 65535"},
		{"port below zero", validConfig + "ports:\n  api: -1\n", 6, "ports.api", "-1 is out of range"},
		{"port zero", validConfig + "ports:\n  api: 0\n", 6, "ports.api", "0 is out of range"},
		{"two ports the same", validConfig + "ports:\n  stats: 7000\n  health: 7000\n", 7, "ports.health", "7000 is the port of both stats and health"},
		{"a port as another's default", validConfig + "ports:\n  postgres: 5432\n", 6, "ports.postgres", "5432 is the port of both postgres and read_write"},
		{"address is a word", "name: n1\naddress: here\n", 2, "address", "not an IP address"},
		{"address is a number", "name: n1\naddress: 10\n", 2, "address", "not an IP address"},
		{"address is a list", "name: n1\naddress: [10.0.0.1]\n", 2, "address", "not an IP address"},
		{"address is loopback", "name: n1\naddress: 127.0.0.1\n", 2, "address", "not an address that other nodes can reach"},
		{"address is everywhere", "name: n1\naddress: 0.0.0.0\n", 2, "address", "other nodes can reach"},
		{"address is a group's", "name: n1\naddress: 224.0.0.1\n", 2, "address", "other nodes can reach"},
		{"address has a zone", "name: n1\naddress: fe80::1%eth0\n", 2, "address", "other nodes can reach"},
		{"address is IPv4 in IPv6", "name: n1\naddress: '::ffff:10.0.0.1'\n", 2, "address", "other nodes can reach"},
		{"name with a capital", "name: N1\naddress: 10.0.0.1\n", 1, "name", "a-z, 0-9 and _"},
		{"reserved name", "address: 10.0.0.1\nname: patroni\n", 2, "name", "reserved"},
		{"cluster's name", "cluster: my shop\nname: n1\naddress: 10.0.0.1\n", 1, "cluster", "not allowed"},
		{"role", "name: n1\naddress: 10.0.0.1\nrole: boss\n", 3, "role", `"boss" is no role: use data or witness`},
		{"firewall mode", validConfig + "firewall:\n  mode: maybe\n", 6, "firewall.mode", "use ports or off"},
		{"log level", validConfig + "log:\n  level: loud\n", 6, "log.level", "use debug, info, warn or error"},
		{"memory is no size", validConfig + "postgres:\n  memory: much\n", 6, "postgres.memory", "write it as 512MB"},
		{"memory is too small", validConfig + "postgres:\n  memory: 64MB\n", 6, "postgres.memory", "out of range"},
		{"relative data directory", validConfig + "postgres:\n  data_dir: data\n", 6, "postgres.data_dir", "absolute"},
		{"relative programs", validConfig + "postgres: {bin_dir: bin}\n", 5, "postgres.bin_dir", "absolute"},
		{"broken YAML", "name: [n1\n", 1, "name", "']' not found"},
		{"a tab", "name: n1\n\taddress: x\n", 2, "name.address", "cannot start any token"},
		{"no keys at all", "just text\n", 1, "just text", "where mapping is expected"},
		{"two documents", validConfig + "---\nname: n2\n", 0, "", "more than one YAML document"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := parseConfig(path, []byte(tc.text))
			if err == nil {
				t.Fatalf("no error: %+v", c)
			}
			want := path + ": "
			if tc.line > 0 {
				want = fmt.Sprintf("%s:%d: key %q: ", path, tc.line, tc.key)
			}
			if !strings.HasPrefix(err.Error(), want) {
				t.Errorf("error %q does not begin with %q", err, want)
			}
			if !strings.Contains(err.Error(), tc.why) {
				t.Errorf("error %q does not say %q", err, tc.why)
			}
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("the error has several lines: %q", err)
			}
		})
	}
}

func TestConfigRoundTrip(t *testing.T) {
	want := NewConfig()
	want.Name, want.Address = "n1", netip.MustParseAddr("10.0.0.1")
	want.Postgres = PostgresConfig{DataDir: "/data", BinDir: "/usr/lib/postgresql/15/bin", Memory: "512MB"}
	path := filepath.Join(t.TempDir(), "pgha.yml")
	if err := want.Save(path); err != nil {
		t.Fatal(err)
	}
	got, err := LoadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got, cmpAddrs); diff != "" {
		t.Errorf("read back (-want +got):\n%s", diff)
	}
}

func TestLoadConfigMissing(t *testing.T) {
	_, err := LoadConfig(filepath.Join(t.TempDir(), "pgha.yml"))
	if err == nil || !strings.Contains(err.Error(), "pgha init, or pgha join") {
		t.Errorf("error %v does not say what to do", err)
	}
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(dir, "pgha.yml"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadConfig(filepath.Join(dir, "pgha.yml")); err == nil {
		t.Error("a directory was read as a configuration")
	}
}

func TestSetPort(t *testing.T) {
	for _, tc := range []struct {
		in   []string
		want string // part of the error, of SetPort or of Validate; "" = none
	}{
		{[]string{"postgres=6000"}, ""},
		{[]string{"read_write=5433", "read_only=5432"}, ""},
		{[]string{"postgres=5432"}, "both postgres and read_write"},
		{[]string{"postgres"}, "NAME=N"},
		{[]string{"postgres="}, "NAME=N"},
		{[]string{"postgres=0"}, "1 to 65535"},
		{[]string{"postgres=65536"}, "1 to 65535"},
		{[]string{"postgres=-5"}, "1 to 65535"},
		{[]string{"postgres=x"}, "1 to 65535"},
		{[]string{"5432=postgres"}, "NAME=N"},
		{[]string{"pg=6000"}, `no port "pg": use one of api, etcd_client, etcd_peer, health, patroni, postgres, read_only, read_write, stats`},
	} {
		t.Run(strings.Join(tc.in, " "), func(t *testing.T) {
			c := NewConfig()
			c.Name, c.Address = "n1", netip.MustParseAddr("10.0.0.1")
			var err error
			for _, s := range tc.in {
				if err == nil {
					err = c.SetPort(s)
				}
			}
			if err == nil {
				err = c.Validate()
			}
			if (tc.want == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
		})
	}
}

// Every port of the configuration can be set on the command line.
func TestSetPortKnowsAll(t *testing.T) {
	c := NewConfig()
	for i, u := range portList(c.Ports) {
		if err := c.SetPort(fmt.Sprintf("%s=%d", u.Key, 7000+i)); err != nil {
			t.Error(err)
		}
	}
	for i, u := range portList(c.Ports) {
		if int(u.Port) != 7000+i {
			t.Errorf("%s is %d, want %d", u.Key, u.Port, 7000+i)
		}
	}
}

func TestParseBytes(t *testing.T) {
	for in, want := range map[string]uint64{
		"0": 0, "1048576": 1 << 20, "1KB": 1 << 10, "512MB": 512 << 20, "4GB": 4 << 30, "4 GB": 4 << 30, "2TB": 2 << 40,
		"16777215TB": 16777215 << 40,
	} {
		if got, err := ParseBytes(in); err != nil || got != want {
			t.Errorf("ParseBytes(%q) = %d, %v, want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "GB", "4gb", "4G", "-1GB", "1.5GB", "4GBx", "16777216TB", "99999999999999999999"} {
		if got, err := ParseBytes(in); err == nil {
			t.Errorf("ParseBytes(%q) = %d, want an error", in, got)
		}
	}
}

func TestFormatBytes(t *testing.T) {
	for in, want := range map[uint64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 KB", 1536: "1.5 KB", 12<<20 + 512<<10: "12.5 MB", 1 << 30: "1.0 GB",
		1 << 40: "1.0 TB", 1 << 50: "1.0 PB", 1<<64 - 1: "16384.0 PB",
	} {
		if got := FormatBytes(in); got != want {
			t.Errorf("FormatBytes(%d) = %q, want %q", in, got, want)
		}
	}
}

func TestMajorOf(t *testing.T) {
	for in, want := range map[string]int{"/usr/lib/postgresql/15/bin": 15, "/opt/pg/bin": 0, "": 0} {
		if got := majorOf(in); got != want {
			t.Errorf("majorOf(%q) = %d, want %d", in, got, want)
		}
	}
}
