package cluster

import (
	"errors"
	"fmt"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestSettingsHistory(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	if h, err := f.store.SettingsHistory(ctx); err != nil || len(h) != 0 {
		t.Fatalf("a new cluster has a history: %v, %v", h, err)
	}
	now, rev, err := f.store.Settings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	first := now
	next := now
	next.Postgres = map[string]string{"work_mem": "8MB"}
	c, newRev, err := f.store.ChangeSettings(ctx, now, next, rev, SettingsChange{Actor: "root@n1", What: []string{"work_mem"}})
	if err != nil || c.ID != 1 || c.Actor != "root@n1" || c.At.IsZero() || newRev <= rev {
		t.Fatalf("%+v at %d, %v", c, newRev, err)
	}
	// The loser of a race changes nothing, and leaves no trace.
	if _, _, err := f.store.ChangeSettings(ctx, now, Settings{Profile: "wide"}, rev, SettingsChange{}); !errors.Is(err, ErrConflict) {
		t.Errorf("a change of what has changed: %v", err)
	}
	if _, _, err := f.store.ChangeSettings(ctx, now, Settings{Profile: "none"}, newRev, SettingsChange{}); err == nil {
		t.Error("settings that make no sense were stored")
	}
	if _, _, err := f.store.ChangeSettings(ctx, now, next, 0, SettingsChange{}); err == nil {
		t.Error("settings that were not read were changed")
	}
	got, rev, err := f.store.Settings(ctx)
	next.Change = 1
	if err != nil || rev != newRev || !cmp.Equal(next, got, cmpOpts) {
		t.Errorf("at %d, want %d (%v):\n%s", rev, newRev, err, cmp.Diff(next, got, cmpOpts))
	}
	for i := 2; i <= HistoryKept+5; i++ {
		now, rev, err := f.store.Settings(ctx)
		if err != nil {
			t.Fatal(err)
		}
		next := now
		next.Postgres = map[string]string{"work_mem": fmt.Sprint(i)}
		if _, _, err := f.store.ChangeSettings(ctx, now, next, rev, SettingsChange{}); err != nil {
			t.Fatal(err)
		}
		if i == 2 {
			h, err := f.store.SettingsHistory(ctx)
			if err != nil || len(h) != 2 || !cmp.Equal(h[0].Before, first, cmpOpts) {
				t.Fatalf("%+v, %v", h, err)
			}
		}
	}
	h, err := f.store.SettingsHistory(ctx)
	if err != nil || len(h) != HistoryKept || h[0].ID != 6 || h[len(h)-1].ID != HistoryKept+5 {
		t.Errorf("%d changes are kept, from %+v on (%v)", len(h), h[0], err)
	}
}

func TestSettingsValidateParameters(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*Settings)
		ok     bool
	}{
		"parameters": {func(s *Settings) {
			s.Postgres = map[string]string{"auto_explain.log_analyze": "on", "DateStyle": "ISO, DMY"}
		}, true},
		"a node's": {func(s *Settings) {
			s.Nodes = map[string]NodeSettings{"n1": {Memory: "4GB", Postgres: map[string]string{"work_mem": "1MB"}}}
		}, true},
		"no name":            {func(s *Settings) { s.Postgres = map[string]string{"": "1"} }, false},
		"a name of two":      {func(s *Settings) { s.Postgres = map[string]string{"a b": "1"} }, false},
		"a line break":       {func(s *Settings) { s.Postgres = map[string]string{"a": "1\nport = 2"} }, false},
		"a rule's break":     {func(s *Settings) { s.HBA = []string{"hostssl a b all cert\nhost all all all trust"} }, false},
		"no node's name":     {func(s *Settings) { s.Nodes = map[string]NodeSettings{"N 1": {}} }, false},
		"a node's parameter": {func(s *Settings) { s.Nodes = map[string]NodeSettings{"n1": {Postgres: map[string]string{"a'": "1"}}} }, false},
	} {
		s := Settings{Profile: "fast"}
		c.change(&s)
		if err := s.Validate(); (err == nil) != c.ok {
			t.Errorf("%s: %v", name, err)
		}
	}
}
