package day2

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"pgha/lab/testbed"
	"pgha/node"
)

// recovery is a cluster with the nodes of the last steps.
type recovery struct {
	*rig
	lost, left string // the primary that is lost, and the node that goes on
}

// TestRecovery carries out the runbooks of what nobody hopes for: a VM put back
// from a snapshot, a wiped disk, a power cut after which one node comes back, and
// the loss of a majority, whose nodes then turn up again.
func TestRecovery(t *testing.T) {
	r := &recovery{rig: three(t)}
	t.Run("snapshots", r.snapshotsAreKept)
	r.step(t, "a VM is put back from a snapshot", r.vmIsPutBack)
	r.step(t, "a disk is wiped", r.diskIsWiped)
	steps := []struct {
		name string
		run  func(*testing.T)
	}{
		{"one node after a power cut", r.oneNodeAfterPowerCut},
		{"recover quorum", r.quorumIsRecovered},
		{"the lost come back", r.lostComeBack},
		{"the lost join again", r.lostJoinAgain},
		{"a snapshot is restored", r.snapshotIsRestored},
	}
	for _, s := range steps {
		if !t.Run(s.name, s.run) {
			return // what follows stands on it
		}
	}
}

// snapshotsAreKept: docs/runbooks/snapshots.md.
func (r *recovery) snapshotsAreKept(t *testing.T) {
	for _, host := range []string{"n1", "n2", "witness"} {
		r.until(t, "a daily snapshot on "+host, func() error {
			for _, s := range r.snapshots(t, host) {
				if s.Reason == "daily" && s.Damaged == "" && s.Node == host && s.Revision > 0 && s.Generation == 1 {
					return nil
				}
			}
			return errors.New("there is none")
		})
	}
	r.do(t, "n1", "snapshot", "save", "/var/lib/pgha/mine.snap")
	r.refused(t, "n1", []string{"snapshot", "save", "/var/lib/pgha/mine.snap"}, "is there already")
	r.refused(t, "n1", []string{"snapshot", "restore", "--yes", "/var/lib/pgha/mine.snap"}, "n2 answers on", "witness answers on")
	r.refused(t, "n1", []string{"recover", "quorum", "--yes"}, "there is nothing to recover")
	r.refused(t, "witness", []string{"recover", "quorum", "--yes"}, "this is a witness", "n1, n2")
	path := r.Host("n1").Path("/var/lib/pgha/mine.snap")
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	r.refused(t, "n1", []string{"snapshot", "restore", "--yes", "/var/lib/pgha/mine.snap"}, "damaged snapshot")
}

// vmIsPutBack: docs/runbooks/restored-vm.md, with the worst of disks: one of a
// primary that was replaced since.
func (r *recovery) vmIsPutBack(t *testing.T, w *testbed.Writer) {
	old := r.await(t, "n2", "a primary", func(s node.Status) bool { return s.Leader != "" }).Leader
	survivor := other(old)
	r.off(t, old)
	disk := r.copyDisk(t, old)
	r.await(t, survivor, "the new primary", func(s node.Status) bool { return s.Leader == survivor })
	r.on(t, old)
	r.healthy(t)
	r.until(t, survivor+" has seen "+old+" since", func() error { return r.seenSince(survivor, old) })
	r.off(t, old)
	r.putDiskBack(t, old, disk)
	r.on(t, old)
	said := func() {
		t.Helper()
		s := r.await(t, old, "refusal to serve", func(s node.Status) bool {
			return strings.HasPrefix(s.Verdict, "this node's disk is older than what") && strings.Contains(strings.Join(s.ToDo, " "), "pgha reset --force")
		})
		if s.Health != node.Unknown {
			t.Errorf("health %s: %s", s.Health, s.Verdict)
		}
	}
	said()
	r.goesOn(t, w)
	r.noPostgres(t, old)
	// It stays so when there is nobody left to ask.
	r.off(t, old)
	if err := r.Host(survivor).LinkDown(); err != nil {
		t.Fatal(err)
	}
	r.on(t, old)
	said()
	if err := r.Host(survivor).LinkUp(); err != nil {
		t.Fatal(err)
	}
	r.goesOn(t, w)
	r.do(t, old, "reset", "--force", "--yes")
	r.joinAnew(t, old, survivor)
}

// diskIsWiped: docs/runbooks/wiped-disk.md.
func (r *recovery) diskIsWiped(t *testing.T, w *testbed.Writer) {
	leader := r.healthy(t).Leader
	gone := other(leader)
	r.off(t, gone)
	for _, dir := range []string{"lib", "etc"} {
		all, err := filepath.Glob(filepath.Join(r.Host(gone).Dir(), dir, "*"))
		if err != nil || len(all) == 0 {
			t.Fatalf("there is no disk to wipe: %v", err)
		}
		for _, path := range all {
			if err := os.RemoveAll(path); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := r.Host(gone).PowerOn(within(t, wait)); err != nil {
		t.Fatal(err)
	}
	r.refused(t, gone, []string{"recover", "quorum", "--yes"}, "not a node")
	r.goesOn(t, w)
	r.joinAnew(t, gone, leader)
}

// oneNodeAfterPowerCut: docs/runbooks/one-node-after-power-cut.md.
func (r *recovery) oneNodeAfterPowerCut(t *testing.T) {
	s := r.healthy(t)
	w, err := r.StartWriter(t.Context(), r.base(), "n1", "n2")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Stop() })
	r.goesOn(t, w)
	r.lost, r.left = s.Leader, other(s.Leader)
	for _, host := range []string{r.lost, "witness", r.left} {
		r.off(t, host)
	}
	r.writes = append(r.writes, w.Stop()...)
	r.on(t, r.left)
	s = r.await(t, r.left, "what it waits for", func(s node.Status) bool {
		return s.Health != node.Healthy && strings.Contains(strings.Join(s.ToDo, "; "), "pgha recover quorum")
	})
	todo := strings.Join(s.ToDo, "; ")
	for _, word := range []string{"start ", r.lost, "witness", "synchronous standby of " + r.lost, "lost for good"} {
		if !strings.Contains(todo, word) {
			t.Errorf("%q is not said: %s", word, todo)
		}
	}
	if s.Health != node.NoLeader && s.Health != node.Unknown {
		t.Errorf("health is %s: %s", s.Health, s.Verdict)
	}
	if s.Leader != "" {
		t.Errorf("%s leads without a quorum", s.Leader)
	}
	r.noPostgres(t, r.left)
}

// quorumIsRecovered: docs/runbooks/lost-majority.md.
func (r *recovery) quorumIsRecovered(t *testing.T) {
	r.refused(t, r.left, []string{"recover", "quorum"}, "--yes")
	// A member that is alive must be used.
	r.on(t, "witness")
	r.until(t, "the witness to answer", func() error {
		_, err := r.Status(within(t, wait), "witness")
		return err
	})
	out, err := r.Pgha(within(t, wait), r.left, "recover", "quorum", "--yes")
	if err == nil {
		t.Fatalf("a majority is up, and the quorum was recovered: %s", out)
	}
	r.off(t, "witness")
	out = r.do(t, r.left, "recover", "quorum", "--yes", "--json")
	var result struct {
		Result node.RecoverResult `json:"result"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got := result.Result
	if got.Generation != 2 || len(got.Lost) != 2 || got.Leader != r.left || got.Snapshot == "" || got.OldEtcd == "" {
		t.Errorf("recovered as %+v", got)
	}
	r.await(t, r.left, "a primary that is alone", func(s node.Status) bool { return s.Leader == r.left && len(s.Members) == 1 })
	r.takesWrites(t)
	if out := r.do(t, r.left, "events"); !strings.Contains(out, "generation 2 was begun on "+r.left) {
		t.Errorf("there is no event of it: %s", out)
	}
}

// lostComeBack: the old majority comes up where it cannot reach the new
// generation, which nobody can prevent, and gives way as soon as it can.
func (r *recovery) lostComeBack(t *testing.T) {
	if err := r.Host(r.left).LinkDown(); err != nil {
		t.Fatal(err)
	}
	r.on(t, r.lost)
	r.on(t, "witness")
	r.await(t, r.lost, "the old primary to serve", func(s node.Status) bool { return s.Leader == r.lost })
	if err := r.Host(r.left).LinkUp(); err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{r.lost, "witness"} {
		s := r.await(t, host, "the news of generation 2", func(s node.Status) bool {
			return strings.HasPrefix(s.Verdict, "this node belongs to generation 1 of cluster")
		})
		if !strings.Contains(s.Verdict, r.left+" has replaced by generation 2 at") || s.Health != node.Unknown || !strings.Contains(strings.Join(s.ToDo, " "), "pgha reset") {
			t.Errorf("%s says %s: %s %q", host, s.Health, s.Verdict, s.ToDo)
		}
	}
	r.noPostgres(t, r.lost)
	r.await(t, r.left, "the new primary", func(s node.Status) bool { return s.Leader == r.left })
	// It stays so after a restart, also where the new generation is silent.
	r.off(t, r.lost)
	if err := r.Host(r.left).LinkDown(); err != nil {
		t.Fatal(err)
	}
	r.on(t, r.lost)
	r.await(t, r.lost, "what it knew before", func(s node.Status) bool {
		return strings.HasPrefix(s.Verdict, "this node belongs to generation 1 of cluster")
	})
	r.noPostgres(t, r.lost)
	if err := r.Host(r.left).LinkUp(); err != nil {
		t.Fatal(err)
	}
}

func (r *recovery) lostJoinAgain(t *testing.T) {
	for _, host := range []string{r.lost, "witness"} {
		r.do(t, host, "reset", "--yes")
	}
	if _, err := r.Join(within(t, 2*wait), r.lost, r.token(t, r.left)); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Join(within(t, 2*wait), "witness", r.token(t, r.left, "--witness"), "--witness"); err != nil {
		t.Fatal(err)
	}
	r.healthy(t)
	r.nothingLostOn(t, r.left)
}

// snapshotIsRestored: docs/runbooks/snapshots.md, its second half.
func (r *recovery) snapshotIsRestored(t *testing.T) {
	r.do(t, r.left, "snapshot", "save", "/var/lib/pgha/two.snap")
	leader := r.healthy(t).Leader
	if leader != r.left {
		t.Fatalf("%s leads, not %s", leader, r.left)
	}
	r.off(t, r.lost)
	r.off(t, "witness")
	out := r.do(t, r.left, "snapshot", "restore", "--yes", "--json", "/var/lib/pgha/two.snap")
	var result struct {
		Result node.RecoverResult `json:"result"`
	}
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if result.Result.Generation != 3 || result.Result.Leader != r.left {
		t.Errorf("restored as %+v", result.Result)
	}
	r.takesWrites(t)
}

// takesWrites: the node that is left takes commits, and has all that ever were.
func (r *recovery) takesWrites(t *testing.T) {
	t.Helper()
	w, err := r.StartWriter(t.Context(), r.base(), r.left)
	if err != nil {
		t.Fatal(err)
	}
	r.goesOn(t, w)
	r.writes = append(r.writes, w.Stop()...)
	r.nothingLostOn(t, r.left)
}

func (r *recovery) base() int64 {
	r.nextID += 1 << 32
	return r.nextID
}

func (r *recovery) off(t *testing.T, host string) {
	t.Helper()
	if err := r.PowerOff(host); err != nil {
		t.Fatal(err)
	}
}

func (r *recovery) on(t *testing.T, host string) {
	t.Helper()
	if err := r.PowerOn(within(t, wait), host); err != nil {
		t.Fatal(err)
	}
}

func (r *recovery) until(t *testing.T, what string, f func() error) {
	t.Helper()
	if err := testbed.Until(within(t, wait), what, f); err != nil {
		t.Fatal(err)
	}
}

func (r *recovery) snapshots(t *testing.T, host string) []node.SnapshotInfo {
	t.Helper()
	var all []node.SnapshotInfo
	if err := json.Unmarshal([]byte(r.do(t, host, "snapshot", "list", "--json")), &all); err != nil {
		t.Fatal(err)
	}
	return all
}

func (r *recovery) token(t *testing.T, host string, args ...string) string {
	t.Helper()
	return r.answer(t, host, append([]string{"token", "create", "--json"}, args...)...)
}

// answer runs a command that prints a token.
func (r *recovery) answer(t *testing.T, host string, args ...string) string {
	t.Helper()
	var a node.TokenAnswer
	if err := json.Unmarshal([]byte(r.do(t, host, args...)), &a); err != nil {
		t.Fatal(err)
	}
	return a.Token
}

// joinAnew takes a host whose data is gone into the cluster under its old name.
// The join says what has to be done first.
func (r *recovery) joinAnew(t *testing.T, host, helper string) {
	t.Helper()
	join := []string{"join", "--no-service", "--yes", "--memory", testbed.Memory, "--name", host, "--address", r.Addr(host), r.token(t, helper)}
	r.refused(t, host, join, "pgha member replace "+host)
	token := r.answer(t, helper, "member", "replace", "--json", host)
	if _, err := r.Join(within(t, 2*wait), host, token); err != nil {
		t.Fatal(err)
	}
}

// noPostgres waits until no PostgreSQL runs on a host.
func (r *recovery) noPostgres(t *testing.T, host string) {
	t.Helper()
	r.until(t, "the end of PostgreSQL on "+host, func() error {
		procs, err := r.Host(host).Processes()
		if err != nil {
			return err
		}
		for _, p := range procs {
			if len(p.Cmdline) > 0 && filepath.Base(p.Cmdline[0]) == "postgres" {
				return fmt.Errorf("%v runs", p.Cmdline)
			}
		}
		return nil
	})
}

// copyDisk takes a snapshot of a VM that is off.
func (r *recovery) copyDisk(t *testing.T, host string) string {
	t.Helper()
	to := t.TempDir()
	if out, err := exec.Command("cp", "-a", r.Host(host).Dir()+"/.", to).CombinedOutput(); err != nil {
		t.Fatalf("copy disk: %v: %s", err, out)
	}
	return to
}

func (r *recovery) putDiskBack(t *testing.T, host, from string) {
	t.Helper()
	for _, dir := range []string{"etc", "lib"} {
		at := filepath.Join(r.Host(host).Dir(), dir)
		if err := os.RemoveAll(at); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("cp", "-a", filepath.Join(from, dir), at).CombinedOutput(); err != nil {
			t.Fatalf("put disk back: %v: %s", err, out)
		}
	}
}

// seenSince says whether a node has heard of another one since that one's last
// start.
func (r *recovery) seenSince(by, of string) error {
	var seen struct {
		Seen map[string]struct {
			Run  string `json:"run"`
			Beat uint64 `json:"beat"`
		} `json:"seen"`
	}
	var own struct {
		Runs []struct {
			Run string `json:"run"`
		} `json:"runs"`
	}
	for host, v := range map[string]any{by: &seen, of: &own} {
		data, err := os.ReadFile(r.Host(host).Path("/var/lib/pgha/marks.json"))
		if err != nil {
			return err
		}
		if err := json.Unmarshal(data, v); err != nil {
			return err
		}
	}
	if len(own.Runs) == 0 || seen.Seen[of].Run != own.Runs[len(own.Runs)-1].Run || seen.Seen[of].Beat == 0 {
		return fmt.Errorf("%s has seen %+v of %s, which is at %+v", by, seen.Seen[of], of, own.Runs)
	}
	return nil
}

// nothingLostOn is nothingLost, asked on a host.
func (r *recovery) nothingLostOn(t *testing.T, host string) {
	t.Helper()
	lost, err := r.Lost(within(t, wait), host, r.writes)
	if err != nil {
		t.Fatal(err)
	}
	if len(lost) > 0 {
		t.Errorf("%d of %d acknowledged commits are lost, the first is %d", len(lost), len(testbed.Acked(r.writes)), lost[0])
	}
}
