package main

import (
	"strings"
	"testing"
	"time"

	"pgha/node"
)

func TestFailoverText(t *testing.T) {
	n2 := node.Candidate{Name: "n2", Timeline: 3, LagBytes: 100, Loss: "may lose what n1 acknowledged alone"}
	got := failoverText(node.FailoverPlan{Promotes: n2, Candidates: []node.Candidate{n2, {Name: "n1", LagBytes: -1, Unfit: "its pgha does not answer"}}})
	for _, want := range []string{"n2: timeline 3", "may lose what n1 acknowledged alone", "n1: timeline 0", "its pgha does not answer", "Promote n2 all the same?"} {
		if !strings.Contains(got, want) {
			t.Errorf("it does not say %q: %s", want, got)
		}
	}
}

func TestParseAt(t *testing.T) {
	now := time.Date(2026, 1, 30, 12, 0, 0, 0, time.UTC)
	for s, want := range map[string]time.Time{
		"+2h":                       now.Add(2 * time.Hour),
		"+90s":                      now.Add(90 * time.Second),
		"2026-01-31T03:00:00Z":      now.Add(15 * time.Hour),
		"2026-01-31T03:00:00+01:00": now.Add(14 * time.Hour),
		"2020-01-31T03:00:00Z":      time.Date(2020, 1, 31, 3, 0, 0, 0, time.UTC), // the daemon refuses it
	} {
		if got, err := parseAt(s, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: %s, %v; want %s", s, got, err, want)
		}
	}
	for _, s := range []string{"", "+", "+0s", "+-2h", "-2h", "2h", "tomorrow", "03:00", "2026-01-31", "2026-01-31T03:00:00"} {
		if got, err := parseAt(s, now); err == nil || !strings.Contains(err.Error(), "is no time") {
			t.Errorf("%q was read as %s, %v", s, got, err)
		}
	}
}

func TestOperationArguments(t *testing.T) {
	for line, want := range map[string]string{
		"switchover n1 n2":              "one NODE at most",
		"switchover --cancel n2":        "--cancel takes neither",
		"switchover --at tomorrow":      "is no time",
		"failover --allow-data-loss":    "not running", // it looks before it asks
		"pause n1":                      "takes no argument",
		"maintenance enter n1 n2":       "one NODE at most",
		"maintenance leave n1 --reason": "not defined: -reason",
		"maintenance n1":                "enter, leave",
	} {
		app := newApp()
		err := app.Run(flagsFirst(app, append([]string{"pgha"}, strings.Fields(line)...)))
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("pgha %s: %v, want %q", line, err, want)
		}
	}
}
