package node

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/cluster"
	"pgha/internal/fsx"
)

func TestCompareVersions(t *testing.T) {
	for _, c := range []struct {
		a, b  string
		order int
		ok    bool
	}{
		{"v1.0.0", "v1.0.0", 0, true},
		{"dev", "dev", 0, true},
		{"v1.0.0", "v1.0.1", -1, true},
		{"v1.10.0", "v1.9.9", 1, true},
		{"1.2.3", "v1.2.4", -1, true},
		{"v1.1.0-rc1", "v1.1.0", -1, true},
		{"v1.1.0-rc2", "v1.1.0-rc10", -1, true},
		{"v1.1.0-rc1", "v1.0.9", 1, true},
		{"v1.1.0-3-gabcdef0", "v1.1.0", 1, true},
		{"v1.1.0-3-gabcdef0", "v1.1.0-12-g0123456", -1, true},
		{"v1.1.0-3-gabcdef0", "v1.1.1", -1, true},
		{"v1.1.0-dirty", "v1.1.0", 0, false},
		{"dev", "v1.1.0", 0, false},
		{"abcdef0", "0123456", 0, false},
		{"v1.1.0-beta", "v1.1.0", 0, false},
	} {
		for _, turned := range []bool{false, true} {
			a, b, want := c.a, c.b, c.order
			if turned {
				a, b, want = b, a, -want
			}
			if order, ok := compareVersions(a, b); order != want || ok != c.ok {
				t.Errorf("%s against %s: %d, %t; want %d, %t", a, b, order, ok, want, c.ok)
			}
		}
	}
}

func TestPlanUpgrade(t *testing.T) {
	nodes := func(change func(n1, n2, w *upgradeNode)) []upgradeNode {
		n1 := upgradeNode{name: "n1", role: cluster.RoleData, version: "v1.0.0", answers: true, leader: true}
		n2 := upgradeNode{name: "n2", role: cluster.RoleData, version: "v1.0.0", answers: true}
		w := upgradeNode{name: "witness", role: cluster.RoleWitness, version: "v1.0.0", answers: true}
		if change != nil {
			change(&n1, &n2, &w)
		}
		return []upgradeNode{n1, n2, w}
	}
	for _, c := range []struct {
		name   string
		nodes  []upgradeNode
		req    UpgradeRequest
		want   string // the order
		refuse string
	}{
		{name: "witness first, primary last", nodes: nodes(nil), req: UpgradeRequest{Version: "v1.1.0"}, want: "witness n2 n1"},
		{name: "wherever the primary is", nodes: nodes(func(n1, n2, _ *upgradeNode) { n1.leader, n2.leader = false, true }), req: UpgradeRequest{Version: "v1.1.0"}, want: "witness n1 n2"},
		{name: "everywhere already", nodes: nodes(nil), req: UpgradeRequest{Version: "v1.0.0"}},
		{name: "interrupted after the witness", nodes: nodes(func(_, _, w *upgradeNode) { w.version = "v1.1.0" }), req: UpgradeRequest{Version: "v1.1.0"}, want: "n2 n1"},
		{name: "interrupted during a trial", nodes: nodes(func(_, _, w *upgradeNode) { w.version, w.trial = "v1.1.0", true }), req: UpgradeRequest{Version: "v1.1.0"}, want: "witness n2 n1"},
		{name: "older", nodes: nodes(nil), req: UpgradeRequest{Version: "v0.9.0"}, refuse: "older than v1.0.0"},
		{name: "older on one", nodes: nodes(func(_, n2, _ *upgradeNode) { n2.version = "v1.2.0" }), req: UpgradeRequest{Version: "v1.1.0"}, refuse: "older than v1.2.0, which runs on n2"},
		{name: "older, and meant", nodes: nodes(nil), req: UpgradeRequest{Version: "v0.9.0", AllowOlder: true}, want: "witness n2 n1"},
		{name: "of no known order", nodes: nodes(nil), req: UpgradeRequest{Version: "dev"}, refuse: "--allow-older"},
		{name: "of no known order, and meant", nodes: nodes(nil), req: UpgradeRequest{Version: "dev", AllowOlder: true}, want: "witness n2 n1"},
		{name: "a node does not answer", nodes: nodes(func(_, n2, _ *upgradeNode) { n2.answers, n2.version = false, "" }), req: UpgradeRequest{Version: "v1.1.0"}, refuse: "n2 does not answer"},
		{name: "one node", nodes: nodes(func(_, n2, _ *upgradeNode) { n2.answers = false }), req: UpgradeRequest{Version: "v1.1.0", Node: "n1"}, want: "n1"},
		{name: "one node that does not answer", nodes: nodes(func(n1, _, _ *upgradeNode) { n1.answers = false }), req: UpgradeRequest{Version: "v1.1.0", Node: "n1"}, refuse: "n1 does not answer"},
		{name: "an unknown node", nodes: nodes(nil), req: UpgradeRequest{Version: "v1.1.0", Node: "n9"}, refuse: "n1, n2, witness"},
	} {
		plan, err := planUpgrade(c.nodes, c.req)
		if c.refuse != "" {
			if err == nil || !strings.Contains(err.Error(), c.refuse) {
				t.Errorf("%s: %v, want a refusal that says %q", c.name, err, c.refuse)
			}
			continue
		}
		var names []string
		for _, m := range plan {
			names = append(names, m.name)
		}
		if got := strings.Join(names, " "); err != nil || got != c.want {
			t.Errorf("%s: %q, %v; want %q", c.name, got, err, c.want)
		}
	}
}

func TestNotReady(t *testing.T) {
	status := func(change func(s *Status)) Status {
		s := Status{Health: Healthy, Leader: "n1", Promise: Promise{Holds: true}, Members: []MemberStatus{
			{Name: "n1", Role: cluster.RoleData, Reachable: true, Etcd: etcdVoter, Postgres: pgPrimary},
			{Name: "n2", Role: cluster.RoleData, Reachable: true, Etcd: etcdVoter, Postgres: pgReplica, Sync: true},
			{Name: "witness", Role: cluster.RoleWitness, Reachable: true, Etcd: etcdVoter},
		}}
		if change != nil {
			change(&s)
		}
		return s
	}
	for _, c := range []struct {
		name, want string
		s          Status
	}{
		{"whole", "", status(nil)},
		{"something else needs attention", "", status(func(s *Status) { s.Health = Degraded })},
		{"a data node alone", "", status(func(s *Status) { s.Members, s.Promise.Holds = s.Members[:1], false })},
		{"no primary", "nobody can write", status(func(s *Status) { s.Health, s.Verdict = NoLeader, "nobody can write" })},
		{"a node is away", "n2 does not answer", status(func(s *Status) { s.Members[1].Reachable = false })},
		{"a node starts", "waiting for etcd", status(func(s *Status) { s.Members[2].Waiting = "waiting for etcd" })},
		{"a node on trial", "v2 on trial", status(func(s *Status) { s.Members[2].Upgrade = &UpgradeReport{Version: "v2"} })},
		{"a trial that has failed", "", status(func(s *Status) { s.Members[2].Upgrade = &UpgradeReport{Version: "v2", Failed: "so"} })},
		{"out of etcd", "no part in etcd", status(func(s *Status) { s.Members[2].Etcd = etcdNone })},
		{"no replica", "no running replica on n2 (starting)", status(func(s *Status) { s.Members[1].Postgres, s.Members[1].State = "", "starting" })},
		{"unknown lag", "n2 is behind", status(func(s *Status) { s.Members[1].LagBytes = -1 })},
		{"not in sync", "alone", status(func(s *Status) { s.Promise = Promise{Text: "commits are on n1 alone"} })},
	} {
		if got := notReady(c.s); (got == "") != (c.want == "") || !strings.Contains(got, c.want) {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

func TestDecideTrial(t *testing.T) {
	was := health{Problems: []string{"firewall"}, Children: map[string]int{"patroni": 1, "haproxy": 2}, Postgres: pgPrimary, Postmaster: 3}
	whole := trialObservation{before: was, now: was, etcd: true, read: true, owner: true, open: true}
	for _, c := range []struct {
		name   string
		change func(o *trialObservation)
		want   trialAction
		why    string
	}{
		{"as it was", func(*trialObservation) {}, trialConfirm, ""},
		{"no leader of etcd", func(o *trialObservation) { o.etcd = false }, trialWait, "etcd"},
		{"nothing read", func(o *trialObservation) { o.read = false }, trialWait, "state"},
		{"Patroni is gone", func(o *trialObservation) { o.now.Children = map[string]int{"haproxy": 2} }, trialWait, "patroni"},
		{"Patroni was started anew", func(o *trialObservation) { o.now.Children = map[string]int{"patroni": 9, "haproxy": 2} }, trialConfirm, ""},
		{"Patroni did not run before", func(o *trialObservation) { o.before.Children, o.now.Children = nil, nil }, trialConfirm, ""},
		{"PostgreSQL is gone", func(o *trialObservation) { o.now.Postgres = "" }, trialWait, "PostgreSQL"},
		{"PostgreSQL did not run before", func(o *trialObservation) { o.before.Postgres, o.now.Postgres = "", "" }, trialConfirm, ""},
		{"the primary's gate is shut", func(o *trialObservation) { o.open = false }, trialWait, "gate"},
		{"a replica's gate is shut", func(o *trialObservation) { o.owner, o.open, o.now.Postgres = false, false, pgReplica }, trialConfirm, ""},
		{"a new problem", func(o *trialObservation) { o.now.Problems = []string{"firewall", "gate"} }, trialWait, "gate"},
		{"an old problem has gone", func(o *trialObservation) { o.now.Problems = nil }, trialConfirm, ""},
		{"out of time", func(o *trialObservation) { o.etcd, o.elapsed = false, trialTime+time.Second }, trialBack, "etcd"},
		{"just in time", func(o *trialObservation) { o.elapsed = trialTime + time.Second }, trialConfirm, ""},
	} {
		o := whole
		c.change(&o)
		if got, why := decideTrial(o); got != c.want || !strings.Contains(why, c.why) {
			t.Errorf("%s: %d, %q; want %d, %q", c.name, got, why, c.want, c.why)
		}
	}
}

func TestMixedVersions(t *testing.T) {
	data := func(name, version string) MemberStatus {
		return MemberStatus{Name: name, Role: cluster.RoleData, Version: version}
	}
	witness := func(version string) MemberStatus {
		return MemberStatus{Name: "w", Role: cluster.RoleWitness, Version: version}
	}
	failed := data("n1", "v1.0.0")
	failed.Upgrade = &UpgradeReport{Version: "v1.1.0", Failed: "no etcd"}
	for _, c := range []struct {
		members []MemberStatus
		want    []string
	}{
		{nil, nil},
		{[]MemberStatus{data("n1", "v1.0.0"), data("n2", "v1.0.0"), witness("v1.0.0")}, nil},
		{[]MemberStatus{data("n1", "dev"), data("n2", "dev"), data("n3", "")}, nil},
		{[]MemberStatus{data("n1", "v1.0.0"), data("n2", "v1.1.0"), witness("v1.1.0")},
			[]string{"different versions of pgha run (n1: v1.0.0; n2, w: v1.1.0): finish it with pgha upgrade on n2"}},
		{[]MemberStatus{witness("v1.1.0"), data("n1", "v1.0.0"), data("n2", "v1.1.0")},
			[]string{"different versions of pgha run (w, n2: v1.1.0; n1: v1.0.0): finish it with pgha upgrade on n2"}},
		{[]MemberStatus{failed, witness("v1.1.0")},
			[]string{"different versions of pgha run (n1: v1.0.0; w: v1.1.0): finish it with pgha upgrade on a data node with the newer one",
				"n1 runs v1.0.0 again, as v1.1.0 has failed there: no etcd"}},
		{[]MemberStatus{data("n1", "dev"), data("n2", "v1.1.0")},
			[]string{"different versions of pgha run (n1: dev; n2: v1.1.0): finish it with pgha upgrade on a data node with the newer one"}},
	} {
		if d := cmp.Diff(c.want, mixedVersions(c.members)); d != "" {
			t.Errorf("%s (-want +got):\n%s", VersionsText(c.members), d)
		}
	}
}

func sumOf(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}

func content(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestReceiveAndSwap(t *testing.T) {
	installed := filepath.Join(t.TempDir(), "pgha")
	if err := os.WriteFile(installed, []byte("one"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := receive(installed, sumOf("two"), strings.NewReader("tw")); err == nil || !strings.Contains(err.Error(), "checksum") {
		t.Errorf("half a program was taken: %v", err)
	}
	if err := swapPrograms(installed); err == nil {
		t.Error("a program that is not there was installed")
	}
	if got := content(t, installed); got != "one" {
		t.Errorf("after that %q is installed", got)
	}
	for _, step := range []struct{ next, before string }{{"two", "one"}, {"three", "two"}} {
		if err := receive(installed, sumOf(step.next), strings.NewReader(step.next)); err != nil {
			t.Fatal(err)
		}
		if st, err := os.Stat(candidate(installed)); err != nil || st.Mode().Perm() != 0o755 {
			t.Errorf("the new program's mode: %v, %v", st.Mode(), err)
		}
		if err := swapPrograms(installed); err != nil {
			t.Fatal(err)
		}
		if now, was := content(t, installed), content(t, previous(installed)); now != step.next || was != step.before {
			t.Errorf("%q is installed and %q kept, want %q and %q", now, was, step.next, step.before)
		}
	}
	if left, err := os.ReadDir(filepath.Dir(installed)); err != nil || len(left) != 2 {
		t.Errorf("there are %v, %v; want the program and the one before", left, err)
	}
}

// TestKeepInstalled: what a trial that fails falls back to is the program that
// runs, although an operator has replaced its file.
func TestKeepInstalled(t *testing.T) {
	installed := filepath.Join(t.TempDir(), "pgha")
	own, err := fileSum(ownImage)
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []string{"", "another"} {
		if text != "" {
			if err := os.WriteFile(installed, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := keepInstalled(installed); err != nil {
			t.Fatal(err)
		}
		if sum, err := fileSum(installed); err != nil || sum != own {
			t.Errorf("with %q there, the program that runs is not installed: %v", text, err)
		}
	}
}

func TestInspectRefuses(t *testing.T) {
	dir := t.TempDir()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\necho '{\"program\":\"pgha\",\"version\":\"v9\"}'\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	// This program for the other architecture, as far as its header tells.
	own, err := os.ReadFile(ownImage)
	if err != nil {
		t.Fatal(err)
	}
	foreign, plain := filepath.Join(dir, "foreign"), filepath.Join(dir, "plain")
	if err := os.WriteFile(plain, own, 0o644); err != nil {
		t.Fatal(err)
	}
	own[18] ^= 0xff // e_machine
	if err := os.WriteFile(foreign, own, 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		filepath.Join(dir, "missing"): "no such file",
		dir:                           "is no program",
		script:                        "no program for Linux",
		foreign:                       "for this architecture",
		plain:                         "chmod +x",
		"/bin/true":                   "is no pgha",
		"/bin/false":                  "no pgha that works here",
	} {
		if _, _, err := Inspect(t.Context(), path); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", path, err, want)
		}
	}
}

func TestBeginImage(t *testing.T) {
	old := trial{ID: "one", Version: "v9.9.9", From: Version, Installed: "/x/pgha", PID: os.Getpid(), Started: time.Now().UTC()}
	gone := old
	gone.PID++
	installed := old
	installed.Version = Version
	failed := old
	failed.Failed = "before"
	for _, c := range []struct {
		name    string
		file    *trial
		env     string
		trial   bool
		failed  string // why
		news    bool
		removed bool
	}{
		{name: "none"},
		{name: "this image", file: &old, env: `{"installed":"/x/pgha","trial":"one"}`, trial: true},
		{name: "started by a service manager", file: &old, failed: "it ended before", news: true},
		{name: "another process", file: &gone, env: `{"installed":"/x/pgha","trial":"one"}`, failed: "it ended before", news: true},
		{name: "gave way", file: &old, env: `{"installed":"/x/pgha","why":"no etcd"}`, failed: "no etcd", news: true},
		{name: "failed earlier", file: &failed, failed: "before"},
		{name: "was installed", file: &installed, removed: true},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := Paths{Lib: t.TempDir()}
			if c.file != nil {
				if err := fsx.WriteJSON(p.trial(), c.file, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if c.env != "" {
				t.Setenv(imageEnv, c.env)
			}
			im, err := BeginImage(p, discardLog())
			if err != nil {
				t.Fatal(err)
			}
			if im.guard != nil {
				im.guard.Stop()
			}
			if _, left := os.LookupEnv(imageEnv); left {
				t.Error("the next process would inherit what was handed over")
			}
			why := ""
			if im.failed != nil {
				why = im.failed.Failed
			}
			if (im.onTrial() != nil) != c.trial || !strings.HasPrefix(why, c.failed) || (why == "") != (c.failed == "") || im.news != c.news {
				t.Errorf("trial %v, failed %q, news %t", im.onTrial(), why, im.news)
			}
			if c.file == nil {
				return
			}
			var after trial
			err = fsx.ReadJSON(p.trial(), &after)
			if c.removed != errors.Is(err, fs.ErrNotExist) || !c.removed && (err != nil || after.Failed != why) {
				t.Errorf("on disk: %+v, %v", after, err)
			}
		})
	}
}

func TestEndedTrialGivesWay(t *testing.T) {
	end := errors.New("etcd met a fatal error")
	begin := func() *Image {
		im := &Image{handed: handed{Installed: "/x/pgha"}, trial: &trial{ID: "one"}, guard: time.NewTimer(time.Hour)}
		t.Cleanup(func() { im.guard.Stop() })
		return im
	}
	var next *Reexec
	if err := begin().Ended(t.Context(), end); !errors.As(err, &next) || next.Path != "/x/pgha" || next.hand.Why != end.Error() {
		t.Errorf("a trial that ended by itself: %v", err)
	}
	im := begin()
	im.confirm()
	if err := im.Ended(t.Context(), end); !errors.Is(err, end) {
		t.Errorf("a version that has proved itself: %v", err)
	}
	if err := (&Image{}).Ended(t.Context(), end); !errors.Is(err, end) {
		t.Errorf("no trial: %v", err)
	}
}
