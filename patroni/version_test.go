package patroni

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestParseVersion(t *testing.T) {
	for in, want := range map[string]Version{
		"patroni 3.0.2\n": {3, 0, 2}, "4.1": {4, 1, 0}, "patroni 10.11.12rc1": {10, 11, 12},
	} {
		got, err := ParseVersion(in)
		if err != nil || got != want {
			t.Errorf("ParseVersion(%q) = %v, %v, want %v", in, got, err, want)
		}
	}
	for _, in := range []string{"", "patroni", "4", "a.b.c"} {
		if v, err := ParseVersion(in); err == nil {
			t.Errorf("ParseVersion(%q) = %v, want an error", in, v)
		}
	}
}

func TestVersionRules(t *testing.T) {
	for _, tc := range []struct {
		v                          Version
		supported, steals, forgets bool
	}{
		{Version{2, 1, 7}, false, true, true}, {Version{3, 0, 0}, true, true, true}, {Version{3, 0, 2}, true, true, true},
		{Version{3, 0, 3}, true, false, true}, {Version{3, 1, 1}, true, false, true}, {Version{3, 1, 2}, true, false, false},
		{Version{4, 0, 0}, true, false, false},
	} {
		if got := tc.v.Supported() == nil; got != tc.supported {
			t.Errorf("%s supported: %v, want %v", tc.v, got, tc.supported)
		}
		if got := tc.v.StealsLeaderKey(); got != tc.steals {
			t.Errorf("%s steals the leader key: %v, want %v", tc.v, got, tc.steals)
		}
		if got := tc.v.ForgetsStandbys(); got != tc.forgets || tc.v.NeedsLauncher() != (tc.steals || tc.forgets) {
			t.Errorf("%s forgets its standbys: %v, want %v; needs the launcher: %v", tc.v, got, tc.forgets, tc.v.NeedsLauncher())
		}
	}
}

func script(t *testing.T, body string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "program")
	must(t, os.WriteFile(path, []byte(body), 0o755))
	return path
}

func TestInstalledVersion(t *testing.T) {
	v, err := InstalledVersion(t.Context(), script(t, "#!/bin/sh\necho patroni 4.1.0"))
	if err != nil || v != (Version{4, 1, 0}) {
		t.Errorf("got %v, %v", v, err)
	}
	if _, err := InstalledVersion(t.Context(), script(t, "#!/bin/sh\necho no module named patroni >&2; exit 1")); err == nil || !strings.Contains(err.Error(), "no module named patroni") {
		t.Errorf("error %v does not say why", err)
	}
	if _, err := InstalledVersion(t.Context(), "/nonexistent/patroni"); err == nil {
		t.Error("a missing program has a version")
	}
}
