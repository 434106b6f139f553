package haproxy

import (
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func sampleConfig() Config {
	return Config{
		Self: "db-1", Ports: Ports{ReadWrite: 5432, ReadOnly: 5433, Stats: 8404, Health: 8405},
		Servers: []Server{
			{Name: "db-2", Addr: netip.MustParseAddr("10.0.0.2"), Postgres: 5442, Patroni: 8008},
			{Name: "db-1", Addr: netip.MustParseAddr("10.0.0.1"), Postgres: 5442, Patroni: 8008},
		},
		Bundle: "/var/lib/pgha/haproxy/client.pem", StatsBundle: "/var/lib/pgha/haproxy/status.pem", CAFile: "/var/lib/pgha/haproxy/ca.pem",
		SocketPath: "/run/pgha/haproxy/haproxy.sock", StatsUser: "pgha", StatsPassword: "s3cret",
	}
}

func TestRenderGolden(t *testing.T) {
	six := sampleConfig()
	six.Servers[0].Addr, six.Servers[1].Addr = netip.MustParseAddr("fd00::2"), netip.MustParseAddr("fd00::1")
	six.Profile, six.MaxConn, six.User = ProfileWide, 500, "haproxy"
	for file, c := range map[string]Config{"fast.cfg": sampleConfig(), "wide-ipv6.cfg": six} {
		t.Run(file, func(t *testing.T) {
			got, err := Render(c)
			must(t, err)
			path := filepath.Join("testdata", file)
			if *update {
				must(t, os.WriteFile(path, got, 0o644))
			}
			want, err := os.ReadFile(path)
			must(t, err)
			if diff := cmp.Diff(string(want), string(got)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// TestValidate has real HAProxy read every profile, with a node of each family.
func TestValidate(t *testing.T) {
	dir := t.TempDir()
	ca := newTestCA(t, dir)
	bin, err := exec.LookPath("haproxy")
	must(t, err)
	c := sampleConfig()
	c.CAFile, c.Bundle, c.StatsBundle = ca.file(), ca.bundle(t, "haproxy.pem", "haproxy", 0, 0), ""
	c.SocketPath = filepath.Join(dir, "sock")
	file := filepath.Join(dir, "haproxy.cfg")
	must(t, os.WriteFile(c.withDefaults().StateFile, []byte("1\n"), 0o644))
	for _, profile := range []string{"", ProfileFast, ProfileSteady, ProfileWide} {
		for _, addr := range []string{"10.0.0.1", "fd00::1"} {
			c.Profile, c.Servers[1].Addr = profile, netip.MustParseAddr(addr)
			data, err := Render(c)
			must(t, err)
			must(t, os.WriteFile(file, data, 0o600))
			must(t, Validate(t.Context(), bin, file))
			// Warnings are not errors, and there should be none either.
			if out, err := exec.Command(bin, "-c", "-dW", "-f", file).CombinedOutput(); err != nil {
				t.Errorf("profile %q, %s: %s", profile, addr, out)
			}
		}
	}
	data, err := os.ReadFile(file)
	must(t, err)
	for what, tc := range map[string]struct{ old, new, want string }{
		"unknown keyword":      {"balance leastconn", "balancing leastconn", "'balancing'"},
		"no such certificate":  {c.Bundle, dir + "/none.pem", "none.pem"},
		"no such backend":      {"default_backend be_rw", "default_backend be_none", "be_none"},
		"certificate unusable": {c.Bundle, ca.file(), "ca.pem"},
	} {
		t.Run(what, func(t *testing.T) {
			must(t, os.WriteFile(file, []byte(strings.ReplaceAll(string(data), tc.old, tc.new)), 0o600))
			if err := Validate(t.Context(), bin, file); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}
	if err := Validate(t.Context(), "/nonexistent/haproxy", file); err == nil {
		t.Error("a missing program validates")
	}
}

func TestRenderRefuses(t *testing.T) {
	for what, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no servers":        {func(c *Config) { c.Servers = nil }, "no data nodes"},
		"odd name":          {func(c *Config) { c.Servers[0].Name = "a b" }, `server name "a b"`},
		"two of a name":     {func(c *Config) { c.Servers[0].Name = "db-1" }, `"db-1" is named twice`},
		"no address":        {func(c *Config) { c.Servers[0].Addr = netip.Addr{} }, `of server "db-2" are not all valid`},
		"no Patroni port":   {func(c *Config) { c.Servers[0].Patroni = 0 }, `of server "db-2" are not all valid`},
		"no own name":       {func(c *Config) { c.Self = "" }, "own name"},
		"a port twice":      {func(c *Config) { c.Ports.Health = 5432 }, "four ports must be set and different"},
		"no port":           {func(c *Config) { c.Ports.Stats = 0 }, "four ports must be set and different"},
		"path with a space": {func(c *Config) { c.Bundle = "/a b" }, "path of the certificate"},
		"relative path":     {func(c *Config) { c.CAFile = "ca.pem" }, "path of the CA file"},
		"a line in a path":  {func(c *Config) { c.SocketPath = "/a\nuser root" }, "path of the runtime socket"},
		"no password":       {func(c *Config) { c.StatsPassword = "" }, "password of the status page"},
		"odd stats user":    {func(c *Config) { c.StatsUser = "a b" }, "password of the status page"},
		"odd user":          {func(c *Config) { c.User = "a b" }, `user "a b"`},
		"profile":           {func(c *Config) { c.Profile = "brisk" }, `profile "brisk" is none of`},
	} {
		t.Run(what, func(t *testing.T) {
			c := sampleConfig()
			tc.change(&c)
			out, err := Render(c)
			if err == nil || !strings.Contains(err.Error(), tc.want) || out != nil {
				t.Errorf("error %v, want one with %q and no output", err, tc.want)
			}
		})
	}
}

// TestSHA512Crypt compares with what openssl passwd -6 has given and gives.
func TestSHA512Crypt(t *testing.T) {
	for _, tc := range []struct{ password, salt, want string }{
		{"Hello world!", "saltstring", "$6$saltstring$svn8UoSVapNtMuq1ukKS4tPQd8iKwSMHWjl/O817G3uBnIFNjnQJuesI68u4OTLiBFdcbYEdFCoEOfaS35inz1"},
		{"secretpw", "abcdEFGH12./34xy", "$6$abcdEFGH12./34xy$iyfk7GlZ1qP1ycxTtLHUhHaJjgC6rTkVoWAu9Rzv86jBBEXhLlfmZuHfI3bmkfaI/EMjWQfTUfz3C03dwc0L8."},
	} {
		if got := sha512Crypt(tc.password, tc.salt); got != tc.want {
			t.Errorf("%q with %q:\n got %s\nwant %s", tc.password, tc.salt, got, tc.want)
		}
	}
	long := strings.Repeat("0123456789abcdef", 9)
	for _, password := range []string{"x", long[:63], long[:64], long[:65], long[:127], long[:128], long} {
		cmd := exec.Command("openssl", "passwd", "-6", "-salt", "s.lt/", "-stdin")
		cmd.Stdin = strings.NewReader(password)
		out, err := cmd.Output()
		must(t, err)
		if got, want := sha512Crypt(password, "s.lt/"), strings.TrimSpace(string(out)); got != want {
			t.Errorf("%d characters:\n got %s\nwant %s", len(password), got, want)
		}
	}
	a, b := statusHash("u", "p"), statusHash("u", "q")
	if a != statusHash("u", "p") || a == b || strings.Split(a, "$")[2] == strings.Split(b, "$")[2] {
		t.Errorf("hashes %s and %s", a, b)
	}
}
