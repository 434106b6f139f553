package patroni

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// api answers every request with code and body and keeps the last request.
type api struct {
	code         int
	body         string
	method, path string
	got          string
	user, pass   string
	auth         bool
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	data, _ := io.ReadAll(r.Body)
	a.method, a.path, a.got = r.Method, r.URL.Path, string(data)
	a.user, a.pass, a.auth = r.BasicAuth()
	w.WriteHeader(a.code)
	_, _ = io.WriteString(w, a.body)
}

func newAPI(t *testing.T) (*api, *Client) {
	t.Helper()
	a := &api{code: http.StatusOK}
	srv := httptest.NewServer(a)
	t.Cleanup(srv.Close)
	return a, NewClient(srv.URL+"/", nil, labUser, labPass)
}

func TestStatus(t *testing.T) {
	a, c := newAPI(t)
	a.body = `{"state":"running","postmaster_start_time":"2026-01-02 03:04:05+00:00","role":"primary","server_version":170002,
		"xlog":{"location":67108960},"timeline":3,"pending_restart":true,"pause":true,"dcs_last_seen":1767323045,
		"database_system_identifier":"7391234567890123456","patroni":{"version":"4.1.0","scope":"main","name":"n1"},
		"replication":[{"usename":"replicator","application_name":"n2","client_addr":"10.0.0.2","state":"streaming","sync_state":"sync","sync_priority":1}]}`
	got, err := c.Status(t.Context())
	must(t, err)
	want := NodeStatus{
		State: "running", Role: RoleLeader, Timeline: 3, ServerVersion: 170002, PostmasterStart: "2026-01-02 03:04:05+00:00",
		Location: 67108960, PendingRestart: true, Paused: true, DCSLastSeen: time.Unix(1767323045, 0),
		SystemID: "7391234567890123456", PatroniVersion: "4.1.0", Scope: "main",
		Replication: []ReplicaStatus{{User: "replicator", ApplicationName: "n2", ClientAddr: "10.0.0.2", State: "streaming", SyncState: "sync", SyncPriority: 1}},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if a.method != "GET" || a.path != "/patroni" || a.auth {
		t.Errorf("request %s %s, password sent: %v", a.method, a.path, a.auth)
	}

	a.body = `{"state":"running","role":"replica","sync_standby":true,"cluster_unlocked":true,"xlog":{"received_location":20,"replayed_location":10,"paused":true}}`
	got, err = c.Status(t.Context())
	want = NodeStatus{State: "running", Role: RoleReplica, SyncStandby: true, ClusterUnlocked: true, ReceivedLocation: 20, ReplayedLocation: 10, ReplayPaused: true}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("error %v; -want +got:\n%s", err, diff)
	}
	a.body = "<html>"
	if _, err := c.Status(t.Context()); err == nil {
		t.Error("an answer that is no JSON is a status")
	}
}

func TestClusterList(t *testing.T) {
	a, c := newAPI(t)
	a.body = `{"members":[{"name":"n1","role":"leader","state":"running","api_url":"https://10.0.0.1:8008/patroni","host":"10.0.0.1","port":5442,"timeline":2},
		{"name":"n2","role":"sync_standby","state":"streaming","host":"10.0.0.2","port":5442,"timeline":2,"lag":16},
		{"name":"n3","role":"replica","state":"starting","lag":"unknown"}],"scope":"main"}`
	got, err := c.Cluster(t.Context())
	want := []ClusterMember{
		{Name: "n1", Role: RoleLeader, State: "running", APIURL: "https://10.0.0.1:8008/patroni", Host: "10.0.0.1", Port: 5442, Timeline: 2, Lag: -1},
		{Name: "n2", Role: RoleReplica, Sync: true, State: "streaming", Host: "10.0.0.2", Port: 5442, Timeline: 2, Lag: 16},
		{Name: "n3", Role: RoleReplica, State: "starting", Lag: -1},
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("error %v; -want +got:\n%s", err, diff)
	}
}

func TestVerbs(t *testing.T) {
	a, c := newAPI(t)
	ctx := t.Context()
	for _, tc := range []struct {
		what         string
		call         func() error
		method, path string
		body         string
	}{
		{"reload", func() error { return c.Reload(ctx) }, "POST", "/reload", ""},
		{"wake", func() error { return c.Wake(ctx) }, "PATCH", "/config", `{"pgha_wake":null}`},
		{"restart", func() error { return c.Restart(ctx, false) }, "POST", "/restart", `{}`},
		{"restart if pending", func() error { return c.Restart(ctx, true) }, "POST", "/restart", `{"restart_pending":true}`},
		{"switchover", func() error { return c.Switchover(ctx, "n1", "n2") }, "POST", "/switchover", `{"candidate":"n2","leader":"n1"}`},
		{"switchover to the best", func() error { return c.Switchover(ctx, "n1", "") }, "POST", "/switchover", `{"leader":"n1"}`},
		{"reinitialize", func() error { return c.Reinitialize(ctx, true) }, "POST", "/reinitialize", `{"force":true}`},
		{"patch", func() error { return c.PatchConfig(ctx, map[string]any{"ttl": 60}) }, "PATCH", "/config", `{"ttl":60}`},
	} {
		t.Run(tc.what, func(t *testing.T) {
			a.code, a.body = http.StatusAccepted, ""
			must(t, tc.call())
			if a.method != tc.method || a.path != tc.path || a.got != tc.body || a.user != labUser || a.pass != labPass {
				t.Errorf("request %s %s %s as %q", a.method, a.path, a.got, a.user)
			}
			a.code, a.body = http.StatusPreconditionFailed, "no good candidates\n"
			var status *StatusError
			if err := tc.call(); !errors.As(err, &status) || status.Code != 412 || status.Message != "no good candidates" {
				t.Errorf("a refusal gives %v", err)
			}
		})
	}
	a.code = http.StatusConflict
	if err := c.PatchConfig(ctx, map[string]any{"ttl": 60}); !errors.Is(err, ErrConflict) {
		t.Errorf("a conflict gives %v", err)
	}
}

func TestLiveness(t *testing.T) {
	a, c := newAPI(t)
	must(t, c.Liveness(t.Context()))
	a.code = http.StatusServiceUnavailable
	if err := c.Liveness(t.Context()); !errors.Is(err, ErrHung) {
		t.Errorf("a loop that stands still gives %v", err)
	}
	a.code = http.StatusNotFound
	if err := c.Liveness(t.Context()); err == nil || errors.Is(err, ErrHung) {
		t.Errorf("another answer gives %v", err)
	}
}
