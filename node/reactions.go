package node

import (
	"fmt"
	"slices"
	"time"

	"pgha/postgres"
)

// The decisions of what a data node does by itself, at once, about its own
// PostgreSQL and Patroni. They are pure; react.go observes and acts.

const (
	// standbySilent is for how long commits wait, without a sign of life from the
	// standby that they wait for, before its node is asked.
	standbySilent = 100 * time.Millisecond
	// standbyAsks is how many questions in a row must stay without an answer.
	standbyAsks = 2
	// standbySpared is how long an answer counts.
	standbySpared = 500 * time.Millisecond
	// wakeAgain is the time between two wakes of Patroni for one reason.
	wakeAgain = time.Second
)

// standbyAction is what to do about a synchronous standby.
type standbyAction string

const (
	standbyLeave standbyAction = ""
	standbyAsk   standbyAction = "ask its node"
	standbyDrop  standbyAction = "end its replication"
	standbyWake  standbyAction = "wake Patroni"
)

// standbyObservation is what decideStandbyLost looks at.
type standbyObservation struct {
	primary   bool          // this node owns the gate, and its PostgreSQL takes writes
	waiting   time.Duration // for how long commits have waited for a standby without a break; 0 = none waits
	connected bool          // the standby has a replication connection
	silent    time.Duration // for how long it has shown no sign of life there while commits waited
	spared    bool          // its node has answered a moment ago
	asked     int           // questions to its node in a row that were not answered
	woken     time.Duration // since Patroni was last woken for it
}

// decideStandbyLost says what to do about a synchronous standby that commits may
// wait for in vain. A host that is gone leaves its replication connection open
// until wal_sender_timeout, and Patroni sees only that: the connection is ended
// when neither it nor the standby's node gives a sign of life, and Patroni, which
// decides, is woken to look. A standby that is slow is left alone as long as its
// node answers.
func decideStandbyLost(o standbyObservation) (standbyAction, string) {
	short := func(d time.Duration) time.Duration { return d.Round(time.Millisecond) }
	switch {
	case !o.primary:
		return standbyLeave, "this node is not the primary"
	case o.waiting == 0:
		return standbyLeave, "no commit waits"
	case !o.connected && o.waiting < standbySilent:
		return standbyLeave, "it has only just gone"
	case !o.connected && o.woken < wakeAgain:
		return standbyLeave, "Patroni was woken"
	case !o.connected:
		return standbyWake, fmt.Sprintf("commits have waited for %s for a synchronous standby that is not connected", short(o.waiting))
	case o.silent < standbySilent:
		return standbyLeave, "it shows signs of life"
	case o.spared:
		return standbyLeave, "its node answers: it is slow, not gone"
	case o.asked < standbyAsks:
		return standbyAsk, fmt.Sprintf("commits wait, and it has been silent for %s", short(o.silent))
	}
	return standbyDrop, fmt.Sprintf("commits wait, it has been silent for %s, and its node has not answered %d times", short(o.silent), o.asked)
}

// standbyWatch makes the observations from one probe to the next.
type standbyWatch struct {
	since time.Duration // when commits began to wait; 0 = none waits
	by    map[string]*standbyState
}

type standbyState struct {
	reply time.Time     // the last sign of life, by the standby's clock
	heard time.Duration // when it was seen, by this node's
	asked int
	spare time.Duration // until when its node's last answer counts
	woken time.Duration // when Patroni was woken; 0 = never
}

// see takes a probe. standbys are those that must confirm commits. It returns
// what is to be decided on, by name.
func (w *standbyWatch) see(p postgres.Probe, primary bool, standbys []string) map[string]standbyObservation {
	if !primary || p.SyncWaiting == 0 {
		w.since = 0
	} else if w.since == 0 {
		w.since = p.At
	}
	out, by := map[string]standbyObservation{}, map[string]*standbyState{}
	for _, name := range standbys {
		s := w.by[name]
		if s == nil {
			s = &standbyState{}
		}
		by[name] = s
		o := standbyObservation{primary: primary, woken: time.Hour}
		for _, r := range p.Replicas {
			if r.Name != name {
				continue
			}
			o.connected = true
			if !r.ReplyTime.Equal(s.reply) {
				s.reply, s.heard, s.asked = r.ReplyTime, p.At, 0
			}
		}
		if s.woken != 0 {
			o.woken = p.At - s.woken
		}
		if w.since == 0 {
			s.asked = 0
		} else {
			o.waiting = max(p.At-w.since, 1)
			o.silent = p.At - max(s.heard, w.since)
		}
		o.spared, o.asked = p.At < s.spare, s.asked
		out[name] = o
	}
	w.by = by
	return out
}

const (
	// patroniStopped is for how long Patroni must have been seen stopped.
	patroniStopped = 500 * time.Millisecond
	// stalledLoops is how many rounds Patroni may miss.
	stalledLoops = 3
)

// patroniObservation is what decidePatroni looks at.
type patroniObservation struct {
	running bool
	up      time.Duration // since it was started
	stopped time.Duration // for how long it has been seen stopped by a signal
	session time.Duration // since it last renewed its session in etcd; 0 = unknown
	loop    time.Duration // Patroni's loop_wait
	quorum  time.Duration // for how long etcd has answered this node without a break
	hung    bool          // PostgreSQL hangs
}

// decidePatroni says whether Patroni must be killed and started again, which
// PostgreSQL does not notice. A slow answer of its API is no evidence: a stopped
// process is, and rounds that it missed although etcd was there.
func decidePatroni(o patroniObservation) (bool, string) {
	late := stalledLoops * o.loop
	switch {
	case !o.running:
		return false, "it does not run"
	case o.stopped >= patroniStopped:
		return true, fmt.Sprintf("it has been stopped by a signal for %s", o.stopped.Round(time.Millisecond))
	case o.session == 0 || o.loop == 0 || o.session <= late:
		return false, "it goes its rounds"
	case o.up <= late:
		return false, "it has only just started"
	case o.quorum <= late:
		return false, "etcd was not there"
	case o.hung:
		return false, "it waits for PostgreSQL, which hangs"
	}
	return true, fmt.Sprintf("it has not renewed its session for %s, with rounds of %s", o.session, o.loop)
}

// recoverAfter is how long a crashed PostgreSQL is left to a successor.
const recoverAfter = time.Second

// serverObservation is what decideServer looks at.
type serverObservation struct {
	kind     postgres.Kind
	self     string        // this node
	owner    string        // of the gate; "" = unknown
	leader   string        // by Patroni's key; "" = nobody
	down     time.Duration // for how long it has been gone, or no primary, on the owner with the leader key
	stopping bool          // it is being stopped, or restarted, on purpose
	woken    time.Duration // since Patroni was last woken for it
}

// decideServer says whether Patroni is to be woken because PostgreSQL has
// crashed: it starts it again, and need not wait for its next round once no
// successor has come.
func decideServer(o serverObservation) (bool, string) {
	switch {
	case o.stopping || o.owner != o.self || o.leader != o.self || o.down < recoverAfter || o.woken < wakeAgain:
	case o.kind == postgres.Gone:
		return true, "PostgreSQL has crashed and nobody has taken over"
	case o.kind == postgres.Recovery:
		return true, "PostgreSQL runs and is not promoted yet"
	}
	return false, ""
}

// quorumObservation is what decideWithoutQuorum looks at.
type quorumObservation struct {
	held    bool          // Patroni is held already
	quorum  bool          // the gate's last transaction went through
	primary bool          // this node owns the gate, which is open, and PostgreSQL takes writes
	agreed  bool          // all other members keep off
	paused  bool          // Patroni is paused, and would not demote
	lost    time.Duration // for how long no transaction has gone through
	retry   time.Duration // Patroni's retry_timeout; 0 = unknown
}

// decideWithoutQuorum says whether Patroni has to stand still because etcd has
// no quorum: after retry_timeout it would demote a primary that all other
// members leave alone. The gate is the fence, and needs no Patroni to shut. Once
// Patroni stands still it does so until there is a quorum: without one it could
// do nothing but wait.
func decideWithoutQuorum(o quorumObservation) (bool, string) {
	switch {
	case o.quorum:
		return false, "etcd has a quorum"
	case o.held:
		return true, "waiting for a quorum of etcd"
	case !o.primary:
		return false, "there is no primary here to keep"
	case o.paused:
		return false, "Patroni is paused"
	case !o.agreed:
		return false, "not everybody agrees to keep off"
	case o.retry == 0:
		return false, "it is not known for how long Patroni tries"
	case o.lost < o.retry/2:
		return false, "Patroni tries on"
	}
	return true, "waiting for a quorum of etcd, which has been lost for " + o.lost.Round(time.Second).String()
}

const (
	// switchAgain is how long after a hand-over for want of disk the next may be.
	switchAgain = 10 * time.Minute
	// walFile is the size of a file of WAL, unless initdb was told another.
	walFile = 16 << 20
	// A server that ended with less than diskHold left is not started again until
	// there is diskGo.
	diskHold = 2 * walFile
	diskGo   = 4 * walFile
	// holdAfter is how long a server must have been down for want of disk, or
	// holdEnds how often it must have ended for that within holdWindow: one that is
	// started anew may get as far as a replica each time, and ends with its
	// promotion.
	holdAfter  = 10 * time.Second
	holdEnds   = 2
	holdWindow = time.Minute
)

// lowWAL is below how many bytes a file system of total bytes has too little
// left for WAL: a twentieth, but four WAL files at least and 1 GB at most.
func lowWAL(total uint64) uint64 { return min(max(total/20, 4*walFile), 1<<30) }

// diskReplica is a replica that might be better off.
type diskReplica struct {
	name        string
	unfit       string // why it cannot be promoted; "" = it can
	free, total uint64
}

// diskObservation is what decideDisk looks at.
type diskObservation struct {
	primary     bool // this node owns the gate, and its PostgreSQL takes writes
	paused      bool // Patroni is paused
	underWay    bool // a switchover is under way
	free, total uint64
	since       time.Duration // since the last hand-over for want of disk
	replicas    []diskReplica
}

// decideDisk names the replica to hand the primary over to because this node's
// disk fills up, "" for none. With low it says that the disk is low in any case.
func decideDisk(o diskObservation) (candidate string, low bool, reason string) {
	if !o.primary || o.total == 0 || o.free >= lowWAL(o.total) {
		return "", false, "there is room"
	}
	have := FormatBytes(o.free) + " are left for PostgreSQL's WAL"
	switch {
	case o.paused:
		return "", true, have + ", and Patroni is paused"
	case o.underWay:
		return "", true, have + ", and a switchover is under way"
	case o.since < switchAgain:
		return "", true, have + ", and a hand-over was tried " + o.since.Round(time.Second).String() + " ago"
	}
	reason = have + ", and there is no replica"
	var best uint64
	for _, r := range o.replicas {
		switch {
		case r.unfit != "":
			reason = have + ", and " + r.name + " cannot take over: " + r.unfit
		case r.free < 2*max(lowWAL(r.total), o.free):
			reason = have + ", and " + r.name + " has not clearly more: " + FormatBytes(r.free)
		case r.free > best:
			best, candidate = r.free, r.name
		}
	}
	if candidate != "" {
		reason = have + ", and " + FormatBytes(best) + " on " + candidate
	}
	return candidate, true, reason
}

// holdObservation is what decideHold looks at.
type holdObservation struct {
	held        bool
	kind        postgres.Kind
	down        time.Duration // since PostgreSQL last answered as primary or replica
	ends        int           // how often it has ended within holdWindow with less than diskHold left
	free, total uint64
}

// decideHold says whether Patroni has to wait until there is room: without it
// PostgreSQL ends at each start.
func decideHold(o holdObservation) (bool, string) {
	why := fmt.Sprintf("waiting for disk space: PostgreSQL cannot run with %s left for its WAL; free some room, and it starts by itself with %s", FormatBytes(o.free), FormatBytes(diskGo))
	switch {
	case o.total == 0:
		return o.held, why // unknown: as before
	case o.held:
		return o.free < diskGo, why
	case o.kind == postgres.Gone && o.free < diskHold && (o.down >= holdAfter || o.ends >= holdEnds):
		return true, why
	}
	return false, ""
}

// diskEnds counts how often a server has ended for want of disk.
type diskEnds struct {
	was postgres.Kind
	at  []time.Duration
}

// see takes a probe, and returns how often it was within holdWindow.
func (e *diskEnds) see(p postgres.Probe, now time.Duration) int {
	if p.Kind == postgres.Gone && e.was != postgres.Gone && e.was != "" && p.DiskTotal > 0 && p.DiskFree < diskHold {
		e.at = append(e.at, now)
	}
	e.was = p.Kind
	e.at = slices.DeleteFunc(e.at, func(at time.Duration) bool { return now-at > holdWindow })
	return len(e.at)
}
