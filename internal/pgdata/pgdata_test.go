package pgdata

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"golang.org/x/sys/unix"
)

func TestReadPIDFile(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadPIDFile(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a file: %v, want fs.ErrNotExist", err)
	}
	for _, c := range []struct {
		name, text string
		want       PIDFile
		wrong      bool
	}{
		{name: "complete", text: "4711\n/data\n1700000000\n5442\n/run/x\n*\n  5432001     32771\nready   \n",
			want: PIDFile{PID: 4711, Start: 1700000000, HasShm: true, ShmKey: 5432001, ShmID: 32771}},
		{name: "negative key", text: "4711\n/data\n1700000000\n5442\n\n\n18446744073709551615         7\n",
			want: PIDFile{PID: 4711, Start: 1700000000, HasShm: true, ShmKey: -1, ShmID: 7}},
		{name: "before its shared memory", text: "4711\n/data\n1700000000\n5442\n/run/x\n", want: PIDFile{PID: 4711, Start: 1700000000}},
		{name: "first line alone", text: "4711\n", want: PIDFile{PID: 4711}},
		{name: "odd later lines", text: "4711\n/data\nsoon\n\n\n\nkey id\n", want: PIDFile{PID: 4711}},
		{name: "single user", text: "-4711\n/data\n1700000000\n", want: PIDFile{PID: -4711, Start: 1700000000}},
		{name: "empty", text: "", wrong: true},
		{name: "zero", text: "0\n", wrong: true},
		{name: "init", text: "1\n", wrong: true},
		{name: "words", text: "postmaster\n", wrong: true},
	} {
		if err := os.WriteFile(filepath.Join(dir, "postmaster.pid"), []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadPIDFile(dir)
		if (err != nil) != c.wrong {
			t.Errorf("%s: error %v", c.name, err)
		}
		if diff := cmp.Diff(c.want, got, cmpopts.IgnoreUnexported(PIDFile{})); diff != "" {
			t.Errorf("%s (-want +got):\n%s", c.name, diff)
		}
		if again, err := ReadPIDFile(dir); !c.wrong && (err != nil || again != got) {
			t.Errorf("%s: the same file gives %+v, %v", c.name, again, err)
		}
	}
}

// startIn starts a process that works in dir, as a user, until stop is called.
func startIn(t *testing.T, dir string, uid uint32) (pid int, stop func()) {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	stop = sync.OnceFunc(func() { must(t, errors.Join(in.Close(), cmd.Wait())) })
	t.Cleanup(stop)
	return cmd.Process.Pid, stop
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func TestWorksIn(t *testing.T) {
	dir := t.TempDir()
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(dir, link))
	pid, stop := startIn(t, dir, 0)
	check := func(when, dir string, want bool) {
		t.Helper()
		if got, err := WorksIn(pid, dir); err != nil || got != want {
			t.Errorf("%s: works in %s: %v, %v, want %v", when, dir, got, err, want)
		}
	}
	check("alive", dir, true)
	check("alive", link, true)
	check("alive", filepath.Dir(dir), false)
	check("alive", filepath.Join(dir, "absent"), false)
	must(t, os.Remove(dir))
	check("directory removed", dir, true)
	check("directory removed", filepath.Dir(dir), false)
	must(t, os.Mkdir(dir, 0o700))
	check("directory made anew", dir, true)
	stop()
	check("ended", dir, false)
	if _, err := WorksIn(pid, dir+"/\x00"); err == nil {
		t.Error("a directory that cannot be looked at gives no error")
	}
}

// TestWorksInWithoutPermission has processes that may not be looked at, as in a
// container.
func TestWorksInWithoutPermission(t *testing.T) {
	const uid = 61234
	mine, others := t.TempDir(), t.TempDir()
	must(t, os.Chown(mine, uid, uid))
	asRoot, _ := startIn(t, "/", 0)
	asUser, _ := startIn(t, "/", uid)
	absent := filepath.Join(mine, "absent")

	// Capabilities are a thread's; this one ends with the test.
	runtime.LockOSThread()
	dropPtrace(t)
	for _, c := range []struct {
		name, dir string
		pid       int
		doubt     bool
	}{
		{"no server runs as root", mine, asRoot, false},
		{"nor as another than the owner", others, asUser, false},
		{"but as the owner", mine, asUser, true},
		{"no owner to compare", absent, asUser, true},
		{"no owner, but root", absent, asRoot, false},
	} {
		works, err := WorksIn(c.pid, c.dir)
		if works || (err != nil) != c.doubt || err != nil && !errors.Is(err, fs.ErrPermission) {
			t.Errorf("%s: %v, %v, want doubt %v", c.name, works, err, c.doubt)
		}
	}
}

func dropPtrace(t *testing.T) {
	t.Helper()
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var caps [2]unix.CapUserData
	must(t, unix.Capget(&head, &caps[0]))
	caps[0].Effective &^= 1 << unix.CAP_SYS_PTRACE
	must(t, unix.Capset(&head, &caps[0]))
	if _, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", os.Getppid())); !errors.Is(err, fs.ErrPermission) {
		t.Fatalf("without CAP_SYS_PTRACE, looking at the parent: %v", err)
	}
}
