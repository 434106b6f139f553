package systemd

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"pgha/internal/fsx"
)

// NeedrestartPath is the file that keeps needrestart, which Debian and Ubuntu run
// after package upgrades, from restarting what pgha runs.
const NeedrestartPath = "/etc/needrestart/conf.d/pgha.conf"

const needrestart = `# Written by pgha; pgha reset removes it.
# An upgrade of a package must not restart the database behind the cluster's
# back. pgha status says what waits for a restart, and pgha upgrade postgres
# restarts it, one node after the other.
push(@{$nrconf{blacklist_rc}}, qr(^pgha), qr(^postgresql), qr(^patroni), qr(^haproxy));
`

// KeepNeedrestartAway writes the file at NeedrestartPath, whether or not
// needrestart is installed: it may be later. It may be repeated.
func KeepNeedrestartAway() error { return keepNeedrestartAway(NeedrestartPath) }

func keepNeedrestartAway(path string) error {
	old, err := os.ReadFile(path)
	if err == nil && string(old) == needrestart {
		return nil
	}
	err = os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = fsx.WriteFile(path, []byte(needrestart), 0o644, fsx.Keep, fsx.Keep)
	}
	if err != nil {
		return fmt.Errorf("keep needrestart away: %w", err)
	}
	return nil
}

// LetNeedrestart takes back what KeepNeedrestartAway has written. A file that is
// not there is no error.
func LetNeedrestart() error { return letNeedrestart(NeedrestartPath) }

func letNeedrestart(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("let needrestart do its work: %w", err)
	}
	// The directories are needrestart's, if it is there; these calls fail then.
	_ = os.Remove(filepath.Dir(path))
	_ = os.Remove(filepath.Dir(filepath.Dir(path)))
	return nil
}
