package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/node"
)

// healthy is a cluster of three as status shows it.
func healthy() node.Status {
	member := func(name, addr string, role cluster.NodeRole) node.MemberStatus {
		return node.MemberStatus{Name: name, Addr: netip.MustParseAddr(addr), Role: role, Reachable: true, Etcd: "voter"}
	}
	n1, n2, w := member("n1", "10.0.0.1", cluster.RoleData), member("n2", "10.0.0.2", cluster.RoleData), member("w", "10.0.0.3", cluster.RoleWitness)
	n1.Postgres, n1.State, n1.Timeline = "primary", "running", 2
	n2.Postgres, n2.State, n2.Timeline, n2.Sync, n2.LagBytes = "replica", "streaming", 2, true, 2048
	w.LagBytes, w.EtcdLeader = -1, true
	return node.Status{
		Cluster: "shop", ClusterID: "0b3e", SeenBy: "n1", Leader: "n1", Members: []node.MemberStatus{n1, n2, w},
		Promise:   node.Promise{Mode: "sync", Holds: true, Text: "synchronous: every acknowledged commit is on n1 and n2"},
		ReadWrite: []string{"10.0.0.1:5432", "10.0.0.2:5432"}, ReadOnly: []string{"10.0.0.1:5433", "10.0.0.2:5433"},
		Health: node.Healthy, Survives: true, Verdict: "the loss of any one node is survivable now",
	}
}

func TestPrintStatus(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(*node.Status)
		want   string
	}{
		{"healthy", func(*node.Status) {}, `
Cluster  shop (0b3e), seen by n1
Promise  synchronous: every acknowledged commit is on n1 and n2

MEMBER  ADDRESS   ROLE            STATE      TL  LAG     ETCD            CERTIFICATE ENDS
n1      10.0.0.1  primary         running    2   -       voter           -
n2      10.0.0.2  replica (sync)  streaming  2   2.0 KB  voter           -
w       10.0.0.3  witness         running    -   -       voter (leader)  -

Read-write  10.0.0.1:5432  10.0.0.2:5432
Read-only   10.0.0.1:5433  10.0.0.2:5433

HEALTHY: the loss of any one node is survivable now
`},
		{"two nodes, no witness", func(s *node.Status) {
			s.Members = s.Members[:2]
			s.Members[0].EtcdLeader, s.Members[1].Etcd, s.Members[1].LagBytes = true, "learner", 0
			s.Health, s.Verdict = node.Degraded, "the loss of n1 is not covered: it is the only etcd voter"
			s.ToDo = []string{"automatic failover is off: add a witness (pgha token create --witness)"}
		}, `
Cluster  shop (0b3e), seen by n1
Promise  synchronous: every acknowledged commit is on n1 and n2

MEMBER  ADDRESS   ROLE            STATE      TL  LAG  ETCD            CERTIFICATE ENDS
n1      10.0.0.1  primary         running    2   -    voter (leader)  -
n2      10.0.0.2  replica (sync)  streaming  2   0 B  learner         -

Read-write  10.0.0.1:5432  10.0.0.2:5432
Read-only   10.0.0.1:5433  10.0.0.2:5433

DEGRADED: the loss of n1 is not covered: it is the only etcd voter
  -> automatic failover is off: add a witness (pgha token create --witness)
`},
		{"the primary is down", func(s *node.Status) {
			n1 := &s.Members[0]
			n1.Reachable, n1.Postgres, n1.State, n1.LagBytes = false, "", "", -1
			s.Members[1].Sync, s.Members[1].LagBytes = false, -1
			s.SeenBy, s.Leader, s.Health = "n2", "", node.NoLeader
			s.Promise.Text, s.Verdict, s.ToDo = "synchronous; there is no primary now", "there is no primary: nobody can write", []string{"first", "second"}
		}, `
Cluster  shop (0b3e), seen by n2
Promise  synchronous; there is no primary now

MEMBER  ADDRESS   ROLE     STATE        TL  LAG      ETCD            CERTIFICATE ENDS
n1      10.0.0.1  -        UNREACHABLE  2   unknown  voter           -
n2      10.0.0.2  replica  streaming    2   unknown  voter           -
w       10.0.0.3  witness  running      -   -        voter (leader)  -

Read-write  10.0.0.1:5432  10.0.0.2:5432
Read-only   10.0.0.1:5433  10.0.0.2:5433

NO LEADER: there is no primary: nobody can write
  -> first
  -> second
`},
		{"the primary's pgha is down", func(s *node.Status) {
			s.Members[0].Reachable, s.Members[0].State, s.Members[0].LagBytes = false, "", -1
			s.Health, s.Verdict = node.Degraded, "x"
		}, `
Cluster  shop (0b3e), seen by n1
Promise  synchronous: every acknowledged commit is on n1 and n2

MEMBER  ADDRESS   ROLE            STATE      TL  LAG     ETCD            CERTIFICATE ENDS
n1      10.0.0.1  primary         PGHA DOWN  2   -       voter           -
n2      10.0.0.2  replica (sync)  streaming  2   2.0 KB  voter           -
w       10.0.0.3  witness         running    -   -       voter (leader)  -

Read-write  10.0.0.1:5432  10.0.0.2:5432
Read-only   10.0.0.1:5433  10.0.0.2:5433

DEGRADED: x
`},
		{"starting, and another joins", func(s *node.Status) {
			s.Members = append(s.Members[:1], node.MemberStatus{
				Name: "n2", Addr: netip.MustParseAddr("10.0.0.2"), Role: cluster.RoleData, LagBytes: -1, Etcd: "none", Waiting: "it has not finished joining",
			})
			s.Members[0] = node.MemberStatus{Name: "n1", Addr: netip.MustParseAddr("10.0.0.1"), Role: cluster.RoleData, Reachable: true, LagBytes: -1, Etcd: "voter"}
			s.Health, s.Verdict, s.Waiting, s.Promise.Text = node.Unknown, "this node cannot read the cluster's state", "waiting for etcd", "p"
		}, `
Cluster  shop (0b3e), seen by n1
Promise  p

MEMBER  ADDRESS   ROLE  STATE     TL  LAG      ETCD   CERTIFICATE ENDS
n1      10.0.0.1  -     starting  -   unknown  voter  -
n2      10.0.0.2  -     joining   -   unknown  none   -

Read-write  10.0.0.1:5432  10.0.0.2:5432
Read-only   10.0.0.1:5433  10.0.0.2:5433

This node is starting: waiting for etcd
UNKNOWN: this node cannot read the cluster's state
`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := healthy()
			tc.change(&s)
			var b bytes.Buffer
			printStatus(&b, s)
			if diff := cmp.Diff(strings.TrimPrefix(tc.want, "\n"), b.String()); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDateText(t *testing.T) {
	at := time.Now().Add(60*24*time.Hour + time.Hour)
	if got, want := dateText(at), at.Local().Format(time.DateOnly)+" (60 days)"; got != want {
		t.Errorf("dateText = %q, want %q", got, want)
	}
}

func TestMissingMember(t *testing.T) {
	for _, tc := range []struct {
		name    string
		members func(node.Status) []node.MemberStatus
		want    bool
	}{
		{"three", func(s node.Status) []node.MemberStatus { return s.Members }, false},
		{"two data nodes", func(s node.Status) []node.MemberStatus { return s.Members[:2] }, true},
		{"one with two witnesses", func(s node.Status) []node.MemberStatus {
			return []node.MemberStatus{s.Members[0], s.Members[2], s.Members[2]}
		}, true},
		{"one", func(s node.Status) []node.MemberStatus { return s.Members[:1] }, true},
	} {
		s := healthy()
		s.Members = tc.members(s)
		if got := missingMember(s); got != tc.want {
			t.Errorf("%s: missingMember = %v", tc.name, got)
		}
	}
}

// What status says while the daemon is down.
func TestStatusDown(t *testing.T) {
	state := node.State{ClusterID: "0b3e", ClusterName: "shop", Node: "n1", Role: cluster.RoleData, Phase: node.PhaseReady}
	config := node.NewConfig()
	config.Cluster, config.Name, config.Address = "shop", "n1", netip.MustParseAddr("10.0.0.1")
	for _, tc := range []struct {
		name  string
		files func(p node.Paths) error
		cause error
		want  []string
	}{
		{"no node", func(node.Paths) error { return nil }, node.ErrNotRunning, []string{"pgha init", "pgha join TOKEN"}},
		{"a node", func(p node.Paths) error { return errors.Join(state.Save(p), config.Save(p.Config())) }, node.ErrNotRunning,
			[]string{`pgha is not running on this host, which is the data node "n1" of cluster "shop"`, "start it: pgha run", "ask another node"}},
		{"a node that failed", func(p node.Paths) error {
			line := `{"level":"ERROR","msg":"cannot start","component":"pgha","err":"no quorum"}` + "\n"
			return errors.Join(state.Save(p), config.Save(p.Config()), os.WriteFile(p.DaemonLog(), []byte(line), 0o600))
		}, node.ErrNotRunning, []string{"its last error: cannot start: no quorum"}},
		{"a node that cannot read its configuration", func(p node.Paths) error {
			return errors.Join(state.Save(p), os.WriteFile(p.Config(), []byte("name: n1\nnmae: n1\n"), 0o600))
		}, node.ErrNotRunning, []string{"it cannot start: ", `pgha.yml:2: key "nmae": there is no such key`}},
		{"a damaged state", func(p node.Paths) error { return os.WriteFile(p.State(), []byte("{"), 0o600) }, node.ErrNotRunning, []string{"state.json"}},
		{"a daemon that does not answer", func(p node.Paths) error { return state.Save(p) }, errors.Join(errors.New("get"), context.DeadlineExceeded),
			[]string{"pgha runs on this host and has not answered within 15s", "pgha logs", "ask another node"}},
		{"an unknown trouble", func(p node.Paths) error { return state.Save(p) }, errors.New("it hangs"), []string{"it hangs"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			p := node.Paths{Etc: dir, Lib: dir, Run: dir, Log: dir}
			if err := tc.files(p); err != nil {
				t.Fatal(err)
			}
			for _, asJSON := range []bool{false, true} {
				var err error
				out, errs := capture(t, "", func() { err = statusDown(t.Context(), p, asJSON, tc.cause) })
				var exit exitError
				if !errors.As(err, &exit) || exit.code != 3 || exit.err != nil || errs != "" {
					t.Errorf("exit %v, standard error %q", err, errs)
				}
				if asJSON {
					var v struct {
						Health  string   `json:"health"`
						Verdict string   `json:"verdict"`
						ToDo    []string `json:"to_do"`
					}
					if err := json.Unmarshal([]byte(out), &v); err != nil || v.Health != "unknown" || v.ToDo == nil {
						t.Errorf("JSON %q: %v", out, err)
					}
					out = v.Verdict + strings.Join(v.ToDo, "\n")
				}
				for _, want := range tc.want {
					if !strings.Contains(out, want) {
						t.Errorf("status says %q, not %q", out, want)
					}
				}
			}
		})
	}
}

func TestShowStatusWithoutDaemon(t *testing.T) {
	dir := t.TempDir()
	var err error
	out, _ := capture(t, "", func() {
		err = showStatus(t.Context(), node.Paths{Etc: dir, Lib: dir, Run: filepath.Join(dir, "none"), Log: dir}, false)
	})
	var exit exitError
	if !errors.As(err, &exit) || exit.code != 3 || !strings.Contains(out, "not a node") {
		t.Errorf("exit %v, %q", err, out)
	}
}
