package patroni

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// Role is a member's role under one name for all versions of Patroni.
type Role string

// The roles. Any other text is Patroni's own, passed through.
const (
	RoleLeader        Role = "leader"
	RoleReplica       Role = "replica"
	RoleStandbyLeader Role = "standby_leader"
	RoleUninitialized Role = "uninitialized"
	RoleDemoted       Role = "demoted"
)

// NormalizeRole translates a role as any version of Patroni writes it.
func NormalizeRole(s string) Role {
	switch s {
	case "master", "primary", "leader":
		return RoleLeader
	case "replica", "standby", "sync_standby", "quorum_standby":
		return RoleReplica
	default:
		return Role(s)
	}
}

// KV is a key of the cluster as etcd holds it.
type KV struct {
	Key         string
	Value       []byte
	ModRevision int64
	Lease       int64
}

// Names of keys below Prefix(scope).
const (
	KeyInitialize = "initialize"
	KeyLeader     = "leader"
	KeyConfig     = "config"
	KeySync       = "sync"
	KeyStatus     = "status"
	KeyHistory    = "history"
	KeyFailover   = "failover"
	KeyMembers    = "members/" // followed by the member's name
)

// Prefix returns the prefix of all keys of the cluster called scope.
func Prefix(scope string) string { return "/service/" + scope + "/" }

// MemberKey is what a member writes about itself.
type MemberKey struct {
	Name           string
	ConnURL        string
	APIURL         string
	State          string
	Role           Role
	Version        string // of Patroni
	XLogLocation   uint64 // bytes: written on a leader, received on a standby
	Timeline       int    // 0 when not known
	Tags           map[string]any
	PendingRestart bool
	Paused         bool
	LeaseID        int64 // the Patroni process's session; the leader key hangs on the leader's
	ModRevision    int64
}

// SyncState says who must confirm commits.
type SyncState struct {
	Leader   string
	Standbys []string
	Quorum   int // 4.x: how many of Standbys must confirm; 0 when all named must
}

// StatusState is the leader's last report.
type StatusState struct {
	Optime uint64            // end of WAL, in bytes
	Slots  map[string]uint64 // positions of permanent slots
}

// HistoryEntry is the end of a timeline.
type HistoryEntry struct {
	Timeline  int
	LSN       uint64
	Reason    string
	Timestamp string // empty when not known
	NewLeader string // empty when not known
}

// ClusterView is a cluster's state as its keys tell it.
type ClusterView struct {
	// Initialized is false before anyone began to make the cluster. With an
	// empty SystemID the making has begun and is not finished.
	Initialized bool
	SystemID    string
	Leader      string // the holder of the leader key; empty when none
	LeaderLease int64
	Members     []MemberKey // in order of names
	Sync        SyncState
	Status      StatusState
	Paused      bool
	Config      map[string]any // nil when absent
	History     []HistoryEntry
	// ModRevisions is keyed by the key's name without the prefix, such as
	// KeyLeader or KeyMembers+"n1"; a key that is absent has 0.
	ModRevisions map[string]int64
}

// Member returns the member called name.
func (v ClusterView) Member(name string) (MemberKey, bool) {
	i := slices.IndexFunc(v.Members, func(m MemberKey) bool { return m.Name == name })
	if i < 0 {
		return MemberKey{}, false
	}
	return v.Members[i], true
}

// ParseView reads the keys below Prefix(scope); others are skipped. A value that
// makes no sense is left at its zero and named in the error, and everything
// else is in the view all the same.
func ParseView(scope string, kvs []KV) (ClusterView, error) {
	v := ClusterView{ModRevisions: map[string]int64{}}
	var errs []error
	for _, kv := range kvs {
		key, ok := strings.CutPrefix(kv.Key, Prefix(scope))
		if !ok {
			continue
		}
		v.ModRevisions[key] = kv.ModRevision
		if err := v.take(key, kv); err != nil {
			errs = append(errs, fmt.Errorf("read key %s: %w", kv.Key, err))
		}
	}
	slices.SortFunc(v.Members, func(a, b MemberKey) int { return strings.Compare(a.Name, b.Name) })
	return v, errors.Join(errs...)
}

func (v *ClusterView) take(key string, kv KV) (err error) {
	switch key {
	case KeyInitialize:
		v.Initialized = true
		v.SystemID = string(kv.Value)
		// Kept all the same: an empty one would mean an unfinished bootstrap.
		if v.SystemID != "" && !validSystemID(v.SystemID) {
			return fmt.Errorf("%q is not a system identifier", v.SystemID)
		}
	case KeyLeader:
		v.Leader, v.LeaderLease = string(kv.Value), kv.Lease
	case KeyConfig:
		if err := json.Unmarshal(kv.Value, &v.Config); err != nil {
			return err
		}
		v.Paused = truthy(v.Config["pause"])
	case KeySync:
		v.Sync, err = parseSync(kv.Value)
	case KeyStatus:
		v.Status, err = parseStatus(kv.Value)
	case KeyHistory:
		v.History, err = parseHistory(kv.Value)
	default:
		name, ok := strings.CutPrefix(key, KeyMembers)
		if !ok || name == "" || strings.Contains(name, "/") {
			return nil
		}
		m, err := parseMember(kv.Value)
		m.Name, m.LeaseID, m.ModRevision = name, kv.Lease, kv.ModRevision
		v.Members = append(v.Members, m)
		return err
	}
	return err
}

func parseMember(data []byte) (MemberKey, error) {
	var raw struct {
		ConnURL        string         `json:"conn_url"`
		APIURL         string         `json:"api_url"`
		State          string         `json:"state"`
		Role           string         `json:"role"`
		Version        string         `json:"version"`
		XLogLocation   uint64         `json:"xlog_location"`
		Timeline       int            `json:"timeline"`
		Tags           map[string]any `json:"tags"`
		PendingRestart bool           `json:"pending_restart"`
		Pause          bool           `json:"pause"`
	}
	err := json.Unmarshal(data, &raw)
	return MemberKey{
		ConnURL: raw.ConnURL, APIURL: raw.APIURL, State: raw.State, Role: NormalizeRole(raw.Role),
		Version: raw.Version, XLogLocation: raw.XLogLocation, Timeline: raw.Timeline,
		Tags: raw.Tags, PendingRestart: raw.PendingRestart, Paused: raw.Pause,
	}, err
}

func parseSync(data []byte) (SyncState, error) {
	var raw struct {
		Leader  string `json:"leader"`
		Standby string `json:"sync_standby"`
		Quorum  int    `json:"quorum"`
	}
	if err := json.Unmarshal(data, &raw); err != nil {
		return SyncState{}, err
	}
	s := SyncState{Leader: raw.Leader, Quorum: raw.Quorum}
	for name := range strings.SplitSeq(raw.Standby, ",") {
		if name = strings.TrimSpace(name); name != "" {
			s.Standbys = append(s.Standbys, name)
		}
	}
	return s, nil
}

func parseStatus(data []byte) (StatusState, error) {
	var raw struct {
		Optime uint64            `json:"optime"`
		Slots  map[string]uint64 `json:"slots"`
	}
	err := json.Unmarshal(data, &raw)
	return StatusState{Optime: raw.Optime, Slots: raw.Slots}, err
}

// parseHistory reads entries of 3 to 5 fields: timeline, position, reason, time,
// new leader.
func parseHistory(data []byte) ([]HistoryEntry, error) {
	var lines [][]json.RawMessage
	if err := json.Unmarshal(data, &lines); err != nil {
		return nil, err
	}
	var entries []HistoryEntry
	for i, line := range lines {
		var e HistoryEntry
		fields := []any{&e.Timeline, &e.LSN, &e.Reason, &e.Timestamp, &e.NewLeader}
		for j := range min(len(line), len(fields)) {
			if err := json.Unmarshal(line[j], fields[j]); err != nil {
				return entries, fmt.Errorf("entry %d: %w", i, err)
			}
		}
		entries = append(entries, e)
	}
	return entries, nil
}

// truthy reads a boolean the way Patroni does.
func truthy(v any) bool {
	switch v := v.(type) {
	case bool:
		return v
	case string:
		switch strings.ToLower(v) {
		case "on", "true", "yes", "1":
			return true
		}
	case float64:
		return v == 1
	}
	return false
}

// validSystemID uses Patroni's own rule: the number holds the time of initdb in
// its upper half, so it has ten digits at least.
func validSystemID(s string) bool {
	if len(s) < 10 {
		return false
	}
	_, err := strconv.ParseUint(s, 10, 64)
	return err == nil
}

// Synchronous says whether commits wait for a standby.
func (v ClusterView) Synchronous() bool {
	return truthy(v.Config["synchronous_mode"]) || v.Config["synchronous_mode"] == "quorum"
}

// MaxLag is how many bytes an asynchronous replica may lack and still be
// promoted.
func (v ClusterView) MaxLag() uint64 {
	if n, ok := v.Config["maximum_lag_on_failover"].(float64); ok && n >= 0 {
		return uint64(n)
	}
	return mib // Patroni's default
}
