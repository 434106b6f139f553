package supervisor

import (
	"encoding/json"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestDecideLeftover(t *testing.T) {
	recorded := sighting{recorded: true, alive: true, sameBoot: true, sameStart: true, sameHash: true, marker: markerSame, sameArgv: true}
	scanned := sighting{alive: true, marker: markerSame, sameArgv: true, sameProgram: true, sameUser: true, leader: true}
	for name, c := range map[string]struct {
		from   sighting
		change func(*sighting)
		want   action
	}{
		"recorded":                      {recorded, func(*sighting) {}, actAdopt},
		"recorded, marker unreadable":   {recorded, func(o *sighting) { o.marker = markerUnreadable }, actAdopt},
		"recorded, dead":                {recorded, func(o *sighting) { o.alive = false }, actIgnore},
		"recorded, other boot":          {recorded, func(o *sighting) { o.sameBoot = false }, actIgnore},
		"recorded, other start":         {recorded, func(o *sighting) { o.sameStart = false }, actIgnore},
		"recorded, other start, marker": {recorded, func(o *sighting) { o.sameStart = false; o.marker = markerOther }, actIgnore},
		"recorded, no marker":           {recorded, func(o *sighting) { o.marker = markerAbsent }, actIgnore},
		"recorded, other marker":        {recorded, func(o *sighting) { o.marker = markerOther }, actRefuse},
		"recorded, other configuration": {recorded, func(o *sighting) { o.sameHash = false }, actReplace},
		"recorded, other command line":  {recorded, func(o *sighting) { o.sameArgv = false }, actReplace},
		"scanned":                       {scanned, func(*sighting) {}, actAdopt},
		"scanned, dead":                 {scanned, func(o *sighting) { o.alive = false }, actIgnore},
		"scanned, no leader":            {scanned, func(o *sighting) { o.leader = false }, actIgnore},
		"scanned, descendant":           {scanned, func(o *sighting) { o.descendant = true }, actIgnore},
		"scanned, no marker":            {scanned, func(o *sighting) { o.marker = markerAbsent }, actIgnore},
		"scanned, other marker":         {scanned, func(o *sighting) { o.marker = markerOther }, actIgnore},
		"scanned, unreadable":           {scanned, func(o *sighting) { o.marker = markerUnreadable }, actAdopt},
		"scanned, unreadable, user":     {scanned, func(o *sighting) { o.marker = markerUnreadable; o.sameUser = false }, actIgnore},
		"scanned, unreadable, argv":     {scanned, func(o *sighting) { o.marker = markerUnreadable; o.sameArgv = false }, actIgnore},
		"scanned, other program":        {scanned, func(o *sighting) { o.sameProgram, o.sameArgv = false, false }, actIgnore},
		"scanned, other command line":   {scanned, func(o *sighting) { o.sameArgv = false }, actReplace},
		"scanned, other user":           {scanned, func(o *sighting) { o.sameUser = false }, actReplace},
	} {
		o := c.from
		c.change(&o)
		if got, reason := decideLeftover(o); got != c.want || reason == "" {
			t.Errorf("%s: action %d (%s), want %d", name, got, reason, c.want)
		}
	}
}

func TestSameArgv(t *testing.T) {
	s := Spec{Path: "/usr/sbin/prog", Args: []string{"-f", "x.cfg"}}
	for cmdline, want := range map[string]bool{
		"/usr/sbin/prog -f x.cfg":                           true,
		"/usr/sbin/prog -f x.cfg -sf 12 -x sock":            true,
		"/usr/bin/python3 /usr/sbin/prog -f x.cfg":          true,
		"/usr/bin/python3 -E -s /usr/sbin/prog -f x.cfg":    true,
		"/usr/sbin/prog -f y.cfg":                           false,
		"/usr/sbin/prog -f":                                 false,
		"/usr/sbin/other -f x.cfg":                          false,
		"/bin/cat -f x.cfg /usr/sbin/prog":                  false,
		"/bin/sh -c a b c d e f g /usr/sbin/prog -f x.cfg":  false,
		"renamed worker":                                    true,
		"renamed worker more":                               true,
		"renamed":                                           false,
		"/usr/bin/env -S python3 -u /usr/sbin/prog helper ": false,
	} {
		if got := sameArgv(strings.Split(cmdline, " "), []string{"renamed", "worker"}, s); got != want {
			t.Errorf("%q: %v, want %v", cmdline, got, want)
		}
	}
	if sameArgv(nil, nil, s) {
		t.Error("an empty command line is accepted")
	}
}

func TestBudget(t *testing.T) {
	p := RestartPolicy{MinBackoff: time.Second, MaxBackoff: 10 * time.Second, Budget: Budget{Failures: 3, HalfLife: time.Minute}}
	now := time.Unix(0, 0)
	type step struct {
		after time.Duration
		wait  time.Duration
		spent bool
	}
	for name, steps := range map[string][]step{
		"in a burst":          {{0, time.Second, false}, {0, 2 * time.Second, false}, {0, 4 * time.Second, false}, {0, 10 * time.Second, true}},
		"forgotten in time":   {{0, time.Second, false}, {time.Hour, time.Second, false}, {time.Hour, time.Second, false}, {time.Hour, time.Second, false}, {time.Hour, time.Second, false}},
		"half of it forgiven": {{0, time.Second, false}, {0, 2 * time.Second, false}, {time.Minute, 2 * time.Second, false}},
		"recovers":            {{0, time.Second, false}, {0, 2 * time.Second, false}, {0, 4 * time.Second, false}, {0, 10 * time.Second, true}, {time.Hour, time.Second, false}},
		"clock set back":      {{0, time.Second, false}, {-time.Hour, 2 * time.Second, false}},
	} {
		var b budget
		at := now
		for i, s := range steps {
			at = at.Add(s.after)
			var wait time.Duration
			var spent bool
			b, wait, spent = b.fail(p, at, 0)
			if wait.Round(time.Millisecond) != s.wait || spent != s.spent {
				t.Errorf("%s, failure %d: wait %v, spent %v; want %v, %v", name, i+1, wait, spent, s.wait, s.spent)
			}
		}
	}
	if _, wait, _ := (budget{}).fail(p, now, 0.999); wait < 750*time.Millisecond || wait > 751*time.Millisecond {
		t.Errorf("wait with the greatest jitter %v, want three quarters of a second", wait)
	}
	if _, wait, _ := (budget{count: 1e9, last: now}).fail(p, now, 0); wait != p.MaxBackoff {
		t.Errorf("wait %v after very many failures, want the greatest", wait)
	}
}

func TestNewNamesAllThatIsWrong(t *testing.T) {
	adj := 2000
	_, err := New(Spec{
		Name: "Bad Name", Path: "sh", Args: []string{"a\x00b"}, Env: []string{"NOVALUE", "KEY=hush\x00"}, Dir: "x", RunDir: "run", LogFile: "log",
		LogMax: 1, LogKeep: -1, OOMScoreAdj: &adj, Grace: -1, Restart: RestartPolicy{MinBackoff: time.Hour, MaxBackoff: time.Second},
	}, nil)
	if err == nil {
		t.Fatal("no error")
	}
	for _, want := range []string{
		`name "Bad Name"`, `path "sh"`, "argument", `"NOVALUE"`, `"KEY"`, `working directory "x"`, `run directory "run"`, `log file "log"`,
		"log maximum 1", "kept logs -1", "adjustment 2000", "negative", "marker", "smallest back-off 1h0m0s",
	} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %s in: %v", want, err)
		}
	}
	if strings.Contains(err.Error(), "hush") {
		t.Errorf("a value of the environment is in: %v", err)
	}
}

func TestHashSeesTheConfiguration(t *testing.T) {
	base := func() Spec { return specIn("/x", "true") }
	first, err := base().hash()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Spec){
		"nothing":         func(*Spec) {},
		"order of Env":    func(s *Spec) { slices.Reverse(s.Env) },
		"Grace":           func(s *Spec) { s.Grace++ },
		"changes: Path":   func(s *Spec) { s.Path += "x" },
		"changes: Args":   func(s *Spec) { s.Args = append(s.Args, "x") },
		"changes: Env":    func(s *Spec) { s.Env = append(s.Env, "X=1") },
		"changes: Dir":    func(s *Spec) { s.Dir = "/tmp" },
		"changes: User":   func(s *Spec) { s.User = &User{} },
		"changes: Limits": func(s *Spec) { s.Limits.NoFile = 9 },
	} {
		s := base()
		change(&s)
		got, err := s.hash()
		if err != nil || (got != first) != strings.HasPrefix(name, "changes") {
			t.Errorf("%s: hash differs: %v, %v", name, got != first, err)
		}
	}
}

func TestExitStatusString(t *testing.T) {
	long := strings.Repeat("x", 400)
	for want, e := range map[string]ExitStatus{
		"exit code 3":                                   {Known: true, Code: 3},
		"killed by SIGSEGV (core dumped)":               {Known: true, Code: -1, Signal: syscall.SIGSEGV, Core: true},
		"ended, exit status unknown (it was adopted)":   {Code: -1},
		"exit code 1; last output: b | c | d":           {Known: true, Code: 1, LastLog: []string{"a", "b", "c", "d"}},
		"exit code 0; last output: " + long[:300] + "…": {Known: true, LastLog: []string{long}},
	} {
		if got := e.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}

func TestStateAsText(t *testing.T) {
	for s := Stopped; s <= Failed; s++ {
		data, err := json.Marshal(s)
		var back State
		if err2 := json.Unmarshal(data, &back); err != nil || err2 != nil || back != s {
			t.Errorf("%v becomes %s and %v, %v, %v", s, data, back, err, err2)
		}
	}
	var s State
	if err := s.UnmarshalText([]byte("bogus")); err == nil || State(99).String() != "state(99)" {
		t.Errorf("%v, %v", err, State(99))
	}
}
