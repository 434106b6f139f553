package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// HistoryKept is how many changes of the settings are remembered, the newest.
const HistoryKept = 100

const dirHistory = "config-history/"

// SettingsChange is a change of the settings that was made.
type SettingsChange struct {
	ID     int64     `json:"id"` // counts from 1
	At     time.Time `json:"at"`
	Actor  string    `json:"actor"`
	What   []string  `json:"what"` // a line a setting, for people
	Before Settings  `json:"before"`
}

func (s *Store) historyKey(id int64) string { return s.key(fmt.Sprintf("%s%012d", dirHistory, id)) }

// ChangeSettings replaces the settings that [Store.Settings] returned with rev,
// and keeps the change in the history, in one transaction. Of c it takes Actor and
// What; it returns the change as it is kept and the new revision. [ErrConflict]
// when the settings have changed since rev.
func (s *Store) ChangeSettings(ctx context.Context, before, set Settings, rev int64, c SettingsChange) (SettingsChange, int64, error) {
	c.ID, c.At, c.Before = before.Change+1, stamp(time.Now()), before
	set.Change = c.ID
	if err := set.Validate(); err != nil {
		return c, 0, fmt.Errorf("change settings: %w", err)
	}
	if rev == 0 {
		return c, 0, fmt.Errorf("change settings: %w", s.noCluster())
	}
	setJSON, err := json.Marshal(set)
	if err != nil {
		return c, 0, fmt.Errorf("encode settings: %w", err)
	}
	changeJSON, err := json.Marshal(c)
	if err != nil {
		return c, 0, fmt.Errorf("encode change of settings: %w", err)
	}
	key := s.key(keyConfig)
	ops := []clientv3.Op{clientv3.OpPut(key, string(setJSON)), clientv3.OpPut(s.historyKey(c.ID), string(changeJSON))}
	if oldest := c.ID - HistoryKept + 1; oldest > 1 {
		ops = append(ops, clientv3.OpDelete(s.key(dirHistory), clientv3.WithRange(s.historyKey(oldest))))
	}
	r, err := s.c.Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", rev)).Then(ops...).Commit()
	if err != nil {
		return c, 0, fmt.Errorf("change settings: %w", err)
	}
	if !r.Succeeded {
		return c, 0, fmt.Errorf("change settings: %w", conflict(key))
	}
	return c, r.Header.Revision, nil
}

// SettingsHistory returns the changes that are kept, the oldest first.
func (s *Store) SettingsHistory(ctx context.Context) ([]SettingsChange, error) {
	r, err := s.c.Get(ctx, s.key(dirHistory), clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read history of settings: %w", err)
	}
	out := make([]SettingsChange, 0, len(r.Kvs))
	for _, kv := range r.Kvs {
		var c SettingsChange
		if err := json.Unmarshal(kv.Value, &c); err != nil {
			return nil, fmt.Errorf("decode %s: %w", kv.Key, err)
		}
		out = append(out, c)
	}
	return out, nil
}
