package cluster

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func former(name string, id uint64, at time.Time) FormerMember {
	return FormerMember{Name: name, Addr: netip.MustParseAddr("10.0.0.9"), Role: RoleData, MemberID: id, RemovedAt: at.UTC(), By: "root@node1", Why: "it was removed"}
}

func TestFormer(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	now := time.UnixMilli(1900000000000)
	for _, f := range []FormerMember{former("a", 1, now), former("a", 2, now.Add(time.Hour)), former("b", 3, now.Add(time.Minute)), former("b", 3, now.Add(2*time.Minute))} {
		if err := s.store.PutFormer(ctx, f); err != nil {
			t.Fatal(err)
		}
	}
	got, err := s.store.Former(ctx)
	if err != nil {
		t.Fatal(err)
	}
	want := []FormerMember{former("a", 2, now.Add(time.Hour)), former("b", 3, now.Add(2*time.Minute)), former("a", 1, now)}
	if d := cmp.Diff(want, got, cmpOpts); d != "" {
		t.Errorf("the latest first, a life of a node once (-want +got):\n%s", d)
	}
	for _, c := range []struct {
		name string
		id   uint64
		want uint64 // the entry's; 0 = none
	}{{"a", 1, 1}, {"a", 2, 2}, {"a", 0, 2}, {"a", 7, 0}, {"b", 1, 0}, {"c", 0, 0}} {
		f, ok := FormerOf(got, c.name, c.id)
		if ok != (c.want != 0) || f.MemberID != c.want {
			t.Errorf("former %s with member %d: %+v, %t", c.name, c.id, f, ok)
		}
	}
	for i := range keepFormer + 3 {
		if err := s.store.PutFormer(ctx, former("n", uint64(100+i), now.Add(24*time.Hour+time.Duration(i)*time.Second))); err != nil {
			t.Fatal(err)
		}
	}
	if got, err = s.store.Former(ctx); err != nil || len(got) != keepFormer || got[0].MemberID != 100+keepFormer+2 || got[keepFormer-1].MemberID != 103 {
		t.Errorf("%d are kept, from %d to %d: %v", len(got), got[0].MemberID, got[len(got)-1].MemberID, err)
	}
}

func TestTakeOut(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	m := Member{Name: "node2", Role: RoleData, Addr: netip.MustParseAddr("10.0.0.2"), Ports: DefaultPorts(), State: StateMember}
	if err := s.store.PutMember(ctx, m); err != nil {
		t.Fatal(err)
	}
	ms, _, err := s.store.Members(ctx)
	if err != nil {
		t.Fatal(err)
	}
	m = ms[1]
	stale := m
	stale.Rev--
	if err := s.store.TakeOut(ctx, stale, former("node2", 5, time.Now())); !errors.Is(err, ErrConflict) {
		t.Errorf("an entry that has changed: %v", err)
	}
	if all, err := s.store.Former(ctx); err != nil || len(all) != 0 {
		t.Errorf("a refusal has left %v, %v", all, err)
	}
	if err := s.store.TakeOut(ctx, m, former("node2", 5, time.Now())); err != nil {
		t.Fatal(err)
	}
	ms, _, err = s.store.Members(ctx)
	if err != nil || len(ms) != 1 {
		t.Errorf("roster %v, %v", ms, err)
	}
	if all, err := s.store.Former(ctx); err != nil || len(all) != 1 || all[0].MemberID != 5 {
		t.Errorf("remembered %v, %v", all, err)
	}
}

func TestRevokeTokensOf(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	ids := map[string]string{}
	for name, spec := range map[string]TokenSpec{
		"for it": {Role: RoleData, Name: "node2"}, "for its place": {Role: RoleData, Replaces: "node2"}, "spare": {Role: RoleData, Replaces: "node2"},
		"its own": {Role: RoleData, Uses: 2}, "another's": {Role: RoleData, Name: "node3"}, "anybody's": {Role: RoleWitness},
	} {
		ids[name] = s.token(t, spec).ID
	}
	n, err := s.store.RevokeTokensOf(ctx, "node2", ids["its own"], ids["spare"])
	if err != nil || n != 3 {
		t.Errorf("%d tokens were revoked, %v", n, err)
	}
	infos, err := s.store.Tokens(ctx)
	if err != nil {
		t.Fatal(err)
	}
	var valid []string
	for name, id := range ids {
		if slices.ContainsFunc(infos, func(i TokenInfo) bool { return i.ID == id && i.State == TokenValid }) {
			valid = append(valid, name)
		}
	}
	slices.Sort(valid)
	if d := cmp.Diff([]string{"another's", "anybody's", "spare"}, valid); d != "" {
		t.Errorf("tokens that are valid (-want +got):\n%s", d)
	}
	if n, err := s.store.RevokeTokensOf(ctx, "node2", ids["its own"], ids["spare"]); err != nil || n != 0 {
		t.Errorf("again: %d, %v", n, err)
	}
}

// A join with a token that replaces takes the old node out first, and only when
// nothing else stands in its way.
func TestJoinReplaces(t *testing.T) {
	s := newSite(t)
	ctx := testContext(t)
	old := Member{Name: "node2", Role: RoleData, Addr: netip.MustParseAddr("10.0.0.2"), Ports: DefaultPorts(), State: StateMember}
	if err := s.store.PutMember(ctx, old); err != nil {
		t.Fatal(err)
	}
	var asked []Replacement
	var refusal error
	s.srv.Replace = func(ctx context.Context, r Replacement) error {
		asked = append(asked, r)
		if refusal != nil || r.DryRun {
			return refusal
		}
		ms, _, err := s.store.Members(ctx)
		if err != nil {
			return err
		}
		for _, m := range ms {
			if m.Name == r.Old {
				return s.store.TakeOut(ctx, m, former(r.Old, 5, time.Now()))
			}
		}
		return fmt.Errorf("%s is not on the roster", r.Old)
	}
	roster := func() (text string) {
		t.Helper()
		ms, _, err := s.store.Members(ctx)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range ms {
			text += fmt.Sprintf("%s %s %s; ", m.Name, m.Addr, m.State)
		}
		return text
	}
	const before = "node1 127.0.0.1 member; node2 10.0.0.2 member; "
	tok := s.token(t, TokenSpec{Role: RoleData, Replaces: "node2"})
	req := request(t, "node2", RoleData, 2)

	refusal = refuse(CodeConflict, "node2 cannot be replaced: it answers")
	if _, err := join(t, tok, req); !errors.Is(err, ErrConflict) {
		t.Errorf("while it answers: %v", err)
	}
	refusal = nil
	wrong := req
	wrong.PGMajor = 9
	if _, err := join(t, tok, wrong); !errors.Is(err, ErrPGMajor) || len(asked) != 1 {
		t.Errorf("with another PostgreSQL: %v, asked %v", err, asked)
	}
	dry := req
	dry.DryRun = true
	if err := CheckJoin(ctx, tok, func(Hello) (JoinRequest, error) { return dry, nil }, oneRound); err != nil {
		t.Errorf("would it be taken in: %v", err)
	}
	if got := roster(); got != before || len(asked) != 2 || !asked[1].DryRun {
		t.Errorf("before the join: %s, asked %v", got, asked)
	}
	resp, err := join(t, tok, req)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := join(t, tok, req); err != nil {
		t.Errorf("the same again: %v", err)
	}
	if len(asked) != 3 || asked[2].Old != "node2" || asked[2].Token != tok.ID || asked[2].DryRun || asked[2].New.Name != "node2" {
		t.Errorf("asked %+v", asked)
	}
	if got, want := roster(), "node1 127.0.0.1 member; node2 10.0.0.2 joining; "; got != want {
		t.Errorf("after the join: %s", got)
	}
	if len(resp.Members) != 2 {
		t.Errorf("the answer names %v", resp.Members)
	}
}
