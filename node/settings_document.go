package node

import (
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"

	"github.com/goccy/go-yaml"

	"pgha/cluster"
	"pgha/patroni"
)

const documentHead = `# All settings of the cluster. Save and leave the editor: what differs is shown and
# checked, and you are asked before anything is changed. An unchanged file changes
# nothing. What you take away goes back to its default.
`

// formatDocument writes the settings as YAML for an editor. values are the settings
// as they are now; those that can be set and are not stand in comments.
func formatDocument(s cluster.Settings, values []ConfigValue) string {
	var b strings.Builder
	b.WriteString(documentHead)
	for _, x := range settings {
		fmt.Fprintf(&b, "\n# %s\n", x.help)
		if !x.list {
			fmt.Fprintf(&b, "%s: %s\n", x.key, strconv.Quote(joined(x, x.get(s))))
			continue
		}
		items := x.get(s)
		if len(items) == 0 {
			fmt.Fprintf(&b, "%s: []\n", x.key)
			continue
		}
		fmt.Fprintf(&b, "%s:\n", x.key)
		for _, v := range items {
			fmt.Fprintf(&b, "  - %s\n", strconv.Quote(v))
		}
	}
	b.WriteString("\n# Parameters of PostgreSQL, for all nodes.\n")
	writeParameters(&b, "", s.Postgres)
	for _, v := range values {
		if name, ok := strings.CutPrefix(v.Key, ParameterPrefix); ok && v.Node == "" && !v.Quiet && v.Where == string(patroni.OriginSized) {
			fmt.Fprintf(&b, "  # %s: %s  (%s)\n", name, strconv.Quote(v.Value), v.Where)
		}
	}
	fmt.Fprintf(&b, "\n# Single nodes: memory (what PostgreSQL is sized to; %s) and postgresql.\n", hostMemory())
	b.WriteString("nodes:\n")
	if len(s.Nodes) == 0 {
		b.WriteString("  # n1:\n  #   memory: \"4GB\"\n  #   postgresql:\n  #     work_mem: \"8MB\"\n")
	}
	for _, name := range slices.Sorted(maps.Keys(s.Nodes)) {
		fmt.Fprintf(&b, "  %s:\n", name)
		if m := s.Nodes[name].Memory; m != "" {
			fmt.Fprintf(&b, "    memory: %s\n", strconv.Quote(m))
		}
		if p := s.Nodes[name].Postgres; len(p) > 0 {
			writeParameters(&b, "    ", p)
		}
	}
	return b.String()
}

func writeParameters(b *strings.Builder, indent string, p map[string]string) {
	fmt.Fprintf(b, "%spostgresql:\n", indent)
	for _, name := range slices.Sorted(maps.Keys(p)) {
		fmt.Fprintf(b, "%s  %s: %s\n", indent, name, strconv.Quote(p[name]))
	}
}

// text is a YAML scalar as it is written, whatever type it looks like.
type text string

// UnmarshalYAML takes the scalar's own characters.
func (t *text) UnmarshalYAML(data []byte) error {
	s := strings.TrimSpace(string(data))
	if strings.HasPrefix(s, `"`) || strings.HasPrefix(s, `'`) || strings.HasPrefix(s, "|") || strings.HasPrefix(s, ">") {
		var v string
		if err := yaml.Unmarshal(data, &v); err != nil {
			return err
		}
		*t = text(v)
		return nil
	}
	if s == "null" || s == "~" {
		s = ""
	}
	*t = text(s)
	return nil
}

// document is what the editor's YAML holds; what is missing has its default.
type document struct {
	Profile    text                    `yaml:"profile"`
	Async      text                    `yaml:"async"`
	Clients    []text                  `yaml:"clients"`
	Probes     []text                  `yaml:"probes"`
	SAN        []text                  `yaml:"san"`
	HBA        []text                  `yaml:"hba"`
	PostgreSQL map[string]text         `yaml:"postgresql"`
	Nodes      map[string]nodeDocument `yaml:"nodes"`
}

type nodeDocument struct {
	Memory     text            `yaml:"memory"`
	PostgreSQL map[string]text `yaml:"postgresql"`
}

// parseDocument returns the settings that a document asks for; now are those that
// it was made of.
func parseDocument(now cluster.Settings, doc string) (cluster.Settings, error) {
	var d document
	dec := yaml.NewDecoder(strings.NewReader(doc), yaml.Strict())
	if err := dec.Decode(&d); err != nil && !errors.Is(err, io.EOF) {
		return now, badConfig(documentError(err))
	}
	s := cluster.Settings{Change: now.Change}
	given := map[string][]text{"profile": one(d.Profile), "async": one(d.Async), "clients": d.Clients, "probes": d.Probes, "san": d.SAN, "hba": d.HBA}
	for _, x := range settings {
		var values []string
		for _, v := range given[x.key] {
			values = append(values, string(v))
		}
		if err := x.set(&s, values); err != nil {
			return now, badConfig(err)
		}
	}
	var changes []ConfigChange
	for name, value := range d.PostgreSQL {
		changes = append(changes, ConfigChange{Key: ParameterPrefix + name, Value: string(value)})
	}
	s, err := changeSettings(s, "", changes)
	for node, nd := range d.Nodes {
		if err != nil {
			break
		}
		changes = nil
		if nd.Memory != "" {
			changes = append(changes, ConfigChange{Key: keyMemory, Value: string(nd.Memory)})
		}
		for name, value := range nd.PostgreSQL {
			changes = append(changes, ConfigChange{Key: ParameterPrefix + name, Value: string(value)})
		}
		s, err = changeSettings(s, node, changes)
	}
	return s, err
}

func one(t text) []text {
	if t == "" {
		return nil
	}
	return []text{t}
}

// documentError names the line of a mistake.
func documentError(err error) error {
	var ye yaml.Error
	if !errors.As(err, &ye) || ye.GetToken() == nil {
		return fmt.Errorf("the settings cannot be read: %w", err)
	}
	return fmt.Errorf("line %d: %s", ye.GetToken().Position.Line, ye.GetMessage())
}
