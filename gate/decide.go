package gate

import (
	"fmt"
	"slices"
	"time"
)

// observation is all that a decision looks at.
type observation struct {
	self string
	now  Moment
	view View
	t    Timers

	silent   time.Duration // for how long the record has not changed, by this node's clock
	quorum   time.Duration // for how long this node's own transactions have gone through
	oath     time.Duration // for how long this node has yet to keep off; 0 = no promise given
	cooldown time.Duration // for how long yet, after a promotion that failed here

	local    Local
	localAge time.Duration // since local.At

	// As owner.
	sinceBeat time.Duration // since the last beat was sent
	stalled   time.Duration // for how long PostgreSQL has not become writable under this ownership
	hung      time.Duration // for how long PostgreSQL has been hung
	kernel    bool          // the kernel is known to be shut
	admitted  bool          // a promotion was allowed here and has not been seen
	wantOpen  bool          // a beat is wanted at once
}

// freshLocal is the age up to which knowledge of the local PostgreSQL counts.
const freshLocal = time.Second

// waited says whether everything that the record's owner has promised is over,
// and how long that will take if not. A record that says shut is over at once.
func waited(o observation, margin bool) (bool, time.Duration) {
	r := o.view.Record
	if r == nil || r.State == Shut {
		return true, 0
	}
	need := r.Promise()
	if margin {
		need += Margin(need)
	}
	return o.silent >= need, max(need-o.silent, 0)
}

// holdsLeader says whether Patroni's leader key allows self to own the gate.
// While Patroni is paused a primary goes on without the key.
func holdsLeader(self string, v View) bool {
	return v.Leader == self || (v.Paused && v.Leader == "")
}

// decideTakeover says whether this node may take the gate and the leader key
// from an owner that is gone, with the reason if not. Overwriting the leader key
// passes by every check of Patroni's own, so all of them stand here.
func decideTakeover(o observation, g guards) (bool, string) {
	v := o.view
	if v.Record == nil {
		return false, "the gate has no owner yet"
	}
	owner := v.Record.Owner
	switch {
	case owner == o.self:
		return false, "this node is the owner"
	case v.Paused:
		return false, "Patroni is paused"
	case v.NoFailover:
		return false, "this node is tagged nofailover"
	case o.local.Stopping:
		return false, "this node is being stopped"
	case v.Target != "" && v.Target != o.self:
		return false, "a switchover to " + v.Target + " is under way"
	case v.Leader != "" && v.Leader != owner:
		return false, "the leader key names " + v.Leader + ": Patroni decides"
	}
	if ok, left := waited(o, g.on(guardMargin)); !ok {
		return false, fmt.Sprintf("%s may still be open for %s", owner, left.Round(time.Millisecond))
	}
	switch {
	case o.oath > 0:
		return false, fmt.Sprintf("this node has promised %s to keep off for %s", owner, o.oath.Round(time.Millisecond))
	case o.quorum < o.t.Settle && g.on(guardQuorum):
		return false, fmt.Sprintf("this node has had a quorum for only %s", o.quorum.Round(time.Millisecond))
	case o.cooldown > 0:
		return false, fmt.Sprintf("a promotion has failed here; next try in %s", o.cooldown.Round(time.Second))
	case o.local.Process != Recovery:
		return false, "PostgreSQL here is " + string(o.local.Process) + ", not a running replica"
	case o.localAge > freshLocal:
		return false, fmt.Sprintf("PostgreSQL here has not been heard of for %s", o.localAge.Round(time.Millisecond))
	case !o.local.PatroniUp:
		return false, "Patroni here does not answer"
	case v.Lease == 0:
		return false, "Patroni here has no session in etcd"
	case v.Timeline == 0 && o.local.Timeline != 0 && v.Synchronous && v.Record.State == Shut:
		// A PostgreSQL that has stopped has none. Whoever is in the sync key has
		// confirmed its commits, and so is on its timeline.
	case v.Timeline == 0 || v.Timeline != o.local.Timeline:
		return false, fmt.Sprintf("PostgreSQL here is on timeline %d, that of %s on %d", o.local.Timeline, owner, v.Timeline)
	}
	return hasAll(o)
}

// hasAll says whether this replica has all the commits that it must have.
func hasAll(o observation) (bool, string) {
	v := o.view
	if v.Synchronous {
		switch {
		case v.Sync.Leader != v.Record.Owner:
			return false, "the sync key is not of " + v.Record.Owner
		case !slices.Contains(v.Sync.Standbys, o.self):
			return false, "this node is not a synchronous standby: it may lack acknowledged commits"
		case v.Sync.Quorum > 0:
			return false, "no single synchronous standby is sure to have every commit"
		}
		return true, "synchronous standby with every acknowledged commit"
	}
	if lag := int64(v.Optime - o.local.Received); v.Optime > o.local.Received && uint64(lag) > v.MaxLag {
		return false, fmt.Sprintf("this node lacks %d bytes, more than maximum_lag_on_failover %d", lag, v.MaxLag)
	}
	// It must have been streaming when the owner was heard of last.
	if lost := o.now.Mono - o.local.StreamedAt; o.local.StreamedAt == 0 || lost > o.silent+freshLocal+o.t.Promise {
		return false, fmt.Sprintf("this node had stopped streaming %s before %s was lost", (lost - o.silent).Round(time.Millisecond), v.Record.Owner)
	}
	return true, "asynchronous standby within bounds"
}

// decideClaim says whether the holder of the leader key may become owner. It
// serves promotions that Patroni has decided on.
func decideClaim(o observation, g guards) (bool, string) {
	v := o.view
	switch {
	case v.Leader != o.self:
		return false, "this node does not hold the leader key"
	case v.Record == nil:
		return false, "the gate has no owner yet"
	case v.Record.Owner == o.self:
		return false, "this node is the owner"
	case o.oath > 0:
		return false, fmt.Sprintf("this node has promised to keep off for %s", o.oath.Round(time.Millisecond))
	case o.local.Process == Primary && v.Record.Last != o.self && v.Record.Last != "":
		// It was frozen or cut off while others went on, and Patroni gives the key
		// to whoever is a primary without looking at what it lacks. It comes back
		// as a replica first, which Patroni checks.
		return false, "PostgreSQL here takes writes and has not been admitted"
	case o.local.Process != Recovery && o.local.Process != Primary:
		return false, "PostgreSQL here is " + string(o.local.Process)
	}
	if ok, left := waited(o, g.on(guardMargin)); !ok {
		return false, fmt.Sprintf("%s may still be open for %s", v.Record.Owner, left.Round(time.Millisecond))
	}
	return true, "holds the leader key, and the promise of " + v.Record.Owner + " is over"
}

// decideCreate says whether this node may write a cluster's first record.
func decideCreate(o observation) (bool, string) {
	switch {
	case o.view.Record != nil:
		return false, "there is a record"
	case o.view.Leader != o.self:
		return false, "this node does not hold the leader key"
	case o.oath > 0:
		return false, "this node has promised to keep off"
	case o.local.Process != Primary && o.local.Process != Recovery:
		return false, "PostgreSQL here is " + string(o.local.Process)
	case o.silent < o.t.Promise+Margin(o.t.Promise):
		// It may have been deleted under a living owner.
		return false, "the record has not been missing for long"
	}
	return true, "the leader of a cluster without a record"
}

// decideOwner says what an owner does next: Beat, Release or None.
func decideOwner(o observation) (Kind, string) {
	v := o.view
	if why := surrender(o); why != "" {
		switch {
		case v.Record.State == Shut:
			return None, why
		case !o.kernel:
			return None, why + "; shutting the gate first"
		}
		return Release, why
	}
	if o.wantOpen || o.sinceBeat >= o.t.Beat {
		return Beat, "due"
	}
	return None, ""
}

// surrender gives the reason for which an owner must shut its gate and say so,
// or "".
func surrender(o observation) string {
	v := o.view
	switch {
	case !holdsLeader(o.self, v):
		return "the leader key names " + orNobody(v.Leader)
	case o.local.Process == Gone && o.local.Restarting:
		return "" // it comes back by itself in a moment, on this node
	case o.local.Process == Gone:
		return "PostgreSQL is gone"
	case o.local.Process == Hung && o.hung >= o.t.Hung && v.Successor:
		return fmt.Sprintf("PostgreSQL has not answered for %s", o.hung.Round(time.Second))
	case o.local.Process == Recovery && o.stalled >= 3*o.t.Help:
		return fmt.Sprintf("PostgreSQL has not been promoted within %s", o.stalled.Round(time.Second))
	}
	return ""
}

func orNobody(name string) string {
	if name == "" {
		return "nobody"
	}
	return name
}

// help is what a node does about a Patroni that does not do its part.
type help string

const (
	helpNone           help = ""
	helpRestartPatroni help = "restart Patroni"
	helpStopPostgres   help = "stop PostgreSQL"
	helpGiveUp         help = "give up"
)

// decideHelp says what to do about a promotion, or a demotion, that does not
// happen. helped counts the times that Patroni was started again for it;
// foreign is for how long another node has been the owner.
func decideHelp(o observation, helped int, foreign time.Duration) (help, string) {
	v := o.view
	owner := v.Record != nil && v.Record.Owner == o.self
	switch {
	case owner && v.Leader == o.self && o.local.Process == Recovery && o.stalled >= 3*o.t.Help:
		return helpGiveUp, fmt.Sprintf("PostgreSQL has not been promoted within %s", o.stalled.Round(time.Second))
	case owner && v.Leader == o.self && o.local.Process == Recovery && o.stalled >= o.t.Help && helped == 0:
		return helpRestartPatroni, fmt.Sprintf("PostgreSQL has not been promoted within %s", o.stalled.Round(time.Millisecond))
	case v.Record != nil && !owner && !v.Paused && o.local.writable() && foreign >= o.t.Help && helped == 0:
		// One that hangs hears neither its Patroni nor a signal to stop.
		return helpStopPostgres, fmt.Sprintf("%s is the owner and PostgreSQL here has not been demoted within %s", v.Record.Owner, foreign.Round(time.Millisecond))
	case v.Record != nil && !owner && o.admitted && foreign >= o.t.Help && helped == 0:
		// A promotion that has begun does not end with Patroni.
		return helpStopPostgres, "it may still act on a permission to promote that is no longer good"
	}
	return helpNone, ""
}
