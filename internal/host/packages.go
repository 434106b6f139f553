package host

import (
	"bufio"
	"cmp"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
)

// The roles of a node, as MissingPackages knows them.
const (
	RoleData    = "data"
	RoleWitness = "witness"
)

// Package is a package of the distribution that a node needs.
type Package struct {
	// Name is the package's name.
	Name string
	// Why says in a few words what it is for.
	Why string
}

// MissingPackages gives the packages that a node of the role needs and the host
// lacks. Programs count however they were installed: what matters is that they
// are there. A witness needs none.
func MissingPackages(role string) []Package {
	if role == RoleWitness {
		return nil
	}
	var missing []Package
	if pgs, err := PostgresBinDirs(); err != nil || len(pgs) == 0 {
		missing = append(missing, Package{"postgresql", "the database server"})
	}
	if patroni, err := lookBinary("patroni"); err != nil {
		missing = append(missing,
			Package{"patroni", "runs PostgreSQL and follows the cluster's leader"},
			Package{"python3-etcd", "Patroni's way to etcd"}, Package{"python3-idna", "verifies etcd's certificate"})
	} else if !speaksEtcd(patroni) {
		missing = append(missing, Package{"python3-etcd", "Patroni's way to etcd"}, Package{"python3-idna", "verifies etcd's certificate"})
	}
	if _, err := lookBinary("haproxy"); err != nil {
		missing = append(missing, Package{"haproxy", "leads connections to the primary"})
	}
	return missing
}

// speaksEtcd reports whether the interpreter that runs Patroni finds what
// Patroni's etcd v3 client imports, idna included: without it urllib3's OpenSSL
// fails on a certificate with a DNS name, and Patroni says that it has no
// configuration store. Debian's package of Patroni is content with
// the client of any of five stores.
func speaksEtcd(patroni string) bool {
	f, err := os.Open(patroni)
	if err != nil {
		return false
	}
	defer func() { _ = f.Close() }()
	line, err := bufio.NewReader(f).ReadString('\n')
	if err != nil {
		return false
	}
	shebang, ok := strings.CutPrefix(strings.TrimSpace(line), "#!")
	interpreter := strings.Fields(shebang)
	if !ok || len(interpreter) == 0 {
		return true // no script: a build that carries its libraries with it
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, interpreter[0], append(interpreter[1:], "-c", "import patroni.dcs.etcd3, idna")...)
	return cmd.Run() == nil
}

// lookBinary finds a program in PATH or, as the PATH of an ordinary user and of
// su lacks them, in the system's directories.
func lookBinary(name string) (string, error) {
	path, err := exec.LookPath(name)
	if err == nil {
		return path, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin"} {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("find program %s: %w", name, err)
}

// PG is an installed PostgreSQL.
type PG struct {
	// Major is the major version.
	Major int
	// BinDir is the directory of postgres, initdb and so on.
	BinDir string
}

// PostgresBinDirs gives the PostgreSQL servers that the distribution or PGDG
// has installed, the newest first. It is empty where there are none.
func PostgresBinDirs() ([]PG, error) { return postgresBinDirs("/usr") }

func postgresBinDirs(usr string) ([]PG, error) {
	var found []PG
	for _, layout := range []string{"lib/postgresql/*/bin/postgres", "pgsql-*/bin/postgres"} {
		paths, err := filepath.Glob(filepath.Join(usr, layout))
		if err != nil {
			return nil, fmt.Errorf("look for PostgreSQL: %w", err)
		}
		for _, path := range paths {
			bin := filepath.Dir(path)
			version := strings.TrimPrefix(filepath.Base(filepath.Dir(bin)), "pgsql-")
			if major, err := strconv.Atoi(version); err == nil { // else 9.6 or a stranger
				found = append(found, PG{Major: major, BinDir: bin})
			}
		}
	}
	slices.SortFunc(found, func(a, b PG) int { return cmp.Or(b.Major-a.Major, cmp.Compare(a.BinDir, b.BinDir)) })
	return found, nil
}

// PatroniVersion asks the installed Patroni for its version.
func PatroniVersion(ctx context.Context) (major, minor, patch int, err error) {
	return programVersion(ctx, "patroni", "--version")
}

// HAProxyVersion asks the installed HAProxy for its version.
func HAProxyVersion(ctx context.Context) (major, minor, patch int, err error) {
	return programVersion(ctx, "haproxy", "-v")
}

func programVersion(ctx context.Context, name, arg string) (major, minor, patch int, err error) {
	path, err := lookBinary(name)
	if err != nil {
		return 0, 0, 0, err
	}
	out, err := exec.CommandContext(ctx, path, arg).Output()
	if err != nil {
		return 0, 0, 0, fmt.Errorf("ask %s for its version: %w", name, err)
	}
	major, minor, patch, err = parseVersion(string(out))
	if err != nil {
		return 0, 0, 0, fmt.Errorf("ask %s for its version: %w", name, err)
	}
	return major, minor, patch, nil
}

// dotted is a version; HAProxy's development versions have a word for a patch.
var dotted = regexp.MustCompile(`\b(\d+)\.(\d+)(?:\.(\d+))?`)

func parseVersion(out string) (major, minor, patch int, err error) {
	line, _, _ := strings.Cut(out, "\n")
	m := dotted.FindStringSubmatch(line)
	if m == nil {
		return 0, 0, 0, fmt.Errorf("no version in %q", line)
	}
	var n [3]int
	for i, s := range m[1:] {
		if s == "" {
			continue
		}
		if n[i], err = strconv.Atoi(s); err != nil {
			return 0, 0, 0, fmt.Errorf("version in %q: %w", line, err)
		}
	}
	return n[0], n[1], n[2], nil
}
