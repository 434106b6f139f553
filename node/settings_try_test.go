package node

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"pgha/cluster"
	"pgha/patroni"
)

// trialNode is a data node with the two files of a database that a trial reads.
func trialNode(t *testing.T) *Node {
	t.Helper()
	o, err := lookupOwners(cluster.RoleData)
	if err != nil {
		t.Fatal(err)
	}
	p := tempPaths(t)
	// PostgreSQL's user has to get there.
	if err := os.Chmod(filepath.Dir(filepath.Dir(p.Lib)), 0o711); err != nil {
		t.Fatal(err)
	}
	n := &Node{paths: p, cfg: testConfig("n1", cluster.RoleData), owners: o}
	n.cfg.Postgres.DataDir = filepath.Join(p.Lib, "data")
	for _, d := range []string{p.patroniDir(), filepath.Join(n.cfg.Postgres.DataDir, "global")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write(t, filepath.Join(n.cfg.Postgres.DataDir, "PG_VERSION"), "15\n")
	write(t, filepath.Join(n.cfg.Postgres.DataDir, "global/pg_control"), "x")
	return n
}

func TestTrialDir(t *testing.T) {
	n := trialNode(t)
	dir, err := n.trialDir()
	if err != nil {
		t.Fatal(err)
	}
	owner := func(path string) uint32 {
		st, err := os.Lstat(path)
		if err != nil {
			t.Fatal(err)
		}
		return st.Sys().(*syscall.Stat_t).Uid
	}
	if got := owner(dir); got != 0 {
		t.Errorf("the directory of the trial belongs to %d: root writes there again", got)
	}
	for _, name := range []string{"", "global", "PG_VERSION", "global/pg_control"} {
		if got := owner(filepath.Join(trialData(dir), name)); got != n.owners.postgres.UID {
			t.Errorf("data/%s belongs to %d", name, got)
		}
	}

	// PostgreSQL reads a value there, and tells all of its complaint.
	try := func(value string) (string, error) {
		if err := n.trialFile(trialConf(dir), []byte(confLine(patroni.Parameter{Name: "work_mem", Value: value}))); err != nil {
			t.Fatal(err)
		}
		return n.trial(context.Background(), dir, "work_mem")
	}
	if got, err := try("9MB"); got != "9216" && got != "9MB" || err != nil {
		t.Errorf("work_mem is %q, %v", got, err)
	}
	if _, err := try("9XB"); err == nil || !strings.Contains(err.Error(), `invalid value for parameter "work_mem": "9XB": Valid units`) {
		t.Errorf("a wrong unit: %v", err)
	}
}

// The data belongs to PostgreSQL's user, who must not get by the trial what root
// alone may read.
func TestTrialDirFollowsNoLink(t *testing.T) {
	for name, lay := range map[string]func(secret, file string) error{
		"a link": os.Symlink,
		"a relative link": func(secret, file string) error {
			to, err := filepath.Rel(filepath.Dir(file), secret)
			if err != nil {
				return err
			}
			return os.Symlink(to, file)
		},
		"a pipe":           func(_, file string) error { return syscall.Mkfifo(file, 0o600) },
		"a directory":      func(_, file string) error { return os.Mkdir(file, 0o700) },
		"a far larger one": func(_, file string) error { return os.WriteFile(file, make([]byte, dataFileLimit+1), 0o600) },
	} {
		for _, file := range []string{"PG_VERSION", "global/pg_control"} {
			t.Run(name+" for "+file, func(t *testing.T) {
				n := trialNode(t)
				secret := filepath.Join(n.paths.Etc, "secret")
				write(t, secret, "only root's")
				path := filepath.Join(n.cfg.Postgres.DataDir, file)
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
				if err := lay(secret, path); err != nil {
					t.Fatal(err)
				}
				if dir, err := n.trialDir(); err == nil {
					t.Errorf("it was taken, to %s", dir)
				}
				left, err := os.ReadDir(n.paths.patroniDir())
				if err != nil || len(left) > 0 {
					t.Errorf("%v is left of a trial that was not, %v", left, err)
				}
			})
		}
	}
}
