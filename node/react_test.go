package node

import (
	"strings"
	"testing"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/gate"
	"pgha/postgres"
)

const ms = time.Millisecond

func TestDecideStandbyLost(t *testing.T) {
	lost := func(change func(*standbyObservation)) standbyObservation {
		o := standbyObservation{primary: true, waiting: time.Second, connected: true, silent: time.Second, asked: standbyAsks, woken: time.Hour}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    standbyObservation
		want standbyAction
	}{
		{"silent, and its node too", lost(func(*standbyObservation) {}), standbyDrop},
		{"not the primary", lost(func(o *standbyObservation) { o.primary = false }), standbyLeave},
		{"nobody waits", lost(func(o *standbyObservation) { o.waiting = 0 }), standbyLeave},
		{"a sign of life", lost(func(o *standbyObservation) { o.silent = 99 * ms }), standbyLeave},
		{"its node answers", lost(func(o *standbyObservation) { o.spared, o.asked = true, 0 }), standbyLeave},
		{"its node has answered, some time ago", lost(func(o *standbyObservation) { o.asked = 0 }), standbyAsk},
		{"one question lost", lost(func(o *standbyObservation) { o.asked = 1 }), standbyAsk},
		{"just gone", lost(func(o *standbyObservation) { o.connected, o.waiting = false, 50*ms }), standbyLeave},
		{"gone", lost(func(o *standbyObservation) { o.connected = false }), standbyWake},
		{"gone, and its node answers", lost(func(o *standbyObservation) { o.connected, o.spared = false, true }), standbyWake},
		{"gone, and Patroni woken", lost(func(o *standbyObservation) { o.connected, o.woken = false, 100*ms }), standbyLeave},
		{"gone, and Patroni woken in vain", lost(func(o *standbyObservation) { o.connected, o.woken = false, wakeAgain }), standbyWake},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decideStandbyLost(tc.o); got != tc.want || why == "" {
				t.Errorf("%q, %q, want %q", got, why, tc.want)
			}
		})
	}
}

// TestStandbyWatch: what is decided of a standby from one probe to the next.
func TestStandbyWatch(t *testing.T) {
	var w standbyWatch
	reply := time.Unix(1_800_000_000, 0)
	at := time.Hour
	step := func(waiting int, silent, connected bool) standbyAction {
		t.Helper()
		at += 100 * ms
		p := postgres.Probe{At: at, Kind: postgres.Primary, SyncWaiting: waiting}
		if !silent {
			reply = reply.Add(time.Second)
		}
		if connected {
			p.Replicas = []postgres.Replica{{Name: "other", ReplyTime: time.Unix(int64(at), 0)}, {Name: "n2", ReplyTime: reply}}
		}
		act, _ := decideStandbyLost(w.see(p, true, []string{"n2"})["n2"])
		return act
	}
	want := func(got, want standbyAction, what string) {
		t.Helper()
		if got != want {
			t.Errorf("%s: %q, want %q", what, got, want)
		}
	}
	for range 5 {
		want(step(3, false, true), standbyLeave, "busy")
	}
	for range 30 {
		want(step(0, true, true), standbyLeave, "idle, with nothing to say")
	}
	want(step(1, true, true), standbyLeave, "the first commit that waits")
	want(step(1, true, true), standbyAsk, "it goes on to wait")
	w.by["n2"].asked++
	want(step(1, true, true), standbyAsk, "one question lost")
	w.by["n2"].asked++
	want(step(1, false, true), standbyLeave, "a sign of life at last")
	want(step(1, true, true), standbyAsk, "silent again: the questions count anew")
	w.by["n2"].asked, w.by["n2"].spare = 0, at+250*ms
	want(step(1, true, true), standbyLeave, "its node has answered")
	want(step(1, true, true), standbyLeave, "its node has answered")
	want(step(1, true, true), standbyAsk, "the answer gets old")
	w.by["n2"].asked = standbyAsks
	want(step(1, true, true), standbyDrop, "all questions lost")
	want(step(1, true, false), standbyWake, "it is gone")
	w.by["n2"].woken = at
	want(step(1, true, false), standbyLeave, "Patroni knows")
	want(step(0, true, false), standbyLeave, "commits go on")
	if len(w.see(postgres.Probe{At: at + ms, Kind: postgres.Primary, SyncWaiting: 1}, true, nil)) != 0 || len(w.by) != 0 {
		t.Error("one that is not a synchronous standby any more is still watched")
	}
}

func TestDecidePatroni(t *testing.T) {
	stalled := func(change func(*patroniObservation)) patroniObservation {
		o := patroniObservation{running: true, up: time.Minute, session: 16 * time.Second, loop: 5 * time.Second, quorum: time.Minute}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name    string
		o       patroniObservation
		restart bool
	}{
		{"misses its rounds", stalled(func(*patroniObservation) {}), true},
		{"does not run", stalled(func(o *patroniObservation) { o.running, o.stopped = false, time.Hour }), false},
		{"a late round", stalled(func(o *patroniObservation) { o.session = 15 * time.Second }), false},
		{"no session known", stalled(func(o *patroniObservation) { o.session = 0 }), false},
		{"no loop_wait known", stalled(func(o *patroniObservation) { o.loop = 0 }), false},
		{"just started", stalled(func(o *patroniObservation) { o.up = time.Second }), false},
		{"etcd was away", stalled(func(o *patroniObservation) { o.quorum = time.Second }), false},
		{"waits for PostgreSQL", stalled(func(o *patroniObservation) { o.hung = true }), false},
		{"stopped for a moment", patroniObservation{running: true, stopped: 400 * ms}, false},
		{"stopped", patroniObservation{running: true, stopped: patroniStopped}, true},
		{"stopped, with etcd away and PostgreSQL hung", patroniObservation{running: true, stopped: patroniStopped, hung: true}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decidePatroni(tc.o); got != tc.restart || why == "" {
				t.Errorf("%v, %q, want %v", got, why, tc.restart)
			}
		})
	}
}

func TestDecideServer(t *testing.T) {
	hung := func(change func(*serverObservation)) serverObservation {
		o := serverObservation{kind: postgres.Hung, wasPrimary: true, self: "n1", owner: "n2", leader: "n2", foreign: demoteAfter, woken: time.Hour}
		change(&o)
		return o
	}
	gone := func(change func(*serverObservation)) serverObservation {
		o := serverObservation{kind: postgres.Gone, self: "n1", owner: "n1", leader: "n1", down: recoverAfter, woken: time.Hour}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    serverObservation
		want serverAction
	}{
		{"an old primary hangs", hung(func(*serverObservation) {}), serverKill},
		{"the old primary answers", hung(func(o *serverObservation) { o.kind = postgres.Primary }), serverLeave},
		{"a replica hangs", hung(func(o *serverObservation) { o.wasPrimary = false }), serverLeave},
		{"Patroni still has its time", hung(func(o *serverObservation) { o.foreign = time.Second }), serverLeave},
		{"the owner hangs", hung(func(o *serverObservation) { o.owner, o.leader, o.foreign = "n1", "n1", 0 }), serverLeave},
		{"crashed, and nobody has taken over", gone(func(*serverObservation) {}), serverWake},
		{"started again, and not promoted", gone(func(o *serverObservation) { o.kind = postgres.Recovery }), serverWake},
		{"started again", gone(func(o *serverObservation) { o.kind = postgres.Primary }), serverLeave},
		{"just crashed", gone(func(o *serverObservation) { o.down = 900 * ms }), serverLeave},
		{"crashed, and another has taken over", gone(func(o *serverObservation) { o.owner = "n2" }), serverLeave},
		{"crashed, and another has the leader key", gone(func(o *serverObservation) { o.leader = "n2" }), serverLeave},
		{"Patroni was woken", gone(func(o *serverObservation) { o.woken = 0 }), serverLeave},
		{"stopped on purpose", gone(func(o *serverObservation) { o.stopping = true }), serverLeave},
		{"hangs while it is stopped on purpose", hung(func(o *serverObservation) { o.stopping = true }), serverLeave},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decideServer(tc.o); got != tc.want || got != serverLeave && why == "" {
				t.Errorf("%q, %q, want %q", got, why, tc.want)
			}
		})
	}
}

func TestDecideDisk(t *testing.T) {
	const gb = 1 << 30
	roomy := diskReplica{name: "n2", free: 50 * gb, total: 100 * gb}
	full := func(change func(*diskObservation)) diskObservation {
		o := diskObservation{primary: true, free: gb - 1, total: 100 * gb, since: switchAgain, replicas: []diskReplica{roomy}}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    diskObservation
		want string
		low  bool
		why  string
	}{
		{"low, and a replica has room", full(func(*diskObservation) {}), "n2", true, "50.0 GB on n2"},
		{"a replica's disk", full(func(o *diskObservation) { o.primary = false }), "", false, ""},
		{"room", full(func(o *diskObservation) { o.free = gb }), "", false, "room"},
		{"unknown", full(func(o *diskObservation) { o.free, o.total = 0, 0 }), "", false, ""},
		{"paused", full(func(o *diskObservation) { o.paused = true }), "", true, "paused"},
		{"a switchover is under way", full(func(o *diskObservation) { o.underWay = true }), "", true, "under way"},
		{"handed over a while ago", full(func(o *diskObservation) { o.since = switchAgain - 1 }), "", true, "hand-over"},
		{"no replica", full(func(o *diskObservation) { o.replicas = nil }), "", true, "no replica"},
		{"a replica that cannot take over", full(func(o *diskObservation) { o.replicas[0].unfit = "it is not in sync" }), "", true, "n2 cannot take over: it is not in sync"},
		{"the replica is nearly full too", full(func(o *diskObservation) { o.replicas[0].free = 2*gb - 1 }), "", true, "not clearly more"},
		{"a small disk, and twice as much on the replica", full(func(o *diskObservation) {
			o.free, o.total, o.replicas[0].free, o.replicas[0].total = 60<<20, gb, 128<<20, gb
		}), "n2", true, ""},
		{"the roomiest", full(func(o *diskObservation) {
			o.replicas = append(o.replicas, diskReplica{name: "n3", free: 60 * gb, total: 100 * gb})
		}), "n3", true, "n3"},
		{"one of two is unfit", full(func(o *diskObservation) {
			o.replicas = append(o.replicas, diskReplica{name: "n3", unfit: "it is not in sync", free: 60 * gb, total: 100 * gb})
		}), "n2", true, "n2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tc.o.replicas = append([]diskReplica(nil), tc.o.replicas...)
			if got, low, why := decideDisk(tc.o); got != tc.want || low != tc.low || !strings.Contains(why, tc.why) {
				t.Errorf("%q, %v, %q, want %q, %v, %q", got, low, why, tc.want, tc.low, tc.why)
			}
		})
	}
}

func TestDecideHold(t *testing.T) {
	const total = 1 << 30
	for _, tc := range []struct {
		name string
		o    holdObservation
		want bool
	}{
		{"ended for want of room", holdObservation{kind: postgres.Gone, down: holdAfter, free: diskHold - 1, total: total}, true},
		{"runs", holdObservation{kind: postgres.Primary, free: 0, total: total}, false},
		{"starts", holdObservation{kind: postgres.Starting, down: time.Hour, free: 0, total: total}, false},
		{"just ended", holdObservation{kind: postgres.Gone, down: holdAfter - 1, free: 0, total: total}, false},
		{"ended with room", holdObservation{kind: postgres.Gone, down: time.Hour, free: diskHold, total: total}, false},
		{"a disk that cannot be seen", holdObservation{kind: postgres.Gone, down: time.Hour}, false},
		{"held, and a little room", holdObservation{held: true, kind: postgres.Gone, down: time.Hour, free: diskGo - 1, total: total}, true},
		{"held, and room", holdObservation{held: true, kind: postgres.Gone, down: time.Hour, free: diskGo, total: total}, false},
		{"held, and the disk cannot be seen", holdObservation{held: true, kind: postgres.Unknown, down: time.Hour}, true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decideHold(tc.o); got != tc.want || got && why == "" {
				t.Errorf("%v, %q, want %v", got, why, tc.want)
			}
		})
	}
}

func TestProfiles(t *testing.T) {
	var last time.Duration
	for _, name := range cluster.Profiles {
		if err := profileOK(name); err != nil {
			t.Error(err)
		}
		if p := gate.TimersOf(name).Promise; p <= last {
			t.Errorf("profile %s promises %s, no longer than the one before", name, p)
		} else {
			last = p
		}
	}
	if err := profileOK("slow"); err == nil || !strings.Contains(err.Error(), "use one of fast, steady, wide") {
		t.Errorf("an unknown profile: %v", err)
	}
}

func TestTimersOK(t *testing.T) {
	type timers struct {
		gate             gate.Timers
		raft             embedded.Profile
		ttl, loop, retry time.Duration
	}
	for _, tc := range []struct {
		name   string
		change func(*timers)
		want   string
	}{
		{"as they are", func(*timers) {}, ""},
		{"no room for beats", func(x *timers) { x.gate.Promise = 4 * x.gate.Beat / 2 }, "three beats"},
		{"ttl too short", func(x *timers) { x.ttl = 44 * time.Second }, "ttl of 44s"},
		{"a promise as long as retry_timeout", func(x *timers) { x.gate.Promise = 20 * time.Second }, "retry_timeout of 20s"},
		{"an election as long as the promise", func(x *timers) { x.raft.Election = x.gate.Promise }, "an election of etcd"},
		{"no loop_wait", func(x *timers) { x.loop = 0 }, "loop_wait"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			x := timers{gate.TimersOf("fast"), raft, 60 * time.Second, 5 * time.Second, 20 * time.Second}
			tc.change(&x)
			err := timersOK(x.gate, x.raft, x.ttl, x.loop, x.retry)
			if tc.want == "" && err != nil || tc.want != "" && (err == nil || !strings.Contains(err.Error(), tc.want)) {
				t.Errorf("%v, want %q", err, tc.want)
			}
		})
	}
}

func TestChangeSetting(t *testing.T) {
	was := cluster.Settings{Profile: "fast", Async: true}
	got, err := changeSetting(was, ConfigChange{Key: "profile", Value: "wide"})
	if err != nil || got.Profile != "wide" || !got.Async || was.Profile != "fast" {
		t.Errorf("%+v, %v", got, err)
	}
	for _, c := range []ConfigChange{{Key: "profile", Value: "slow"}, {Key: "profile"}, {Key: "profil", Value: "fast"}, {}} {
		if _, err := changeSetting(was, c); err == nil || !strings.Contains(err.Error(), "use one of") {
			t.Errorf("%+v: %v", c, err)
		}
	}
}
