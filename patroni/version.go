package patroni

import (
	"cmp"
	"context"
	"fmt"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
)

// Version is a Patroni version.
type Version struct{ Major, Minor, Patch int }

var versionPattern = regexp.MustCompile(`\b(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?`)

// ParseVersion finds the version in s, such as "3.0.2" or "patroni 4.1.0".
func ParseVersion(s string) (Version, error) {
	m := versionPattern.FindStringSubmatch(s)
	if m == nil {
		return Version{}, fmt.Errorf("no Patroni version in %q", strings.TrimSpace(s))
	}
	var n [3]int
	for i := range n {
		if m[i+1] == "" {
			continue
		}
		v, err := strconv.Atoi(m[i+1])
		if err != nil {
			return Version{}, fmt.Errorf("parse Patroni version %q: %w", m[0], err)
		}
		n[i] = v
	}
	return Version{Major: n[0], Minor: n[1], Patch: n[2]}, nil
}

// InstalledVersion asks the program bin for its version.
func InstalledVersion(ctx context.Context, bin string) (Version, error) {
	out, err := exec.CommandContext(ctx, bin, "--version").CombinedOutput()
	if err != nil {
		return Version{}, fmt.Errorf("run %s --version: %w: %s", bin, err, lastLine(string(out)))
	}
	v, err := ParseVersion(string(out))
	if err != nil {
		return Version{}, fmt.Errorf("read the output of %s --version: %w", bin, err)
	}
	return v, nil
}

// String returns the version as Patroni prints it.
func (v Version) String() string {
	return fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Patch)
}

// Compare returns -1, 0 or +1 as v is older than, equal to or newer than w.
func (v Version) Compare(w Version) int {
	return cmp.Or(cmp.Compare(v.Major, w.Major), cmp.Compare(v.Minor, w.Minor), cmp.Compare(v.Patch, w.Patch))
}

// Supported returns an error when pgha cannot run this version at all.
func (v Version) Supported() error {
	if v.Compare(Version{3, 0, 0}) < 0 {
		return fmt.Errorf("patroni %s is too old: install 3.0.0 or newer", v)
	}
	return nil
}

// StealsLeaderKey reports whether an old primary of this version, after a
// pause or partition longer than its ttl, overwrites the leader key of the new
// primary without comparing, so that acknowledged writes are lost.
func (v Version) StealsLeaderKey() bool {
	return v.Compare(Version{3, 0, 3}) < 0
}

// ForgetsStandbys reports whether this version, started beside a PostgreSQL that
// runs, makes its commits wait for no standby any more while the sync key still
// names one, so that acknowledged writes are lost at the next failover.
func (v Version) ForgetsStandbys() bool {
	return v.Compare(Version{3, 1, 2}) < 0
}

// NeedsLauncher reports whether this version must be started by the Launcher.
func (v Version) NeedsLauncher() bool { return v.StealsLeaderKey() || v.ForgetsStandbys() }

// lastLine returns the last line of s that is not blank.
func lastLine(s string) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.TrimSpace(lines[len(lines)-1])
}
