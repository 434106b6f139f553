package node

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/patroni"
)

const (
	pathSettingsState = "/v1/settings/state"
	pathSettingsTry   = "/v1/settings/try"

	settingsTimeout = 5 * time.Second
)

// settingsParts are the parts of a node that follow the settings, as their
// problems are called.
var settingsParts = []string{"firewall", "certificates", "patroni configuration", "haproxy configuration", "gate"}

// SettingsState is how far a data node has followed the settings.
type SettingsState struct {
	// Rev is etcd's revision of the settings that the node has taken.
	Rev      int64    `json:"rev"`
	Problems []string `json:"problems,omitempty"` // of the parts that follow settings
	// Parameters are those that pgha sets on this node, Foreign those that are
	// somebody else's doing.
	Parameters []patroni.Parameter `json:"parameters"`
	Foreign    []ForeignParameter  `json:"foreign,omitempty"`
	Memory     uint64              `json:"memory"`            // what PostgreSQL is sized to, in bytes
	Settings   []PostgresSetting   `json:"settings"`          // the catalogue; none while PostgreSQL does not answer
	HBALoaded  bool                `json:"hba_loaded"`        // PostgreSQL has read the pg_hba.conf that the settings ask for
	HBAErrors  []string            `json:"hba_errors"`        // of pg_hba.conf, as PostgreSQL reads it
	Primary    bool                `json:"primary,omitempty"` // its PostgreSQL is no standby
}

// ForeignParameter has a value that is not pgha's.
type ForeignParameter struct {
	Name  string `json:"name"`
	Value string `json:"value"`
	Where string `json:"where"`
}

// PostgresSetting is a row of pg_settings.
type PostgresSetting struct {
	Name    string `json:"name"`
	Setting string `json:"setting"` // in Unit
	Shown   string `json:"shown"`   // as SHOW prints it
	Unit    string `json:"unit,omitempty"`
	Context string `json:"context"` // "postmaster" needs a restart
	Source  string `json:"source"`
	File    string `json:"file,omitempty"` // that set it
	Pending bool   `json:"pending,omitempty"`
}

// parameter returns the catalogue's row of a parameter, in any case.
func (s SettingsState) parameter(name string) (PostgresSetting, bool) {
	i := slices.IndexFunc(s.Settings, func(p PostgresSetting) bool { return strings.EqualFold(p.Name, name) })
	if i < 0 {
		return PostgresSetting{}, false
	}
	return s.Settings[i], true
}

// followed notes, after a round without a problem, whose settings were taken.
func (n *Node) followed(w world) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, part := range settingsParts {
		if n.problems[part] != "" {
			return
		}
	}
	if w.Secrets != nil {
		n.taken = w.SettingsRev
	}
}

// settingsState says how far this node has followed the settings. A PostgreSQL
// that does not answer has no catalogue.
func (n *Node) settingsState(ctx context.Context) SettingsState {
	w := n.snapshot()
	cfg := n.patroniConfig(w)
	s := SettingsState{Parameters: cfg.Parameters(), Memory: cfg.MemoryBytes}
	n.mu.Lock()
	s.Rev = n.taken
	for _, part := range settingsParts {
		if text := n.problems[part]; text != "" {
			s.Problems = append(s.Problems, part+": "+text)
		}
	}
	n.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, settingsTimeout)
	defer cancel()
	if err := n.readCatalogue(ctx, &s, cfg); err != nil {
		s.Settings = nil
		s.Problems = append(s.Problems, "postgresql: "+err.Error())
		return s
	}
	s.addShared(w.View.Config, cfg)
	return s
}

func (n *Node) readCatalogue(ctx context.Context, s *SettingsState, cfg patroni.Config) error {
	c, err := n.localPostgres(ctx)
	if err != nil {
		return fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	rows, err := c.Query(ctx, `SELECT name, setting, coalesce(current_setting(name, true), setting), coalesce(unit, ''), context, source, coalesce(sourcefile, ''), pending_restart
		FROM pg_catalog.pg_settings`)
	if err == nil {
		s.Settings, err = pgx.CollectRows(rows, pgx.RowToStructByPos[PostgresSetting])
	}
	if err != nil {
		return fmt.Errorf("read PostgreSQL's settings: %w", err)
	}
	rows, err = c.Query(ctx, `SELECT 'line ' || line_number || ': ' || error FROM pg_catalog.pg_hba_file_rules WHERE error IS NOT NULL`)
	if err == nil {
		s.HBAErrors, err = pgx.CollectRows(rows, pgx.RowTo[string])
	}
	if err != nil {
		return fmt.Errorf("read PostgreSQL's pg_hba.conf: %w", err)
	}
	var loaded time.Time
	if err := c.QueryRow(ctx, "SELECT NOT pg_catalog.pg_is_in_recovery(), pg_catalog.pg_conf_load_time()").Scan(&s.Primary, &loaded); err != nil {
		return fmt.Errorf("ask PostgreSQL for its role: %w", err)
	}
	s.HBALoaded, err = hbaLoaded(filepath.Join(cfg.DataDir, "pg_hba.conf"), patroni.PGHBA(cfg), loaded)
	return err
}

// hbaLoaded says whether the file at path holds the lines, and was loaded since.
func hbaLoaded(path string, lines []string, loaded time.Time) (bool, error) {
	st, err := os.Stat(path)
	if err != nil {
		return false, fmt.Errorf("look at pg_hba.conf: %w", err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return false, fmt.Errorf("read pg_hba.conf: %w", err)
	}
	return bytes.Contains(data, []byte(strings.Join(lines, "\n")+"\n")) && !loaded.Before(st.ModTime().Truncate(time.Microsecond)), nil
}

// addShared adds what Patroni's config key sets, and tells what is not pgha's.
func (s *SettingsState) addShared(config map[string]any, cfg patroni.Config) {
	ours := map[string]bool{}
	for _, p := range s.Parameters {
		ours[strings.ToLower(p.Name)] = true
	}
	values, foreign := patroni.SharedParameters(config, cfg)
	for _, name := range slices.Sorted(maps.Keys(values)) {
		if foreign[name] {
			s.Foreign = append(s.Foreign, ForeignParameter{Name: name, Value: values[name], Where: "Patroni's configuration"})
			ours[strings.ToLower(name)] = true
			continue
		}
		if !ours[strings.ToLower(name)] {
			_, owned := patroni.Owned(name)
			s.Parameters = append(s.Parameters, patroni.Parameter{Name: name, Value: values[name], Origin: patroni.OriginSized, Owned: owned})
			ours[strings.ToLower(name)] = true
		}
	}
	for _, p := range s.Settings {
		if strings.HasSuffix(p.File, "/postgresql.auto.conf") {
			s.Foreign = append(s.Foreign, ForeignParameter{Name: p.Name, Value: p.Shown, Where: "ALTER SYSTEM"})
		} else if strings.HasSuffix(p.File, "/postgresql.base.conf") && !ours[strings.ToLower(p.Name)] {
			s.Foreign = append(s.Foreign, ForeignParameter{Name: p.Name, Value: p.Shown, Where: "postgresql.base.conf"})
		}
	}
}

func (n *Node) settingsStateHandler(w http.ResponseWriter, r *http.Request) {
	reply(w, n.settingsState(r.Context()), nil)
}

// askSettings asks every data node for its state; who does not answer is not in
// the map.
func (n *Node) askSettings(ctx context.Context) map[string]SettingsState {
	out := map[string]SettingsState{}
	for name, a := range askData(ctx, n, http.MethodGet, pathSettingsState, nil, n.settingsState) {
		if a.err == nil {
			out[name] = a.value
		}
	}
	return out
}

// dataAnswer is what a data node answered.
type dataAnswer[T any] struct {
	value T
	err   error
}

// askData asks every data node at once: the others through their APIs, this one
// directly.
func askData[T any](ctx context.Context, n *Node, method, path string, in any, here func(context.Context) T) map[string]dataAnswer[T] {
	type named struct {
		name string
		dataAnswer[T]
	}
	answers := make(chan named)
	asked := 0
	for _, m := range n.snapshot().Members {
		if m.Role != cluster.RoleData {
			continue
		}
		asked++
		go func() {
			a := named{name: m.Name}
			if m.Name == n.cfg.Name {
				a.value = here(ctx)
			} else {
				ctx, cancel := context.WithTimeout(ctx, 2*settingsTimeout)
				defer cancel()
				a.err = n.seen.call(ctx, method, m.APIAddr(), path, in, &a.value)
			}
			answers <- a
		}()
	}
	out := map[string]dataAnswer[T]{}
	for range asked {
		a := <-answers
		out[a.name] = a.dataAnswer
	}
	return out
}
