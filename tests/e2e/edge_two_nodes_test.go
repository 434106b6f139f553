package e2e

import (
	"fmt"
	"strings"
	"testing"

	"pgha/lab/testbed"
	"pgha/node"
)

// TestTwoNodes is the life of a cluster that begins with two data nodes and
// gets its witness later, and what an operator does to it then.
func TestTwoNodes(t *testing.T) {
	e := edge{t, newBed(t)}
	e.hosts("n1", "n2", "witness", "spare")
	var r testbed.InitResult
	e.steps(
		edgeStep{"BringUp", func(e edge) {
			r = e.init("n1")
			e.join("n2", r.Data.Token)
			e.must(e.bed.CreateApp(e.long(), "n1"))
		}},
		edgeStep{"FirstIsNotCovered", func(e edge) {
			firstNotCovered(e, "n1")
			firstNotCovered(e, "n2")
		}},
		edgeStep{"LossOfTheSecond", lossOfTheSecond},
		edgeStep{"WitnessLater", func(e edge) { witnessLater(e, r.Witness.Token) }},
		edgeStep{"Psql", checkPsql},
		edgeStep{"Tokens", checkTokens},
		edgeStep{"JSON", checkJSON},
		edgeStep{"Firewall", checkFirewall},
		edgeStep{"StopAndRun", checkStopAndRun},
		edgeStep{"ResetRefused", checkResetRefused},
		edgeStep{"ResetWitness", checkResetWitness},
		edgeStep{"ResetPrimary", checkResetPrimary},
		edgeStep{"ResetReplica", checkResetReplica},
		edgeStep{"ResetOneOfTwoVoters", checkResetVoter},
		edgeStep{"RemovedBehindItsBack", checkRemoved},
	)
}

// firstNotCovered is what status must say of two data nodes, whichever is asked.
func firstNotCovered(e edge, host string) {
	e.t.Helper()
	s := e.status(host, "a replica in sync", func(s node.Status) bool {
		return edgeMember(s, "n2").Sync && edgeMember(s, "n2").Reachable && s.Promise.Holds
	})
	if s.Health != node.Degraded || s.Survives {
		e.t.Errorf("two data nodes are %s, and survive the loss of any: %t", s.Health, s.Survives)
	}
	if n1, n2 := edgeMember(s, "n1").Etcd, edgeMember(s, "n2").Etcd; n1 != "voter" || n2 != "learner" {
		e.t.Errorf("etcd: n1 is a %s and n2 a %s; want a voter and a learner", n1, n2)
	}
	p := e.tell(host, "status")
	if p.code != 1 {
		e.t.Errorf("pgha status on %s: exit status %d, want 1", host, p.code)
	}
	e.says(p.out, "DEGRADED: the loss of n1 is not covered: it is the only etcd voter",
		"automatic failover is off: add a witness (pgha token create --witness)",
		"synchronous: every acknowledged commit is on n1 and n2")
	if strings.Contains(p.out, "the loss of n2 is not covered") {
		e.t.Errorf("status warns of the loss of n2, which changes nothing:\n%s", p.out)
	}
}

func lossOfTheSecond(e edge) {
	before, pid := e.healthOf("n1"), e.postmaster("n1")
	w := e.writer(1, "n1")
	e.must(e.bed.PowerOff("n2"))
	e.acked(w)
	s := e.status("n1", "the loss of n2 to be seen", func(s node.Status) bool {
		return !edgeMember(s, "n2").Reachable && !s.Promise.Holds
	})
	if s.Leader != "n1" || edgeMember(s, "n1").Timeline != edgeMember(before, "n1").Timeline || e.postmaster("n1") != pid {
		e.t.Errorf("the loss of n2 changed the primary: %s", testbed.Members(s))
	}
	p := e.tell("n1", "status")
	if p.code != 1 {
		e.t.Errorf("pgha status: exit status %d, want 1", p.code)
	}
	e.says(p.out, "the loss of n1 is not covered", "bring back n2", "commits are on n1 alone", "UNREACHABLE")
	e.acked(w)
	e.must(e.bed.PowerOn(e.long(), "n2"))
	firstNotCovered(e, "n1")
	e.noneLost("n1", w)
}

// healthOf is a host's status as it is now.
func (e edge) healthOf(host string) node.Status {
	e.t.Helper()
	s, err := e.bed.Status(e.long(), host)
	e.must(err)
	return s
}

// onlyLocalEtcd makes sure that n2's Patroni speaks to its own etcd member, be
// it a learner or a voter.
func onlyLocalEtcd(e edge) {
	e.t.Helper()
	out, err := e.bed.Host("n2").Run(e.long(), "ss", "-Htn", "state", "established", "( dport = :2379 )")
	e.must(err)
	if out == "" {
		e.t.Errorf("n2's Patroni has no connection to etcd")
	}
	for line := range strings.Lines(out) {
		if !strings.Contains(line, "127.0.0.1:2379") {
			e.t.Errorf("an etcd connection of n2 leads to another host: %s", line)
		}
	}
}

// serving is what must stay as it is while etcd's membership changes.
func serving(e edge) string {
	e.t.Helper()
	s := e.healthOf("n1")
	text := "primary " + s.Leader
	for _, name := range []string{"n1", "n2"} {
		p := e.running(name, "patroni")
		if len(p) != 1 {
			e.t.Fatalf("%d Patronis run on %s", len(p), name)
		}
		text += fmt.Sprintf("; %s: timeline %d, Patroni %d, PostgreSQL %s", name, edgeMember(s, name).Timeline, p[0].PID, e.postmaster(name))
	}
	return text
}

func witnessLater(e edge, token string) {
	onlyLocalEtcd(e)
	before := serving(e)
	w := e.writer(1<<40, "n1")
	e.join("witness", token, "--witness")
	for _, host := range []string{"n1", "n2", "witness"} {
		for _, m := range e.healthy(host).Members {
			if m.Etcd != "voter" {
				e.t.Errorf("%s is %s in etcd, want voter", m.Name, m.Etcd)
			}
		}
		p := e.tell(host, "status")
		if p.code != 0 {
			e.t.Errorf("pgha status on %s: exit status %d, want 0", host, p.code)
		}
		e.says(p.out, "HEALTHY: the loss of any one node is survivable now")
	}
	onlyLocalEtcd(e)
	e.acked(w)
	if after := serving(e); after != before {
		e.t.Errorf("a new witness disturbed the data nodes:\nbefore: %s\nafter:  %s", before, after)
	}
	e.noneFailed("n1", w, "the witness joined")
}
