package day2

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"

	"pgha/lab/testbed"
	"pgha/node"
)

// story returns all events as host shows them.
func (r *rig) story(t *testing.T, host string) []node.Event {
	t.Helper()
	var out []node.Event
	for line := range strings.Lines(r.do(t, host, "events", "--lines", "0", "--json")) {
		var e node.Event
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			t.Fatal(err)
		}
		out = append(out, e)
	}
	return out
}

// told waits until host shows an event about subject that holds text.
func (r *rig) told(t *testing.T, host string, kind node.EventKind, subject, text string) {
	t.Helper()
	err := testbed.Until(within(t, wait), "an event of kind "+string(kind)+" about "+subject+" with "+text, func() error {
		for _, e := range r.story(t, host) {
			if e.Kind == kind && e.Subject == subject && strings.Contains(e.Text, text) {
				return nil
			}
		}
		return errNotTold
	})
	if err != nil {
		t.Fatal(err)
	}
}

var errNotTold = errors.New("it is not told")

// TestEvents loses the primary's host. Every node that is left, and the one that
// comes back, must tell the same story.
func TestEvents(t *testing.T) {
	r := three(t)
	r.step(t, "the primary's host is lost", func(t *testing.T, w *testbed.Writer) {
		lost := r.healthy(t).Leader
		next := other(lost)
		for _, e := range []struct{ kind, subject, text string }{
			{"membership", "n2", "joined"}, {"membership", "witness", "votes now"}, {"role", lost, "is the primary"},
		} {
			r.told(t, "witness", node.EventKind(e.kind), e.subject, e.text)
		}
		if err := r.PowerOff(lost); err != nil {
			t.Fatal(err)
		}
		r.told(t, "witness", node.EventFault, lost, "does not answer")
		r.told(t, "witness", node.EventRole, next, "is the primary")
		r.told(t, "witness", node.EventRole, next, lost+" -> "+next)
		r.goesOn(t, w)
		if err := r.PowerOn(t.Context(), lost); err != nil {
			t.Fatal(err)
		}
		r.healthy(t)
		r.told(t, lost, node.EventFault, lost, "answers again")
		stories := map[string][]node.Event{}
		err := testbed.Until(within(t, wait), "all nodes to tell the same", func() error {
			for _, h := range []string{"n1", "n2", "witness"} {
				stories[h] = r.story(t, h)
			}
			if !slices.Equal(stories["n1"], stories["n2"]) || !slices.Equal(stories["n1"], stories["witness"]) {
				return errNotTold
			}
			return nil
		})
		if err != nil {
			t.Fatalf("%v: %+v", err, stories)
		}
		for _, e := range stories[lost] {
			t.Logf("%s  %s  %s  %s", e.At.Format("15:04:05.000"), e.Kind, e.Subject, e.Text)
		}
	})
}
