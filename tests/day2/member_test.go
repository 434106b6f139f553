package day2

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"pgha/cluster"
	"pgha/lab/testbed"
	"pgha/node"
	"pgha/pki"
)

// TestMember is what an operator does about the nodes of a cluster: it lists,
// removes and replaces them, and has them leave.
func TestMember(t *testing.T) {
	r := three(t)
	if err := r.AddHosts(within(t, wait), "spare"); err != nil {
		t.Fatal(err)
	}
	r.step(t, "what is refused", r.memberRefusals)
	r.step(t, "ghosts", r.memberGhosts)
	r.step(t, "a dead data node is replaced", r.memberReplaced)
	r.step(t, "a dead witness is replaced", r.memberWitnessReplaced)
	r.step(t, "the primary is removed", r.memberPrimaryRemoved)
	r.step(t, "a host that was wiped joins again", r.memberWiped)
}

func (r *rig) memberRefusals(t *testing.T, w *testbed.Writer) {
	const even = "2 voters would remain"
	r.refused(t, "n1", []string{"member", "remove", "--yes", "n9"}, `there is no node "n9"`, "n1, n2, witness")
	r.refused(t, "n1", []string{"member", "remove", "--yes", "n1"}, "n1 is this node", "pgha leave")
	r.refused(t, "n1", []string{"member", "remove", "--yes", "witness"}, even, "pgha member replace", "--allow-even")
	r.refused(t, "n1", []string{"member", "remove", "--yes", "n2"}, even)
	r.refused(t, "n1", []string{"member", "remove", "n2"}, "no terminal")
	r.refused(t, "n1", []string{"member", "remove", "--yes"}, "needs one node's NAME")
	r.refused(t, "n2", []string{"leave", "--yes"}, "this node cannot leave", even)
	r.refused(t, "witness", []string{"leave", "--yes"}, even)
	r.refused(t, "n1", []string{"member", "replace", "n2"}, "n2 cannot be replaced: it answers")
	r.refused(t, "n1", []string{"member", "replace", "--witness", "n2"}, "n2 is a data node")
	r.refused(t, "witness", []string{"member", "remove", "--yes", "n2"}, "run it on n1 or n2")
	r.refused(t, "n1", []string{"token", "create", "--replaces", "n2"}, "not defined")
	l := r.members(t, "n1")
	if len(l.Members) != 3 || len(l.Ghosts) != 0 || len(l.Former) != 0 {
		t.Errorf("refusals have left %+v", l)
	}
	for _, m := range l.Members {
		if m.State != "member" || m.Etcd != "voter" || m.Address != r.Addr(m.Name) || m.EtcdID == "" || m.Since.IsZero() || m.Version == "" {
			t.Errorf("listed as %+v", m)
		}
	}
	r.unharmed(t, w)
}

func (r *rig) members(t *testing.T, host string) node.MemberList {
	t.Helper()
	var l node.MemberList
	if err := json.Unmarshal([]byte(r.do(t, host, "member", "list", "--json")), &l); err != nil {
		t.Fatal(err)
	}
	return l
}

// memberGhosts adds a voter of nobody behind pgha's back.
func (r *rig) memberGhosts(t *testing.T, w *testbed.Writer) {
	c := r.etcd(t, "n1")
	err := testbed.Until(within(t, wait), "etcd to take a fourth voter", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		_, err := c.MemberAdd(ctx, []string{"https://10.99.99.99:2380"})
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	l := r.members(t, "n2")
	if len(l.Ghosts) != 1 || !strings.Contains(l.Ghosts[0].What, "https://10.99.99.99:2380") {
		t.Fatalf("ghosts: %+v", l.Ghosts)
	}
	text := r.do(t, "n2", "member", "list")
	if !strings.Contains(text, l.Ghosts[0].What+"\n  -> "+l.Ghosts[0].Mend) {
		t.Errorf("pgha member list prints %s", text)
	}
	words := strings.Fields(l.Ghosts[0].Mend)
	r.do(t, "n2", "member", "remove", "--yes", words[len(words)-1])
	if l := r.members(t, "n1"); len(l.Ghosts) != 0 || len(l.Members) != 3 {
		t.Errorf("afterwards: %+v", l)
	}
	r.unharmed(t, w)
}

// token asks for one with which a host can join.
func (r *rig) token(t *testing.T, host string, args ...string) string {
	t.Helper()
	var a node.TokenAnswer
	if err := json.Unmarshal([]byte(r.do(t, host, args...)), &a); err != nil {
		t.Fatal(err)
	}
	return a.Token
}

func (r *rig) joins(t *testing.T, host, token string, args ...string) {
	t.Helper()
	if _, err := r.Join(within(t, wait), host, token, args...); err != nil {
		t.Fatal(err)
	}
}

// knows waits until a host knows that it was removed, serves nothing, and says so
// after a restart too.
func (r *rig) knows(t *testing.T, host string, words ...string) {
	t.Helper()
	said := func(when string) {
		err := testbed.Until(within(t, wait), host+" to say that it was removed, "+when, func() error {
			out, err := r.Host(host).Command(within(t, wait), bin, "status").CombinedOutput()
			if err == nil {
				return fmt.Errorf("pgha status has succeeded: %s", out)
			}
			for _, word := range append([]string{"this node was removed from cluster", "pgha reset, then pgha join TOKEN"}, words...) {
				if !strings.Contains(string(out), word) {
					return fmt.Errorf("no %q in %s", word, out)
				}
			}
			if code := r.exitCode(t, host, "status"); code != int(node.Unknown) {
				return fmt.Errorf("pgha status has exit status %d", code)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		for _, port := range []string{"5432", "5433", "5442", "2380"} {
			err := testbed.Until(within(t, wait), host+" to serve nothing on port "+port, func() error {
				out, err := r.Host(host).Run(within(t, wait), "ss", "-Hltn", "( sport = :"+port+" )")
				if err == nil && strings.TrimSpace(out) != "" {
					err = fmt.Errorf("%s listens: %s", host, out)
				}
				return err
			})
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	said("at first")
	if err := r.Kill(host); err != nil {
		t.Fatal(err)
	}
	if err := r.Run(within(t, wait), host); err != nil {
		t.Fatal(err)
	}
	r.await(t, host, "the daemon to answer", func(s node.Status) bool { return s.SeenBy != "" })
	said("after a restart")
}

func (r *rig) exitCode(t *testing.T, host string, args ...string) int {
	t.Helper()
	var exit interface{ ExitCode() int }
	if err := r.Host(host).Command(within(t, wait), bin, args...).Run(); errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return 0
}

// memberReplaced loses the replica's VM. A new one, of the same name, takes its
// place; the old one comes back. Then the new one leaves, and the old one joins.
func (r *rig) memberReplaced(t *testing.T, w *testbed.Writer) {
	if s := r.healthy(t); s.Leader != "n1" {
		t.Fatalf("the primary is %s", s.Leader)
	}
	if err := r.PowerOff("n2"); err != nil {
		t.Fatal(err)
	}
	r.await(t, "n1", "the loss of n2 to be seen", func(s node.Status) bool { return len(s.Members) == 3 && !s.Members[1].Reachable })
	r.refused(t, "n1", []string{"member", "remove", "--yes", "n2"}, "pgha member replace")
	token := r.token(t, "n1", "member", "replace", "--json", "n2")
	began := time.Now()
	r.joins(t, "spare", token, "--name", "n2")
	s := r.await(t, "n1", "the new n2 to be in sync", func(s node.Status) bool { return s.Health == node.Healthy })
	t.Logf("the cluster is healthy %s after pgha join", time.Since(began).Round(time.Second))
	if len(s.Members) != 3 || s.Members[1].Name != "n2" || s.Members[1].Addr != r.Host("spare").Addr() || s.Members[1].Etcd != "voter" {
		t.Errorf("members: %s", testbed.Members(s))
	}
	r.goneFrom(t, r.Addr("n2"))
	l := r.members(t, "n1")
	if len(l.Members) != 3 || len(l.Ghosts) != 0 || len(l.Former) != 1 || l.Former[0].Addr.String() != r.Addr("n2") || !strings.Contains(l.Former[0].Why, "took its place") {
		t.Errorf("listed: %+v", l)
	}
	if err := r.PowerOn(within(t, wait), "n2"); err != nil {
		t.Fatal(err)
	}
	r.knows(t, "n2", "by root@n1", "n2 at "+r.Addr("spare")+" took its place")
	r.refused(t, "n2", []string{"leave", "--yes"}, "was removed", "pgha reset")
	r.do(t, "n2", "reset", "--yes")

	began = time.Now()
	r.do(t, "spare", "leave", "--yes", "--allow-even")
	r.refused(t, "spare", []string{"leave", "--yes"}, "not a node")
	r.slotGone(t, "n2")
	t.Logf("its slot is gone %s after the beginning of pgha leave", time.Since(began).Round(100*time.Millisecond))
	r.joins(t, "n2", r.token(t, "n1", "token", "create", "--json"))
}

// goneFrom checks that PostgreSQL on n1 lets nobody in from an address.
func (r *rig) goneFrom(t *testing.T, addr string) {
	t.Helper()
	err := testbed.Until(within(t, wait), "PostgreSQL to refuse "+addr, func() error {
		out := r.do(t, "n1", "psql", "-X", "-A", "-t", "-c", "SELECT count(*) FROM pg_hba_file_rules WHERE address = '"+addr+"'")
		if strings.TrimSpace(out) != "0" {
			return fmt.Errorf("there are %s rules", out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func (r *rig) slotGone(t *testing.T, name string) {
	t.Helper()
	err := testbed.Until(within(t, wait), "the slot of "+name+" to be dropped", func() error {
		out := r.do(t, "n1", "psql", "-X", "-A", "-t", "-c", "SELECT slot_name FROM pg_replication_slots")
		if strings.Contains(out, name) {
			return fmt.Errorf("there is %q", out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

// memberWitnessReplaced loses the witness; a new host takes its place under its
// name. That one is removed while it runs, and the old one joins again.
func (r *rig) memberWitnessReplaced(t *testing.T, w *testbed.Writer) {
	if err := r.PowerOff("witness"); err != nil {
		t.Fatal(err)
	}
	r.await(t, "n1", "the loss of the witness to be seen", func(s node.Status) bool { return len(s.Members) == 3 && !s.Members[2].Reachable })
	token := r.token(t, "n2", "member", "replace", "--json", "witness")
	parsed, err := cluster.ParseToken(token)
	if err != nil || parsed.Role != cluster.RoleWitness {
		t.Errorf("the token is for a %s node, %v", parsed.Role, err)
	}
	// The old one is back before the new one has joined.
	if err := r.PowerOn(within(t, wait), "witness"); err != nil {
		t.Fatal(err)
	}
	r.await(t, "n1", "the witness to be back", func(s node.Status) bool { return s.Health == node.Healthy })
	r.refused(t, "spare", []string{"join", "--witness", "--no-service", "--yes", "--name", "w2", "--address", r.Addr("spare"), token}, "witness cannot be replaced: it answers")
	if err := r.PowerOff("witness"); err != nil {
		t.Fatal(err)
	}
	r.await(t, "n1", "the loss of the witness to be seen again", func(s node.Status) bool { return len(s.Members) == 3 && !s.Members[2].Reachable })
	r.joins(t, "spare", token, "--witness", "--name", "w2")
	r.await(t, "n1", "the new witness to vote", func(s node.Status) bool { return s.Health == node.Healthy })

	if err := r.PowerOn(within(t, wait), "witness"); err != nil {
		t.Fatal(err)
	}
	r.knows(t, "witness", "by root@n2", "w2 at "+r.Addr("spare")+" took its place")
	r.do(t, "witness", "reset", "--yes")

	r.do(t, "n1", "member", "remove", "--yes", "--allow-even", "w2")
	r.knows(t, "spare", "by root@n1", "it was removed")
	r.do(t, "spare", "reset", "--yes")
	if l := r.members(t, "n2"); len(l.Members) != 2 || len(l.Ghosts) != 0 || len(l.Former) != 4 {
		t.Errorf("listed: %+v", l)
	}
	r.joins(t, "witness", r.token(t, "n1", "token", "create", "--witness", "--json"), "--witness")
	r.await(t, "n1", "the witness to vote", func(s node.Status) bool { return s.Health == node.Healthy })
	r.unharmed(t, w)
}

// memberPrimaryRemoved removes the primary while it runs, and takes it in again.
func (r *rig) memberPrimaryRemoved(t *testing.T, w *testbed.Writer) {
	primary := r.healthy(t).Leader
	next := other(primary)
	r.refused(t, next, []string{"member", "remove", "--yes", primary}, "2 voters would remain")
	r.do(t, next, "member", "remove", "--yes", "--allow-even", primary)
	s := r.await(t, next, "the removed primary to be gone", func(s node.Status) bool { return len(s.Members) == 2 })
	if s.Leader != next {
		t.Errorf("the primary is %q, want %s", s.Leader, next)
	}
	r.goesOn(t, w)
	r.knows(t, primary, "by root@"+next, "it was removed")
	r.do(t, primary, "reset", "--yes")
	r.joins(t, primary, r.token(t, next, "token", "create", "--json"))
}

// memberWiped loses what is on the witness's disk: it joins again under its name
// and address.
func (r *rig) memberWiped(t *testing.T, w *testbed.Writer) {
	if err := r.PowerOff("witness"); err != nil {
		t.Fatal(err)
	}
	if err := r.Host("witness").PowerOn(within(t, wait)); err != nil {
		t.Fatal(err)
	}
	r.do(t, "witness", "reset", "--yes", "--force") // nobody is told
	r.await(t, "n1", "the loss of the witness to be seen", func(s node.Status) bool { return len(s.Members) == 3 && !s.Members[2].Reachable })
	r.joins(t, "witness", r.token(t, "n1", "member", "replace", "--witness", "--json", "witness"), "--witness")
	for _, m := range r.members(t, "n2").Members {
		if m.Name == "witness" && m.Address != r.Addr("witness") {
			t.Errorf("listed as %+v", m)
		}
	}
	r.await(t, "n1", "the witness to vote", func(s node.Status) bool { return s.Health == node.Healthy })
	r.unharmed(t, w)
}

// etcd is a client of a data node's etcd, with the node's own certificate.
func (r *rig) etcd(t *testing.T, host string) *clientv3.Client {
	t.Helper()
	h := r.Host(host)
	b, err := pki.Dir{Path: h.Path("/var/lib/pgha/pki")}.Bundle(pki.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := tls.X509KeyPair(b.CertPEM, b.KeyPEM)
	if err != nil {
		t.Fatal(err)
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(b.CAPEM) {
		t.Fatal("the node's certificate has no CA")
	}
	const addr = "127.0.0.1:2379" // etcd serves nobody else
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"https://" + addr}, Logger: zap.NewNop(), DialTimeout: 10 * time.Second,
		TLS: &tls.Config{Certificates: []tls.Certificate{cert}, RootCAs: pool, ServerName: h.Addr().String(), MinVersion: tls.VersionTLS13},
		DialOptions: []grpc.DialOption{grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return h.Dial(ctx, "tcp", addr)
		})},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() }) // the cluster ends as well
	return c
}
