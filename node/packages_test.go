package node

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestReplacedOnDisk replaces the program of a real process, as dpkg does.
func TestReplacedOnDisk(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	install := func(path string) {
		t.Helper()
		data, err := os.ReadFile("/bin/sleep")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path+".new", data, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
	}
	install(program)
	cmd := exec.Command(program, "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = cmd.Process.Kill(), cmd.Wait() }()
	script := filepath.Join(dir, "script")
	if err := os.WriteFile(script, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	r := running{part: "a part", pid: cmd.Process.Pid, program: program, script: []string{script, filepath.Join(dir, "none")}, started: time.Now().Add(time.Minute)}
	check := func(what string, r running, want string) {
		t.Helper()
		got, err := replacedOnDisk("/proc", r)
		if err != nil || got != want {
			t.Errorf("%s: %q, %v, want %q", what, got, err, want)
		}
	}
	check("nothing was replaced", r, "")
	later := r
	later.started = time.Now().Add(-time.Hour)
	check("a script", later, "its package was installed after it started")
	install(program)
	check("the program", r, program+" was replaced")
	unnamed := r
	unnamed.program = ""
	check("the program, by the process's own name for it", unnamed, program+" was replaced")
	if err := os.Remove(program); err != nil {
		t.Fatal(err)
	}
	check("a program that was removed", r, "")
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	if why, err := replacedOnDisk("/proc", r); err == nil {
		t.Errorf("a process that has ended: %q, and no error", why)
	}
}

func TestReplacedLibrary(t *testing.T) {
	for text, want := range map[string]string{
		"7f01-7f02 r-xp 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libssl.so.3":              "",
		"7f01-7f02 r-xp 00000000 08:01 11 /usr/lib/x86_64-linux-gnu/libssl.so.3 (deleted)":    "/usr/lib/x86_64-linux-gnu/libssl.so.3",
		"7f01-7f02 r-xp 00000000 08:01 11 /lib/x86_64-linux-gnu/libc.so.6 (deleted)":          "/lib/x86_64-linux-gnu/libc.so.6",
		"7f01-7f02 r--p 00000000 08:01 11 /usr/lib/locale/C.utf8/LC_CTYPE (deleted)":          "", // data is no program
		"7f01-7f02 rw-s 00000000 00:01 11 /dev/zero (deleted)\n7f01-7f02 r-xp 0 00:01 11 x":   "",
		"7f01-7f02 rwxs 00000000 00:01 11 /dev/shm/PostgreSQL.1 (deleted)\n0-1 r-xp 0 0:0 0 ": "",
	} {
		if got := replacedLibrary([]byte(text + "\n")); got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

func TestWaitingRestarts(t *testing.T) {
	parts := func(names ...string) (out []PendingRestart) {
		for _, n := range names {
			out = append(out, PendingRestart{Part: n})
		}
		return out
	}
	got := waitingRestarts([]MemberStatus{
		{Name: "n1", RestartPending: parts(PartPostgres, PartHAProxy)}, {Name: "n2", RestartPending: parts(PartPatroni), SettingsPending: true}, {Name: "w"},
	})
	want := []string{
		"new versions are installed on n1 (postgresql, haproxy) and n2 (patroni), and the old ones run: pgha upgrade postgres",
		"changed settings wait for a restart of PostgreSQL on n2: pgha restart --rolling --pending",
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("what is to do (-want +got):\n%s", d)
	}
	if got := waitingRestarts([]MemberStatus{{Name: "n1"}}); got != nil {
		t.Errorf("nothing is pending, and to do is %v", got)
	}
}

func TestDecideUpgradePostgres(t *testing.T) {
	pg := func(name string, major int, pkg, installed, available string) PackagesReport {
		return PackagesReport{Node: name, Major: major, Packages: []PackageVersion{{Part: PartPostgres, Package: pkg, Installed: installed, Available: available}}}
	}
	for what, tc := range map[string]struct {
		nodes []PackagesReport
		no    bool // --no-download
		why   string
	}{
		"a new minor version": {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "15.14-1", "15.15-1"), pg("n2", 15, "postgresql-15", "15.15-1", "15.15-1")}},
		"apt knows none":      {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "15.14-1", "")}},
		"another major":       {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "15.14-1", "16.1-1")}, why: "pgha upgrades minor versions only"},
		"with an epoch":       {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "15.14-1", "1:17.1-1")}, why: "pgha upgrades minor versions only"},
		"two majors":          {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "15.14-1", ""), pg("n2", 17, "postgresql-17", "17.1-1", "")}, why: "n1 has PostgreSQL 15 and n2 has 17"},
		"on disk already":     {nodes: []PackagesReport{pg("n1", 15, "postgresql-15", "16.0-1", "")}, no: true, why: "its data is of PostgreSQL 15"},
		"no package":          {nodes: []PackagesReport{pg("n1", 15, "", "", "")}, why: "--no-download"},
		"no package, on disk": {nodes: []PackagesReport{pg("n1", 15, "", "", "")}, no: true},
	} {
		wants(t, what, decideUpgradePostgres(tc.nodes, tc.no), tc.why)
	}
}

func TestDecideUpgradeOrder(t *testing.T) {
	o := aPair()
	got, err := decideUpgradeOrder(o)
	if d := cmp.Diff([]string{"n2", "n1"}, got); err != nil || d != "" {
		t.Errorf("order (-want +got): %v\n%s", err, d)
	}
	o.members[1].Reachable = false
	_, err = decideUpgradeOrder(o)
	wants(t, "a node that is away", err, "so that no node is left behind")
	o = aPair()
	o.members[1].streaming = false
	_, err = decideUpgradeOrder(o)
	wants(t, "a replica that lags", err, "does not stream")
}

func TestMajorOfPackage(t *testing.T) {
	for version, want := range map[string]int{"15.14-0+deb12u1": 15, "1:17.2-1": 17, "3.0.2-1": 3, "": 0, "beta": 0} {
		if got := majorOfPackage(version); got != want {
			t.Errorf("major version of %q is %d, want %d", version, got, want)
		}
	}
}
