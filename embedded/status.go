package embedded

import (
	"context"

	"go.etcd.io/etcd/api/v3/version"
	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
)

// Member is one member of the etcd cluster.
type Member struct {
	ID        uint64
	Name      string // "" until the member has made itself known
	PeerURL   string
	ClientURL string // "" on a witness, and until it has made itself known
	Learner   bool
	Started   bool // has made itself known through the leader at least once
}

// label is how messages to the operator call a member.
func (m Member) label() string {
	if m.Name != "" {
		return m.Name
	}
	return m.PeerURL
}

// Status is this member's own view, which can lag behind the leader's.
type Status struct {
	MemberID, LeaderID, ClusterID uint64 // LeaderID 0: none known
	Learner                       bool
	Term, Applied, Committed      uint64
	DBSize, DBInUse               int64 // bytes on disk, bytes in use
	Members                       []Member
	Alarms                        []string // "NOSPACE" (quota reached), "CORRUPT"; empty until this member is known
	HasLeader, IsLeader           bool
	Version                       string // of this server
	ClusterVersion                string // "" until decided
}

type dbSizes struct{ size, inUse int64 }

// Status reads memory alone: it needs no quorum and does not wait, not even for
// a defragmentation (but for the moment in which a snapshot is taken over). It
// fails with Err or ErrStopped when the member has ended.
func (s *Server) Status(ctx context.Context) (Status, error) {
	if err := s.ended(); err != nil {
		return Status{}, err
	}
	if err := ctx.Err(); err != nil {
		return Status{}, err
	}
	es := s.es
	sizes := s.sizes()
	st := Status{
		MemberID: uint64(es.MemberID()), LeaderID: uint64(es.Leader()), ClusterID: uint64(es.Cluster().ID()),
		Term: es.Term(), Applied: es.AppliedIndex(), Committed: es.CommittedIndex(),
		DBSize: sizes.size, DBInUse: sizes.inUse,
		Members: s.members(), Version: version.Version,
	}
	st.HasLeader, st.IsLeader = st.LeaderID != 0, st.LeaderID == st.MemberID
	for _, m := range st.Members {
		if m.ID == st.MemberID {
			st.Learner = m.Learner
		}
	}
	if v := es.ClusterVersion(); v != nil {
		st.ClusterVersion = v.String()
	}
	select {
	case <-es.ReadyNotify():
		for _, a := range es.Alarms() {
			st.Alarms = append(st.Alarms, a.GetAlarm().String())
		}
	default:
		// etcd replaces its alarm store, without a lock, when it takes over the
		// leader's snapshot. A joining or returning member does that before it
		// makes itself known.
	}
	return st, nil
}

// sizes returns the last known ones while a defragmentation holds the database.
func (s *Server) sizes() dbSizes {
	if last := s.lastSizes.Load(); s.defrag.Load() && last != nil {
		return *last
	}
	be := s.es.Backend()
	sizes := dbSizes{size: be.Size(), inUse: be.SizeInUse()}
	s.lastSizes.Store(&sizes)
	return sizes
}

func (s *Server) members() []Member {
	var out []Member
	for _, m := range s.es.Cluster().Members() {
		out = append(out, fromEtcd(m))
	}
	return out
}

func fromEtcd(m *membership.Member) Member {
	return newMember(uint64(m.ID), m.Name, m.PeerURLs, m.ClientURLs, m.IsLearner)
}

func newMember(id uint64, name string, peerURLs, clientURLs []string, learner bool) Member {
	m := Member{ID: id, Name: name, Learner: learner, Started: name != ""}
	if len(peerURLs) > 0 {
		m.PeerURL = peerURLs[0]
	}
	if len(clientURLs) > 0 {
		m.ClientURL = clientURLs[0]
	}
	return m
}
