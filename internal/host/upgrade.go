package host

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// Candidate is what apt knows of a package.
type Candidate struct {
	// Installed is the version that is on disk; empty where the package is not.
	Installed string
	// Available is the version that an upgrade would bring; the installed one if
	// there is nothing newer.
	Available string
}

// Candidates asks apt, by its lists as they are, about packages by name. One that
// apt does not know is left out. It fails on distributions without apt.
func Candidates(ctx context.Context, names ...string) (map[string]Candidate, error) {
	cmd := exec.CommandContext(ctx, "apt-cache", append([]string{"policy", "--"}, names...)...)
	cmd.Env = append(os.Environ(), "LC_ALL=C.UTF-8")
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("ask apt for the versions of %s: %w", strings.Join(names, ", "), err)
	}
	return parsePolicy(string(out)), nil
}

// parsePolicy reads the output of apt-cache policy.
func parsePolicy(out string) map[string]Candidate {
	found := map[string]Candidate{}
	name := ""
	for s := bufio.NewScanner(strings.NewReader(out)); s.Scan(); {
		line := s.Text()
		if !strings.HasPrefix(line, " ") {
			name = strings.TrimSuffix(line, ":")
			continue
		}
		key, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
		c := found[name]
		if value == "(none)" {
			value = ""
		}
		switch key {
		case "Installed":
			c.Installed = value
		case "Candidate":
			c.Available = value
		default:
			continue
		}
		found[name] = c
	}
	return found
}

// UpgradePackages brings installed packages to the newest version that apt can
// get, without asking, and copies apt-get's output to out. It removes nothing,
// installs no package of the list that is not there, and restarts no service of
// PostgreSQL, Patroni or HAProxy. Otherwise it is as [InstallPackages].
func UpgradePackages(ctx context.Context, names []string, out io.Writer) error {
	var pkgs []Package
	for _, n := range names {
		pkgs = append(pkgs, Package{Name: n})
	}
	if len(pkgs) == 0 {
		return nil
	}
	if !IsRoot() {
		return fmt.Errorf("upgrade %s: not root: run the command with sudo", strings.Join(names, " "))
	}
	i := installer{dropIn: DropInPath, policy: policyGuard{path: policyPath}}
	return i.install(ctx, pkgs, out, "--only-upgrade", "--no-remove")
}
