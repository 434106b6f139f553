package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/embedded"
)

// writer puts keys one after the other until stopped.
type writer struct {
	cancel context.CancelFunc
	wg     sync.WaitGroup
	count  int
	err    error
}

func startWriter(c *clientv3.Client) *writer {
	ctx, cancel := context.WithCancel(context.Background())
	w := &writer{cancel: cancel}
	w.wg.Go(func() {
		for ctx.Err() == nil {
			_, err := c.Put(ctx, fmt.Sprintf("w/%06d", w.count), "x")
			if ctx.Err() != nil {
				return
			}
			if err != nil {
				w.err = err
				return
			}
			w.count++
		}
	})
	return w
}

func (w *writer) stop() (int, error) {
	w.cancel()
	w.wg.Wait()
	return w.count, w.err
}

func TestGrowFromOneToThreeUnderWrites(t *testing.T) {
	c := newCluster(t)
	n1 := &member{cfg: c.config(1, false)}
	n1.cfg.Bootstrap = true
	n1.Server = start(t, n1.cfg)
	ready(t, n1.Server)
	w := startWriter(n1.Client())
	defer func() { _, _ = w.stop() }() // if the test ends before it asks

	n2, n3 := &member{cfg: c.config(2, false)}, &member{cfg: c.config(3, true)}
	added, _, err := n1.AddLearner(within(t), n2.cfg.PeerURL)
	if err != nil {
		t.Fatal(err)
	}
	again, members, err := n1.AddLearner(within(t), n2.cfg.PeerURL)
	if err != nil || again != added || len(members) != 2 {
		t.Fatalf("adding again: %+v of %d members, %v; want %+v", again, len(members), err, added)
	}
	n2.Server = start(t, n2.cfg)
	eventually(t, "held back for want of a third member", func() bool {
		action, reason := embedded.DecideMembership(observe(t, n1, n1, n2))
		return action.None() && strings.HasSuffix(reason, "add a witness (pgha token create --witness)")
	})

	if _, _, err := n1.AddLearner(within(t), n3.cfg.PeerURL); err != nil {
		t.Fatal(err)
	}
	if action, reason := embedded.DecideMembership(observe(t, n1, n1, n2, n3)); !action.None() || !strings.Contains(reason, n3.cfg.PeerURL) {
		t.Fatalf("with n3 not started: %+v, %q", action, reason)
	}
	n3.Server = start(t, n3.cfg)
	all := []*member{n1, n2, n3}
	if action := promote(t, n1, all...); len(action.Promote) != 2 {
		t.Fatalf("promoted %v, want both together", action.Promote)
	}
	for _, m := range all {
		ready(t, m.Server)
	}
	count, err := w.stop()
	if err != nil || count == 0 {
		t.Fatalf("%d writes while growing, then: %v", count, err)
	}
	t.Logf("%d writes while growing", count)
	for _, m := range all {
		resp, err := m.Client().Get(within(t), "w/", clientv3.WithPrefix(), clientv3.WithCountOnly())
		if err != nil || resp.Count < int64(count) {
			t.Errorf("%s has %d of %d keys, %v", m.cfg.Name, resp.Count, count, err)
		}
	}
	if later, _, err := n1.AddLearner(within(t), n2.cfg.PeerURL); err != nil || later.Learner || later.ID != added.ID {
		t.Errorf("adding a voter again: %+v, %v; want voter %x", later, err, added.ID)
	}
	if action, reason := embedded.DecideMembership(observe(t, n1, all...)); !action.None() || reason != "" {
		t.Errorf("three voters: %+v, %q; want nothing", action, reason)
	}
}

func TestThirdLearnerIsRefusedByName(t *testing.T) {
	c := newCluster(t)
	cfg := c.config(1, true)
	cfg.Bootstrap = true
	s := start(t, cfg)
	ready(t, s)
	for i := 2; i <= 3; i++ {
		if _, _, err := s.AddLearner(within(t), c.config(i, true).PeerURL); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_, _, err := s.AddLearner(ctx, c.config(4, true).PeerURL)
	if !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "too many learner") {
		t.Errorf("got %v, want the deadline and its cause", err)
	}
}

func TestRemovedWhileRunning(t *testing.T) {
	all := newCluster(t).grow(t)
	n1, n2 := all[0], all[1]
	id := status(t, n2.Server).MemberID
	for range 2 { // repeatable
		if err := n1.Remove(within(t), id); err != nil {
			t.Fatal(err)
		}
	}
	<-n2.Done()
	if err := n2.Err(); !errors.Is(err, embedded.ErrRemoved) {
		t.Fatalf("Err is %v, want ErrRemoved", err)
	}
	if _, err := n2.Status(within(t)); !errors.Is(err, embedded.ErrRemoved) {
		t.Errorf("Status gives %v, want ErrRemoved", err)
	}
	if err := n2.WaitReady(within(t)); !errors.Is(err, embedded.ErrRemoved) {
		t.Errorf("WaitReady gives %v, want ErrRemoved", err)
	}
	record := filepath.Join(filepath.Dir(n2.cfg.DataDir), "etcd-fatal.json")
	for range 2 { // no loop: each try is refused at once
		if _, err := embedded.Start(within(t), n2.cfg); !errors.Is(err, embedded.ErrRemoved) {
			t.Fatalf("restart gives %v, want ErrRemoved", err)
		}
		// The second time its own database has to tell.
		if err := os.RemoveAll(record); err != nil {
			t.Fatal(err)
		}
	}
	put(t, n1.Client(), "k", "v")
}

func TestRemovedWhileAway(t *testing.T) {
	all := newCluster(t).grow(t)
	n1, n2 := all[0], all[1]
	id := status(t, n2.Server).MemberID
	n2.Stop()
	if err := n2.Err(); err != nil {
		t.Fatalf("Err after Stop: %v", err)
	}
	if err := n1.Remove(within(t), id); err != nil {
		t.Fatal(err)
	}
	// Its own log does not know: it learns from the first peer that it calls.
	back := start(t, n2.cfg)
	<-back.Done()
	if err := back.Err(); !errors.Is(err, embedded.ErrRemoved) {
		t.Fatalf("Err is %v, want ErrRemoved", err)
	}
	if _, err := embedded.Start(within(t), n2.cfg); !errors.Is(err, embedded.ErrRemoved) {
		t.Fatalf("restart gives %v, want ErrRemoved", err)
	}
	// With the data out of the way the node joins as a new member.
	if err := os.RemoveAll(n2.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	if _, err := embedded.Start(within(t), n2.cfg); !errors.Is(err, embedded.ErrNotMember) {
		t.Fatalf("start before it was added gives %v, want ErrNotMember", err)
	}
	if _, _, err := n1.AddLearner(within(t), n2.cfg.PeerURL); err != nil {
		t.Fatal(err)
	}
	n2.Server = start(t, n2.cfg)
	if action := promote(t, leaderOf(t, all), all...); len(action.Promote) != 1 {
		t.Errorf("promoted %v, want the one that makes two voters three", action.Promote)
	}
}

func TestWipedDirectoryMustRejoin(t *testing.T) {
	all := newCluster(t).grow(t)
	n1, n3 := all[0], all[2]
	old := status(t, n3.Server).MemberID
	n3.Stop()
	if err := os.RemoveAll(n3.cfg.DataDir); err != nil {
		t.Fatal(err)
	}
	if _, err := embedded.Start(within(t), n3.cfg); !errors.Is(err, embedded.ErrNeedsRejoin) {
		t.Fatalf("start on a wiped directory gives %v, want ErrNeedsRejoin", err)
	}
	n3.cfg.Bootstrap = true
	if _, err := embedded.Start(within(t), n3.cfg); !errors.Is(err, embedded.ErrNeedsRejoin) {
		t.Fatalf("bootstrap on a wiped directory gives %v, want ErrNeedsRejoin", err)
	}
	n3.cfg.Bootstrap = false
	if err := n1.Remove(within(t), old); err != nil {
		t.Fatal(err)
	}
	if _, _, err := n1.AddLearner(within(t), n3.cfg.PeerURL); err != nil {
		t.Fatal(err)
	}
	n3.Server = start(t, n3.cfg)
	promote(t, leaderOf(t, all), all...)
	if id := status(t, n3.Server).MemberID; id == old {
		t.Errorf("rejoined as member %x again", id)
	}
}

func TestStartRefusesWhatIsNotItsCluster(t *testing.T) {
	c := newCluster(t)
	first := c.config(1, true)
	first.Bootstrap = true
	n1 := start(t, first)
	ready(t, n1)

	joiner := c.config(2, true)
	if _, err := embedded.Start(within(t), joiner); !errors.Is(err, embedded.ErrNotMember) {
		t.Errorf("not added: %v, want ErrNotMember", err)
	}
	second := joiner
	second.Bootstrap = true
	if _, err := embedded.Start(within(t), second); !errors.Is(err, embedded.ErrOtherCluster) {
		t.Errorf("bootstrap beside a cluster: %v, want ErrOtherCluster", err)
	}
	stranger := newCluster(t).config(2, true) // another CA
	stranger.InitialCluster = map[string]string{first.Name: first.PeerURL}
	if _, err := embedded.Start(within(t), stranger); !errors.Is(err, embedded.ErrOtherCluster) {
		t.Errorf("another CA: %v, want ErrOtherCluster", err)
	}
	n1.Stop()
	if _, err := embedded.Start(within(t), joiner); !errors.Is(err, embedded.ErrNoPeer) {
		t.Errorf("nobody there: %v, want ErrNoPeer", err)
	}
	moved := first
	moved.Token = "another"
	if _, err := embedded.Start(within(t), moved); !errors.Is(err, embedded.ErrOtherCluster) ||
		!strings.Contains(err.Error(), first.Token) || !strings.Contains(err.Error(), moved.Token) {
		t.Errorf("another token: %v, want ErrOtherCluster with both", err)
	}
	// Its own data it takes, whatever the initial cluster says now.
	first.InitialCluster = map[string]string{"x": "https://127.0.0.9:1"}
	ready(t, start(t, first))
}
