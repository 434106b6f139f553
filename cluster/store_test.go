package cluster

import (
	"context"
	"errors"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
)

func TestCreateIsIdempotentAndKnowsOtherClusters(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	before := dump(t)
	if err := f.store.Create(ctx, f.id, f.self, Settings{Profile: "wide"}, []byte("x"), []byte("y")); err != nil {
		t.Errorf("the same identity again: %v", err)
	}
	sameDump(t, before)

	other := must[Identity](t)(NewIdentity("stock", time.Now()))
	err := NewStore(etcd, other.ID).Create(ctx, other, f.self, Settings{Profile: "fast"}, []byte("x"), []byte("y"))
	if !errors.Is(err, ErrOtherCluster) || !strings.Contains(err.Error(), f.id.ID) || !strings.Contains(err.Error(), other.ID) {
		t.Errorf("another cluster: %v, want ErrOtherCluster with both ids", err)
	}
	renamed := f.id
	renamed.Name = "stock"
	if err := f.store.Create(ctx, renamed, f.self, Settings{Profile: "fast"}, []byte("x"), []byte("y")); !errors.Is(err, ErrOtherCluster) {
		t.Errorf("the same id with another name: %v", err)
	}
	sameDump(t, before)

	if got := must[Identity](t)(f.store.Identity(ctx)); got != f.id {
		t.Errorf("identity %+v, want %+v", got, f.id)
	}
	if _, err := NewStore(etcd, other.ID).Identity(ctx); !errors.Is(err, ErrNoCluster) {
		t.Errorf("identity of a cluster that is not there: %v", err)
	}
}

func TestConcurrentCreateOfTwoClusters(t *testing.T) {
	wipe(t)
	ctx := testContext(t)
	self := Member{Name: "node1", Role: RoleData, Addr: netip.MustParseAddr("10.0.0.1"), Ports: DefaultPorts(), State: StateMember}
	errs := make([]error, 8)
	var wg sync.WaitGroup
	for i := range errs {
		id := must[Identity](t)(NewIdentity("shop", time.Now()))
		wg.Go(func() {
			errs[i] = NewStore(etcd, id.ID).Create(ctx, id, self, Settings{Profile: "fast"}, []byte("x"), []byte("y"))
		})
	}
	wg.Wait()
	won := 0
	for _, err := range errs {
		if err == nil {
			won++
		} else if !errors.Is(err, ErrOtherCluster) {
			t.Error(err)
		}
	}
	if won != 1 {
		t.Errorf("%d clusters were made in one etcd", won)
	}
}

// What etcd holds is no help to a witness, which can read all of it.
func TestEtcdHoldsNoSecret(t *testing.T) {
	f := newFixture(t)
	tok, text, err := f.store.CreateToken(testContext(t), TokenSpec{Role: RoleData}, f.pin, []string{"10.0.0.1:8432"}, "node1", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	keyPEM := must[[]byte](t)(f.ca.KeyPEM())
	for k, v := range dump(t) {
		for what, secret := range map[string]string{
			"Patroni's password": f.secrets.PatroniREST, "the status page's password": f.secrets.StatsPage, "the CA's key": string(keyPEM[40:80]),
			"the sealing key": string(f.key[:]), "a token's secret": tok.Secret, "a token": text[20:],
		} {
			if strings.Contains(v, secret) {
				t.Errorf("%s holds %s", k, what)
			}
		}
	}
	ctx := testContext(t)
	if got := must[Secrets](t)(OpenSecrets(f.key, f.id.ID, must[[]byte](t)(f.store.SealedSecrets(ctx)))); got != f.secrets {
		t.Error("the stored secrets open as others")
	}
	if got := must[[]byte](t)(OpenCAKey(f.key, f.id.ID, must[[]byte](t)(f.store.SealedCAKey(ctx)))); string(got) != string(keyPEM) {
		t.Error("the stored CA key opens as another")
	}
}

func TestMembersCompareAndSwap(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	b := Member{
		Name: "b", Role: RoleWitness, Addr: netip.MustParseAddr("fd00::2"), Ports: DefaultPorts(), SANs: []string{"x.example.com"},
		JoinedAt: stamp(time.Now()), TokenID: "t", CSRHash: "h", State: StateJoining, Version: "1.2.0",
	}
	if err := f.store.PutMember(ctx, b); err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutMember(ctx, b); !errors.Is(err, ErrConflict) {
		t.Errorf("a second new entry of one name: %v", err)
	}
	got, rev, err := f.store.Members(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff([]Member{b, f.self}, got, cmpOpts); d != "" {
		t.Errorf("roster:\n%s", d)
	}
	if rev < got[0].Rev || got[0].Rev == 0 {
		t.Errorf("roster at revision %d, entry at %d", rev, got[0].Rev)
	}
	stale := got[0]
	fresh := got[0]
	fresh.State = StateMember
	if err := f.store.PutMember(ctx, fresh); err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutMember(ctx, stale); !errors.Is(err, ErrConflict) {
		t.Errorf("a stale entry was written: %v", err)
	}
	bad := fresh
	bad.Name = "B"
	if err := f.store.PutMember(ctx, bad); err == nil {
		t.Error("an invalid entry was written")
	}
	if err := f.store.RemoveMember(ctx, "b"); err != nil {
		t.Error(err)
	}
	if err := f.store.RemoveMember(ctx, "b"); !errors.Is(err, ErrNoMember) {
		t.Errorf("removed twice: %v", err)
	}
	if err := f.store.PutMember(ctx, fresh); !errors.Is(err, ErrConflict) {
		t.Errorf("a removed member was written back: %v", err)
	}
	if err := f.store.UpdateMember(ctx, "b", func(*Member) error { return nil }); !errors.Is(err, ErrNoMember) {
		t.Errorf("update of a removed member: %v", err)
	}
}

func TestUpdateMemberLosesNothing(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	names := []string{"a.example.com", "b.example.com", "c.example.com", "d.example.com", "e.example.com", "f.example.com"}
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, n := range names {
		wg.Go(func() {
			errs[i] = f.store.UpdateMember(ctx, "node1", func(m *Member) error {
				m.SANs = append(m.SANs, n)
				return nil
			})
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	ms, _, err := f.store.Members(ctx)
	if err != nil || len(ms[0].SANs) != 1+len(names) {
		t.Errorf("%v, %v: updates were lost", ms, err)
	}
	before := dump(t)
	if err := f.store.UpdateMember(ctx, "node1", func(m *Member) error { m.Name = "node9"; return nil }); err == nil {
		t.Error("a member changed its name")
	}
	if err := f.store.UpdateMember(ctx, "node1", func(*Member) error { return context.Canceled }); !errors.Is(err, context.Canceled) {
		t.Errorf("the error of the change: %v", err)
	}
	sameDump(t, before)
}

func TestSettingsCompareAndSwap(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	_, rev, err := f.store.Settings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := Settings{
		Async: true, Profile: "wide", SANs: []string{"db.example.com"},
		ClientNets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/8")}, ProbeAddrs: addrs("168.63.129.16"),
	}
	if err := f.store.PutSettings(ctx, want, rev); err != nil {
		t.Fatal(err)
	}
	got, _, err := f.store.Settings(ctx)
	if err != nil || !cmp.Equal(want, got, cmpOpts) {
		t.Errorf("got %v, %v:\n%s", got, err, cmp.Diff(want, got, cmpOpts))
	}
	if err := f.store.PutSettings(ctx, want, rev); !errors.Is(err, ErrConflict) {
		t.Errorf("stale settings: %v", err)
	}
	if err := f.store.PutSettings(ctx, want, 0); err == nil {
		t.Error("settings were written over unread ones")
	}
	if err := f.store.PutSettings(ctx, Settings{Profile: "x"}, rev); err == nil {
		t.Error("invalid settings were written")
	}
	if _, _, err := NewStore(etcd, "none").Settings(ctx); !errors.Is(err, ErrNoCluster) {
		t.Errorf("settings of no cluster: %v", err)
	}
}

// next waits for the change that has everything of want.
func next(t *testing.T, ch <-chan Change, want Change) {
	t.Helper()
	deadline := time.After(time.Minute)
	var sum Change
	for {
		select {
		case c, ok := <-ch:
			if !ok {
				t.Fatal("the watch has ended")
			}
			if c.Rev < sum.Rev {
				t.Errorf("revision %d after %d", c.Rev, sum.Rev)
			}
			sum = Change{Rev: c.Rev, Roster: sum.Roster || c.Roster, Settings: sum.Settings || c.Settings, Tokens: sum.Tokens || c.Tokens}
			if sum.Rev >= want.Rev && sum.Roster == want.Roster && sum.Settings == want.Settings && sum.Tokens == want.Tokens {
				return
			}
		case <-deadline:
			t.Fatalf("got %+v, want %+v", sum, want)
		}
	}
}

func revision(t *testing.T) int64 {
	t.Helper()
	resp, err := etcd.Get(testContext(t), "x")
	if err != nil {
		t.Fatal(err)
	}
	return resp.Header.Revision
}

func TestWatch(t *testing.T) {
	f := newFixture(t)
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	_, rev, err := f.store.Members(ctx)
	if err != nil {
		t.Fatal(err)
	}
	touch := func() {
		t.Helper()
		if err := f.store.UpdateMember(ctx, "node1", func(m *Member) error { m.Version += "1"; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	touch() // before the watch begins, after the roster was read
	ch := f.store.Watch(ctx, rev)
	next(t, ch, Change{Roster: true, Rev: revision(t)})
	if _, _, err := f.store.CreateToken(ctx, TokenSpec{Role: RoleData}, f.pin, []string{"10.0.0.1:1"}, "me", time.Now()); err != nil {
		t.Fatal(err)
	}
	next(t, ch, Change{Tokens: true, Rev: revision(t)})
	set, srev, err := f.store.Settings(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.store.PutSettings(ctx, set, srev); err != nil {
		t.Fatal(err)
	}
	next(t, ch, Change{Settings: true, Rev: revision(t)})
	// Nobody reads: the changes are merged, none is lost.
	for range 50 {
		touch()
	}
	next(t, ch, Change{Roster: true, Rev: revision(t)})
	cancel()
	for range ch {
	}
}

func TestWatchSurvivesCompaction(t *testing.T) {
	f := newFixture(t)
	ctx, cancel := context.WithCancel(testContext(t))
	defer cancel()
	_, rev, err := f.store.Members(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		if err := f.store.UpdateMember(ctx, "node1", func(m *Member) error { m.Version += "1"; return nil }); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := etcd.Compact(ctx, revision(t), clientv3.WithCompactPhysical()); err != nil {
		t.Fatal(err)
	}
	ch := f.store.Watch(ctx, rev)
	next(t, ch, Change{Roster: true, Settings: true, Tokens: true, Rev: rev + 2})
	// And it goes on.
	if err := f.store.RemoveMember(ctx, "node1"); err != nil {
		t.Fatal(err)
	}
	next(t, ch, Change{Roster: true, Rev: revision(t)})
	cancel()
	for range ch {
	}
}

func TestAbandonedJoins(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	now := time.Now()
	for _, m := range []struct {
		name  string
		age   time.Duration
		state MemberState
	}{{"old", AbandonAfter + time.Minute, StateJoining}, {"young", time.Minute, StateJoining}, {"done", 48 * time.Hour, StateMember}} {
		if err := f.store.PutMember(ctx, Member{
			Name: m.name, Role: RoleData, Addr: netip.MustParseAddr("10.0.0.7"), Ports: DefaultPorts(), State: m.state, JoinedAt: stamp(now.Add(-m.age)),
		}); err != nil {
			t.Fatal(err)
		}
	}
	got, err := f.store.AbandonedJoins(ctx, now)
	if err != nil || len(got) != 1 || got[0].Name != "old" {
		t.Fatalf("abandoned: %v, %v; want old", got, err)
	}
	// The joiner comes back between the look and the sweep.
	if err := f.store.UpdateMember(ctx, "old", func(m *Member) error { m.JoinedAt = stamp(now); return nil }); err != nil {
		t.Fatal(err)
	}
	if err := f.store.DropAbandoned(ctx, got[0]); !errors.Is(err, ErrConflict) {
		t.Errorf("a join that goes on was swept: %v", err)
	}
	if got, err := f.store.AbandonedJoins(ctx, now); err != nil || len(got) != 0 {
		t.Errorf("abandoned: %v, %v; want none", got, err)
	}
	got, err = f.store.AbandonedJoins(ctx, now.Add(AbandonAfter+time.Second))
	if err != nil || len(got) != 2 {
		t.Fatalf("abandoned: %v, %v; want two", got, err)
	}
	if err := f.store.DropAbandoned(ctx, got[0]); err != nil {
		t.Error(err)
	}
	ms, _, err := f.store.Members(ctx)
	if err != nil || len(ms) != 3 {
		t.Errorf("roster %v, %v; want three left", ms, err)
	}
}
