package patroni

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// TestDataDir looks at a data directory from real initdb and spoils it.
func TestDataDir(t *testing.T) {
	l := &lab{}
	for major := newestPostgres; major >= oldestPostgres && l.pgBin == ""; major-- {
		if path := fmt.Sprintf("/usr/lib/postgresql/%d/bin", major); fileExists(path + "/initdb") {
			l.pgBin, l.pgMajor = path, major
		}
	}
	parent, err := os.MkdirTemp("", "pghadd")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(parent)) })
	cred, err := osCredential()
	must(t, err)
	must(t, os.Chown(parent, int(cred.Uid), int(cred.Gid)))
	dir := filepath.Join(parent, "pg")

	inspect := func(want DataDirState) DataDirInfo {
		t.Helper()
		info, err := InspectDataDir(dir)
		must(t, err)
		if info.State != want {
			t.Errorf("state %v, want %v", info.State, want)
		}
		return info
	}
	inspect(DataDirEmpty)
	if _, err := SystemIdentifier(dir, ""); !errors.Is(err, ErrNoDatabase) {
		t.Errorf("system identifier of nothing: %v", err)
	}

	cmd := exec.Command(l.pgBin+"/initdb", "-D", dir, "--no-sync", "--auth=peer")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	cmd.Dir = "/"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("initdb: %v: %s", err, out)
	}
	info := inspect(DataDirValid)
	for _, bin := range []string{"", l.pgBin} {
		id, err := SystemIdentifier(dir, bin)
		if err != nil || id != info.SystemID {
			t.Errorf("SystemIdentifier with programs %q: %q, %v, want %q", bin, id, err, info.SystemID)
		}
	}
	if info.Major != l.pgMajor || !info.CleanShutdown || info.Running || info.Standby || !info.Config || info.Tablespaces || info.UID != int(cred.Uid) {
		t.Errorf("after initdb: %+v", info)
	}
	wantSums := l.pgMajor >= 18 // the release that made them the default
	if on, err := DataChecksums(dir, l.pgBin); err != nil || on != wantSums {
		t.Errorf("checksums: %v, %v", on, err)
	}

	must(t, os.WriteFile(dir+"/standby.signal", nil, 0o600))
	must(t, os.Symlink("/nonexistent", dir+"/pg_tblspc/16384"))
	// A pid that lives, but of a process elsewhere.
	must(t, os.WriteFile(dir+"/postmaster.pid", fmt.Appendf(nil, "%d\n%s\n", os.Getpid(), dir), 0o600))
	if info := inspect(DataDirValid); !info.Standby || !info.Tablespaces || info.Running {
		t.Errorf("as a standby with a stale pid: %+v", info)
	}

	control := dir + "/global/pg_control"
	data, err := os.ReadFile(control)
	must(t, err)
	spoilt := append([]byte(nil), data...)
	spoilt[40] ^= 0xff
	must(t, os.WriteFile(control, spoilt, 0o600))
	if _, err := SystemIdentifier(dir, l.pgBin); !errors.Is(err, ErrNoDatabase) || !strings.Contains(err.Error(), "damaged") {
		t.Errorf("system identifier under a wrong checksum: %v", err)
	}
	for what, content := range map[string][]byte{"short": data[:7], "empty": nil, "zero": make([]byte, len(data))} {
		must(t, os.WriteFile(control, content, 0o600))
		inspect(DataDirPartial)
		if _, err := SystemIdentifier(dir, ""); !errors.Is(err, ErrNoDatabase) {
			t.Errorf("%s control file: %v", what, err)
		}
	}
	must(t, os.Remove(control))
	inspect(DataDirPartial)
}

func TestInspectDataDirOddities(t *testing.T) {
	dir := t.TempDir()
	must(t, os.Mkdir(dir+"/lost+found", 0o700))
	must(t, os.WriteFile(dir+"/.hidden", nil, 0o600))
	if info, err := InspectDataDir(dir); err != nil || info.State != DataDirEmpty {
		t.Errorf("a fresh file system: %+v, %v", info, err)
	}
	if _, err := InspectDataDir(dir + "/.hidden"); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file: %v", err)
	}
	must(t, os.WriteFile(dir+"/PG_VERSION", []byte("fifteen"), 0o600))
	if _, err := InspectDataDir(dir); err == nil || !strings.Contains(err.Error(), "PG_VERSION") {
		t.Errorf("an odd PG_VERSION: %v", err)
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
