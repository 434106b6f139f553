package node

import (
	"encoding/json"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgha/cluster"
)

func TestDecideRotation(t *testing.T) {
	trust, sign, done := cluster.CATrust, cluster.CASign, cluster.CADone
	for _, tc := range []struct {
		name            string
		phase           cluster.CAPhase
		step            string
		behind, joining []string
		plan            caPlan
		why             string
	}{
		{"start", done, RotateCAStart, nil, nil, caStart, ""},
		{"start again, to wait", trust, RotateCAStart, []string{"n2"}, nil, caAwait, ""},
		{"start again, all have confirmed", trust, RotateCAStart, nil, nil, caAwait, ""},
		{"start while the next signs", sign, RotateCAStart, nil, nil, caRefuse, "--finish"},
		{"start before the last has ended", done, RotateCAStart, []string{"n2"}, nil, caRefuse, "confirmed the end of the last replacement (n2)"},
		{"start while a node joins", done, RotateCAStart, nil, []string{"n3"}, caRefuse, "n3 is just joining"},
		{"sign", trust, RotateCASign, nil, nil, caSign, ""},
		{"sign while one does not trust the next", trust, RotateCASign, []string{"n2", "w"}, nil, caRefuse, "confirmed the step before (n2, w)"},
		{"sign while a node joins", trust, RotateCASign, nil, []string{"n3"}, caRefuse, "n3 is just joining"},
		{"sign again, to wait", sign, RotateCASign, []string{"n2"}, nil, caAwait, ""},
		{"sign without a start", done, RotateCASign, nil, nil, caRefuse, "begin one"},
		{"finish", sign, RotateCAFinish, nil, nil, caDrop, ""},
		{"finish while one still has old certificates", sign, RotateCAFinish, []string{"w"}, nil, caRefuse, "pgha rotate ca --sign again"},
		{"finish before the next signs", trust, RotateCAFinish, nil, nil, caRefuse, "does not sign yet"},
		{"finish again, to wait", done, RotateCAFinish, []string{"n2"}, nil, caAwait, ""},
		{"finish what was not begun", done, RotateCAFinish, nil, nil, caRefuse, "begin one"},
		{"back from signing", sign, RotateCABack, nil, nil, caBack, ""},
		{"back from signing, while one is down", sign, RotateCABack, []string{"n2"}, nil, caBack, ""},
		{"back from the start", trust, RotateCABack, nil, nil, caDrop, ""},
		{"back from a start that never signed, while one is down", trust, RotateCABack, []string{"n2"}, []string{"n3"}, caDrop, ""},
		{"back from nothing", done, RotateCABack, nil, nil, caRefuse, "nothing to go back from"},
		{"no step", trust, "jump", nil, nil, caRefuse, "is no step"},
	} {
		plan, why := decideRotation(rotationFacts{phase: tc.phase, signed: tc.phase == sign, behind: tc.behind, joining: tc.joining}, tc.step)
		if plan != tc.plan || !strings.Contains(why, tc.why) || (plan == caRefuse) != (why != "") {
			t.Errorf("%s: plan %d, %q; want %d, %q", tc.name, plan, why, tc.plan, tc.why)
		}
	}
}

// TestDecideDrop is about taking a CA out of trust that nodes may have
// certificates of.
func TestDecideDrop(t *testing.T) {
	trust, sign := cluster.CATrust, cluster.CASign
	for _, tc := range []struct {
		name  string
		facts rotationFacts
		step  string
		plan  caPlan
		why   string
	}{
		{"back from signing and once more, all have confirmed", rotationFacts{phase: trust, signed: true}, RotateCABack, caDrop, ""},
		{"back from signing and once more, while one is down", rotationFacts{phase: trust, signed: true, behind: []string{"n2"}}, RotateCABack, caAwait, ""},
		{"back from signing and once more, while a node joins", rotationFacts{phase: trust, signed: true, behind: []string{"n3"}, joining: []string{"n3"}}, RotateCABack, caRefuse, "n3 is just joining"},
		{"back from signing and once more, with nodes of a past generation", rotationFacts{phase: trust, signed: true, former: []string{"n2"}}, RotateCABack, caRefuse, "rotate ca --back --former-destroyed"},
		{"back from signing, with nodes of a past generation", rotationFacts{phase: sign, signed: true, former: []string{"n2"}}, RotateCABack, caBack, ""},
		{"back from a start that never signed, with nodes of a past generation", rotationFacts{phase: trust, former: []string{"n2"}}, RotateCABack, caDrop, ""},
		{"sign again after back", rotationFacts{phase: trust, signed: true}, RotateCASign, caSign, ""},
		{"finish, with nodes of a past generation", rotationFacts{phase: sign, signed: true, former: []string{"n2", "w"}}, RotateCAFinish, caRefuse, "n2 and w, of a generation that was replaced"},
		{"finish, with nodes of a past generation: what to do", rotationFacts{phase: sign, signed: true, former: []string{"n2"}}, RotateCAFinish, caRefuse, "rotate ca --finish --former-destroyed"},
	} {
		plan, why := decideRotation(tc.facts, tc.step)
		if plan != tc.plan || !strings.Contains(why, tc.why) || (plan == caRefuse) != (why != "") {
			t.Errorf("%s: plan %d, %q; want %d, %q", tc.name, plan, why, tc.plan, tc.why)
		}
	}
}

func TestAbsent(t *testing.T) {
	at := func(name, addr string) cluster.Member {
		return cluster.Member{Name: name, Addr: netip.MustParseAddr(addr)}
	}
	members := []cluster.Member{at("n1", "10.0.0.1"), at("n2", "10.0.0.2"), at("w", "10.0.0.9")}
	former := []cluster.Member{at("n2", "10.0.0.2"), at("w", "10.0.0.3"), at("n4", "10.0.0.4")}
	if got := strings.Join(absent(former, members), ", "); got != "w (10.0.0.3), n4 (10.0.0.4)" {
		t.Errorf("members of past generations that may come back: %s", got)
	}
}

func TestDecideEtcdTurn(t *testing.T) {
	for _, tc := range []struct {
		name  string
		facts etcdTurnFacts
		why   string // "" = it may
	}{
		{"all voters answer", etcdTurnFacts{voter: true}, ""},
		{"a voter is silent", etcdTurnFacts{voter: true, silent: []string{"w"}}, "cost the quorum, for w"},
		{"a learner costs no quorum", etcdTurnFacts{silent: []string{"w"}}, ""},
		{"another's turn", etcdTurnFacts{voter: true, turn: "n2"}, "the turn of n2"},
		{"a learner waits for its turn too", etcdTurnFacts{turn: "n2"}, "the turn of n2"},
	} {
		ok, why := decideEtcdTurn(tc.facts)
		if ok != (tc.why == "") || !strings.Contains(why, tc.why) {
			t.Errorf("%s: %v, %q; want %q", tc.name, ok, why, tc.why)
		}
	}
}

func TestBlocked(t *testing.T) {
	for _, tc := range []struct {
		silent, waiting []string
		want            string
	}{
		{nil, nil, ""},
		{[]string{"n2"}, nil, "n2 does not answer"},
		{[]string{"n2", "w"}, []string{"n1 (its etcd is starting)"}, "n2 and w do not answer; waiting for n1 (its etcd is starting)"},
	} {
		if got := blocked(tc.silent, tc.waiting); got != tc.want {
			t.Errorf("blocked(%v, %v) = %q, want %q", tc.silent, tc.waiting, got, tc.want)
		}
	}
}

// TestFollowCA walks a node's files through a replacement of the CA, and back to
// an older state, as whoever holds etcd's keys could write it again.
func TestFollowCA(t *testing.T) {
	n := opened(t)
	w := asFounder(n)
	state, err := n.ownCAState(0)
	if err != nil {
		t.Fatal(err)
	}
	old := state.Certs[0]
	follow := func(s cluster.CAState) error {
		w.CA = &s
		return n.followCA(w)
	}
	step := func(plan caPlan, roles int) cluster.CAState {
		t.Helper()
		next, err := n.nextCAState(*state, plan)
		if err != nil {
			t.Fatal(err)
		}
		if err := follow(next); err != nil {
			t.Fatal(err)
		}
		if trust, err := n.pki.Trust(); err != nil || string(trust) != string(next.Trust()) {
			t.Errorf("phase %s: ca.crt holds %s (%v)", next.Phase, trust, err)
		}
		if _, err := n.ca(); err != nil {
			t.Errorf("phase %s: this node cannot sign: %v", next.Phase, err)
		}
		if due, err := n.dueCertificates(w, time.Now()); err != nil || len(due) != roles {
			t.Errorf("phase %s: certificates to renew are %v (%v), want %d", next.Phase, due, err, roles)
		}
		due, err := n.dueCertificates(w, time.Now())
		if err == nil {
			err = n.reissue(t.Context(), w, due)
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, r := range n.cfg.Role.Roles() {
			if err := n.pki.Verify(n.state.ClusterID, n.cfg.Name, r); err != nil {
				t.Errorf("phase %s: %v", next.Phase, err)
			}
		}
		state = &next
		return next
	}
	trusted := step(caStart, 0)
	step(caSign, 5)
	step(caBack, 5)
	step(caSign, 5)
	last := step(caDrop, 0)
	if err := follow(trusted); err == nil || !strings.Contains(err.Error(), "step 1") {
		t.Errorf("an older state is followed: %v", err)
	}
	if trust, err := n.pki.Trust(); err != nil || string(trust) != string(last.Trust()) || strings.Contains(string(trust), string(old)) {
		t.Errorf("an older state has brought the former CA back: %v", err)
	}
	// What etcd has lost, the node's own files still say.
	own, err := n.ownCAState(last.Step)
	if err != nil || own.Step != last.Step || string(own.Trust()) != string(last.Trust()) {
		t.Errorf("the node's own state is %+v, %v", own, err)
	}
}

// TestFollowCAOnAWitness: who cannot give itself certificates must not take the
// CA that has signed its own out of trust, or it would never start again.
func TestFollowCAOnAWitness(t *testing.T) {
	n := opened(t)
	w := asFounder(n)
	own, err := n.ownCAState(0)
	if err != nil {
		t.Fatal(err)
	}
	started, err := n.nextCAState(*own, caStart)
	if err != nil {
		t.Fatal(err)
	}
	n.sealing = nil
	signs, err := n.nextCAState(started, caSign)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []cluster.CAState{started, signs} {
		w.CA = &s
		if err := n.followCA(w); err != nil {
			t.Fatalf("phase %s: %v", s.Phase, err)
		}
	}
	dropped, err := n.nextCAState(signs, caDrop)
	if err != nil {
		t.Fatal(err)
	}
	w.CA = &dropped
	if err := n.followCA(w); err == nil || !strings.Contains(err.Error(), "pgha member replace "+n.cfg.Name) {
		t.Errorf("it trusts its own certificates no more, and says %v", err)
	}
	if trust, err := n.pki.Trust(); err != nil || string(trust) != string(signs.Trust()) {
		t.Errorf("ca.crt holds %s (%v)", trust, err)
	}
	if step, err := n.caStep(); err != nil || step != signs.Step {
		t.Errorf("it has followed step %d (%v), want %d", step, err, signs.Step)
	}
	if why, err := n.unconfirmed(t.Context(), w); err != nil || !strings.Contains(why, "has not taken the CA certificates") {
		t.Errorf("it confirms what it has not taken: %q, %v", why, err)
	}
	for _, r := range n.cfg.Role.Roles() {
		if err := n.pki.Verify(n.state.ClusterID, n.cfg.Name, r); err != nil {
			t.Errorf("it would not start again: %v", err)
		}
	}
}

// TestStepCA goes through the steps in etcd, with a member that is down and with
// one of a past generation.
func TestStepCA(t *testing.T) {
	n, srv := newAlone(t)
	store := n.store.Load()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	o := &Operation{kind: "rotate-ca", actor: "root@n1", log: discardLog(), out: func(OperationLine) {}}
	down := n.self()
	down.Name, down.Addr = "n2", netip.MustParseAddr("127.0.0.2")
	must(store.PutMember(t.Context(), down))
	var at int64
	taken := func(names ...string) {
		t.Helper()
		for _, name := range names {
			must(store.PutTaken(t.Context(), name, cluster.Taken{CA: at}))
		}
	}
	step := func(req RotateCARequest, phase cluster.CAPhase, signed bool) {
		t.Helper()
		s, err := n.stepCA(t.Context(), o, req)
		must(err)
		if s.Phase != phase || s.Signed != signed {
			t.Fatalf("after %+v: phase %s, signed %v, want %s, %v", req, s.Phase, s.Signed, phase, signed)
		}
		at = s.Step
	}
	refused := func(req RotateCARequest, why string) {
		t.Helper()
		if s, err := n.stepCA(t.Context(), o, req); err == nil || !strings.Contains(err.Error(), why) {
			t.Fatalf("%+v: %+v, %v; want a refusal with %q", req, s, err, why)
		}
	}
	back := RotateCARequest{Step: RotateCABack}
	step(RotateCARequest{Step: RotateCAStart}, cluster.CATrust, false)
	taken("n1", "n2")
	step(RotateCARequest{Step: RotateCASign}, cluster.CASign, true)
	taken("n1", "n2")
	step(back, cluster.CATrust, true)
	taken("n1") // and n2 has certificates of the next
	step(back, cluster.CATrust, true)
	taken("n2")

	g, err := json.Marshal(Generation{Number: 2, By: "n1", Former: []cluster.Member{down, {Name: "n9", Addr: netip.MustParseAddr("127.0.0.9")}}})
	must(err)
	_, err = srv.Client().Put(t.Context(), store.Prefix()+keyGeneration, string(g))
	must(err)
	refused(back, "n9 (127.0.0.9), of a generation")
	step(RotateCARequest{Step: RotateCASign}, cluster.CASign, true)
	taken("n1", "n2")
	refused(RotateCARequest{Step: RotateCAFinish}, "pgha rotate ca --finish --former-destroyed")
	step(RotateCARequest{Step: RotateCAFinish, FormerDestroyed: true}, cluster.CADone, false)
}
