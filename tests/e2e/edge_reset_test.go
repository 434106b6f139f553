package e2e

import (
	"fmt"
	"strings"

	"pgha/cluster"
	"pgha/node"
)

func checkResetRefused(e edge) {
	e.refused("spare", []string{"this host is not a node"}, "reset", "--yes")
	e.refused("n1", []string{"there is no terminal to ask on", "--yes", "nothing was changed"}, "reset")
	// n2 is the primary; without n1 the witness may not go, and n2 neither.
	e.must(e.bed.PowerOff("n1"))
	e.status("n2", "the loss of n1 to be seen", func(s node.Status) bool { return !edgeMember(s, "n1").Reachable })
	want := []string{"this node cannot leave", "only 2 of 3 voters answer", "lose its quorum", "--force"}
	e.refused("witness", want, "reset", "--yes")
	e.refused("n2", want, "reset", "--yes")
	for _, host := range []string{"n2", "witness"} {
		s := e.healthOf(host)
		if got := edgeRoster(s); got != "n1 n2 witness" || s.Leader != "n2" {
			e.t.Errorf("a refused reset has changed the cluster: %q, primary %q", got, s.Leader)
		}
		if dirs := e.files(host, "/var/lib/pgha/reset-*"); len(dirs) > 0 {
			e.t.Errorf("a refused reset has moved files to %v", dirs)
		}
	}
	e.must(e.bed.PowerOn(e.long(), "n1"))
	e.healthy("n2")
}

// reset takes a host out of its cluster and checks that nothing of it is left,
// on the host or in the cluster as another host sees it.
func (e edge) reset(host, other string, more ...string) {
	e.t.Helper()
	h := e.bed.Host(host)
	var r struct {
		Node, Cluster string
		MovedTo       string `json:"moved_to"`
	}
	e.json(e.done(host, append([]string{"reset", "--yes", "--json"}, more...)...), &r)
	if r.Node != host || r.Cluster != "main" || !strings.HasPrefix(r.MovedTo, "/var/lib/pgha/reset-") {
		e.t.Errorf("pgha reset says %+v", r)
	}
	e.ended(host)
	e.quiet(host)
	if left := e.tables(host); left != "" {
		e.t.Errorf("pgha reset has left of the firewall: %q", left)
	}
	if left := e.files(host, "/var/lib/pgha/*"); len(left) != len(e.files(host, "/var/lib/pgha/reset-*")) {
		e.t.Errorf("pgha reset has left %v", left)
	}
	if left := append(e.files(host, "/etc/pgha/*"), e.files(host, "/run/pgha/*")...); len(left) > 0 {
		e.t.Errorf("pgha reset has left %v", left)
	}
	for _, path := range []string{"/state.json", "/pgha.yml", "/pki/node.pem"} {
		if len(e.files(host, r.MovedTo+path)) != 1 {
			e.t.Errorf("pgha reset has not kept %s%s of %s", r.MovedTo, path, h.Name())
		}
	}
	e.refused(host, []string{"not a node"}, "reset", "--yes")
	p := e.tell(host, "status")
	if p.code != 3 {
		e.t.Errorf("pgha status after a reset: exit status %d, want 3", p.code)
	}
	e.says(p.out, "this host is not a node")
	if len(more) > 0 {
		return // --force: the cluster need not have been told
	}
	s := e.status(other, host+" to be gone", func(s node.Status) bool { return edgeMember(s, host).Name == "" })
	if strings.Contains(strings.Join(s.ToDo, " "), "no node of this cluster") {
		e.t.Errorf("%s has left something in etcd: %v", host, s.ToDo)
	}
}

func checkResetWitness(e edge) {
	c := e.etcd("n2")
	w := e.writer(1<<43, "n1", "n2")
	e.reset("witness", "n2")
	if got := e.etcdMembers(c); got != "n1 n2" {
		e.t.Errorf("after the reset of the witness etcd has %q", got)
	}
	p := e.tell("n2", "status")
	if p.code != 1 {
		e.t.Errorf("pgha status of two voters: exit status %d, want 1", p.code)
	}
	e.says(p.out, "DEGRADED", "etcd would lose its quorum", "pgha token create --witness")
	e.join("witness", e.token("n2", "--witness"), "--witness")
	e.healthy("n1")
	if got := e.etcdMembers(c); got != "n1 n2 witness" {
		e.t.Errorf("after the witness's return etcd has %q", got)
	}
	e.noneFailed("n2", w, "the witness left and came back")
}

// checkResetPrimary resets the primary, n2: the replica takes over first.
func checkResetPrimary(e edge) {
	before := e.healthy("n1")
	w := e.writer(1<<44, "n1")
	e.reset("n2", "n1")
	if kept := e.files("n2", "/var/lib/pgha/reset-*/postgres/15/data/PG_VERSION"); len(kept) != 1 {
		e.t.Errorf("the data of the reset primary was not kept: %v", kept)
	}
	e.acked(w)
	s := e.status("n1", "n1 to be the primary", func(s node.Status) bool { return s.Leader == "n1" })
	if got, want := edgeMember(s, "n1").Timeline, edgeMember(before, "n2").Timeline+1; got != want {
		e.t.Errorf("the primary is on timeline %d, want %d", got, want)
	}
	if got := e.etcdMembers(e.etcd("n1")); got != "n1 witness" {
		e.t.Errorf("after the reset of n2 etcd has %q", got)
	}
	e.until("the slot of the node that has left to be dropped", func() error {
		if got := e.sql("n1", "SELECT slot_name FROM pg_replication_slots"); got != "" {
			return fmt.Errorf("there is %q", got)
		}
		return nil
	})
	e.rejoin("n2", "n1")
	e.noneLost("n1", w)
}

// rejoin takes a data node that was reset in again, under its old name.
func (e edge) rejoin(host, primary string) {
	e.t.Helper()
	e.join(host, e.token(primary))
	e.healthy(host)
	s := e.healthy(primary)
	if s.Leader != primary || edgeRoster(s) != "n1 n2 witness" {
		e.t.Errorf("after the return of %s: primary %q, members %q", host, s.Leader, edgeRoster(s))
	}
	if got := e.etcdMembers(e.etcd(primary)); got != "n1 n2 witness" {
		e.t.Errorf("after the return of %s etcd has %q", host, got)
	}
}

func checkResetReplica(e edge) {
	w := e.writer(1<<45, "n1")
	e.reset("n2", "n1")
	e.acked(w)
	e.rejoin("n2", "n1")
	e.noneLost("n1", w)
}

// checkResetVoter leaves one voter of two, which keeps its quorum although the
// other one has led etcd.
func checkResetVoter(e edge) {
	w := e.writer(1<<46, "n1")
	e.reset("witness", "n1")
	e.status("n1", "n2 to lead etcd", func(s node.Status) bool {
		return edgeMember(s, "n2").EtcdLeader && edgeMember(s, "n2").Reachable
	})
	e.reset("n2", "n1")
	if got := e.etcdMembers(e.etcd("n1")); got != "n1" {
		e.t.Errorf("after the reset of the witness and n2 etcd has %q", got)
	}
	e.acked(w)
	e.join("n2", e.token("n1"))
	firstNotCovered(e, "n1")
	e.join("witness", e.token("n1", "--witness"), "--witness")
	e.healthy("n1")
	if got := e.etcdMembers(e.etcd("n1")); got != "n1 n2 witness" {
		e.t.Errorf("after the return of n2 and the witness etcd has %q", got)
	}
	e.noneLost("n1", w)
}

// checkRemoved takes the witness out of etcd without its knowledge.
func checkRemoved(e edge) {
	c := e.etcd("n1")
	r, err := c.MemberList(e.long())
	e.must(err)
	for _, m := range r.Members {
		if m.Name == "witness" {
			// etcd refuses while a member has been connected for seconds only.
			e.until("etcd to remove the witness", func() error {
				_, err := c.MemberRemove(e.long(), m.ID)
				return err
			})
		}
	}
	pid := e.daemons("witness")[0].PID
	removed := func(host string, code int) {
		e.t.Helper()
		e.until(host+"'s status to say that the witness was removed", func() error {
			p := e.tell(host, "status")
			if p.code != code || !strings.Contains(p.out, "etcd member was removed from the cluster") || !strings.Contains(p.out, "pgha reset --force") {
				return fmt.Errorf("exit status %d: %s", p.code, p.out)
			}
			return nil
		})
	}
	removed("witness", int(node.Unknown))
	removed("n1", int(node.Degraded))
	// It is no reason to end, and so to be started again and again.
	if d := e.daemons("witness"); len(d) != 1 || d[0].PID != pid {
		e.t.Errorf("the witness's daemon has not stayed: %v", d)
	}
	e.must(e.bed.Kill("witness"))
	e.must(e.bed.Run(e.long(), "witness"))
	removed("witness", int(node.Unknown))
	e.sql("n1", "INSERT INTO t (id) VALUES (-1)", "-d", "app")

	// It left the roster too, as a member that is removed on purpose does.
	key := cluster.NewStore(c, e.healthOf("n1").ClusterID).Prefix() + "members/witness"
	e.until("the roster to be written", func() error { // a change of etcd's leader may cost a try
		_, err := c.Delete(e.long(), key)
		return err
	})
	// Whether a peer can still tell it that it is no member depends on how fast
	// their firewalls shut: if not, only --force helps.
	if p := e.tell("witness", "status"); strings.Contains(p.out, "etcd member was removed") {
		e.says(p.out, "pgha reset --force")
	}
	e.reset("witness", "n1", "--force")
	e.join("witness", e.token("n1", "--witness"), "--witness")
	e.healthy("n1")
}
