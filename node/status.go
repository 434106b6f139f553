package node

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
)

// Health is the cluster's condition in one word; its value is the exit status
// of pgha status.
type Health int

// Conditions of a cluster.
const (
	Healthy  Health = 0 // everything runs and the loss of any one node is survivable
	Degraded Health = 1 // clients are served, but something is missing
	NoLeader Health = 2 // no primary: nobody can write
	Unknown  Health = 3 // this node cannot tell
)

// String names the condition.
func (h Health) String() string {
	return [...]string{"healthy", "degraded", "no leader", "unknown"}[h]
}

// MarshalText writes the condition's name.
func (h Health) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText reads what MarshalText wrote.
func (h *Health) UnmarshalText(b []byte) error {
	for _, c := range []Health{Healthy, Degraded, NoLeader, Unknown} {
		if c.String() == string(b) {
			*h = c
			return nil
		}
	}
	return fmt.Errorf("decode health: %q is unknown", b)
}

// Status is what an operator needs to know of the cluster, as one node sees it.
type Status struct {
	Cluster   string         `json:"cluster"`
	ClusterID string         `json:"cluster_id"`
	SeenBy    string         `json:"seen_by"`
	At        time.Time      `json:"at"`
	Health    Health         `json:"health"`
	Promise   Promise        `json:"promise"`
	Leader    string         `json:"leader,omitempty"`
	Members   []MemberStatus `json:"members"`
	ReadWrite []string       `json:"read_write"` // host:port of every HAProxy
	ReadOnly  []string       `json:"read_only"`
	Survives  bool           `json:"survives_loss_of_any_node"`
	Verdict   string         `json:"verdict"`
	ToDo      []string       `json:"to_do,omitempty"`
	Waiting   string         `json:"waiting,omitempty"` // what this node's start waits for
	Problems  []string       `json:"problems,omitempty"`
	Gate      *GateStatus    `json:"gate,omitempty"`
	Paused    bool           `json:"paused,omitempty"` // automatic failover is off
	// Planned is a switchover that is to come.
	Planned *PlannedSwitchover `json:"planned_switchover,omitempty"`

	// Generation counts how often the cluster was begun anew from one node, from 1.
	Generation uint64 `json:"generation,omitempty"`
}

// Promise says what happens to acknowledged commits when a node is lost.
type Promise struct {
	Mode  string `json:"mode"`  // sync or async
	Holds bool   `json:"holds"` // the mode's promise holds at this moment
	Text  string `json:"text"`
}

// MemberStatus is one member as the cluster sees it.
type MemberStatus struct {
	Name string           `json:"name"`
	Role cluster.NodeRole `json:"role"`
	Addr netip.Addr       `json:"address"`
	// PostgresPort is where the member's PostgreSQL listens, behind HAProxy.
	PostgresPort uint16    `json:"postgres_port,omitempty"`
	Reachable    bool      `json:"reachable"` // its pgha answered just now
	Postgres     string    `json:"postgres"`  // primary, replica or "" for none
	State        string    `json:"state"`     // Patroni's word: running, streaming, starting, stopped…
	Timeline     int       `json:"timeline,omitempty"`
	LSN          uint64    `json:"lsn,omitempty"`
	LagBytes     int64     `json:"lag_bytes"` // behind the primary; -1 unknown
	Sync         bool      `json:"sync"`      // named as synchronous standby
	NoFailover   bool      `json:"nofailover,omitempty"`
	Etcd         string    `json:"etcd"` // voter, learner or none
	EtcdLeader   bool      `json:"etcd_leader,omitempty"`
	CertExpires  time.Time `json:"cert_expires,omitzero"`
	Version      string    `json:"version,omitempty"`
	// Upgrade is a new version on trial, or the last one that has failed.
	Upgrade  *UpgradeReport `json:"upgrade,omitempty"`
	Waiting  string         `json:"waiting,omitempty"`
	Problems []string       `json:"problems,omitempty"`
	// RestartPending are the parts that packages have replaced on disk, and
	// SettingsPending says that changed settings wait for a restart of PostgreSQL.
	RestartPending  []PendingRestart `json:"restart_pending,omitempty"`
	SettingsPending bool             `json:"settings_pending,omitempty"`
	// Maintenance is set while the node is in maintenance.
	Maintenance *cluster.Maintenance `json:"maintenance,omitempty"`
}

func (m MemberStatus) voter() bool { return m.Etcd == etcdVoter }

const (
	etcdVoter   = "voter"
	etcdLearner = "learner"
	etcdNone    = "none"

	pgPrimary = "primary"
	pgReplica = "replica"
)

// observation is everything that assess may look at.
type observation struct {
	quorum   bool // this node's etcd member has a leader
	viewed   bool // Patroni's keys could be read
	leader   string
	silent   string // holds Patroni's leader key, but neither its pgha nor its Patroni answers this node
	async    bool
	paused   bool
	maxLag   int64 // bytes; a replica further behind is not promoted in async mode
	members  []MemberStatus
	problems []string
}

type verdict struct {
	health   Health
	survives bool
	promise  Promise
	text     string
	todo     []string
}

// countVoters counts etcd's voters, and those of them whose pgha answers.
func countVoters(members []MemberStatus) (voters, answering int) {
	for _, m := range members {
		if m.voter() {
			voters++
			if m.Reachable {
				answering++
			}
		}
	}
	return voters, answering
}

// assess judges the cluster. It is pure: all that it says follows from o.
func assess(o observation) verdict {
	v := verdict{promise: promiseOf(o)}
	voters, answering := countVoters(o.members)
	if !o.viewed && voters > 0 && answering < voters/2+1 {
		// A learner never stands for election, and so never notices that its
		// leader is gone.
		o.viewed, o.quorum = true, false
	}
	switch {
	case !o.viewed:
		v.health = Unknown
		v.text = "this node cannot read the cluster's state"
		v.todo = append(slices.Clone(o.problems), "wait for this node to start, or ask another one: pgha status")
		return v
	case !o.quorum:
		v.health = NoLeader
		v.text = fmt.Sprintf("etcd has no quorum: %d of %d voters answer, so nobody may write", answering, voters)
		v.todo = []string{"start the voters that are down: " + strings.Join(unreachable(o.members, MemberStatus.voter), ", ")}
		return v
	case o.silent != "":
		v.health = NoLeader
		v.text = fmt.Sprintf("the primary %s does not answer: nobody can write through this node", o.silent)
		v.todo = silentToDo(o)
		return v
	case o.leader == "":
		v.health = NoLeader
		v.text = "there is no primary: nobody can write"
		v.todo = []string{"wait: a replica is promoted by itself; if none is within a minute, see why: pgha logs patroni on each data node"}
		return v
	}
	gaps := uncovered(o, voters)
	v.survives = len(gaps) == 0
	v.todo = todo(o, voters)
	switch {
	case v.survives && len(v.todo) == 0:
		v.health = Healthy
		v.text = "the loss of any one node is survivable now"
	case v.survives:
		v.health = Degraded
		v.text = "the loss of any one node is survivable now, but something needs attention"
	default:
		v.health = Degraded
		v.text = strings.Join(gaps, "; ")
	}
	return v
}

// silentToDo tells a dead primary, whose lease has to run out, from a cut link.
func silentToDo(o observation) []string {
	successor := fmt.Sprintf("if %s is down, wait: a replica takes over by itself within seconds", o.silent)
	if why := noSuccessor(o); why != "" {
		successor = fmt.Sprintf("no replica can take over: %s", why)
	}
	return []string{
		successor,
		fmt.Sprintf("bring back %s; if another node's pgha status still shows it, mend the link between it and this node", o.silent),
	}
}

// uncovered lists the single losses that would stop writes, each with its reason.
func uncovered(o observation, voters int) []string {
	var gaps []string
	for _, lost := range o.members {
		left := 0
		for _, m := range o.members {
			if m.Name != lost.Name && m.voter() && m.Reachable {
				left++
			}
		}
		if left < voters/2+1 {
			why := "etcd would lose its quorum"
			if voters == 1 && lost.voter() {
				why = "it is the only etcd voter"
			}
			gaps = append(gaps, fmt.Sprintf("the loss of %s is not covered: %s", lost.Name, why))
			continue
		}
		if lost.Name != o.leader {
			continue
		}
		if why := noSuccessor(o); why != "" {
			gaps = append(gaps, fmt.Sprintf("the loss of %s is not covered: %s", lost.Name, why))
		}
	}
	return gaps
}

// noSuccessor says why no replica could take over from the leader, or "".
func noSuccessor(o observation) string {
	var why []string
	for _, m := range o.members {
		if m.Role != cluster.RoleData || m.Name == o.leader || m.Name == o.silent {
			continue
		}
		switch {
		case !m.Reachable:
			why = append(why, m.Name+" does not answer")
		case m.Postgres != pgReplica:
			why = append(why, m.Name+" is not a running replica"+paren(m.State))
		case m.Maintenance != nil:
			why = append(why, m.Name+" is in maintenance")
		case m.NoFailover:
			why = append(why, m.Name+" is tagged nofailover")
		case o.paused:
			why = append(why, "the cluster is paused")
		case !o.async && !m.Sync:
			why = append(why, m.Name+" is not in sync yet")
		case o.async && (m.LagBytes < 0 || m.LagBytes > o.maxLag):
			why = append(why, m.Name+" lags too far behind"+paren(lagText(m.LagBytes)))
		default:
			return ""
		}
	}
	if len(why) == 0 {
		return "there is no replica"
	}
	return strings.Join(why, ", ")
}

func promiseOf(o observation) Promise {
	var sync []string
	lag, replicas := int64(0), 0
	for _, m := range o.members {
		if m.Sync && m.Reachable && m.Postgres == pgReplica {
			sync = append(sync, m.Name)
		}
		if m.Postgres == pgReplica && m.Reachable {
			replicas++
			lag = max(lag, m.LagBytes)
		}
	}
	p := Promise{Mode: "sync"}
	switch {
	case o.async && replicas == 0:
		p = Promise{Mode: "async", Text: "asynchronous, and no replica streams: the loss of the primary would lose data"}
	case o.async:
		p = Promise{Mode: "async", Holds: true,
			Text: fmt.Sprintf("asynchronous: the loss of the primary would lose what a replica has not received (now %s)", lagText(lag))}
	case o.leader == "":
		p.Text = "synchronous; there is no primary now"
	case len(sync) > 0:
		p.Holds = true
		p.Text = "synchronous: every acknowledged commit is on " + o.leader + " and " + strings.Join(sync, ", ")
	default:
		p.Text = "synchronous, but no replica is in sync now: commits are on " + o.leader + " alone"
	}
	return p
}

// todo lists what an operator should do, most urgent first.
func todo(o observation, voters int) []string {
	var out []string
	if down := unreachable(o.members, func(MemberStatus) bool { return true }); len(down) > 0 {
		out = append(out, "bring back "+strings.Join(down, ", ")+" (its pgha does not answer: is the host up? systemctl status pgha)")
	}
	data, witness, learners := 0, 0, 0
	for _, m := range o.members {
		switch {
		case m.Role == cluster.RoleWitness:
			witness++
		default:
			data++
		}
		if m.Etcd == etcdLearner {
			learners++
		}
		if m.Reachable && m.Role == cluster.RoleData && m.Postgres == "" {
			out = append(out, fmt.Sprintf("PostgreSQL is not running on %s%s: pgha logs patroni", m.Name, paren(m.State)))
		}
		if m.Reachable && !o.async && m.Postgres == pgReplica && m.Maintenance == nil && !m.Sync && m.Name != o.leader && !anySync(o.members) {
			out = append(out, fmt.Sprintf("wait until %s is in sync (lag %s)", m.Name, lagText(m.LagBytes)))
		}
		for _, p := range m.Problems {
			out = append(out, m.Name+": "+p)
		}
	}
	switch {
	case voters == 1 && data == 1:
		out = append(out, "add a second data node: pgha token create")
	case voters == 1 && learners < 2:
		out = append(out, "automatic failover is off: add a witness (pgha token create --witness)")
	case voters == 1:
		out = append(out, "wait: the new members become voters when both are in sync")
	case voters%2 == 0:
		out = append(out, fmt.Sprintf("etcd has %d voters, and the loss of either half stops it: add a member (pgha token create --witness)", voters))
	}
	out = append(out, mixedVersions(o.members)...)
	if o.paused {
		out = append(out, "automatic failover is paused: pgha resume when you are done")
	}
	return append(out, o.problems...)
}

func anySync(ms []MemberStatus) bool {
	return slices.ContainsFunc(ms, func(m MemberStatus) bool { return m.Sync && m.Reachable })
}

func unreachable(ms []MemberStatus, which func(MemberStatus) bool) []string {
	var out []string
	for _, m := range ms {
		if !m.Reachable && which(m) {
			out = append(out, m.Name)
		}
	}
	return out
}

func lagText(n int64) string {
	if n < 0 {
		return "unknown"
	}
	return FormatBytes(uint64(n))
}

func paren(s string) string {
	if s == "" {
		return ""
	}
	return " (" + s + ")"
}

// FormatBytes writes a size with a binary unit, as 0 B, 12.5 MB or 1.0 GB.
func FormatBytes(n uint64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, i := float64(n), -1
	for f >= 1024 && i < 4 {
		f /= 1024
		i++
	}
	return fmt.Sprintf("%.1f %cB", f, "KMGTP"[i])
}
