package systemd_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/systemd"
	"pgha/tests/systemd/machine"
)

// packagesAgain unpacks and configures the packages of a running node once more,
// as an upgrade does, and calls what their scripts may call. Nothing may restart
// until an operator says so.
func packagesAgain(ctx context.Context, t *testing.T, m *machine.Machine) {
	waitStatus(t, m, "the primary", func(s node.Status) bool { return s.Leader == m.Name() })
	must(ctx, t, m, "test", "-e", systemd.NeedrestartPath)
	before := children(ctx, t, m)
	enter(ctx, t, m, 0, "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "--reinstall", "--yes", "--quiet",
		"postgresql-"+machine.Postgres(), "postgresql-common", "patroni", "haproxy")
	for _, args := range [][]string{
		{"invoke-rc.d", "postgresql", "restart"}, {"invoke-rc.d", "postgresql", "stop", machine.Postgres()}, {"invoke-rc.d", "haproxy", "restart"}, {"invoke-rc.d", "patroni", "restart"},
		{"deb-systemd-invoke", "restart", "postgresql.service", "haproxy.service", "patroni.service"},
		{"systemctl", "try-restart", "postgresql.service", "haproxy.service", "patroni.service"},
	} {
		out, err := m.Run(ctx, args...) // whether it is content is its own affair
		t.Logf("%s: %v %s", strings.Join(args, " "), err, out)
	}
	if d := cmp.Diff(before, children(ctx, t, m)); d != "" {
		t.Errorf("processes before and after (-before +after):\n%s", d)
	}
	s := waitStatus(t, m, "to wait for a restart of all parts", func(s node.Status) bool {
		return slices.ContainsFunc(s.ToDo, func(todo string) bool {
			return strings.Contains(todo, "new versions are installed on "+m.Name()+" (postgresql, patroni, haproxy)")
		})
	})
	if s.Leader != m.Name() {
		t.Errorf("the primary is %q", s.Leader)
	}

	// There is no second node to hand over to.
	out, err := m.Run(ctx, "pgha", "upgrade", "postgres", "--yes")
	if err == nil || !strings.Contains(out, "pgha restart "+m.Name()) {
		t.Errorf("pgha upgrade postgres on a single node: %v: %s", err, out)
	}
	enter(ctx, t, m, 0, "pgha", "restart", "--yes", "--pending", m.Name())
	waitStatus(t, m, "to wait for nothing", func(s node.Status) bool {
		return s.Leader == m.Name() && !strings.Contains(strings.Join(s.ToDo, "\n"), "new versions")
	})
	err = testbed.Until(ctx, "HAProxy's old worker to end", func() error {
		out, err := m.Run(ctx, "pgrep", "-c", "-x", "haproxy")
		if err == nil && strings.TrimSpace(out) != "2" {
			err = fmt.Errorf("there are %s processes", strings.TrimSpace(out))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	after := children(ctx, t, m)
	for _, part := range []string{"patroni", "postgres"} {
		if slices.Equal(before[part], after[part]) {
			t.Errorf("%s has the processes %v, as before", part, after[part])
		}
	}
	if slices.Equal(before["haproxy"], after["haproxy"]) {
		t.Errorf("haproxy has the processes %v, as before", after["haproxy"])
	}
}
