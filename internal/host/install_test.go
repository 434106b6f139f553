package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func nobody(t *testing.T) *syscall.Credential {
	t.Helper()
	u, err := user.Lookup("nobody")
	if err != nil {
		t.Fatal(err)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}
}

func TestMissingPackages(t *testing.T) {
	if got := MissingPackages(RoleWitness); got != nil {
		t.Errorf("a witness misses %v", got)
	}
	// PostgreSQL, Patroni, its etcd client and HAProxy are installed here.
	if got := MissingPackages(RoleData); got != nil {
		t.Errorf("a data node misses %v", got)
	}
}

func TestSpeaksEtcd(t *testing.T) {
	patroni, err := exec.LookPath("patroni")
	if err != nil {
		t.Fatal(err)
	}
	if !speaksEtcd(patroni) {
		t.Error("the installed Patroni does not")
	}
	dir := t.TempDir()
	for name, tc := range map[string]struct {
		content string
		want    bool
	}{
		"without": {"#!/usr/bin/python3 -S\nimport patroni\n", false}, // -S: no site packages, so no etcd
		"gone":    {"#!/no/such/python\n", false},
		"empty":   {"", false},
		"binary":  {"\x7fELF...\n", true},
	} {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(tc.content), 0o755); err != nil {
			t.Fatal(err)
		}
		if got := speaksEtcd(path); got != tc.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

// TestDropIn asks the tool that Debian's postgresql packages ask.
func TestDropIn(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "createcluster.conf")
	dropins := filepath.Join(dir, filepath.Base(filepath.Dir(DropInPath)))
	if err := os.Mkdir(dropins, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte("include_dir '"+dropins+"'\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dropins, filepath.Base(DropInPath)), []byte(dropIn), 0o644); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("pg_conftool", conf, "show", "-bs", "create_main_cluster").CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != "off" {
		t.Errorf("create_main_cluster is %q, %v", out, err)
	}
}

// policy runs the script as Debian's tools do and gives its exit status.
func policy(t *testing.T, path string, args ...string) int {
	t.Helper()
	err := exec.Command(path, args...).Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	if exit != nil {
		return exit.ExitCode()
	}
	return 0
}

func TestPolicyGuard(t *testing.T) {
	path := filepath.Join(t.TempDir(), "policy-rc.d")
	g := policyGuard{path: path}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check := func(when string, ours, others int) {
		t.Helper()
		for _, args := range [][]string{{"postgresql", "start", "15"}, {"--quiet", "haproxy", "restart", ""}, {"patroni@a.service", "start"}, {"etcd.service", "start"}} {
			if got := policy(t, path, args...); got != ours {
				t.Errorf("%s: %v gives %d, want %d", when, args, got, ours)
			}
		}
		if got := policy(t, path, "ssh.service", "start"); got != others {
			t.Errorf("%s: ssh gives %d, want %d", when, got, others)
		}
	}
	gone := func(when, path string) {
		t.Helper()
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s: %s is there", when, path)
		}
	}

	must(g.install())
	check("without one of the host's", 101, 0)
	must(g.restore())
	gone("restored to nothing", path)

	own := []byte("#!/bin/sh\n# the host's own\nexit 104\n")
	must(os.WriteFile(path, own, 0o755))
	must(g.install())
	check("with one of the host's", 101, 104)
	must(g.install()) // a pgha that was killed, and its successor
	check("installed twice", 101, 104)

	// Killed for good: as if the process that is named in the script had ended.
	script, err := os.ReadFile(path)
	must(err)
	ended := exec.Command("true")
	must(ended.Run())
	stale := strings.ReplaceAll(string(script), fmt.Sprintf("/proc/%d ", os.Getpid()), fmt.Sprintf("/proc/%d ", ended.Process.Pid))
	must(os.WriteFile(path, []byte(stale), 0o755))
	check("after the end of pgha", 104, 104)

	must(g.restore())
	restored, err := os.ReadFile(path)
	must(err)
	if d := cmp.Diff(string(own), string(restored)); d != "" {
		t.Errorf("restored (-own +restored):\n%s", d)
	}
	gone("restored", g.saved())
}

// TestInstall puts a stand-in before apt-get that writes down how it was called.
func TestInstall(t *testing.T) {
	dir := t.TempDir()
	apt := `#!/bin/sh
echo "$@" >>$TEST_DIR/calls
echo "$DEBIAN_FRONTEND" >>$TEST_DIR/frontends
$TEST_DIR/policy-rc.d postgresql start
echo "policy $?" >>$TEST_DIR/calls
cat $TEST_DIR/createcluster.d/pgha.conf >>$TEST_DIR/dropin
for i in $(seq 100); do echo "line $i"; done
case "$*" in *"$TEST_FAIL"*) echo "E: cannot $TEST_FAIL" >&2; exit 100;; esac
`
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(apt), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TEST_DIR", dir)
	i := installer{
		dropIn: filepath.Join(dir, "createcluster.d", "pgha.conf"),
		policy: policyGuard{path: filepath.Join(dir, "policy-rc.d")},
	}
	pkgs := []Package{{Name: "postgresql"}, {Name: "haproxy"}}
	read := func(name string) string {
		t.Helper()
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}

	t.Setenv("TEST_FAIL", "nothing")
	var out bytes.Buffer
	if err := i.install(context.Background(), pkgs, &out); err != nil {
		t.Fatal(err)
	}
	const options = "-q -o DPkg::Lock::Timeout=300 -o DPkg::Use-Pty=0 "
	want := options + "update\npolicy 101\n" + options + "install --yes --no-install-recommends " +
		"-o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold -- postgresql haproxy\npolicy 101\n"
	if d := cmp.Diff(want, read("calls")); d != "" {
		t.Errorf("calls (-want +got):\n%s", d)
	}
	if got := read("frontends"); got != "noninteractive\nnoninteractive\n" {
		t.Errorf("DEBIAN_FRONTEND: %q", got)
	}
	if got := read("dropin"); got != dropIn+dropIn {
		t.Errorf("drop-in while installing: %q", got)
	}
	if n := strings.Count(out.String(), "line 100\n"); n != 2 {
		t.Errorf("the output was shown %d times of 2", n)
	}

	// A failed update alone is no failure.
	t.Setenv("TEST_FAIL", "update")
	if err := i.install(context.Background(), pkgs, io.Discard); err != nil {
		t.Errorf("update failed: %v", err)
	}
	t.Setenv("TEST_FAIL", "install")
	err := i.install(context.Background(), pkgs, io.Discard)
	if err == nil {
		t.Fatal("install failed without an error")
	}
	for _, part := range []string{"install postgresql haproxy: apt-get install: exit status 100", "line 100\nE: cannot install"} {
		if !strings.Contains(err.Error(), part) {
			t.Errorf("error does not say %q:\n%v", part, err)
		}
	}
	if strings.Contains(err.Error(), "line 10\n") {
		t.Errorf("error carries all of the output:\n%v", err)
	}
	if _, err := os.Lstat(i.policy.path); err == nil {
		t.Error("policy-rc.d was left behind")
	}

	t.Setenv("PATH", t.TempDir())
	err = i.install(context.Background(), pkgs, io.Discard)
	if err == nil || !strings.Contains(err.Error(), "has no apt-get: install postgresql haproxy yourself") {
		t.Errorf("without apt-get: %v", err)
	}
}

func TestInstallEnds(t *testing.T) {
	dir := t.TempDir()
	started := filepath.Join(dir, "started")
	if err := os.Mkdir(started, 0o755); err != nil {
		t.Fatal(err)
	}
	// It ends in good order when it is asked to, and not before.
	apt := "#!/bin/sh\ntrap 'echo in good order; exit 3' TERM\nrmdir $TEST_STARTED\nwhile :; do sleep 0.05; done\n"
	if err := os.WriteFile(filepath.Join(dir, "apt-get"), []byte(apt), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TEST_STARTED", started)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		for { // until apt-get runs
			if _, err := os.Stat(started); err != nil {
				cancel()
				return
			}
		}
	}()
	i := installer{dropIn: filepath.Join(dir, "d", "pgha.conf"), policy: policyGuard{path: filepath.Join(dir, "policy-rc.d")}}
	err := i.install(ctx, []Package{{Name: "haproxy"}}, io.Discard)
	if !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "in good order") {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Lstat(i.policy.path); err == nil {
		t.Error("policy-rc.d was left behind")
	}
}
