package patroni

import (
	"encoding/json"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseHBARule(t *testing.T) {
	for in, want := range map[string]string{
		"hostssl  app app   10.0.0.0/16 scram-sha-256":                   "hostssl app app 10.0.0.0/16 scram-sha-256",
		"hostssl all +staff,bob all reject":                              "hostssl all +staff,bob all reject",
		"hostssl a,b all fd00::/64 cert":                                 "hostssl a,b all fd00::/64 cert",
		"hostssl app app samenet scram-sha-256 clientcert=verify-full":   "hostssl app app samenet scram-sha-256 clientcert=verify-full",
		"hostssl app app 10.0.0.7/32 scram-sha-256 clientcert=verify-ca": "hostssl app app 10.0.0.7/32 scram-sha-256 clientcert=verify-ca",
	} {
		if got, err := ParseHBARule(in); err != nil || got != want {
			t.Errorf("%q gave %q, %v", in, got, err)
		}
	}
	for in, want := range map[string]string{
		"":                                                "it is empty",
		"host all all all scram-sha-256":                  "only hostssl",
		"local all all trust":                             "only hostssl",
		"hostssl all all all":                             "4 fields",
		"hostssl all all all trust":                       "trust would let anybody in",
		"hostssl all all all md5":                         "use scram-sha-256",
		"hostssl all all all peer":                        "no method",
		"hostssl all all 10.0.0.1/8 cert":                 "did you mean 10.0.0.0/8",
		"hostssl all all db.example cert":                 "no network",
		"hostssl all all 10.0.0.0 255.0.0.0 cert":         "no network",
		"hostssl all postgres all reject":                 "the role postgres",
		"hostssl all a,replicator all reject":             "the role replicator",
		"hostssl replication app all cert":                "replication is pgha's own",
		"hostssl @file all all cert":                      "not possible",
		"hostssl a, b all all cert":                       "a database is missing",
		`hostssl "a b" all all cert`:                      "not possible",
		"hostssl all all all cert map=x":                  "option",
		"hostssl all all all reject clientcert=verify-ca": "option",
		"hostssl all /regex all cert":                     "not possible",
		"hostssl all # all cert":                          "not possible",
	} {
		if got, err := ParseHBARule(in); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q gave %q, %v; want %q", in, got, err, want)
		}
	}
}

// An operator's rules stand behind the lines that the product's own roles need,
// and before those for everyone.
func TestHBARulesOrder(t *testing.T) {
	c := sampleConfig()
	c.HBA = []string{"hostssl all all all reject"}
	lines := PGHBA(c)
	at := slices.Index(lines, c.HBA[0])
	if at < 0 {
		t.Fatalf("the rule is not there: %q", lines)
	}
	for i, line := range lines {
		own := strings.Contains(line, ReplicationUser) || strings.Contains(line, RewindUser) || strings.Contains(line, " "+Superuser+" ")
		if own != (i < at) && i != at {
			t.Errorf("line %d, %q, is on the wrong side of the operator's, %d", i, line, at)
		}
	}
}

func TestParameters(t *testing.T) {
	c := sampleConfig()
	c.Postgres = map[string]string{"work_mem": "11MB", "DateStyle": "ISO, DMY", "max_connections": "77", "Port": "1", "ssl_ciphers": "x", "RANDOM_PAGE_COST": "2"}
	c.NodePostgres = map[string]string{"work_mem": "12MB", "max_connections": "88", "listen_addresses": "*"}
	got := map[string]Parameter{}
	for _, p := range c.Parameters() {
		if _, twice := got[strings.ToLower(p.Name)]; twice {
			t.Errorf("%s is there twice", p.Name)
		}
		got[strings.ToLower(p.Name)] = p
	}
	for _, want := range []Parameter{
		{Name: "work_mem", Value: "12MB", Origin: OriginNode},
		{Name: "DateStyle", Value: "ISO, DMY", Origin: OriginCluster},
		{Name: "max_connections", Value: "77", Origin: OriginCluster},
		{Name: "RANDOM_PAGE_COST", Value: "2", Origin: OriginCluster},
		{Name: "ssl", Value: "on", Origin: OriginDefault, Owned: true},
		{Name: "wal_sender_timeout", Value: "5s", Origin: OriginSized, Owned: true},
	} {
		if diff := cmp.Diff(want, got[strings.ToLower(want.Name)]); diff != "" {
			t.Errorf("%s (-want +got):\n%s", want.Name, diff)
		}
	}
	for _, name := range []string{"port", "ssl_ciphers", "listen_addresses"} {
		if p, ok := got[name]; ok {
			t.Errorf("%s was let through: %+v", name, p)
		}
	}
	if _, ok := c.parameters()["max_connections"]; ok {
		t.Error("a shared parameter is in the node's file, where Patroni ignores it")
	}
}

func TestCheckParameter(t *testing.T) {
	for _, c := range []struct{ name, value, want string }{
		{"work_mem", "1GB", ""},
		{"synchronous_commit", "on", ""},
		{"synchronous_commit", "remote_apply", ""},
		{"synchronous_commit", "off", "a failover loses"},
		{"Synchronous_Commit", "local", "a failover loses"},
		{"Port", "1", "where PostgreSQL listens"},
		{"ssl_min_protocol_version", "TLSv1", "pgha's"},
		{"recovery_target_time", "x", "Patroni"},
		{"recovery_prefetch", "off", ""},
		{"archive_command", "cp %p /x", ""},
		{"hba_file", "/x", "hba+="},
		{"fsync", "off", "loses or damages"},
		{"wal_level", "logical", "Patroni"},
	} {
		err := CheckParameter(c.name, c.value)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s=%s: %v, want %q", c.name, c.value, err, c.want)
		}
	}
}

// Patroni ignores or chokes on what PostgreSQL would take.
func TestCheckShared(t *testing.T) {
	for _, c := range []struct{ name, value, base, want string }{
		{"max_connections", "100", "100", ""},
		{"max_connections", "24", "24", "25 at least"},
		{"max_connections", "0x64", "100", "whole number"},
		{"max_connections", "100.4", "100", "whole number"},
		{"wal_keep_size", "1GB", "1024", ""},
		{"wal_keep_size", "8MB", "8", "16 at least"},
		{"track_commit_timestamp", "on", "on", ""},
		{"track_commit_timestamp", "t", "on", "on or off"},
		{"max_prepared_transactions", "0", "0", ""},
		{"work_mem", "anything", "", ""},
	} {
		err := CheckShared(c.name, c.value, c.base)
		if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
			t.Errorf("%s=%s: %v, want %q", c.name, c.value, err, c.want)
		}
	}
}

// The shared parameters in Patroni's config key: each row is a step in the life of
// a cluster, on the config key that the step before left.
func TestSharedParameters(t *testing.T) {
	c := sampleConfig()
	data, err := json.Marshal(bootstrapDCS(c))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	sized := plain(c.sharedSizing()["max_connections"])
	for _, step := range []struct {
		name    string
		behind  map[string]any // put there behind pgha's back before the step
		want    map[string]string
		is      map[string]string // afterwards; "" = absent
		foreign []string
	}{
		{"as it was made", nil, nil, map[string]string{"max_connections": sized}, nil},
		{"set", nil, map[string]string{"max_connections": "200", "max_locks_per_transaction": "128", "work_mem": "1MB"}, map[string]string{"max_connections": "200", "max_locks_per_transaction": "128", "work_mem": ""}, nil},
		{"set to another value", nil, map[string]string{"max_connections": "300", "max_locks_per_transaction": "128"}, map[string]string{"max_connections": "300"}, nil},
		{"somebody else", map[string]any{"max_connections": 250.0, "log_duration": "on"}, map[string]string{"max_connections": "300", "max_locks_per_transaction": "128"}, map[string]string{"max_connections": "250"}, []string{"max_connections", "log_duration"}},
		{"set again", nil, map[string]string{"max_connections": "310", "max_locks_per_transaction": "128"}, map[string]string{"max_connections": "310"}, []string{"log_duration"}},
		{"unset", nil, map[string]string{"max_connections": "310"}, map[string]string{"max_connections": "310", "max_locks_per_transaction": ""}, []string{"log_duration"}},
		{"all unset", nil, nil, map[string]string{"max_connections": sized}, []string{"log_duration"}},
	} {
		for k, v := range step.behind {
			config["postgresql"].(map[string]any)["parameters"].(map[string]any)[k] = v
		}
		c.Postgres = step.want
		before, err := json.Marshal(config)
		if err != nil {
			t.Fatal(err)
		}
		next := Patched(config, c)
		if after, err := json.Marshal(config); err != nil || string(after) != string(before) {
			t.Errorf("%s: the config key was changed in place (%v)", step.name, err)
		}
		config = next
		values, foreign := SharedParameters(config, c)
		for name, want := range step.is {
			if values[name] != want {
				t.Errorf("%s: %s is %q, want %q", step.name, name, values[name], want)
			}
		}
		for name, is := range foreign {
			if is != slices.Contains(step.foreign, name) {
				t.Errorf("%s: %s is foreign: %v", step.name, name, is)
			}
		}
		if patch := DynamicPatch(config, c); len(patch) > 0 {
			t.Errorf("%s: it is never done: %v", step.name, patch)
		}
	}
	if notes := currentNotes(config); len(notes) > 0 {
		t.Errorf("notes are left: %v", notes)
	}
}

// What an operator wants from the start needs no patch after the bootstrap, and
// can be taken back.
func TestSharedAtBootstrap(t *testing.T) {
	c := sampleConfig()
	c.Postgres = map[string]string{"max_connections": "123"}
	data, err := json.Marshal(bootstrapDCS(c))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := json.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	if patch := DynamicPatch(config, c); len(patch) > 0 {
		t.Errorf("patched after the bootstrap: %v", patch)
	}
	c.Postgres = nil
	values, _ := SharedParameters(Patched(config, c), c)
	if want := plain(c.sharedSizing()["max_connections"]); values["max_connections"] != want {
		t.Errorf("max_connections is %s after it was taken back, want %s", values["max_connections"], want)
	}
}
