//go:build !race

package gate

import (
	"os"
	"runtime/debug"
	"strings"
	"testing"
	"time"
)

// ruleNames names the rules that can be taken out.
var ruleNames = map[guards]string{
	guardLeader: "leader", guardRecord: "record", guardLease: "lease", guardSync: "sync", guardSend: "send",
	guardMargin: "margin", guardAdmission: "admission", guardQuorum: "quorum", guardPause: "pause", guardOutput: "output",
	guardShutFirst: "shut first", guardOutstanding: "outstanding", guardOath: "oath", guardAsk: "ask", guardPermit: "permit",
}

// TestMutations takes out one rule at a time: the simulation must miss it.
// PGHA_BUDGET sets after how many schedules it counts as not missed, PGHA_ONLY
// the rules by name.
func TestMutations(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(800))
	budget := number(t, "PGHA_BUDGET", mutationSchedules)
	for g := guards(1); g < lastGuard; g <<= 1 {
		name := ruleNames[g]
		if name == "" {
			t.Errorf("rule %d has no name here", g)
		}
		if only := os.Getenv("PGHA_ONLY"); only != "" && !strings.Contains(only, name) {
			continue
		}
		begun := time.Now()
		c, bad := explore(1, budget, g)
		took := time.Since(begun).Round(100 * time.Millisecond)
		if bad == nil {
			t.Errorf("without the rule %q nothing breaks in %d schedules (%s)", name, c.schedules, took)
			continue
		}
		t.Logf("without the rule %-12q seed %6d breaks %s (%s)", name, bad.seed, bad.what, took)
	}
}
