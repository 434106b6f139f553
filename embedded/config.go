package embedded

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/client/pkg/v3/transport"
	"go.etcd.io/etcd/pkg/v3/featuregate"
	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/features"
	"go.etcd.io/etcd/server/v3/storage/wal"
	"google.golang.org/grpc"
)

const (
	defaultQuota       = 256 << 20
	defaultDataSegment = 16 << 20
	defaultWitnessSeg  = 4 << 20
	defaultHeartbeat   = 100 * time.Millisecond
	defaultElection    = time.Second
	maxLearners        = 2
	compactionWindow   = "5m"
	tlsMinVersion      = "TLS1.3"
)

// Profile holds raft's timers. They must be equal on all members.
type Profile struct {
	Heartbeat time.Duration // default 100 ms
	Election  time.Duration // default 1 s; at least five heartbeats
}

// Config describes this process's etcd member.
type Config struct {
	Name    string // member name, unique in the cluster
	DataDir string // made with mode 0700 if missing
	WALDir  string // directory of the write-ahead log; "" = inside DataDir

	PeerURL   string // https://IP:2380, listened on and advertised
	ClientURL string // https://IP:2379; "" = no client listener (witness)

	// One certificate for both ports and both directions: it needs both
	// extended key uses, the IP of PeerURL and an authority key identifier.
	// Certificate and key are read again at each handshake, so a renewed leaf
	// needs no restart; a new CAFile does. The three may be one file.
	CertFile, KeyFile, CAFile string

	Token          string            // initial cluster token: the cluster's UUID
	InitialCluster map[string]string // name -> peer URL of members to ask; only used without data
	// Bootstrap makes a new cluster when there is no data: for the first node's
	// very first start, and never again. Members in InitialCluster are asked
	// first, and their answer refuses it.
	Bootstrap bool

	Profile         Profile
	QuotaBytes      int64 // largest database; default 256 MiB
	WALSegmentBytes int64 // default 16 MiB, 4 MiB without a client listener

	FatalFile string      // where a fatal cause is recorded; default DataDir/../etcd-fatal.json
	OnFatal   func(error) // called once on etcd's goroutine after the record was written; must not call the Server

	Log *slog.Logger
}

// HasData reports whether dir holds an etcd member that keeps its log there.
// With a separate WALDir use Config.HasData.
func HasData(dir string) bool { return Config{DataDir: dir}.HasData() }

// HasData reports whether the configured directories hold an etcd member.
func (c Config) HasData() bool { return wal.Exist(c.walDir()) }

func (c Config) walDir() string {
	if c.WALDir != "" {
		return c.WALDir
	}
	return filepath.Join(c.DataDir, "member", "wal")
}

func (c Config) dbPath() string { return filepath.Join(c.DataDir, "member", "snap", "db") }

// complete fills in the defaults and checks the rest.
func (c Config) complete() (Config, error) {
	if c.Profile.Heartbeat == 0 {
		c.Profile.Heartbeat = defaultHeartbeat
	}
	if c.Profile.Election == 0 {
		c.Profile.Election = defaultElection
	}
	if c.QuotaBytes == 0 {
		c.QuotaBytes = defaultQuota
	}
	if c.WALSegmentBytes == 0 {
		c.WALSegmentBytes = defaultDataSegment
		if c.ClientURL == "" {
			c.WALSegmentBytes = defaultWitnessSeg
		}
	}
	if c.FatalFile == "" {
		c.FatalFile = filepath.Join(filepath.Dir(filepath.Clean(c.DataDir)), "etcd-fatal.json")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With("component", "etcd")
	return c, c.validate()
}

func (c Config) validate() error {
	var errs []error
	bad := func(format string, args ...any) {
		errs = append(errs, fmt.Errorf("%w: "+format, append([]any{ErrConfig}, args...)...))
	}
	if c.Name == "" || strings.ContainsAny(c.Name, "=, ") {
		bad("name %q must not be empty or contain '=', ',' or spaces", c.Name)
	}
	if c.DataDir == "" {
		bad("data directory is empty")
	}
	if c.Token == "" {
		bad("cluster token is empty")
	}
	for what, path := range map[string]string{"certificate": c.CertFile, "key": c.KeyFile, "CA": c.CAFile} {
		if _, err := os.Stat(path); err != nil {
			bad("%s file: %w", what, err)
		}
	}
	if _, err := parseURL(c.PeerURL); err != nil {
		bad("peer URL: %w", err)
	}
	if c.ClientURL != "" {
		if _, err := parseURL(c.ClientURL); err != nil {
			bad("client URL: %w", err)
		}
	}
	if c.Profile.Heartbeat < time.Millisecond || c.Profile.Election < 5*c.Profile.Heartbeat {
		bad("election timeout %s must be at least five times the heartbeat %s", c.Profile.Election, c.Profile.Heartbeat)
	}
	if c.QuotaBytes < 1<<20 || c.WALSegmentBytes < 1<<16 {
		bad("quota %d or log segment %d bytes too small", c.QuotaBytes, c.WALSegmentBytes)
	}
	return errors.Join(errs...)
}

// parseURL accepts https://IP:port alone: etcd listens on addresses, not names.
func parseURL(raw string) (url.URL, error) {
	u, err := url.Parse(raw)
	if err != nil {
		return url.URL{}, fmt.Errorf("parse %q: %w", raw, err)
	}
	if u.Scheme != "https" || net.ParseIP(u.Hostname()) == nil || u.Port() == "" || u.Path != "" {
		return url.URL{}, fmt.Errorf("%q is not of the form https://IP:port", raw)
	}
	return *u, nil
}

func (c Config) tlsInfo() transport.TLSInfo {
	return transport.TLSInfo{
		CertFile: c.CertFile, KeyFile: c.KeyFile, TrustedCAFile: c.CAFile, ClientCertAuth: true,
	}
}

// embedConfig translates to etcd's own configuration. cluster is the initial
// cluster as name -> peer URL; with data it is ignored by etcd.
func (c Config) embedConfig(state string, cluster map[string]string, opts ...grpc.ServerOption) (*embed.Config, error) {
	peer, err := parseURL(c.PeerURL)
	if err != nil {
		return nil, fmt.Errorf("peer URL: %w", err)
	}
	ec := embed.NewConfig()
	ec.Name, ec.Dir, ec.WalDir = c.Name, c.DataDir, c.WALDir
	ec.ListenPeerUrls, ec.AdvertisePeerUrls = []url.URL{peer}, []url.URL{peer}
	ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{}, []url.URL{}
	if c.ClientURL != "" {
		client, err := parseURL(c.ClientURL)
		if err != nil {
			return nil, fmt.Errorf("client URL: %w", err)
		}
		ec.ListenClientUrls, ec.AdvertiseClientUrls = []url.URL{client}, []url.URL{client}
	}
	ec.PeerTLSInfo, ec.ClientTLSInfo = c.tlsInfo(), c.tlsInfo()
	// Clients are known by their certificate; the address they come from (the
	// loopback, a virtual address) need not be in it. Peers' must.
	ec.ClientTLSInfo.SkipClientSANVerify = true
	ec.TlsMinVersion = tlsMinVersion

	pairs := make([]string, 0, len(cluster))
	for name, u := range cluster {
		pairs = append(pairs, name+"="+u)
	}
	slices.Sort(pairs)
	ec.InitialCluster = strings.Join(pairs, ",")
	ec.InitialClusterToken = c.Token
	ec.ClusterState = state

	ec.TickMs = uint(c.Profile.Heartbeat.Milliseconds())
	ec.ElectionMs = uint(c.Profile.Election.Milliseconds())
	ec.PreVote, ec.StrictReconfigCheck = true, true
	ec.MaxLearners = maxLearners
	ec.QuotaBackendBytes = c.QuotaBytes
	ec.AutoCompactionMode, ec.AutoCompactionRetention = embed.CompactorModePeriodic, compactionWindow
	ec.EnableGRPCGateway = true // Patroni speaks to the gateway
	ec.GRPCAdditionalServerOptions = opts
	gate, ok := ec.ServerFeatureGate.(featuregate.MutableFeatureGate)
	if !ok {
		return nil, fmt.Errorf("set etcd features: %T cannot be changed", ec.ServerFeatureGate)
	}
	// SetMemberLocalAddr: call peers from the address they know us by, the one
	// in our certificate and in their firewall, on hosts that have several.
	err = gate.SetFromMap(map[string]bool{
		string(features.CompactHashCheck):   true,
		string(features.SetMemberLocalAddr): true,
	})
	if err != nil {
		return nil, fmt.Errorf("set etcd features: %w", err)
	}
	return ec, nil
}

var segmentOnce sync.Once

// setSegmentSize sets etcd's process-wide log segment size. The first member of
// the process decides: a change would race with members that run.
func setSegmentSize(n int64) { segmentOnce.Do(func() { wal.SegmentSizeBytes = n }) }
