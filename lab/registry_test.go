package lab

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

func TestRegistry(t *testing.T) {
	root := t.TempDir()
	there, missing := filepath.Join(root, "there"), filepath.Join(root, "missing")
	must(t, os.Mkdir(there, 0o755))
	reg := registry{dir: filepath.Join(root, "registry"), points: []string{there, missing}}
	check := func(what string, paths map[string]bool) {
		t.Helper()
		for path, want := range paths {
			if _, err := os.Stat(path); (err == nil) != want {
				t.Errorf("%s: %s: %v, want it there: %v", what, path, err, want)
			}
		}
	}

	first, err := reg.claim()
	must(t, err)
	second, err := reg.claim()
	must(t, err)
	check("two labs", map[string]bool{there: true, missing: true})
	must(t, first.release())
	check("one lab", map[string]bool{there: true, missing: true})
	must(t, second.release())
	check("no lab", map[string]bool{there: true, missing: false, reg.dir: false})

	// An owner that dies just lets its lock go.
	dead, err := reg.claim()
	must(t, err)
	must(t, dead.file.Close())
	check("dead lab", map[string]bool{missing: true})
	third, err := reg.claim()
	must(t, err)
	check("after a dead lab", map[string]bool{dead.file.Name(): false, missing: true})
	must(t, os.WriteFile(filepath.Join(missing, "installed"), nil, 0o600))
	must(t, third.release())
	check("not empty", map[string]bool{missing: true, reg.dir: false})
}

func TestOrphaned(t *testing.T) {
	const ns = "pid:[1]"
	start := func(pid int) (string, error) {
		switch pid {
		case 10:
			return "555", nil
		case 11:
			return "", fs.ErrPermission
		}
		return "", fmt.Errorf("read: %w", fs.ErrNotExist)
	}
	for environ, want := range map[string]bool{
		"":                                   false,
		"HOME=/\x00PATH=/bin":                false,
		ownerEnv + "=10:555:" + ns:           false, // lives
		ownerEnv + "=10:444:" + ns:           true,  // the PID has been used again
		ownerEnv + "=12:555:" + ns:           true,  // dead
		"A=b\x00" + ownerEnv + "=12:1:" + ns: true,
		ownerEnv + "=11:555:" + ns:           false, // cannot tell
		ownerEnv + "=12:555:pid:[2]":         false, // cannot be judged from here
		ownerEnv + "=x:555:" + ns:            false,
		ownerEnv + "=12":                     false,
	} {
		if got := orphaned(environ, ns, start); got != want {
			t.Errorf("orphaned(%q) = %v, want %v", environ, got, want)
		}
	}
}
