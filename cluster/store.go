package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	mvccpb "go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Root is the prefix of everything that pgha itself keeps in etcd.
const Root = "/pgha/"

// AbandonAfter is how long a join may stay unfinished before it counts as
// abandoned.
const AbandonAfter = 15 * time.Minute

const (
	keyIdentity = "identity"
	keyConfig   = "config"
	keySecrets  = "secrets"
	keyCAKey    = "ca-key"
	dirMembers  = "members/"
	dirTokens   = "tokens/"
)

// Store reads and writes the cluster's part of etcd. All reads are
// linearizable; every method fails with the context or when etcd has no quorum.
// It is safe for concurrent use.
type Store struct {
	c      *clientv3.Client
	id     string
	prefix string
}

// NewStore returns the store of the cluster with this id (a UUID).
func NewStore(c *clientv3.Client, clusterID string) *Store {
	return &Store{c: c, id: clusterID, prefix: Root + clusterID + "/"}
}

// Prefix is the common prefix of this cluster's keys, with a slash at its end.
func (s *Store) Prefix() string { return s.prefix }

func (s *Store) key(k string) string          { return s.prefix + k }
func (s *Store) memberKey(name string) string { return s.prefix + dirMembers + name }
func (s *Store) tokenKey(id string) string    { return s.prefix + dirTokens + id }

// Create writes a new cluster in one transaction: identity, settings, the
// first member and the sealed values. When the same identity is there already
// it changes nothing and succeeds. [ErrOtherCluster] when etcd holds another
// cluster; both are named.
func (s *Store) Create(ctx context.Context, id Identity, self Member, set Settings, sealedSecrets, sealedCAKey []byte) error {
	if err := id.Validate(); err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	if id.ID != s.id {
		return refuse(CodeOtherCluster, "create cluster: the identity is of cluster %s, the store of cluster %s", id.ID, s.id)
	}
	if err := self.Validate(); err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	if err := set.Validate(); err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	if len(sealedSecrets) == 0 || len(sealedCAKey) == 0 {
		return fmt.Errorf("create cluster: the sealed secrets or the sealed CA key are missing")
	}
	idJSON, setJSON, selfJSON, err := encode3(id, set, self)
	if err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	// A comparison over the whole range holds only while the range is empty.
	resp, err := s.c.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(Root).WithPrefix(), "=", 0)).
		Then(
			clientv3.OpPut(s.key(keyIdentity), idJSON),
			clientv3.OpPut(s.key(keyConfig), setJSON),
			clientv3.OpPut(s.memberKey(self.Name), selfJSON),
			clientv3.OpPut(s.key(keySecrets), string(sealedSecrets)),
			clientv3.OpPut(s.key(keyCAKey), string(sealedCAKey)),
		).
		Else(clientv3.OpGet(Root, clientv3.WithPrefix())).
		Commit()
	if err != nil {
		return fmt.Errorf("create cluster: %w", err)
	}
	if resp.Succeeded {
		return nil
	}
	return sameCluster(id, resp.Responses[0].GetResponseRange().Kvs)
}

// sameCluster says whether what etcd holds already is the cluster to create.
func sameCluster(want Identity, kvs []*mvccpb.KeyValue) error {
	for _, kv := range kvs {
		if !strings.HasSuffix(string(kv.Key), "/"+keyIdentity) {
			continue
		}
		var have Identity
		if err := json.Unmarshal(kv.Value, &have); err != nil {
			return fmt.Errorf("read identity %s: %w", kv.Key, err)
		}
		if have.ID != want.ID || have.Name != want.Name {
			return refuse(CodeOtherCluster, "etcd holds cluster %s (%s), not %s (%s): a node belongs to one cluster for its life; reset it to use it for another",
				have.Name, have.ID, want.Name, want.ID)
		}
		return nil
	}
	return refuse(CodeOtherCluster, "etcd holds keys under %s but no cluster identity, not cluster %s (%s)", Root, want.Name, want.ID)
}

func encode3(a, b, c any) (string, string, string, error) {
	var out [3]string
	for i, v := range []any{a, b, c} {
		data, err := json.Marshal(v)
		if err != nil {
			return "", "", "", err
		}
		out[i] = string(data)
	}
	return out[0], out[1], out[2], nil
}

// get decodes the JSON value of a key and returns its revision; ok is false
// when the key does not exist.
func (s *Store) get(ctx context.Context, key string, v any) (rev int64, ok bool, err error) {
	resp, err := s.c.Get(ctx, key)
	if err != nil {
		return 0, false, err
	}
	if len(resp.Kvs) == 0 {
		return 0, false, nil
	}
	if err := json.Unmarshal(resp.Kvs[0].Value, v); err != nil {
		return 0, false, fmt.Errorf("decode %s: %w", key, err)
	}
	return resp.Kvs[0].ModRevision, true, nil
}

// put writes v when the key is still at rev (0: when it does not exist).
func (s *Store) put(ctx context.Context, key string, v any, rev int64) error {
	data, err := json.Marshal(v)
	if err != nil {
		return err
	}
	resp, err := s.c.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).
		Then(clientv3.OpPut(key, string(data))).
		Commit()
	if err != nil {
		return err
	}
	if !resp.Succeeded {
		return conflict(key)
	}
	return nil
}

func conflict(key string) error {
	return refuse(CodeConflict, "%s was changed by someone else in between: read it again and repeat", key)
}

// Identity returns the stored identity; [ErrNoCluster] when there is none.
func (s *Store) Identity(ctx context.Context) (Identity, error) {
	var id Identity
	_, ok, err := s.get(ctx, s.key(keyIdentity), &id)
	if err != nil {
		return Identity{}, fmt.Errorf("read identity: %w", err)
	}
	if !ok {
		return Identity{}, s.noCluster()
	}
	return id, nil
}

func (s *Store) noCluster() error {
	return refuse(CodeNoCluster, "etcd does not hold cluster %s", s.id)
}

// Members returns the roster in the order of names, and the etcd revision at
// which it was read, from which [Store.Watch] can go on.
func (s *Store) Members(ctx context.Context) ([]Member, int64, error) {
	resp, err := s.c.Get(ctx, s.key(dirMembers), clientv3.WithPrefix())
	if err != nil {
		return nil, 0, fmt.Errorf("read roster: %w", err)
	}
	ms, err := decodeMembers(resp.Kvs)
	if err != nil {
		return nil, 0, fmt.Errorf("read roster: %w", err)
	}
	return ms, resp.Header.Revision, nil
}

func decodeMembers(kvs []*mvccpb.KeyValue) ([]Member, error) {
	out := make([]Member, 0, len(kvs))
	for _, kv := range kvs {
		var m Member
		if err := json.Unmarshal(kv.Value, &m); err != nil {
			return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
		}
		m.Rev = kv.ModRevision
		out = append(out, m)
	}
	slices.SortFunc(out, func(a, b Member) int { return strings.Compare(a.Name, b.Name) })
	return out, nil
}

// PutMember writes m when the roster still has its entry as m.Rev says: 0
// makes a new entry only, another value replaces just that revision.
// [ErrConflict] otherwise. See [Store.UpdateMember] for read, change, write.
func (s *Store) PutMember(ctx context.Context, m Member) error {
	if err := m.Validate(); err != nil {
		return fmt.Errorf("write member %s: %w", m.Name, err)
	}
	if err := s.put(ctx, s.memberKey(m.Name), m, m.Rev); err != nil {
		return fmt.Errorf("write member %s: %w", m.Name, err)
	}
	return nil
}

// UpdateMember reads the entry of name, lets change alter it and writes it
// back, again and again while others write in between. Nothing is written when
// change fails. [ErrNoMember] when the roster has no such name.
func (s *Store) UpdateMember(ctx context.Context, name string, change func(*Member) error) error {
	for {
		var m Member
		rev, ok, err := s.get(ctx, s.memberKey(name), &m)
		if err != nil {
			return fmt.Errorf("update member %s: %w", name, err)
		}
		if !ok {
			return noMember(name)
		}
		m.Rev = rev
		if err := change(&m); err != nil {
			return fmt.Errorf("update member %s: %w", name, err)
		}
		if m.Name != name {
			return fmt.Errorf("update member %s: its name cannot change (to %s)", name, m.Name)
		}
		if err := m.Validate(); err != nil {
			return fmt.Errorf("update member %s: %w", name, err)
		}
		err = s.put(ctx, s.memberKey(name), m, rev)
		if err == nil {
			return nil
		}
		if !isCode(err, CodeConflict) {
			return fmt.Errorf("update member %s: %w", name, err)
		}
	}
}

func noMember(name string) error {
	return refuse(CodeNoMember, "the cluster has no member %q", name)
}

// RemoveMember takes name out of the roster; [ErrNoMember] when it is not there.
func (s *Store) RemoveMember(ctx context.Context, name string) error {
	resp, err := s.c.Delete(ctx, s.memberKey(name))
	if err != nil {
		return fmt.Errorf("remove member %s: %w", name, err)
	}
	if resp.Deleted == 0 {
		return noMember(name)
	}
	return nil
}

// AbandonedJoins returns the members whose join has stood unfinished for more
// than [AbandonAfter]. The caller makes sure that the etcd member of each
// never started, takes it out of etcd and then calls [Store.DropAbandoned].
func (s *Store) AbandonedJoins(ctx context.Context, now time.Time) ([]Member, error) {
	ms, _, err := s.Members(ctx)
	if err != nil {
		return nil, fmt.Errorf("list abandoned joins: %w", err)
	}
	return slices.DeleteFunc(ms, func(m Member) bool {
		return m.State != StateJoining || now.Sub(m.JoinedAt) <= AbandonAfter
	}), nil
}

// DropAbandoned frees the name of an abandoned join. The token stays used. It
// fails with [ErrConflict], and removes nothing, when the join has been
// repeated or finished since m was read.
func (s *Store) DropAbandoned(ctx context.Context, m Member) error {
	key := s.memberKey(m.Name)
	resp, err := s.c.Txn(ctx).
		If(clientv3.Compare(clientv3.ModRevision(key), "=", m.Rev)).
		Then(clientv3.OpDelete(key)).
		Commit()
	if err != nil {
		return fmt.Errorf("drop abandoned join of %s: %w", m.Name, err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("drop abandoned join of %s: %w", m.Name, conflict(key))
	}
	return nil
}

// Settings returns the cluster-wide settings and the revision to pass to
// [Store.PutSettings]. [ErrNoCluster] when there are none.
func (s *Store) Settings(ctx context.Context) (Settings, int64, error) {
	var set Settings
	rev, ok, err := s.get(ctx, s.key(keyConfig), &set)
	if err != nil {
		return Settings{}, 0, fmt.Errorf("read settings: %w", err)
	}
	if !ok {
		return Settings{}, 0, s.noCluster()
	}
	return set, rev, nil
}

// PutSettings replaces the settings that [Store.Settings] returned with rev;
// [ErrConflict] when they have changed since.
func (s *Store) PutSettings(ctx context.Context, set Settings, rev int64) error {
	if err := set.Validate(); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	if rev == 0 {
		return fmt.Errorf("write settings: %w", s.noCluster())
	}
	if err := s.put(ctx, s.key(keyConfig), set, rev); err != nil {
		return fmt.Errorf("write settings: %w", err)
	}
	return nil
}

// SealedSecrets returns the sealed [Secrets]; see [OpenSecrets].
func (s *Store) SealedSecrets(ctx context.Context) ([]byte, error) {
	return s.sealed(ctx, keySecrets)
}

// SealedCAKey returns the CA's sealed private key; see [OpenCAKey].
func (s *Store) SealedCAKey(ctx context.Context) ([]byte, error) {
	return s.sealed(ctx, keyCAKey)
}

func (s *Store) sealed(ctx context.Context, k string) ([]byte, error) {
	resp, err := s.c.Get(ctx, s.key(k))
	if err != nil {
		return nil, fmt.Errorf("read sealed %s: %w", k, err)
	}
	if len(resp.Kvs) == 0 {
		return nil, s.noCluster()
	}
	return resp.Kvs[0].Value, nil
}
