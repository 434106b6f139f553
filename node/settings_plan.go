package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/patroni"
)

// ConfigRequest asks for a change of the settings: by Changes, by a Document of
// all settings, or by going back to before change Rollback; one of the three.
type ConfigRequest struct {
	Node     string         `json:"node,omitempty"` // whose settings Changes are about; "" = the cluster's
	Changes  []ConfigChange `json:"changes,omitempty"`
	Document string         `json:"document,omitempty"` // YAML, as ConfigDocument gives it
	Rollback int64          `json:"rollback,omitempty"`
	// Rev, unless 0, is the revision that the request was made for: it is refused
	// when the settings have changed since.
	Rev int64 `json:"rev,omitempty"`
}

// ConfigPlan is what a request would change.
type ConfigPlan struct {
	Rev      int64        `json:"rev"` // of the settings that it is for
	Diff     []ConfigDiff `json:"diff"`
	Warnings []string     `json:"warnings,omitempty"`
	Restart  []string     `json:"restart,omitempty"` // parameters that need a restart of PostgreSQL
	On       []string     `json:"on,omitempty"`      // nodes on which

	before, next cluster.Settings
	wanted       map[string]map[string]string // by node: parameters as pg_settings will show them
	contexts     map[string]string            // by parameter in lower case
}

// planConfig works out what a request changes, and has everything checked by
// whom it concerns.
func (n *Node) planConfig(ctx context.Context, req ConfigRequest) (*ConfigPlan, error) {
	store := n.store.Load()
	if store == nil {
		return nil, n.notReady()
	}
	before, rev, err := store.Settings(ctx)
	if err != nil {
		return nil, err
	}
	if req.Rev != 0 && req.Rev != rev {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("somebody else has changed the settings meanwhile (change %d): look at pgha config history and try again", before.Change)}
	}
	p := &ConfigPlan{Rev: rev, before: before}
	if p.next, err = n.requested(ctx, store, before, req); err != nil {
		return nil, err
	}
	p.next.Change = before.Change
	if err := p.next.Validate(); err != nil {
		return nil, badConfig(err)
	}
	p.Diff = DiffSettings(before, p.next)
	if err := n.checkNodes(p); err != nil {
		return nil, badConfig(err)
	}
	if len(p.Diff) == 0 {
		return p, nil
	}
	return p, n.checkParameters(ctx, p)
}

// requested are the settings that a request asks for.
func (n *Node) requested(ctx context.Context, store *cluster.Store, now cluster.Settings, req ConfigRequest) (cluster.Settings, error) {
	switch {
	case req.Document != "":
		return parseDocument(now, req.Document)
	case req.Rollback != 0:
		history, err := store.SettingsHistory(ctx)
		if err != nil {
			return now, err
		}
		c, err := findChange(history, req.Rollback)
		return c.Before, err
	case len(req.Changes) == 0:
		return now, badConfig(errors.New("the request names no setting"))
	}
	return changeSettings(now, req.Node, req.Changes)
}

// findChange returns a change by its number.
func findChange(history []cluster.SettingsChange, id int64) (cluster.SettingsChange, error) {
	for _, c := range history {
		if c.ID == id {
			return c, nil
		}
	}
	kept := "there was none yet"
	if len(history) > 0 {
		kept = fmt.Sprintf("changes %d to %d are kept", history[0].ID, history[len(history)-1].ID)
	}
	return cluster.SettingsChange{}, badConfig(fmt.Errorf("there is no change %d: %s", id, kept))
}

// checkNodes refuses settings for a node that the cluster has not.
func (n *Node) checkNodes(p *ConfigPlan) error {
	data := n.dataNodes()
	for _, d := range p.Diff {
		if d.Node != "" && d.New != "" && !slices.Contains(data, d.Node) {
			return fmt.Errorf("there is no data node %q: use one of %s", d.Node, strings.Join(data, ", "))
		}
	}
	return nil
}

// changedParameters are the names of the parameters that a plan changes; what
// pgha sizes to memory or moves with the profile is checked with them.
func (p *ConfigPlan) changedParameters() []string {
	var out []string
	for _, d := range p.Diff {
		name, ok := strings.CutPrefix(d.Key, ParameterPrefix)
		if ok && !slices.Contains(out, name) {
			out = append(out, name)
		}
	}
	return out
}

// checkParameters has every data node that answers try the new settings, and
// tells which need a restart where. There must be one at least: nothing that
// PostgreSQL has not seen is stored.
func (n *Node) checkParameters(ctx context.Context, p *ConfigPlan) error {
	states := n.askSettings(ctx)
	names := p.changedParameters()
	if err := p.useCatalogue(names, states); err != nil {
		return badConfig(err)
	}
	names = p.changedParameters() // by PostgreSQL's own spelling now
	trial := SettingsTrial{Settings: p.next, Names: names}
	answers := askData(ctx, n, http.MethodPost, pathSettingsTry, trial, func(ctx context.Context) SettingsVerdict { return n.trySettings(ctx, trial) })
	p.wanted = map[string]map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(answers)) {
		a := answers[name]
		if a.err != nil {
			p.Warnings = append(p.Warnings, fmt.Sprintf("%s does not answer: nothing was tried there, and it follows when it is back", name))
			continue
		}
		if a.value.Refusal != "" {
			return badConfig(fmt.Errorf("%s refuses: %s", name, p.hint(a.value.Refusal, states)))
		}
		p.wanted[name] = a.value.Values
		for _, parameter := range names {
			value, isSet := p.next.Postgres[parameter]
			if isSet {
				if err := patroni.CheckShared(parameter, value, a.value.Values[parameter]); err != nil {
					return badConfig(err)
				}
			}
		}
	}
	if len(p.wanted) == 0 {
		return &cluster.Error{Code: cluster.CodeUnavailable, Message: "no data node could try the settings: see pgha status"}
	}
	p.tellRestarts(names, states)
	return nil
}

// useCatalogue refuses parameters that PostgreSQL does not know, and takes its
// spelling for those that it does.
func (p *ConfigPlan) useCatalogue(names []string, states map[string]SettingsState) error {
	p.contexts = map[string]string{}
	for _, name := range names {
		var found PostgresSetting
		asked, ok := false, false
		for _, node := range slices.Sorted(maps.Keys(states)) {
			s := states[node]
			asked = asked || len(s.Settings) > 0
			row, has := s.parameter(name)
			if has && (!ok || s.Primary) {
				found, ok = row, true
			}
		}
		switch {
		case !asked:
			return &cluster.Error{Code: cluster.CodeUnavailable, Message: "no PostgreSQL answers to be asked about " + name + ": see pgha status"}
		case ok && found.Context == "internal":
			return fmt.Errorf("%s cannot be set: it tells how PostgreSQL was built or made", found.Name)
		case ok:
			p.contexts[strings.ToLower(name)] = found.Context
			p.rename(name, found.Name)
		case strings.Contains(name, "."):
			p.Warnings = append(p.Warnings, fmt.Sprintf("PostgreSQL does not know %s now: it counts once the extension is loaded", name))
		case !p.isSet(name): // taken away, whatever it was
		default:
			return unknownParameter(name, states)
		}
	}
	p.Diff = DiffSettings(p.before, p.next)
	return nil
}

func (p *ConfigPlan) isSet(name string) bool {
	if _, ok := p.next.Postgres[name]; ok {
		return true
	}
	for _, s := range p.next.Nodes {
		if _, ok := s.Postgres[name]; ok {
			return true
		}
	}
	return false
}

// rename gives a parameter the name that PostgreSQL uses.
func (p *ConfigPlan) rename(from, to string) {
	if from == to {
		return
	}
	move := func(m map[string]string) {
		if v, ok := m[from]; ok {
			delete(m, from)
			m[to] = v
		}
	}
	move(p.next.Postgres)
	for _, s := range p.next.Nodes {
		move(s.Postgres)
	}
}

func unknownParameter(name string, states map[string]SettingsState) error {
	var names []string
	for _, s := range states {
		for _, row := range s.Settings {
			names = append(names, row.Name)
		}
	}
	slices.Sort(names)
	if near := nearest(name, names); near != "" {
		return fmt.Errorf("PostgreSQL has no parameter %q: did you mean %s%s", name, ParameterPrefix, near)
	}
	return fmt.Errorf("PostgreSQL has no parameter %q: SELECT name FROM pg_settings lists them", name)
}

// hint adds the unit to PostgreSQL's complaint about a range, which is in it.
func (p *ConfigPlan) hint(text string, states map[string]SettingsState) string {
	if !strings.Contains(text, "outside the valid range") {
		return text
	}
	for _, s := range states {
		for _, row := range s.Settings {
			if row.Unit != "" && strings.Contains(text, strconv.Quote(row.Name)) {
				return text + ", in units of " + row.Unit
			}
		}
	}
	return text
}

// tellRestarts says which parameters need a restart on which nodes, and what to
// know about it.
func (p *ConfigPlan) tellRestarts(names []string, states map[string]SettingsState) {
	on := map[string]bool{}
	for _, name := range names {
		if p.contexts[strings.ToLower(name)] != "postmaster" {
			continue
		}
		needed := false
		for node, wanted := range p.wanted {
			row, known := states[node].parameter(name)
			if want, ok := wanted[name]; !ok || known && row.Setting == want {
				continue
			} else if have, err := strconv.Atoi(row.Setting); err == nil && patroni.MustNotShrink(name) {
				if lower, err := strconv.Atoi(want); err == nil && lower < have && !slices.Contains(p.Warnings, lowered(name)) {
					p.Warnings = append(p.Warnings, lowered(name))
				}
			}
			needed, on[node] = true, true
		}
		if needed {
			p.Restart = append(p.Restart, name)
		}
	}
	p.On = slices.Sorted(maps.Keys(on))
}

func lowered(name string) string {
	return fmt.Sprintf("%s becomes smaller: a replica keeps the larger value until the primary has been restarted with the smaller one", name)
}

func (n *Node) configPlanHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 30*time.Second)
	defer cancel()
	var req ConfigRequest
	err := decode(w, r, &req)
	if err == nil {
		err = n.notOnWitness("has no PostgreSQL to ask")
	}
	var p *ConfigPlan
	if err == nil {
		p, err = n.planConfig(ctx, req)
	}
	reply(w, p, err)
}

// PlanConfig says what a request would change, and changes nothing.
func (l *Local) PlanConfig(ctx context.Context, req ConfigRequest) (ConfigPlan, error) {
	var p ConfigPlan
	return p, l.call(ctx, http.MethodPost, "/v1/config/plan", req, &p)
}
