package kernel

import (
	"bytes"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// seen is what one look at the kernel found.
type seen struct {
	table    *nftables.Table // nil where there is none
	chains   []*nftables.Chain
	rules    map[string][][]expr.Any
	sets     []*nftables.Set
	elements map[string][]nftables.SetElement
	counters map[string]Counter
	wall     int64 // the wall clock at the look's end, as the guard compares it
}

// state reads the table. diff tells in words what is wrong with it, "" if
// nothing is; then alone does the state say anything.
func (l *link) state(port uint16) (s State, diff string, err error) {
	saw, err := l.look()
	if err != nil {
		return State{}, "", fmt.Errorf("read table: %w", err)
	}
	s, diff = judge(saw, port)
	return s, diff, nil
}

// look reads the table in several steps, again if anybody changed any table in
// between: what it found was all there at one moment.
func (l *link) look() (seen, error) {
	const attempts = 20
	for range attempts {
		before, err := l.nft.GetGen()
		if err != nil {
			return seen{}, fmt.Errorf("read generation: %w", err)
		}
		saw, lookErr := l.lookOnce()
		after, err := l.nft.GetGen()
		if err != nil {
			return seen{}, errors.Join(lookErr, fmt.Errorf("read generation: %w", err))
		}
		if before.ID == after.ID {
			return saw, lookErr
		}
	}
	return seen{}, errors.New("the ruleset does not stop changing")
}

func (l *link) lookOnce() (saw seen, err error) {
	tables, err := l.nft.ListTablesOfFamily(table.Family)
	if err != nil {
		return seen{}, fmt.Errorf("list tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == table.Name })
	if i < 0 {
		return seen{}, nil
	}
	saw.table = tables[i]
	chains, err := l.nft.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return seen{}, fmt.Errorf("list chains: %w", err)
	}
	saw.chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != table.Name })
	if saw.rules, err = l.rules(); err != nil {
		return seen{}, fmt.Errorf("list rules: %w", err)
	}
	if saw.sets, err = l.nft.GetSets(table); err != nil {
		return seen{}, fmt.Errorf("list sets: %w", err)
	}
	saw.elements = map[string][]nftables.SetElement{}
	for _, s := range saw.sets {
		if saw.elements[s.Name], err = l.nft.GetSetElements(s); err != nil {
			return seen{}, fmt.Errorf("list elements of set %s: %w", s.Name, err)
		}
	}
	objects, err := l.nft.GetNamedObjects(table)
	if err != nil {
		return seen{}, fmt.Errorf("list counters: %w", err)
	}
	saw.counters = map[string]Counter{}
	for _, o := range objects {
		if named, ok := o.(*nftables.NamedObj); ok {
			if c, ok := named.Obj.(*expr.Counter); ok {
				saw.counters[named.Name] = Counter{Packets: c.Packets, Bytes: c.Bytes}
			}
		}
	}
	saw.wall = time.Now().UnixNano()
	return saw, nil
}

// judge says whether what was seen is the gate of the port, and in which state.
// diff is the first difference found, "" for none; then s.Installed holds.
func judge(saw seen, port uint16) (s State, diff string) {
	switch {
	case saw.table == nil:
		return State{}, "the table is not there"
	case saw.table.Flags&nftables.TableFlagDormant != 0:
		return State{}, "the table is dormant"
	}
	wall, diff := judgeChains(saw, port)
	if diff == "" {
		diff = judgeSets(saw, port)
	}
	if diff != "" {
		return State{}, diff
	}
	for _, name := range counterNames {
		if _, ok := saw.counters[name]; !ok {
			return State{}, fmt.Sprintf("counter %s is not there", name)
		}
	}
	s = State{
		Installed: true,
		Moved:     len(saw.elements[setMoved]) > 0,
		Dropped:   saw.counters[counterDropped],
		Reset:     saw.counters[counterReset],
	}
	for _, role := range []Role{Owner, Replica} {
		for _, e := range saw.elements[string(role)] {
			s.Role = role
			s.Remaining = max(0, min(e.Expires, time.Duration(wall-saw.wall)))
		}
	}
	s.Open = s.Remaining > 0
	return s, ""
}

// judgeChains gives the guard's time as well.
func judgeChains(saw seen, port uint16) (wall int64, diff string) {
	want := layout(port)
	if len(saw.chains) != len(want) {
		return 0, fmt.Sprintf("%d chains instead of %d", len(saw.chains), len(want))
	}
	for _, w := range want {
		i := slices.IndexFunc(saw.chains, func(c *nftables.Chain) bool { return c.Name == w.name })
		if i < 0 {
			return 0, fmt.Sprintf("chain %s is not there", w.name)
		}
		if !rightHook(saw.chains[i], w.hook) {
			return 0, fmt.Sprintf("chain %s has another type, hook, priority or policy", w.name)
		}
		rules := saw.rules[w.name]
		if len(rules) != len(w.rules) {
			return 0, fmt.Sprintf("chain %s has %d rules instead of %d", w.name, len(rules), len(w.rules))
		}
		for j, exprs := range rules {
			right := sameRule(exprs, w.rules[j])
			if w.name == chainGuard {
				wall, right = guardTime(exprs)
			}
			if !right {
				return 0, fmt.Sprintf("rule %d of chain %s is another", j+1, w.name)
			}
		}
	}
	return wall, ""
}

func rightHook(c *nftables.Chain, want *nftables.ChainHook) bool {
	if want == nil {
		return c.Hooknum == nil
	}
	return c.Type == nftables.ChainTypeFilter &&
		c.Hooknum != nil && *c.Hooknum == *want &&
		c.Priority != nil && *c.Priority == chainPriority &&
		c.Policy != nil && *c.Policy == nftables.ChainPolicyAccept
}

func sameRule(have, want []expr.Any) bool {
	return slices.EqualFunc(have, want, func(a, b expr.Any) bool { return reflect.DeepEqual(a, b) })
}

func judgeSets(saw seen, port uint16) (diff string) {
	if len(saw.sets) != len(setNames) {
		return fmt.Sprintf("%d sets instead of %d", len(saw.sets), len(setNames))
	}
	for _, name := range setNames {
		i := slices.IndexFunc(saw.sets, func(s *nftables.Set) bool { return s.Name == name })
		if i < 0 {
			return fmt.Sprintf("set %s is not there", name)
		}
		if s := saw.sets[i]; s.KeyType.Name != nftables.TypeInetService.Name || !s.HasTimeout || s.Timeout != 0 || s.Interval || s.IsMap {
			return fmt.Sprintf("set %s has another type", name)
		}
		for _, e := range saw.elements[name] {
			switch {
			case !bytes.Equal(e.Key, binaryutil.BigEndian.PutUint16(port)):
				return fmt.Sprintf("set %s has another port", name)
			case name != setMoved && e.Timeout == 0:
				return fmt.Sprintf("the port in set %s has no timeout", name)
			}
		}
	}
	if len(saw.elements[setOwner]) > 0 && len(saw.elements[setReplica]) > 0 {
		return "both roles have the port"
	}
	return ""
}
