package node

import (
	"errors"
	"fmt"
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
