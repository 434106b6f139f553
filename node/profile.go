package node

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/gate"
	"pgha/patroni"
)

// raft holds etcd's timers, which it cannot change while it runs, and which must
// be the same on every member: they are the same in every profile. A stall that
// outlasts them costs an election, which every profile's promise outlasts.
var raft = embedded.Profile{Heartbeat: 100 * time.Millisecond, Election: time.Second}

// profileOK says what is wrong with how the timers of a profile stand to each
// other. Nothing may be set to a profile that it refuses.
func profileOK(name string) error {
	if !slices.Contains(cluster.Profiles, name) {
		return fmt.Errorf("profile %q is not known: use one of %s", name, strings.Join(cluster.Profiles, ", "))
	}
	dynamic := patroni.DesiredDynamic(patroni.Config{Profile: name})
	seconds := func(key string) time.Duration {
		n, _ := dynamic[key].(int)
		return time.Duration(n) * time.Second
	}
	err := timersOK(gate.TimersOf(name), raft, seconds("ttl"), seconds("loop_wait"), seconds("retry_timeout"))
	if err != nil {
		return fmt.Errorf("profile %s: %w", name, err)
	}
	return nil
}

// timersOK checks the gate's timers, raft's and Patroni's against each other.
func timersOK(g gate.Timers, r embedded.Profile, ttl, loop, retry time.Duration) error {
	errs := []error{g.Validate()}
	must := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	must(loop > 0 && retry > 0, "Patroni's loop_wait %s and retry_timeout %s must be above 0", loop, retry)
	must(ttl >= loop+2*retry, "Patroni's ttl of %s is below loop_wait %s and twice retry_timeout %s: it would lose its key while it still tries", ttl, loop, retry)
	must(g.Promise < retry, "the gate's promise of %s is not below Patroni's retry_timeout of %s: Patroni would demote a primary whose gate is open", g.Promise, retry)
	must(g.Promise+gate.Margin(g.Promise) < ttl, "the gate's promise of %s is not below Patroni's ttl of %s", g.Promise, ttl)
	must(r.Election < g.Promise, "an election of etcd takes %s, and the gate's promise lasts only %s: a change of etcd's leader would shut it", r.Election, g.Promise)
	return errors.Join(errs...)
}

// ConfigValue is a cluster-wide setting.
type ConfigValue struct {
	Key   string `json:"key"`
	Value string `json:"value"`
	Help  string `json:"help"`
}

// ConfigChange is a request to change a setting.
type ConfigChange struct {
	Key   string `json:"key"`
	Value string `json:"value"`
}

// setting is one that can be changed while the cluster runs.
type setting struct {
	key, help string
	get       func(cluster.Settings) string
	set       func(*cluster.Settings, string) error
}

var settings = []setting{
	{
		key: "profile", help: "timers of the whole cluster: " + strings.Join(cluster.Profiles, ", "),
		get: func(s cluster.Settings) string { return s.Profile },
		set: func(s *cluster.Settings, value string) error {
			s.Profile = value
			return profileOK(value)
		},
	},
}

func badConfig(err error) error {
	return &cluster.Error{Code: cluster.CodeBadRequest, Message: err.Error()}
}

// changeSetting returns s with one setting changed.
func changeSetting(s cluster.Settings, c ConfigChange) (cluster.Settings, error) {
	i := slices.IndexFunc(settings, func(x setting) bool { return x.key == c.Key })
	if i < 0 {
		var keys []string
		for _, x := range settings {
			keys = append(keys, x.key)
		}
		return s, badConfig(fmt.Errorf("there is no setting %q: use one of %s", c.Key, strings.Join(keys, ", ")))
	}
	if err := settings[i].set(&s, c.Value); err != nil {
		return s, badConfig(err)
	}
	return s, nil
}

// config returns the cluster-wide settings as they are stored.
func (n *Node) config(ctx context.Context) ([]ConfigValue, error) {
	store := n.store.Load()
	if store == nil {
		return nil, n.notReady()
	}
	s, _, err := store.Settings(ctx)
	if err != nil {
		return nil, err
	}
	var out []ConfigValue
	for _, x := range settings {
		out = append(out, ConfigValue{Key: x.key, Value: x.get(s), Help: x.help})
	}
	return out, nil
}

// setConfig changes one setting for all nodes, which follow it by themselves. It
// returns when it is stored.
func (n *Node) setConfig(ctx context.Context, c ConfigChange) error {
	store := n.store.Load()
	if store == nil {
		return n.notReady()
	}
	for {
		old, rev, err := store.Settings(ctx)
		if err != nil {
			return err
		}
		next, err := changeSetting(old, c)
		if err != nil {
			return err
		}
		if err = store.PutSettings(ctx, next, rev); err == nil {
			n.log.Info("setting changed", "key", c.Key, "value", c.Value)
			n.wake()
			return nil
		}
		if !errors.Is(err, cluster.ErrConflict) {
			return err
		}
	}
}

func (n *Node) configHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	values, err := n.config(ctx)
	reply(w, values, err)
}

func (n *Node) setConfigHandler(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithTimeout(r.Context(), 10*time.Second)
	defer cancel()
	var c ConfigChange
	err := decode(w, r, &c)
	if err == nil {
		err = n.setConfig(ctx, c)
	}
	reply(w, struct{}{}, err)
}

// Config returns the cluster-wide settings.
func (l *Local) Config(ctx context.Context) ([]ConfigValue, error) {
	var v []ConfigValue
	return v, l.call(ctx, http.MethodGet, "/v1/config", nil, &v)
}

// SetConfig changes a cluster-wide setting.
func (l *Local) SetConfig(ctx context.Context, c ConfigChange) error {
	return l.call(ctx, http.MethodPost, "/v1/config", c, nil)
}
