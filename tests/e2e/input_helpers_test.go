package e2e

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/lab"
	"pgha/lab/testbed"
)

// inputWait bounds one command, on a machine that is busy with other clusters.
const inputWait = 4 * time.Minute

// refusal is bad input and how pgha answers it: with one error, an exit status
// that is not 0, and nothing changed.
type refusal struct {
	name   string
	args   []string
	want   []string                        // all are in the error
	before func(t *testing.T, h *lab.Host) // makes the trouble; its cleanup mends it
	user   string                          // root if empty
}

// refuses checks on host that each is refused. also gives more that must not
// change, such as the cluster's roster.
func refuses(t *testing.T, bed *testbed.Bed, host string, cases []refusal, also func(t *testing.T) any) {
	t.Helper()
	for _, r := range cases {
		t.Run(r.name, func(t *testing.T) {
			h := bed.Host(host)
			if r.before != nil {
				r.before(t, h)
			}
			look := func() any {
				all := []any{inputDisk(t, h)}
				if also != nil {
					all = append(all, also(t))
				}
				return all
			}
			before := look()
			out, said, code := inputRun(t, h, r.user, r.args...)
			if code != 1 {
				t.Errorf("exit status %d, want 1", code)
			}
			if out != "" {
				t.Errorf("it printed %q", out)
			}
			if n := strings.Count("\n"+said, "\npgha: "); n != 1 {
				t.Errorf("%d errors, want one", n)
			}
			for _, w := range r.want {
				if !strings.Contains(said, w) {
					t.Errorf("the error does not say %q", w)
				}
			}
			if t.Failed() {
				t.Logf("pgha %s said:\n%s", strings.Join(r.args, " "), said)
			}
			if diff := cmp.Diff(before, look()); diff != "" {
				t.Errorf("something was changed (-before +after):\n%s", diff)
			}
		})
	}
}

// inputRun runs pgha on a host as a user, however it ends.
func inputRun(t *testing.T, h *lab.Host, user string, args ...string) (out, errs string, code int) {
	t.Helper()
	ctx := within(t, inputWait)
	cmd := h.Command(ctx, bin, args...)
	if user != "" {
		cmd = h.CommandAs(ctx, user, bin, args...)
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) || ctx.Err() != nil {
		t.Fatalf("run pgha %v: %v: %s", args, err, stderr.String())
	}
	return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
}

// changesAnyway tells what changes all the time while a node runs: its data,
// and how far its children's logs have been read.
func changesAnyway(path string) bool {
	return path == "/var/lib/pgha/etcd" || path == "/var/lib/pgha/postgres" || filepath.Ext(path) == ".tail"
}

// gateMoves matches what an owner's gate changes twice a second: the time in its
// guard and its element.
var gateMoves = regexp.MustCompile(`(?m)^\s*(meta time < .*|elements = \{ 5442 .*)$`)

// inputDisk is everything of a host that bad input must leave alone: files with
// their modes and contents, the firewall and the processes.
func inputDisk(t *testing.T, h *lab.Host) map[string]string {
	t.Helper()
	procs, err := h.Processes()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, p := range procs {
		names = append(names, p.Comm)
	}
	program := filepath.Base(bin)
	live := slices.Contains(names, program[:min(len(program), 15)]) // as the kernel cuts it
	all := map[string]string{}
	if !live { // a running node's come and go
		slices.Sort(names)
		all["processes"] = strings.Join(names, " ")
	}
	rules, err := h.Run(within(t, inputWait), "nft", "-s", "list", "ruleset")
	if err != nil {
		t.Fatal(err)
	}
	all["firewall"] = gateMoves.ReplaceAllString(rules, "")
	for _, dir := range []string{"/etc/pgha", "/var/lib/pgha", "/run/pgha"} {
		inputTree(t, h, dir, all, func(path string) bool { return live && changesAnyway(path) })
	}
	return all
}

// inputTree adds the files below dir, but not those below what skip names.
func inputTree(t *testing.T, h *lab.Host, dir string, all map[string]string, skip func(string) bool) {
	t.Helper()
	root := h.Path("/")
	err := filepath.WalkDir(h.Path(dir), func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, strings.TrimSuffix(root, "/"))
		switch {
		case skip(name) && d.IsDir():
			return filepath.SkipDir
		case skip(name):
			return nil
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		all[name] = info.Mode().String()
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			all[name] += fmt.Sprintf(" %x", sha256.Sum256(data))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}

// inputRoster is what the cluster itself keeps in etcd, each key with its last
// revision.
func inputRoster(c *clientv3.Client) func(t *testing.T) any {
	return func(t *testing.T) any {
		t.Helper()
		resp, err := c.Get(within(t, inputWait), cluster.Root, clientv3.WithPrefix())
		if err != nil {
			t.Fatal(err)
		}
		keys := map[string]int64{}
		for _, kv := range resp.Kvs {
			keys[string(kv.Key)] = kv.ModRevision
		}
		return keys
	}
}

// hide puts another file, or an empty one, in the place of a program or a
// directory of the host.
func hide(path, by string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		args := []string{"--bind", by, path}
		if by == "" {
			args = []string{"-t", "tmpfs", "tmpfs", path}
		}
		inputDo(t, h, "mount", args...)
		t.Cleanup(func() { inputDo(t, h, "umount", path) })
	}
}

// inputDo runs a program on the host; it must succeed. It serves cleanups too.
func inputDo(t *testing.T, h *lab.Host, path string, args ...string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), inputWait)
	defer cancel()
	if _, err := h.Run(ctx, path, args...); err != nil {
		t.Errorf("run %s %v: %v", path, args, err)
	}
}

// both does one thing after the other.
func both(steps ...func(*testing.T, *lab.Host)) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		for _, f := range steps {
			f(t, h)
		}
	}
}

// place writes a file on the host; a file that was there returns afterwards.
func place(path, text string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		restoreLater(t, h, path)
		if err := os.MkdirAll(filepath.Dir(h.Path(path)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(h.Path(path), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// change replaces a text in a file of the host.
func change(path, old, with string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		data, err := os.ReadFile(h.Path(path))
		if err != nil || strings.Count(string(data), old) != 1 {
			t.Fatalf("%s does not hold %q once (%v):\n%s", path, old, err, data)
		}
		place(path, strings.Replace(string(data), old, with, 1))(t, h)
	}
}

// away takes a file or directory off the host, for a while.
func away(path string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		restoreLater(t, h, path)
	}
}

// restoreLater moves what is at path aside, if anything. When the test ends it
// removes what has come there instead, and puts back what was there.
func restoreLater(t *testing.T, h *lab.Host, path string) {
	t.Helper()
	aside := "/run/aside-" + filepath.Base(path)
	_, err := os.Lstat(h.Path(path))
	there := err == nil
	undo := []string{path}
	for dir := filepath.Dir(path); dir != "/"; dir = filepath.Dir(dir) {
		if _, err := os.Lstat(h.Path(dir)); errors.Is(err, fs.ErrNotExist) {
			undo = append(undo, dir)
		}
	}
	if there {
		inputDo(t, h, "mv", path, aside)
	}
	t.Cleanup(func() {
		inputDo(t, h, "rm", append([]string{"-rf"}, undo...)...)
		if there {
			inputDo(t, h, "mv", aside, path)
		}
	})
}

// inputServing runs a server on the host until the test ends, and waits until it
// answers at addr.
func inputServing(addr, path string, args ...string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		// It ends in the cleanup, which waits for that; t's context ends before.
		cmd := h.Command(context.WithoutCancel(t.Context()), path, args...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := h.Signal(cmd, syscall.SIGKILL); err != nil {
				t.Error(err)
			}
			_ = cmd.Wait() // it was killed
		})
		err := testbed.Until(within(t, inputWait), path+" to listen", func() error {
			c, err := h.Dial(t.Context(), "tcp", addr)
			if err != nil {
				return err
			}
			return c.Close()
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// alias gives the host another host's address.
func alias(addr string) func(*testing.T, *lab.Host) {
	return func(t *testing.T, h *lab.Host) {
		t.Helper()
		inputDo(t, h, "ip", "addr", "add", addr+"/32", "dev", "lo")
		t.Cleanup(func() { inputDo(t, h, "ip", "addr", "del", addr+"/32", "dev", "lo") })
	}
}

// apiOf is host:port of a host's API.
func apiOf(bed *testbed.Bed, host string) string { return net.JoinHostPort(bed.Addr(host), "8432") }
