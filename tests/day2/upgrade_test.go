package day2

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/tests/undertest"
)

// installedPgha is where each host of TestUpgrade has a pgha of its own, which an
// upgrade replaces.
const installedPgha = "/run/bin/pgha"

// upgrading is a cluster whose hosts have their own programs.
type upgrading struct {
	*rig
	dir  string // of the programs, by version
	held []*heldSession
}

// TestUpgrade runs other versions of pgha on the nodes, good ones and bad ones.
// PostgreSQL, Patroni, HAProxy and all sessions go on, and so does the process of
// each daemon.
func TestUpgrade(t *testing.T) {
	u := &upgrading{rig: &rig{Bed: undertest.Bed(t, installedPgha)}, dir: t.TempDir()}
	// Programs are run by what is no child of this test's directories' owner alone.
	if err := os.Chmod(u.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	const pgha, crash = "pgha/cmd/pgha", "./testdata/crash"
	u.build(t, "v1.0.0", pgha, "-X pgha/node.Version=v1.0.0")
	u.build(t, "v1.1.0", pgha, "-X pgha/node.Version=v1.1.0")
	// An etcd that is older than the cluster's data: it never takes part.
	u.build(t, "v1.0.2", pgha, "-X pgha/node.Version=v1.0.2 -X go.etcd.io/etcd/api/v3/version.Version=3.4.0")
	u.build(t, "v1.0.1", crash, "-X main.version=v1.0.1")
	u.build(t, "v0.9.0", crash, "-X main.version=v0.9.0")
	u.begin(t)

	u.step(t, "restart in place", u.restartInPlace)
	u.step(t, "a version that crashes", u.crashes)
	u.step(t, "a version that never becomes healthy", u.neverHealthy)
	u.step(t, "interrupted and repeated", u.interrupted)
	u.step(t, "and back", u.back)
}

// build makes a program called by its version.
func (u *upgrading) build(t *testing.T, version, pkg, vars string) {
	t.Helper()
	cmd := exec.CommandContext(within(t, 2*wait), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w "+vars, "-o", u.program(version), pkg)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build %s: %v: %s", version, err, out)
	}
}

func (u *upgrading) program(version string) string { return filepath.Join(u.dir, version) }

// begin makes the cluster of version v1.0.0, and sessions that stay.
func (u *upgrading) begin(t *testing.T) {
	ctx := within(t, 3*wait)
	if err := u.AddHosts(ctx, "n1", "n2", "witness"); err != nil {
		t.Fatal(err)
	}
	for _, h := range []string{"n1", "n2", "witness"} {
		if _, err := u.Host(h).Run(ctx, "install", "-D", u.program("v1.0.0"), installedPgha); err != nil {
			t.Fatal(err)
		}
	}
	r, err := u.Init(ctx, "n1")
	if err == nil {
		_, err = u.Join(ctx, "n2", r.Data.Token)
	}
	if err == nil {
		_, err = u.Join(ctx, "witness", r.Witness.Token, "--witness")
	}
	if err == nil {
		err = u.CreateApp(ctx, "n1")
	}
	if err != nil {
		t.Fatal(err)
	}
	u.healthy(t)
	for _, h := range []string{"n1", "n2"} {
		for _, port := range []uint16{5432, 5433, 5442} {
			u.hold(t, h, port)
		}
	}
}

// heldSession is a session that is opened once and has to live on.
type heldSession struct {
	name    string
	conn    *pgx.Conn
	backend uint32
}

// hold opens a session from the other data node, since PostgreSQL's own port is
// for members alone.
func (u *upgrading) hold(t *testing.T, host string, port uint16) {
	t.Helper()
	pool, err := u.CA(t.Context(), host)
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := testbed.AppConfig(u.Host(other(host)), pool, u.Addr(host), port)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnectTimeout = time.Minute
	conn, err := pgx.ConnectConfig(within(t, wait), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = conn.Close(context.Background()) })
	u.held = append(u.held, &heldSession{fmt.Sprintf("%s:%d", host, port), conn, conn.PgConn().PID()})
}

// stillHeld asks something on every session.
func (u *upgrading) stillHeld(t *testing.T) {
	t.Helper()
	for _, s := range u.held {
		var backend uint32
		if err := s.conn.QueryRow(within(t, wait), "SELECT pg_backend_pid()").Scan(&backend); err != nil || backend != s.backend {
			t.Errorf("a session through %s, opened before, is of process %d, was of %d: %v", s.name, backend, s.backend, err)
		}
	}
}

// processes is what must not change on a host.
type hostProcesses struct {
	Daemon, Postmaster int
	Children           map[string]int
}

// processes asks every node what runs there.
func (u *upgrading) processes(t *testing.T) map[string]hostProcesses {
	t.Helper()
	out := map[string]hostProcesses{}
	for _, h := range []string{"n1", "n2", "witness"} {
		r := u.report(t, h)
		p := hostProcesses{Daemon: r.PID, Postmaster: r.Postgres.Postmaster, Children: map[string]int{}}
		for _, c := range r.Children {
			p.Children[c.Name] = c.PID
		}
		out[h] = p
	}
	return out
}

func (u *upgrading) report(t *testing.T, host string) node.Report {
	t.Helper()
	// The daemon's socket, as seen from outside of the host.
	local := node.NewLocal(node.Paths{Run: u.Host(host).Path("/run/pgha")})
	var r node.Report
	err := testbed.Until(within(t, wait), "an answer of "+host, func() (err error) {
		r, err = local.Report(within(t, wait))
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// unchanged checks that everything runs on, but for daemons that were named.
func (u *upgrading) unchanged(t *testing.T, before map[string]hostProcesses, daemons ...string) {
	t.Helper()
	now := u.processes(t)
	for _, h := range daemons {
		p := now[h]
		p.Daemon = before[h].Daemon
		now[h] = p
	}
	if d := cmp.Diff(before, now); d != "" {
		t.Errorf("processes (-before +now):\n%s", d)
	}
	u.stillHeld(t)
}

// versions says what each node runs.
func versions(s node.Status) map[string]string {
	out := map[string]string{}
	for _, m := range s.Members {
		out[m.Name] = m.Version
	}
	return out
}

func (u *upgrading) run(t *testing.T, host string, want map[string]string) {
	t.Helper()
	u.await(t, host, fmt.Sprintf("the versions %v", want), func(s node.Status) bool { return cmp.Equal(want, versions(s)) })
}

func all(version string) map[string]string {
	return map[string]string{"n1": version, "n2": version, "witness": version}
}

// refuses runs a command that must fail and say each of the words.
func (u *upgrading) refuses(t *testing.T, host string, args []string, words ...string) {
	t.Helper()
	u.refusedBy(t, host, installedPgha, args, words...)
}

// restartInPlace: each daemon runs its own program again, in its process.
func (u *upgrading) restartInPlace(t *testing.T, w *testbed.Writer) {
	before := u.processes(t)
	for _, h := range []string{"n1", "n2", "witness"} {
		started := u.report(t, h).Started
		u.do(t, h, "upgrade", "--restart")
		if now := u.report(t, h); !now.Started.After(started) {
			t.Errorf("%s has not started anew: it runs since %s", h, now.Started)
		}
		u.healthy(t)
		u.unchanged(t, before)
	}
	u.unharmed(t, w)
}

// crashes: a service manager starts the installed version again, which says what
// has happened. The test is the service manager.
func (u *upgrading) crashes(t *testing.T, w *testbed.Writer) {
	before := u.processes(t)
	restarted := make(chan error, 1)
	ctx := within(t, 2*wait)
	go func() {
		restarted <- func() error {
			if _, err := u.WaitStatus(ctx, "n2", "the witness to crash", func(s node.Status) bool {
				return slices.ContainsFunc(s.Members, func(m node.MemberStatus) bool { return m.Name == "witness" && !m.Reachable })
			}); err != nil {
				return err
			}
			return u.Run(ctx, "witness")
		}()
	}()
	u.refuses(t, "n2", []string{"upgrade", "--yes", "--binary", u.program("v1.0.1")}, "witness runs v1.0.0 again", "v1.0.1 has failed", "it ended before")
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	u.healthy(t)
	u.run(t, "n1", all("v1.0.0"))
	u.unchanged(t, before, "witness")
	u.unharmed(t, w)
}

// neverHealthy: it gives way to the version before by itself. Whoever has started
// the upgrade is gone by then; meanwhile other wishes are refused for what they are.
func (u *upgrading) neverHealthy(t *testing.T, w *testbed.Writer) {
	before := u.processes(t)
	u.cutShort(t, "n1", "v1.0.2", "--binary", u.program("v1.0.2"))
	u.refusals(t)
	u.await(t, "n1", "the witness to go back", func(s node.Status) bool { return cmp.Equal(versions(s), all("v1.0.0")) })
	r := u.report(t, "witness")
	if r.Upgrade == nil || r.Upgrade.Version != "v1.0.2" || !strings.Contains(r.Upgrade.Failed, "etcd") {
		t.Errorf("the witness says of its upgrade: %+v", r.Upgrade)
	}
	u.healthy(t)
	u.unchanged(t, before)
	u.unharmed(t, w)
	err := testbed.Until(within(t, wait), "the events to tell", func() error {
		if out := u.do(t, "n2", "events"); !strings.Contains(out, "the upgrade to v1.0.2 has failed, v1.0.0 runs again") {
			return errors.New(out)
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
}

func (u *upgrading) refusals(t *testing.T) {
	t.Helper()
	foreign, plain := u.program("foreign"), u.program("plain")
	data, err := os.ReadFile(u.program("v1.1.0"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(plain, data, 0o644); err != nil {
		t.Fatal(err)
	}
	data[18] ^= 0xff // the machine in the header
	if err := os.WriteFile(foreign, data, 0o755); err != nil {
		t.Fatal(err)
	}
	next := u.program("v1.1.0")
	for _, c := range []struct {
		host  string
		args  []string
		words []string
	}{
		{"n1", []string{"--binary", u.program("missing")}, []string{"no such file"}},
		{"n1", []string{"--binary", foreign}, []string{"for this architecture"}},
		{"n1", []string{"--binary", plain}, []string{"chmod +x"}},
		{"n1", []string{"--binary", "/bin/true"}, []string{"is no pgha"}},
		{"n1", []string{"--binary", u.program("v0.9.0")}, []string{"v0.9.0 is older than v1.0.0"}},
		{"n1", []string{"--binary", next, "--node", "n9"}, []string{`no node "n9"`, "n1, n2, witness"}},
		{"witness", []string{"--binary", next}, []string{"n1 or n2"}},
		{"n1", []string{"--restart", "--node", "n2"}, []string{"--restart"}},
	} {
		u.refuses(t, c.host, append([]string{"upgrade", "--yes"}, c.args...), c.words...)
	}
}

// cutShort begins an upgrade and kills the command when the witness runs the
// version. The lock of an operation before may be left for a while.
func (u *upgrading) cutShort(t *testing.T, host, version string, args ...string) {
	t.Helper()
	err := testbed.Until(within(t, wait), version+" on the witness", func() error {
		var out bytes.Buffer
		cmd := u.Host(host).Command(within(t, wait), installedPgha, append([]string{"upgrade", "--yes"}, args...)...)
		cmd.Stderr = &out
		if err := cmd.Start(); err != nil {
			return testbed.Stop(err)
		}
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		for {
			select {
			case err := <-ended:
				return fmt.Errorf("the command has ended: %w: %s", err, out.String())
			case <-time.After(50 * time.Millisecond):
			}
			if u.report(t, "witness").Version == version {
				return errors.Join(u.Host(host).Signal(cmd, syscall.SIGKILL), killed(<-ended))
			}
		}
	})
	if err != nil {
		t.Fatal(err)
	}
}

// killed is nil for the end of a command that was killed.
func killed(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil
	}
	return fmt.Errorf("the command was to be killed: %w", err)
}

// interrupted: the command is killed when the first node has changed. Repeated on
// the replica, it changes the rest, that host's own daemon in the middle.
func (u *upgrading) interrupted(t *testing.T, w *testbed.Writer) {
	before, leader := u.processes(t), u.healthy(t).Leader
	from := other(leader)
	u.cutShort(t, from, "v1.1.0", "--binary", u.program("v1.1.0"))
	s := u.await(t, leader, "the mixture to be told", func(s node.Status) bool {
		return slices.ContainsFunc(s.ToDo, func(d string) bool { return strings.Contains(d, "different versions of pgha run") })
	})
	t.Logf("killed at %v: %v", versions(s), s.ToDo)

	err := testbed.Until(within(t, 2*wait), "the rest of the upgrade", func() error {
		out, err := u.Host(from).Command(within(t, 2*wait), u.program("v1.1.0"), "upgrade", "--yes").CombinedOutput()
		t.Logf("root@%s:~# ./pgha upgrade --yes\n%s", from, out)
		if err != nil && !strings.Contains(string(out), "another operation is under way") { // what is left of the one that was killed
			return testbed.Stop(err)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	u.run(t, "witness", all("v1.1.0"))
	u.healthy(t)
	u.unchanged(t, before)
	u.unharmed(t, w)
	for _, h := range []string{"n1", "n2", "witness"} {
		for path, want := range map[string]string{installedPgha: "v1.1.0", installedPgha + ".previous": "v1.0.0"} {
			if out, err := u.Host(h).Run(within(t, wait), path, "version"); err != nil || !strings.Contains(out, want) {
				t.Errorf("%s on %s is %q, want %s: %v", path, h, out, want, err)
			}
		}
	}
	again, err := u.Host(from).Command(within(t, wait), installedPgha, "upgrade").CombinedOutput()
	if err != nil || !strings.Contains(string(again), "v1.1.0 runs already") {
		t.Errorf("once more: %v: %s", err, again)
	}
}

// back: to the version before, when that is asked for. The command runs on the
// primary, whose own daemon is the last.
func (u *upgrading) back(t *testing.T, w *testbed.Writer) {
	before, leader := u.processes(t), u.healthy(t).Leader
	args := []string{"upgrade", "--yes", "--binary", installedPgha + ".previous"}
	u.refuses(t, leader, args, "--allow-older")
	u.do(t, leader, append(args, "--allow-older")...)
	u.run(t, "witness", all("v1.0.0"))
	u.healthy(t)
	u.unchanged(t, before)
	u.unharmed(t, w)
}
