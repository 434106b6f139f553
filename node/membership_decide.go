package node

import (
	"fmt"
	"slices"

	"pgha/cluster"
	"pgha/patroni"
)

// leaveObservation is what the decisions about a node that is to go look at.
type leaveObservation struct {
	members   int // on the roster, the one that goes included
	voters    int
	answering int  // voters that answer, the one that goes included
	learners  int  // other members that answer and could become voters
	voter     bool // the one that goes is a voter
	silent    bool // and does not answer
	leader    bool // it is the primary
	successor string
	noSuccess string // why nobody can take over
	data      bool   // it is a data node
	copies    int    // other data nodes whose PostgreSQL runs
	noPrimary bool   // nobody is the primary now
	allowEven bool   // the operator accepts an even number of voters
}

// decideLeave says whether a node may go, with the reason if not.
func decideLeave(o leaveObservation) (bool, string) {
	if o.members <= 1 {
		return true, "this is the last node: the cluster ends with it"
	}
	if why := quorumWithout(o); why != "" {
		return false, why
	}
	switch {
	case o.leader && o.successor == "":
		return false, "it is the primary and nobody can take over: " + o.noSuccess
	case o.data && o.noPrimary:
		return false, "there is no primary now, and it may have the newest data: wait for a failover (pgha status), or see pgha failover"
	case o.data && o.copies == 0:
		return false, "it is the last data node with data: add another one first (pgha token create) and wait until it is in sync"
	}
	if why := evenWithout(o); why != "" {
		return false, why
	}
	return true, ""
}

// quorumWithout says why etcd's voters cannot do without a member, or "".
func quorumWithout(o leaveObservation) string {
	others := o.answering
	if !o.silent {
		others--
	}
	switch {
	case !o.voter:
		return ""
	case o.voters == 1:
		return "it is the only etcd voter: the others would lose the cluster. Reset the others first, or add a witness so that they become voters"
	case others < (o.voters-1)/2+1:
		return fmt.Sprintf("only %d of %d voters answer: without this one the cluster would lose its quorum", o.answering, o.voters)
	}
	return ""
}

// evenWithout says why the number of voters that would remain is a bad one, or
// "". A learner that answers takes the empty place at once.
func evenWithout(o leaveObservation) string {
	left := o.voters - 1
	if !o.voter || o.allowEven || left%2 != 0 || left == 0 || o.learners > 0 {
		return ""
	}
	return fmt.Sprintf("%d voters would remain, and the loss of either half of an even number stops the cluster: put another node in its place with pgha member replace, add one first (pgha token create, or --witness), or accept it with --allow-even", left)
}

// removeObservation is what decideRemove looks at.
type removeObservation struct {
	leaveObservation
	name    string
	known   []string // the nodes of the roster
	ghost   bool     // no node of the roster, but etcd or Patroni has something of it
	self    bool
	joining bool   // its join has not finished, and its etcd member has never run
	etcd    uint64 // its etcd member, 0 = it has none
}

// decideRemove says why another node cannot be taken out, or nil.
func decideRemove(o removeObservation) error {
	switch {
	case o.self:
		return refused(cluster.CodeBadRequest, "%s is this node: pgha leave takes it out, or run this on another node", o.name)
	case !slices.Contains(o.known, o.name) && !o.ghost:
		return unknownNode(o.name, o.known)
	case o.joining:
		return nil
	}
	if ok, why := decideLeave(o.leaveObservation); !ok {
		return refused(cluster.CodeConflict, "%s cannot be removed: %s", o.name, why)
	}
	return nil
}

// replaceObservation is what decideReplace looks at.
type replaceObservation struct {
	leaveObservation
	name    string
	known   []string
	self    bool
	joining bool
	answers bool // its pgha or its Patroni answers this node
	owner   bool // the gate or Patroni's leader key is its own still
	role    cluster.NodeRole
	as      cluster.NodeRole // what the operator wants in its place; "" = the same
	etcd    uint64           // its etcd member, 0 = it has none
	token   string           // the id of the one that it joined with
}

// decideReplace says why another node cannot take the place of one, or nil. It
// holds when the token is made, and again when it is used.
func decideReplace(o replaceObservation) error {
	conflict := func(format string, args ...any) error {
		return refused(cluster.CodeConflict, o.name+" cannot be replaced: "+format, args...)
	}
	switch {
	case !slices.Contains(o.known, o.name):
		return unknownNode(o.name, o.known)
	case o.self:
		return refused(cluster.CodeBadRequest, "%s is this node: run this on another one", o.name)
	case o.as != "" && o.as != o.role:
		return refused(cluster.CodeBadRequest, "%s is a %s node, and its place is taken by one of the same kind: leave --witness away, or add it", o.name, o.role)
	case o.joining:
		return conflict("it has not finished joining: pgha member remove %s, then a new token", o.name)
	case o.answers:
		return conflict("it answers, and only a node that is gone for good is replaced like this: stop it first; or pgha leave on it, then pgha token create")
	case o.owner:
		return conflict("it is still the primary as far as the cluster knows: wait until a replica has taken over (pgha status), or see pgha failover")
	}
	if why := quorumWithout(o.leaveObservation); why != "" {
		return conflict("%s", why)
	}
	if o.data && o.copies == 0 {
		return conflict("no other data node runs that has the data")
	}
	return nil
}

// observeLeave looks at what the decisions about a node's going need.
func (n *Node) observeLeave(s Status, name string) leaveObservation {
	o := leaveObservation{members: len(s.Members), leader: s.Leader == name, noPrimary: s.Leader == ""}
	o.voters, o.answering = countVoters(s.Members)
	for _, m := range s.Members {
		switch {
		case m.Name == name:
			o.voter, o.silent, o.data = m.voter(), !m.Reachable, m.Role == cluster.RoleData
			continue
		case m.Etcd == etcdLearner && m.Reachable:
			o.learners++
		}
		if m.Role == cluster.RoleData && m.Reachable && m.Postgres != "" {
			o.copies++
		}
	}
	w := n.snapshot()
	oo := observation{leader: s.Leader, async: w.Settings.Async, paused: w.View.Paused, maxLag: patroni.MaxLagOnFailover, members: s.Members}
	if o.noSuccess = noSuccessor(oo); o.noSuccess == "" {
		o.successor = "yes"
	}
	return o
}
