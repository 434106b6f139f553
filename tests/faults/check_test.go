package faults

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const ms = time.Millisecond

func row(server string, timeline int, invoke, ret time.Duration) Op {
	return Op{Kind: Append, Routed: true, Server: server, Timeline: timeline, Invoke: invoke * ms, Return: ret * ms, Outcome: Done}
}

func wantError(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("error %v, want %q", err, want)
	}
}

func TestLostAndUnwanted(t *testing.T) {
	ops := []Op{
		{ID: 1, Kind: Append, Outcome: Done}, {ID: 2, Kind: Append, Outcome: Done},
		{ID: 3, Kind: Append, Outcome: Unknown}, {ID: 4, Kind: Append, Outcome: Unknown},
		{ID: 5, Kind: Append, Outcome: Refused}, {ID: 6, Kind: Append, Outcome: Refused},
		{ID: 7, Kind: Write, Outcome: Done},
	}
	have := map[int64]bool{1: true, 3: true, 5: true}
	if got := Lost(ops, have); !slices.Equal(got, []int64{2}) {
		t.Errorf("lost %v, want 2 alone", got)
	}
	if got := Unwanted(ops, have); !slices.Equal(got, []int64{5}) {
		t.Errorf("unwanted %v, want 5 alone", got)
	}
}

func TestLostTail(t *testing.T) {
	at := func(id int64, timeline int, invoke, ret time.Duration) Op {
		op := row("n1", timeline, invoke, ret)
		op.ID = id
		return op
	}
	unknown := at(9, 0, 90, 95)
	unknown.Outcome = Unknown
	ops := []Op{at(1, 1, 0, 10), at(2, 1, 5, 20), at(3, 1, 11, 12), at(4, 1, 30, 40), at(5, 2, 100, 110), unknown}
	for name, c := range map[string]struct {
		lost  []int64
		since time.Duration
		bad   string
	}{
		"nothing":                   {},
		"the last":                  {lost: []int64{4}},
		"the last few":              {lost: []int64{2, 3, 4}},
		"at the same time":          {lost: []int64{2, 4}},
		"all":                       {lost: []int64{1, 2, 3, 4}},
		"of the new primary":        {lost: []int64{4, 5}},
		"one before one that stays": {lost: []int64{1, 4}, bad: "row 1 is lost, and row 3 is not, which was sent 1ms after"},
		"one in the middle":         {lost: []int64{3}, bad: "row 3 is lost, and row 4 is not, which was sent 18ms after"},
		"too old":                   {lost: []int64{3, 4}, since: 13 * ms, bad: "row 3 is lost, and was acknowledged 1ms before"},
		"just old enough":           {lost: []int64{2, 3, 4}, since: 12 * ms},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, LostTail(ops, c.lost, c.since), c.bad) })
	}
}

func TestReigns(t *testing.T) {
	failed := row("n1", 1, 50, 60)
	failed.Outcome = Unknown
	for name, c := range map[string]struct {
		ops  []Op
		want []string
		bad  string
	}{
		"nobody":                 {},
		"one":                    {ops: []Op{row("n1", 1, 0, 1), row("n1", 1, 2, 3)}, want: []string{"n1"}},
		"one after the other":    {ops: []Op{row("n2", 2, 10, 12), row("n1", 1, 0, 1), row("n1", 3, 20, 22)}, want: []string{"n1", "n2", "n1"}},
		"under way at the turn":  {ops: []Op{row("n1", 1, 5, 30), row("n2", 2, 6, 8)}, want: []string{"n1", "n2"}},
		"called as other ends":   {ops: []Op{row("n1", 1, 8, 30), row("n2", 2, 6, 8)}, want: []string{"n1", "n2"}},
		"failed on the old one":  {ops: []Op{row("n1", 1, 0, 1), row("n2", 2, 2, 4), failed}, want: []string{"n1", "n2"}},
		"in turns":               {ops: []Op{row("n1", 1, 0, 1), row("n2", 2, 2, 4), row("n1", 1, 5, 6)}, bad: "sent 1ms after n2 had acknowledged"},
		"in turns, two later":    {ops: []Op{row("n1", 1, 0, 1), row("n2", 2, 2, 9), row("n1", 3, 3, 5), row("n1", 1, 6, 20)}, bad: "timeline 1 that was sent 1ms after n1"},
		"one timeline for both":  {ops: []Op{row("n1", 2, 0, 1), row("n2", 2, 5, 6)}, bad: "both n1 and n2"},
		"long call on the newer": {ops: []Op{row("n1", 1, 0, 1), row("n2", 2, 0, 90), row("n1", 1, 80, 81)}, want: []string{"n1", "n2"}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Reigns(c.ops)
			wantError(t, err, c.bad)
			var names []string
			for _, r := range got {
				names = append(names, r.Server)
			}
			if !slices.Equal(names, c.want) {
				t.Errorf("reigns %v, want %v", names, c.want)
			}
		})
	}
	got, err := Reigns([]Op{row("n1", 1, 5, 9), row("n1", 1, 2, 7)})
	if want := []Reign{{"n1", 1, 7 * ms, 5 * ms}}; err != nil || !cmp.Equal(got, want) {
		t.Errorf("got %v, %v, want %v", got, err, want)
	}
}

func TestGap(t *testing.T) {
	direct := row("n1", 1, 50, 51)
	direct.Routed = false
	refused := row("n1", 1, 60, 61)
	refused.Outcome = Refused
	ops := []Op{row("n1", 1, 0, 1), row("n1", 1, 2, 40), row("n2", 2, 2, 30), direct, refused, row("n2", 2, 90, 100), row("n2", 2, 300, 310)}
	for _, c := range []struct{ since, end, longest, from time.Duration }{
		{10, 120, 60, 40},
		{10, 41, 20, 10},
		{10, 200, 100, 100}, // the end is a gap too
		{35, 101, 60, 40},
		{102, 300, 198, 102}, // and so is the beginning
	} {
		longest, from := Gap(ops, c.since*ms, c.end*ms)
		if longest != c.longest*ms || from != c.from*ms {
			t.Errorf("from %d to %d: gap of %v at %v, want %d at %d", c.since, c.end, longest, from, c.longest, c.from)
		}
	}
}

func TestShut(t *testing.T) {
	server, client := netip.MustParseAddrPort("10.0.0.1:5442"), netip.MustParseAddrPort("10.0.0.9:4000")
	other := netip.MustParseAddrPort("10.0.0.9:4001")
	sent := func(at time.Duration, to netip.AddrPort) Packet {
		return Packet{At: at * ms, Link: "eth0", From: server, To: to, Bytes: 10}
	}
	begin := func(at time.Duration, to netip.AddrPort) Packet {
		return Packet{At: at * ms, Link: "eth0", From: server, To: to, Begin: true}
	}
	moved := []Reign{{"n1", 1, 1 * ms, 90 * ms}, {"n2", 2, 100 * ms, 900 * ms}}
	back := append(slices.Clone(moved), Reign{"n1", 3, 1000 * ms, 1000 * ms})
	for name, c := range map[string]struct {
		reigns []Reign
		n1, n2 []Packet
		bad    string
	}{
		"nothing":           {reigns: moved},
		"in time":           {reigns: moved, n1: []Packet{sent(5, client), sent(99, client)}, n2: []Packet{sent(100, client), sent(101, client)}},
		"late":              {reigns: moved, n1: []Packet{sent(5, client), sent(101, client)}, bad: "n1, primary on timeline 1, sent 10 bytes from port 5442 to 10.0.0.9:4000 by eth0, 1ms after n2"},
		"late on another":   {reigns: moved, n1: []Packet{sent(5, client), sent(6, other), sent(300, other)}, bad: "4001"},
		"new session":       {reigns: moved, n1: []Packet{sent(5, client), sent(101, other)}},
		"same port again":   {reigns: moved, n1: []Packet{sent(5, client), begin(200, client), sent(201, client)}},
		"begun before":      {reigns: moved, n1: []Packet{begin(4, client), sent(5, client), sent(201, client)}, bad: "101ms after"},
		"one server":        {reigns: []Reign{{"n1", 1, 1, 2}, {"n1", 2, 3, 4}}, n1: []Packet{sent(0, client), sent(9, client)}},
		"second turn, late": {reigns: back, n2: []Packet{sent(500, client), sent(1001, client)}, bad: "n2, primary on timeline 2"},
		"second turn":       {reigns: back, n1: []Packet{sent(50, client), sent(1001, other)}, n2: []Packet{sent(500, client)}},
	} {
		t.Run(name, func(t *testing.T) {
			wantError(t, Shut(c.reigns, map[string][]Packet{"n1": c.n1, "n2": c.n2}), c.bad)
		})
	}
}

func TestLinearizable(t *testing.T) {
	type r = Op
	op := func(client string, kind Kind, invoke, ret time.Duration, old, value int, swapped bool, o Outcome) r {
		return Op{Client: client, Kind: kind, Key: 1, Old: old, Value: value, Swapped: swapped, Invoke: invoke * ms, Return: ret * ms, Outcome: o}
	}
	for name, c := range map[string]struct {
		ops []Op
		bad string
	}{
		"nothing":                   {},
		"read what was written":     {ops: []r{op("a", Write, 0, 1, 0, 5, false, Done), op("b", Read, 2, 3, 0, 5, false, Done)}},
		"read before it":            {ops: []r{op("a", Write, 0, 9, 0, 5, false, Done), op("b", Read, 2, 3, 0, 0, false, Done)}},
		"stale read":                {ops: []r{op("a", Write, 0, 1, 0, 5, false, Done), op("b", Read, 2, 3, 0, 0, false, Done)}, bad: "not linearizable"},
		"read then unread":          {ops: []r{op("a", Write, 0, 9, 0, 5, false, Done), op("b", Read, 1, 2, 0, 5, false, Done), op("b", Read, 3, 4, 0, 0, false, Done)}, bad: "not linearizable"},
		"lost write":                {ops: []r{op("a", Write, 0, 1, 0, 5, false, Done), op("a", Write, 2, 3, 0, 6, false, Done), op("b", Read, 4, 5, 0, 5, false, Done)}, bad: "not linearizable"},
		"unknown, in effect":        {ops: []r{op("a", Write, 0, 1, 0, 5, false, Unknown), op("b", Read, 8, 9, 0, 5, false, Done)}},
		"unknown, without effect":   {ops: []r{op("a", Write, 0, 1, 0, 5, false, Unknown), op("b", Read, 8, 9, 0, 0, false, Done)}},
		"unknown, late":             {ops: []r{op("a", Write, 0, 1, 0, 5, false, Unknown), op("b", Read, 2, 3, 0, 0, false, Done), op("b", Read, 8, 9, 0, 5, false, Done)}},
		"unknown, twice":            {ops: []r{op("a", Write, 0, 1, 0, 5, false, Unknown), op("b", Read, 2, 3, 0, 5, false, Done), op("b", Write, 4, 5, 0, 6, false, Done), op("b", Read, 8, 9, 0, 5, false, Done)}, bad: "not linearizable"},
		"refused, in effect":        {ops: []r{op("a", Write, 0, 1, 0, 5, false, Refused), op("b", Read, 8, 9, 0, 5, false, Done)}, bad: "not linearizable"},
		"two swaps from one value":  {ops: []r{op("a", CAS, 0, 1, 0, 5, true, Done), op("b", CAS, 2, 3, 0, 6, true, Done)}, bad: "not linearizable"},
		"swap in vain":              {ops: []r{op("a", CAS, 0, 1, 0, 5, true, Done), op("b", CAS, 2, 3, 0, 6, false, Done)}},
		"swap in vain, but it fits": {ops: []r{op("a", CAS, 0, 1, 0, 5, false, Done)}, bad: "not linearizable"},
		"unknown swap":              {ops: []r{op("a", CAS, 0, 1, 0, 5, false, Unknown), op("b", Read, 2, 3, 0, 5, false, Done)}},
		"unknown swap of another":   {ops: []r{op("a", CAS, 0, 1, 7, 5, false, Unknown), op("b", Read, 2, 3, 0, 5, false, Done)}, bad: "not linearizable"},
		"failed read says nothing":  {ops: []r{op("a", Read, 0, 1, 0, 9, false, Unknown)}},
		"keys apart":                {ops: []r{op("a", Write, 0, 1, 0, 5, false, Done), {Client: "b", Kind: Read, Key: 2, Invoke: 2 * ms, Return: 3 * ms, Outcome: Done}}},
	} {
		t.Run(name, func(t *testing.T) { wantError(t, Linearizable(c.ops, time.Minute), c.bad) })
	}
}
