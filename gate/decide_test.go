package gate

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

const ms = time.Millisecond

// long is until when a record of the profile fast has to be waited for.
var long = 2500*ms + Margin(2500*ms)

// fit is an observation of a node b that may take over from a.
func fit() observation {
	t := TimersOf("fast")
	return observation{
		self: "b", now: Moment{Mono: time.Hour}, t: t,
		view: View{
			Record: &Record{Owner: "a", Epoch: 3, Seq: 9, PromiseMS: 2500, State: Open}, RecordRev: 40, Leader: "a", Lease: 7,
			Sync: Sync{Leader: "a", Standbys: []string{"b"}, Rev: 30}, Synchronous: true, MaxLag: 100, Optime: 1000, Timeline: 5,
		},
		silent: long, quorum: time.Second,
		local: Local{Process: Recovery, Timeline: 5, Received: 1000, StreamedAt: time.Hour - 3*time.Second, PatroniUp: true},
	}
}

// asynchronous is fit without synchronous replication.
func asynchronous() observation {
	o := fit()
	o.view.Synchronous, o.view.Sync = false, Sync{}
	return o
}

func TestDecideTakeover(t *testing.T) {
	for _, c := range []struct {
		name  string
		from  func() observation
		with  func(*observation)
		takes bool
		why   string
	}{
		{"a synchronous standby", fit, func(*observation) {}, true, "synchronous standby with every"},
		{"nobody has the leader key", fit, func(o *observation) { o.view.Leader = "" }, true, ""},
		{"the gate is said to be shut", fit, func(o *observation) { o.view.Record.State, o.silent = Shut, 0 }, true, ""},
		{"promoting counts as open", fit, func(o *observation) { o.view.Record.State, o.silent = Promoting, 0 }, false, "may still be open for 2.8"},
		{"no record", fit, func(o *observation) { o.view.Record = nil }, false, "no owner yet"},
		{"the owner itself", fit, func(o *observation) { o.self = "a" }, false, "is the owner"},
		{"an operator's pause", fit, func(o *observation) { o.view.Paused = true }, false, "paused"},
		{"tagged", fit, func(o *observation) { o.view.NoFailover = true }, false, "nofailover"},
		{"being stopped", fit, func(o *observation) { o.local.Stopping = true }, false, "being stopped"},
		{"a switchover to another", fit, func(o *observation) { o.view.Target = "c" }, false, "switchover to c"},
		{"a switchover to this one", fit, func(o *observation) { o.view.Target = "b" }, true, ""},
		{"a third holds the leader key", fit, func(o *observation) { o.view.Leader = "c" }, false, "names c"},
		{"this one holds the leader key", fit, func(o *observation) { o.view.Leader = "b" }, false, "names b"},
		{"within the promise", fit, func(o *observation) { o.silent = 2499 * ms }, false, "may still be open"},
		{"within the margin", fit, func(o *observation) { o.silent = long - ms }, false, "may still be open for 1ms"},
		{"a longer promise", fit, func(o *observation) { o.view.Record.PromiseMS = 30_000 }, false, "may still be open for 30."},
		{"an oath", fit, func(o *observation) { o.oath = ms }, false, "promised a to keep off"},
		{"a quorum for too short a time", fit, func(o *observation) { o.quorum = 999 * ms }, false, "quorum for only"},
		{"a promotion has failed here", fit, func(o *observation) { o.cooldown = time.Second }, false, "has failed here"},
		{"PostgreSQL is a primary", fit, func(o *observation) { o.local.Process = Primary }, false, "not a running replica"},
		{"PostgreSQL is gone", fit, func(o *observation) { o.local.Process = Gone }, false, "not a running replica"},
		{"old news", fit, func(o *observation) { o.localAge = 1001 * ms }, false, "not been heard of"},
		{"no Patroni", fit, func(o *observation) { o.local.PatroniUp = false }, false, "Patroni here does not answer"},
		{"no session", fit, func(o *observation) { o.view.Lease = 0 }, false, "no session"},
		{"another timeline", fit, func(o *observation) { o.local.Timeline = 4 }, false, "timeline 4"},
		{"an unknown timeline", fit, func(o *observation) { o.view.Timeline, o.local.Timeline = 0, 0 }, false, "timeline 0"},
		{"none of a PostgreSQL that was open lately", fit, func(o *observation) { o.view.Timeline = 0 }, false, "that of a on 0"},
		{"none of a PostgreSQL that has stopped", fit, func(o *observation) { o.view.Timeline, o.view.Record.State = 0, Shut }, true, ""},
		{"none, and none here", fit, func(o *observation) { o.view.Timeline, o.local.Timeline, o.view.Record.State = 0, 0, Shut }, false, "timeline 0"},
		{"another after a stop", fit, func(o *observation) { o.local.Timeline, o.view.Record.State = 4, Shut }, false, "timeline 4"},
		{"none after a stop, and not in sync", fit, func(o *observation) { o.view.Timeline, o.view.Record.State, o.view.Sync.Standbys = 0, Shut, nil }, false, "may lack"},
		{"none after a stop, asynchronous", asynchronous, func(o *observation) { o.view.Timeline, o.view.Record.State = 0, Shut }, false, "that of a on 0"},
		{"the sync key is another's", fit, func(o *observation) { o.view.Sync.Leader = "c" }, false, "not of a"},
		{"not a synchronous standby", fit, func(o *observation) { o.view.Sync.Standbys = []string{"c"} }, false, "may lack"},
		{"no synchronous standby", fit, func(o *observation) { o.view.Sync.Standbys = nil }, false, "may lack"},
		{"a quorum of standbys", fit, func(o *observation) { o.view.Sync.Standbys, o.view.Sync.Quorum = []string{"b", "c"}, 1 }, false, "no single"},
		{"a quorum of all standbys", fit, func(o *observation) { o.view.Sync.Quorum = 1 }, false, "no single"},
		{"asynchronous", asynchronous, func(*observation) {}, true, "asynchronous standby within bounds"},
		{"lag within bounds", asynchronous, func(o *observation) { o.local.Received = 900 }, true, ""},
		{"too much lag", asynchronous, func(o *observation) { o.local.Received = 899 }, false, "lacks 101 bytes"},
		{"ahead of what was reported", asynchronous, func(o *observation) { o.local.Received = 5000 }, true, ""},
		{"never streamed", asynchronous, func(o *observation) { o.local.StreamedAt = 0 }, false, "stopped streaming"},
		{"stopped streaming long before", asynchronous, func(o *observation) { o.local.StreamedAt = time.Hour - long - 3501*ms }, false, "stopped streaming 3.501s before"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := c.from()
			c.with(&o)
			takes, why := decideTakeover(o, 0)
			if takes != c.takes || !strings.Contains(why, c.why) {
				t.Errorf("got %t, %q; want %t, %q", takes, why, c.takes, c.why)
			}
		})
	}
}

func TestDecideClaimAndCreate(t *testing.T) {
	holder := func() observation {
		o := fit()
		o.view.Leader = "b"
		return o
	}
	first := func() observation {
		o := holder()
		o.view.Record, o.view.RecordRev = nil, 0
		return o
	}
	claim := func(o observation) (bool, string) { return decideClaim(o, 0) }
	for _, c := range []struct {
		name string
		do   func(observation) (bool, string)
		from func() observation
		with func(*observation)
		ok   bool
		why  string
	}{
		{"claim", claim, holder, func(*observation) {}, true, "holds the leader key"},
		{"claim: the gate is said to be shut", claim, holder, func(o *observation) { o.view.Record.State, o.silent = Shut, 0 }, true, ""},
		{"claim: without a quorum for long", claim, holder, func(o *observation) { o.quorum = 0 }, true, ""},
		{"claim: a primary that was the last to be open", claim, holder, func(o *observation) {
			o.local.Process, o.view.Record.Last = Primary, "b"
		}, true, ""},
		{"claim: a primary before any gate was open", claim, holder, func(o *observation) { o.local.Process = Primary }, true, ""},
		{"claim: a primary that others may have followed", claim, holder, func(o *observation) {
			o.local.Process, o.view.Record.Last = Primary, "a"
		}, false, "has not been admitted"},
		{"claim: another holds the key", claim, fit, func(*observation) {}, false, "does not hold"},
		{"claim: no record", claim, first, func(*observation) {}, false, "no owner yet"},
		{"claim: the owner itself", claim, holder, func(o *observation) { o.view.Record.Owner = "b" }, false, "is the owner"},
		{"claim: an oath", claim, holder, func(o *observation) { o.oath = ms }, false, "promised"},
		{"claim: PostgreSQL is gone", claim, holder, func(o *observation) { o.local.Process = Gone }, false, "gone"},
		{"claim: within the margin", claim, holder, func(o *observation) { o.silent = long - ms }, false, "may still be open"},
		{"create", decideCreate, first, func(*observation) {}, true, ""},
		{"create: a primary", decideCreate, first, func(o *observation) { o.local.Process = Primary }, true, ""},
		{"create: there is a record", decideCreate, holder, func(*observation) {}, false, "there is a record"},
		{"create: another holds the key", decideCreate, first, func(o *observation) { o.view.Leader = "a" }, false, "does not hold"},
		{"create: an oath", decideCreate, first, func(o *observation) { o.oath = ms }, false, "promised"},
		{"create: PostgreSQL hangs", decideCreate, first, func(o *observation) { o.local.Process = Hung }, false, "hung"},
		{"create: just deleted", decideCreate, first, func(o *observation) { o.silent = long - ms }, false, "not been missing"},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := c.from()
			c.with(&o)
			ok, why := c.do(o)
			if ok != c.ok || !strings.Contains(why, c.why) {
				t.Errorf("got %t, %q; want %t, %q", ok, why, c.ok, c.why)
			}
		})
	}
}

func TestDecideOwner(t *testing.T) {
	for _, c := range []struct {
		name string
		with func(*observation)
		kind Kind
		why  string
	}{
		{"nothing is due", func(*observation) {}, None, ""},
		{"a beat is due", func(o *observation) { o.sinceBeat = 500 * ms }, Beat, "due"},
		{"a beat is wanted", func(o *observation) { o.wantOpen = true }, Beat, "due"},
		{"paused without the leader key", func(o *observation) { o.view.Paused, o.view.Leader, o.wantOpen = true, "", true }, Beat, "due"},
		{"paused, and another has the leader key", func(o *observation) { o.view.Paused, o.view.Leader = true, "b" }, Release, "names b"},
		{"another has the leader key", func(o *observation) { o.view.Leader = "b" }, Release, "names b"},
		{"nobody has the leader key", func(o *observation) { o.view.Leader = "" }, Release, "names nobody"},
		{"the kernel is not shut yet", func(o *observation) { o.view.Leader, o.kernel = "b", false }, None, "shutting the gate first"},
		{"it is said already", func(o *observation) { o.view.Leader, o.view.Record.State = "b", Shut }, None, "names b"},
		{"PostgreSQL is gone", func(o *observation) { o.local.Process = Gone }, Release, "PostgreSQL is gone"},
		{"PostgreSQL is restarted on purpose", func(o *observation) { o.local.Process, o.local.Restarting, o.wantOpen = Gone, true, true }, Beat, "due"},
		{"PostgreSQL hangs", func(o *observation) { o.local.Process, o.hung, o.view.Successor = Hung, 15*time.Second, true }, Release, "not answered for 15s"},
		{"PostgreSQL hangs for a short time", func(o *observation) { o.local.Process, o.hung, o.view.Successor = Hung, 14999*ms, true }, None, ""},
		{"PostgreSQL hangs and nobody else is fit", func(o *observation) { o.local.Process, o.hung = Hung, time.Hour }, None, ""},
		{"never promoted", func(o *observation) { o.local.Process, o.stalled = Recovery, 9*time.Second }, Release, "not been promoted within 9s"},
		{"not yet promoted", func(o *observation) { o.local.Process, o.stalled = Recovery, 8999*ms }, None, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := fit()
			o.self, o.local.Process, o.kernel = "a", Primary, true
			c.with(&o)
			kind, why := decideOwner(o)
			if kind != c.kind || !strings.Contains(why, c.why) {
				t.Errorf("got %q, %q; want %q, %q", kind, why, c.kind, c.why)
			}
		})
	}
}

func TestDecideHelp(t *testing.T) {
	owner := func(o *observation) { o.self, o.view.Leader = "a", "a" }
	for _, c := range []struct {
		name    string
		with    func(*observation)
		helped  int
		foreign time.Duration
		want    help
	}{
		{"a replica", func(*observation) {}, 0, time.Hour, helpNone},
		{"a promotion that takes its time", func(o *observation) { owner(o); o.stalled = 2999 * ms }, 0, 0, helpNone},
		{"a promotion that does not happen", func(o *observation) { owner(o); o.stalled = 3 * time.Second }, 0, 0, helpRestartPatroni},
		{"Patroni is started again once", func(o *observation) { owner(o); o.stalled = 3 * time.Second }, 1, 0, helpNone},
		{"it has not helped", func(o *observation) { owner(o); o.stalled = 9 * time.Second }, 1, 0, helpGiveUp},
		{"the leader key is another's", func(o *observation) { owner(o); o.view.Leader, o.stalled = "b", time.Hour }, 0, 0, helpNone},
		{"a primary beside another owner", func(o *observation) { o.local.Process = Primary }, 0, 3 * time.Second, helpStopPostgres},
		{"a primary that has time to demote", func(o *observation) { o.local.Process = Primary }, 0, 2999 * ms, helpNone},
		{"a primary that has been stopped once", func(o *observation) { o.local.Process = Primary }, 1, time.Hour, helpNone},
		{"a primary that hangs", func(o *observation) { o.local.Process, o.local.WasPrimary = Hung, true }, 0, 3 * time.Second, helpStopPostgres},
		{"a replica that hangs", func(o *observation) { o.local.Process = Hung }, 0, time.Hour, helpNone},
		{"a primary that hangs, as the owner", func(o *observation) { owner(o); o.local.Process, o.local.WasPrimary = Hung, true }, 0, time.Hour, helpNone},
		{"a primary, and nobody has the leader key", func(o *observation) { o.local.Process, o.view.Leader = Primary, "" }, 0, time.Hour, helpStopPostgres},
		{"a primary that was given the leader key again", func(o *observation) { o.local.Process, o.view.Leader = Primary, o.self }, 0, time.Hour, helpStopPostgres},
		{"a primary, and Patroni is paused", func(o *observation) { o.local.Process, o.view.Paused = Primary, true }, 0, time.Hour, helpNone},
		{"a permission that was not used", func(o *observation) { o.admitted = true }, 0, 3 * time.Second, helpStopPostgres},
		{"no record", func(o *observation) { o.view.Record, o.local.Process, o.admitted = nil, Primary, true }, 0, time.Hour, helpNone},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := fit()
			c.with(&o)
			if got, why := decideHelp(o, c.helped, c.foreign); got != c.want {
				t.Errorf("got %q, %q; want %q", got, why, c.want)
			}
		})
	}
}

func TestWaitedWithoutMargin(t *testing.T) {
	o := fit()
	o.silent = 2500 * ms
	if ok, _ := waited(o, false); !ok {
		t.Error("a promise of 2.5s is not over after 2.5s without the margin")
	}
	if ok, left := waited(o, true); ok || left != Margin(2500*ms) {
		t.Errorf("with the margin: %t, %s left; want %s", ok, left, Margin(2500*ms))
	}
}

func TestRecord(t *testing.T) {
	want := Record{Owner: "n1", Epoch: 7, Seq: 1234, PromiseMS: 2500, State: Promoting}
	got, err := ParseRecord([]byte(want.Encode()))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("round trip (-want +got):\n%s", diff)
	}
	if got.Promise() != 2500*ms {
		t.Errorf("promise %s", got.Promise())
	}
	for name, bad := range map[string]string{
		"empty": "", "not JSON": "open", "no owner": `{"epoch":1,"promise_ms":1,"state":"open"}`,
		"no promise": `{"owner":"a","state":"open"}`, "negative promise": `{"owner":"a","promise_ms":-1,"state":"open"}`,
		"unknown state": `{"owner":"a","promise_ms":1,"state":"ajar"}`, "wrong type": `{"owner":1,"promise_ms":1,"state":"open"}`,
	} {
		if r, err := ParseRecord([]byte(bad)); err == nil {
			t.Errorf("%s: read as %+v", name, r)
		} else if !strings.HasPrefix(err.Error(), "parse gate record: ") {
			t.Errorf("%s: error %q", name, err)
		}
	}
}

func TestTimers(t *testing.T) {
	for _, profile := range []string{"fast", "steady", "wide", "unknown"} {
		if err := TimersOf(profile).Validate(); err != nil {
			t.Errorf("%s: %v", profile, err)
		}
	}
	for name, spoil := range map[string]func(*Timers){
		"must be above 0":      func(t *Timers) { t.Poll = 0 },
		"does not fit between": func(t *Timers) { t.Attempt = t.Beat + 1 },
		"no room for three":    func(t *Timers) { t.Promise = 3*t.Beat + t.Attempt - 1 },
		"leaves a living":      func(t *Timers) { t.Settle = t.Beat + t.Attempt - 1 },
	} {
		timers := TimersOf("fast")
		spoil(&timers)
		if err := timers.Validate(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
}
