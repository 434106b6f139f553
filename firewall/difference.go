package firewall

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// difference compares the kernel's table with the ruleset and gives the first
// difference in words, or "" where they are equal.
func difference(conn *nftables.Conn, want Ruleset) (string, error) {
	const attempts = 5
	var diff string
	for range attempts {
		before, err := conn.GetGen()
		if err != nil {
			return "", fmt.Errorf("read generation: %w", err)
		}
		if diff, err = compare(conn, want); err != nil {
			return "", err
		}
		if diff == "" {
			return "", nil
		}
		after, err := conn.GetGen()
		if err != nil {
			return "", fmt.Errorf("read generation: %w", err)
		}
		// The table is read in several steps. A difference counts only if nobody
		// has changed any table in between.
		if before.ID == after.ID {
			break
		}
	}
	return diff, nil
}

func compare(conn *nftables.Conn, want Ruleset) (string, error) {
	tables, err := conn.ListTablesOfFamily(table.Family)
	if err != nil {
		return "", fmt.Errorf("list tables: %w", err)
	}
	i := slices.IndexFunc(tables, func(t *nftables.Table) bool { return t.Name == table.Name })
	switch {
	case i < 0 && want.Off():
		return "", nil
	case i < 0:
		return "the table is not there", nil
	case want.Off():
		return "the table is there", nil
	case tables[i].Flags&nftables.TableFlagDormant != 0:
		return "the table is dormant", nil
	}
	for _, part := range []func(*nftables.Conn, Ruleset) (string, error){compareChain, compareRules, compareSets, compareCounters} {
		diff, err := part(conn, want)
		if errors.Is(err, unix.ENOENT) {
			return "the table has just changed", nil
		}
		if diff != "" || err != nil {
			return diff, err
		}
	}
	return "", nil
}

func compareChain(conn *nftables.Conn, _ Ruleset) (string, error) {
	chains, err := conn.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return "", fmt.Errorf("list chains: %w", err)
	}
	chains = slices.DeleteFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name != table.Name })
	if len(chains) != 1 {
		return fmt.Sprintf("%d chains instead of 1", len(chains)), nil
	}
	c := chains[0]
	if c.Name != chainName || c.Type != nftables.ChainTypeFilter ||
		c.Hooknum == nil || *c.Hooknum != *nftables.ChainHookInput ||
		c.Priority == nil || *c.Priority != chainPriority ||
		c.Policy == nil || *c.Policy != nftables.ChainPolicyAccept {
		return fmt.Sprintf("chain %s has another type, hook, priority or policy", c.Name), nil
	}
	return "", nil
}

func compareRules(conn *nftables.Conn, want Ruleset) (string, error) {
	rules, err := conn.GetRules(table, &nftables.Chain{Table: table, Name: chainName})
	if err != nil {
		return "", fmt.Errorf("list rules: %w", err)
	}
	if len(rules) != len(want.Rules) {
		return fmt.Sprintf("%d rules instead of %d", len(rules), len(want.Rules)), nil
	}
	for i, rule := range rules {
		if !slices.EqualFunc(rule.Exprs, want.Rules[i].exprs, sameExpr) {
			return fmt.Sprintf("rule %d is not %q", i+1, want.Rules[i].Text), nil
		}
	}
	return "", nil
}

func sameExpr(have, want expr.Any) bool {
	if l, ok := have.(*expr.Lookup); ok {
		// The kernel's number of the set, unknown when the rule was compiled.
		l.SetID = 0
	}
	return reflect.DeepEqual(have, want)
}

func compareSets(conn *nftables.Conn, want Ruleset) (string, error) {
	sets, err := conn.GetSets(table)
	if err != nil {
		return "", fmt.Errorf("list sets: %w", err)
	}
	if len(sets) != len(want.Sets) {
		return fmt.Sprintf("%d sets instead of %d", len(sets), len(want.Sets)), nil
	}
	for _, w := range want.Sets {
		i := slices.IndexFunc(sets, func(s *nftables.Set) bool { return s.Name == w.Name })
		if i < 0 {
			return fmt.Sprintf("set %s is not there", w.Name), nil
		}
		if sets[i].KeyType.Name != w.Type || sets[i].Interval != w.Interval {
			return fmt.Sprintf("set %s has another type", w.Name), nil
		}
		have, err := conn.GetSetElements(sets[i])
		if err != nil {
			return "", fmt.Errorf("list elements of set %s: %w", w.Name, err)
		}
		if len(have) != len(w.encoded) {
			return fmt.Sprintf("set %s has %d elements instead of %d", w.Name, len(have), len(w.encoded)), nil
		}
		if !slices.EqualFunc(sorted(have), sorted(w.encoded), func(a, b nftables.SetElement) bool { return order(a, b) == 0 }) {
			return fmt.Sprintf("set %s has other elements", w.Name), nil
		}
	}
	return "", nil
}

func sorted(elements []nftables.SetElement) []nftables.SetElement {
	return slices.SortedFunc(slices.Values(elements), order)
}

func order(a, b nftables.SetElement) int {
	end := func(e nftables.SetElement) int {
		if e.IntervalEnd {
			return 0
		}
		return 1
	}
	return cmp.Or(bytes.Compare(a.Key, b.Key), end(a)-end(b))
}

func compareCounters(conn *nftables.Conn, want Ruleset) (string, error) {
	objects, err := conn.GetNamedObjects(table)
	if err != nil {
		return "", fmt.Errorf("list counters: %w", err)
	}
	var have []string
	for _, o := range objects {
		if named, ok := o.(*nftables.NamedObj); ok && named.Type == nftables.ObjTypeCounter {
			have = append(have, named.Name)
		}
	}
	slices.Sort(have)
	if !slices.Equal(have, slices.Sorted(slices.Values(want.Counters))) {
		return fmt.Sprintf("counters %v instead of %v", have, want.Counters), nil
	}
	return "", nil
}
