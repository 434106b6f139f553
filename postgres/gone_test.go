package postgres

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func checkGone(t *testing.T, dir string, want bool) {
	t.Helper()
	if gone, err := ProveGone(dir); err != nil || gone != want {
		_, left, _ := proveGone(dir)
		t.Errorf("ProveGone: %v, %v, want %v; left: %q", gone, err, want, left)
	}
}

// removeSegment removes a server's segment, if its pid file names one, as ipcrm
// does: it loses its key at once, and is freed when the last process lets go.
func removeSegment(t *testing.T, dir string) {
	t.Helper()
	f, err := readPIDFile(dir)
	if err != nil || !f.HasShm {
		return
	}
	var desc unix.SysvShmDesc
	if _, err := unix.SysvShmCtl(f.ShmID, unix.IPC_STAT, &desc); err != nil || desc.Perm.Key != f.ShmKey {
		return // it has gone, and the id may be another's
	}
	_, err = unix.SysvShmCtl(f.ShmID, unix.IPC_RMID, nil)
	must(t, err)
}

// startIn starts a process that works in dir until the test ends.
func startIn(t *testing.T, dir string) int {
	t.Helper()
	cmd := exec.Command("cat")
	cmd.Dir = dir
	in, err := cmd.StdinPipe()
	must(t, err)
	must(t, cmd.Start())
	t.Cleanup(func() { must(t, errors.Join(in.Close(), cmd.Wait())) })
	return cmd.Process.Pid
}

func pidFile(pid int, start time.Time) string {
	return fmt.Sprintf("%d\n/data\n%d\n5442\n\n\n", pid, start.Unix())
}

func TestProveGoneWithoutServer(t *testing.T) {
	s := emptyServer(t)
	checkGone(t, s.data, true) // absent
	w := New(s.config(t))
	if p := w.Now(t.Context()); p.Kind != Gone || p.DiskTotal != 0 {
		t.Errorf("absent data directory: %+v", p)
	}
	must(t, os.Mkdir(s.data, 0o700))
	checkGone(t, s.data, true) // empty
	if p := w.Now(t.Context()); p.Kind != Gone || p.DiskTotal == 0 {
		t.Errorf("empty data directory: %+v", p)
	}

	s.write(t, "postmaster.pid", "")
	if gone, err := ProveGone(s.data); gone || err == nil {
		t.Errorf("an empty pid file: %v, %v, want an error", gone, err)
	}
	if p := w.Now(t.Context()); p.Kind != Unknown || !strings.Contains(p.Err, "postmaster.pid") {
		t.Errorf("an empty pid file: %+v", p)
	}

	// A pid that has gone to another process.
	here, elsewhere := startIn(t, s.data), startIn(t, "/")
	for _, c := range []struct {
		name  string
		pid   int
		start time.Time
		gone  bool
	}{
		{"works elsewhere", elsewhere, time.Now(), true},
		{"works here, started later", here, time.Now().Add(-time.Hour), true},
		{"works here, started earlier", here, time.Now().Add(time.Hour), true},
		{"works here, started then", here, time.Now(), false},
		{"single user", -here, time.Now(), false},
		{"single user, recycled", -elsewhere, time.Now(), true},
		{"ended", 1 << 30, time.Now(), true},
	} {
		s.write(t, "postmaster.pid", pidFile(c.pid, c.start))
		t.Run(c.name, func(t *testing.T) {
			checkGone(t, s.data, c.gone)
			want := Unknown
			if c.gone {
				want = Gone
			}
			// Nothing listens; and no long silence turns doubt into more.
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			if p := w.Now(ctx); p.Kind != want {
				t.Errorf("%+v, want %s", p, want)
			}
		})
	}
}

// TestProveGoneSegment: a segment counts if it is the one in the pid file.
func TestProveGoneSegment(t *testing.T) {
	dir := t.TempDir()
	const key = 0x70676861
	id, err := unix.SysvShmGet(key, 4096, unix.IPC_CREAT|unix.IPC_EXCL|0o600)
	must(t, err)
	t.Cleanup(func() {
		if _, err := unix.SysvShmCtl(id, unix.IPC_RMID, nil); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Error(err)
		}
	})
	write := func(key, id int) {
		t.Helper()
		text := fmt.Sprintf("%s%9d %9d\nready   \n", pidFile(1<<30, time.Now()), key, id)
		must(t, os.WriteFile(filepath.Join(dir, "postmaster.pid"), []byte(text), 0o600))
	}
	write(key, id)
	checkGone(t, dir, true) // nobody holds it
	mem, err := unix.SysvShmAttach(id, 0, 0)
	must(t, err)
	checkGone(t, dir, false)
	write(key+1, id) // the id was used again after a boot
	checkGone(t, dir, true)
	write(key, id)
	checkGone(t, dir, false)

	// Held by a process in the directory, which is what a server's are: this one.
	write(key+1, id)
	t.Chdir(dir)
	checkGone(t, dir, false)
	must(t, os.Remove(filepath.Join(dir, "postmaster.pid")))
	checkGone(t, dir, false)
	must(t, os.RemoveAll(dir)) // the kernel still knows where this process was
	checkGone(t, dir, false)
	must(t, os.Mkdir(dir, 0o700))
	checkGone(t, dir, false)
	t.Chdir("/")
	checkGone(t, dir, true)

	write(key, id)
	must(t, unix.SysvShmDetach(mem))
	checkGone(t, dir, true)
	_, err = unix.SysvShmCtl(id, unix.IPC_RMID, nil)
	must(t, err)
	checkGone(t, dir, true)
}

// TestClockWasSet has a living server whose start time in the pid file and by
// the kernel do not agree, as after the wall clock was set.
func TestClockWasSet(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	pid := s.postmaster(t)
	path := filepath.Join(s.data, "postmaster.pid")
	text, err := os.ReadFile(path)
	must(t, err)
	lines := strings.Split(string(text), "\n")
	lines[2] = fmt.Sprint(time.Now().Add(-time.Hour).Unix())
	s.write(t, "postmaster.pid", strings.Join(lines, "\n"))
	checkGone(t, s.data, false)
	if p := New(s.config(t)).Now(t.Context()); p.Kind != Primary || p.PID != pid {
		t.Errorf("after the clock was set: %+v", p)
	}

	// Without its pid file a server ends within a minute; until then it is there.
	w := watch(t, s.config(t))
	w.kind(t, Primary)
	must(t, os.Rename(path, path+".away"))
	checkGone(t, s.data, false)
	if p := New(s.config(t)).Now(t.Context()); p.Kind != Unknown || !strings.Contains(p.Err, "holds shared memory") {
		t.Errorf("without a pid file, to a newcomer: %+v", p)
	}
	w.kind(t, Primary, Gone)
	must(t, os.Rename(path+".away", path))
}

// TestKill ends a server that hears nothing.
func TestKill(t *testing.T) {
	s := newServer(t)
	s.ctl(t, "start")
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	bystander := startIn(t, s.data)
	s.signal(t, unix.SIGSTOP, s.pids(t)...)
	s.signal(t, unix.SIGCONT, bystander)
	must(t, Kill(ctx, s.data))
	checkGone(t, s.data, true)
	s.signal(t, unix.SIGCONT, s.pids(t)...) // the logger, which ends by itself
	waitFor(t, "all but the bystander to end", func() bool { return slices.Equal(s.pids(t), []int{bystander}) })
	must(t, Kill(ctx, s.data)) // nothing is left to end

	removeSegment(t, s.data)
	s.write(t, "postmaster.pid", "")
	cancel()
	if err := Kill(ctx, s.data); !errors.Is(err, context.Canceled) || !strings.Contains(err.Error(), "postmaster.pid") {
		t.Errorf("what cannot be proved: %v", err)
	}
}
