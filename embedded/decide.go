package embedded

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

const (
	// inSyncDistance is how many raft entries a learner may be behind and still
	// count as in sync: what a busy cluster commits between two reports. etcd
	// itself asks for nine tenths of the log.
	inSyncDistance = 100
	// ghostAge is how long a member that nobody expects may stay without ever
	// having run: a join can be between two of its steps.
	ghostAge = 10 * time.Minute
)

// MembershipObservation is what DecideMembership looks at.
type MembershipObservation struct {
	Members   []Member
	Reachable map[uint64]bool   // the member answered its API lately
	Applied   map[uint64]uint64 // raft applied index that each member reported; missing = unknown
	Committed uint64            // the leader's committed index
	// Expected holds the names or peer URLs of the roster. Empty means that the
	// roster could not be read: then nobody is removed.
	Expected      map[string]bool
	NotStartedFor map[uint64]time.Duration // how long a member has been listed without having run
}

// MembershipAction is one change of membership; the zero value is none.
type MembershipAction struct {
	Promote []uint64 // one or two learners, back to back
	Remove  uint64   // one learner
}

// None reports whether there is nothing to do.
func (a MembershipAction) None() bool { return len(a.Promote) == 0 && a.Remove == 0 }

// DecideMembership keeps the number of voters odd and takes out learners that do
// not belong. It returns one action and, also when there is none, a reason to
// show to the operator ("" when all is well). It never removes a voter.
//
//  1. An even number of voters is an interrupted promotion or replacement: the
//     first learner in sync is promoted at once.
//  2. A learner that is not in the roster is removed, one that never ran only
//     after ten minutes.
//  3. Two learners in sync are promoted together; a single one is held back.
func DecideMembership(o MembershipObservation) (MembershipAction, string) {
	vs := voters(o.Members)
	if len(vs) == 0 {
		return MembershipAction{}, "the membership is not known"
	}
	var ready, waiting, unexpected []Member
	for _, m := range o.Members {
		switch {
		case !m.Learner:
		case len(o.Expected) > 0 && !o.Expected[m.Name] && !o.Expected[m.PeerURL]:
			unexpected = append(unexpected, m)
		case o.why(m) == "":
			ready = append(ready, m)
		default:
			waiting = append(waiting, m)
		}
	}
	even := len(vs)%2 == 0
	if even && len(ready) > 0 {
		return MembershipAction{Promote: []uint64{ready[0].ID}},
			fmt.Sprintf("promoting %s: %d voters bear no more losses than %d", ready[0].label(), len(vs), len(vs)-1)
	}
	for _, m := range unexpected {
		if m.Started || o.NotStartedFor[m.ID] > ghostAge {
			return MembershipAction{Remove: m.ID}, fmt.Sprintf("removing %s: it is not in the roster", m.label())
		}
	}
	if !even && len(ready) >= 2 {
		return MembershipAction{Promote: []uint64{ready[0].ID, ready[1].ID}},
			fmt.Sprintf("promoting %s and %s: from %d to %d voters", ready[0].label(), ready[1].label(), len(vs), len(vs)+2)
	}
	return MembershipAction{}, o.standing(vs, ready, waiting)
}

// why returns what a learner lacks, "" when it is in sync. A learner that
// reports its applied index runs, whether or not its name is known yet: that
// comes through the leader and can take seven seconds longer.
func (o MembershipObservation) why(m Member) string {
	applied, known := o.Applied[m.ID]
	switch {
	case !known && !m.Started:
		return "to start"
	case !o.Reachable[m.ID]:
		return "to answer"
	case !known:
		return "to report how far it is"
	case o.Committed > applied && o.Committed-applied > inSyncDistance:
		return fmt.Sprintf("to catch up (%d entries behind)", o.Committed-applied)
	default:
		return ""
	}
}

// standing says why nothing is done.
func (o MembershipObservation) standing(vs, ready, waiting []Member) string {
	var waits []string
	for _, m := range waiting {
		waits = append(waits, "waiting for "+m.label()+" "+o.why(m))
	}
	wait := strings.Join(waits, "; ")
	learners := len(ready) + len(waiting)
	switch {
	case len(vs)%2 == 0 && learners == 0:
		return fmt.Sprintf("%d voters bear no more losses than %d: add a member (pgha token create, or --witness)", len(vs), len(vs)-1)
	case len(vs)%2 == 0:
		return fmt.Sprintf("%d voters bear no more losses than %d: %s", len(vs), len(vs)-1, wait)
	case learners >= 2:
		return wait
	case len(vs) == 1 && learners == 0:
		return "automatic failover is off: add a second node and a witness (pgha token create, pgha token create --witness)"
	case len(vs) == 1 && isWitness(slices.Concat(ready, waiting)[0]):
		return join("automatic failover is off: add a second node (pgha token create)", wait)
	case len(vs) == 1:
		return join("automatic failover is off: add a witness (pgha token create --witness)", wait)
	case learners == 1:
		return join(fmt.Sprintf("%s stays a learner until another member joins: %d voters bear no more losses than %d",
			slices.Concat(ready, waiting)[0].label(), len(vs)+1, len(vs)), wait)
	default:
		return ""
	}
}

func join(a, b string) string {
	if b == "" {
		return a
	}
	return a + "; " + b
}

// isWitness tells a witness by what it lacks: a client listener.
func isWitness(m Member) bool { return m.Started && m.ClientURL == "" }

// PlacementObservation is what DecideLeaderPlacement looks at.
type PlacementObservation struct {
	Members        []Member
	LeaderID       uint64            // etcd leader, 0 = none
	PostgresLeader string            // member name of PostgreSQL's leader; "" = none or unknown
	Reachable      map[uint64]bool   // the member answered its API lately
	Applied        map[uint64]uint64 // raft applied index that each member reported; missing = unknown
	Committed      uint64            // the leader's committed index
	SinceLastMove  time.Duration     // since pgha last moved the leader
	MinInterval    time.Duration     // no move sooner than this after the last one
}

// DecideLeaderPlacement keeps the etcd leader on the witness, where there is
// one: the data nodes may lose each other while both still see the witness, and
// a PostgreSQL leader that does not see the etcd leader is demoted. At least
// the leader is kept off the host of PostgreSQL's leader, so that losing that
// host costs no election; without a witness it goes to the voter that is
// furthest. It returns the voter to move to, or 0 and why the leader stays.
func DecideLeaderPlacement(o PlacementObservation) (target uint64, reason string) {
	vs := voters(o.Members)
	switch {
	case o.LeaderID == 0:
		return 0, "etcd has no leader"
	case len(vs) < 2:
		return 0, "the only voter leads"
	case o.PostgresLeader == "":
		return 0, "PostgreSQL has no known leader"
	}
	i := slices.IndexFunc(o.Members, func(m Member) bool { return m.ID == o.LeaderID })
	if i < 0 {
		return 0, "the etcd leader is not among the members"
	}
	leader := o.Members[i]
	if isWitness(leader) {
		return 0, "the etcd leader is on the witness"
	}
	sync := MembershipObservation{Reachable: o.Reachable, Applied: o.Applied, Committed: o.Committed}
	candidates := slices.DeleteFunc(vs, func(m Member) bool {
		return m.ID == o.LeaderID || sync.why(m) != "" || leader.Name != o.PostgresLeader && !isWitness(m)
	})
	switch {
	case len(candidates) == 0 && leader.Name != o.PostgresLeader:
		return 0, "the etcd leader is off PostgreSQL's leader, and no witness is reachable and in sync"
	case len(candidates) == 0:
		return 0, "no other voter is reachable and in sync"
	case o.SinceLastMove < o.MinInterval:
		return 0, fmt.Sprintf("the etcd leader was moved %s ago, the next move may come after %s", o.SinceLastMove, o.MinInterval)
	}
	best := slices.MinFunc(candidates, func(a, b Member) int {
		switch {
		case isWitness(a) != isWitness(b):
			if isWitness(a) {
				return -1
			}
			return 1
		case o.Applied[a.ID] > o.Applied[b.ID]:
			return -1
		case o.Applied[a.ID] < o.Applied[b.ID]:
			return 1
		case a.ID < b.ID:
			return -1
		default:
			return 1
		}
	})
	return best.ID, fmt.Sprintf("moving the etcd leader from %s to %s; PostgreSQL's leader is %s", leader.label(), best.label(), o.PostgresLeader)
}
