package cluster

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// Limits of tokens.
const (
	DefaultTokenTTL = 24 * time.Hour
	MinTokenTTL     = time.Minute
	MaxTokenTTL     = 7 * 24 * time.Hour
	MaxTokenUses    = 20

	// maxWrongSecrets is how many wrong secrets lock a token.
	maxWrongSecrets = 10
	// keepTokens is how long a token stays listed after its end.
	keepTokens = 24 * time.Hour
)

// TokenSpec is what an operator asks of a token.
type TokenSpec struct {
	Role NodeRole
	Name string        // when set, only a node of this name may use it
	TTL  time.Duration // 0: DefaultTokenTTL
	Uses int           // 0: one
	// Replaces names a member that is gone for good: who joins with the token
	// takes its place, which is taken from it in the same moment.
	Replaces string
}

func (s *TokenSpec) complete() error {
	if err := s.Role.validate(); err != nil {
		return err
	}
	if s.Name != "" {
		if err := ValidateNodeName(s.Name); err != nil {
			return err
		}
	}
	if s.TTL == 0 {
		s.TTL = DefaultTokenTTL
	}
	if s.TTL < MinTokenTTL || s.TTL > MaxTokenTTL {
		return fmt.Errorf("a token lives %s to %s, not %s", MinTokenTTL, MaxTokenTTL, s.TTL)
	}
	if s.Uses == 0 {
		s.Uses = 1
	}
	if s.Uses < 1 || s.Uses > MaxTokenUses {
		return fmt.Errorf("a token has 1 to %d uses, not %d", MaxTokenUses, s.Uses)
	}
	if s.Name != "" && s.Uses > 1 {
		return fmt.Errorf("a token for the one node %s cannot have %d uses", s.Name, s.Uses)
	}
	if s.Replaces != "" && s.Uses > 1 {
		return fmt.Errorf("a token that replaces the one node %s cannot have %d uses", s.Replaces, s.Uses)
	}
	return nil
}

// TokenState says whether a token can be used.
type TokenState string

// The states of a token.
const (
	TokenValid   TokenState = "valid"
	TokenUsed    TokenState = "used"
	TokenExpired TokenState = "expired"
	TokenRevoked TokenState = "revoked"
	TokenLocked  TokenState = "locked" // after too many wrong secrets
)

// TokenInfo describes a token without its secret.
type TokenInfo struct {
	ID           string     `json:"id"`
	Role         NodeRole   `json:"role"`
	Name         string     `json:"name,omitempty"`
	Replaces     string     `json:"replaces,omitempty"`
	State        TokenState `json:"state"`
	CreatedAt    time.Time  `json:"created_at"`
	CreatedBy    string     `json:"created_by"`
	Expires      time.Time  `json:"expires"`
	UsesLeft     int        `json:"uses_left"`
	UsedBy       []string   `json:"used_by,omitempty"`
	WrongSecrets int        `json:"wrong_secrets,omitempty"`
}

// tokenUse is one use of a token.
type tokenUse struct {
	Name string    `json:"name"`
	At   time.Time `json:"at"`
}

// tokenRecord is what etcd holds of a token.
type tokenRecord struct {
	ID        string     `json:"id"`
	Hash      []byte     `json:"hash"` // SHA-256 of the secret's text
	Role      NodeRole   `json:"role"`
	Name      string     `json:"name,omitempty"`
	Replaces  string     `json:"replaces,omitempty"`
	CreatedAt time.Time  `json:"created_at"`
	CreatedBy string     `json:"created_by"`
	Expires   time.Time  `json:"expires"`
	Uses      int        `json:"uses"`
	UsedBy    []tokenUse `json:"used_by,omitempty"`
	Wrong     int        `json:"wrong,omitempty"`
	RevokedAt *time.Time `json:"revoked_at,omitempty"`

	rev int64
}

func (r tokenRecord) matches(secret string) bool {
	sum := sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(sum[:], r.Hash) == 1
}

func (r tokenRecord) state(now time.Time) TokenState {
	switch {
	case r.RevokedAt != nil:
		return TokenRevoked
	case r.Wrong >= maxWrongSecrets:
		return TokenLocked
	case len(r.UsedBy) >= r.Uses:
		return TokenUsed
	case !now.Before(r.Expires):
		return TokenExpired
	default:
		return TokenValid
	}
}

// purgeable says whether the token has been over for so long that nobody asks
// for it any more. A token in use may still serve a join to be repeated.
func (r tokenRecord) purgeable(now time.Time) bool {
	over := r.Expires
	if n := len(r.UsedBy); n >= r.Uses {
		over = r.UsedBy[n-1].At
	}
	if r.RevokedAt != nil {
		over = *r.RevokedAt
	}
	return now.Sub(over) > keepTokens
}

func (r tokenRecord) info(now time.Time) TokenInfo {
	i := TokenInfo{
		ID: r.ID, Role: r.Role, Name: r.Name, Replaces: r.Replaces, State: r.state(now), CreatedAt: r.CreatedAt, CreatedBy: r.CreatedBy,
		Expires: r.Expires, UsesLeft: max(0, r.Uses-len(r.UsedBy)), WrongSecrets: r.Wrong,
	}
	for _, u := range r.UsedBy {
		i.UsedBy = append(i.UsedBy, u.Name)
	}
	return i
}

// CreateToken makes a token for nodes that have the members at addrs
// (host:port of the API; those that can sign, hence data nodes) and the pin of
// the cluster's CA to go by. It returns the token and its printed form, the
// only time that the secret is seen: the store keeps a hash.
func (s *Store) CreateToken(ctx context.Context, spec TokenSpec, pin [32]byte, addrs []string, createdBy string, now time.Time) (Token, string, error) {
	if err := spec.complete(); err != nil {
		return Token{}, "", fmt.Errorf("create token: %w", err)
	}
	if err := s.PurgeTokens(ctx, now); err != nil {
		return Token{}, "", fmt.Errorf("create token: %w", err)
	}
	raw := make([]byte, tokenIDLen+tokenSecret)
	if _, err := rand.Read(raw); err != nil {
		return Token{}, "", fmt.Errorf("create token: %w", err)
	}
	t := Token{
		ID: hex.EncodeToString(raw[:tokenIDLen]), Secret: hex.EncodeToString(raw[tokenIDLen:]), Pin: pin,
		ClusterID: s.id, Role: spec.Role, Addrs: slices.Clone(addrs), Expires: now.Add(spec.TTL).UTC().Truncate(time.Second),
	}
	text, err := t.encode()
	if err != nil {
		return Token{}, "", fmt.Errorf("create token: %w", err)
	}
	hash := sha256.Sum256([]byte(t.Secret))
	rec := tokenRecord{
		ID: t.ID, Hash: hash[:], Role: spec.Role, Name: spec.Name, Replaces: spec.Replaces, CreatedAt: stamp(now), CreatedBy: createdBy,
		Expires: t.Expires, Uses: spec.Uses,
	}
	if err := s.put(ctx, s.tokenKey(t.ID), rec, 0); err != nil {
		return Token{}, "", fmt.Errorf("create token: %w", err)
	}
	return t, text, nil
}

func (s *Store) tokenRecords(ctx context.Context) ([]tokenRecord, error) {
	resp, err := s.c.Get(ctx, s.key(dirTokens), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read tokens: %w", err)
	}
	out := make([]tokenRecord, 0, len(resp.Kvs))
	for _, kv := range resp.Kvs {
		r := tokenRecord{rev: kv.ModRevision}
		if err := json.Unmarshal(kv.Value, &r); err != nil {
			return nil, fmt.Errorf("read tokens: decode %s: %w", kv.Key, err)
		}
		out = append(out, r)
	}
	slices.SortFunc(out, func(a, b tokenRecord) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return out, nil
}

// Tokens lists the tokens in the order of their making, those included that
// ended within the last day.
func (s *Store) Tokens(ctx context.Context) ([]TokenInfo, error) {
	recs, err := s.tokenRecords(ctx)
	if err != nil {
		return nil, err
	}
	now := time.Now()
	out := make([]TokenInfo, 0, len(recs))
	for _, r := range recs {
		out = append(out, r.info(now))
	}
	return out, nil
}

// RevokeToken ends a token; revoking it again is no error. [ErrNoToken] when
// there is no such id. A node that has joined with it stays a member.
func (s *Store) RevokeToken(ctx context.Context, id string) error {
	return s.updateToken(ctx, id, func(r *tokenRecord) bool {
		if r.RevokedAt != nil {
			return false
		}
		at := stamp(time.Now())
		r.RevokedAt = &at
		return true
	})
}

// RevokeTokensOf ends the tokens that would let a node in again, or another in
// its place: those made for it by name, those that replace it, and the one that
// it joined with. spare is one to keep, "" for none. It returns how many it has
// ended.
func (s *Store) RevokeTokensOf(ctx context.Context, name, joinedWith, spare string) (int, error) {
	recs, err := s.tokenRecords(ctx)
	if err != nil {
		return 0, fmt.Errorf("revoke tokens of %s: %w", name, err)
	}
	now, ended := time.Now(), 0
	for _, r := range recs {
		its := r.Name == name || r.Replaces == name || r.ID == joinedWith
		if !its || r.ID == spare || r.state(now) != TokenValid {
			continue
		}
		if err := s.RevokeToken(ctx, r.ID); err != nil {
			return ended, fmt.Errorf("revoke tokens of %s: %w", name, err)
		}
		ended++
	}
	return ended, nil
}

// countWrongSecret notes a wrong secret; the tenth locks the token.
func (s *Store) countWrongSecret(ctx context.Context, id string) error {
	return s.updateToken(ctx, id, func(r *tokenRecord) bool {
		if r.Wrong >= maxWrongSecrets {
			return false
		}
		r.Wrong++
		return true
	})
}

// updateToken is read, change, compare and write, until it goes through.
// Nothing is written when change returns false.
func (s *Store) updateToken(ctx context.Context, id string, change func(*tokenRecord) bool) error {
	for {
		var r tokenRecord
		rev, ok, err := s.get(ctx, s.tokenKey(id), &r)
		if err != nil {
			return fmt.Errorf("update token %s: %w", id, err)
		}
		if !ok {
			return refuse(CodeNoToken, "there is no token %q: pgha token list shows those there are", id)
		}
		if !change(&r) {
			return nil
		}
		err = s.put(ctx, s.tokenKey(id), r, rev)
		if err == nil {
			return nil
		}
		if !isCode(err, CodeConflict) {
			return fmt.Errorf("update token %s: %w", id, err)
		}
	}
}

// PurgeTokens deletes the tokens that ended more than a day ago. CreateToken
// calls it; call it now and then besides.
func (s *Store) PurgeTokens(ctx context.Context, now time.Time) error {
	recs, err := s.tokenRecords(ctx)
	if err != nil {
		return fmt.Errorf("purge tokens: %w", err)
	}
	for _, r := range recs {
		if !r.purgeable(now) {
			continue
		}
		key := s.tokenKey(r.ID)
		if _, err := s.c.Txn(ctx).
			If(clientv3.Compare(clientv3.ModRevision(key), "=", r.rev)).
			Then(clientv3.OpDelete(key)).
			Commit(); err != nil {
			return fmt.Errorf("purge token %s: %w", r.ID, err)
		}
	}
	return nil
}
