package node

import (
	"context"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"pgha/cluster"
	"pgha/internal/host"
	"pgha/patroni"
)

// ConfigValue is a setting as it is now.
type ConfigValue struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	// Node has this value; "" when all nodes have it.
	Node string `json:"node,omitempty"`
	// Where the value comes from: "default", "sized", "cluster", "node n1", or who
	// else set it ("not by pgha: ...").
	Where string `json:"where"`
	// Restart names the nodes whose PostgreSQL takes it at its next restart.
	Restart []string `json:"restart,omitempty"`
	Help    string   `json:"help,omitempty"`
	// Quiet is one that nobody has set: shown when everything is asked for.
	Quiet bool `json:"quiet,omitempty"`
}

// ConfigView is all settings as they are now.
type ConfigView struct {
	Rev    int64         `json:"rev"`
	Values []ConfigValue `json:"values"`
	Nodes  []string      `json:"nodes"` // the data nodes
	// Silent names data nodes that did not answer; nothing of them is in Values.
	Silent []string `json:"silent,omitempty"`
}

// config returns the settings: the cluster's as they are stored, PostgreSQL's as
// the data nodes have them. A witness knows the stored ones alone.
func (n *Node) config(ctx context.Context) (ConfigView, error) {
	var v ConfigView
	store := n.store.Load()
	if store == nil {
		return v, n.notReady()
	}
	s, rev, err := store.Settings(ctx)
	if err != nil {
		return v, err
	}
	v.Rev, v.Nodes = rev, n.dataNodes()
	usual := cluster.Settings{Profile: cluster.Profiles[0]}
	for _, x := range settings {
		c := ConfigValue{Key: x.key, Value: joined(x, x.get(s)), Where: string(patroni.OriginCluster), Help: x.help}
		if c.Value == joined(x, x.get(usual)) {
			c.Where = string(patroni.OriginDefault)
		}
		v.Values = append(v.Values, c)
	}
	if n.cfg.Role != cluster.RoleData {
		v.Values = append(v.Values, storedValues(s)...)
		return v, nil
	}
	states := n.askSettings(ctx)
	for _, name := range n.dataNodes() {
		if _, ok := states[name]; !ok {
			v.Silent = append(v.Silent, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(states)) {
		c := ConfigValue{Key: keyMemory, Node: name, Value: FormatBytes(states[name].Memory), Where: "node " + name + " (pgha.yml, or all of the host's)"}
		if own := s.Nodes[name].Memory; own != "" {
			c.Value, c.Where = own, "node "+name
		}
		v.Values = append(v.Values, c)
	}
	v.Values = append(v.Values, mergeParameters(states)...)
	return v, nil
}

// storedValues are the parameters that the operator has set.
func storedValues(s cluster.Settings) []ConfigValue {
	var out []ConfigValue
	for _, d := range DiffSettings(cluster.Settings{}, cluster.Settings{Postgres: s.Postgres, Nodes: s.Nodes}) {
		c := ConfigValue{Key: d.Key, Node: d.Node, Value: d.New, Where: string(patroni.OriginCluster)}
		if d.Node != "" {
			c.Where = "node " + d.Node
		}
		out = append(out, c)
	}
	return out
}

// mergeParameters makes one row of what all nodes have alike, and a row a node of
// what differs.
func mergeParameters(states map[string]SettingsState) []ConfigValue {
	rows := map[string]map[string]ConfigValue{} // by key and node
	put := func(node string, c ConfigValue) {
		if rows[c.Key] == nil {
			rows[c.Key] = map[string]ConfigValue{}
		}
		rows[c.Key][node] = c
	}
	for node, s := range states {
		for _, row := range s.Settings {
			put(node, ConfigValue{Key: ParameterPrefix + row.Name, Value: row.Shown, Where: "PostgreSQL's default", Quiet: true})
		}
		for _, p := range s.Parameters {
			put(node, s.value(node, p))
		}
		for _, f := range s.Foreign {
			c := ConfigValue{Key: ParameterPrefix + f.Name, Value: f.Value, Where: "not by pgha: " + f.Where, Quiet: f.Where == "postgresql.base.conf"}
			if row, ok := s.parameter(f.Name); ok && row.Pending {
				c.Restart = []string{node}
			} else if ok {
				c.Value = row.Shown // Patroni's key may have it as true where PostgreSQL has on
			}
			put(node, c)
		}
	}
	var out []ConfigValue
	for _, key := range slices.Sorted(maps.Keys(rows)) {
		out = append(out, mergeRows(rows[key], len(states))...)
	}
	return out
}

// value is a parameter that pgha sets, with the name that PostgreSQL uses.
func (s SettingsState) value(node string, p patroni.Parameter) ConfigValue {
	c := ConfigValue{Key: ParameterPrefix + p.Name, Value: p.Value, Where: string(p.Origin), Quiet: p.Owned || p.Origin == patroni.OriginDefault}
	if p.Origin == patroni.OriginNode {
		c.Where = "node " + node
	}
	if row, ok := s.parameter(p.Name); ok {
		c.Key = ParameterPrefix + row.Name
		if row.Pending {
			c.Restart = []string{node}
		}
	}
	return c
}

func mergeRows(nodes map[string]ConfigValue, all int) []ConfigValue {
	names := slices.Sorted(maps.Keys(nodes))
	first := nodes[names[0]]
	same := len(names) == all
	var restart []string
	for _, name := range names {
		same = same && nodes[name].Value == first.Value && nodes[name].Where == first.Where
		restart = append(restart, nodes[name].Restart...)
	}
	if same {
		first.Restart = restart
		return []ConfigValue{first}
	}
	var out []ConfigValue
	for _, name := range names {
		c := nodes[name]
		c.Node, c.Quiet = name, c.Quiet && strings.HasPrefix(c.Where, "PostgreSQL")
		out = append(out, c)
	}
	return out
}

func (n *Node) configHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 3*settingsTimeout)
	defer cancel()
	v, err := n.config(ctx)
	reply(w, v, err)
}

// Config returns the settings as they are now.
func (l *Local) Config(ctx context.Context) (ConfigView, error) {
	var v ConfigView
	return v, l.call(ctx, http.MethodGet, "/v1/config", nil, &v)
}

// ConfigDocument is all settings that can be changed, as YAML with comments.
type ConfigDocument struct {
	Rev  int64  `json:"rev"`
	Text string `json:"text"`
}

func (n *Node) configDocumentHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 3*settingsTimeout)
	defer cancel()
	d, err := func() (d ConfigDocument, err error) {
		store := n.store.Load()
		if store == nil {
			return d, n.notReady()
		}
		s, rev, err := store.Settings(ctx)
		if err != nil {
			return d, err
		}
		v, err := n.config(ctx)
		if err != nil {
			return d, err
		}
		return ConfigDocument{Rev: rev, Text: formatDocument(s, v.Values)}, nil
	}()
	reply(w, d, err)
}

// ConfigDocument returns the settings for an editor.
func (l *Local) ConfigDocument(ctx context.Context) (ConfigDocument, error) {
	var d ConfigDocument
	return d, l.call(ctx, http.MethodGet, "/v1/config/document", nil, &d)
}

// hostMemory is the host's memory in words, for the document.
func hostMemory() string { return fmt.Sprintf("%s on this host", FormatBytes(host.Memory())) }
