package cluster

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"pgha/embedded"
)

// stopBound is far from what a stop takes and well below etcd's own 7 s.
const stopBound = 5 * time.Second

// gatewayWatch opens a watch over the HTTP gateway, as Patroni does, and returns
// when etcd has confirmed it. The channel is closed when the watch ends.
func gatewayWatch(t *testing.T, c *testCluster, url string) <-chan struct{} {
	t.Helper()
	transport := &http.Transport{TLSClientConfig: c.ca.Client(t, "patroni")}
	t.Cleanup(transport.CloseIdleConnections)
	resp, err := (&http.Client{Transport: transport}).Post(url+"/v3/watch", "application/json",
		strings.NewReader(`{"create_request":{"key":"Zm9v"}}`))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = resp.Body.Close() })
	body := bufio.NewReader(resp.Body)
	line, err := body.ReadString('\n')
	if err != nil || !strings.Contains(line, `"created":true`) {
		t.Fatalf("watch: %q, %v", line, err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = io.Copy(io.Discard, body) // how it ends is no matter
	}()
	return ended
}

// timeStop stops a member and wants its clients' streams to end with it.
func timeStop(t *testing.T, what string, s *embedded.Server, watches ...<-chan struct{}) {
	t.Helper()
	begin := time.Now()
	s.Stop()
	for _, ended := range watches {
		if ended != nil {
			<-ended
		}
	}
	took := time.Since(begin)
	t.Logf("%s: stopped in %s", what, took)
	if took > stopBound {
		t.Errorf("%s: stop took %s", what, took)
	}
	if err := s.Err(); err != nil {
		t.Errorf("%s: Err is %v after Stop", what, err)
	}
	if _, err := s.Status(within(t)); !errors.Is(err, embedded.ErrStopped) {
		t.Errorf("%s: Status gives %v, want ErrStopped", what, err)
	}
}

func TestStopWithOpenWatches(t *testing.T) {
	c := newCluster(t)
	all := c.grow(t)
	watches := map[*member]<-chan struct{}{}
	for _, m := range all[:2] {
		watches[m] = gatewayWatch(t, c, m.cfg.ClientURL)
		m.Client().Watch(context.Background(), "foo")
	}
	lead := leaderOf(t, all)
	timeStop(t, "leader", lead.Server, watches[lead])
	rest := leaderOf(t, all)
	timeStop(t, "second, without another for quorum after it", rest.Server, watches[rest])
	for _, m := range all {
		if m != lead && m != rest {
			timeStop(t, "last, without quorum", m.Server, watches[m])
		}
	}
}

func TestStopWithoutQuorum(t *testing.T) {
	c := newCluster(t)
	all := c.grow(t)
	n1 := all[0]
	watch := gatewayWatch(t, c, n1.cfg.ClientURL)
	all[1].Stop()
	all[2].Stop()
	eventually(t, "n1 without a leader", func() bool { return !status(t, n1.Server).HasLeader })
	pending := make(chan error, 1)
	go func() {
		_, err := n1.Client().Put(context.Background(), "k", "v")
		pending <- err
	}()
	timeStop(t, "without quorum", n1.Server, watch)
	if err := <-pending; err == nil {
		t.Error("a write without quorum succeeded")
	}

	// Started with two of three away it never gets ready, and stops all the same.
	n1.Server = start(t, n1.cfg)
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	err := n1.WaitReady(ctx)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "no leader yet: a majority of the 3 voters") {
		t.Errorf("WaitReady gives %v, want the deadline and what it waits for", err)
	}
	timeStop(t, "before it was ready", n1.Server)
}

// TestStopWithFrozenPeer: the leader hands over to a member that is connected
// and does not move any more.
func TestStopWithFrozenPeer(t *testing.T) {
	c := newCluster(t)
	first := c.config(1, true)
	first.Bootstrap = true
	n1 := start(t, first)
	ready(t, n1)
	second := c.config(2, true)
	added, _, err := n1.AddLearner(within(t), second.PeerURL)
	if err != nil {
		t.Fatal(err)
	}
	child := startChild(t, second)
	if err := n1.Promote(within(t), added.ID); err != nil {
		t.Fatal(err)
	}
	put(t, n1.Client(), "k", "v") // with the child's vote
	if err := child.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if !status(t, n1).IsLeader {
		t.Fatal("n1 does not lead")
	}
	timeStop(t, "leader beside a frozen peer", n1)
}

func TestStopLeavesNothingAndRestarts(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	c := newCluster(t)
	cfg := c.config(1, false)
	cfg.Bootstrap = true
	for range 3 {
		s, err := embedded.Start(within(t), cfg)
		if err != nil {
			t.Fatal(err)
		}
		ready(t, s)
		put(t, s.Client(), "k", get(t, s.Client(), "k")+"x")
		s.Stop()
		s.Stop()
	}
	s := start(t, cfg)
	ready(t, s)
	if got := get(t, s.Client(), "k"); got != "xxx" {
		t.Errorf("after three starts k is %q", got)
	}
	if st := status(t, s); st.ClusterVersion == "" || st.Version == "" || !st.IsLeader || len(st.Members) != 1 ||
		st.Members[0].Name != "n1" || st.Members[0].ClientURL != cfg.ClientURL || st.DBSize == 0 || st.Applied == 0 {
		t.Errorf("status %+v", st)
	}
	s.Stop()
}

func TestLeaderLossAndMove(t *testing.T) {
	all := newCluster(t).grow(t)
	lead := leaderOf(t, all)
	var next *member
	for _, m := range all {
		if m != lead && m.cfg.ClientURL != "" {
			next = m
		}
	}
	changed := next.LeaderChanged()
	// Asked of a follower on purpose: any member may.
	if err := next.MoveLeader(within(t), status(t, next.Server).MemberID); err != nil {
		t.Fatal(err)
	}
	<-changed
	if st := status(t, next.Server); !st.IsLeader {
		t.Fatalf("leader is %x, want %x", st.LeaderID, st.MemberID)
	}

	o := embedded.PlacementObservation{
		Members: status(t, next.Server).Members, LeaderID: status(t, next.Server).LeaderID, PostgresLeader: next.cfg.Name,
		Reachable: map[uint64]bool{}, Applied: map[uint64]uint64{}, Committed: status(t, next.Server).Committed,
	}
	for _, m := range all {
		st := status(t, m.Server)
		o.Reachable[st.MemberID], o.Applied[st.MemberID] = true, st.Applied
	}
	target, reason := embedded.DecideLeaderPlacement(o)
	if want := status(t, all[2].Server).MemberID; target != want {
		t.Fatalf("placement %x (%s), want the witness %x", target, reason, want)
	}
	if err := next.MoveLeader(within(t), target); err != nil {
		t.Fatal(err)
	}
	if err := next.MoveLeader(within(t), 42); err == nil {
		t.Error("moved the leader to a member that does not exist")
	}
	all[2].Stop()
	put(t, leaderOf(t, all[:2]).Client(), "after", "loss")
	for _, m := range all[:2] {
		if got := get(t, m.Client(), "after"); got != "loss" {
			t.Errorf("%s reads %q", m.cfg.Name, got)
		}
	}
}

func TestDefragShrinks(t *testing.T) {
	cfg := newCluster(t).config(1, true)
	cfg.Bootstrap = true
	s := start(t, cfg)
	ready(t, s)
	value := strings.Repeat("v", 1<<20)
	for range 40 {
		put(t, s.Client(), "big", value)
	}
	if did, err := s.DefragIfNeeded(within(t)); did || err != nil {
		t.Fatalf("defragmented a database in use: %v, %v", did, err)
	}
	resp, err := s.Client().Get(within(t), "big")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client().Compact(within(t), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	// The freed pages are counted with the next commit.
	eventually(t, "pages freed", func() bool { return status(t, s).DBInUse < 10<<20 })
	before := status(t, s)
	if did, err := s.DefragIfNeeded(within(t)); !did || err != nil {
		t.Fatalf("did not defragment: %v, %v", did, err)
	}
	after := status(t, s)
	if after.DBSize >= before.DBSize/2 {
		t.Errorf("from %d to %d bytes", before.DBSize, after.DBSize)
	}
	if get(t, s.Client(), "big") != value {
		t.Error("value lost")
	}
}

func TestQuotaReachedIsClearedByDefrag(t *testing.T) {
	cfg := newCluster(t).config(1, true)
	cfg.Bootstrap, cfg.QuotaBytes = true, 8<<20
	s := start(t, cfg)
	ready(t, s)
	var err error
	for i := 0; i < 100 && err == nil; i++ {
		_, err = s.Client().Put(within(t), "big", strings.Repeat("v", 1<<20))
	}
	if st := status(t, s); err == nil || len(st.Alarms) != 1 || st.Alarms[0] != "NOSPACE" {
		t.Fatalf("alarms %v, write gave %v", st.Alarms, err)
	}
	resp, err := s.Client().Get(within(t), "big")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Client().Compact(within(t), resp.Header.Revision, clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	if did, err := s.DefragIfNeeded(within(t)); !did || err != nil {
		t.Fatalf("did not defragment: %v, %v", did, err)
	}
	if st := status(t, s); len(st.Alarms) != 0 {
		t.Errorf("alarms %v after defragmentation", st.Alarms)
	}
	put(t, s.Client(), "k", "v")
}
