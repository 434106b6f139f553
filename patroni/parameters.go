package patroni

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Origin says where the value of a parameter comes from.
type Origin string

// The origins, the weakest first.
const (
	OriginDefault Origin = "default" // pgha's own, the same everywhere
	OriginSized   Origin = "sized"   // follows from the host's size, or from the profile
	OriginCluster Origin = "cluster" // the operator's, for all nodes
	OriginNode    Origin = "node"    // the operator's, for one node
)

// Parameter is a parameter of PostgreSQL as pgha sets it.
type Parameter struct {
	Name   string `json:"name"`
	Value  string `json:"value"`
	Origin Origin `json:"origin"`
	Owned  bool   `json:"owned,omitempty"` // the operator cannot set it
}

// Parameters returns what pgha sets on this node, in the order of names: those in
// the node's own file, and those shared ones that it keeps in Patroni's config
// key.
func (c Config) Parameters() []Parameter {
	base, sized := c.defaultParameters(), c.localSizing()
	origin := map[string]Origin{}
	for name := range base {
		origin[name] = OriginDefault
	}
	for _, name := range profileParameters {
		origin[name] = OriginSized
	}
	for name := range sized {
		origin[name] = OriginSized
	}
	maps.Copy(base, sized)
	for _, l := range []struct {
		set    map[string]string
		origin Origin
	}{{c.Postgres, OriginCluster}, {c.NodePostgres, OriginNode}} {
		for name, value := range l.set {
			if _, owned := Owned(name); owned || IsShared(name) && l.origin == OriginNode {
				continue // refused where it is set; never let it through
			}
			// A name is the same in any case to PostgreSQL, and only one may stand.
			for have := range base {
				if have != name && strings.EqualFold(have, name) {
					delete(base, have)
				}
			}
			base[name], origin[name] = value, l.origin
		}
	}
	out := make([]Parameter, 0, len(base))
	for _, name := range slices.Sorted(maps.Keys(base)) {
		_, owned := Owned(name)
		out = append(out, Parameter{Name: name, Value: fmt.Sprint(base[name]), Origin: origin[name], Owned: owned})
	}
	return out
}

// parameters are PostgreSQL's settings in the node's file. They go before those
// in the config key, but for the shared ones, which Patroni takes from there
// alone.
func (c Config) parameters() map[string]any {
	out := map[string]any{}
	for _, p := range c.Parameters() {
		if !IsShared(p.Name) {
			out[p.Name] = p.Value
		}
	}
	return out
}

// sharedMinimum holds the parameters that Patroni gives to PostgreSQL on its
// command line, from the config key alone and thus the same on all nodes, and
// which an operator may set. Patroni ignores a value below its minimum, without
// a word; the unit is the parameter's own (MB for wal_keep_size).
var sharedMinimum = map[string]int{
	"max_connections":           25,
	"max_wal_senders":           5, // two for each standby, and a base backup
	"max_replication_slots":     4,
	"max_worker_processes":      2,
	"max_locks_per_transaction": 32,
	"max_prepared_transactions": 0,
	"wal_keep_size":             16,
	"track_commit_timestamp":    0,
}

// IsShared says whether a parameter has one value for all nodes.
func IsShared(name string) bool {
	_, ok := sharedMinimum[strings.ToLower(name)]
	return ok
}

// Adjustable says whether a parameter is one that pgha sets to a value of its own
// unless the operator has chosen another.
func Adjustable(name string) bool {
	name = strings.ToLower(name)
	if _, is := Owned(name); is {
		return false
	}
	c := Config{}
	_, taste := c.defaultParameters()[name]
	_, sized := c.localSizing()[name]
	_, shared := sharedMinimum[name]
	return taste || sized || shared
}

// CheckShared says what is wrong with the value of a shared parameter: Patroni
// reads it too, and more strictly than PostgreSQL. base is the value in the
// parameter's own unit, as PostgreSQL shows it in pg_settings.
func CheckShared(name, value, base string) error {
	name = strings.ToLower(name)
	least, ok := sharedMinimum[name]
	if !ok {
		return nil
	}
	switch name {
	case "track_commit_timestamp":
		if value != "on" && value != "off" {
			return fmt.Errorf("%s is %q: write on or off", name, value)
		}
		return nil
	case "wal_keep_size":
	default:
		if value == "" || strings.Trim(value, "0123456789") != "" {
			return fmt.Errorf("%s is %q: write it as a whole number", name, value)
		}
	}
	var n int
	if _, err := fmt.Sscan(base, &n); err != nil {
		return fmt.Errorf("%s is %q, which is not a number", name, base)
	}
	if n < least {
		return fmt.Errorf("%s is %s: the cluster needs %d at least", name, value, least)
	}
	return nil
}

// MustNotShrink says whether a standby cannot run with less of this parameter
// than its primary had: a lower value is taken by the primary first.
func MustNotShrink(name string) bool {
	switch strings.ToLower(name) {
	case "max_connections", "max_wal_senders", "max_worker_processes", "max_locks_per_transaction", "max_prepared_transactions":
		return true
	}
	return false
}

// Reasons for which a parameter is pgha's.
const (
	ownsAddress  = "pgha sets where PostgreSQL listens: the gate, HAProxy and Patroni rely on it"
	ownsTLS      = "the certificates and the TLS of PostgreSQL are pgha's"
	ownsFiles    = "pgha and Patroni set where PostgreSQL's files are"
	ownsFailover = "replication and failover rely on it, and Patroni sets it"
	ownsLog      = "pgha logs reads PostgreSQL's log files where and as pgha has them written"
	ownsProfile  = "it moves with the timers of the whole cluster: pgha config set profile=..."
	ownsSafety   = "without it a crash loses or damages data"
)

var owned = map[string]string{
	"listen_addresses": ownsAddress, "port": ownsAddress, "unix_socket_directories": ownsAddress,
	"unix_socket_permissions": ownsAddress, "unix_socket_group": ownsAddress, "bonjour": ownsAddress,
	"data_directory": ownsFiles, "config_file": ownsFiles, "external_pid_file": ownsFiles,
	"hba_file":   "pg_hba.conf is pgha's: add rules with pgha config set hba+=...",
	"ident_file": ownsFiles, "cluster_name": ownsFailover,
	"wal_level": ownsFailover, "hot_standby": ownsFailover, "wal_log_hints": ownsFailover,
	"synchronous_standby_names": ownsFailover, "primary_conninfo": ownsFailover, "primary_slot_name": ownsFailover,
	"restart_after_crash": ownsFailover, "restore_command": ownsFailover, "promote_trigger_file": ownsFailover, "synchronized_standby_slots": ownsFailover,
	"wal_sender_timeout": ownsProfile, "wal_receiver_timeout": ownsProfile, "wal_receiver_status_interval": ownsProfile,
	"logging_collector": ownsLog, "log_destination": ownsLog, "log_directory": ownsLog, "log_filename": ownsLog, "log_file_mode": ownsLog,
	"log_rotation_age": ownsLog, "log_rotation_size": ownsLog, "log_truncate_on_rotation": ownsLog, "log_timezone": ownsLog,
	"password_encryption": "clients log in with scram-sha-256 alone",
	"fsync":               ownsSafety, "full_page_writes": ownsSafety, "zero_damaged_pages": ownsSafety, "ignore_invalid_pages": ownsSafety,
}

// Owned says whether a parameter is pgha's own, and why.
func Owned(name string) (reason string, is bool) {
	name = strings.ToLower(name)
	switch {
	case strings.HasPrefix(name, "ssl"):
		return ownsTLS, true
	case strings.HasPrefix(name, "recovery_") && name != "recovery_init_sync_method" && name != "recovery_prefetch", strings.HasPrefix(name, "archive_cleanup"):
		return ownsFailover, true
	}
	reason, is = owned[name]
	return reason, is
}

// CheckParameter says why the operator may not set a parameter to a value,
// whatever PostgreSQL thinks of it.
func CheckParameter(name, value string) error {
	if reason, is := Owned(name); is {
		return fmt.Errorf("%s cannot be set: %s", strings.ToLower(name), reason)
	}
	if strings.EqualFold(name, "synchronous_commit") && !slices.Contains([]string{"on", "remote_apply"}, strings.ToLower(value)) {
		return fmt.Errorf("synchronous_commit %q would acknowledge commits that a failover loses: use on or remote_apply; a role or a session may set its own, and pgha config set async=on is for the whole cluster", value)
	}
	return nil
}
