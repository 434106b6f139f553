package embedded

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"
	"google.golang.org/grpc/grpclog"

	"pgha/tests/cluster/testpki"
)

const patience = 90 * time.Second

func TestMain(m *testing.M) {
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	goleak.VerifyTestMain(m)
}

// single returns the configuration of a one-member cluster and its CA.
func single(t *testing.T) (Config, *testpki.CA) {
	t.Helper()
	ca, dir := testpki.New(t), t.TempDir()
	leaf := ca.Write(t, dir, "n1", "127.0.0.1")
	return Config{
		Name: "n1", DataDir: filepath.Join(dir, "etcd"), PeerURL: freeURL(t), ClientURL: freeURL(t),
		CertFile: leaf, KeyFile: leaf, CAFile: ca.WriteCA(t, dir), Token: "uuid-1",
		Bootstrap: true, WALSegmentBytes: 1 << 16,
	}, ca
}

func freeURL(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return "https://" + l.Addr().String()
}

func within(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

func mustStart(t *testing.T, cfg Config) *Server {
	t.Helper()
	s, err := Start(within(t), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(s.Stop)
	if err := s.WaitReady(within(t)); err != nil {
		t.Fatal(err)
	}
	return s
}

// withData returns the configuration of a stopped member with several log
// segments, its ID, and a key k000000 of value 0.
func withData(t *testing.T) (Config, uint64) {
	t.Helper()
	cfg, _ := single(t)
	s := mustStart(t, cfg)
	for i := range 300 {
		if _, err := s.Client().Put(within(t), fmt.Sprintf("k%06d", i), fmt.Sprint(i)+strings.Repeat(" ", 1000)); err != nil {
			t.Fatal(err)
		}
	}
	s.Stop()
	return cfg, uint64(s.es.MemberID())
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestRecordOfLastFailure(t *testing.T) {
	cfg, id := withData(t)
	cfg.FatalFile = filepath.Join(t.TempDir(), "etcd-fatal.json")
	hex := memberIDString(id)
	must(t, writeRecord(cfg.FatalFile, hex, fmt.Errorf("%w: seen at run time", ErrCorrupt)))
	_, err := Start(within(t), cfg)
	if !errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), cfg.FatalFile) || !strings.Contains(err.Error(), "seen at run time") {
		t.Fatalf("got %v, want ErrCorrupt and where it is recorded", err)
	}
	for what, write := range map[string]func() error{
		"of other data":          func() error { return writeRecord(cfg.FatalFile, "1234", ErrRemoved) },
		"of something transient": func() error { return writeRecord(cfg.FatalFile, hex, ErrInternal) },
		"that is torn":           func() error { return os.WriteFile(cfg.FatalFile, []byte("{"), 0o600) },
	} {
		must(t, write())
		s, err := Start(within(t), cfg)
		if err != nil {
			t.Fatalf("record %s: %v", what, err)
		}
		s.Stop()
		if _, err := os.Stat(cfg.FatalFile); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("record %s is still there: %v", what, err)
		}
	}
}

func TestStartNamesWhatIsInTheWay(t *testing.T) {
	cfg, _ := single(t)
	s := mustStart(t, cfg)

	other, _ := single(t)
	other.PeerURL = cfg.PeerURL
	port := mustURL(t, cfg.PeerURL).Port()
	if _, err := Start(within(t), other); !errors.Is(err, ErrPortInUse) || !strings.Contains(err.Error(), port) {
		t.Errorf("peer port taken: %v, want ErrPortInUse and the port", err)
	}
	other.PeerURL, other.ClientURL = freeURL(t), cfg.ClientURL
	if _, err := Start(within(t), other); !errors.Is(err, ErrPortInUse) {
		t.Errorf("client port taken: %v, want ErrPortInUse", err)
	}
	other.ClientURL = ""
	other.PeerURL = "https://192.0.2.1:2380"
	if _, err := Start(within(t), other); !errors.Is(err, ErrAddress) {
		t.Errorf("address of another host: %v, want ErrAddress", err)
	}
	twice := cfg
	twice.PeerURL, twice.ClientURL = freeURL(t), freeURL(t)
	if _, err := Start(within(t), twice); !errors.Is(err, ErrInUse) {
		t.Errorf("data directory taken: %v, want ErrInUse", err)
	}
	if _, err := s.Client().Put(within(t), "k", "v"); err != nil {
		t.Errorf("the member that was there first: %v", err)
	}
}

func mustURL(t *testing.T, raw string) *url.URL {
	t.Helper()
	u, err := url.Parse(raw)
	must(t, err)
	return u
}

func TestConfigIsChecked(t *testing.T) {
	good, _ := single(t)
	tests := []struct {
		spoil func(c *Config)
		text  string
	}{
		{func(c *Config) { c.Name = "" }, "name"},
		{func(c *Config) { c.Name = "a=b" }, "a=b"},
		{func(c *Config) { c.DataDir = "" }, "data directory"},
		{func(c *Config) { c.Token = "" }, "token"},
		{func(c *Config) { c.CertFile += "x" }, "certificate file"},
		{func(c *Config) { c.KeyFile += "x" }, "key file"},
		{func(c *Config) { c.CAFile += "x" }, "CA file"},
		{func(c *Config) { c.PeerURL = "http://127.0.0.1:2380" }, "https://IP:port"},
		{func(c *Config) { c.PeerURL = "https://name:2380" }, "https://IP:port"},
		{func(c *Config) { c.PeerURL = "https://127.0.0.1" }, "https://IP:port"},
		{func(c *Config) { c.ClientURL = "https://127.0.0.1:2379/x" }, "client URL"},
		{func(c *Config) { c.Profile = Profile{Heartbeat: 300 * time.Millisecond, Election: time.Second} }, "five times"},
		{func(c *Config) { c.QuotaBytes = 5 }, "quota"},
	}
	for _, tt := range tests {
		c := good
		tt.spoil(&c)
		if _, err := Start(within(t), c); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("got %v, want ErrConfig with %q", err, tt.text)
		}
	}
	if _, err := os.Stat(good.DataDir); !errors.Is(err, fs.ErrNotExist) {
		t.Error("a refused configuration left a data directory")
	}
	good.Bootstrap = false
	if _, err := Start(within(t), good); !errors.Is(err, ErrConfig) || !strings.Contains(err.Error(), "whom to ask") {
		t.Errorf("joining nobody: %v, want ErrConfig", err)
	}
}

func TestTLSIsMutualAndModern(t *testing.T) {
	cfg, ca := single(t)
	mustStart(t, cfg)
	dial := func(raw string, tc *tls.Config) (serial string, err error) {
		conn, err := tls.Dial("tcp", mustURL(t, raw).Host, tc)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		must(t, conn.SetDeadline(time.Now().Add(patience)))
		// In TLS 1.3 the server's refusal comes with the first read.
		if _, err := conn.Write([]byte("GET /version HTTP/1.1\r\nHost: x\r\n\r\n")); err != nil {
			return "", err
		}
		if _, err := conn.Read(make([]byte, 1)); err != nil {
			return "", err
		}
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String(), nil
	}
	trusted := ca.Client(t, "patroni")
	for _, u := range []string{cfg.PeerURL, cfg.ClientURL} {
		if _, err := dial(u, trusted); err != nil {
			t.Errorf("%s refuses a good client: %v", u, err)
		}
		anonymous := trusted.Clone()
		anonymous.Certificates = nil
		if _, err := dial(u, anonymous); err == nil {
			t.Errorf("%s serves a client without certificate", u)
		}
		foreign := testpki.New(t).Client(t, "patroni")
		foreign.RootCAs = trusted.RootCAs
		if _, err := dial(u, foreign); err == nil {
			t.Errorf("%s serves a client of another CA", u)
		}
		old := trusted.Clone()
		old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
		if _, err := dial(u, old); err == nil {
			t.Errorf("%s speaks TLS 1.2", u)
		}
	}
	// A renewed leaf is used without a restart.
	before, err := dial(cfg.PeerURL, trusted)
	must(t, err)
	ca.Write(t, filepath.Dir(cfg.CertFile), "n1", "127.0.0.1")
	for _, u := range []string{cfg.PeerURL, cfg.ClientURL} {
		after, err := dial(u, trusted)
		if err != nil || after == before {
			t.Errorf("%s shows the old certificate after renewal (%v)", u, err)
		}
	}
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{cfg.ClientURL}, TLS: trusted})
	must(t, err)
	defer client.Close()
	if _, err := client.Put(within(t), "k", "v"); err != nil {
		t.Errorf("write through the port: %v", err)
	}
}

// levels counts what a member logs.
type levels struct {
	mu    sync.Mutex
	lines []string
}

func (l *levels) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	return len(p), nil
}

func TestOrdinaryLifeLogsNoWarning(t *testing.T) {
	cfg, _ := single(t)
	var got levels
	cfg.Log = slog.New(slog.NewTextHandler(&got, nil))
	for range 2 {
		mustStart(t, cfg).Stop()
	}
	got.mu.Lock()
	defer got.mu.Unlock()
	for _, line := range got.lines {
		if !strings.Contains(line, "level=INFO") || !strings.Contains(line, "component=etcd") {
			t.Error(line)
		}
	}
	if len(got.lines) == 0 {
		t.Error("nothing was logged")
	}
}
