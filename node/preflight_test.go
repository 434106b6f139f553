package node

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"pgha/cluster"
	"pgha/internal/host"
)

func TestCheckFresh(t *testing.T) {
	state := func(phase Phase, founder bool) func(*testing.T, Paths) {
		return func(t *testing.T, p Paths) {
			s := State{ClusterID: "c0ffee", ClusterName: "shop", Node: "n1", Phase: phase, Founder: founder}
			if err := s.Save(p); err != nil {
				t.Fatal(err)
			}
		}
	}
	file := func(path func(Paths) string) func(*testing.T, Paths) {
		return func(t *testing.T, p Paths) { write(t, path(p), "x") }
	}
	for _, tc := range []struct {
		name   string
		there  func(*testing.T, Paths)
		init   bool // what is asked for
		again  bool
		refuse string // part of the error; "" = none
	}{
		{"a fresh host", func(*testing.T, Paths) {}, true, false, ""},
		{"a node", state(PhaseReady, true), true, false, `already node "n1" of cluster "shop" (c0ffee): see pgha status`},
		{"a node that joins", state(PhaseReady, false), false, false, "already node"},
		{"init again", state(PhasePreparing, true), true, true, ""},
		{"join again", state(PhasePreparing, false), false, true, ""},
		{"join after half an init", state(PhasePreparing, true), false, false, "pgha init was interrupted"},
		{"init after half a join", state(PhasePreparing, false), true, false, "pgha join was interrupted"},
		{"etcd data", file(func(p Paths) string { return p.etcd() + "/member" }), true, false, "etcd data of a node"},
		{"certificates", file(func(p Paths) string { return p.PKI() + "/ca.crt" }), true, false, "certificates of a node"},
		{"configuration", file(Paths.Config), true, false, "move it away first"},
		{"a damaged state", file(Paths.State), true, false, "state.json"},
		{"what a reset has left", file(func(p Paths) string { return p.Aside(time.Now()) + "/pki/ca.crt" }), true, false, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			p := tempPaths(t)
			tc.there(t, p)
			before := files(t, p)
			again, err := CheckFresh(p, tc.init)
			if (again != nil) != tc.again {
				t.Errorf("again is %v", again)
			}
			if (tc.refuse == "") != (err == nil) || err != nil && !strings.Contains(err.Error(), tc.refuse) {
				t.Errorf("error %v, want %q", err, tc.refuse)
			}
			if diff := cmp.Diff(before, files(t, p)); diff != "" {
				t.Errorf("files were changed:\n%s", diff)
			}
		})
	}
}

func TestKeepSettings(t *testing.T) {
	got := string(keepSettings([]byte("# comment\n\n  work_mem = 8MB  # note\nport=5433\nPORT 5434\nSSL on\ninclude_dir 'conf.d'\n"+
		"data_directory='/x'\nshared_preload_libraries = 'pg_stat_statements'\nmy.setting=1"), []byte("listen_addresses = '*'\nmax_connections 50\n")))
	want := "work_mem = 8MB  # note\nshared_preload_libraries = 'pg_stat_statements'\nmy.setting=1\nmax_connections 50\n"
	if got != want {
		t.Errorf("settings are %q, want %q", got, want)
	}
}

func TestAdoptedSettings(t *testing.T) {
	// A version that no distribution has: the directory is the test's own.
	const major = 9876
	root := fmt.Sprintf("/etc/postgresql/%d", major)
	dir := filepath.Join(t.TempDir(), "shop")
	got, err := adoptedSettings(major, dir)
	if err != nil || !strings.HasPrefix(string(got), "# made by pgha") {
		t.Errorf("without Debian's files: %q, %v", got, err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(root); err != nil {
			t.Error(err)
		}
	})
	write(t, root+"/shop/postgresql.conf", "port = 5433\nwork_mem = 8MB\n")
	write(t, root+"/shop/conf.d/a.conf", "max_connections = 50\n")
	write(t, root+"/shop/conf.d/a.txt", "not_a_setting = 1\n")
	got, err = adoptedSettings(major, dir)
	if want := "# taken over by pgha from " + root + "/shop/postgresql.conf\nwork_mem = 8MB\nmax_connections = 50\n"; err != nil || string(got) != want {
		t.Errorf("settings are %q, %v, want %q", got, err, want)
	}
}

func TestCheckAddress(t *testing.T) {
	c := testConfig("n1", cluster.RoleWitness)
	if err := CheckAddress(c); err == nil || !strings.Contains(err.Error(), "10.0.0.1 is not on this host") || !strings.Contains(err.Error(), "--address") {
		t.Errorf("a foreign address: %v", err)
	}
	c.Address = netip.MustParseAddr("127.0.0.1")
	if err := CheckAddress(c); err != nil {
		t.Error(err)
	}
}

func TestCheckPorts(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	port := netip.MustParseAddrPort(l.Addr().String()).Port()
	c := testConfig("n1", cluster.RoleData)
	c.Ports = cluster.Ports{Postgres: port, API: port}
	err = CheckPorts(c)
	want := fmt.Sprintf("port %d (postgres) is taken by node.test (pid %d), port %d (api)", port, os.Getpid(), port)
	if err == nil || !strings.HasPrefix(err.Error(), want) || !strings.Contains(err.Error(), "--port NAME=N") {
		t.Errorf("error %v, want %q", err, want)
	}
	// A witness does not use PostgreSQL's port.
	c.Role = cluster.RoleWitness
	if err := CheckPorts(c); err == nil || strings.Contains(err.Error(), "postgres") {
		t.Errorf("a witness: %v", err)
	}
}

func TestCheckDataDir(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{dir, dir + "/none"} {
		if err := CheckDataDir(path); err != nil {
			t.Error(err)
		}
	}
	write(t, dir+"/PG_VERSION", "15\n")
	err := CheckDataDir(dir)
	if err == nil || !strings.Contains(err.Error(), "is not empty") || !strings.Contains(err.Error(), "--adopt "+dir) {
		t.Errorf("a directory with files: %v", err)
	}
	if err := CheckDataDir(dir + "/PG_VERSION"); err == nil {
		t.Error("a file was taken for a directory")
	}
}

func TestCheckAdoptable(t *testing.T) {
	dir := t.TempDir()
	write(t, dir+"/file", "")
	for _, path := range []string{dir, dir + "/none"} {
		if _, err := CheckAdoptable(path); err == nil || !strings.Contains(err.Error(), "not a PostgreSQL data directory") {
			t.Errorf("%s: %v", path, err)
		}
	}
	if _, err := CheckAdoptable(dir + "/file"); err == nil {
		t.Error("a file was taken for a data directory")
	}
}

func TestChoosePostgres(t *testing.T) {
	newest, err := ChoosePostgres(0)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := ChoosePostgres(newest.Major); err != nil || got != newest {
		t.Errorf("PostgreSQL %d is %+v, %v", newest.Major, got, err)
	}
	if _, err := ChoosePostgres(99); err == nil || !strings.Contains(err.Error(), "install postgresql-99") {
		t.Errorf("PostgreSQL 99: %v", err)
	}
}

func TestChooseAmongPostgres(t *testing.T) {
	found := func(majors ...int) (pgs []host.PG) {
		for _, m := range majors {
			pgs = append(pgs, host.PG{Major: m})
		}
		return pgs
	}
	for _, tc := range []struct {
		name  string
		found []host.PG
		major int // asked for
		want  int
		fails string
	}{
		{"the newest", found(17, 15), 0, 17, ""},
		{"the cluster's", found(17, 15), 15, 15, ""},
		{"the newest that can be run", found(99, 17, 15), 0, 17, ""},
		{"none", nil, 0, 0, "no PostgreSQL is installed"},
		{"none that is new enough", found(13, 12), 0, 0, "PostgreSQL 12 is not supported: install 14 to"},
		{"not the cluster's", found(17), 15, 0, "install postgresql-15"},
		{"one to adopt that is too old", found(17, 13), 13, 0, "PostgreSQL 13 is not supported"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			pg, err := choosePostgres(tc.found, tc.major)
			if pg.Major != tc.want || (err == nil) != (tc.fails == "") || err != nil && !strings.Contains(err.Error(), tc.fails) {
				t.Errorf("PostgreSQL %d, %v", pg.Major, err)
			}
		})
	}
}

func TestCheckDisk(t *testing.T) {
	p := tempPaths(t)
	if err := CheckDisk(p, testConfig("n1", cluster.RoleWitness)); err != nil {
		t.Errorf("a machine that runs tests has no room for a witness: %v", err)
	}
	small := t.TempDir()
	if err := unix.Mount("test", small, "tmpfs", 0, "size=64m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(small, 0); err != nil {
			t.Error(err)
		}
	})
	full := Paths{Lib: small + "/lib/pgha"} // not there yet: the file system counts
	data := testConfig("n1", cluster.RoleData)
	data.Postgres.DataDir = small + "/data"
	for name, f := range map[string]func() error{
		"witness":                func() error { return CheckDisk(full, testConfig("w", cluster.RoleWitness)) },
		"data, directory chosen": func() error { return CheckDisk(p, data) },
	} {
		if err := f(); err == nil || !strings.Contains(err.Error(), "nearly full") || !strings.Contains(err.Error(), "of 64.0 MB") || !strings.Contains(err.Error(), small) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestCheckPatroni(t *testing.T) {
	if err := CheckPatroni(t.Context()); err != nil {
		t.Errorf("the installed Patroni: %v", err)
	}
}

func TestPortListIsWhole(t *testing.T) {
	var ports []uint16
	for _, u := range portList(cluster.DefaultPorts()) {
		ports = append(ports, u.Port)
	}
	slices.Sort(ports)
	if diff := cmp.Diff([]uint16{2379, 2380, 5432, 5433, 5442, 8008, 8404, 8405, 8432}, ports); diff != "" {
		t.Error(diff)
	}
}
