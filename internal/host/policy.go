package host

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"pgha/internal/fsx"
)

// policyPath is where Debian's packages look for the script.
const policyPath = "/usr/sbin/policy-rc.d"

// policyGuard puts a policy-rc.d of ours in the place of the host's own, if it
// has one. Debian's packages ask it before they start a service.
type policyGuard struct {
	path string
}

// saved is where the host's own script waits.
func (g policyGuard) saved() string { return g.path + ".pgha-saved" }

const policyMark = "# Written by pgha"

// script refuses our services alone, asks the host's own script about all
// others, and refuses nothing once this process is gone: a pgha that was killed
// leaves no trap behind.
func (g policyGuard) script() []byte {
	return fmt.Appendf(nil, `#!/bin/sh
%s while it installs packages: their services are pgha's to start.
if [ -d /proc/%d ]; then
	for word in "$@"; do
		case "$word" in
		postgresql*|patroni*|haproxy*|etcd*) exit 101 ;;
		esac
	done
fi
if [ -x %[3]s ]; then
	exec %[3]s "$@"
fi
exit 0
`, policyMark, os.Getpid(), g.saved())
}

func (g policyGuard) install() error {
	current, err := os.ReadFile(g.path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return fmt.Errorf("read %s: %w", g.path, err)
	case !bytes.Contains(current, []byte(policyMark)): // else a leftover of ours
		if err := os.Rename(g.path, g.saved()); err != nil {
			return fmt.Errorf("save %s: %w", g.path, err)
		}
	}
	if err := fsx.WriteFile(g.path, g.script(), 0o755, fsx.Keep, fsx.Keep); err != nil {
		return errors.Join(err, g.restore())
	}
	return nil
}

func (g policyGuard) restore() error {
	err := os.Rename(g.saved(), g.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = os.Remove(g.path)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore %s: %w", g.path, err)
	}
	return nil
}
