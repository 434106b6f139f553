package patroni

import (
	"fmt"
	"strconv"
)

// sharedKey is where, in Patroni's config key, pgha notes what it has set: Patroni
// ignores keys that it does not know.
const sharedKey = "pgha"

// sharedPatch returns what to change in the config key so that the shared
// parameters are as the operator wants them: {"postgresql": parameters, "pgha":
// notes}, empty when nothing is to do. Only what the operator has asked pgha for
// is touched, and only when that changes. A value that somebody else put there
// afterwards stays (Foreign tells it), and what was there before comes back when
// the operator takes his own away.
func sharedPatch(current map[string]any, want map[string]string) map[string]any {
	parameters, notes := map[string]any{}, map[string]any{}
	have, noted := currentParameters(current), currentNotes(current)
	for name, value := range want {
		if !IsShared(name) {
			continue
		}
		note, ok := noted[name]
		if ok && note.set == value {
			continue
		}
		if !ok {
			note.was = have[name] // nil when absent
		}
		parameters[name] = value
		entry := map[string]any{"set": value}
		if note.was != nil {
			entry["was"] = note.was
		}
		notes[name] = entry
	}
	for name, note := range noted {
		if _, ok := want[name]; ok {
			continue
		}
		notes[name] = nil
		if plain(have[name]) == note.set {
			parameters[name] = note.was
		}
	}
	if len(notes) == 0 {
		return nil
	}
	patch := map[string]any{sharedKey: map[string]any{"parameters": notes}}
	if len(parameters) > 0 {
		patch["postgresql"] = map[string]any{"parameters": parameters}
	}
	return patch
}

// Patched returns config, the config key's value, as DynamicPatch will leave it.
// config is not changed.
func Patched(config map[string]any, c Config) map[string]any {
	out := deepCopy(config)
	apply(out, DynamicPatch(config, c))
	return out
}

func deepCopy(m map[string]any) map[string]any {
	out := make(map[string]any, len(m))
	for k, v := range m {
		if sub, ok := v.(map[string]any); ok {
			v = deepCopy(sub)
		}
		out[k] = v
	}
	return out
}

// apply changes m as Patroni does on a patch: nil takes a key away.
func apply(m, patch map[string]any) {
	for k, v := range patch {
		if v == nil {
			delete(m, k)
			continue
		}
		sub, ok := v.(map[string]any)
		have, both := m[k].(map[string]any)
		if ok && both {
			apply(have, sub)
			continue
		}
		m[k] = v
	}
}

// plain is a value of the config key as text; numbers may come as JSON's.
func plain(v any) string {
	if f, ok := v.(float64); ok {
		return strconv.FormatFloat(f, 'f', -1, 64)
	}
	return fmt.Sprint(v)
}

type sharedNote struct {
	set string // what pgha put there
	was any    // what was there before; nil when nothing
}

func currentParameters(config map[string]any) map[string]any {
	pg, _ := config["postgresql"].(map[string]any)
	p, _ := pg["parameters"].(map[string]any)
	return p
}

func currentNotes(config map[string]any) map[string]sharedNote {
	own, _ := config[sharedKey].(map[string]any)
	p, _ := own["parameters"].(map[string]any)
	out := map[string]sharedNote{}
	for name, v := range p {
		if m, ok := v.(map[string]any); ok {
			out[name] = sharedNote{set: plain(m["set"]), was: m["was"]}
		}
	}
	return out
}

// SharedParameters returns the parameters in Patroni's config key that reach
// PostgreSQL: the shared ones, and of the others those that no node's own file
// has. foreign are those which somebody put there behind pgha's back, or which
// were sized to a host that differs from this one.
func SharedParameters(config map[string]any, c Config) (values map[string]string, foreign map[string]bool) {
	values, foreign = map[string]string{}, map[string]bool{}
	local, noted, sized := c.parameters(), currentNotes(config), c.sharedSizing()
	for name, v := range currentParameters(config) {
		if _, ok := local[name]; ok {
			continue
		}
		values[name] = plain(v)
		note, ok := noted[name]
		foreign[name] = ok && note.set != values[name] || !ok && plain(sized[name]) != values[name]
	}
	return values, foreign
}
