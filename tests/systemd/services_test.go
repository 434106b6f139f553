package systemd_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"pgha/node"
	"pgha/systemd"
	"pgha/tests/systemd/machine"
)

// TestServicesOfTheDistribution makes a node of a host that runs Debian's own
// PostgreSQL and HAProxy, and takes it back.
func TestServicesOfTheDistribution(t *testing.T) {
	ctx := within(t, 10*time.Minute)
	m := machine.Network(t).Boot(t, "old")
	if err := m.Copy(bin, program); err != nil {
		t.Fatal(err)
	}
	must(ctx, t, m, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--yes", "--quiet", "--no-install-recommends", "postgresql", "haproxy")
	must(ctx, t, m, "systemctl", "disable", "haproxy") // it runs all the same
	mine := func(sql string) string {
		t.Helper()
		return must(ctx, t, m, "su", "postgres", "-c", `cd / && psql -XAt -p 5432 -c "`+sql+`"`)
	}
	mine("CREATE TABLE mine AS SELECT 42 AS n")
	before := services(ctx, t, m)
	want := map[string]string{
		"postgresql.service": "enabled active", "postgresql@" + machine.Postgres() + "-main.service": "enabled-runtime active", "haproxy.service": "disabled active",
	}
	if d := cmp.Diff(want, before); d != "" {
		t.Fatalf("services of a host before pgha (-want +got):\n%s", d)
	}

	t.Run("an init that is refused puts them back", func(t *testing.T) {
		unit := filepath.Join(t.TempDir(), "taken.socket")
		if err := os.WriteFile(unit, []byte("[Socket]\nListenStream=8432\nAccept=yes\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		for inside, file := range map[string]string{"/etc/systemd/system/taken.socket": unit, "/etc/systemd/system/taken@.service": "/dev/null"} {
			if err := m.Copy(file, inside); err != nil {
				t.Fatal(err)
			}
		}
		must(ctx, t, m, "systemctl", "start", "taken.socket")
		out := enter(ctx, t, m, 1, "pgha", "init", "--yes")
		if !strings.Contains(out, "8432") || !strings.Contains(out, "systemd") {
			t.Error("the refusal does not name the port and who has it")
		}
		if d := cmp.Diff(before, services(ctx, t, m)); d != "" {
			t.Errorf("services after a refused init (-before +after):\n%s", d)
		}
		must(ctx, t, m, "systemctl", "stop", "taken.socket")
		enter(ctx, t, m, int(node.Unknown), "pgha", "status")
	})

	t.Run("init stops them", func(t *testing.T) {
		enter(ctx, t, m, 0, "pgha", "init", "--yes")
		want := map[string]string{
			"postgresql.service": "masked inactive", "postgresql@" + machine.Postgres() + "-main.service": "masked inactive", "haproxy.service": "masked inactive",
		}
		if d := cmp.Diff(want, services(ctx, t, m)); d != "" {
			t.Errorf("services of a node (-want +got):\n%s", d)
		}
		for _, p := range processes(ctx, t, m) {
			if strings.Contains(p.args, "/var/lib/postgresql") || strings.Contains(p.args, "/etc/haproxy") {
				t.Errorf("still running: %v", p)
			}
		}
	})
	t.Run("packages that are installed again restart nothing", func(t *testing.T) { packagesAgain(ctx, t, m) })
	if t.Failed() {
		return
	}

	t.Run("reset puts them back", func(t *testing.T) {
		enter(ctx, t, m, 0, "pgha", "reset", "--yes")
		must(ctx, t, m, "test", "!", "-e", systemd.NeedrestartPath)
		checkBack := func() {
			t.Helper()
			if d := cmp.Diff(before, services(ctx, t, m)); d != "" {
				t.Errorf("services (-before pgha +now):\n%s", d)
			}
			if got := mine("SELECT n FROM mine"); got != "42" {
				t.Errorf("the host's own PostgreSQL has %q, want 42", got)
			}
		}
		checkBack()
		if got := show(ctx, t, m, "LoadState"); got != "not-found" {
			t.Errorf("pgha's unit is %s", got)
		}
		for _, p := range processes(ctx, t, m) {
			if strings.Contains(p.args, "pgha") {
				t.Errorf("still running: %v", p)
			}
		}
		if err := m.Reboot(ctx); err != nil {
			t.Fatal(err)
		}
		// What was not enabled does not run after a boot; this one did before.
		must(ctx, t, m, "systemctl", "start", "haproxy")
		checkBack()
	})
}

// services returns whether the services of the host are enabled and active.
func services(ctx context.Context, t *testing.T, m *machine.Machine) map[string]string {
	t.Helper()
	states := map[string]string{}
	for _, unit := range []string{"postgresql.service", "postgresql@" + machine.Postgres() + "-main.service", "haproxy.service"} {
		states[unit] = unitStates(ctx, t, m, unit)
	}
	return states
}
