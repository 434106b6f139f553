package host

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// enterNewNS moves the test into a fresh network namespace. The test's thread
// is never given back and ends with it.
func enterNewNS(t *testing.T) {
	t.Helper()
	runtime.LockOSThread()
	ns, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = ns.Close() })
}

func TestPortOwner(t *testing.T) {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::1]:0", "[::]:0"} {
		l, err := net.Listen("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		// A connection from and to the port is not what takes it.
		c, err := net.Dial("tcp", l.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		proc, pid, found, err := PortOwner(port)
		if err != nil || !found || pid != os.Getpid() || proc != strings.TrimSpace(string(comm)) {
			t.Errorf("%s: %q, %d, %v, %v", l.Addr(), proc, pid, found, err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if proc, _, found, err := PortOwner(port); found || err != nil {
			t.Errorf("%s, closed: %q, %v, %v", l.Addr(), proc, found, err)
		}
		_ = c.Close()
	}
}

func TestPortOwnerSeesItsOwnNamespaceAlone(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	enterNewNS(t)
	if proc, _, found, err := PortOwner(uint16(l.Addr().(*net.TCPAddr).Port)); found || err != nil {
		t.Errorf("%q, %v, %v", proc, found, err)
	}
}

func TestPortOwnerThatCannotBeSeen(t *testing.T) {
	// A socket that was handed to nobody's file table: its only descriptor is in
	// flight inside another socket.
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 1); err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(fd)
	if err != nil {
		t.Fatal(err)
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _, _ = unix.Close(pair[0]), unix.Close(pair[1]) }()
	if err := unix.Sendmsg(pair[0], []byte("x"), unix.UnixRights(fd), nil, 0); err != nil {
		t.Fatal(err)
	}
	if err := unix.Close(fd); err != nil {
		t.Fatal(err)
	}
	proc, pid, found, err := PortOwner(uint16(name.(*unix.SockaddrInet4).Port))
	if err != nil || !found || pid != 0 || proc != "an unknown process" {
		t.Errorf("%q, %d, %v, %v", proc, pid, found, err)
	}
}

func TestAddresses(t *testing.T) {
	enterNewNS(t)
	if a, err := DefaultAddress(); err == nil {
		t.Errorf("an address without a network: %v", a)
	}
	link := func(name string, addrs ...string) int {
		l := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: name}, PeerName: name + "peer"}
		if err := netlink.LinkAdd(l); err != nil {
			t.Fatal(err)
		}
		for _, s := range addrs {
			a, err := netlink.ParseAddr(s)
			if err != nil {
				t.Fatal(err)
			}
			a.Flags = unix.IFA_F_NODAD
			if err := netlink.AddrAdd(l, a); err != nil {
				t.Fatal(err)
			}
		}
		if err := netlink.LinkSetUp(l); err != nil {
			t.Fatal(err)
		}
		return l.Attrs().Index
	}
	route := func(r netlink.Route, dst string) {
		_, r.Dst, _ = net.ParseCIDR(dst)
		if err := netlink.RouteAdd(&r); err != nil {
			t.Fatal(err)
		}
	}
	want := func(when, address string) {
		t.Helper()
		if a, err := DefaultAddress(); err != nil || a.String() != address {
			t.Errorf("%s: %v, %v, want %s", when, a, err, address)
		}
	}
	refuse := func(when string, listed ...string) {
		t.Helper()
		a, err := DefaultAddress()
		if err == nil {
			t.Errorf("%s: %v was chosen", when, a)
			return
		}
		for _, l := range listed {
			if !strings.Contains(err.Error(), l) {
				t.Errorf("%s: error %q does not list %s", when, err, l)
			}
		}
	}
	eth0 := link("eth0", "10.9.0.1/24")
	want("no route, one address", "10.9.0.1")
	eth1 := link("eth1", "10.8.0.1/24", "fd00:8::1/64")
	refuse("no route, several addresses", "10.9.0.1", "10.8.0.1", "fd00:8::1")
	route(netlink.Route{LinkIndex: eth1}, "::/0")
	want("an IPv6 route alone", "fd00:8::1")
	route(netlink.Route{LinkIndex: eth1, Gw: net.ParseIP("10.8.0.254"), Priority: 200}, "0.0.0.0/0")
	want("an IPv4 route", "10.8.0.1")
	route(netlink.Route{LinkIndex: eth0, Gw: net.ParseIP("10.9.0.254"), Priority: 100}, "0.0.0.0/0")
	want("a better route", "10.9.0.1")
	eth2 := link("eth2", "10.7.0.1/24", "10.7.0.2/24")
	route(netlink.Route{LinkIndex: eth2, Gw: net.ParseIP("10.7.0.254"), Priority: 50}, "0.0.0.0/0")
	refuse("several addresses on the best route's interface", "10.7.0.1", "10.7.0.2")
	route(netlink.Route{LinkIndex: eth2, Gw: net.ParseIP("10.7.0.254"), Src: net.ParseIP("10.7.0.2"), Priority: 10}, "0.0.0.0/0")
	want("a route that names its source", "10.7.0.2")

	for address, want := range map[string]bool{
		"10.7.0.2": true, "::ffff:10.7.0.2": true, "fd00:8::1": true, "10.7.0.3": false, "fd00:8::2": false,
	} {
		if got, err := HasAddress(netip.MustParseAddr(address)); got != want || err != nil {
			t.Errorf("HasAddress(%s): %v, %v", address, got, err)
		}
	}
}

func TestChooseAddress(t *testing.T) {
	a := func(s string, link int) hostAddr { return hostAddr{netip.MustParseAddr(s), link, true} }
	unusable := func(h hostAddr) hostAddr { h.usable = false; return h }
	for name, tc := range map[string]struct {
		routes []defaultRoute
		addrs  []hostAddr
		want   string // "" for an error
	}{
		"two equal routes, one address each": {
			[]defaultRoute{{link: 1}, {link: 2}}, []hostAddr{a("10.0.0.1", 1), a("10.0.1.1", 2)}, ""},
		"two equal routes over one interface": {
			[]defaultRoute{{link: 1}, {link: 1}}, []hostAddr{a("10.0.0.1", 1), a("10.0.1.1", 2)}, "10.0.0.1"},
		"link-local is not counted": {
			[]defaultRoute{{link: 1, v6: true}}, []hostAddr{a("fd00::1", 1), unusable(a("fe80::1", 1))}, "fd00::1"},
		"interface without an address": {
			[]defaultRoute{{link: 1}}, []hostAddr{a("10.0.1.1", 2)}, ""},
		"IPv4 before IPv6, whatever the metric": {
			[]defaultRoute{{link: 1, v6: true}, {link: 1, metric: 900}}, []hostAddr{a("fd00::1", 1), a("10.0.0.1", 1)}, "10.0.0.1"},
	} {
		got, err := chooseAddress(tc.routes, tc.addrs)
		if tc.want == "" && err == nil || tc.want != "" && (err != nil || got.String() != tc.want) {
			t.Errorf("%s: %v, %v, want %q", name, got, err, tc.want)
		}
	}
}

func TestDiskFree(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("none", dir, "tmpfs", 0, "size=8m"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(dir, "file"), make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, filepath.Join(dir, "not", "there", "yet")} {
		free, total, err := DiskFree(path)
		if err != nil || total != 8<<20 || free != 7<<20 {
			t.Errorf("%s: %d of %d, %v", path, free, total, err)
		}
	}
	if _, _, err := DiskFree(filepath.Join(dir, "file", "below")); err == nil {
		t.Error("no error for a path below a file")
	}
}

func TestDirEmpty(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	for _, path := range []string{dir, filepath.Join(dir, "missing")} {
		if empty, err := DirEmpty(path); !empty || err != nil {
			t.Errorf("%s: %v, %v", path, empty, err)
		}
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if empty, err := DirEmpty(dir); empty || err != nil {
		t.Errorf("with a file: %v, %v", empty, err)
	}
	if empty, err := DirEmpty(file); err == nil {
		t.Errorf("a file: %v", empty)
	}
}

func TestLookupUser(t *testing.T) {
	uid, gid, groups, err := LookupUser("postgres")
	if err != nil {
		t.Fatal(err)
	}
	id := func(flag string) []string {
		out, err := exec.Command("id", flag, "postgres").Output()
		if err != nil {
			t.Fatal(err)
		}
		fields := strings.Fields(string(out))
		slices.Sort(fields)
		return fields
	}
	var got []string
	for _, g := range groups {
		got = append(got, fmt.Sprint(g))
	}
	slices.Sort(got)
	if d := cmp.Diff([][]string{id("-u"), id("-g"), id("-G")}, [][]string{{fmt.Sprint(uid)}, {fmt.Sprint(gid)}, got}); d != "" {
		t.Errorf("-id +LookupUser:\n%s", d)
	}
	if _, _, _, err := LookupUser("no-such-user"); err == nil || !strings.Contains(err.Error(), `user "no-such-user" does not exist`) {
		t.Errorf("unknown user: %v", err)
	}
}

func TestMachine(t *testing.T) {
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.ParseUint(strings.Fields(string(meminfo))[1], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if m := Memory(); m == 0 || m > kib<<10 {
		t.Errorf("Memory: %d of %d", m, kib<<10)
	}
	if n := CPUs(); n < 1 {
		t.Errorf("CPUs: %d", n)
	}
	if !IsRoot() {
		t.Error("the tests run as root, but IsRoot says no")
	}
}

func TestOSRelease(t *testing.T) {
	out, err := exec.Command("sh", "-c", `. /etc/os-release; echo "$ID|$VERSION_ID|$PRETTY_NAME"`).Output()
	if err != nil {
		t.Fatal(err)
	}
	id, version, pretty, err := OSRelease()
	if got := id + "|" + version + "|" + pretty + "\n"; err != nil || got != string(out) {
		t.Errorf("%q, %v, want %q", got, err, out)
	}
	values, err := parseOSRelease(strings.NewReader("# ID=no\n\nID=alpine\nVERSION_ID='3.20'\nPRETTY_NAME=\"A = B\"\nbroken\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"ID": "alpine", "VERSION_ID": "3.20", "PRETTY_NAME": "A = B"}
	if d := cmp.Diff(want, values); d != "" {
		t.Error(d)
	}
}

func TestPreflight(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	port := l.Addr().(*net.TCPAddr).Port
	full, empty := t.TempDir(), t.TempDir()
	if err := os.WriteFile(filepath.Join(full, "PG_VERSION"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = Preflight(Requirements{
		Address:   netip.MustParseAddr("203.0.113.7"),
		Ports:     map[string]uint16{"read-write": uint16(port)},
		EmptyDirs: []string{full, empty},
		Space:     map[string]uint64{empty: 1 << 62},
	})
	if err == nil {
		t.Fatal("no error")
	}
	lines := strings.Split(err.Error(), "\n")
	for i, want := range []string{
		"address 203.0.113.7 is not on this host",
		fmt.Sprintf("port %d (read-write) is taken by host.test (pid %d)", port, os.Getpid()),
		"directory " + full + " is not empty",
		"disk nearly full: " + empty,
	} {
		if i >= len(lines) || !strings.HasPrefix(lines[i], want) {
			t.Errorf("line %d does not start with %q:\n%v", i, want, err)
		}
	}
	if len(lines) != 4 {
		t.Errorf("%d lines:\n%v", len(lines), err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	err = Preflight(Requirements{
		Address: netip.MustParseAddr("127.0.0.1"), Ports: map[string]uint16{"read-write": uint16(port)},
		EmptyDirs: []string{empty}, Space: map[string]uint64{empty: 1},
	})
	if err != nil {
		t.Errorf("a good host: %v", err)
	}
}

func TestPreflightWithoutRoot(t *testing.T) {
	if os.Geteuid() != 0 { // the child below
		fmt.Print(Preflight(Requirements{}))
		return
	}
	// /proc/self/exe can be executed by nobody wherever the binary lies.
	cmd := exec.Command("/proc/self/exe", "-test.run", "^"+t.Name()+"$")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: nobody(t)}
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.HasPrefix(string(out), "not root: run the command with sudo") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestVersions(t *testing.T) {
	ctx := context.Background()
	for name, tc := range map[string]struct {
		ask     func(context.Context) (int, int, int, error)
		command []string
	}{
		"patroni": {PatroniVersion, []string{"patroni", "--version"}},
		"haproxy": {HAProxyVersion, []string{"haproxy", "-v"}},
	} {
		major, minor, patch, err := tc.ask(ctx)
		if err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(tc.command[0], tc.command[1:]...).Output()
		if err != nil {
			t.Fatal(err)
		}
		if version := fmt.Sprintf("%d.%d.%d", major, minor, patch); !strings.Contains(string(out), " "+version) {
			t.Errorf("%s says %s, want %s", name, version, out)
		}
	}
	for out, want := range map[string][3]int{
		"patroni 4.0.4": {4, 0, 4},
		"HAProxy version 2.6.12-1+deb12u4 2025/10/17 - https://haproxy.org/\nStatus": {2, 6, 12},
		"HAProxy version 3.0-dev5-1 2024/01/01":                                      {3, 0, 0},
	} {
		major, minor, patch, err := parseVersion(out)
		if got := [3]int{major, minor, patch}; got != want || err != nil {
			t.Errorf("%q: %v, %v", out, got, err)
		}
	}
	if _, _, _, err := parseVersion("Usage: patroni [options]\nversion 1.2.3"); err == nil {
		t.Error("a version was found in a usage text")
	}
}

func TestPostgresBinDirs(t *testing.T) {
	installed, err := PostgresBinDirs()
	if err != nil || len(installed) == 0 {
		t.Fatalf("%v, %v", installed, err)
	}
	out, err := exec.Command(filepath.Join(installed[0].BinDir, "postgres"), "--version").Output()
	if err != nil || !strings.Contains(string(out), fmt.Sprintf(" %d.", installed[0].Major)) {
		t.Errorf("%+v says %s, %v", installed[0], out, err)
	}
	usr := t.TempDir()
	for _, path := range []string{
		"lib/postgresql/9.6/bin/postgres", "lib/postgresql/9/bin/postgres", "lib/postgresql/15/bin/postgres", "pgsql-17/bin/postgres",
		"lib/postgresql/18/bin/psql", // a client alone
	} {
		path = filepath.Join(usr, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, nil, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	want := []PG{{17, usr + "/pgsql-17/bin"}, {15, usr + "/lib/postgresql/15/bin"}, {9, usr + "/lib/postgresql/9/bin"}}
	got, err := postgresBinDirs(usr)
	if d := cmp.Diff(want, got); d != "" || err != nil {
		t.Errorf("%v\n%s", err, d)
	}
}
