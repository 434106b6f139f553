package node

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"time"

	"pgha/cluster"
	"pgha/embedded"
	"pgha/internal/host"
	"pgha/patroni"
	"pgha/pki"
	"pgha/postgres"
	"pgha/supervisor"
)

// Report is what a node knows of itself. Peers ask for it; status is made of
// the reports of all members.
type Report struct {
	Name     string           `json:"name"`
	Role     cluster.NodeRole `json:"role"`
	Version  string           `json:"version"`
	PID      int              `json:"pid"` // of the daemon
	At       time.Time        `json:"at"`
	Started  time.Time        `json:"started"` // of the daemon's program, in this process
	Upgrade  *UpgradeReport   `json:"upgrade,omitempty"`
	Waiting  string           `json:"waiting,omitempty"`
	Problems []string         `json:"problems,omitempty"`
	Etcd     EtcdReport       `json:"etcd"`
	Postgres PostgresReport   `json:"postgres,omitzero"`
	Children []ChildReport    `json:"children,omitempty"`
	Certs    []CertReport     `json:"certificates"`
	Trusted  []CAReport       `json:"trusted_cas,omitempty"` // the one that signs first
	// Unconfirmed is what the node still has to do for a rotation; "" for nothing.
	Unconfirmed string      `json:"unconfirmed,omitempty"`
	Gate        *GateReport `json:"gate,omitempty"` // of a data node
	// RestartPending are the parts that packages have replaced on disk.
	RestartPending []PendingRestart `json:"restart_pending,omitempty"`
}

// EtcdReport is the state of a node's etcd member. Indexes are raft's.
type EtcdReport struct {
	State     string `json:"state"` // "running", or what is wrong
	MemberID  uint64 `json:"member_id,string"`
	HasLeader bool   `json:"has_leader"`
	IsLeader  bool   `json:"is_leader"`
	Learner   bool   `json:"learner"`
	Applied   uint64 `json:"applied"`
	Committed uint64 `json:"committed"`
	DBSize    int64  `json:"db_size"` // bytes
}

// PostgresReport is what the node's Patroni says of its PostgreSQL.
type PostgresReport struct {
	State          string `json:"state"`
	Role           string `json:"role"` // primary, replica, or "" while it does not run
	Timeline       int    `json:"timeline"`
	LSN            uint64 `json:"lsn"` // written by a primary, received by a replica
	PendingRestart bool   `json:"pending_restart"`
	Postmaster     int    `json:"postmaster,omitempty"` // process id
	// DiskFree and DiskTotal are of the file system of its WAL, in bytes; 0 when
	// not known.
	DiskFree  uint64 `json:"disk_free,omitempty"`
	DiskTotal uint64 `json:"disk_total,omitempty"`
}

// ChildReport is the state of a supervised process.
type ChildReport struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`
	Reason   string    `json:"reason,omitempty"`
	PID      int       `json:"pid,omitempty"`
	Since    time.Time `json:"since"`
	Restarts int       `json:"restarts"`
	Adopted  bool      `json:"adopted"`
}

// report gathers what this node knows of itself. It needs no quorum and no
// peer, and ends within a second or two whatever hangs.
func (n *Node) report(ctx context.Context) Report {
	n.mu.Lock()
	r := Report{Name: n.cfg.Name, Role: n.cfg.Role, Version: Version, PID: os.Getpid(), At: time.Now(), Started: n.started, Upgrade: n.image.report(), Waiting: n.waiting, Etcd: EtcdReport{State: n.etcdState}}
	for _, part := range slices.Sorted(maps.Keys(n.problems)) {
		r.Problems = append(r.Problems, part+": "+n.problems[part])
	}
	r.Unconfirmed = n.rotation.why
	n.mu.Unlock()
	r.Trusted = n.trusted()
	r.Problems = append(r.Problems, n.diskProblems()...)
	if srv := n.etcd.Load(); srv != nil {
		if st, err := srv.Status(ctx); err == nil {
			r.Etcd = etcdReport(r.Etcd.State, st)
			for _, a := range st.Alarms {
				r.Problems = append(r.Problems, "etcd alarm: "+a)
			}
		}
	}
	for _, role := range n.cfg.Role.Roles() {
		if b, err := n.pki.Bundle(role); err == nil {
			r.Certs = append(r.Certs, certReport(role, b))
			if left := time.Until(b.Leaf.NotAfter); left < pki.LeafLifetime/6 {
				r.Problems = append(r.Problems, fmt.Sprintf("certificate %s ends in %s and was not renewed", role, left.Round(time.Hour)))
			}
		}
	}
	if n.cfg.Role != cluster.RoleData {
		return r
	}
	for _, p := range []*supervisor.Process{n.patroni, n.haproxy} {
		st := p.Status()
		r.Children = append(r.Children, ChildReport{
			Name: st.Name, State: st.State.String(), Reason: st.Reason, PID: st.PID, Since: st.Since, Restarts: st.Restarts, Adopted: st.Adopted,
		})
		if st.State == supervisor.Failed || st.State == supervisor.BackingOff {
			r.Problems = append(r.Problems, fmt.Sprintf("%s does not stay up: %s", st.Name, st.Reason))
		}
	}
	r.RestartPending = n.pendingRestarts(ctx)
	r.Postgres = n.postgresReport(ctx, n.cfg.Address, n.cfg.Ports.Patroni)
	if n.keeper != nil { // not before the daemon runs
		r.Postgres = r.Postgres.seen(n.keeper.watcher.Latest())
		r.Gate = n.keeper.report(ctx)
	}
	return r
}

// noPatroni is the state of a PostgreSQL whose Patroni does not answer, as while
// it takes over renewed certificates.
const noPatroni = "patroni does not answer"

// seen adds what this node sees of its PostgreSQL itself.
func (r PostgresReport) seen(p postgres.Probe) PostgresReport {
	r.DiskFree, r.DiskTotal = p.DiskFree, p.DiskTotal
	if p.Kind == postgres.Primary || p.Kind == postgres.Recovery {
		r.Postmaster = p.PID
	}
	if r.State != noPatroni {
		return r
	}
	switch p.Kind {
	case postgres.Primary:
		r.Role, r.Timeline, r.LSN = pgPrimary, p.Timeline, p.WriteLSN
	case postgres.Recovery:
		r.Role, r.Timeline, r.LSN = pgReplica, p.Timeline, p.ReceivedLSN
	}
	return r
}

// postgresReport asks the Patroni at an address.
func (n *Node) postgresReport(ctx context.Context, addr netip.Addr, port uint16) PostgresReport {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	st, err := n.restClient(n.snapshot(), addr, port).Status(ctx)
	if err != nil {
		return PostgresReport{State: noPatroni}
	}
	r := PostgresReport{State: st.State, Timeline: st.Timeline, LSN: max(st.Location, st.ReceivedLocation), PendingRestart: st.PendingRestart}
	if st.State == "running" || st.State == "streaming" {
		r.Role = pgReplica
		if st.Role == patroni.RoleLeader {
			r.Role = pgPrimary
		}
	}
	return r
}

func etcdReport(state string, st embedded.Status) EtcdReport {
	return EtcdReport{
		State: state, MemberID: st.MemberID, HasLeader: st.HasLeader, IsLeader: st.IsLeader, Learner: st.Learner,
		Applied: st.Applied, Committed: st.Committed, DBSize: st.DBSize,
	}
}

// lowDisk is the part of a file system below which a node says that its disk
// is nearly full.
const lowDisk = 0.05

func (n *Node) diskProblems() []string {
	dirs := []string{n.paths.Lib}
	if n.cfg.Role == cluster.RoleData {
		dirs = append(dirs, n.cfg.Postgres.DataDir)
	}
	for _, d := range dirs {
		free, total, err := host.DiskFree(d)
		if err == nil && total > 0 && float64(free)/float64(total) < lowDisk {
			return []string{fmt.Sprintf("disk nearly full: %s has %s left of %s", d, FormatBytes(free), FormatBytes(total))}
		}
	}
	return nil
}

// staleView is how old the last look at Patroni's keys may be. A round of reads
// that fails is the normal price of a change of etcd's leader.
const staleView = 10 * time.Second

// status asks every member for its report and judges the whole.
func (n *Node) status(ctx context.Context) Status {
	if b := n.isBarred(); b != nil {
		return n.barredStatus(*b)
	}
	if r := n.removal.Load(); r != nil {
		return n.removedStatus(*r)
	}
	w := n.snapshot()
	reports := n.seen.ask(ctx, w.Members)
	self := n.report(ctx)
	reports[n.cfg.Name] = self
	s := Status{Cluster: n.state.ClusterName, ClusterID: n.state.ClusterID, SeenBy: n.cfg.Name, At: time.Now(), Waiting: self.Waiting}
	o := observation{async: w.Settings.Async, maxLag: patroni.MaxLagOnFailover, paused: w.View.Paused}
	var etcd embedded.Status
	if srv := n.etcd.Load(); srv != nil {
		if st, err := srv.Status(ctx); err == nil {
			etcd = st
			o.quorum = st.HasLeader
			o.viewed = !st.HasLeader || time.Since(w.ViewedAt) < staleView
		}
	}
	o.leader, o.silent = n.primary(ctx, w, reports)
	for _, m := range w.Members {
		o.members = append(o.members, memberStatus(m, w.View, etcd, o.leader, reports))
	}
	o.problems = append(maintenanceToDo(w.Members, time.Now()), ghosts(w.Members, etcd.Members)...)
	if !o.viewed {
		o.problems = append(o.problems, self.Problems...)
	}
	v := assess(o)
	s.Members, s.Leader = o.members, o.leader
	s.Health, s.Promise, s.Survives, s.Verdict, s.ToDo = v.health, v.promise, v.survives, v.text, append(v.todo, waitingRestarts(o.members)...)
	s.Generation = n.generation().Number
	s.Problems, s.Paused, s.Planned = self.Problems, w.View.Paused, w.Planned
	s.ToDo = append(s.ToDo, caToDo(w)...)
	if !hasMajority(o) {
		s.ToDo = append(s.ToDo, n.advice(w.Members, reports)...)
	}
	if s.Gate = gateStatus(reports); s.Gate != nil {
		s.Gate.Failovers = n.failovers(ctx, 5)
	}
	for _, m := range w.Members {
		if m.Role == cluster.RoleData {
			s.ReadWrite = append(s.ReadWrite, hostPort(m.Addr, m.Ports.ReadWrite))
			s.ReadOnly = append(s.ReadOnly, hostPort(m.Addr, m.Ports.ReadOnly))
		}
	}
	return s
}

// leaderOf names the primary: the holder of Patroni's leader key, unless its
// own node says that its PostgreSQL is not (yet, or any more) a primary.
func leaderOf(v patroni.ClusterView, reports map[string]Report) string {
	if r, ok := reports[v.Leader]; ok && r.Postgres.Role != pgPrimary {
		return ""
	}
	return v.Leader
}

// primary returns the primary that serves, or the holder of the leader key that
// answers nothing. PostgreSQL outlives pgha: a primary whose pgha is silent is
// asked through its Patroni.
func (n *Node) primary(ctx context.Context, w world, reports map[string]Report) (leader, silent string) {
	leader = leaderOf(w.View, reports)
	if _, answered := reports[leader]; answered {
		return leader, ""
	}
	for _, m := range w.Members {
		if m.Name == leader && n.postgresReport(ctx, m.Addr, m.Ports.Patroni).Role != pgPrimary {
			return "", leader
		}
	}
	return leader, ""
}

func memberStatus(m cluster.Member, v patroni.ClusterView, etcd embedded.Status, leader string, reports map[string]Report) MemberStatus {
	s := MemberStatus{Name: m.Name, Role: m.Role, Addr: m.Addr, Version: m.Version, Etcd: etcdNone, LagBytes: -1, Maintenance: m.Maintenance}
	for _, e := range etcd.Members {
		if e.Name != m.Name && e.PeerURL != m.PeerURL() {
			continue
		}
		s.Etcd = etcdVoter
		if e.Learner {
			s.Etcd = etcdLearner
		}
		s.EtcdLeader = e.ID == etcd.LeaderID
	}
	s.Sync = slices.Contains(v.Sync.Standbys, m.Name)
	for _, k := range v.Members {
		if k.Name == m.Name {
			s.State, s.Timeline, s.LSN, s.NoFailover = k.State, k.Timeline, k.XLogLocation, k.Tags["nofailover"] == true
		}
	}
	r, ok := reports[m.Name]
	if !ok {
		s.State = ""
		if m.Name == leader { // its Patroni has said so
			s.Postgres = pgPrimary
		}
		if m.State == cluster.StateJoining {
			s.Waiting = "it has not finished joining"
		}
		return s
	}
	s.Reachable, s.Version, s.Waiting, s.Problems, s.Upgrade = true, r.Version, r.Waiting, r.Problems, r.Upgrade
	if m.Role == cluster.RoleData {
		s.PostgresPort = m.Ports.Postgres
		s.Postgres, s.State = r.Postgres.Role, r.Postgres.State
		s.RestartPending, s.SettingsPending = r.RestartPending, r.Postgres.PendingRestart
		if r.Postgres.Timeline != 0 {
			s.Timeline, s.LSN = r.Postgres.Timeline, r.Postgres.LSN
		}
		s.LagBytes = lagOf(m.Name, s.LSN, leader, v, reports)
	}
	for _, c := range r.Certs {
		if s.CertExpires.IsZero() || c.NotAfter.Before(s.CertExpires) {
			s.CertExpires = c.NotAfter
		}
	}
	return s
}

// lagOf is how many bytes a member is behind the primary, or behind what the
// primary last wrote to etcd where the primary does not answer; -1 if unknown.
func lagOf(name string, lsn uint64, leader string, v patroni.ClusterView, reports map[string]Report) int64 {
	if name == leader {
		return 0
	}
	if lsn == 0 {
		return -1
	}
	head := v.Status.Optime
	if r, ok := reports[leader]; ok && leader != "" {
		head = max(head, r.Postgres.LSN)
	}
	if head <= lsn {
		return 0
	}
	return int64(head - lsn)
}

// ghosts names etcd members that no node of the roster stands behind: they
// count as voters, and eat the tolerance for failures.
func ghosts(roster []cluster.Member, members []embedded.Member) []string {
	var out []string
	for _, e := range members {
		if !slices.ContainsFunc(roster, func(m cluster.Member) bool { return m.Name == e.Name || m.PeerURL() == e.PeerURL }) {
			out = append(out, fmt.Sprintf("etcd has a member %q (%s) that is no node of this cluster: pgha member remove %x", e.Name, e.PeerURL, e.ID))
		}
	}
	return out
}
