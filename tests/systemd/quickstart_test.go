package systemd_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"

	"pgha/lab/testbed"
	"pgha/node"
	"pgha/tests/systemd/machine"
)

// program is where the quick start puts the binary.
const program = "/usr/local/bin/pgha"

// journey is the README's quick start, and what comes after it in the life of
// three hosts. Its steps build on each other.
type journey struct {
	net       *machine.Net
	n1, n2, w *machine.Machine
	base      int64 // ids of the next writer
}

func TestQuickStart(t *testing.T) {
	n := machine.Network(t)
	j := &journey{net: n, n1: n.Boot(t, "n1"), n2: n.Boot(t, "n2"), w: n.Boot(t, "witness")}
	for _, s := range []struct {
		name string
		run  func(*testing.T)
	}{
		{"init and join", j.initAndJoin},
		{"clients", j.clients},
		{"ports", j.ports},
		{"unit", j.unit},
		{"another program in the daemon's process", j.upgrades},
		{"restart, kill and freeze pgha", j.restarts},
		{"stop and start", j.stopAndStart},
		{"reboots", j.reboots},
		{"power cut of the primary", j.powerCut},
		{"power cut of all", j.powerCutOfAll},
		{"reset and join again", j.resetWitness},
	} {
		start := time.Now()
		if !t.Run(s.name, s.run) {
			return // the next step stands on this one
		}
		t.Logf("%s: %.1f s", s.name, time.Since(start).Seconds())
	}
}

func (j *journey) all() []*machine.Machine { return []*machine.Machine{j.n1, j.n2, j.w} }

var joinCommand = regexp.MustCompile(`pgha join .*`)

func (j *journey) initAndJoin(t *testing.T) {
	ctx := within(t, 10*time.Minute)
	for _, m := range j.all() {
		if err := m.Copy(bin, program); err != nil {
			t.Fatal(err)
		}
	}
	joins := joinCommand.FindAllString(enter(ctx, t, j.n1, 0, "pgha", "init", "--yes"), -1)
	if len(joins) != 2 || !strings.Contains(joins[1], "--witness") {
		t.Fatalf("init printed the join commands %q, want one for a data node and one for a witness", joins)
	}
	checkInstalled(ctx, t, j.n1)

	enter(ctx, t, j.n1, int(node.Degraded), "pgha", "status")
	enter(ctx, t, j.n2, 0, typed(joins[0])...)
	checkInstalled(ctx, t, j.n2)

	before := must(ctx, t, j.w, "dpkg-query", "--show")
	enter(ctx, t, j.w, 0, typed(joins[1])...)
	if after := must(ctx, t, j.w, "dpkg-query", "--show"); after != before {
		t.Errorf("join --witness changed the packages (-before +after):\n%s", cmp.Diff(before, after))
	}

	s := waitHealthy(t, j.all()...)
	if s.Leader != "n1" || !s.Promise.Holds || s.Promise.Mode != "sync" {
		t.Errorf("leader is %q, promise %+v; want n1, and a synchronous promise that holds", s.Leader, s.Promise)
	}
	for _, m := range j.all() {
		enter(ctx, t, m, 0, "pgha", "status")
	}
}

// typed makes a command of a line that pgha printed, without its questions.
func typed(line string) []string {
	args := strings.Fields(line)
	return slices.Insert(args, 2, "--yes")
}

// checkInstalled sees to it that the packages which pgha has installed do not
// compete with it, and that the host is as it was otherwise.
func checkInstalled(ctx context.Context, t *testing.T, m *machine.Machine) {
	t.Helper()
	if out := must(ctx, t, m, "pg_lsclusters", "--no-header"); out != "" {
		t.Errorf("the packages of %s made a PostgreSQL cluster: %s", m.Name(), out)
	}
	for _, unit := range []string{"postgresql.service", "patroni.service", "haproxy.service"} {
		if got := unitStates(ctx, t, m, unit); got != "masked inactive" {
			t.Errorf("%s on %s is %s, want masked and inactive", unit, m.Name(), got)
		}
	}
	if out := must(ctx, t, m, "sh", "-c", "journalctl -q -o cat -u 'postgresql*' -u 'patroni*' -u haproxy | grep Start || true"); out != "" {
		t.Errorf("services of the distribution ran on %s:\n%s", m.Name(), out)
	}
	if out := must(ctx, t, m, "sh", "-c", "ls /usr/sbin/policy-rc.d* 2>/dev/null || true"); out != "" {
		t.Errorf("%s was left on %s", out, m.Name())
	}
}

// unitStates returns whether the unit is enabled, and whether it is active.
func unitStates(ctx context.Context, t *testing.T, m *machine.Machine, unit string) string {
	t.Helper()
	// Exit statuses repeat what is printed.
	return strings.Join(strings.Fields(must(ctx, t, m, "sh", "-c", "systemctl is-enabled "+unit+"; systemctl is-active "+unit+" || true")), " ")
}

func (j *journey) clients(t *testing.T) {
	ctx := within(t, 2*time.Minute)
	for _, args := range testbed.AppSetup() {
		must(ctx, t, j.n1, append([]string{"pgha"}, args...)...)
	}
	pool := certPool(t, j.w)
	for _, m := range []*machine.Machine{j.n1, j.n2} {
		for port, wantReplica := range map[uint16]bool{5432: false, 5433: true} {
			config, err := testbed.AppConfig(j.net, pool, m.Addr(), port)
			if err != nil {
				t.Fatal(err)
			}
			conn, err := pgx.ConnectConfig(ctx, config)
			if err != nil {
				t.Errorf("connect through %s port %d: %v", m.Name(), port, err)
				continue
			}
			var replica bool
			if err := conn.QueryRow(ctx, "SELECT pg_is_in_recovery()").Scan(&replica); err != nil || replica != wantReplica {
				t.Errorf("%s port %d leads to a replica: %t, want %t (error %v)", m.Name(), port, replica, wantReplica, err)
			}
			if err := conn.Close(ctx); err != nil {
				t.Error(err)
			}
			config.TLSConfig = nil
			var plain *pgx.Conn
			if plain, err = pgx.ConnectConfig(ctx, config); err == nil || !strings.Contains(err.Error(), "no encryption") {
				t.Errorf("%s port %d without TLS: error %v, want a refusal by pg_hba.conf", m.Name(), port, err)
			}
			if plain != nil {
				_ = plain.Close(ctx)
			}
		}
		// As the README's client does it, with the CA file from a node.
		for mode, want := range map[string]string{"verify-full": "t", "disable": "no encryption"} {
			out, _ := j.n2.Run(ctx, "env", "PGPASSWORD="+testbed.AppPassword, "psql", "-XAtc", "SELECT NOT pg_is_in_recovery()",
				fmt.Sprintf("host=%s user=%s dbname=%s sslmode=%s sslrootcert=%s", m.Addr(), testbed.AppUser, testbed.AppDatabase, mode,
					node.CAPath(node.DefaultPaths())))
			if !strings.Contains(out, want) {
				t.Errorf("psql with sslmode=%s through %s printed %q, want %q", mode, m.Name(), out, want)
			}
		}
	}
	web := &http.Client{Transport: &http.Transport{DialContext: j.net.Dial, DisableKeepAlives: true}}
	for _, path := range []string{"/rw", "/ro"} {
		res, err := web.Get("http://" + net.JoinHostPort(j.n2.Addr(), "8405") + path)
		if err != nil {
			t.Error(err)
			continue
		}
		body, _ := io.ReadAll(res.Body)
		_ = res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Errorf("the load balancer's probe %s: %s %s", path, res.Status, body)
		}
	}
}

// ports tries every port of a node as a stranger without a certificate would.
func (j *journey) ports(t *testing.T) {
	ctx := within(t, 2*time.Minute)
	for _, p := range []struct {
		port     string
		starttls bool
		client   bool   // hosts of the clients' network may connect
		local    bool   // only the host itself may connect
		cert     bool   // a client certificate is asked for and needed
		plain    string // what a plain-text request from a member gets, "" for nothing at all
	}{
		{port: "5432", starttls: true, client: true},
		{port: "5433", starttls: true, client: true},
		{port: "5442", starttls: true},
		{port: "2379", cert: true, local: true},
		{port: "2380", cert: true},
		{port: "8008", cert: true},
		{port: "8404", client: true},
		{port: "8432", client: true, plain: "400 Bad Request"},
	} {
		// From the bridge, where clients are.
		dial, cancel := context.WithTimeout(ctx, 2*time.Second)
		conn, err := j.net.Dial(dial, "tcp", net.JoinHostPort(j.n1.Addr(), p.port))
		cancel()
		if err == nil {
			_ = conn.Close()
		}
		if (err == nil) != p.client {
			t.Errorf("port %s from a client: error %v, want it open: %t", p.port, err, p.client)
		}
		// From a member, whom the firewall lets through, with the public CA alone.
		from, addr := j.w, j.n1.Addr()
		if p.local {
			if out, err := from.Run(ctx, "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/"+addr+"/"+p.port); err == nil {
				t.Errorf("port %s is open to other hosts: %s", p.port, out)
			}
			from, addr = j.n1, "127.0.0.1"
		}
		args := []string{"openssl", "s_client", "-connect", addr + ":" + p.port, "-verify_return_error",
			"-CAfile", node.CAPath(node.DefaultPaths()), "-verify_ip", addr}
		if p.starttls {
			args = append(args, "-starttls", "postgres")
		}
		script := "(printf 'GET / HTTP/1.0\\r\\n\\r\\n'; sleep 0.5) | " + strings.Join(args, " ")
		out, err := from.Run(ctx, "sh", "-c", script)
		if !strings.Contains(out, "Verify return code: 0 (ok)") && !strings.Contains(out, "Verification: OK") {
			t.Errorf("port %s: its certificate does not verify (%v):\n%s", p.port, err, out)
		}
		if refused := strings.Contains(out, "alert"); refused != p.cert {
			t.Errorf("port %s refuses who has no certificate: %t, want %t\n%s", p.port, refused, p.cert, out)
		}
		if p.starttls {
			continue // clients tries it without TLS
		}
		out, _ = from.Run(ctx, "timeout", "5", "bash", "-c",
			"exec 3<>/dev/tcp/"+addr+"/"+p.port+"; printf 'GET / HTTP/1.0\\r\\n\\r\\n' >&3; cat <&3 | tr -d '\\0'")
		if strings.Contains(out, "200 OK") || !strings.Contains(out, p.plain) {
			t.Errorf("port %s answers plain text with %q, want %q", p.port, out, p.plain)
		}
	}
}

func (j *journey) unit(t *testing.T) {
	ctx := within(t, time.Minute)
	for _, m := range j.all() {
		got := map[string]string{}
		want := map[string]string{
			"Type": "notify", "KillMode": "process", "Restart": "always", "ActiveState": "active", "SubState": "running",
			"UnitFileState": "enabled", "WatchdogUSec": "5s", "StatusText": "running", "NRestarts": "0", "Result": "success",
		}
		for property := range want {
			got[property] = show(ctx, t, m, property)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("unit on %s (-want +got):\n%s", m.Name(), d)
		}
	}
}

// writer starts an application that prefers the HAProxy of the first machine.
func (j *journey) writer(t *testing.T, machines ...*machine.Machine) *testbed.Writer {
	t.Helper()
	var addrs []string
	for _, m := range machines {
		addrs = append(addrs, m.Addr())
	}
	j.base += 1 << 32
	w := testbed.NewWriter(t.Context(), j.net, certPool(t, j.w), j.base, addrs...)
	t.Cleanup(func() { w.Stop() })
	j.ack(t, w)
	return w
}

func (j *journey) ack(t *testing.T, w *testbed.Writer) {
	t.Helper()
	if _, err := w.WaitAck(within(t, 3*time.Minute)); err != nil {
		t.Fatal(err)
	}
}

// check stops the writer and looks for each of its acknowledged commits.
func (j *journey) check(t *testing.T, w *testbed.Writer) (writes []testbed.Write) {
	t.Helper()
	writes = w.Stop()
	out := must(within(t, time.Minute), t, j.n1, "pgha", "psql", "-d", testbed.AppDatabase, "-XAtc",
		fmt.Sprintf("SELECT id FROM t WHERE id >= %d", j.base))
	have := map[string]bool{}
	for line := range strings.Lines(out) {
		have[strings.TrimSpace(line)] = true
	}
	var lost []int64
	for _, id := range testbed.Acked(writes) {
		if !have[fmt.Sprint(id)] {
			lost = append(lost, id)
		}
	}
	if len(lost) > 0 {
		t.Errorf("%d acknowledged commits are lost: %v", len(lost), lost)
	}
	gap, _, _ := testbed.Outage(writes)
	t.Logf("%d writes, %d failed, the longest pause was %.1f s", len(writes), len(testbed.Failed(writes)), gap.Seconds())
	return writes
}

// primary returns the machines of the primary and of the replica.
func (j *journey) primary(t *testing.T) (primary, replica *machine.Machine) {
	t.Helper()
	if s := waitHealthy(t, j.w); s.Leader == j.n2.Name() {
		return j.n2, j.n1
	}
	return j.n1, j.n2
}

// restarts ends the primary's daemon in every way that is no stop. PostgreSQL
// and its clients must not notice, unless the daemon is away for longer than its
// promise, as systemd's watchdog takes to notice a frozen one: then the replica
// may take over.
func (j *journey) restarts(t *testing.T) {
	ctx := within(t, 5*time.Minute)
	p, replica := j.primary(t)
	w := j.writer(t, p, replica)
	before := children(ctx, t, p)
	pid := show(ctx, t, p, "MainPID")
	for _, s := range []struct {
		name    string
		do      []string
		result  string // why systemd started it again; "" for by hand
		restart int
	}{
		{"restart", []string{"systemctl", "restart", "pgha"}, "", 0},
		{"kill -9", []string{"sh", "-c", "kill -9 $(systemctl show --value --property=MainPID pgha)"}, "signal", 1},
		{"freeze", []string{"sh", "-c", "kill -STOP $(systemctl show --value --property=MainPID pgha)"}, "watchdog", 2},
	} {
		must(ctx, t, p, s.do...)
		err := testbed.Until(ctx, "a new daemon after "+s.name, func() error {
			now, state := show(ctx, t, p, "MainPID"), show(ctx, t, p, "ActiveState")
			if now == pid || now == "0" || state != "active" {
				return fmt.Errorf("main process was %s, is %s, unit is %s", pid, now, state)
			}
			pid = now
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := show(ctx, t, p, "NRestarts"); got != fmt.Sprint(s.restart) {
			t.Errorf("systemd has restarted it %s times after %s, want %d", got, s.name, s.restart)
		}
		if s.result != "" { // grep fails where there is none
			must(ctx, t, p, "journalctl", "-q", "-u", "pgha", "--grep", "Failed with result '"+s.result+"'")
		}
		if leader := waitHealthy(t, p, j.w).Leader; leader != p.Name() {
			t.Logf("after %s %s is the primary", s.name, leader)
			if s.name == "restart" {
				t.Error("a planned restart has cost the primary its role")
			}
			j.check(t, w)
			return
		}
		adopted := must(ctx, t, p, "journalctl", "-q", "-o", "cat", "-u", "pgha", "_PID="+pid, "--grep", "took over a running child")
		for _, child := range []string{"child=patroni", "child=haproxy"} {
			if !strings.Contains(adopted, child) {
				t.Errorf("%s was not taken over after %s: %s", child, s.name, adopted)
			}
		}
		if d := cmp.Diff(before, children(ctx, t, p)); d != "" {
			t.Errorf("processes after %s (-before +after):\n%s", s.name, d)
		}
		j.ack(t, w)
	}
	for _, f := range testbed.Failed(j.check(t, w)) {
		t.Errorf("a client saw an error at %s: %v", f.At.Format(time.TimeOnly), f.Err)
	}
}

func (j *journey) stopAndStart(t *testing.T) {
	ctx := within(t, 6*time.Minute)
	p, replica := j.primary(t)
	w := j.writer(t, replica, p)
	before := postgresStops(ctx, t, p)

	start := time.Now()
	must(ctx, t, p, "systemctl", "stop", "pgha")
	t.Logf("the primary's unit stopped in %.1f s", time.Since(start).Seconds())
	if left := ours(ctx, t, p); len(left) > 0 {
		t.Errorf("running after the stop: %v", left)
	}
	if got := postgresStops(ctx, t, p); got.clean <= before.clean || got.crashed != before.crashed {
		t.Errorf("PostgreSQL's stops are %+v, were %+v: want a clean one more, and no crash", got, before)
	}
	handedOver(ctx, t, p, waitStatus(t, replica, "promoted", func(s node.Status) bool { return s.Leader == replica.Name() }))
	j.ack(t, w)
	if out := enter(ctx, t, p, int(node.Unknown), "pgha", "status"); !strings.Contains(out, "systemctl start pgha") {
		t.Error("status where pgha is stopped does not say how to start it")
	}

	must(ctx, t, p, "systemctl", "start", "pgha")
	s := waitHealthy(t, j.all()...)
	if s.Leader != replica.Name() {
		t.Errorf("leader is %q after the old one came back, want %q", s.Leader, replica.Name())
	}
	// A leadership that is not handed over takes longer than this to expire, and
	// one that is goes over within a second or two.
	if gap, _, _ := testbed.Outage(j.check(t, w)); gap > 20*time.Second {
		t.Errorf("the stop cost %s without a write: the leadership was not handed over", gap)
	}
	if got := postgresStops(ctx, t, p); got.crashed != before.crashed {
		t.Errorf("PostgreSQL recovered from a crash after a clean stop")
	}
}

// reboots is the update of the operating system: each host reboots once, and the
// next one when status is healthy again. A data node that is the primary hands
// over first.
func (j *journey) reboots(t *testing.T) {
	ctx := within(t, 10*time.Minute)
	p, replica := j.primary(t)
	for _, m := range []*machine.Machine{p, replica, j.w} {
		var before stops
		if m != j.w {
			before = postgresStops(ctx, t, m)
		}
		leader := waitHealthy(t, j.w).Leader
		w := j.writer(t, p, replica)
		start := time.Now()
		if err := m.Reboot(ctx); err != nil {
			t.Fatal(err)
		}
		t.Logf("%s rebooted in %.1f s", m.Name(), time.Since(start).Seconds())
		s := waitHealthy(t, j.all()...)
		j.ack(t, w)
		failed := testbed.Failed(j.check(t, w))
		if m == j.w {
			if len(failed) > 0 {
				t.Errorf("the witness's reboot cost clients %d errors, the first: %v", len(failed), failed[0].Err)
			}
			continue
		}
		if leader != m.Name() {
			t.Errorf("the primary is %q before the reboot of %s: the one before it has not handed over", leader, m.Name())
		} else {
			handedOver(ctx, t, m, s)
		}
		if got := postgresStops(ctx, t, m); got.clean <= before.clean || got.crashed != before.crashed {
			t.Errorf("PostgreSQL's stops on %s are %+v, were %+v: want a clean one more, and no crash", m.Name(), got, before)
		}
	}
}

// handedOver checks that a machine that was the primary has handed over before it
// stopped, and that the other one took writes before.
func handedOver(ctx context.Context, t *testing.T, m *machine.Machine, s node.Status) {
	t.Helper()
	if s.Leader == m.Name() || s.Leader == "" {
		t.Errorf("the primary is %q after %s was stopped", s.Leader, m.Name())
	}
	log := must(ctx, t, m, "sh", "-c", "grep -h 'hand-over before the stop' /var/log/pgha/pgha.log* | tail -n 6")
	if !strings.Contains(log, "takes writes") {
		t.Errorf("%s has stopped before the hand-over was through:\n%s", m.Name(), log)
	}
}

func (j *journey) powerCut(t *testing.T) {
	ctx := within(t, 6*time.Minute)
	p, replica := j.primary(t)
	w := j.writer(t, p, replica)
	p.PowerOff()
	waitStatus(t, replica, "promoted", func(s node.Status) bool { return s.Leader == replica.Name() })
	j.ack(t, w)
	if err := p.PowerOn(ctx); err != nil {
		t.Fatal(err)
	}
	if s := waitHealthy(t, j.all()...); s.Leader != replica.Name() {
		t.Errorf("leader is %q after the old one came back, want %q", s.Leader, replica.Name())
	}
	j.check(t, w)
}

func (j *journey) powerCutOfAll(t *testing.T) {
	ctx := within(t, 6*time.Minute)
	p, _ := j.primary(t)
	before := postgresStops(ctx, t, p)
	w := j.writer(t, j.n1, j.n2)
	for _, m := range j.all() {
		m.PowerOff()
	}
	for _, m := range j.all() {
		if err := m.PowerOn(ctx); err != nil {
			t.Fatal(err)
		}
	}
	waitHealthy(t, j.all()...)
	j.ack(t, w)
	j.check(t, w)
	if after := postgresStops(ctx, t, p); after.crashed == before.crashed {
		t.Errorf("PostgreSQL on %s knows nothing of the power cut, so its log cannot tell a clean stop either", p.Name())
	}
}

func (j *journey) resetWitness(t *testing.T) {
	ctx := within(t, 5*time.Minute)
	enter(ctx, t, j.w, 0, "pgha", "reset", "--yes")
	if got := show(ctx, t, j.w, "LoadState"); got != "not-found" {
		t.Errorf("the unit is %s after a reset", got)
	}
	if left := ours(ctx, t, j.w); len(left) > 0 {
		t.Errorf("running after the reset: %v", left)
	}
	for _, m := range []*machine.Machine{j.n1, j.n2} {
		waitStatus(t, m, "two members", func(s node.Status) bool { return len(s.Members) == 2 && s.Leader != "" })
	}
	token := enter(ctx, t, j.n2, 0, "pgha", "token", "create", "--witness")
	enter(ctx, t, j.w, 0, typed(joinCommand.FindString(token))...)
	waitHealthy(t, j.all()...)
}
