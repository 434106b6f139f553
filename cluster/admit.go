package cluster

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"slices"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// joinView is what a join depends on, at one revision.
type joinView struct {
	rev                        int64
	token                      tokenRecord
	found                      bool
	members                    []Member
	settings                   Settings
	sealedSecrets, sealedCAKey []byte
}

func (s *Store) joinView(ctx context.Context, tokenID string) (joinView, error) {
	if b, err := hex.DecodeString(tokenID); err != nil || len(b) != tokenIDLen {
		return joinView{}, nil // no token has such an id
	}
	resp, err := s.c.Txn(ctx).Then(
		clientv3.OpGet(s.tokenKey(tokenID)),
		clientv3.OpGet(s.key(dirMembers), clientv3.WithPrefix()),
		clientv3.OpGet(s.key(keyConfig)),
		clientv3.OpGet(s.key(keySecrets)),
		clientv3.OpGet(s.key(keyCAKey)),
	).Commit()
	if err != nil {
		return joinView{}, fmt.Errorf("read roster and token: %w", err)
	}
	v := joinView{rev: resp.Header.Revision}
	if kvs := resp.Responses[0].GetResponseRange().Kvs; len(kvs) > 0 {
		if err := json.Unmarshal(kvs[0].Value, &v.token); err != nil {
			return joinView{}, fmt.Errorf("decode token %s: %w", tokenID, err)
		}
		v.token.rev, v.found = kvs[0].ModRevision, true
	}
	if v.members, err = decodeMembers(resp.Responses[1].GetResponseRange().Kvs); err != nil {
		return joinView{}, fmt.Errorf("read roster: %w", err)
	}
	for i, into := range []func([]byte) error{
		func(b []byte) error { return json.Unmarshal(b, &v.settings) },
		func(b []byte) error { v.sealedSecrets = b; return nil },
		func(b []byte) error { v.sealedCAKey = b; return nil },
	} {
		kvs := resp.Responses[2+i].GetResponseRange().Kvs
		if len(kvs) == 0 {
			return joinView{}, s.noCluster()
		}
		if err := into(kvs[0].Value); err != nil {
			return joinView{}, fmt.Errorf("decode %s: %w", kvs[0].Key, err)
		}
	}
	return v, nil
}

// admit writes self, and with a new member (Rev 0) consumes the token, if
// neither the token nor any member has changed since v was read. A repeated
// join refreshes JoinedAt, so that it is not swept as abandoned meanwhile.
func (s *Store) admit(ctx context.Context, v joinView, self Member, now time.Time) (bool, error) {
	data, err := json.Marshal(self)
	if err != nil {
		return false, fmt.Errorf("encode member %s: %w", self.Name, err)
	}
	ops := []clientv3.Op{clientv3.OpPut(s.memberKey(self.Name), string(data))}
	if self.Rev == 0 {
		rec := v.token
		rec.UsedBy = append(slices.Clone(rec.UsedBy), tokenUse{Name: self.Name, At: stamp(now)})
		data, err := json.Marshal(rec)
		if err != nil {
			return false, fmt.Errorf("encode token %s: %w", rec.ID, err)
		}
		ops = append(ops, clientv3.OpPut(s.tokenKey(rec.ID), string(data)))
	}
	resp, err := s.c.Txn(ctx).If(
		clientv3.Compare(clientv3.ModRevision(s.tokenKey(v.token.ID)), "=", v.token.rev),
		clientv3.Compare(clientv3.ModRevision(s.memberKey(self.Name)), "=", self.Rev),
		// Over the whole roster, for the address must be free as well.
		clientv3.Compare(clientv3.ModRevision(s.key(dirMembers)).WithPrefix(), "<", v.rev+1),
	).Then(ops...).Commit()
	if err != nil {
		return false, fmt.Errorf("write member %s: %w", self.Name, err)
	}
	return resp.Succeeded, nil
}
