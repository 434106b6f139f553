package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgha/embedded"
)

// fillDirEnv makes this test binary fill the disk under an etcd member instead.
// That ends the process that does it, so it is not this one.
const fillDirEnv = "PGHA_TEST_FILL_DIR"

const (
	fillDiskFull = 10 // etcd failed, and named the full disk
	fillOther    = 11
)

// fillDisk starts the member whose configuration is in dir, fills the disk and
// writes until etcd fails.
func fillDisk(dir string) int {
	cfg, err := readConfig(dir)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return fillOther
	}
	fatal := make(chan error, 1)
	cfg.OnFatal = func(err error) { fatal <- err }
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	s, err := embedded.Start(ctx, cfg)
	if err == nil {
		err = s.WaitReady(ctx)
	}
	if err == nil {
		err = fillWith(filepath.Join(filepath.Dir(cfg.DataDir), "ballast"))
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return fillOther
	}
	go func() {
		for i := 0; ctx.Err() == nil; i++ {
			_, _ = s.Client().Put(ctx, fmt.Sprint("k", i), strings.Repeat("v", 1<<19))
		}
	}()
	select {
	case err = <-fatal:
	case <-ctx.Done():
		fmt.Fprintln(os.Stderr, "etcd survived a full disk")
		return fillOther
	}
	<-s.Done()
	if _, serr := s.Status(ctx); !errors.Is(serr, embedded.ErrDiskFull) || !errors.Is(s.Err(), embedded.ErrDiskFull) {
		err = fmt.Errorf("status %w, err %w", serr, s.Err())
	}
	s.Stop() // must return: its goroutines do not
	fmt.Fprintln(os.Stderr, err)
	if errors.Is(err, embedded.ErrDiskFull) {
		return fillDiskFull
	}
	return fillOther
}

func fillWith(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	chunk := bytes.Repeat([]byte{1}, 1<<16)
	for {
		if _, err := f.Write(chunk); errors.Is(err, syscall.ENOSPC) {
			return nil
		} else if err != nil {
			return err
		}
	}
}

func TestDiskFull(t *testing.T) {
	for _, where := range []string{"record on another disk", "record on the full disk"} {
		t.Run(where, func(t *testing.T) {
			dir, disk := t.TempDir(), t.TempDir()
			if err := syscall.Mount("tmpfs", disk, "tmpfs", 0, "size=64m"); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := syscall.Unmount(disk, syscall.MNT_DETACH); err != nil {
					t.Error(err)
				}
			})
			cfg := newCluster(t).config(1, true)
			cfg.DataDir, cfg.Bootstrap = filepath.Join(disk, "etcd"), true
			if where == "record on another disk" {
				cfg.FatalFile = filepath.Join(dir, "etcd-fatal.json")
			}
			writeConfig(t, dir, cfg)
			cmd := exec.Command(os.Args[0])
			cmd.Env = append(os.Environ(), fillDirEnv+"="+dir)
			out, err := cmd.CombinedOutput()
			t.Logf("child: %s", out)
			if cmd.ProcessState.ExitCode() != fillDiskFull {
				t.Fatalf("child ended with %v", err)
			}

			for range 2 { // refused, not tried and failed again
				if _, err := embedded.Start(within(t), cfg); !errors.Is(err, embedded.ErrDiskFull) {
					t.Fatalf("start on the full disk gives %v, want ErrDiskFull", err)
				}
			}
			if err := os.Remove(filepath.Join(disk, "ballast")); err != nil {
				t.Fatal(err)
			}
			s := start(t, cfg)
			ready(t, s)
			if got := get(t, s.Client(), "k0"); got == "" {
				t.Error("acknowledged write lost")
			}
			s.Stop()
		})
	}
}
