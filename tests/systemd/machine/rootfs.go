package machine

import (
	"cmp"
	"context"
	"crypto/sha256"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// SuiteEnv names the environment variable that chooses the Debian release that
// the machines run; Debian 12, if it is not set.
const SuiteEnv = "PGHA_SUITE"

// Suite is the code name of the Debian release that the machines run.
func Suite() string { return cmp.Or(os.Getenv(SuiteEnv), "bookworm") }

// Postgres is the major version of PostgreSQL that the release has.
func Postgres() string {
	if Suite() == "bookworm" {
		return "15"
	}
	return "17"
}

// CacheEnv names the environment variable that holds the directory in which
// root file systems are kept between runs. Unset, it is .cache/rootfs in the
// root of the module.
const CacheEnv = "PGHA_CACHE"

// Packages can be installed in a machine with apt-get, although it has no way
// to a mirror. Every other package of Debian is out of its reach.
var Packages = []string{
	"postgresql", "patroni", "python3-etcd", "python3-idna", "haproxy",
	"nftables",
}

// base is installed in every machine: what a small cloud image of Debian has
// and the product may count on.
var base = []string{"systemd", "systemd-sysv", "dbus", "iproute2", "ca-certificates", "procps"}

//go:embed build.sh
var buildScript string

// Root returns the directory of the cached root file system and builds it first
// if it is not there, which takes a minute or two. Nothing may write into it.
// It fails when debootstrap or apt fail, with the end of their output.
func Root(ctx context.Context) (string, error) {
	cache, err := cacheDir()
	if err != nil {
		return "", err
	}
	key := sha256.Sum256([]byte(strings.Join([]string{
		Suite(), runtime.GOARCH, strings.Join(base, ","), strings.Join(Packages, ","), buildScript,
	}, "\n")))
	root := filepath.Join(cache, fmt.Sprintf("%s-%x", Suite(), key[:6]))
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", fmt.Errorf("make root file system cache: %w", err)
	}
	// Tests of several packages may find it missing at the same time.
	held, err := lock(root + ".lock")
	if err != nil {
		return "", err
	}
	defer held.Close()
	switch _, err := os.Stat(root); {
	case err == nil:
		return root, nil
	case !errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("look up root file system: %w", err)
	}
	if err := build(ctx, root, held); err != nil {
		return "", fmt.Errorf("build root file system: %w", err)
	}
	return root, nil
}

// build makes the root beside its final place and renames it there, so that a
// half-built one is never used.
func build(ctx context.Context, root string, held *os.File) error {
	tmp := root + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return fmt.Errorf("remove half-built root: %w", err)
	}
	cmd := exec.CommandContext(ctx, "/bin/sh", "-c", buildScript, "build.sh",
		tmp, Suite(), strings.Join(base, ","), strings.Join(Packages, ","))
	// debootstrap mounts inside the root; in a namespace of its own these end with it.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: unix.CLONE_NEWNS, Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	// A build that outlives a killed test keeps the lock, and so its directory to itself.
	cmd.ExtraFiles = []*os.File{held}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return errors.Join(fmt.Errorf("%w\n%s", err, tail(out)), os.RemoveAll(tmp))
	}
	if err := os.Rename(tmp, root); err != nil {
		return fmt.Errorf("put root in place: %w", err)
	}
	return nil
}

func cacheDir() (string, error) {
	if dir := os.Getenv(CacheEnv); dir != "" {
		return filepath.Abs(dir)
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("find module: %w", err)
	}
	for d := dir; ; d = filepath.Dir(d) {
		if _, err := os.Stat(filepath.Join(d, "go.mod")); err == nil {
			return filepath.Join(d, ".cache", "rootfs"), nil
		}
		if d == filepath.Dir(d) {
			return "", fmt.Errorf("find module: no go.mod above %s; set %s", dir, CacheEnv)
		}
	}
}

// lock waits for the exclusive lock on the file, which is held while it or an
// inherited copy is open.
func lock(file string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", file, err), f.Close())
	}
	return f, nil
}

// tail returns the end of a program's output, enough to see why it failed.
func tail(out []byte) string {
	const limit = 4096
	if len(out) > limit {
		out = out[len(out)-limit:]
	}
	return strings.TrimSpace(string(out))
}
