package embedded

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Members of the tables: a, b, c... are voters, x, y learners that have made
// themselves known, u one that has not.
func testMember(name string, id uint64, learner bool) Member {
	return Member{ID: id, Name: name, PeerURL: "https://" + name, ClientURL: "https://c" + name, Learner: learner, Started: true}
}

var (
	va, vb, vc, vd = testMember("a", 1, false), testMember("b", 2, false), testMember("c", 3, false), testMember("d", 4, false)
	lx, ly         = testMember("x", 11, true), testMember("y", 12, true)
	lu             = Member{ID: 13, PeerURL: "https://u", Learner: true}
	lw             = Member{ID: 14, Name: "w", PeerURL: "https://w", Learner: true, Started: true} // a witness
)

func TestDecideMembership(t *testing.T) {
	const committed = 5000
	all := map[string]bool{"a": true, "b": true, "c": true, "d": true, "x": true, "y": true, "w": true, "https://u": true}
	without := func(name string) map[string]bool {
		out := map[string]bool{}
		for k := range all {
			out[k] = k != name
		}
		return out
	}
	tests := []struct {
		name    string
		members []Member
		change  func(o *MembershipObservation)
		want    MembershipAction
		reason  string // part of it; "-" = none at all
	}{
		{name: "nothing known", reason: "not known"},
		{name: "one voter alone", members: []Member{va}, reason: "failover is off: add a second node and a witness"},
		{
			name: "one learner waits for a witness", members: []Member{va, lx},
			reason: "automatic failover is off: add a witness (pgha token create --witness)",
		},
		{
			name: "the witness came first", members: []Member{va, lw},
			reason: "automatic failover is off: add a second node (pgha token create)",
		},
		{
			name: "two in sync go together", members: []Member{va, lx, ly},
			want: MembershipAction{Promote: []uint64{11, 12}}, reason: "from 1 to 3 voters",
		},
		{
			name: "a learner that reports its index runs, known by name or not", members: []Member{va, lx, lu},
			want: MembershipAction{Promote: []uint64{11, 13}},
		},
		{
			name: "at the edge of in sync", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { o.Applied[11] = committed - inSyncDistance },
			want:   MembershipAction{Promote: []uint64{11, 12}},
		},
		{
			name: "ahead of a commit index read earlier", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { o.Applied[11] = committed + 3 },
			want:   MembershipAction{Promote: []uint64{11, 12}},
		},
		{
			name: "one is behind", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { o.Applied[12] = committed - inSyncDistance - 1 },
			reason: "waiting for y to catch up (101 entries behind)",
		},
		{
			name: "one does not answer", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { delete(o.Reachable, 11) }, reason: "waiting for x to answer",
		},
		{
			name: "one has not reported", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { delete(o.Applied, 11) }, reason: "waiting for x to report",
		},
		{
			name: "one has not started", members: []Member{va, lx, lu},
			change: func(o *MembershipObservation) { delete(o.Applied, 13) }, reason: "waiting for https://u to start",
		},
		{
			name: "both are missing", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { o.Reachable = nil }, reason: "waiting for x to answer; waiting for y to answer",
		},
		{
			name: "interrupted between two promotions", members: []Member{va, vb, lx},
			want: MembershipAction{Promote: []uint64{11}}, reason: "2 voters bear no more losses than 1",
		},
		{
			name: "an even number takes one of two, not both", members: []Member{va, vb, lx, ly},
			want: MembershipAction{Promote: []uint64{11}},
		},
		{
			name: "an even number before a ghost", members: []Member{va, vb, lx, ly},
			change: func(o *MembershipObservation) { o.Expected = without("y") },
			want:   MembershipAction{Promote: []uint64{11}},
		},
		{
			name: "two voters, learner behind", members: []Member{va, vb, lx},
			change: func(o *MembershipObservation) { o.Applied[11] = 0 }, reason: "than 1: waiting for x to catch up",
		},
		{name: "two voters, no learner", members: []Member{va, vb}, reason: "add a member"},
		{name: "three voters", members: []Member{va, vb, vc}, reason: "-"},
		{name: "the fourth is held back", members: []Member{va, vb, vc, lx}, reason: "x stays a learner until another member joins"},
		{
			name: "three and two become five", members: []Member{va, vb, vc, lx, ly},
			want: MembershipAction{Promote: []uint64{11, 12}}, reason: "from 3 to 5 voters",
		},
		{
			name: "four voters and one make five", members: []Member{va, vb, vc, vd, lx},
			want: MembershipAction{Promote: []uint64{11}},
		},
		{
			name: "a learner outside the roster goes", members: []Member{va, lx, ly},
			change: func(o *MembershipObservation) { o.Expected = without("x") },
			want:   MembershipAction{Remove: 11}, reason: "removing x: it is not in the roster",
		},
		{
			name: "a join between its steps may stay", members: []Member{va, lx, lu},
			change: func(o *MembershipObservation) {
				delete(o.Applied, 13)
				o.Expected, o.NotStartedFor[13] = without("https://u"), ghostAge
			},
			reason: "add a witness",
		},
		{
			name: "a ghost goes", members: []Member{va, lx, lu},
			change: func(o *MembershipObservation) {
				delete(o.Applied, 13)
				o.Expected, o.NotStartedFor[13] = without("https://u"), ghostAge+time.Second
			},
			want: MembershipAction{Remove: 13},
		},
		{
			name: "an expected member may take its time to start", members: []Member{va, lx, lu},
			change: func(o *MembershipObservation) {
				delete(o.Applied, 13)
				o.NotStartedFor[13] = 24 * time.Hour
			},
			reason: "waiting for https://u to start",
		},
		{
			name: "a learner outside the roster is never promoted", members: []Member{va, vb, lx},
			change: func(o *MembershipObservation) { o.Expected = without("x") },
			want:   MembershipAction{Remove: 11},
		},
		{
			name: "a voter is never removed", members: []Member{va, vb, vc},
			change: func(o *MembershipObservation) {
				o.Expected, o.NotStartedFor[3] = without("c"), 24*time.Hour
			},
			reason: "-",
		},
		{
			name: "an unreadable roster removes nobody", members: []Member{va, lx, lu},
			change: func(o *MembershipObservation) {
				delete(o.Applied, 13)
				o.Expected, o.NotStartedFor[13] = nil, 24*time.Hour
			},
			reason: "waiting for https://u to start",
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := MembershipObservation{
				Members: tt.members, Committed: committed, Expected: all,
				Reachable: map[uint64]bool{}, Applied: map[uint64]uint64{}, NotStartedFor: map[uint64]time.Duration{},
			}
			for _, m := range tt.members {
				o.Reachable[m.ID], o.Applied[m.ID] = true, committed
			}
			if tt.change != nil {
				tt.change(&o)
			}
			got, reason := DecideMembership(o)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("action (-want +got):\n%s(%s)", diff, reason)
			}
			if tt.reason == "-" && reason != "" || !strings.Contains(reason, strings.Trim(tt.reason, "-")) {
				t.Errorf("reason %q, want %q in it", reason, tt.reason)
			}
			if got.None() != (got.Remove == 0 && len(got.Promote) == 0) {
				t.Errorf("None is %v for %+v", got.None(), got)
			}
		})
	}
}

func TestDecideLeaderPlacement(t *testing.T) {
	witness := Member{ID: 9, Name: "w", PeerURL: "https://w", Started: true}
	base := func() PlacementObservation {
		return PlacementObservation{
			Members: []Member{va, vb, witness, lx}, LeaderID: 1, PostgresLeader: "a",
			Reachable: map[uint64]bool{1: true, 2: true, 9: true, 11: true},
			Applied:   map[uint64]uint64{1: 5000, 2: 5000, 9: 4990, 11: 5000},
			Committed: 5000, SinceLastMove: time.Minute, MinInterval: 10 * time.Second,
		}
	}
	tests := []struct {
		name   string
		change func(o *PlacementObservation)
		want   uint64
		reason string
	}{
		{"to the witness for choice, though another is further", func(*PlacementObservation) {}, 9, "from a to w; PostgreSQL's leader is a"},
		{"the witness is away", func(o *PlacementObservation) { delete(o.Reachable, 9) }, 2, "to b"},
		{"the witness is behind", func(o *PlacementObservation) { o.Applied[9] = 100 }, 2, "to b"},
		{"the witness is unknown", func(o *PlacementObservation) { delete(o.Applied, 9) }, 2, "to b"},
		{"to the voter that is further", func(o *PlacementObservation) {
			o.Members, o.Applied[3], o.Reachable[3] = []Member{va, vb, vc}, 5001, true
		}, 3, "to c"},
		{"never to a learner", func(o *PlacementObservation) { o.Members = []Member{va, lx} }, 0, "only voter"},
		{"nobody in sync", func(o *PlacementObservation) { o.Applied = nil }, 0, "no other voter"},
		{"from another data node to the witness", func(o *PlacementObservation) { o.LeaderID = 2 }, 9, "from b to w; PostgreSQL's leader is a"},
		{"elsewhere, and the witness is away", func(o *PlacementObservation) { o.LeaderID = 2; delete(o.Reachable, 9) }, 0, "off PostgreSQL's leader"},
		{"elsewhere, and there is no witness", func(o *PlacementObservation) {
			o.LeaderID, o.Members, o.Applied[3], o.Reachable[3] = 2, []Member{va, vb, vc}, 5001, true
		}, 0, "off PostgreSQL's leader"},
		{"already on the witness", func(o *PlacementObservation) { o.LeaderID = 9 }, 0, "is on the witness"},
		{"no etcd leader", func(o *PlacementObservation) { o.LeaderID = 0 }, 0, "no leader"},
		{"no PostgreSQL leader", func(o *PlacementObservation) { o.PostgresLeader = "" }, 0, "PostgreSQL has no known leader"},
		{"a leader that is not listed", func(o *PlacementObservation) { o.LeaderID = 77 }, 0, "not among the members"},
		{"too soon", func(o *PlacementObservation) { o.SinceLastMove = 9 * time.Second }, 0, "was moved 9s ago"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			o := base()
			tt.change(&o)
			got, reason := DecideLeaderPlacement(o)
			if got != tt.want || !strings.Contains(reason, tt.reason) {
				t.Errorf("got %d, %q; want %d, %q in it", got, reason, tt.want, tt.reason)
			}
		})
	}
}
