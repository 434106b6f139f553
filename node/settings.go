package node

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"pgha/cluster"
	"pgha/patroni"
)

// ParameterPrefix begins the key of a setting that is a parameter of PostgreSQL.
const ParameterPrefix = "postgresql."

// keyMemory is the one setting of a single node that is no parameter.
const keyMemory = "memory"

// What a ConfigChange does with its value.
const (
	ChangeSet    = ""
	ChangeUnset  = "unset"
	ChangeAdd    = "add"    // to a list
	ChangeRemove = "remove" // from a list
)

// ConfigChange asks for a change of one setting.
type ConfigChange struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	Op    string `json:"op,omitempty"`
}

// ConfigDiff is what differs in one setting.
type ConfigDiff struct {
	Node string `json:"node,omitempty"` // "" = of the cluster
	Key  string `json:"key"`
	Old  string `json:"old"` // "" = not set
	New  string `json:"new"`
}

// String tells the difference in a line.
func (d ConfigDiff) String() string {
	key := d.Key
	if d.Node != "" {
		key += " on " + d.Node
	}
	or := func(s string) string {
		if s == "" {
			return "(not set)"
		}
		return s
	}
	return fmt.Sprintf("%s: %s -> %s", key, or(d.Old), or(d.New))
}

// setting is one of the cluster that is no parameter of PostgreSQL. values are
// what it holds as text; a list has any number.
type setting struct {
	key, help string
	list      bool
	separator string // of a list's values on the command line
	get       func(cluster.Settings) []string
	set       func(*cluster.Settings, []string) error
}

var settings = []setting{
	{
		key: "profile", help: "timers of the whole cluster: " + strings.Join(cluster.Profiles, ", "),
		get: func(s cluster.Settings) []string { return []string{s.Profile} },
		set: func(s *cluster.Settings, v []string) error {
			s.Profile = cluster.Profiles[0]
			if len(v) > 0 {
				s.Profile = v[0]
			}
			return profileOK(s.Profile)
		},
	},
	{
		key: "async", help: "on: commits do not wait for a replica, and a failover may lose the last ones",
		get: func(s cluster.Settings) []string {
			if s.Async {
				return []string{"on"}
			}
			return []string{"off"}
		},
		set: func(s *cluster.Settings, v []string) error {
			switch strings.Join(v, " ") {
			case "on", "async", "true", "yes":
				s.Async = true
			case "off", "sync", "false", "no", "":
				s.Async = false
			default:
				return fmt.Errorf("async is on or off, not %q", v[0])
			}
			return nil
		},
	},
	{
		key: "clients", help: "networks from where applications connect; the firewall lets nobody else in", list: true, separator: ",",
		get: func(s cluster.Settings) []string { return texts(s.ClientNets) },
		set: func(s *cluster.Settings, v []string) (err error) {
			if len(v) == 0 {
				return fmt.Errorf("clients cannot be empty: nobody could connect any more (0.0.0.0/0 is everybody)")
			}
			s.ClientNets, err = each(v, func(t string) (netip.Prefix, error) {
				p, err := netip.ParsePrefix(t)
				if err != nil || p.Addr().Is4In6() {
					return p, fmt.Errorf("clients: %q is not a network: write it as 10.0.0.0/16, or 10.0.0.7/32 for one host", t)
				}
				return p, nil
			})
			return err
		},
	},
	{
		key: "probes", help: "addresses from where a load balancer probes", list: true, separator: ",",
		get: func(s cluster.Settings) []string { return texts(s.ProbeAddrs) },
		set: func(s *cluster.Settings, v []string) (err error) {
			s.ProbeAddrs, err = each(v, func(t string) (netip.Addr, error) {
				a, err := netip.ParseAddr(t)
				if err != nil || a.Zone() != "" {
					return a, fmt.Errorf("probes: %q is not an IP address", t)
				}
				return a.Unmap(), nil
			})
			return err
		},
	},
	{
		key: "san", help: "further names and addresses in the certificates, as the load balancer's", list: true, separator: ",",
		get: func(s cluster.Settings) []string { return s.SANs },
		set: func(s *cluster.Settings, v []string) (err error) {
			s.SANs, err = each(v, func(t string) (string, error) { return t, cluster.ValidateSAN(t) })
			return err
		},
	},
	{
		key: "hba", help: "your rules of pg_hba.conf, before pgha's for everyone: hostssl DATABASE USER ADDRESS METHOD", list: true, separator: ";",
		get: func(s cluster.Settings) []string { return s.HBA },
		set: func(s *cluster.Settings, v []string) (err error) {
			s.HBA, err = each(v, patroni.ParseHBARule)
			return err
		},
	},
}

func texts[T fmt.Stringer](v []T) []string {
	var out []string
	for _, x := range v {
		out = append(out, x.String())
	}
	return out
}

func each[T any](v []string, parse func(string) (T, error)) ([]T, error) {
	var out []T
	for _, t := range v {
		x, err := parse(t)
		if err != nil {
			return nil, err
		}
		out = append(out, x)
	}
	return out, nil
}

func badConfig(err error) error {
	return &cluster.Error{Code: cluster.CodeBadRequest, Message: err.Error()}
}

// changeSettings returns s with all changes made; node "" means the cluster's.
// It checks what needs no PostgreSQL to be asked.
func changeSettings(s cluster.Settings, node string, changes []ConfigChange) (cluster.Settings, error) {
	s = cloneSettings(s)
	for _, c := range changes {
		if err := changeSetting(&s, node, c); err != nil {
			return s, badConfig(err)
		}
	}
	return s, nil
}

func changeSetting(s *cluster.Settings, node string, c ConfigChange) error {
	name, isParameter := strings.CutPrefix(c.Key, ParameterPrefix)
	switch {
	case isParameter:
		return changeParameter(s, node, name, c)
	case node != "" && c.Key == keyMemory:
		return changeMemory(s, node, c)
	case c.Key == keyMemory:
		return fmt.Errorf("memory is a setting of one node: add --node NAME")
	}
	i := slices.IndexFunc(settings, func(x setting) bool { return x.key == c.Key })
	if i < 0 {
		return unknownKey(c.Key)
	}
	if node != "" {
		return fmt.Errorf("%s is a setting of the whole cluster: leave --node out; a node has memory and %sNAME of its own", c.Key, ParameterPrefix)
	}
	x := settings[i]
	next, err := x.changed(x.get(*s), c)
	if err != nil {
		return err
	}
	return x.set(s, next)
}

// changed returns the values of a setting after a change.
func (x setting) changed(have []string, c ConfigChange) ([]string, error) {
	if !x.list {
		switch c.Op {
		case ChangeUnset:
			return nil, nil
		case ChangeSet:
			return []string{c.Value}, nil
		}
		return nil, fmt.Errorf("%s is one value, no list: write %s=VALUE", x.key, x.key)
	}
	var given []string
	for v := range strings.SplitSeq(c.Value, x.separator) {
		if v = strings.Join(strings.Fields(v), " "); v != "" {
			given = append(given, v)
		}
	}
	switch c.Op {
	case ChangeUnset:
		return nil, nil
	case ChangeSet:
		return given, nil
	case ChangeAdd:
		for _, v := range given {
			if !slices.Contains(have, v) {
				have = append(slices.Clone(have), v)
			}
		}
		return have, nil
	case ChangeRemove:
		for _, v := range given {
			if !slices.Contains(have, v) {
				return nil, fmt.Errorf("%s does not hold %q: it is %s", x.key, v, joined(x, have))
			}
		}
		return slices.DeleteFunc(slices.Clone(have), func(v string) bool { return slices.Contains(given, v) }), nil
	}
	return nil, fmt.Errorf("there is no change %q", c.Op)
}

func joined(x setting, values []string) string {
	return strings.Join(values, x.separator+" ")
}

func changeParameter(s *cluster.Settings, node, name string, c ConfigChange) error {
	if c.Op != ChangeSet && c.Op != ChangeUnset {
		return fmt.Errorf("%s is one value, no list: write %s=VALUE", c.Key, c.Key)
	}
	to := &s.Postgres
	n := s.Nodes[node]
	if node != "" {
		to = &n.Postgres
	}
	// A name is the same in any case.
	for have := range *to {
		if strings.EqualFold(have, name) {
			delete(*to, have)
		}
	}
	if c.Op == ChangeSet {
		if err := patroni.CheckParameter(name, c.Value); err != nil {
			return err
		}
		if node != "" && patroni.IsShared(name) {
			return fmt.Errorf("%s must be the same on all nodes: leave --node out", name)
		}
		if *to == nil {
			*to = map[string]string{}
		}
		(*to)[name] = c.Value
	}
	if node != "" {
		putNode(s, node, n)
	}
	return nil
}

func changeMemory(s *cluster.Settings, node string, c ConfigChange) error {
	n := s.Nodes[node]
	switch c.Op {
	case ChangeSet:
		if err := checkMemory(c.Value); err != nil {
			return fmt.Errorf("memory: %w", err)
		}
		n.Memory = c.Value
	case ChangeUnset:
		n.Memory = ""
	default:
		return fmt.Errorf("memory is one value, no list: write memory=4GB")
	}
	putNode(s, node, n)
	return nil
}

// putNode stores a node's settings; a node that has none has no entry.
func putNode(s *cluster.Settings, node string, n cluster.NodeSettings) {
	if n.Memory == "" && len(n.Postgres) == 0 {
		delete(s.Nodes, node)
		return
	}
	if s.Nodes == nil {
		s.Nodes = map[string]cluster.NodeSettings{}
	}
	s.Nodes[node] = n
}

func unknownKey(key string) error {
	keys := []string{}
	for _, x := range settings {
		keys = append(keys, x.key)
	}
	hint := ""
	if near := nearest(key, keys); near != "" {
		hint = fmt.Sprintf(" (did you mean %s)", near)
	}
	return fmt.Errorf("there is no setting %q%s: use one of %s, %sNAME for a parameter of PostgreSQL, or memory with --node NAME", key, hint, strings.Join(keys, ", "), ParameterPrefix)
}

// cloneSettings copies what a change would otherwise share.
func cloneSettings(s cluster.Settings) cluster.Settings {
	s.Postgres = maps.Clone(s.Postgres)
	s.Nodes = maps.Clone(s.Nodes)
	for name, n := range s.Nodes {
		n.Postgres = maps.Clone(n.Postgres)
		s.Nodes[name] = n
	}
	return s
}

// DiffSettings returns what differs from a to b: the cluster's settings first,
// then the nodes'.
func DiffSettings(a, b cluster.Settings) []ConfigDiff {
	out := []ConfigDiff{}
	add := func(node, key, old, next string) {
		if old != next {
			out = append(out, ConfigDiff{Node: node, Key: key, Old: old, New: next})
		}
	}
	for _, x := range settings {
		add("", x.key, joined(x, x.get(a)), joined(x, x.get(b)))
	}
	parameters := func(node string, old, next map[string]string) {
		for _, name := range sortedKeys(old, next) {
			add(node, ParameterPrefix+name, old[name], next[name])
		}
	}
	parameters("", a.Postgres, b.Postgres)
	for _, node := range sortedKeys(a.Nodes, b.Nodes) {
		add(node, keyMemory, a.Nodes[node].Memory, b.Nodes[node].Memory)
		parameters(node, a.Nodes[node].Postgres, b.Nodes[node].Postgres)
	}
	return out
}

// sortedKeys returns the keys of both maps.
func sortedKeys[V any](a, b map[string]V) []string {
	all := maps.Clone(a)
	if all == nil {
		all = map[string]V{}
	}
	maps.Copy(all, b)
	return slices.Sorted(maps.Keys(all))
}

// nearest returns the name that was probably meant, or "".
func nearest(name string, names []string) string {
	best, least := "", 2+len(name)/4
	for _, n := range names {
		if d := editDistance(strings.ToLower(name), strings.ToLower(n)); d < least {
			best, least = n, d
		}
	}
	return best
}

// editDistance is how many characters have to be changed, put in or taken out.
func editDistance(a, b string) int {
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := 1; i <= len(a); i++ {
		diagonal := row[0]
		row[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			next := min(row[j]+1, row[j-1]+1, diagonal+cost)
			diagonal, row[j] = row[j], next
		}
	}
	return row[len(b)]
}
