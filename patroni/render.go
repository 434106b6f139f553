package patroni

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"text/template"

	"pgha/assets"
)

// timers of a profile, in seconds.
type timers struct {
	ttl, loopWait, retryTimeout int
	replication                 int // a replication peer is lost after this
}

// The gate finds and replaces a lost primary long before ttl has run out; ttl
// bounds what Patroni does by itself, and is long because a short one only adds
// needless demotions. retry_timeout is how long etcd may be away before a healthy
// primary is demoted: a restart of pgha, and with it of the embedded etcd, must
// stay well below it. loop_wait + 2*retry_timeout must not exceed ttl.
func (c Config) timers() timers {
	switch c.Profile {
	case ProfileSteady:
		return timers{ttl: 60, loopWait: 5, retryTimeout: 20, replication: 10}
	case ProfileWide:
		return timers{ttl: 90, loopWait: 10, retryTimeout: 40, replication: 20}
	default:
		return timers{ttl: 60, loopWait: 5, retryTimeout: 20, replication: 5}
	}
}

// Render returns Patroni's configuration file. It holds the REST API's
// password: write it with mode 0600, owned by OSUser.
func Render(c Config) ([]byte, error) {
	if err := c.validate(); err != nil {
		return nil, fmt.Errorf("render Patroni's configuration: %w", err)
	}
	type certUser struct{ Key, User string }
	data := struct {
		Config
		RESTAddr, PostgresAddr, PGPass, Superuser string
		CertUsers                                 []certUser
		HBA, Ident                                []string
		DCS, Parameters, Tags                     map[string]any
	}{
		Config:       c,
		RESTAddr:     hostPort(c.Addr, c.Ports.Patroni),
		PostgresAddr: hostPort(c.Addr, c.Ports.Postgres),
		PGPass:       filepath.Join(c.SocketDir, ".pgpass"),
		Superuser:    Superuser,
		CertUsers:    []certUser{{"replication", ReplicationUser}, {"rewind", RewindUser}},
		HBA:          PGHBA(c),
		Ident:        PGIdent(c),
		DCS:          bootstrapDCS(c),
		Parameters:   c.parameters(),
		Tags:         c.Tags.tree(),
	}
	t, err := template.New("patroni.yml.tmpl").Funcs(template.FuncMap{"q": quote, "tree": tree}).
		ParseFS(assets.Templates, "patroni.yml.tmpl")
	if err != nil {
		return nil, fmt.Errorf("read the template of Patroni's configuration: %w", err)
	}
	var out bytes.Buffer
	if err := t.Execute(&out, data); err != nil {
		return nil, fmt.Errorf("render Patroni's configuration: %w", err)
	}
	return out.Bytes(), nil
}

// DesiredDynamic returns the settings in Patroni's config key that must stay as
// pgha wants them: safety depends on some, and the slots follow the roster.
// Everything else in that key is the operator's.
func DesiredDynamic(c Config) map[string]any {
	t := c.timers()
	// A slot for each member, so that it outlives the member's key: otherwise the
	// primary drops it with the key and recycles WAL that the member needs on
	// its return. Patroni itself leaves out the slot of the node it runs on.
	slots := map[string]any{}
	for _, m := range c.Members {
		slots[SlotName(m.Name)] = map[string]any{"type": "physical"}
	}
	return map[string]any{
		"ttl":                     t.ttl,
		"loop_wait":               t.loopWait,
		"retry_timeout":           t.retryTimeout,
		"check_timeline":          true,
		"synchronous_mode":        !c.Async,
		"synchronous_mode_strict": false,
		"failsafe_mode":           false,
		"slots":                   slots,
		"postgresql": map[string]any{
			"use_pg_rewind": true,
			"use_slots":     true,
			"remove_data_directory_on_rewind_failure": true,
		},
	}
}

// DynamicPatch returns what must be patched into current, the config key's
// value, to get DesiredDynamic; it is empty when nothing must. The slots of the
// nodes in removed are taken out; slots of unknown names are the operator's.
func DynamicPatch(current map[string]any, c Config, removed ...string) map[string]any {
	patch := diff(current, DesiredDynamic(c))
	merge(patch, sharedPatch(current, c.Postgres))
	slots, _ := current["slots"].(map[string]any)
	for _, name := range removed {
		slot := SlotName(name)
		inRoster := slices.ContainsFunc(c.Members, func(m Member) bool { return SlotName(m.Name) == slot })
		if _, ok := slots[slot]; !ok || inRoster {
			continue
		}
		sub, ok := patch["slots"].(map[string]any)
		if !ok {
			sub = map[string]any{}
			patch["slots"] = sub
		}
		sub[slot] = nil
	}
	return patch
}

// diff returns the part of want that have lacks.
func diff(have, want map[string]any) map[string]any {
	out := map[string]any{}
	for k, w := range want {
		if wm, ok := w.(map[string]any); ok {
			hm, _ := have[k].(map[string]any)
			if sub := diff(hm, wm); len(sub) > 0 {
				out[k] = sub
			}
			continue
		}
		// Numbers come back from JSON as float64.
		if h, ok := have[k]; !ok || fmt.Sprint(h) != fmt.Sprint(w) {
			out[k] = w
		}
	}
	return out
}

// merge puts what is in from into to, level by level.
func merge(to, from map[string]any) {
	for k, v := range from {
		sub, ok := v.(map[string]any)
		have, both := to[k].(map[string]any)
		if ok && both {
			merge(have, sub)
			continue
		}
		to[k] = v
	}
}

// bootstrapDCS is the config key's first value. It is used once.
func bootstrapDCS(c Config) map[string]any {
	dcs := DesiredDynamic(c)
	dcs["maximum_lag_on_failover"] = mib
	dcs["primary_start_timeout"] = 30
	dcs["postgresql"].(map[string]any)["parameters"] = c.sharedSizing()
	// As a patch would be: JSON's own merge, with what was there before.
	if patch := sharedPatch(dcs, c.Postgres); patch != nil {
		merge(dcs, patch)
	}
	return dcs
}

// profileParameters are those of defaultParameters that move with the profile.
var profileParameters = []string{
	"wal_sender_timeout", "wal_receiver_timeout", "tcp_keepalives_idle", "tcp_user_timeout",
}

// defaultParameters are what pgha sets on every node alike.
func (c Config) defaultParameters() map[string]any {
	t := c.timers()
	seconds := func(n int) string { return itoa(n) + "s" }
	return map[string]any{
		"unix_socket_directories": c.SocketDir,
		"unix_socket_permissions": "0700",

		"ssl":                      "on",
		"ssl_cert_file":            c.PostgresBundle,
		"ssl_key_file":             c.PostgresBundle,
		"ssl_ca_file":              c.CAFile,
		"ssl_min_protocol_version": "TLSv1.2",
		"password_encryption":      "scram-sha-256",

		"wal_sender_timeout":           seconds(t.replication),
		"wal_receiver_timeout":         seconds(t.replication),
		"wal_receiver_status_interval": "1s",

		// A client or HAProxy that vanished must not hold locks for long.
		"tcp_keepalives_idle":     seconds(t.replication),
		"tcp_keepalives_interval": "2s",
		"tcp_keepalives_count":    "2",
		"tcp_user_timeout":        seconds(2 * t.replication),

		"superuser_reserved_connections": "5",
		"random_page_cost":               "1.1",

		"logging_collector": "on",
		"log_directory":     filepath.Join(c.LogDir, "postgres"),
		// One file a weekday, overwritten a week later.
		"log_filename":             "postgresql-%a.log",
		"log_rotation_age":         "1d",
		"log_rotation_size":        "0",
		"log_truncate_on_rotation": "on",
		"log_file_mode":            "0600",
		"log_timezone":             "UTC",
		"log_line_prefix":          "%m [%p] %q%u@%d/%a %h ",
		"log_checkpoints":          "on",
		"log_lock_waits":           "on",
	}
}

func (t Tags) tree() map[string]any {
	out := map[string]any{}
	for name, on := range map[string]bool{
		"nofailover": t.NoFailover, "noloadbalance": t.NoLoadBalance, "nosync": t.NoSync, "clonefrom": t.CloneFrom,
	} {
		if on {
			out[name] = true
		}
	}
	return out
}

// quote returns s as a YAML scalar that is a string to every YAML version: a
// bare "on" or "1:20" is not.
func quote(s string) (string, error) {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	if err := enc.Encode(s); err != nil {
		return "", fmt.Errorf("quote %q: %w", s, err)
	}
	return strings.TrimSpace(b.String()), nil
}

var plainKey = regexp.MustCompile(`^[a-z][a-z_]{2,}$`)

// yamlKey quotes k unless every YAML version reads it as a string; a node may
// be called "off" or "7".
func yamlKey(k string) (string, error) {
	switch k {
	case "yes", "off", "true", "false", "null":
	default:
		if plainKey.MatchString(k) {
			return k, nil
		}
	}
	return quote(k)
}

// tree returns m as a YAML block with the given indent, keys in order. It
// starts with a line break.
func tree(indent int, m map[string]any) (string, error) {
	var b strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		key, err := yamlKey(k)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "\n%s%s:", strings.Repeat(" ", indent), key)
		switch v := m[k].(type) {
		case map[string]any:
			if len(v) == 0 {
				b.WriteString(" {}")
				continue
			}
			sub, err := tree(indent+2, v)
			if err != nil {
				return "", err
			}
			b.WriteString(sub)
		case string:
			s, err := quote(v)
			if err != nil {
				return "", err
			}
			b.WriteString(" " + s)
		case int, bool:
			fmt.Fprintf(&b, " %v", v)
		default:
			return "", fmt.Errorf("render %s: %T has no place in the tree", k, v)
		}
	}
	return b.String(), nil
}
