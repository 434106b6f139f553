package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestTokenSpecDefaultsAndLimits(t *testing.T) {
	s := TokenSpec{Role: RoleWitness}
	if err := s.complete(); err != nil || s.Uses != 1 || s.TTL != DefaultTokenTTL {
		t.Errorf("completed to %+v, %v", s, err)
	}
	for name, s := range map[string]TokenSpec{
		"role":           {Role: "x"},
		"no role":        {},
		"name":           {Role: RoleData, Name: "No"},
		"reserved name":  {Role: RoleData, Name: "patroni"},
		"short":          {Role: RoleData, TTL: time.Second},
		"negative":       {Role: RoleData, TTL: -time.Hour},
		"long":           {Role: RoleData, TTL: MaxTokenTTL + 1},
		"uses":           {Role: RoleData, Uses: MaxTokenUses + 1},
		"negative uses":  {Role: RoleData, Uses: -1},
		"name with uses": {Role: RoleData, Name: "node2", Uses: 2},
	} {
		if err := s.complete(); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestCreateListRevoke(t *testing.T) {
	f := newFixture(t)
	ctx := testContext(t)
	now := time.Now()
	tok, text, err := f.store.CreateToken(ctx, TokenSpec{Role: RoleData, Name: "node2", TTL: time.Hour}, f.pin, []string{"10.0.0.1:8432"}, "node1", now)
	if err != nil {
		t.Fatal(err)
	}
	if parsed := must[Token](t)(ParseToken(text)); !cmp.Equal(open(parsed), open(tok)) {
		t.Error("the printed token is not the one created")
	}
	second, _, err := f.store.CreateToken(ctx, TokenSpec{Role: RoleWitness, Uses: 3}, f.pin, []string{"10.0.0.1:8432"}, "node1", now.Add(time.Second))
	if err != nil {
		t.Fatal(err)
	}
	if second.ID == tok.ID || second.Secret == tok.Secret {
		t.Error("two tokens are alike")
	}
	want := []TokenInfo{
		{ID: tok.ID, Role: RoleData, Name: "node2", State: TokenValid, CreatedAt: stamp(now), CreatedBy: "node1", Expires: tok.Expires, UsesLeft: 1},
		{ID: second.ID, Role: RoleWitness, State: TokenValid, CreatedAt: stamp(now.Add(time.Second)), CreatedBy: "node1", Expires: second.Expires, UsesLeft: 3},
	}
	got, err := f.store.Tokens(ctx)
	if err != nil || !cmp.Equal(want, got, cmpOpts) {
		t.Errorf("%v:\n%s", err, cmp.Diff(want, got, cmpOpts))
	}
	for range 2 {
		if err := f.store.RevokeToken(ctx, tok.ID); err != nil {
			t.Error(err)
		}
	}
	if got, err := f.store.Tokens(ctx); err != nil || got[0].State != TokenRevoked {
		t.Errorf("after the revocation: %v, %v", got, err)
	}
	if err := f.store.RevokeToken(ctx, "nope"); !errors.Is(err, ErrNoToken) || !strings.Contains(err.Error(), "pgha token list") {
		t.Errorf("revoked a token that is not there: %v", err)
	}
}

func TestTokenStates(t *testing.T) {
	now := time.Unix(1900000000, 0)
	at := now.Add(-time.Hour)
	use := tokenUse{Name: "n", At: at}
	later, earlier := now.Add(time.Hour), now.Add(-time.Hour)
	for _, c := range []struct {
		name string
		r    tokenRecord
		want TokenState
	}{
		{"valid", tokenRecord{Uses: 2, UsedBy: []tokenUse{use}, Expires: later, Wrong: maxWrongSecrets - 1}, TokenValid},
		{"expires this moment", tokenRecord{Uses: 1, Expires: now}, TokenExpired},
		{"used and expired", tokenRecord{Uses: 1, UsedBy: []tokenUse{use}, Expires: earlier}, TokenUsed},
		{"locked", tokenRecord{Uses: 1, Expires: later, Wrong: maxWrongSecrets}, TokenLocked},
		{"revoked and used", tokenRecord{Uses: 1, UsedBy: []tokenUse{use}, Expires: later, RevokedAt: &at}, TokenRevoked},
	} {
		if got := c.r.state(now); got != c.want {
			t.Errorf("%s: %s, want %s", c.name, got, c.want)
		}
	}
}

func TestPurgeTokens(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	long, short := keepTokens+time.Hour, keepTokens-time.Hour
	revoked := ago(long)
	for _, c := range []struct {
		name string
		r    tokenRecord
		want bool
	}{
		{"valid", tokenRecord{Uses: 1, Expires: now.Add(time.Hour)}, false},
		{"expired lately", tokenRecord{Uses: 1, Expires: ago(short)}, false},
		{"expired long ago", tokenRecord{Uses: 1, Expires: ago(long)}, true},
		{"used up long ago", tokenRecord{Uses: 1, Expires: now.Add(time.Hour), UsedBy: []tokenUse{{At: ago(long)}}}, true},
		{"used up lately", tokenRecord{Uses: 1, Expires: ago(long), UsedBy: []tokenUse{{At: ago(short)}}}, false},
		{"used once of twice", tokenRecord{Uses: 2, Expires: now.Add(time.Hour), UsedBy: []tokenUse{{At: ago(long)}}}, false},
		{"revoked long ago", tokenRecord{Uses: 1, Expires: now.Add(time.Hour), RevokedAt: &revoked}, true},
	} {
		if got := c.r.purgeable(now); got != c.want {
			t.Errorf("%s: purgeable %v", c.name, got)
		}
	}

	f := newFixture(t)
	ctx := testContext(t)
	create := func(at time.Time) {
		t.Helper()
		if _, _, err := f.store.CreateToken(ctx, TokenSpec{Role: RoleData, TTL: time.Hour}, f.pin, []string{"10.0.0.1:1"}, "me", at); err != nil {
			t.Fatal(err)
		}
	}
	create(ago(keepTokens + 4*time.Hour))
	create(ago(2 * time.Hour)) // purges the first
	if got, err := f.store.Tokens(ctx); err != nil || len(got) != 1 || got[0].State != TokenExpired {
		t.Errorf("tokens %v, %v; want the expired one", got, err)
	}
}
