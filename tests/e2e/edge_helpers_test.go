package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
)

// edgeWait bounds one wait, on a machine that is busy with other clusters.
const edgeWait = 4 * time.Minute

// edge is a scenario on a cluster of its own.
type edge struct {
	t   *testing.T
	bed *testbed.Bed
}

type edgeStep struct {
	name string
	run  func(edge)
}

// steps runs the parts of a scenario, each of which stands on the one before.
func (e edge) steps(parts ...edgeStep) {
	e.t.Helper()
	for _, p := range parts {
		if !e.t.Run(p.name, func(t *testing.T) { p.run(edge{t, e.bed}) }) {
			e.t.Fatalf("the rest stands on %q", p.name)
		}
	}
}

func (e edge) must(err error) {
	e.t.Helper()
	if err != nil {
		e.t.Fatal(err)
	}
}

// long is the context of one wait.
func (e edge) long() context.Context { return within(e.t, edgeWait) }

func (e edge) until(what string, f func() error) {
	e.t.Helper()
	e.must(testbed.Until(e.long(), what, f))
}

func (e edge) hosts(names ...string) {
	e.t.Helper()
	e.must(e.bed.AddHosts(e.long(), names...))
}

func (e edge) init(host string, args ...string) testbed.InitResult {
	e.t.Helper()
	r, err := e.bed.Init(e.long(), host, args...)
	e.must(err)
	return r
}

func (e edge) join(host, token string, args ...string) node.Status {
	e.t.Helper()
	s, err := e.bed.Join(e.long(), host, token, args...)
	e.must(err)
	return s
}

func (e edge) healthy(host string) node.Status {
	e.t.Helper()
	s, err := e.bed.WaitHealthy(e.long(), host)
	e.must(err)
	return s
}

func (e edge) status(host, what string, ok func(node.Status) bool) node.Status {
	e.t.Helper()
	s, err := e.bed.WaitStatus(e.long(), host, what, ok)
	e.must(err)
	return s
}

// edgeSaid is what a command wrote and how it ended.
type edgeSaid struct {
	out, err string
	code     int
}

// tell runs pgha on a host, however it ends.
func (e edge) tell(host string, args ...string) edgeSaid {
	e.t.Helper()
	cmd := e.bed.Host(host).Command(e.long(), bin, args...)
	var out, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		e.t.Fatalf("run pgha %v on %s: %v", args, host, err)
	}
	return edgeSaid{out: out.String(), err: stderr.String(), code: cmd.ProcessState.ExitCode()}
}

// done runs pgha on a host and wants it to succeed.
func (e edge) done(host string, args ...string) string {
	e.t.Helper()
	s := e.tell(host, args...)
	if s.code != 0 {
		e.t.Fatalf("pgha %v on %s: exit status %d: %s", args, host, s.code, s.err)
	}
	return s.out
}

// refused runs pgha on a host and wants it to fail with one error that says
// all that is wanted.
func (e edge) refused(host string, want []string, args ...string) {
	e.t.Helper()
	s := e.tell(host, args...)
	if s.code != 1 {
		e.t.Fatalf("pgha %v on %s: exit status %d, want 1: %s %s", args, host, s.code, s.out, s.err)
	}
	if n := strings.Count("\n"+s.err, "\npgha: "); n != 1 {
		e.t.Errorf("pgha %v on %s: %d errors, want one: %s", args, host, n, s.err)
	}
	e.says(s.err, want...)
}

func (e edge) says(got string, want ...string) {
	e.t.Helper()
	for _, w := range want {
		if !strings.Contains(got, w) {
			e.t.Errorf("%q is not said in:\n%s", w, got)
		}
	}
}

// json decodes the one JSON value that a command printed, and nothing else.
func (e edge) json(text string, v any) {
	e.t.Helper()
	d := json.NewDecoder(strings.NewReader(text))
	if err := d.Decode(v); err != nil {
		e.t.Fatalf("this is not JSON: %v: %q", err, text)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		e.t.Fatalf("there is more than one JSON value: %q", text)
	}
}

// sql asks through a host's pgha psql for one value.
func (e edge) sql(host, query string, args ...string) string {
	e.t.Helper()
	all := append([]string{"psql"}, args...)
	return strings.TrimSpace(e.done(host, append(all, "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-c", query)...))
}

// token makes a join token on a host.
func (e edge) token(host string, args ...string) string {
	e.t.Helper()
	var a node.TokenAnswer
	e.json(e.done(host, append([]string{"token", "create", "--json"}, args...)...), &a)
	if a.Token == "" {
		e.t.Fatal("pgha token create printed no token")
	}
	return a.Token
}

// writer starts an application that writes until the test ends.
func (e edge) writer(base int64, hosts ...string) *testbed.Writer {
	e.t.Helper()
	w, err := e.bed.StartWriter(e.t.Context(), base, hosts...)
	e.must(err)
	e.t.Cleanup(func() { w.Stop() })
	e.acked(w)
	return w
}

// acked waits for a commit that was sent from now on.
func (e edge) acked(w *testbed.Writer) {
	e.t.Helper()
	_, err := w.WaitAck(e.long())
	e.must(err)
}

// noneLost ends a writer and checks that every acknowledged commit is there.
func (e edge) noneLost(host string, w *testbed.Writer) []testbed.Write {
	e.t.Helper()
	writes := w.Stop()
	if len(testbed.Acked(writes)) == 0 {
		e.t.Fatal("no write was acknowledged")
	}
	lost, err := e.bed.Lost(e.long(), host, writes)
	e.must(err)
	if len(lost) > 0 {
		e.t.Errorf("%d acknowledged commits are lost: %v", len(lost), lost)
	}
	return writes
}

// noneFailed is noneLost for what no client may notice.
func (e edge) noneFailed(host string, w *testbed.Writer, while string) {
	e.t.Helper()
	for _, f := range testbed.Failed(e.noneLost(host, w)) {
		e.t.Errorf("write %d failed while %s: %v", f.ID, while, f.Err)
	}
}

// edgeMember is a node in a status; a missing one is the zero value.
func edgeMember(s node.Status, name string) node.MemberStatus {
	for _, m := range s.Members {
		if m.Name == name {
			return m
		}
	}
	return node.MemberStatus{}
}

// edgeRoster names the members of a status, in its order.
func edgeRoster(s node.Status) string {
	var out []string
	for _, m := range s.Members {
		out = append(out, m.Name)
	}
	return strings.Join(out, " ")
}

// running lists a host's processes of the programs called names.
func (e edge) running(host string, names ...string) []lab.Proc {
	e.t.Helper()
	procs, err := e.bed.Host(host).Processes()
	e.must(err)
	return slices.DeleteFunc(procs, func(p lab.Proc) bool {
		program := ""
		if len(p.Cmdline) > 0 {
			program = filepath.Base(p.Cmdline[0])
		}
		if slices.ContainsFunc(p.Cmdline, func(arg string) bool { return filepath.Base(arg) == "patroni.yml" }) {
			program = "patroni" // by itself, or in its launcher
		}
		return !slices.Contains(names, strings.TrimSuffix(program, ":"))
	})
}

// daemons are the pgha processes of a host.
func (e edge) daemons(host string) []lab.Proc {
	e.t.Helper()
	procs, err := e.bed.Host(host).Processes()
	e.must(err)
	return slices.DeleteFunc(procs, func(p lab.Proc) bool { return len(p.Cmdline) < 2 || p.Cmdline[0] != bin })
}

// quiet checks that nothing of a node runs on a host.
func (e edge) quiet(host string) {
	e.t.Helper()
	left := append(e.running(host, "postgres", "patroni", "haproxy"), e.daemons(host)...)
	for _, p := range left {
		e.t.Errorf("on %s there still runs %v", host, p.Cmdline)
	}
}

// waitRunning waits for a program, with an argument that begins so, that may
// not run for long.
func (e edge) waitRunning(host, name, arg string) {
	e.t.Helper()
	for ctx := e.long(); ctx.Err() == nil; {
		for _, p := range e.running(host, name) {
			if slices.ContainsFunc(p.Cmdline, func(a string) bool { return strings.HasPrefix(a, arg) }) {
				return
			}
		}
	}
	e.t.Fatalf("%s was not seen to run on %s", name, host)
}

const edgeDataDir = "/var/lib/pgha/postgres/15/data"

// postmaster is the process number of a host's PostgreSQL.
func (e edge) postmaster(host string) string {
	e.t.Helper()
	data, err := os.ReadFile(e.bed.Host(host).Path(edgeDataDir + "/postmaster.pid"))
	e.must(err)
	pid, _, _ := strings.Cut(string(data), "\n")
	return pid
}

// files lists the paths of a host that match a pattern.
func (e edge) files(host, pattern string) []string {
	e.t.Helper()
	found, err := filepath.Glob(e.bed.Host(host).Path(pattern))
	e.must(err)
	return found
}

// tables lists a host's nftables tables.
func (e edge) tables(host string) string {
	e.t.Helper()
	out, err := e.bed.Host(host).Run(e.long(), "nft", "list", "tables")
	e.must(err)
	return out
}

// joinArgs is what an operator types to join in the foreground.
func (e edge) joinArgs(host, token string, more ...string) []string {
	args := []string{"join", "--no-service", "--yes", "--json", "--memory", testbed.Memory, "--name", host, "--address", e.bed.Addr(host)}
	return append(append(args, more...), token)
}

// ended waits for the end of a host's daemon.
func (e edge) ended(host string) {
	e.t.Helper()
	e.until("the end of pgha on "+host, func() error {
		if p := e.daemons(host); len(p) > 0 {
			return fmt.Errorf("it runs as %v", p[0].Cmdline)
		}
		return nil
	})
}
