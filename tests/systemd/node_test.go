package systemd_test

import (
	"context"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/tests/systemd/machine"
)

// within bounds one wait, generously: it is there to end a test that hangs, not
// to measure.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), d, fmt.Errorf("not within %s", d))
	t.Cleanup(cancel)
	return ctx
}

// enter types a command on the machine and logs it with all that it prints, as
// it stands on the operator's screen. It fails the test unless the command ends
// with the exit status want.
func enter(ctx context.Context, t *testing.T, m *machine.Machine, want int, args ...string) string {
	t.Helper()
	out, err := m.Run(ctx, args...)
	t.Logf("root@%s:~# %s\n%s", m.Name(), strings.Join(args, " "), out)
	if got, err := exitStatus(err); err != nil || got != want {
		t.Fatalf("exit status is %d, want %d (error %v)", got, want, err)
	}
	return out
}

// exitStatus takes the exit status out of an error of Run; other errors remain.
func exitStatus(err error) (int, error) {
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode(), nil
	}
	return 0, err
}

// status asks the machine's pgha. The command's exit status has to be that of
// the health it prints.
func status(ctx context.Context, m *machine.Machine) (node.Status, error) {
	var s node.Status
	out, err := m.Run(ctx, "pgha", "status", "--json")
	code, err := exitStatus(err)
	if err != nil {
		return s, err
	}
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		return s, fmt.Errorf("read pgha status of %s: %w: %s", m.Name(), err, out)
	}
	if code != int(s.Health) {
		return s, testbed.Stop(fmt.Errorf("pgha status on %s ends with %d and says %q", m.Name(), code, s.Health))
	}
	return s, nil
}

// waitStatus asks the machine's pgha until ok accepts the answer.
func waitStatus(t *testing.T, m *machine.Machine, what string, ok func(node.Status) bool) node.Status {
	t.Helper()
	ctx := within(t, 4*time.Minute)
	start := time.Now()
	var s node.Status
	err := testbed.Until(ctx, what, func() (err error) {
		if s, err = status(ctx, m); err != nil {
			return err
		}
		if !ok(s) {
			return fmt.Errorf("status is %s: %s %v; %s", s.Health, s.Verdict, s.ToDo, testbed.Members(s))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %s after %.1f s", m.Name(), what, time.Since(start).Seconds())
	return s
}

func waitHealthy(t *testing.T, machines ...*machine.Machine) (s node.Status) {
	t.Helper()
	for _, m := range machines {
		s = waitStatus(t, m, "healthy", func(s node.Status) bool { return s.Health == node.Healthy })
	}
	return s
}

// certPool returns the CA that the machine's pgha gives to clients.
func certPool(t *testing.T, m *machine.Machine) *x509.CertPool {
	t.Helper()
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(must(t.Context(), t, m, "pgha", "cert", "ca"))) {
		t.Fatal("pgha cert ca printed no certificate")
	}
	return pool
}

// process is one that runs on a machine.
type process struct{ pid, user, args string }

func processes(ctx context.Context, t *testing.T, m *machine.Machine) []process {
	t.Helper()
	var all []process
	for line := range strings.Lines(must(ctx, t, m, "ps", "-ww", "-eo", "pid=,user=,args=")) {
		if f := strings.Fields(line); len(f) > 2 {
			all = append(all, process{f[0], f[1], strings.Join(f[2:], " ")})
		}
	}
	return all
}

// children returns what must live on when the daemon does not: Patroni, the
// postmaster, and HAProxy's master and worker, with their process ids.
func children(ctx context.Context, t *testing.T, m *machine.Machine) map[string][]string {
	t.Helper()
	found := map[string][]string{}
	for _, p := range processes(ctx, t, m) {
		for name, part := range map[string]string{
			"patroni": "/patroni/patroni.yml", "postgres": "/bin/postgres -D ", "haproxy": "/usr/sbin/haproxy ",
		} {
			if strings.Contains(p.args, part) {
				found[name] = append(found[name], p.pid)
			}
		}
	}
	for name, count := range map[string]int{"patroni": 1, "postgres": 1, "haproxy": 2} {
		if len(found[name]) != count {
			t.Errorf("%s runs %d processes of %s, want %d: %v", m.Name(), len(found[name]), name, count, found[name])
		}
	}
	return found
}

// ours returns the processes that a node runs, whoever their parent is.
func ours(ctx context.Context, t *testing.T, m *machine.Machine) []process {
	t.Helper()
	var found []process
	for _, p := range processes(ctx, t, m) {
		if p.user == "postgres" || p.user == "haproxy" || strings.Contains(p.args, "pgha") {
			found = append(found, p)
		}
	}
	return found
}

// show returns a property of pgha's unit.
func show(ctx context.Context, t *testing.T, m *machine.Machine, property string) string {
	t.Helper()
	return must(ctx, t, m, "systemctl", "show", "--value", "--property="+property, "pgha.service")
}

// stops is what PostgreSQL's log says of how it was stopped and started.
type stops struct{ clean, crashed int }

func postgresStops(ctx context.Context, t *testing.T, m *machine.Machine) stops {
	t.Helper()
	log := must(ctx, t, m, "sh", "-c", "cat /var/log/pgha/postgres/* /var/log/pgha/patroni.log*")
	return stops{
		clean: strings.Count(log, "database system is shut down"),
		crashed: strings.Count(log, "database system was not properly shut down") +
			strings.Count(log, "database system was interrupted") +
			// A former primary is recovered by Patroni, past PostgreSQL's log.
			strings.Count(log, "doing crash recovery in a single user mode"),
	}
}
