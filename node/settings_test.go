package node

import (
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/patroni"
)

func sampleSettings() cluster.Settings {
	return cluster.Settings{
		Profile: "fast", Async: true, SANs: []string{"db.example.com"},
		ClientNets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}, ProbeAddrs: []netip.Addr{netip.MustParseAddr("10.0.0.9")},
		HBA:      []string{"hostssl app app all scram-sha-256"},
		Postgres: map[string]string{"work_mem": "8MB", "search_path": `"$user", 'x'`},
		Nodes:    map[string]cluster.NodeSettings{"n2": {Memory: "4GB", Postgres: map[string]string{"work_mem": "9MB"}}},
		Change:   7,
	}
}

func TestChangeSettings(t *testing.T) {
	for _, c := range []struct {
		name, node string
		changes    []ConfigChange
		want       []string // lines of the difference
		refused    string
	}{
		{"the profile", "", []ConfigChange{{Key: "profile", Value: "wide"}}, []string{"profile: fast -> wide"}, ""},
		{"its default", "", []ConfigChange{{Key: "profile", Op: ChangeUnset}}, nil, ""},
		{"several", "", []ConfigChange{{Key: "async", Value: "sync"}, {Key: "postgresql.work_mem", Value: "9MB"}}, []string{"async: on -> off", "postgresql.work_mem: 8MB -> 9MB"}, ""},
		{"the same", "", []ConfigChange{{Key: "postgresql.work_mem", Value: "8MB"}}, nil, ""},
		{"another case", "", []ConfigChange{{Key: "postgresql.WORK_MEM", Value: "9MB"}}, []string{"postgresql.WORK_MEM: (not set) -> 9MB", "postgresql.work_mem: 8MB -> (not set)"}, ""},
		{"unset", "", []ConfigChange{{Key: "postgresql.Work_Mem", Op: ChangeUnset}}, []string{"postgresql.work_mem: 8MB -> (not set)"}, ""},
		{"unset what is not set", "", []ConfigChange{{Key: "postgresql.port", Op: ChangeUnset}}, nil, ""},
		{"a list", "", []ConfigChange{{Key: "clients", Value: "10.0.0.0/8, 10.9.0.0/16"}}, []string{"clients: 10.0.0.0/16 -> 10.0.0.0/8, 10.9.0.0/16"}, ""},
		{"more of a list", "", []ConfigChange{{Key: "clients", Value: "10.9.0.0/16,10.0.0.0/16", Op: ChangeAdd}}, []string{"clients: 10.0.0.0/16 -> 10.0.0.0/16, 10.9.0.0/16"}, ""},
		{"less of a list", "", []ConfigChange{{Key: "probes", Value: "10.0.0.9", Op: ChangeRemove}}, []string{"probes: 10.0.0.9 -> (not set)"}, ""},
		{"rules", "", []ConfigChange{{Key: "hba", Value: "hostssl  a b all cert ;hostssl c d all reject", Op: ChangeAdd}}, []string{"hba: hostssl app app all scram-sha-256 -> hostssl app app all scram-sha-256; hostssl a b all cert; hostssl c d all reject"}, ""},
		{"of a node", "n1", []ConfigChange{{Key: "memory", Value: "2GB"}, {Key: "postgresql.work_mem", Value: "1MB"}}, []string{"memory on n1: (not set) -> 2GB", "postgresql.work_mem on n1: (not set) -> 1MB"}, ""},
		{"nothing of a node", "n2", []ConfigChange{{Key: "memory", Op: ChangeUnset}, {Key: "postgresql.work_mem", Op: ChangeUnset}}, []string{"memory on n2: 4GB -> (not set)", "postgresql.work_mem on n2: 9MB -> (not set)"}, ""},

		{"no profile", "", []ConfigChange{{Key: "profile", Value: "slow"}}, nil, "use one of fast, steady, wide"},
		{"an empty profile", "", []ConfigChange{{Key: "profile"}}, nil, "use one of"},
		{"no setting", "", []ConfigChange{{Key: "profil", Value: "fast"}}, nil, "did you mean profile"},
		{"nothing like a setting", "", []ConfigChange{{}}, nil, "use one of"},
		{"neither on nor off", "", []ConfigChange{{Key: "async", Value: "maybe"}}, nil, "on or off"},
		{"no clients", "", []ConfigChange{{Key: "clients", Op: ChangeUnset}}, nil, "cannot be empty"},
		{"the last clients", "", []ConfigChange{{Key: "clients", Value: "10.0.0.0/16", Op: ChangeRemove}}, nil, "cannot be empty"},
		{"no network", "", []ConfigChange{{Key: "clients", Value: "10.0.0.1"}}, nil, "not a network"},
		{"not in the list", "", []ConfigChange{{Key: "probes", Value: "10.0.0.8", Op: ChangeRemove}}, nil, "does not hold"},
		{"no list", "", []ConfigChange{{Key: "async", Value: "on", Op: ChangeAdd}}, nil, "no list"},
		{"no list either", "", []ConfigChange{{Key: "postgresql.work_mem", Value: "1", Op: ChangeAdd}}, nil, "no list"},
		{"no rule", "", []ConfigChange{{Key: "hba", Value: "host all all all trust", Op: ChangeAdd}}, nil, "only hostssl"},
		{"an owned parameter", "", []ConfigChange{{Key: "postgresql.Port", Value: "1"}}, nil, "port cannot be set"},
		{"a shared one of a node", "n1", []ConfigChange{{Key: "postgresql.max_connections", Value: "99"}}, nil, "the same on all nodes"},
		{"the cluster's of a node", "n1", []ConfigChange{{Key: "profile", Value: "wide"}}, nil, "whole cluster"},
		{"a node's of the cluster", "", []ConfigChange{{Key: "memory", Value: "2GB"}}, nil, "--node"},
		{"little memory", "n1", []ConfigChange{{Key: "memory", Value: "2MB"}}, nil, "at least 128MB"},
	} {
		t.Run(c.name, func(t *testing.T) {
			was := sampleSettings()
			got, err := changeSettings(was, c.node, c.changes)
			if diff := cmp.Diff(sampleSettings(), was, cmp.Comparer(func(a, b netip.Prefix) bool { return a == b }), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
				t.Errorf("the old settings were changed: %s", diff)
			}
			if c.refused != "" {
				if err == nil || !strings.Contains(err.Error(), c.refused) {
					t.Fatalf("%v, want %q", err, c.refused)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			var lines []string
			for _, d := range DiffSettings(was, got) {
				lines = append(lines, d.String())
			}
			if !slices.Equal(lines, c.want) {
				t.Errorf("it differs in %q, want %q", lines, c.want)
			}
		})
	}
}

// What the editor shows is what is stored, whatever the values look like.
func TestDocument(t *testing.T) {
	s := sampleSettings()
	s.Postgres["a.b"], s.Postgres["quoted"], s.Postgres["number"] = "on", `x: "y" # 'z'`, "0.90"
	doc := formatDocument(s, []ConfigValue{{Key: "postgresql.shared_buffers", Value: "1GB", Where: "sized"}})
	if !strings.Contains(doc, `# shared_buffers: "1GB"  (sized)`) {
		t.Errorf("it does not show what is sized:\n%s", doc)
	}
	got, err := parseDocument(s, doc)
	if err != nil || !reflect.DeepEqual(got, s) {
		t.Errorf("%v, %v in:\n%s", DiffSettings(s, got), err, doc)
	}
	for _, empty := range []cluster.Settings{{Profile: "fast", ClientNets: s.ClientNets}, {Profile: "wide", ClientNets: s.ClientNets, Async: true}} {
		got, err := parseDocument(empty, formatDocument(empty, nil))
		if err != nil || len(DiffSettings(empty, got)) > 0 {
			t.Errorf("%v, %v", DiffSettings(empty, got), err)
		}
	}
}

func TestParseDocument(t *testing.T) {
	const head = "clients: [10.0.0.0/8]\n"
	for _, c := range []struct{ name, doc, key, want string }{
		{"bare words", head + "async: on\n", "async", "on"},
		{"a boolean", head + "async: false\n", "async", ""},
		{"a number", head + "postgresql:\n  max_connections: 200\n", "postgresql.max_connections", "200"},
		{"a fraction", head + "postgresql:\n  checkpoint_completion_target: 0.90\n", "postgresql.checkpoint_completion_target", "0.90"},
		{"a bare switch", head + "postgresql:\n  jit: off\n", "postgresql.jit", "off"},
		{"single quotes", head + "postgresql:\n  search_path: 'a, b'\n", "postgresql.search_path", "a, b"},
		{"a comment", head + "postgresql:\n  work_mem: 8MB # eight\n", "postgresql.work_mem", "8MB"},
		{"nothing of PostgreSQL", head + "postgresql:\n", "postgresql.work_mem", ""},
	} {
		got, err := parseDocument(cluster.Settings{}, c.doc)
		if err != nil {
			t.Errorf("%s: %v", c.name, err)
			continue
		}
		value := ""
		for _, d := range DiffSettings(cluster.Settings{}, got) {
			if d.Key == c.key {
				value = d.New
			}
		}
		if value != c.want {
			t.Errorf("%s: %s is %q, want %q", c.name, c.key, value, c.want)
		}
	}
	for _, c := range []struct{ name, doc, want string }{
		{"an unknown key", head + "profil: wide\n", "line 2"},
		{"no YAML", head + "postgresql: [\n", "line 2"},
		{"a list of parameters", head + "postgresql:\n  - work_mem\n", "line"},
		{"no clients", "profile: wide\n", "cannot be empty"},
		{"a wrong rule", head + "hba: [host all all all trust]\n", "only hostssl"},
		{"an owned parameter", head + "postgresql:\n  port: 1\n", "port cannot be set"},
		{"an unknown key of a node", head + "nodes:\n  n1:\n    profile: wide\n", "line 4"},
	} {
		if _, err := parseDocument(cluster.Settings{}, c.doc); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

func TestNearest(t *testing.T) {
	names := []string{"work_mem", "max_connections", "DateStyle", "jit"}
	for in, want := range map[string]string{"work_men": "work_mem", "maxconnections": "max_connections", "datestile": "DateStyle", "something_else": "", "git": "jit"} {
		if got := nearest(in, names); got != want {
			t.Errorf("%s: %q, want %q", in, got, want)
		}
	}
}

func TestComplaintOf(t *testing.T) {
	for _, c := range []struct{ name, text, want string }{
		{"a wrong value", "2026-11-23 15:21:19.478 GMT [15892] FATAL:  invalid value for parameter \"work_mem\": \"64XB\"\n2026-11-23 15:21:19.478 GMT [15892] HINT:  Valid units for this parameter are \"B\", \"kB\".\n",
			`invalid value for parameter "work_mem": "64XB": Valid units for this parameter are "B", "kB"`},
		{"a wrong file", "x LOG:  skipping missing configuration file \"/a/postgresql.auto.conf\"\nx LOG:  unrecognized configuration parameter \"nosuch\" in file \"/a\" line 2\nx FATAL:  configuration file \"/a\" contains errors\n",
			`unrecognized configuration parameter "nosuch" in file "/a" line 2`},
		{"a wrong value in a file", "x LOG:  invalid value for parameter \"work_mem\": \"64XB\"\nx HINT:  Valid units for this parameter are \"B\".\nx FATAL:  configuration file \"/a\" contains errors\n",
			`invalid value for parameter "work_mem": "64XB": Valid units for this parameter are "B"`},
		{"plain words", "x LOG:  skipping missing configuration file \"/a\"\npostgres: superuser_reserved_connections (5) must be less than max_connections (4)\n",
			"postgres: superuser_reserved_connections (5) must be less than max_connections (4)"},
		{"nothing", "", ""},
	} {
		if got := complaintOf(c.text); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestLacks(t *testing.T) {
	state := func(change func(*SettingsState)) SettingsState {
		s := SettingsState{Rev: 5, HBALoaded: true, Settings: []PostgresSetting{
			{Name: "work_mem", Setting: "9216", Shown: "9MB", Source: "configuration file"}, {Name: "max_connections", Setting: "100"},
		}}
		change(&s)
		return s
	}
	wanted := map[string]string{"work_mem": "9216"}
	for _, c := range []struct {
		name   string
		state  SettingsState
		wanted map[string]string
		want   string // "" = it has taken them
	}{
		{"taken", state(func(*SettingsState) {}), wanted, ""},
		{"an older round", state(func(s *SettingsState) { s.Rev = 4 }), wanted, "about to"},
		{"a part with a problem", state(func(s *SettingsState) { s.Rev, s.Problems = 4, []string{"firewall: no"} }), wanted, "firewall: no"},
		{"its PostgreSQL is down", state(func(s *SettingsState) { s.Settings = nil }), wanted, ""},
		{"an old pg_hba.conf", state(func(s *SettingsState) { s.HBALoaded = false }), wanted, "pg_hba.conf"},
		{"an old value", state(func(s *SettingsState) { s.Settings[0].Setting, s.Settings[0].Shown = "4096", "4MB" }), wanted, "still 4MB"},
		{"a restart to come", state(func(s *SettingsState) { s.Settings[1].Pending = true }), map[string]string{"max_connections": "200"}, ""},
		{"worked out at start", state(func(s *SettingsState) { s.Settings[0].Source = "override" }), map[string]string{"work_mem": "-1"}, ""},
		{"ALTER SYSTEM", state(func(s *SettingsState) {
			s.Settings[0].Setting, s.Settings[0].File = "1", "/data/postgresql.auto.conf"
		}), wanted, "ALTER SYSTEM RESET work_mem"},
		{"unknown to it", state(func(*SettingsState) {}), map[string]string{"ext.x": "1"}, ""},
	} {
		if got := c.state.lacks(5, c.wanted); c.want == "" && got != "" || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// Rows of the nodes become one where they are alike.
func TestMergeParameters(t *testing.T) {
	node := func(sized, own string, pending bool) SettingsState {
		return SettingsState{
			Settings: []PostgresSetting{{Name: "work_mem", Shown: "4MB", Pending: pending}, {Name: "jit", Shown: "on"}, {Name: "DateStyle", Shown: "ISO"}},
			Parameters: []patroni.Parameter{
				{Name: "work_mem", Value: "8MB", Origin: patroni.OriginCluster},
				{Name: "shared_buffers", Value: sized, Origin: patroni.OriginSized},
				{Name: "datestyle", Value: own, Origin: patroni.OriginNode},
				{Name: "ssl", Value: "on", Origin: patroni.OriginDefault, Owned: true},
			},
		}
	}
	got := mergeParameters(map[string]SettingsState{"n1": node("1GB", "ISO, DMY", true), "n2": node("2GB", "ISO, DMY", false)})
	want := []ConfigValue{
		{Key: "postgresql.DateStyle", Node: "n1", Value: "ISO, DMY", Where: "node n1"},
		{Key: "postgresql.DateStyle", Node: "n2", Value: "ISO, DMY", Where: "node n2"},
		{Key: "postgresql.jit", Value: "on", Where: "PostgreSQL's default", Quiet: true},
		{Key: "postgresql.shared_buffers", Node: "n1", Value: "1GB", Where: "sized"},
		{Key: "postgresql.shared_buffers", Node: "n2", Value: "2GB", Where: "sized"},
		{Key: "postgresql.ssl", Value: "on", Where: "default", Quiet: true},
		{Key: "postgresql.work_mem", Value: "8MB", Where: "cluster", Restart: []string{"n1"}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// What the operator of an adopted PostgreSQL has chosen is carried over, and what
// everybody's file says is not.
func TestCarriedSettings(t *testing.T) {
	got := carriedSettings([]byte(`
# comment
shared_buffers = 128MB			# min 128kB
max_connections=200   # more
Work_Mem '16MB'
maintenance_work_mem = 1GB
maintenance_work_mem = 2GB
max_wal_size = 1GB
#effective_cache_size = 4GB
log_line_prefix = '%m it''s # me '
deadlock_timeout = 7s
port = 5433
max_worker_processes = 1
max_locks_per_transaction = 0x80
password_encryption = md5
include_dir = 'conf.d'
`))
	want := map[string]string{
		"max_connections": "200", "work_mem": "16MB", "maintenance_work_mem": "2GB", "log_line_prefix": "%m it's # me ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
