package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/internal/host"
	"pgha/patroni"
)

// Free space below which a node is not made, in bytes.
const (
	minFreeData    = 1 << 30
	minFreeWitness = 200 << 20
)

// CheckRoot refuses to go on without root, which everything that changes the
// host needs.
func CheckRoot() error {
	if host.IsRoot() {
		return nil
	}
	return errors.New("this needs root: run it with sudo")
}

// CheckFresh refuses a host that is a node already, or that holds another
// node's files. again is the state of an interrupted init or join that may be
// run again.
func CheckFresh(p Paths, founder bool) (again *State, err error) {
	s, err := LoadState(p)
	switch {
	case errors.Is(err, ErrNoNode):
	case err != nil:
		return nil, err
	case s.Phase == PhasePreparing && s.Founder == founder:
		return &s, nil
	case s.Phase == PhasePreparing:
		return nil, fmt.Errorf("%s was interrupted on this host: finish it by running it again, or clean up with pgha reset", initOrJoin(s))
	default:
		return nil, fmt.Errorf("this host is already node %q of cluster %q (%s): see pgha status; to use it for another cluster, pgha reset first", s.Node, s.ClusterName, s.ClusterID)
	}
	for dir, what := range map[string]string{p.etcd(): "etcd data", p.PKI(): "certificates"} {
		empty, err := host.DirEmpty(dir)
		if err != nil {
			return nil, err
		}
		if !empty {
			return nil, fmt.Errorf("%s holds the %s of a node, but %s is missing: restore that file if this is still a node, or move %s away", dir, what, p.State(), p.Lib)
		}
	}
	if _, err := os.Stat(p.Config()); err == nil {
		return nil, fmt.Errorf("%s is there, but this host is no node: move it away first", p.Config())
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for a configuration: %w", err)
	}
	return nil, nil
}

// CheckAddress refuses an address that this host does not have.
func CheckAddress(c Config) error {
	ok, err := host.HasAddress(c.Address)
	if err != nil {
		return err
	}
	if !ok {
		return fmt.Errorf("address %s is not on this host: give the one that the other nodes reach it by (--address)", c.Address)
	}
	return nil
}

// CheckPorts refuses when another program listens on a port of the node.
func CheckPorts(c Config) error {
	var taken []string
	for _, u := range portList(c.Ports) {
		if c.Role == cluster.RoleWitness && !u.Witness {
			continue
		}
		proc, pid, found, err := host.PortOwner(u.Port)
		if err != nil {
			return err
		}
		switch {
		case found && pid == 0:
			taken = append(taken, fmt.Sprintf("port %d (%s) is taken by %s", u.Port, u.Key, proc))
		case found:
			taken = append(taken, fmt.Sprintf("port %d (%s) is taken by %s (pid %d)", u.Port, u.Key, proc, pid))
		}
	}
	if len(taken) > 0 {
		return fmt.Errorf("%s: stop what listens there, or choose another port (--port NAME=N)", strings.Join(taken, ", "))
	}
	return nil
}

// CheckDisk refuses a host whose disk is nearly full.
func CheckDisk(p Paths, c Config) error {
	need, dirs := uint64(minFreeWitness), []string{p.Lib}
	if c.Role == cluster.RoleData {
		need = minFreeData
		if c.Postgres.DataDir != "" { // not chosen yet: it is going to be below Lib, or adopted
			dirs = append(dirs, c.Postgres.DataDir)
		}
	}
	for _, d := range dirs {
		free, total, err := host.DiskFree(d)
		if err != nil {
			return err
		}
		if free < need {
			return fmt.Errorf("the disk of %s is nearly full: %s free of %s, a %s node needs %s at least: free some space", d, FormatBytes(free), FormatBytes(total), c.Role, FormatBytes(need))
		}
	}
	return nil
}

// CheckDataDir refuses a data directory that is not empty.
func CheckDataDir(dir string) error {
	empty, err := host.DirEmpty(dir)
	if err != nil {
		return err
	}
	if !empty {
		return fmt.Errorf("data directory %s is not empty: move it away, or take it over as the first node with pgha init --adopt %s", dir, dir)
	}
	return nil
}

// CheckAdoptable refuses a directory that is not the data of a PostgreSQL that
// was shut down in order. It returns what it found.
func CheckAdoptable(dir string) (patroni.DataDirInfo, error) {
	info, err := patroni.InspectDataDir(dir)
	if err != nil {
		return info, err
	}
	switch {
	case info.State != patroni.DataDirValid:
		return info, fmt.Errorf("%s is not a PostgreSQL data directory", dir)
	case info.Standby:
		return info, fmt.Errorf("%s belongs to a standby: adopt the primary's data directory", dir)
	case info.Running:
		return info, fmt.Errorf("a PostgreSQL runs on %s (pid %d): stop it first (systemctl stop postgresql)", dir, info.PID)
	case !info.CleanShutdown:
		return info, fmt.Errorf("the PostgreSQL of %s was not shut down in order: start it, stop it, and try again", dir)
	}
	return info, nil
}

// MissingPackages lists the distribution's packages that a node of this role
// still needs.
func MissingPackages(role cluster.NodeRole) []host.Package { return host.MissingPackages(string(role)) }

// CheckPatroni refuses a Patroni that pgha cannot run.
func CheckPatroni(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	v, err := patroni.InstalledVersion(ctx, patroniBin)
	if err != nil {
		return fmt.Errorf("ask Patroni for its version: %w", err)
	}
	return v.Supported()
}

// ChoosePostgres returns the directory of PostgreSQL's programs: of the given
// major version, or the newest one that pgha can run when major is 0.
func ChoosePostgres(major int) (host.PG, error) {
	found, err := host.PostgresBinDirs()
	if err != nil {
		return host.PG{}, err
	}
	return choosePostgres(found, major)
}

// choosePostgres chooses among the installed ones, which stand newest first.
func choosePostgres(found []host.PG, major int) (host.PG, error) {
	var unfit error
	for _, pg := range found {
		if major != 0 && pg.Major != major {
			continue
		}
		err := patroni.SupportedPostgres(pg.Major)
		if err == nil {
			return pg, nil
		}
		unfit = err
	}
	switch {
	case unfit != nil:
		return host.PG{}, unfit
	case major == 0:
		return host.PG{}, errors.New("no PostgreSQL is installed: install postgresql")
	}
	return host.PG{}, fmt.Errorf("PostgreSQL %d is needed and not installed here: install postgresql-%d", major, major)
}

// DefaultDataDir is where a node keeps PostgreSQL's data.
func DefaultDataDir(p Paths, major int) string {
	return filepath.Join(p.Lib, "postgres", fmt.Sprint(major), "data")
}
