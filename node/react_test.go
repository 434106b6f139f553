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
	gone := func(change func(*serverObservation)) serverObservation {
		o := serverObservation{kind: postgres.Gone, self: "n1", owner: "n1", leader: "n1", down: recoverAfter, woken: time.Hour}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    serverObservation
		want bool
	}{
		{"crashed, and nobody has taken over", gone(func(*serverObservation) {}), true},
		{"started again, and not promoted", gone(func(o *serverObservation) { o.kind = postgres.Recovery }), true},
		{"started again", gone(func(o *serverObservation) { o.kind = postgres.Primary }), false},
		{"just crashed", gone(func(o *serverObservation) { o.down = 900 * ms }), false},
		{"crashed, and another has taken over", gone(func(o *serverObservation) { o.owner = "n2" }), false},
		{"crashed, and another has the leader key", gone(func(o *serverObservation) { o.leader = "n2" }), false},
		{"Patroni was woken", gone(func(o *serverObservation) { o.woken = 0 }), false},
		{"stopped on purpose", gone(func(o *serverObservation) { o.stopping = true }), false},
		{"hangs", gone(func(o *serverObservation) { o.kind = postgres.Hung }), false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decideServer(tc.o); got != tc.want || got && why == "" {
				t.Errorf("%v, %q, want %v", got, why, tc.want)
			}
		})
	}
}

func TestDecideWithoutQuorum(t *testing.T) {
	lost := func(change func(*quorumObservation)) quorumObservation {
		o := quorumObservation{primary: true, agreed: true, lost: 10 * time.Second, retry: 20 * time.Second}
		change(&o)
		return o
	}
	for _, tc := range []struct {
		name string
		o    quorumObservation
		want bool
	}{
		{"lost for half of what Patroni tries", lost(func(*quorumObservation) {}), true},
		{"lost for less", lost(func(o *quorumObservation) { o.lost-- }), false},
		{"a quorum", lost(func(o *quorumObservation) { o.quorum, o.lost = true, 0 }), false},
		{"a replica, or a gate that is shut", lost(func(o *quorumObservation) { o.primary = false }), false},
		{"not everybody agrees", lost(func(o *quorumObservation) { o.agreed = false }), false},
		{"paused", lost(func(o *quorumObservation) { o.paused = true }), false},
		{"an unknown time", lost(func(o *quorumObservation) { o.retry = 0 }), false},
		{"held", quorumObservation{held: true}, true},
		{"held, and agreed no more", quorumObservation{held: true, primary: true, lost: time.Hour, retry: 20 * time.Second}, true},
		{"held, and a quorum", quorumObservation{held: true, quorum: true}, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got, why := decideWithoutQuorum(tc.o); got != tc.want || why == "" {
				t.Errorf("%v, %q, want %v", got, why, tc.want)
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
		{"has ended for want of room twice", holdObservation{kind: postgres.Gone, ends: holdEnds, free: diskHold - 1, total: total}, true},
		{"has ended once", holdObservation{kind: postgres.Gone, ends: holdEnds - 1, free: 0, total: total}, false},
		{"has ended twice, and there is room now", holdObservation{kind: postgres.Gone, ends: holdEnds, free: diskHold, total: total}, false},
		{"has ended twice, and is a replica for a moment", holdObservation{kind: postgres.Recovery, ends: holdEnds, free: 0, total: total}, false},
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

// TestDiskEnds: what counts is a server that is seen to have ended with too
// little room.
func TestDiskEnds(t *testing.T) {
	var e diskEnds
	now := time.Hour
	see := func(kind postgres.Kind, free uint64, total uint64, want int, what string) {
		t.Helper()
		now += time.Second
		if got := e.see(postgres.Probe{Kind: kind, DiskFree: free, DiskTotal: total}, now); got != want {
			t.Errorf("%s: %d, want %d", what, got, want)
		}
	}
	see(postgres.Gone, 0, 1<<30, 0, "gone when it was first looked at")
	see(postgres.Recovery, 0, 1<<30, 0, "runs")
	see(postgres.Gone, diskHold-1, 1<<30, 1, "has ended")
	see(postgres.Gone, diskHold-1, 1<<30, 1, "is still gone")
	see(postgres.Starting, 0, 1<<30, 1, "is started")
	see(postgres.Gone, diskHold, 1<<30, 1, "has ended with room")
	see(postgres.Recovery, 0, 1<<30, 1, "runs")
	see(postgres.Gone, 0, 0, 1, "has ended, and the disk cannot be seen")
	see(postgres.Unknown, 0, 1<<30, 1, "is not known")
	see(postgres.Gone, 0, 1<<30, 2, "has ended again")
	now += holdWindow - 6*time.Second
	see(postgres.Gone, 0, 1<<30, 1, "the first is long ago")
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
