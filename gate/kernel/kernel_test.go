package kernel

import (
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/gate"
)

const shutText = `table inet pgha_gate {
	counter dropped {
		packets 0 bytes 0
	}

	counter resets {
		packets 0 bytes 0
	}

	set moved {
		type inet_service
		flags timeout
	}

	set owner {
		type inet_service
		flags timeout
	}

	set replica {
		type inet_service
		flags timeout
	}

	chain guard {
		meta time < "1970-01-01 00:00:00" accept
	}

	chain input {
		type filter hook input priority -20; policy accept;
		tcp dport @replica jump guard
		tcp dport @owner jump guard
		tcp dport @moved counter name "resets" reject with tcp reset
		tcp dport 5442 counter name "dropped" drop
	}

	chain output {
		type filter hook output priority -20; policy accept;
		tcp sport @replica jump guard
		tcp sport @owner jump guard
		tcp sport @moved tcp flags & rst == rst accept
		tcp sport 5442 counter name "dropped" drop
	}
}
`

const listGate = "list table inet pgha_gate"

func TestInstall(t *testing.T) {
	ns := newNS(t)
	k := newKernel(t, ns, testPort)
	s, err := k.Read(t.Context())
	must(t, err)
	if d := cmp.Diff(State{}, s); d != "" {
		t.Errorf("state without a table, -want +got:\n%s", d)
	}
	if err := k.Open(t.Context(), Owner, in(long)); !errors.Is(err, ErrNotInstalled) {
		t.Errorf("opening a gate that is not there gives %v, want ErrNotInstalled", err)
	}
	nft(t, ns, "add table inet other")
	must(t, k.Install(t.Context()))
	// Names that nft takes for its own words could be listed, but not loaded again.
	saved := newNS(t)
	nft(t, saved, nft(t, ns, listGate))
	if s, err := newKernel(t, saved, testPort).Read(t.Context()); err != nil || s != (State{Installed: true}) {
		t.Errorf("state after the listing is loaded is %+v (error %v), want installed and shut", s, err)
	}
	if d := cmp.Diff(shutText, nft(t, ns, listGate)); d != "" {
		t.Errorf("-want +got:\n%s", d)
	}
	if s, err = k.Read(t.Context()); err != nil || s != (State{Installed: true}) {
		t.Errorf("state after install is %+v (error %v), want installed and shut", s, err)
	}
	must(t, k.Open(t.Context(), Owner, in(long)))
	must(t, k.Shut(t.Context()))
	if d := cmp.Diff(shutText, nft(t, ns, listGate)); d != "" {
		t.Errorf("after open and shut, -want +got:\n%s", d)
	}
	for range 2 {
		must(t, k.Remove(t.Context()))
	}
	if got, want := nft(t, ns, "list tables"), "table inet other\n"; got != want {
		t.Errorf("after Remove there is %q, want %q", got, want)
	}
}

// TestInstallKeepsOpenGate is a daemon that starts again.
func TestInstallKeepsOpenGate(t *testing.T) {
	for _, role := range []Role{Owner, Replica} {
		h := newHost(t)
		h.open(role, long)
		sessions := h.connectAll()
		must(t, h.k.Close())
		before := nft(t, h.ns, "list chain inet pgha_gate guard")
		restarted := newKernel(t, h.ns, testPort)
		must(t, restarted.Install(t.Context()))
		s, err := restarted.Read(t.Context())
		must(t, err)
		if !s.Open || s.Role != role || s.Remaining <= 0 || s.Remaining > long || s.Dropped.Packets != 0 {
			t.Errorf("state after a second Install is %+v, want the gate open as %s", s, role)
		}
		if d := cmp.Diff(before, nft(t, h.ns, "list chain inet pgha_gate guard")); d != "" {
			t.Errorf("guard, -want +got:\n%s", d)
		}
		for _, s := range sessions {
			s.mustTalk()
		}
	}
}

// alterations are tables that are not the gate's, each made of an open one.
var alterations = map[string]string{
	"no table":             "delete table inet pgha_gate",
	"dormant":              "add table inet pgha_gate { flags dormant; }",
	"rule before":          "insert rule inet pgha_gate input tcp dport 5442 accept",
	"rule of another kind": "insert rule inet pgha_gate input numgen inc mod 2 == 0 accept",
	"rule after":           "add rule inet pgha_gate output accept",
	"no rules":             "flush chain inet pgha_gate output",
	"another drop":         "flush chain inet pgha_gate guard; add rule inet pgha_gate guard meta time < 4000000000 drop",
	"guard without end":    "flush chain inet pgha_gate guard; add rule inet pgha_gate guard accept",
	"guard the other way":  "flush chain inet pgha_gate guard; add rule inet pgha_gate guard meta time > 1000000000 accept",
	"two guards":           "add rule inet pgha_gate guard meta time < 4000000000 accept",
	"another chain":        "add chain inet pgha_gate more",
	"another set":          "add set inet pgha_gate more { type inet_service; }",
	"port for ever":        "flush set inet pgha_gate owner; add element inet pgha_gate owner { 5442 }",
	"other port":           "add element inet pgha_gate owner { 5443 timeout 1h }",
	"both roles":           "add element inet pgha_gate replica { 5442 timeout 1h }",
	"other set": `flush chain inet pgha_gate input; flush chain inet pgha_gate output; delete set inet pgha_gate replica
		add set inet pgha_gate replica { type ipv4_addr; }`,
	"gate of another port": "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, "5442", "5443"),
	"another priority":     "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, "priority -20", "priority 20"),
	"drop by default":      "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, "policy accept", "policy drop"),
	"only input":           "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, "hook output", "hook input"),
	"no counter":           "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, `counter name "resets"`, ""),
	"flags for later":      "delete table inet pgha_gate\n" + strings.ReplaceAll(shutText, "flags timeout", "flags timeout; timeout 1h"),
}

// TestRepair alters an open gate. Read must notice, and each method that wants
// it shut must put it back, shut.
func TestRepair(t *testing.T) {
	moved := strings.Replace(shutText, "set moved {\n\t\ttype inet_service\n\t\tflags timeout\n",
		"set moved {\n\t\ttype inet_service\n\t\tflags timeout\n\t\telements = { 5442 }\n", 1)
	methods := map[string]struct {
		call func(context.Context, *Kernel) error
		want string
	}{
		"install":   {func(ctx context.Context, k *Kernel) error { return k.Install(ctx) }, shutText},
		"shut":      {func(ctx context.Context, k *Kernel) error { return k.Shut(ctx) }, shutText},
		"moved":     {func(ctx context.Context, k *Kernel) error { return k.Moved(ctx, true) }, moved},
		"not moved": {func(ctx context.Context, k *Kernel) error { return k.Moved(ctx, false) }, shutText},
		"open late": {func(ctx context.Context, k *Kernel) error {
			if err := k.Open(ctx, Owner, in(-time.Second)); !errors.Is(err, ErrLate) {
				return err
			}
			return nil
		}, shutText},
	}
	for name, alteration := range alterations {
		t.Run(name, func(t *testing.T) {
			ns := newNS(t)
			k := newKernel(t, ns, testPort)
			for method, m := range methods {
				must(t, k.Install(t.Context()))
				must(t, k.Open(t.Context(), Owner, in(long)))
				nft(t, ns, alteration)
				s, err := k.Read(t.Context())
				must(t, err)
				if s != (State{}) {
					t.Errorf("state of the altered table is %+v, want not installed", s)
				}
				must(t, m.call(t.Context(), k))
				if d := cmp.Diff(m.want, nft(t, ns, listGate)); d != "" {
					t.Errorf("after %s, -want +got:\n%s", method, d)
				}
				must(t, k.Remove(t.Context()))
			}
		})
	}
}

func TestOpenRefusesBadRole(t *testing.T) {
	k := newKernel(t, newNS(t), testPort)
	if err := k.Open(t.Context(), "witness", in(long)); err == nil {
		t.Error("opened as witness")
	}
	if _, err := New(slog.New(slog.DiscardHandler), 0); err == nil {
		t.Error("made a gate of port 0")
	}
}

func TestContext(t *testing.T) {
	ns := newNS(t)
	k := newKernel(t, ns, testPort)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, readErr := k.Read(ctx)
	for _, err := range []error{
		k.Install(ctx), k.Open(ctx, Owner, in(long)), k.Shut(ctx), k.Moved(ctx, true), k.Remove(ctx), readErr,
	} {
		if !errors.Is(err, context.Canceled) {
			t.Errorf("error is %v, want context.Canceled", err)
		}
	}
	if got := nft(t, ns, "list ruleset"); got != "" {
		t.Errorf("something was written:\n%s", got)
	}
}

type fixedClock gate.Moment

func (c fixedClock) Now() gate.Moment { return gate.Moment(c) }

func TestRemaining(t *testing.T) {
	wall := time.Now().UnixNano()
	now := gate.Moment{Mono: 1000 * time.Second, Wall: wall}
	tests := map[string]struct {
		until   gate.Moment
		late    bool
		timeout string // of the element, as nft lists it
		open    bool
		atMost  time.Duration // for Remaining
	}{
		"long past":          {now.Add(-time.Hour), true, "", false, 0},
		"now":                {now, true, "", false, 0},
		"less than a tick":   {now.Add(MinRemaining - time.Nanosecond), true, "", false, 0},
		"rounded down":       {now.Add(3600*time.Second + 999999*time.Nanosecond), false, "timeout 1h ", true, time.Hour},
		"guard is sooner":    {gate.Moment{Mono: now.Mono + time.Hour, Wall: wall + int64(time.Minute)}, false, "timeout 1h ", true, time.Minute},
		"guard is later":     {gate.Moment{Mono: now.Mono + time.Minute, Wall: wall + int64(time.Hour)}, false, "timeout 1m ", true, time.Minute},
		"guard has passed":   {gate.Moment{Mono: now.Mono + time.Hour, Wall: wall - 1}, false, "timeout 1h ", false, 0},
		"guard before 1970":  {gate.Moment{Mono: now.Mono + time.Hour, Wall: -1}, false, "timeout 1h ", false, 0},
		"only mono has past": {gate.Moment{Mono: now.Mono - 1, Wall: wall + int64(time.Hour)}, true, "", false, 0},
	}
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			ns := newNS(t)
			k := newKernel(t, ns, testPort, WithClock(fixedClock(now)))
			must(t, k.Install(t.Context()))
			must(t, k.Open(t.Context(), Replica, now.Add(long)))
			err := k.Open(t.Context(), Owner, tc.until)
			if tc.late != errors.Is(err, ErrLate) || !tc.late && err != nil {
				t.Errorf("error is %v, want ErrLate: %t", err, tc.late)
			}
			s, err := k.Read(t.Context())
			must(t, err)
			if s.Open != tc.open || s.Open != (s.Remaining > 0) || s.Remaining > tc.atMost {
				t.Errorf("state is %+v, want open %t for at most %v", s, tc.open, tc.atMost)
			}
			wantRole := Owner
			if tc.late {
				wantRole = ""
			}
			if s.Role != wantRole || !s.Installed {
				t.Errorf("state is %+v, want role %q", s, wantRole)
			}
			if guard := nft(t, ns, "list chain inet pgha_gate guard"); tc.until.Wall < 0 && !strings.Contains(guard, `meta time < "1970-01-01`) {
				t.Errorf("want the beginning of 1970 in:\n%s", guard)
			}
			text := nft(t, ns, "list set inet pgha_gate owner")
			if !strings.Contains(text, tc.timeout) || (tc.timeout == "") == strings.Contains(text, "elements") {
				t.Errorf("want an element with %q in:\n%s", tc.timeout, text)
			}
		})
	}
}

// TestReopen opens again and again at the moment when the last element runs
// out, which is when the kernel may or may not have cleared it away.
func TestReopen(t *testing.T) {
	h := &host{t: t, ns: newNS(t)}
	h.k = newKernel(t, h.ns, testPort)
	must(t, h.k.Install(t.Context()))
	for i := range 50 {
		h.openBriefly([]Role{Owner, Replica}[i%2])
		h.untilShut()
	}
}

func BenchmarkOpen(b *testing.B) {
	k := newKernel(b, newNS(b), testPort)
	must(b, k.Install(b.Context()))
	for b.Loop() {
		must(b, k.Open(b.Context(), Owner, in(2500*time.Millisecond)))
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N), "µs/open")
}

func BenchmarkShut(b *testing.B) {
	k := newKernel(b, newNS(b), testPort)
	must(b, k.Install(b.Context()))
	for b.Loop() {
		must(b, k.Shut(b.Context()))
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N), "µs/shut")
}

func BenchmarkRead(b *testing.B) {
	k := newKernel(b, newNS(b), testPort)
	must(b, k.Install(b.Context()))
	for b.Loop() {
		_, err := k.Read(b.Context())
		must(b, err)
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N), "µs/read")
}
