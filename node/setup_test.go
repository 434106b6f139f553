package node

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/pki"
)

func testConfig(name string, role cluster.NodeRole) Config {
	c := NewConfig()
	c.Cluster, c.Name, c.Role, c.Address = "shop", name, role, netip.MustParseAddr("10.0.0.1")
	if role == cluster.RoleData {
		c.Postgres.BinDir = "/usr/lib/postgresql/15/bin"
	}
	return c
}

var testSettings = cluster.Settings{Profile: "fast", ClientNets: []netip.Prefix{netip.MustParsePrefix("10.0.0.0/16")}}

// founder writes what init writes.
func founder(t *testing.T) (Paths, State) {
	t.Helper()
	p := tempPaths(t)
	cfg := testConfig("n1", cluster.RoleData)
	cfg.Postgres.DataDir = DefaultDataDir(p, 15)
	s, err := PrepareInit(p, cfg, testSettings, []string{"db.example.com"}, "")
	if err != nil {
		t.Fatal(err)
	}
	return p, s
}

func open(p Paths) error {
	_, err := Open(Options{Paths: p, Log: discardLog()})
	return err
}

// files are the names and contents of all files below the paths.
func files(t *testing.T, p Paths) map[string]string {
	t.Helper()
	out := map[string]string{}
	for _, root := range []string{p.Etc, p.Lib, p.Run, p.Log} {
		err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			out[path] = fmt.Sprintf("%x", sha256.Sum256(data))
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return out
}

func TestPrepareInit(t *testing.T) {
	p, s := founder(t)
	if s.Phase != PhaseReady || !s.Founder || s.Founded || s.Node != "n1" || s.ClusterName != "shop" {
		t.Errorf("state is %+v", s)
	}
	read, err := LoadState(p)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, read, cmpAddrs); diff != "" {
		t.Errorf("state read back (-want +got):\n%s", diff)
	}
	if err := open(p); err != nil {
		t.Errorf("open: %v", err)
	}
	for path, mode := range map[string]fs.FileMode{
		p.State(): 0o600, p.sealingKey(): 0o600, p.sealedCAKey(): 0o600, p.secrets(): 0o600, p.PKI() + "/admin.pem": 0o600,
		CAPath(p): 0o644, p.Config(): 0o644,
	} {
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: mode %v, %v, want %v", path, st.Mode(), err, mode)
		}
	}
	if AdminBundlePath(p) != p.PKI()+"/admin.pem" {
		t.Errorf("the admin's bundle is %s", AdminBundlePath(p))
	}
	// The CA's key and the secrets stand sealed: nothing else could open them.
	for _, path := range []string{p.sealedCAKey(), p.secrets()} {
		data, err := os.ReadFile(path)
		if err != nil || strings.Contains(string(data), "PRIVATE KEY") || strings.Contains(string(data), "patroni_rest") {
			t.Errorf("%s is not sealed (%v)", path, err)
		}
	}
}

func TestPrepareInitRefuses(t *testing.T) {
	for _, tc := range []struct {
		name     string
		settings cluster.Settings
		sans     []string
		adopt    string
		want     string
	}{
		{"a profile", cluster.Settings{Profile: "hasty"}, nil, "", `profile "hasty"`},
		{"a load balancer's name", testSettings, []string{"not a name"}, "", "neither a host name"},
		{"nothing to adopt", testSettings, nil, "/nowhere", "/nowhere is not a PostgreSQL data directory"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := tempPaths(t)
			_, err := PrepareInit(p, testConfig("n1", cluster.RoleData), tc.settings, tc.sans, tc.adopt)
			if err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want %q", err, tc.want)
			}
			if got := files(t, p); len(got) > 0 {
				t.Errorf("it left %v", got)
			}
		})
	}
}

func TestOpenRefuses(t *testing.T) {
	other, otherState := founder(t)
	copyOther := func(t *testing.T, p Paths, names ...string) {
		for _, name := range names {
			data, err := os.ReadFile(filepath.Join(other.PKI(), name))
			if err == nil {
				err = os.WriteFile(filepath.Join(p.PKI(), name), data, 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	edit := func(t *testing.T, path, old, with string) {
		data, err := os.ReadFile(path)
		if err != nil || !strings.Contains(string(data), old) {
			t.Fatalf("%s holds no %q (%v)", path, old, err)
		}
		write(t, path, strings.ReplaceAll(string(data), old, with))
	}
	remove := func(t *testing.T, path string) {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name   string
		change func(t *testing.T, p Paths, s State)
		want   func(s State) []string // all are in the message
	}{
		{"no node", func(t *testing.T, p Paths, s State) { remove(t, p.State()) }, func(State) []string { return []string{"pgha init", "pgha join"} }},
		{"damaged state", func(t *testing.T, p Paths, s State) { write(t, p.State(), "{") }, func(State) []string { return []string{"state.json"} }},
		{"empty state", func(t *testing.T, p Paths, s State) { write(t, p.State(), "{}") }, func(State) []string { return []string{"names no cluster and node"} }},
		{"unfinished init", func(t *testing.T, p Paths, s State) { edit(t, p.State(), "ready", "preparing") },
			func(State) []string { return []string{"pgha init was interrupted", "pgha reset"} }},
		{"unfinished join", func(t *testing.T, p Paths, s State) {
			edit(t, p.State(), "ready", "preparing")
			edit(t, p.State(), `"founder": true`, `"founder": false`)
		}, func(State) []string { return []string{"pgha join was interrupted"} }},
		{"no configuration", func(t *testing.T, p Paths, s State) { remove(t, p.Config()) }, func(State) []string { return []string{"pgha.yml does not exist"} }},
		{"configuration of another node", func(t *testing.T, p Paths, s State) { edit(t, p.Config(), "name: n1", "name: n7") },
			func(State) []string {
				return []string{`data node "n7" of cluster "shop"`, `data node "n1" of cluster "shop"`}
			}},
		{"configuration of another cluster", func(t *testing.T, p Paths, s State) { edit(t, p.Config(), "cluster: shop", "cluster: mill") },
			func(State) []string { return []string{`of cluster "mill"`, `of cluster "shop"`} }},
		{"configuration of another role", func(t *testing.T, p Paths, s State) { edit(t, p.Config(), "role: data", "role: witness") },
			func(State) []string { return []string{"witness node", "data node"} }},
		{"CA missing", func(t *testing.T, p Paths, s State) { remove(t, CAPath(p)) },
			func(State) []string { return []string{"ca.crt", "restore it", "pgha reset --force"} }},
		{"certificate missing", func(t *testing.T, p Paths, s State) { remove(t, p.PKI()+"/postgres.pem") },
			func(State) []string { return []string{"postgres.pem", "restore it"} }},
		{"CA of another cluster", func(t *testing.T, p Paths, s State) { copyOther(t, p, "ca.crt") },
			func(s State) []string {
				return []string{otherState.ClusterID, s.ClusterID, "put this node's own files back"}
			}},
		{"certificate of another cluster", func(t *testing.T, p Paths, s State) { copyOther(t, p, "node.pem") },
			func(s State) []string { return []string{"node.pem", otherState.ClusterID, s.ClusterID} }},
		{"key open to others", func(t *testing.T, p Paths, s State) {
			if err := os.Chmod(p.PKI()+"/node.pem", 0o644); err != nil {
				t.Fatal(err)
			}
		}, func(State) []string { return []string{"0644", "open to others"} }},
		{"data directory not named", func(t *testing.T, p Paths, s State) { edit(t, p.Config(), "  data_dir:", "  # data_dir:") },
			func(State) []string { return []string{"postgres.data_dir is missing", "/postgres/15/data"} }},
		{"sealing key missing", func(t *testing.T, p Paths, s State) { remove(t, p.sealingKey()) }, func(State) []string { return []string{"sealing.key"} }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p, s := founder(t)
			tc.change(t, p, s)
			before := files(t, p)
			err := open(p)
			if err == nil {
				t.Fatal("it opened")
			}
			for _, want := range tc.want(s) {
				if !strings.Contains(err.Error(), want) {
					t.Errorf("error %q does not say %q", err, want)
				}
			}
			if diff := cmp.Diff(before, files(t, p)); diff != "" {
				t.Errorf("files were changed (-before +after):\n%s", diff)
			}
		})
	}
}

func TestRemovePrepared(t *testing.T) {
	p, s := founder(t)
	if err := RemovePrepared(p); err == nil {
		t.Error("the files of a node were removed")
	}
	if err := open(p); err != nil {
		t.Fatalf("the node was harmed: %v", err)
	}
	s.Phase = PhasePreparing
	if err := s.Save(p); err != nil {
		t.Fatal(err)
	}
	if err := RemovePrepared(p); err != nil {
		t.Fatal(err)
	}
	for path := range files(t, p) {
		if !strings.HasPrefix(path, p.patroniDir()) { // Patroni's launcher, which Open has written
			t.Errorf("%s is left", path)
		}
	}
	if _, err := CheckFresh(p, true); err != nil {
		t.Errorf("the host is not fresh: %v", err)
	}
	if err := RemovePrepared(p); err != nil {
		t.Errorf("again: %v", err)
	}
}

// joinFixture is the side that answers a join.
type joinFixture struct {
	id   cluster.Identity
	ca   *pki.CA
	key  cluster.SealingKey
	self cluster.Member
}

func newJoinFixture(t *testing.T) joinFixture {
	t.Helper()
	now := time.Now()
	id, err := cluster.NewIdentity("shop", now)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := pki.NewCA(id.ID, id.Name, now)
	if err != nil {
		t.Fatal(err)
	}
	key, err := cluster.NewSealingKey()
	if err != nil {
		t.Fatal(err)
	}
	return joinFixture{id: id, ca: ca, key: key, self: roster()[0]}
}

// answer takes the node of req in.
func (f joinFixture) answer(t *testing.T, req cluster.JoinRequest) cluster.JoinResponse {
	t.Helper()
	joined := cluster.Member{Name: req.Name, Role: req.Role, Addr: req.Addr, Ports: req.Ports, SANs: req.SANs, State: cluster.StateJoining}
	members := []cluster.Member{f.self, joined}
	resp := cluster.JoinResponse{
		Identity: f.id, CAPEM: f.ca.CertPEM(), Certs: map[pki.Role][]byte{}, Members: members, Settings: testSettings,
		InitialCluster: map[string]string{"n1": f.self.PeerURL(), req.Name: joined.PeerURL()},
	}
	for role, spec := range cluster.LeafSpecs(f.id, joined, members, testSettings) {
		cert, err := f.ca.Sign(req.CSRs[role], spec, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		resp.Certs[role] = cert
	}
	if req.Role == cluster.RoleData {
		secrets, err := cluster.NewSecrets()
		if err != nil {
			t.Fatal(err)
		}
		keyPEM, err := f.ca.KeyPEM()
		if err != nil {
			t.Fatal(err)
		}
		sealed, err := cluster.SealCAKey(f.key, f.id.ID, keyPEM)
		if err != nil {
			t.Fatal(err)
		}
		resp.Secrets, resp.SealedCAKey, resp.ClusterKey = &secrets, sealed, f.key[:]
	}
	return resp
}

func TestJoining(t *testing.T) {
	f := newJoinFixture(t)
	for _, role := range []cluster.NodeRole{cluster.RoleData, cluster.RoleWitness} {
		t.Run(string(role), func(t *testing.T) {
			p := tempPaths(t)
			cfg := testConfig("n2", role)
			cfg.Cluster = "main" // a joiner learns the name with the answer
			cfg.Address = netip.MustParseAddr("10.0.0.2")
			if role == cluster.RoleData {
				cfg.Postgres.DataDir = DefaultDataDir(p, 15)
			}
			tok := cluster.Token{ID: "t1", ClusterID: f.id.ID, Role: role}

			asked := cfg
			asked.Postgres.BinDir = ""
			j := NewJoining(p, asked, tok, []string{"db.example.com"})
			check, err := j.Check(cluster.Hello{PGMajor: 15})
			if err != nil {
				t.Fatal(err)
			}
			major := map[cluster.NodeRole]int{cluster.RoleData: 15}[role]
			if check.PGMajor != major || j.PGMajor() != major || len(check.CSRs) != len(role.Roles()) {
				t.Errorf("the question is %v with PostgreSQL %d and %d requests", check, check.PGMajor, len(check.CSRs))
			}
			if got := files(t, p); len(got) > 0 {
				t.Fatalf("a question wrote %v", got)
			}

			j.SetConfig(cfg)
			first, err := j.Request()
			if err != nil {
				t.Fatal(err)
			}
			if s, err := LoadState(p); err != nil || s.Phase != PhasePreparing || s.Founder {
				t.Errorf("state is %+v, %v", s, err)
			}
			// The answer is lost; the repetition is known by its keys.
			j = NewJoining(p, cfg, tok, []string{"db.example.com"})
			again, err := j.Request()
			if err != nil {
				t.Fatal(err)
			}
			a, errA := cluster.CSRHash(first.CSRs)
			b, errB := cluster.CSRHash(again.CSRs)
			if a != b || errA != nil || errB != nil {
				t.Errorf("the repetition has other keys: %s %v, %s %v", a, errA, b, errB)
			}

			s, err := j.Finish(f.answer(t, again))
			if err != nil {
				t.Fatal(err)
			}
			if s.Phase != PhaseReady || s.ClusterName != "shop" || s.ClusterID != f.id.ID || s.TokenID != "t1" {
				t.Errorf("state is %+v", s)
			}
			if err := open(p); err != nil {
				t.Errorf("open: %v", err)
			}
			entries, err := os.ReadDir(p.PKI())
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, e := range entries {
				names = append(names, e.Name())
			}
			want := []string{"admin.pem", "ca.crt", "ca.key.sealed", "haproxy.pem", "node.pem", "patroni.pem", "postgres.pem", "sealing.key"}
			if role == cluster.RoleWitness { // no secret but the key of its own
				want = []string{"ca.crt", "node.pem"}
				if _, err := os.Stat(p.secrets()); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("a witness has secrets (%v)", err)
				}
			}
			if diff := cmp.Diff(want, names); diff != "" {
				t.Errorf("files in %s (-want +got):\n%s", p.PKI(), diff)
			}
		})
	}
}

func TestJoiningUndo(t *testing.T) {
	p := tempPaths(t)
	j := NewJoining(p, testConfig("n2", cluster.RoleWitness), cluster.Token{ClusterID: "c"}, nil)
	if _, err := j.Request(); err != nil {
		t.Fatal(err)
	}
	if err := j.Undo(); err != nil {
		t.Fatal(err)
	}
	if got := files(t, p); len(got) > 0 {
		t.Errorf("it left %v", got)
	}
}

// A data node without the secrets could not run: the answer is refused, and the
// join can be repeated.
func TestJoiningWithoutSecrets(t *testing.T) {
	f, p := newJoinFixture(t), tempPaths(t)
	j := NewJoining(p, testConfig("n2", cluster.RoleData), cluster.Token{ClusterID: f.id.ID}, nil)
	req, err := j.Request()
	if err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*cluster.JoinResponse){
		"no secrets":      func(r *cluster.JoinResponse) { r.Secrets = nil },
		"no sealing key":  func(r *cluster.JoinResponse) { r.ClusterKey = nil },
		"no certificate":  func(r *cluster.JoinResponse) { delete(r.Certs, pki.RolePatroni) },
		"another's":       func(r *cluster.JoinResponse) { r.Certs[pki.RoleNode] = r.Certs[pki.RoleAdmin] },
		"no CA":           func(r *cluster.JoinResponse) { r.CAPEM = nil },
		"nobody's answer": func(r *cluster.JoinResponse) { *r = cluster.JoinResponse{} },
	} {
		resp := f.answer(t, req)
		change(&resp)
		if _, err := j.Finish(resp); err == nil {
			t.Errorf("%s: no error", name)
		}
		if s, err := LoadState(p); err != nil || s.Phase != PhasePreparing {
			t.Errorf("%s: state is %+v, %v", name, s, err)
		}
	}
	if _, err := j.Finish(f.answer(t, req)); err != nil {
		t.Errorf("a good answer afterwards: %v", err)
	}
}
