package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"pgha/internal/fsx"
)

// DropInPath is the file that keeps the distribution's PostgreSQL packages from
// making a cluster of their own. It stays, for the next major version's sake.
const DropInPath = "/etc/postgresql-common/createcluster.d/pgha.conf"

const dropIn = `# Written by pgha: the clusters on this host are pgha's.
create_main_cluster = false
`

// InstallPackages installs packages with apt-get, without asking, and copies
// its output to out. No package makes a PostgreSQL cluster, and no service of
// PostgreSQL, Patroni, HAProxy or etcd is started by it. An error carries the
// last lines of apt-get's output. It needs root and fails on distributions
// without apt-get. When ctx ends, apt-get is asked to end.
func InstallPackages(ctx context.Context, pkgs []Package, out io.Writer) error {
	if len(pkgs) == 0 {
		return nil
	}
	i := installer{dropIn: DropInPath, policy: policyGuard{path: policyPath}}
	if !IsRoot() {
		return fmt.Errorf("install %s: not root: run the command with sudo", names(pkgs))
	}
	return i.install(ctx, pkgs, out)
}

// RemoveDropIn takes away the file at DropInPath, so that the distribution's
// packages make clusters again. A file that is not there is no error.
func RemoveDropIn() error {
	if err := os.Remove(DropInPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove PostgreSQL package settings: %w", err)
	}
	return nil
}

func names(pkgs []Package) string {
	var list []string
	for _, p := range pkgs {
		list = append(list, p.Name)
	}
	return strings.Join(list, " ")
}

type installer struct {
	dropIn string
	policy policyGuard
}

func (i installer) install(ctx context.Context, pkgs []Package, out io.Writer, options ...string) (err error) {
	apt, err := exec.LookPath("apt-get")
	if err != nil {
		_, _, pretty, _ := OSRelease()
		return fmt.Errorf("cannot install packages on %q, which has no apt-get: install %s yourself, then run the command again",
			pretty, names(pkgs))
	}
	if err := os.MkdirAll(filepath.Dir(i.dropIn), 0o755); err != nil {
		return fmt.Errorf("write PostgreSQL package settings: %w", err)
	}
	if err := fsx.WriteFile(i.dropIn, []byte(dropIn), 0o644, fsx.Keep, fsx.Keep); err != nil {
		return fmt.Errorf("write PostgreSQL package settings: %w", err)
	}
	if err := i.policy.install(); err != nil {
		return fmt.Errorf("keep services from starting: %w", err)
	}
	defer func() {
		if rerr := i.policy.restore(); rerr != nil {
			err = errors.Join(err, fmt.Errorf("let services start again: %w", rerr))
		}
	}()
	// A fresh host may have no list of packages yet, or an old one. Where the
	// update fails, the list that is there may still do.
	updateErr := runApt(ctx, apt, out, "update")
	args := append([]string{"--yes", "--no-install-recommends",
		"-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"}, options...)
	args = append(append(args, "--"), strings.Fields(names(pkgs))...)
	if err := runApt(ctx, apt, out, "install", args...); err != nil {
		return fmt.Errorf("install %s: %w", names(pkgs), errors.Join(err, updateErr))
	}
	return nil
}

func runApt(ctx context.Context, apt string, out io.Writer, verb string, args ...string) error {
	const lines = 15
	// On a fresh host the distribution's own upgrades often hold the lock.
	args = append([]string{"-q", "-o", "DPkg::Lock::Timeout=300", "-o", "DPkg::Use-Pty=0", verb}, args...)
	cmd := exec.CommandContext(ctx, apt, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive", "APT_LISTCHANGES_FRONTEND=none",
		"NEEDRESTART_SUSPEND=1")
	var all bytes.Buffer
	both := io.MultiWriter(out, &all)
	cmd.Stdout, cmd.Stderr = both, both
	// Killed in the middle, dpkg would leave packages half configured.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = time.Minute
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("apt-get %s: %w:\n%s", verb, err, lastLines(all.String(), lines))
	}
	return nil
}

func lastLines(text string, n int) string {
	lines := strings.Split(strings.TrimRight(text, "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
