package patroni

import (
	"encoding/json"
	"flag"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "rewrite the golden files")

func sampleConfig() Config {
	return Config{
		Version: Version{3, 0, 2}, Scope: "main", Name: "db-1", Addr: netip.MustParseAddr("10.0.0.1"),
		Ports:   Ports{Postgres: 5442, Patroni: 8008},
		DataDir: "/var/lib/pgha/postgres/15/data", BinDir: "/usr/lib/postgresql/15/bin", PGMajor: 15,
		SocketDir: "/run/pgha/postgres", LogDir: "/var/log/pgha",
		Bundle: "/var/lib/pgha/pki/patroni.pem", PostgresBundle: "/var/lib/pgha/pki/postgres.pem", CAFile: "/var/lib/pgha/pki/ca.pem",
		EtcdAddr: "127.0.0.1:2379", RESTUser: "pgha", RESTPassword: "s3cret",
		Members: []Member{
			{Name: "db-1", Addr: netip.MustParseAddr("10.0.0.1"), Postgres: 5442, Patroni: 8008},
			{Name: "db-2", Addr: netip.MustParseAddr("10.0.0.2"), Postgres: 5442, Patroni: 8008},
		},
		MemoryBytes: 16 * gib, CPUs: 4, DiskBytes: 100 * gib,
	}
}

func TestRenderGolden(t *testing.T) {
	four := sampleConfig()
	four.Version, four.PGMajor, four.BinDir = Version{4, 1, 0}, 17, "/usr/lib/postgresql/17/bin"
	four.Addr = netip.MustParseAddr("fd00::1")
	four.Members[0].Addr, four.Members[1].Addr = four.Addr, netip.MustParseAddr("fd00::2")
	four.ClientNets = []netip.Prefix{netip.MustParsePrefix("fd00::7/64")}
	four.Async, four.Profile, four.Tags, four.PrePromote = true, ProfileWide, Tags{NoFailover: true}, "/usr/bin/pgha hook pre-promote"
	for file, c := range map[string]Config{"patroni-3.0.2.yml": sampleConfig(), "patroni-4.1.0.yml": four} {
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

// TestRenderQuoting has the YAML library that Patroni uses read values and keys
// that mean something to YAML.
func TestRenderQuoting(t *testing.T) {
	c := sampleConfig()
	c.RESTUser, c.RESTPassword = "on", "1:20 #{{x}} \"'\\\u00e9\u2028<&> %"
	c.DataDir, c.Scope = "/var/lib/pg: x/~/[y]", "null"
	c.Name = "off"
	c.Members = append(c.Members, Member{Name: "7", Addr: netip.MustParseAddr("10.0.0.3")},
		Member{Name: "off", Addr: netip.MustParseAddr("10.0.0.4")})
	data, err := Render(c)
	must(t, err)
	cmd := exec.Command("/usr/bin/python3", "-c", "import sys, yaml, json; print(json.dumps(yaml.safe_load(sys.stdin.buffer)))")
	cmd.Stdin = strings.NewReader(string(data))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var got struct {
		Scope, Name string
		RestAPI     struct{ Authentication map[string]string }
		PostgreSQL  struct {
			DataDir    string `json:"data_dir"`
			Parameters map[string]any
			HBA        []string `json:"pg_hba"`
			Ident      []string `json:"pg_ident"`
		}
		Bootstrap struct{ DCS map[string]any }
	}
	must(t, json.Unmarshal(out, &got))
	if got.Scope != "null" || got.Name != "off" || got.PostgreSQL.DataDir != c.DataDir {
		t.Errorf("scope %q, name %q, data directory %q", got.Scope, got.Name, got.PostgreSQL.DataDir)
	}
	if diff := cmp.Diff(map[string]string{"username": c.RESTUser, "password": c.RESTPassword}, got.RestAPI.Authentication); diff != "" {
		t.Errorf("authentication (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(c.parameters(), got.PostgreSQL.Parameters); diff != "" {
		t.Errorf("parameters (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(PGHBA(c), got.PostgreSQL.HBA); diff != "" {
		t.Errorf("pg_hba (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff(PGIdent(c), got.PostgreSQL.Ident); diff != "" {
		t.Errorf("pg_ident (-want +got):\n%s", diff)
	}
	if patch := DynamicPatch(got.Bootstrap.DCS, c); len(patch) > 0 {
		t.Errorf("bootstrap.dcs wants the patch %v at once", patch)
	}
}

func TestRenderRefuses(t *testing.T) {
	for _, tc := range []struct {
		what   string
		change func(*Config)
		want   string
	}{
		{"old Patroni", func(c *Config) { c.Version = Version{2, 1, 7} }, "patroni 2.1.7 is too old"},
		{"old PostgreSQL", func(c *Config) { c.PGMajor = 13 }, "PostgreSQL 13 is not supported"},
		{"unknown PostgreSQL", func(c *Config) { c.PGMajor = 0 }, "PostgreSQL 0 is not supported"},
		{"name with capitals", func(c *Config) { c.Name = "DB" }, `name "DB" must be`},
		{"scope with a slash", func(c *Config) { c.Scope = "a/b" }, `scope "a/b" must be`},
		{"no address", func(c *Config) { c.Addr = netip.Addr{} }, "not one that other nodes can reach"},
		{"any address", func(c *Config) { c.Addr = netip.IPv4Unspecified() }, "not one that other nodes can reach"},
		{"no port", func(c *Config) { c.Ports.Patroni = 0 }, "ports of PostgreSQL and Patroni"},
		{"relative path", func(c *Config) { c.DataDir = "data" }, "path of the data directory must be absolute"},
		{"etcd by name", func(c *Config) { c.EtcdAddr = "localhost:2379" }, "etcd address must be IP:PORT"},
		{"no password", func(c *Config) { c.RESTPassword = "" }, "password of the REST API"},
		{"profile", func(c *Config) { c.Profile = "brisk" }, `profile "brisk" is none of`},
		{"not in the roster", func(c *Config) { c.Members = c.Members[1:] }, `"db-1" is not among the members`},
		{"slot shared", func(c *Config) {
			c.Members = append(c.Members, Member{Name: "db.1", Addr: netip.MustParseAddr("10.0.0.3")})
		}, `would share the replication slot "db_1"`},
		{"member without address", func(c *Config) { c.Members = append(c.Members, Member{Name: "db-3"}) }, `member "db-3" with address`},
	} {
		t.Run(tc.what, func(t *testing.T) {
			c := sampleConfig()
			tc.change(&c)
			out, err := Render(c)
			if err == nil || !strings.Contains(err.Error(), tc.want) || out != nil {
				t.Errorf("error %v, want one with %q and no output", err, tc.want)
			}
		})
	}
}

func TestDynamicPatch(t *testing.T) {
	c := sampleConfig()
	physical := map[string]any{"type": "physical"}
	current := func(change func(map[string]any)) map[string]any {
		data, err := json.Marshal(bootstrapDCS(c))
		must(t, err)
		var m map[string]any
		must(t, json.Unmarshal(data, &m))
		change(m)
		return m
	}
	slots := func(m map[string]any) map[string]any { return m["slots"].(map[string]any) }
	for _, tc := range []struct {
		what    string
		current map[string]any
		removed []string
		want    map[string]any
	}{
		{"nothing to do", current(func(map[string]any) {}), nil, map[string]any{}},
		{"no configuration yet", nil, nil, DesiredDynamic(c)},
		{"a member is new", current(func(m map[string]any) { delete(slots(m), "db_2") }), nil, map[string]any{"slots": map[string]any{"db_2": physical}}},
		{"a member is gone", current(func(m map[string]any) { slots(m)["db_3"] = physical }), []string{"db-3"}, map[string]any{"slots": map[string]any{"db_3": nil}}},
		{"a member is gone and its slot too", current(func(map[string]any) {}), []string{"db-3"}, map[string]any{}},
		{"a member left and came back", current(func(map[string]any) {}), []string{"db-2"}, map[string]any{}},
		{"the operator's slot", current(func(m map[string]any) { slots(m)["barman"] = physical }), nil, map[string]any{}},
		{"the operator's settings", current(func(m map[string]any) { m["postgresql"].(map[string]any)["parameters"] = nil }), nil, map[string]any{}},
		{"a safety setting changed", current(func(m map[string]any) { m["failsafe_mode"], m["ttl"] = true, 20 }), nil, map[string]any{"failsafe_mode": false, "ttl": 60}},
		{"slots removed whole", current(func(m map[string]any) { m["slots"] = nil }), nil, map[string]any{"slots": map[string]any{"db_1": physical, "db_2": physical}}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, DynamicPatch(tc.current, c, tc.removed...)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestTimersFitPatronisRule(t *testing.T) {
	for _, p := range []string{"", ProfileFast, ProfileSteady, ProfileWide} {
		if tm := (Config{Profile: p}).timers(); tm.loopWait+2*tm.retryTimeout > tm.ttl {
			t.Errorf("profile %q: loop_wait %d + 2 * retry_timeout %d > ttl %d", p, tm.loopWait, tm.retryTimeout, tm.ttl)
		}
	}
}

func TestSizing(t *testing.T) {
	for _, tc := range []struct {
		what         string
		memory, disk uint64
		cpus         int
		want         map[string]any
	}{
		{"a small host", 512 * mib, 2 * gib, 1, map[string]any{
			"shared_buffers": "128MB", "work_mem": "4MB", "maintenance_work_mem": "64MB", "max_connections": "60",
			"max_wal_size": "128MB", "min_wal_size": "80MB", "max_slot_wal_keep_size": "682MB", "wal_keep_size": "102MB",
			"max_parallel_workers_per_gather": "1", "max_worker_processes": "8"}},
		{"a middling host", 16 * gib, 100 * gib, 4, map[string]any{
			"shared_buffers": "4096MB", "work_mem": "8MB", "maintenance_work_mem": "1024MB", "max_connections": "500",
			"max_wal_size": "5120MB", "max_slot_wal_keep_size": "34133MB", "wal_keep_size": "1024MB",
			"max_parallel_workers_per_gather": "2"}},
		{"a big host", 1024 * gib, 10240 * gib, 96, map[string]any{
			"shared_buffers": "65536MB", "work_mem": "64MB", "maintenance_work_mem": "2048MB", "max_connections": "500",
			"max_wal_size": "16384MB", "max_worker_processes": "96", "max_parallel_workers": "96"}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			c := Config{MemoryBytes: tc.memory, DiskBytes: tc.disk, CPUs: tc.cpus}
			all := c.localSizing()
			for k, v := range c.sharedSizing() {
				all[k] = v
			}
			for k, want := range tc.want {
				if all[k] != want {
					t.Errorf("%s = %v, want %v", k, all[k], want)
				}
			}
		})
	}
}

// TestHBAOrder: the first line that matches decides, so the lines that close
// the product's roles come before those for everyone.
func TestHBAOrder(t *testing.T) {
	c := sampleConfig()
	c.ClientNets = []netip.Prefix{netip.MustParsePrefix("192.168.7.9/24")}
	lines := PGHBA(c)
	open := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "scram-sha-256") })
	if open < 0 {
		t.Fatal("nobody can log in by password")
	}
	for _, role := range []string{Superuser, ReplicationUser, RewindUser} {
		closed := slices.IndexFunc(lines, func(l string) bool {
			f := strings.Fields(l)
			return f[0] == "hostssl" && f[1] == "all" && slices.Contains(strings.Split(f[2], ","), role) && f[3] == "all"
		})
		if closed < 0 || closed > open {
			t.Errorf("%s is closed by line %d, passwords are taken from line %d", role, closed, open)
		}
	}
	for _, l := range lines {
		if !strings.HasPrefix(l, "hostssl ") && !strings.HasPrefix(l, "local ") {
			t.Errorf("line %q allows plain text", l)
		}
	}
	if last := lines[len(lines)-1]; last != "hostssl all all 192.168.7.0/24 scram-sha-256" {
		t.Errorf("clients' line is %q", last)
	}
}
