package cluster

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/pki"
)

const (
	keyCA    = "ca"
	dirTaken = "taken/"
)

// CAPhase says how far the replacement of the CA has come.
type CAPhase string

// The phases (docs/adr/0019-rotation-of-the-ca.md).
const (
	CATrust CAPhase = "trust" // both are trusted, the former signs
	CASign  CAPhase = "sign"  // both are trusted, the next signs
	CADone  CAPhase = "done"  // one CA, as ever
)

// CAState says which CAs every member shall trust and which one signs. It is in
// etcd from the first replacement of the CA on; each node follows it by itself.
//
// A witness holds all of etcd's keys and must not be able to make the others
// trust a CA of its own. What data nodes go by is therefore sealed; a witness
// reads the same in the clear.
type CAState struct {
	// Step grows by one with every change. A node never follows one that is
	// below what it has followed: old sealed values open for ever.
	Step  int64   `json:"step"`
	Phase CAPhase `json:"phase"`
	// Signed says that the next CA has signed, whether or not it does now: nodes
	// may have certificates of it.
	Signed bool      `json:"signed,omitempty"`
	Certs  [][]byte  `json:"certs"` // PEM; the first signs
	Keys   [][]byte  `json:"keys"`  // sealed, in the order of Certs
	By     string    `json:"by"`    // as root@n1
	At     time.Time `json:"at"`    // when this phase began
}

// Trust is what ca.crt holds in this state.
func (s CAState) Trust() []byte { return pki.TrustFile(s.Certs...) }

// Start makes next, certificate and sealed key, trusted beside the CA that signs.
func (s CAState) Start(next, nextKey []byte) (CAState, error) {
	if s.Phase != CADone || len(s.Certs) != 1 || len(s.Keys) != 1 {
		return s, fmt.Errorf("start in phase %s: another CA is being introduced already", s.Phase)
	}
	s.Step, s.Phase, s.Signed = s.Step+1, CATrust, false
	s.Certs, s.Keys = [][]byte{s.Certs[0], next}, [][]byte{s.Keys[0], nextKey}
	return s, nil
}

// Sign makes the next CA sign, and the former one only trusted.
func (s CAState) Sign() (CAState, error) { return s.swap(CATrust, CASign) }

// Back makes the former CA sign again.
func (s CAState) Back() (CAState, error) { return s.swap(CASign, CATrust) }

func (s CAState) swap(from, to CAPhase) (CAState, error) {
	if s.Phase != from || len(s.Certs) != 2 || len(s.Keys) != 2 {
		return s, fmt.Errorf("go to phase %s from phase %s: that is not the order", to, s.Phase)
	}
	s.Step, s.Phase, s.Signed = s.Step+1, to, true
	s.Certs, s.Keys = [][]byte{s.Certs[1], s.Certs[0]}, [][]byte{s.Keys[1], s.Keys[0]}
	return s, nil
}

// Drop leaves the CA that signs, alone: at the end of a replacement, and of one
// that is given up.
func (s CAState) Drop() (CAState, error) {
	if s.Phase == CADone || len(s.Certs) != 2 || len(s.Keys) != 2 {
		return s, errors.New("drop a CA: there is only one")
	}
	s.Step, s.Phase, s.Signed = s.Step+1, CADone, false
	s.Certs, s.Keys = s.Certs[:1:1], s.Keys[:1:1]
	return s, nil
}

// validate checks what a node could not work with.
func (s CAState) validate(clusterID string) error {
	want := map[CAPhase]int{CATrust: 2, CASign: 2, CADone: 1}[s.Phase]
	if want == 0 || len(s.Certs) != want || len(s.Keys) != want {
		return fmt.Errorf("phase %q with %d certificates and %d keys", s.Phase, len(s.Certs), len(s.Keys))
	}
	if _, err := pki.Trusted(s.Trust()); err != nil {
		return err
	}
	if id, err := pki.ClusterOf(s.Trust()); err != nil || id != clusterID {
		return fmt.Errorf("%w: CA of cluster %s, want %s", pki.ErrOtherCluster, id, clusterID)
	}
	return nil
}

// storedCA is a CAState as etcd holds it.
type storedCA struct {
	State  json.RawMessage `json:"state"`
	Sealed []byte          `json:"sealed"` // State, for those who have the key
}

// CAState returns the state of the CA and the revision for [Store.PutCAState];
// nil when the CA was never replaced. With a key, on a data node, only what was
// sealed with it counts; without, on a witness, what stands there.
func (s *Store) CAState(ctx context.Context, key *SealingKey) (*CAState, int64, error) {
	var stored storedCA
	rev, ok, err := s.get(ctx, s.key(keyCA), &stored)
	if err != nil {
		return nil, 0, fmt.Errorf("read state of the CA: %w", err)
	}
	if !ok {
		return nil, 0, nil
	}
	data := []byte(stored.State)
	if key != nil {
		if data, err = Open(*key, s.id, keyCA, stored.Sealed); err != nil {
			return nil, 0, fmt.Errorf("read state of the CA: %w", err)
		}
	}
	var state CAState
	if err := json.Unmarshal(data, &state); err != nil {
		return nil, 0, fmt.Errorf("decode state of the CA: %w", err)
	}
	if err := state.validate(s.id); err != nil {
		return nil, 0, fmt.Errorf("read state of the CA: %w", err)
	}
	return &state, rev, nil
}

// PutCAState writes the state, and the key that signs where joins look for it,
// when the state is still at rev (0: when there is none). [ErrConflict] otherwise.
func (s *Store) PutCAState(ctx context.Context, key SealingKey, state CAState, rev int64) error {
	state.At = stamp(state.At)
	if err := state.validate(s.id); err != nil {
		return fmt.Errorf("write state of the CA: %w", err)
	}
	data, err := json.Marshal(state)
	if err != nil {
		return fmt.Errorf("encode state of the CA: %w", err)
	}
	sealed, err := Seal(key, s.id, keyCA, data)
	if err != nil {
		return err
	}
	value, err := json.Marshal(storedCA{State: data, Sealed: sealed})
	if err != nil {
		return fmt.Errorf("encode state of the CA: %w", err)
	}
	resp, err := s.c.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(s.key(keyCA)), "=", rev)).
		Then(clientv3.OpPut(s.key(keyCA), string(value)), clientv3.OpPut(s.key(keyCAKey), string(state.Keys[0]))).
		Commit()
	if err != nil {
		return fmt.Errorf("write state of the CA: %w", err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("write state of the CA: %w", conflict(s.key(keyCA)))
	}
	return nil
}

// Taken is how far a node has followed changes of secrets and of the CA. Each
// writes its own, once every part of it uses what it says.
type Taken struct {
	CA      int64 `json:"ca"`      // CAState.Step
	Secrets int64 `json:"secrets"` // Secrets.Generation
}

// PutTaken writes what a node has taken.
func (s *Store) PutTaken(ctx context.Context, node string, t Taken) error {
	data, err := json.Marshal(t)
	if err != nil {
		return fmt.Errorf("encode what %s has taken: %w", node, err)
	}
	if _, err := s.c.Put(ctx, s.key(dirTaken+node), string(data)); err != nil {
		return fmt.Errorf("write what %s has taken: %w", node, err)
	}
	return nil
}

// TakenBy returns what the nodes have taken, by name. Nodes that are no members
// any more may be among them.
func (s *Store) TakenBy(ctx context.Context) (map[string]Taken, error) {
	dir := s.key(dirTaken)
	resp, err := s.c.Get(ctx, dir, clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read what the nodes have taken: %w", err)
	}
	out := map[string]Taken{}
	for _, kv := range resp.Kvs {
		var t Taken
		if err := json.Unmarshal(kv.Value, &t); err != nil {
			return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
		}
		out[string(kv.Key[len(dir):])] = t
	}
	return out, nil
}

// Rotate returns secrets with new passwords. The former ones stay known, the
// newest first, until [Secrets.Forget]: some node may still want them.
func (s Secrets) Rotate() (Secrets, error) {
	next, err := NewSecrets()
	if err != nil {
		return s, err
	}
	next.Generation = s.Generation + 1
	next.Former[0] = s.PatroniREST
	copy(next.Former[1:], s.Former[:])
	return next, nil
}

// Forget returns the secrets without former passwords.
func (s Secrets) Forget() Secrets {
	s.Former = [formerPasswords]string{}
	return s
}

// FormerPasswords returns the former passwords of Patroni's API, the newest
// first.
func (s Secrets) FormerPasswords() []string {
	return slices.DeleteFunc(slices.Clone(s.Former[:]), func(p string) bool { return p == "" })
}

// ReplaceSecrets replaces sealed secrets by others; [ErrConflict] when they are
// not old any more.
func (s *Store) ReplaceSecrets(ctx context.Context, old, sealed []byte) error {
	if bytes.Equal(old, sealed) {
		return nil
	}
	key := s.key(keySecrets)
	resp, err := s.c.Txn(ctx).If(clientv3.Compare(clientv3.Value(key), "=", string(old))).Then(clientv3.OpPut(key, string(sealed))).Commit()
	if err != nil {
		return fmt.Errorf("write secrets: %w", err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("write secrets: %w", conflict(key))
	}
	return nil
}

// RevokeTokens revokes all tokens that can still be used and returns their ids.
func (s *Store) RevokeTokens(ctx context.Context) ([]string, error) {
	tokens, err := s.Tokens(ctx)
	if err != nil {
		return nil, err
	}
	var ids []string
	for _, t := range tokens {
		if t.State != TokenValid {
			continue
		}
		if err := s.RevokeToken(ctx, t.ID); err != nil {
			return ids, err
		}
		ids = append(ids, t.ID)
	}
	return ids, nil
}
