package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/patroni"
)

const (
	// settingsWait is how long the nodes have for taking changed settings.
	settingsWait = 2 * time.Minute
	// settingsRetries is how often a change is worked out anew because another
	// one came first.
	settingsRetries = 5
)

// ConfigResult is what a change of the settings came to.
type ConfigResult struct {
	ConfigPlan
	Change  int64    `json:"change,omitempty"`  // its number; 0 when nothing was to change
	Taken   []string `json:"taken,omitempty"`   // nodes that have the new settings
	Silent  []string `json:"silent,omitempty"`  // nodes that did not answer: they follow when they are back
	Pending []string `json:"pending,omitempty"` // nodes whose PostgreSQL needs a restart for it
}

// configOperation changes the settings of all nodes and waits until they have
// taken them.
func (n *Node) configOperation(ctx context.Context, o *Operation, req json.RawMessage) (any, error) {
	var r ConfigRequest
	if err := decodeRequest(req, &r); err != nil {
		return nil, err
	}
	p, change, rev, err := n.storeConfig(ctx, o, r)
	if err != nil {
		return nil, err
	}
	result := ConfigResult{ConfigPlan: *p, Change: change.ID}
	if err := n.reassert(ctx, o, r); err != nil {
		return nil, err
	}
	if len(p.Diff) == 0 {
		o.Say("the settings are so already")
		return result, nil
	}
	o.Leaves("change %d is stored, and the nodes follow it by themselves; pgha config rollback %d takes it back", change.ID, change.ID)
	if err := n.awaitConfig(ctx, o, &result, rev); err != nil {
		return nil, err
	}
	if refused := n.refusedRules(ctx, p); refused != "" {
		return nil, n.takeBack(ctx, o, p, change, rev, refused)
	}
	o.Leaves("")
	return result, nil
}

// reassert puts shared parameters that are set to what pgha has already, and were
// changed in Patroni's configuration behind its back, there again.
func (n *Node) reassert(ctx context.Context, o *Operation, r ConfigRequest) error {
	w := n.snapshot()
	cfg := n.patroniConfig(w)
	values, foreign := patroni.SharedParameters(w.View.Config, cfg)
	parameters := map[string]any{}
	for _, c := range r.Changes {
		name := strings.ToLower(strings.TrimPrefix(c.Key, ParameterPrefix))
		if c.Op == ChangeSet && foreign[name] && cfg.Postgres[name] == c.Value {
			o.Say("%s was changed to %s in Patroni's configuration: putting it back to %s", name, values[name], c.Value)
			parameters[name] = c.Value
		}
	}
	if len(parameters) == 0 {
		return nil
	}
	return n.restClient(w, n.cfg.Address, n.cfg.Ports.Patroni).PatchConfig(ctx, map[string]any{"postgresql": map[string]any{"parameters": parameters}})
}

// storeConfig plans and stores a change. A change that came first makes it plan
// anew, unless the request was for the state before that.
func (n *Node) storeConfig(ctx context.Context, o *Operation, r ConfigRequest) (*ConfigPlan, cluster.SettingsChange, int64, error) {
	for try := 1; ; try++ {
		p, err := n.planConfig(ctx, r)
		if err != nil || len(p.Diff) == 0 {
			return p, cluster.SettingsChange{}, 0, err
		}
		what := []string{}
		for _, d := range p.Diff {
			what = append(what, d.String())
		}
		if r.Rollback != 0 {
			what = append(what, fmt.Sprintf("(back to before change %d)", r.Rollback))
		}
		change, rev, err := n.store.Load().ChangeSettings(ctx, p.before, p.next, p.Rev, cluster.SettingsChange{Actor: o.Actor(), What: what})
		if errors.Is(err, cluster.ErrConflict) && try < settingsRetries {
			continue
		}
		if err != nil {
			return nil, change, 0, err
		}
		for _, line := range what {
			o.Say("%s", line)
		}
		for _, w := range p.Warnings {
			o.Say("note: %s", w)
		}
		n.event(EventConfig, "", o.Actor(), "change %d of the settings: %s", change.ID, strings.Join(what, "; "))
		n.wake()
		return p, change, rev, nil
	}
}

// awaitConfig waits until every data node that answers has taken the settings.
func (n *Node) awaitConfig(ctx context.Context, o *Operation, result *ConfigResult, rev int64) error {
	end := time.Now().Add(settingsWait)
	said := ""
	for {
		missing := n.notFollowed(ctx, result, rev)
		if missing == "" {
			o.Say("taken by %s", strings.Join(result.Taken, " and "))
			return nil
		}
		if missing != said {
			said = missing
			o.Say("waiting for %s", missing)
		}
		if !sleep(ctx, 300*time.Millisecond) {
			return context.Cause(ctx)
		}
		if time.Now().After(end) {
			return &cluster.Error{Code: cluster.CodeUnavailable, Message: fmt.Sprintf("not within %s: %s", settingsWait, missing)}
		}
	}
}

// notFollowed says who has not taken the settings yet, and why, or "" when all that
// answer have. It notes in result who has.
func (n *Node) notFollowed(ctx context.Context, result *ConfigResult, rev int64) string {
	states := n.askSettings(ctx)
	var missing []string
	result.Taken, result.Silent, result.Pending = nil, nil, nil
	for _, name := range n.dataNodes() {
		s, ok := states[name]
		if !ok {
			result.Silent = append(result.Silent, name)
			continue
		}
		if why := s.lacks(rev, result.wanted[name]); why != "" {
			missing = append(missing, fmt.Sprintf("%s (%s)", name, why))
			continue
		}
		if row, ok := s.parameter("synchronous_standby_names"); ok && result.next.Async && s.Primary && row.Setting != "" {
			missing = append(missing, fmt.Sprintf("%s (commits still wait for %s)", name, row.Setting))
			continue
		}
		result.Taken = append(result.Taken, name)
		if slices.ContainsFunc(result.Restart, func(p string) bool {
			row, ok := s.parameter(p)
			return ok && row.Setting != result.wanted[name][p]
		}) {
			result.Pending = append(result.Pending, name)
		}
	}
	if why := n.dynamicMissing(); why != "" {
		missing = append(missing, fmt.Sprintf("Patroni's configuration (%s)", why))
	}
	return strings.Join(missing, ", ")
}

// lacks says what a node has not taken yet, or "".
func (s SettingsState) lacks(rev int64, wanted map[string]string) string {
	if s.Rev < rev {
		if len(s.Problems) > 0 {
			return strings.Join(s.Problems, "; ")
		}
		return "it is about to"
	}
	if len(s.Settings) == 0 {
		return "" // its PostgreSQL does not run: it starts with them
	}
	if !s.HBALoaded {
		return "it has not loaded its pg_hba.conf yet"
	}
	for _, name := range slices.Sorted(maps.Keys(wanted)) {
		row, ok := s.parameter(name)
		// What PostgreSQL works out for itself at its start differs for good.
		if ok && row.Setting != wanted[name] && !row.Pending && row.Source != "override" {
			if row.File != "" && strings.HasSuffix(row.File, "/postgresql.auto.conf") {
				return fmt.Sprintf("%s is %s there by ALTER SYSTEM, which goes first: ALTER SYSTEM RESET %s", name, row.Shown, name)
			}
			return fmt.Sprintf("%s is still %s there", name, row.Shown)
		}
	}
	return ""
}

// dynamicMissing says whether Patroni's configuration is not yet as the settings
// want it. The primary's node sees to it.
func (n *Node) dynamicMissing() string {
	w := n.snapshot()
	if !w.Viewed || w.View.Config == nil {
		return "it cannot be read now"
	}
	if len(patroni.DynamicPatch(w.View.Config, n.patroniConfig(w))) > 0 {
		return "the primary's node is about to change it"
	}
	return ""
}

// refusedRules returns what a PostgreSQL says against its pg_hba.conf: it goes on
// with the one before.
func (n *Node) refusedRules(ctx context.Context, p *ConfigPlan) string {
	if !slices.ContainsFunc(p.Diff, func(d ConfigDiff) bool { return d.Key == "hba" || d.Key == "clients" }) {
		return ""
	}
	states := n.askSettings(ctx)
	for _, name := range slices.Sorted(maps.Keys(states)) {
		if errs := states[name].HBAErrors; len(errs) > 0 {
			return fmt.Sprintf("%s refuses pg_hba.conf: %s", name, strings.Join(errs, "; "))
		}
	}
	return ""
}

// takeBack undoes a change that a PostgreSQL refused after all, unless somebody
// else has changed the settings meanwhile.
func (n *Node) takeBack(ctx context.Context, o *Operation, p *ConfigPlan, c cluster.SettingsChange, rev int64, why string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	after := p.next
	after.Change = c.ID
	undo, _, err := n.store.Load().ChangeSettings(ctx, after, p.before, rev, cluster.SettingsChange{
		Actor: actorPgha, What: []string{fmt.Sprintf("(back to before change %d: %s)", c.ID, why)},
	})
	if err != nil {
		return fmt.Errorf("%s; it could not be taken back: %w", why, err)
	}
	n.event(EventConfig, "", actorPgha, "change %d of the settings takes change %d back: %s", undo.ID, c.ID, why)
	n.wake()
	o.Leaves("the settings are as before (change %d took change %d back)", undo.ID, c.ID)
	return &cluster.Error{Code: cluster.CodeBadRequest, Message: why}
}

// ConfigHistory is what has been changed, and what the settings are now.
type ConfigHistory struct {
	Now     cluster.Settings         `json:"now"`
	Changes []cluster.SettingsChange `json:"changes"` // the oldest first
}

func (n *Node) configHistoryHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	h, err := func() (h ConfigHistory, err error) {
		store := n.store.Load()
		if store == nil {
			return h, n.notReady()
		}
		if h.Now, _, err = store.Settings(ctx); err != nil {
			return h, err
		}
		h.Changes, err = store.SettingsHistory(ctx)
		return h, err
	}()
	reply(w, h, err)
}

// ConfigHistory returns the changes of the settings that are kept.
func (l *Local) ConfigHistory(ctx context.Context) (ConfigHistory, error) {
	var h ConfigHistory
	return h, l.call(ctx, http.MethodGet, "/v1/config/history", nil, &h)
}
