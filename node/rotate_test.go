package node

import (
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
		{"back from the start, while one is down", trust, RotateCABack, []string{"n2"}, []string{"n3"}, caDrop, ""},
		{"back from nothing", done, RotateCABack, nil, nil, caRefuse, "nothing to go back from"},
		{"no step", trust, "jump", nil, nil, caRefuse, "is no step"},
	} {
		plan, why := decideRotation(tc.phase, tc.step, tc.behind, tc.joining)
		if plan != tc.plan || !strings.Contains(why, tc.why) || (plan == caRefuse) != (why != "") {
			t.Errorf("%s: plan %d, %q; want %d, %q", tc.name, plan, why, tc.plan, tc.why)
		}
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
