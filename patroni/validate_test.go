package patroni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestValidate gives real Patroni a good file and bad ones.
func TestValidate(t *testing.T) {
	l := newLab(t)
	m := l.member(t, "n1", "127.0.0.1")
	n := l.node(t, m, m)
	write := func(content string) {
		t.Helper()
		must(t, os.WriteFile(n.yaml, []byte(content), 0o600))
		must(t, os.Chown(n.yaml, l.uid, l.gid))
	}
	data, err := Render(n.conf)
	must(t, err)
	good := string(data)
	write(good)
	must(t, Validate(t.Context(), l.bin, n.yaml))

	for what, tc := range map[string]struct{ old, new, want string }{
		"no scope":            {`scope: "` + labScope + `"`, "", "scope  is not defined"},
		"program directory":   {l.pgBin, "/nonexistent", "'/nonexistent' does not exist"},
		"not YAML":            {"restapi:", "restapi: [", "while parsing"},
		"a number for a name": {`name: "n1"`, "name: 1", "name 1 is not a string"},
		"watchdog":            {`mode: "off"`, `mode: "maybe"`, "watchdog.mode"},
		"tag":                 {"tags: {}", "tags: {nofailover: 3}", "tags.nofailover"},
	} {
		t.Run(what, func(t *testing.T) {
			if !strings.Contains(good, tc.old) {
				t.Fatalf("the file has no %q", tc.old)
			}
			write(strings.Replace(good, tc.old, tc.new, 1))
			if err := Validate(t.Context(), l.bin, n.yaml); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("error %v, want one with %q", err, tc.want)
			}
		})
	}

	write(good)
	must(t, os.MkdirAll(n.conf.DataDir, 0o755))
	must(t, os.WriteFile(filepath.Join(n.conf.DataDir, "file"), nil, 0o644))
	if err := Validate(t.Context(), l.bin, n.yaml); err == nil || !strings.Contains(err.Error(), "valid data directory") {
		t.Errorf("a directory with other files: %v", err)
	}
	if err := Validate(t.Context(), "/nonexistent/patroni", n.yaml); err == nil {
		t.Error("a missing program validates")
	}
	if err := Validate(t.Context(), l.bin, n.yaml+".missing"); err == nil {
		t.Error("a missing file is valid")
	}
}
