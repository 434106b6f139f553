package postgres

import (
	"errors"
	"testing"
	"time"
)

func TestSilence(t *testing.T) {
	type question struct {
		from, to time.Duration
		answered bool
	}
	const (
		s     = time.Second
		after = 5 * s
		most  = 2 * s
	)
	for _, c := range []struct {
		name  string
		asked []question
		total time.Duration
		hung  bool
	}{
		{name: "never asked"},
		{name: "answered", asked: []question{{0, 9 * s, true}, {9 * s, 20 * s, true}}},
		{name: "one without an answer", asked: []question{{0, s, false}}, total: s},
		{name: "the time between counts", asked: []question{{0, s, false}, {2 * s, 3 * s, false}}, total: 3 * s},
		{name: "long enough", asked: []question{{0, s, false}, {2 * s, 3 * s, false}, {4 * s, 5 * s, false}}, total: 5 * s, hung: true},
		{name: "an answer ends it", asked: []question{{0, s, false}, {2 * s, 4 * s, false}, {4 * s, 5 * s, true}, {5 * s, 6 * s, false}}, total: s},
		{name: "this process was stopped while asking", asked: []question{{0, 60 * s, false}}, total: 2 * s},
		{name: "stopped, then asked again in vain", asked: []question{{0, 60 * s, false}, {60 * s, 61 * s, false}}, total: 3 * s},
		{name: "stopped between questions", asked: []question{{0, s, false}, {60 * s, 61 * s, false}}, total: 3 * s},
	} {
		var x silence
		for _, q := range c.asked {
			x.note(q.from, q.to, q.answered, most)
		}
		if x.total != c.total || x.hung(after) != c.hung {
			t.Errorf("%s: %v, hung %v, want %v, %v", c.name, x.total, x.hung(after), c.total, c.hung)
		}
	}
	var one silence
	one.note(0, time.Minute, false, time.Minute)
	if one.hung(s) {
		t.Error("hung after one question")
	}
}

func TestSubscribe(t *testing.T) {
	w := New(Config{})
	ch, cancel := w.Subscribe()
	other, cancelOther := w.Subscribe()
	defer cancelOther()
	for i := range 10 {
		w.publish(Probe{Kind: Primary, PID: i + 1})
	}
	for _, c := range []<-chan Probe{ch, other} {
		if p := <-c; p.PID != 10 {
			t.Errorf("a slow reader gets %+v, want the newest", p)
		}
	}
	cancel()
	cancel()
	w.publish(Probe{Kind: Gone})
	if p, ok := <-ch; ok {
		t.Errorf("after the end of the subscription: %+v", p)
	}
	if p := <-other; p.Kind != Gone {
		t.Errorf("the other subscriber gets %+v", p)
	}
}

func TestRunTwice(t *testing.T) {
	s := emptyServer(t)
	w := watch(t, s.config(t))
	w.kind(t, Gone)
	if err := w.Run(t.Context()); !errors.Is(err, ErrRunning) {
		t.Errorf("a second Run: %v", err)
	}
	w.kind(t, Gone)
}
