package patroni

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func kv(key, value string, rev, lease int64) KV {
	return KV{Key: "/service/main/" + key, Value: []byte(value), ModRevision: rev, Lease: lease}
}

func TestParseView(t *testing.T) {
	history := []HistoryEntry{
		{Timeline: 1, LSN: 25165984, Reason: "no recovery target specified", Timestamp: "2026-01-02T03:04:05.678901+00:00", NewLeader: "n1"},
		{Timeline: 2, LSN: 33554592, Reason: "no recovery target specified"},
	}
	for _, tc := range []struct {
		what string
		kvs  []KV
		want ClusterView
	}{
		{"nothing", nil, ClusterView{ModRevisions: map[string]int64{}}},
		{"bootstrapping", []KV{kv("initialize", "", 5, 0)},
			ClusterView{Initialized: true, ModRevisions: map[string]int64{"initialize": 5}}},
		{"Patroni 3", []KV{
			kv("initialize", "7391234567890123456", 5, 0),
			kv("leader", "n1", 9, 77),
			kv("config", `{"ttl":60,"pause":true}`, 6, 0),
			kv("status", `{"optime":50332000,"slots":{"audit":50331000}}`, 12, 0),
			kv("sync", `{"leader":"n1","sync_standby":"n2"}`, 10, 0),
			kv("members/n2", `{"conn_url":"postgres://10.0.0.2:5442/postgres","api_url":"https://10.0.0.2:8008/patroni","state":"running","role":"replica","version":"3.0.2","xlog_location":50331648,"timeline":2,"tags":{"nofailover":true},"pending_restart":true}`, 13, 78),
			kv("members/n1", `{"conn_url":"postgres://10.0.0.1:5442/postgres","state":"running","role":"master","version":"3.0.2","checkpoint_after_promote":false,"xlog_location":50332000,"timeline":2,"pause":true}`, 11, 77),
			kv("history", `[[1,25165984,"no recovery target specified","2026-01-02T03:04:05.678901+00:00","n1"],[2,33554592,"no recovery target specified"]]`, 8, 0),
			kv("failover", `{}`, 14, 0),
			{Key: "/service/main2/leader", Value: []byte("x"), ModRevision: 99},
		}, ClusterView{
			Initialized: true, SystemID: "7391234567890123456", Leader: "n1", LeaderLease: 77, Paused: true,
			Config: map[string]any{"ttl": 60.0, "pause": true}, History: history,
			Status: StatusState{Optime: 50332000, Slots: map[string]uint64{"audit": 50331000}},
			Sync:   SyncState{Leader: "n1", Standbys: []string{"n2"}},
			Members: []MemberKey{
				{Name: "n1", ConnURL: "postgres://10.0.0.1:5442/postgres", State: "running", Role: RoleLeader, Version: "3.0.2", XLogLocation: 50332000, Timeline: 2, Paused: true, LeaseID: 77, ModRevision: 11},
				{Name: "n2", ConnURL: "postgres://10.0.0.2:5442/postgres", APIURL: "https://10.0.0.2:8008/patroni", State: "running", Role: RoleReplica, Version: "3.0.2", XLogLocation: 50331648, Timeline: 2, Tags: map[string]any{"nofailover": true}, PendingRestart: true, LeaseID: 78, ModRevision: 13},
			},
			ModRevisions: map[string]int64{"initialize": 5, "leader": 9, "config": 6, "status": 12, "sync": 10, "members/n2": 13, "members/n1": 11, "history": 8, "failover": 14},
		}},
		{"Patroni 4", []KV{
			kv("status", `{"optime":50332000,"slots":{"n2":50331000,"n1":50332000},"retain_slots":["n1","n2"]}`, 2, 0),
			kv("sync", `{"leader":"n1","sync_standby":"n2, n3","quorum":1}`, 3, 0),
			kv("members/n1", `{"role":"primary","state":"running","version":"4.1.0","receive_lsn":1,"replay_lsn":1}`, 4, 1),
		}, ClusterView{
			Status:       StatusState{Optime: 50332000, Slots: map[string]uint64{"n1": 50332000, "n2": 50331000}},
			Sync:         SyncState{Leader: "n1", Standbys: []string{"n2", "n3"}, Quorum: 1},
			Members:      []MemberKey{{Name: "n1", State: "running", Role: RoleLeader, Version: "4.1.0", LeaseID: 1, ModRevision: 4}},
			ModRevisions: map[string]int64{"status": 2, "sync": 3, "members/n1": 4},
		}},
		{"no standby", []KV{kv("sync", `{"leader":"n1","sync_standby":null}`, 3, 0)},
			ClusterView{Sync: SyncState{Leader: "n1"}, ModRevisions: map[string]int64{"sync": 3}}},
	} {
		t.Run(tc.what, func(t *testing.T) {
			got, err := ParseView("main", tc.kvs)
			must(t, err)
			if diff := cmp.Diff(tc.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestParseViewGarbage(t *testing.T) {
	v, err := ParseView("main", []KV{
		kv("leader", "n1", 3, 1), kv("members/n1", "{", 4, 1), kv("members/n2", `{"role":"replica","timeline":"two"}`, 4, 2),
		kv("sync", "[]", 5, 0), kv("status", "x", 6, 0), kv("history", `[[1,"x"]]`, 7, 0), kv("config", "7", 8, 0),
		kv("initialize", "garbage", 9, 0), kv("members/n1/x", "{", 9, 0),
	})
	if err == nil {
		t.Fatal("garbage gives no error")
	}
	for _, key := range []string{"members/n1", "members/n2", "sync", "status", "history", "config", "initialize"} {
		if !strings.Contains(err.Error(), "read key /service/main/"+key+": ") {
			t.Errorf("the error does not name %s:\n%v", key, err)
		}
	}
	if n2, ok := v.Member("n2"); v.Leader != "n1" || len(v.Members) != 2 || !ok || n2.Role != RoleReplica || n2.LeaseID != 2 {
		t.Errorf("what made sense is not in the view: %+v", v)
	}
	// An unreadable identifier must not look like an unfinished bootstrap, which
	// would be undone.
	if !v.Initialized || v.SystemID == "" {
		t.Errorf("initialized %v with system identifier %q", v.Initialized, v.SystemID)
	}
}

func TestNormalizeRole(t *testing.T) {
	for in, want := range map[string]Role{
		"master": RoleLeader, "primary": RoleLeader, "leader": RoleLeader, "replica": RoleReplica, "sync_standby": RoleReplica,
		"standby_leader": RoleStandbyLeader, "uninitialized": RoleUninitialized, "demoted": RoleDemoted, "": "",
	} {
		if got := NormalizeRole(in); got != want {
			t.Errorf("NormalizeRole(%q) = %q, want %q", in, got, want)
		}
	}
}
