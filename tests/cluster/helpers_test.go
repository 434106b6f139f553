package cluster

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/goleak"

	"pgha/embedded"
	"pgha/tests/cluster/testpki"
)

// patience bounds every wait. It is no measure: a busy machine may need it.
const patience = 90 * time.Second

func TestMain(m *testing.M) {
	if dir := os.Getenv(fillDirEnv); dir != "" {
		os.Exit(fillDisk(dir))
	}
	if dir := os.Getenv(memberDirEnv); dir != "" {
		os.Exit(runMember(dir))
	}
	code := m.Run()
	// Connections between members that were stopped take up to 5 s to notice.
	for deadline := time.Now().Add(patience); code == 0 && goleak.Find() != nil; {
		if time.Now().After(deadline) {
			fmt.Fprintln(os.Stderr, goleak.Find())
			code = 1
		}
	}
	os.Exit(code)
}

// testCluster makes the configurations of members that share a CA.
type testCluster struct {
	t      *testing.T
	ca     *testpki.CA
	dir    string
	caFile string
	made   map[string]string // name -> peer URL
}

func newCluster(t *testing.T) *testCluster {
	t.Helper()
	ca, dir := testpki.New(t), t.TempDir()
	return &testCluster{t: t, ca: ca, dir: dir, caFile: ca.WriteCA(t, dir), made: map[string]string{}}
}

// config returns the configuration of member i, named n<i>; a witness has no
// client listener.
func (c *testCluster) config(i int, witness bool) embedded.Config {
	c.t.Helper()
	name, ip := fmt.Sprintf("n%d", i), fmt.Sprintf("127.0.0.%d", i+1)
	leaf := c.ca.Write(c.t, c.dir, name, ip, "127.0.0.1")
	cfg := embedded.Config{
		Name: name, DataDir: filepath.Join(c.dir, name, "etcd"), PeerURL: freeURL(c.t, ip),
		CertFile: leaf, KeyFile: leaf, CAFile: c.caFile, Token: "3f0c-test",
		WALSegmentBytes: 1 << 20, InitialCluster: map[string]string{},
		Log: slog.New(slog.NewTextHandler(&testLog{t: c.t, name: name}, nil)),
	}
	if !witness {
		cfg.ClientURL = freeURL(c.t, ip)
	}
	for name, u := range c.made {
		cfg.InitialCluster[name] = u
	}
	c.made[name] = cfg.PeerURL
	return cfg
}

// testLog writes to the test's log as long as the test runs: what is left of a
// stopped member may have a last word.
type testLog struct {
	t    *testing.T
	name string
}

func (l *testLog) Write(p []byte) (int, error) {
	if l.t.Context().Err() == nil {
		l.t.Logf("%s %s", l.name, strings.TrimSpace(string(p)))
	}
	return len(p), nil
}

func freeURL(t *testing.T, ip string) string {
	t.Helper()
	l, err := net.Listen("tcp", ip+":0")
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

// start starts a member and stops it at the end of the test.
func start(t *testing.T, cfg embedded.Config) *embedded.Server {
	t.Helper()
	s, err := embedded.Start(within(t), cfg)
	if err != nil {
		t.Fatalf("start %s: %v", cfg.Name, err)
	}
	t.Cleanup(s.Stop)
	return s
}

func ready(t *testing.T, servers ...*embedded.Server) {
	t.Helper()
	for _, s := range servers {
		if err := s.WaitReady(within(t)); err != nil {
			t.Fatal(err)
		}
	}
}

func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

func status(t *testing.T, s *embedded.Server) embedded.Status {
	t.Helper()
	st, err := s.Status(within(t))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func put(t *testing.T, c *clientv3.Client, key, value string) {
	t.Helper()
	if _, err := c.Put(within(t), key, value); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

func get(t *testing.T, c *clientv3.Client, key string) string {
	t.Helper()
	resp, err := c.Get(within(t), key)
	if err != nil {
		t.Fatalf("get %s: %v", key, err)
	}
	if len(resp.Kvs) == 0 {
		return ""
	}
	return string(resp.Kvs[0].Value)
}

// member is one running member with its configuration.
type member struct {
	cfg embedded.Config
	*embedded.Server
}

// observe builds what the node on the leader would know of the others.
func observe(t *testing.T, leader *member, all ...*member) embedded.MembershipObservation {
	t.Helper()
	st := status(t, leader.Server)
	o := embedded.MembershipObservation{
		Members: st.Members, Committed: st.Committed,
		Reachable: map[uint64]bool{}, Applied: map[uint64]uint64{}, Expected: map[string]bool{},
	}
	for _, m := range all {
		o.Expected[m.cfg.PeerURL] = true
		if m.Server == nil {
			continue
		}
		if st, err := m.Status(within(t)); err == nil {
			o.Reachable[st.MemberID], o.Applied[st.MemberID] = true, st.Applied
		}
	}
	return o
}

// grow brings up a cluster of three voters, the third one a witness.
func (c *testCluster) grow(t *testing.T) []*member {
	t.Helper()
	var all []*member
	for i := 1; i <= 3; i++ {
		m := &member{cfg: c.config(i, i == 3)}
		m.cfg.Bootstrap = i == 1
		if i > 1 {
			if _, _, err := all[0].AddLearner(within(t), m.cfg.PeerURL); err != nil {
				t.Fatal(err)
			}
		}
		m.Server = start(t, m.cfg)
		if i == 1 {
			ready(t, m.Server)
		}
		all = append(all, m)
	}
	promote(t, all[0], all...)
	for _, m := range all {
		ready(t, m.Server)
	}
	return all
}

// promote follows DecideMembership until it wants to promote, does it, and waits
// until every member knows.
func promote(t *testing.T, leader *member, all ...*member) embedded.MembershipAction {
	t.Helper()
	var action embedded.MembershipAction
	var reason string
	eventually(t, "learners in sync", func() bool {
		action, reason = embedded.DecideMembership(observe(t, leader, all...))
		return len(action.Promote) > 0
	})
	t.Log(reason)
	if err := leader.Apply(within(t), action); err != nil {
		t.Fatal(err)
	}
	for _, m := range all {
		eventually(t, m.cfg.Name+" knows all voters", func() bool {
			for _, other := range status(t, m.Server).Members {
				if other.Learner {
					return false
				}
			}
			return true
		})
	}
	return action
}

func leaderOf(t *testing.T, all []*member) *member {
	t.Helper()
	var leader *member
	eventually(t, "a leader", func() bool {
		for _, m := range all {
			if st, err := m.Status(within(t)); err == nil && st.IsLeader {
				leader = m
				return true
			}
		}
		return false
	})
	return leader
}
