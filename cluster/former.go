package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"time"

	mvccpb "go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// dirFormer holds the nodes that were members once.
const dirFormer = "former/"

// keepFormer is how many former members are remembered.
const keepFormer = 64

// FormerMember is a node that was taken out of the cluster. A node that was
// down at that time comes back and asks: by this it is told, and by its address
// the firewalls let it ask.
//
// It is one life of a node that the entry is about, not its name: a host of the
// same name may have joined since. What tells two lives apart is the etcd
// member, which is never the same twice; see [FormerOf].
type FormerMember struct {
	Name      string     `json:"name"`
	Addr      netip.Addr `json:"addr"`
	Role      NodeRole   `json:"role"`
	MemberID  uint64     `json:"member_id,string"` // of etcd; 0 = it had none
	RemovedAt time.Time  `json:"removed_at"`
	By        string     `json:"by"`  // who: "root@n1"
	Why       string     `json:"why"` // how, in words: "removed", "replaced", "left"
}

func (s *Store) formerKey(f FormerMember) string {
	return fmt.Sprintf("%s%s%s-%x", s.prefix, dirFormer, f.Name, f.MemberID)
}

// formerOp is the write of an entry, for a transaction.
func (s *Store) formerOp(f FormerMember) (clientv3.Op, error) {
	f.RemovedAt = stamp(f.RemovedAt)
	data, err := json.Marshal(f)
	if err != nil {
		return clientv3.Op{}, fmt.Errorf("encode former member %s: %w", f.Name, err)
	}
	return clientv3.OpPut(s.formerKey(f), string(data)), nil
}

// PutFormer remembers a node that was taken out, and forgets the oldest beyond
// a bound. Write it only once the node cannot come back by itself: a node that
// is told so stops for good.
func (s *Store) PutFormer(ctx context.Context, f FormerMember) error {
	op, err := s.formerOp(f)
	if err == nil {
		_, err = s.c.Do(ctx, op)
	}
	if err != nil {
		return fmt.Errorf("remember former member %s: %w", f.Name, err)
	}
	return s.boundFormer(ctx)
}

// TakeOut ends the membership of m, as read from the roster, and remembers it as
// f, in one transaction. Its etcd member must be out already. It fails with
// [ErrConflict], and changes nothing, when the entry has changed since it was
// read; a member that is not on the roster (Rev 0) is only remembered.
func (s *Store) TakeOut(ctx context.Context, m Member, f FormerMember) error {
	op, err := s.formerOp(f)
	if err != nil {
		return err
	}
	ops := []clientv3.Op{op}
	key := s.memberKey(f.Name)
	if m.Rev != 0 {
		ops = append(ops, clientv3.OpDelete(key))
	}
	resp, err := s.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", m.Rev)).Then(ops...).Commit()
	if err != nil {
		return fmt.Errorf("take out member %s: %w", f.Name, err)
	}
	if !resp.Succeeded {
		return fmt.Errorf("take out member %s: %w", f.Name, conflict(key))
	}
	return s.boundFormer(ctx)
}

// Former returns the former members, the latest first.
func (s *Store) Former(ctx context.Context) ([]FormerMember, error) {
	resp, err := s.c.Get(ctx, s.key(dirFormer), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read former members: %w", err)
	}
	return decodeFormer(resp.Kvs)
}

func decodeFormer(kvs []*mvccpb.KeyValue) ([]FormerMember, error) {
	out := make([]FormerMember, 0, len(kvs))
	for _, kv := range kvs {
		var f FormerMember
		if err := json.Unmarshal(kv.Value, &f); err != nil {
			return nil, fmt.Errorf("read former members: decode %s: %w", kv.Key, err)
		}
		out = append(out, f)
	}
	slices.SortStableFunc(out, func(a, b FormerMember) int { return b.RemovedAt.Compare(a.RemovedAt) })
	return out, nil
}

func (s *Store) boundFormer(ctx context.Context) error {
	all, err := s.Former(ctx)
	if err != nil || len(all) <= keepFormer {
		return err
	}
	var ops []clientv3.Op
	for _, f := range all[keepFormer:] {
		ops = append(ops, clientv3.OpDelete(s.formerKey(f)))
	}
	if _, err := s.c.Txn(ctx).Then(ops...).Commit(); err != nil {
		return fmt.Errorf("forget the oldest former members: %w", err)
	}
	return nil
}

// FormerOf finds the removal of the node that is called name and has, or had,
// the etcd member id. A node that does not know its member any more (id 0) was
// removed if the latest entry of its name says so.
func FormerOf(former []FormerMember, name string, id uint64) (FormerMember, bool) {
	for _, f := range former { // the latest first
		if f.Name == name && (id == 0 || f.MemberID == id) {
			return f, true
		}
	}
	return FormerMember{}, false
}
