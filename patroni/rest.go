package patroni

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"time"
)

// Errors that callers tell apart with errors.Is.
var (
	// ErrHung says that Patroni answers but its main loop stands still.
	ErrHung = errors.New("patroni's main loop has not run for longer than its ttl")
	// ErrConflict says that another change came first; read again and retry.
	ErrConflict = errors.New("the configuration changed meanwhile")
)

// StatusError is an answer of the REST API other than the one hoped for.
type StatusError struct {
	Code    int
	Message string // the body, which says why
}

// Error implements error.
func (e *StatusError) Error() string {
	return fmt.Sprintf("patroni answered %d: %s", e.Code, e.Message)
}

// maxBody bounds what is read from a peer.
const maxBody = 4 << 20

// Client calls the REST API of one member. It is safe for concurrent use.
// Every call ends with its context; none has a time limit of its own.
type Client struct {
	base, user string
	passwords  []string // tried in this order
	http       *http.Client
}

// NewClient returns a client for baseURL, such as https://10.0.0.1:8008. The
// API wants a client certificate for every call, and the password besides for
// those that change something. Former passwords are tried after it, in their
// order: a member that has not taken the present one yet accepts one of those.
func NewClient(baseURL string, tlsConfig *tls.Config, user, pass string, former ...string) *Client {
	return &Client{
		base: strings.TrimRight(baseURL, "/"), user: user, passwords: append([]string{pass}, former...),
		http: &http.Client{Transport: &http.Transport{
			TLSClientConfig: tlsConfig,
			// Patroni speaks HTTP/1.0: there is no connection to keep.
			DisableKeepAlives:   true,
			TLSHandshakeTimeout: 10 * time.Second,
		}},
	}
}

// NodeStatus is what a member says of itself.
type NodeStatus struct {
	State    string // "running", "starting", "stopped", "creating replica", ...
	Role     Role
	Timeline int
	// ServerVersion is PostgreSQL's, as 150004; 0 when it does not run.
	ServerVersion    int
	PostmasterStart  string
	Location         uint64 // end of WAL on a primary, in bytes
	ReceivedLocation uint64 // on a standby
	ReplayedLocation uint64 // on a standby
	ReplayPaused     bool
	SyncStandby      bool
	PendingRestart   bool
	Paused           bool // failover by Patroni is off
	ClusterUnlocked  bool // nobody holds the leader key
	DCSLastSeen      time.Time
	SystemID         string
	PatroniVersion   string
	Scope            string
	Tags             map[string]any
	Replication      []ReplicaStatus // on a primary
}

// ReplicaStatus is a connection of a standby, as its primary sees it.
type ReplicaStatus struct {
	User            string `json:"usename"`
	ApplicationName string `json:"application_name"` // the member's name
	ClientAddr      string `json:"client_addr"`
	State           string `json:"state"`      // "streaming" when it keeps up
	SyncState       string `json:"sync_state"` // "sync", "async", "quorum", "potential"
	SyncPriority    int    `json:"sync_priority"`
}

// Status asks the member for its status. A member whose PostgreSQL does not run
// has a status too.
func (c *Client) Status(ctx context.Context) (NodeStatus, error) {
	var raw struct {
		State           string          `json:"state"`
		Role            string          `json:"role"`
		Timeline        int             `json:"timeline"`
		ServerVersion   int             `json:"server_version"`
		PostmasterStart string          `json:"postmaster_start_time"`
		SyncStandby     bool            `json:"sync_standby"`
		PendingRestart  bool            `json:"pending_restart"`
		Pause           bool            `json:"pause"`
		Unlocked        bool            `json:"cluster_unlocked"`
		LastSeen        float64         `json:"dcs_last_seen"`
		SystemID        string          `json:"database_system_identifier"`
		Tags            map[string]any  `json:"tags"`
		Replication     []ReplicaStatus `json:"replication"`
		XLog            struct {
			Location uint64 `json:"location"`
			Received uint64 `json:"received_location"`
			Replayed uint64 `json:"replayed_location"`
			Paused   bool   `json:"paused"`
		} `json:"xlog"`
		Patroni struct {
			Version string `json:"version"`
			Scope   string `json:"scope"`
		} `json:"patroni"`
	}
	if err := c.json(ctx, http.MethodGet, "/patroni", nil, &raw); err != nil {
		return NodeStatus{}, fmt.Errorf("read the status of %s: %w", c.base, err)
	}
	s := NodeStatus{
		State: raw.State, Role: NormalizeRole(raw.Role), Timeline: raw.Timeline,
		ServerVersion: raw.ServerVersion, PostmasterStart: raw.PostmasterStart,
		Location: raw.XLog.Location, ReceivedLocation: raw.XLog.Received,
		ReplayedLocation: raw.XLog.Replayed, ReplayPaused: raw.XLog.Paused,
		SyncStandby: raw.SyncStandby, PendingRestart: raw.PendingRestart, Paused: raw.Pause,
		ClusterUnlocked: raw.Unlocked, SystemID: raw.SystemID,
		PatroniVersion: raw.Patroni.Version, Scope: raw.Patroni.Scope,
		Tags: raw.Tags, Replication: raw.Replication,
	}
	if raw.LastSeen > 0 {
		s.DCSLastSeen = time.Unix(int64(raw.LastSeen), 0)
	}
	return s, nil
}

// ClusterMember is a member as GET /cluster lists it.
type ClusterMember struct {
	Name     string
	Role     Role // sync standbys are RoleReplica with Sync set
	Sync     bool
	State    string
	APIURL   string
	Host     string
	Port     int
	Timeline int
	// Lag is in bytes; -1 when the member or the leader does not say.
	Lag int64
}

// Cluster asks the member for the whole cluster as it sees it.
func (c *Client) Cluster(ctx context.Context) ([]ClusterMember, error) {
	var raw struct {
		Members []struct {
			Name     string          `json:"name"`
			Role     string          `json:"role"`
			State    string          `json:"state"`
			APIURL   string          `json:"api_url"`
			Host     string          `json:"host"`
			Port     int             `json:"port"`
			Timeline int             `json:"timeline"`
			Lag      json.RawMessage `json:"lag"` // a number or "unknown"
		} `json:"members"`
	}
	if err := c.json(ctx, http.MethodGet, "/cluster", nil, &raw); err != nil {
		return nil, fmt.Errorf("read the cluster from %s: %w", c.base, err)
	}
	members := make([]ClusterMember, 0, len(raw.Members))
	for _, m := range raw.Members {
		lag := int64(-1)
		if json.Unmarshal(m.Lag, &lag) != nil {
			lag = -1
		}
		members = append(members, ClusterMember{
			Name: m.Name, Role: NormalizeRole(m.Role), State: m.State, APIURL: m.APIURL,
			Sync: m.Role == "sync_standby" || m.Role == "quorum_standby",
			Host: m.Host, Port: m.Port, Timeline: m.Timeline, Lag: lag,
		})
	}
	return members, nil
}

// Liveness returns nil when Patroni's main loop runs, an error that is ErrHung
// when it stands still, and another when there is no answer.
func (c *Client) Liveness(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodGet, "/liveness", nil)
	var status *StatusError
	if errors.As(err, &status) && status.Code == http.StatusServiceUnavailable {
		err = ErrHung
	}
	if err != nil {
		return fmt.Errorf("check that Patroni at %s lives: %w", c.base, err)
	}
	return nil
}

// Reload makes Patroni read its configuration file and certificates again, at
// the next run of its main loop; Wake makes that now.
func (c *Client) Reload(ctx context.Context) error {
	if _, err := c.do(ctx, http.MethodPost, "/reload", nil); err != nil {
		return fmt.Errorf("reload Patroni at %s: %w", c.base, err)
	}
	return nil
}

// Wake makes Patroni's main loop run now. Nothing is changed.
func (c *Client) Wake(ctx context.Context) error {
	// Any patch wakes the loop, and removing a key that is not there writes nothing.
	if err := c.PatchConfig(ctx, map[string]any{"pgha_wake": nil}); err != nil {
		return fmt.Errorf("wake Patroni: %w", err)
	}
	return nil
}

// CheckPassword asks whether the member accepts the password, and changes
// nothing. If not, the error is a *StatusError of 401.
func (c *Client) CheckPassword(ctx context.Context) error {
	// An empty patch is refused as such, after the password was checked.
	_, err := c.do(ctx, http.MethodPatch, "/config", map[string]any{})
	var status *StatusError
	if errors.As(err, &status) && status.Code == http.StatusBadRequest {
		return nil
	}
	if err == nil {
		err = errors.New("an empty patch was accepted")
	}
	return fmt.Errorf("check the password of Patroni at %s: %w", c.base, err)
}

// Restart restarts PostgreSQL on the member and waits for it. With pendingOnly
// it does nothing unless a changed setting needs a restart.
func (c *Client) Restart(ctx context.Context, pendingOnly bool) error {
	body := map[string]any{}
	if pendingOnly {
		body["restart_pending"] = true
	}
	if _, err := c.do(ctx, http.MethodPost, "/restart", body); err != nil {
		return fmt.Errorf("restart PostgreSQL at %s: %w", c.base, err)
	}
	return nil
}

// Switchover hands the leadership from leader to candidate, or to the best
// candidate when that is empty, and waits for the outcome. Any member may be
// asked.
func (c *Client) Switchover(ctx context.Context, leader, candidate string) error {
	body := map[string]any{"leader": leader}
	if candidate != "" {
		body["candidate"] = candidate
	}
	if _, err := c.do(ctx, http.MethodPost, "/switchover", body); err != nil {
		return fmt.Errorf("switch over from %s: %w", leader, err)
	}
	return nil
}

// PatchConfig merges patch into the cluster's dynamic configuration; a nil value
// removes its key. ErrConflict when someone else changed it at the same time.
func (c *Client) PatchConfig(ctx context.Context, patch map[string]any) error {
	_, err := c.do(ctx, http.MethodPatch, "/config", patch)
	var status *StatusError
	if errors.As(err, &status) && status.Code == http.StatusConflict {
		err = ErrConflict
	}
	if err != nil {
		return fmt.Errorf("change Patroni's dynamic configuration: %w", err)
	}
	return nil
}

// Reinitialize makes the member throw its data away and clone the leader's. It
// returns when that has begun. With force, whatever the member does now is
// cancelled.
func (c *Client) Reinitialize(ctx context.Context, force bool) error {
	body := map[string]any{"force": force}
	if _, err := c.do(ctx, http.MethodPost, "/reinitialize", body); err != nil {
		return fmt.Errorf("reinitialize the member at %s: %w", c.base, err)
	}
	return nil
}

func (c *Client) json(ctx context.Context, method, path string, body, out any) error {
	data, err := c.do(ctx, method, path, body)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("decode the answer to %s %s: %w", method, path, err)
	}
	return nil
}

// do returns the body of a 2xx answer and a *StatusError for any other.
func (c *Client) do(ctx context.Context, method, path string, body any) ([]byte, error) {
	var data []byte
	if body != nil {
		var err error
		if data, err = json.Marshal(body); err != nil {
			return nil, fmt.Errorf("encode the request: %w", err)
		}
	}
	if method == http.MethodGet {
		return c.try(ctx, method, path, data, "")
	}
	var out []byte
	var err error
	for _, password := range c.passwords {
		var status *StatusError
		if out, err = c.try(ctx, method, path, data, password); !errors.As(err, &status) || status.Code != http.StatusUnauthorized {
			break
		}
	}
	return out, err
}

// try makes one request, with one password.
func (c *Client) try(ctx context.Context, method, path string, body []byte, password string) ([]byte, error) {
	var reader io.Reader
	if body != nil {
		reader = bytes.NewReader(body)
	}
	req, err := http.NewRequestWithContext(ctx, method, c.base+path, reader)
	if err != nil {
		return nil, fmt.Errorf("make the request: %w", err)
	}
	if method != http.MethodGet {
		req.SetBasicAuth(c.user, password)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, err
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxBody))
	if err != nil {
		return nil, fmt.Errorf("read the answer to %s %s: %w", method, path, err)
	}
	if resp.StatusCode < 200 || resp.StatusCode > 299 {
		message := strings.TrimSpace(string(data))
		if message == "" || strings.HasPrefix(message, "<") {
			message = http.StatusText(resp.StatusCode)
		}
		return nil, &StatusError{Code: resp.StatusCode, Message: message}
	}
	return data, nil
}
