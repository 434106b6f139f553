package lab

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

const (
	helperEnv = "LAB_TEST_HELPER"
	echoPort  = "7000"
	// patience is for what must come; silence is how long we listen to what
	// must not.
	patience = 60 * time.Second
	silence  = 300 * time.Millisecond
	// arpGivesUp is after the three seconds in which a kernel without permanent
	// neighbours finds that there is no route to the host.
	arpGivesUp = 5 * time.Second
)

func TestMain(m *testing.M) {
	MaybeInit()
	switch os.Getenv(helperEnv) {
	case "echo":
		helperExit(echoServer())
	case "owner":
		helperExit(doomedOwner())
	}
	goleak.VerifyTestMain(m)
}

func helperExit(err error) {
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

func echoServer() error {
	ln, err := net.Listen("tcp", ":"+echoPort)
	if err != nil {
		return err
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			return err
		}
		go func() {
			_, _ = io.Copy(c, c)
			_ = c.Close()
		}()
	}
}

func newLab(t *testing.T, names ...string) *Lab {
	t.Helper()
	ctx := testCtx(t)
	l, err := New(ctx, Options{Dir: t.TempDir(), Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	for _, name := range names {
		if _, err := l.AddHost(ctx, name, HostOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	return l
}

func testCtx(t *testing.T) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually polls until f gives no error.
func eventually(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// start runs a command on the host until the test ends or it is killed.
func start(t *testing.T, cmd *exec.Cmd) *exec.Cmd {
	t.Helper()
	cmd.Stdout, cmd.Stderr = t.Output(), t.Output()
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
	return cmd
}

// startEcho starts an echo server on the host and waits until the clients reach it.
func startEcho(t *testing.T, h *Host) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	must(t, err)
	cmd := h.Command(context.Background(), self)
	cmd.Env = append(cmd.Env, helperEnv+"=echo")
	start(t, cmd)
	eventually(t, "echo server on "+h.Name(), func() error { return tryEcho(h.lab.Dial, h, time.Second) })
	return cmd
}

type dialFunc func(ctx context.Context, network, addr string) (net.Conn, error)

func tryEcho(dial dialFunc, to *Host, timeout time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	c, err := dial(ctx, "tcp", to.Name()+":"+echoPort)
	if err != nil {
		return err
	}
	defer c.Close()
	return exchange(c, "hello", timeout)
}

func exchange(c net.Conn, word string, timeout time.Duration) error {
	if _, err := io.WriteString(c, word); err != nil {
		return err
	}
	return expect(c, word, timeout)
}

func expect(c net.Conn, word string, timeout time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(c, got); err != nil {
		return err
	}
	if string(got) != word {
		return fmt.Errorf("got %q, want %q", got, word)
	}
	return nil
}

func isTimeout(err error) bool {
	var n net.Error
	return errors.As(err, &n) && n.Timeout()
}

// checkReach checks who can reach whom; a pair not in want must be reachable.
func checkReach(t *testing.T, l *Lab, what string, silent ...string) {
	t.Helper()
	from := map[string]dialFunc{Clients: l.Dial}
	for _, h := range l.Hosts() {
		from[h.Name()] = h.Dial
	}
	for name, dial := range from {
		for _, to := range l.Hosts() {
			if name == to.Name() {
				continue
			}
			way := name + ">" + to.Name()
			if slices.Contains(silent, way) {
				err := tryEcho(dial, to, silence)
				if !isTimeout(err) {
					t.Errorf("%s: %s gives %v, want silence", what, way, err)
				}
			} else {
				eventually(t, what+": "+way, func() error { return tryEcho(dial, to, 5*time.Second) })
			}
		}
	}
}

func TestNetworkFaults(t *testing.T) {
	l := newLab(t, "aa", "bb", "cc")
	for _, h := range l.Hosts() {
		startEcho(t, h)
	}
	checkReach(t, l, "at first")

	old, err := l.Host("aa").Dial(testCtx(t), "tcp", "bb:"+echoPort)
	must(t, err)
	defer old.Close()
	must(t, exchange(old, "before", patience))

	must(t, l.Cut("bb", "aa"))
	must(t, l.Cut("aa", "bb")) // again, the other way round
	checkReach(t, l, "cut", "aa>bb", "bb>aa")
	if err := exchange(old, "during", silence); !isTimeout(err) {
		t.Errorf("old connection over a cut link: %v, want silence", err)
	}
	must(t, l.Heal("aa", "bb"))
	must(t, expect(old, "during", patience)) // TCP has gone on trying
	checkReach(t, l, "healed")

	must(t, l.Cut("aa", Clients))
	checkReach(t, l, "clients cut", Clients+">aa")
	must(t, l.Isolate("aa"))
	checkReach(t, l, "isolated", Clients+">aa", "aa>bb", "aa>cc", "bb>aa", "cc>aa")
	must(t, l.Rejoin("aa"))
	checkReach(t, l, "rejoined", Clients+">aa")
	must(t, l.Heal(Clients, "aa"))
	checkReach(t, l, "all healed")

	for _, err := range []error{l.Cut("aa", "nobody"), l.Cut("aa", "aa"), l.Isolate("nobody"), l.Isolate(Clients)} {
		if err == nil {
			t.Error("a bad name was taken")
		}
	}
	if _, err := l.Dial(testCtx(t), "tcp", "example.com:80"); err == nil {
		t.Error("dialled a name from outside the lab")
	}
}

func TestHostRulesetIsItsOwn(t *testing.T) {
	l := newLab(t, "aa", "bb")
	for _, h := range l.Hosts() {
		startEcho(t, h)
	}
	ns, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", l.Host("aa").PID()))
	must(t, err)
	defer ns.Close()
	conn, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	must(t, err)
	table := conn.AddTable(&nftables.Table{Family: nftables.TableFamilyINet, Name: "test"})
	chain := conn.AddChain(&nftables.Chain{Name: "in", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter})
	conn.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: append(
		matchName(expr.MetaKeyIIFNAME, "eth0"), &expr.Verdict{Kind: expr.VerdictDrop})})
	must(t, conn.Flush())
	checkReach(t, l, "with a rule on aa", Clients+">aa", "aa>bb", "bb>aa")
	eventually(t, "aa to itself", func() error { return tryEcho(l.Host("aa").Dial, l.Host("aa"), 5*time.Second) })
	machine, err := nftables.New()
	must(t, err)
	tables, err := machine.ListTables()
	must(t, err)
	for _, table := range tables {
		if table.Name == "pghalab" || table.Name == "test" {
			t.Errorf("the machine's own ruleset has the lab's table %s", table.Name)
		}
	}
}

func TestHostSeesItsOwn(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa", "bb")
	a, b := l.Host("aa"), l.Host("bb")
	script := `hostname; ls /run /dev/shm | tr '\n' ' '; echo; ls -A /etc/pgha /var/lib/pgha /var/log/pgha | grep -v : | tr -d '\n'; ` +
		`grep -c . /etc/hosts; cat /proc/1/comm; pwd; id -u; echo "$HOME"; mkdir /run/mine; echo $0 >/etc/pgha/pgha.yml`
	out, err := a.Run(ctx, "sh", "-c", script)
	must(t, err)
	want := "aa\n/dev/shm: /run: \n5\npgha-lab-init\n/\n0\n/root\n"
	if got := strings.ReplaceAll(out, "  ", " "); !cmp.Equal(strings.Fields(got), strings.Fields(want)) {
		t.Error(cmp.Diff(strings.Fields(want), strings.Fields(got)))
	}
	if _, err := b.Run(ctx, "test", "!", "-e", "/run/mine", "-a", "!", "-e", "/etc/pgha/pgha.yml"); err != nil {
		t.Errorf("bb sees aa's files: %v", err)
	}
	for _, path := range []string{filepath.Join(a.Dir(), "etc/pgha.yml"), a.Path("/etc/pgha/pgha.yml"), a.Path("/run/mine")} {
		if _, err := os.Stat(path); err != nil {
			t.Error(err)
		}
	}
	if _, err := os.Stat("/etc/pgha/pgha.yml"); err == nil {
		t.Error("the machine sees aa's files")
	}
	out, err = a.RunAs(ctx, "postgres", "sh", "-c", `id -un; echo "$HOME"; echo good >/dev/shm/x && cat /dev/shm/x`)
	must(t, err)
	if want := "postgres\n/var/lib/postgresql\ngood\n"; out != want {
		t.Errorf("as postgres: got %q, want %q", out, want)
	}
	if _, err := a.Run(ctx, "sh", "-c", "echo complaint >&2; exit 7"); err == nil || !strings.Contains(err.Error(), "complaint") || !strings.Contains(err.Error(), "status 7") {
		t.Errorf("a failing command gives %v", err)
	}
	if err := a.CommandAs(ctx, "nobody-such", "true").Run(); err == nil {
		t.Error("ran as a user that does not exist")
	}
	// It waits for the command, not for what it leaves behind with its output.
	if _, err := a.Run(ctx, "sh", "-c", "sleep 100000 &"); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"aa", "X", "", "a", "../x", Clients, "much-too-long-name"} {
		if _, err := l.AddHost(ctx, name, HostOptions{}); err == nil {
			t.Errorf("added a host named %q", name)
		}
	}
}

func TestPowerCycle(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa", "bb")
	a := l.Host("aa")
	startEcho(t, a)
	startEcho(t, l.Host("bb"))
	conn, err := l.Dial(ctx, "tcp", "aa:"+echoPort)
	must(t, err)
	defer conn.Close()
	must(t, exchange(conn, "before", patience))

	_, err = a.Run(ctx, "sh", "-c", `echo kept >/var/lib/pgha/file; echo lost >/run/file; (setsid sleep 100000 &); (setsid sleep 100001 &)`)
	must(t, err)
	var daemons []Proc
	eventually(t, "daemons", func() error {
		daemons = sleepers(t, a)
		if len(daemons) != 2 {
			return fmt.Errorf("%d daemons", len(daemons))
		}
		return nil
	})
	// An orphan that dies is buried.
	must(t, a.Kill(daemons[0].NSPID, syscall.SIGKILL))
	eventually(t, "death of a daemon", func() error {
		if n := len(sleepers(t, a)); n != 1 {
			return fmt.Errorf("%d daemons", n)
		}
		return nil
	})
	guard := start(t, a.Command(ctx, "sleep", "100002"))
	procs, err := a.Processes()
	must(t, err)

	must(t, a.PowerOff())
	for _, p := range procs {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/ns/pid", p.PID)); err == nil {
			t.Errorf("process %d (%v) survived", p.PID, p.Cmdline)
		}
	}
	if err := guard.Wait(); err == nil {
		t.Error("a command survived")
	}
	// No peer has heard of it: neither end nor reset of the connection.
	if err := exchange(conn, "during", silence); !isTimeout(err) {
		t.Errorf("connection to a host that is off: %v, want silence", err)
	}
	if err := tryEcho(l.Host("bb").Dial, a, arpGivesUp); !isTimeout(err) {
		t.Errorf("dialling a host that is off: %v, want silence", err)
	}
	if a.Alive() || a.PID() != 0 {
		t.Error("alive while off")
	}
	must(t, a.PowerOff())
	if err := a.Command(ctx, "true").Run(); err == nil {
		t.Error("ran a command on a host that is off")
	}

	must(t, l.Cut("aa", "bb"))
	must(t, a.PowerOn(ctx))
	must(t, a.PowerOn(ctx))
	out, err := a.Run(ctx, "sh", "-c", "cat /var/lib/pgha/file; ls -A /run /dev/shm | grep -v :")
	if strings.TrimSpace(out) != "kept" {
		t.Errorf("after power on: %q, %v; want the disk kept and /run empty", out, err)
	}
	startEcho(t, a)
	checkReach(t, l, "power on with a cut link", "aa>bb", "bb>aa")
	must(t, l.Heal("aa", "bb"))
	checkReach(t, l, "healed after power on")

	// An init that dies by itself is a power failure too.
	must(t, unix.Kill(a.PID(), unix.SIGKILL))
	eventually(t, "death of init", func() error {
		if a.Alive() {
			return fmt.Errorf("alive")
		}
		return nil
	})
	must(t, a.PowerOn(ctx))
	startEcho(t, a)
}

func sleepers(t *testing.T, h *Host) []Proc {
	t.Helper()
	procs, err := h.Processes()
	must(t, err)
	return slices.DeleteFunc(procs, func(p Proc) bool { return p.Comm != "sleep" })
}

func TestFreeze(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa")
	a := l.Host("aa")
	echo := startEcho(t, a)
	// Something that forks all the time, and something stopped by hand.
	start(t, a.Command(ctx, "sh", "-c", "while :; do /bin/true; done"))
	stopped := start(t, a.Command(ctx, "sleep", "100000"))
	eventually(t, "stop by hand", func() error {
		if s := sleepers(t, a); len(s) != 1 {
			return fmt.Errorf("%d sleepers", len(s))
		}
		return a.Signal(stopped, syscall.SIGSTOP)
	})
	conn, err := l.Dial(ctx, "tcp", "aa:"+echoPort)
	must(t, err)
	defer conn.Close()
	must(t, exchange(conn, "before", patience))

	for range 3 {
		must(t, a.Freeze())
		must(t, a.Freeze())
		procs, err := a.Processes()
		must(t, err)
		for _, p := range procs {
			if !strings.ContainsRune("TDZ", rune(p.State)) {
				t.Errorf("%v is in state %c", p.Cmdline, p.State)
			}
		}
		if err := exchange(conn, "during", silence); !isTimeout(err) {
			t.Errorf("a frozen host: %v, want silence", err)
		}
		must(t, a.Thaw())
		must(t, a.Thaw())
		must(t, expect(conn, "during", patience))
	}
	if s := sleepers(t, a); len(s) != 1 || s[0].State != 'T' {
		t.Errorf("thaw changed what was stopped by hand: %v", s)
	}
	// The guard of a command that was stopped and continued sees its end.
	must(t, a.Signal(stopped, syscall.SIGCONT))
	must(t, a.Signal(stopped, syscall.SIGTERM))
	if err := stopped.Wait(); err == nil || stopped.ProcessState.ExitCode() != 128+15 {
		t.Errorf("a command ended by SIGTERM gives %v", err)
	}
	// A guard takes its command along.
	must(t, echo.Process.Kill())
	_ = echo.Wait()
	eventually(t, "death of the echo server", func() error {
		if err := tryEcho(l.Dial, a, time.Second); err == nil {
			return fmt.Errorf("it answers")
		}
		return nil
	})
	must(t, a.Freeze())
	must(t, a.PowerOff())
	must(t, a.PowerOn(ctx))
	startEcho(t, a)
}

func TestFullDisk(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t)
	a, err := l.AddHost(ctx, "aa", HostOptions{TmpfsBytes: 8 << 20})
	must(t, err)
	_, err = a.Run(ctx, "sh", "-c", "echo kept >/var/lib/pgha/file")
	must(t, err)
	undo, err := a.FillDisk("/var/lib/pgha")
	must(t, err)
	if _, err := a.Run(ctx, "cp", "/etc/passwd", "/var/lib/pgha/more"); err == nil || !strings.Contains(err.Error(), "No space left") {
		t.Errorf("writing to a full disk gives %v", err)
	}
	must(t, undo())
	_, err = a.Run(ctx, "cp", "/etc/passwd", "/var/lib/pgha/more")
	must(t, err)
	must(t, a.PowerOff())
	must(t, a.PowerOn(ctx))
	if out, err := a.Run(ctx, "cat", "/var/lib/pgha/file"); err != nil || out != "kept\n" {
		t.Errorf("after a power cycle: %q, %v", out, err)
	}
	if _, err := os.Stat(filepath.Join(a.Dir(), "lib/file")); err == nil {
		t.Error("the tmpfs shows on the machine")
	}
	if _, err := a.FillDisk("/var/log/pgha"); err == nil {
		t.Error("filled the machine's disk")
	}
}

func TestPostgreSQLOnTwoHosts(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa", "bb")
	bin := "/usr/lib/postgresql/15/bin/"
	for _, h := range l.Hosts() {
		for _, args := range [][]string{
			{bin + "initdb", "-D", "/var/lib/pgha/pg", "-A", "trust", "-N"},
			{"sh", "-c", "echo host all all " + Subnet().String() + " trust >>/var/lib/pgha/pg/pg_hba.conf"},
			{bin + "pg_ctl", "-D", "/var/lib/pgha/pg", "-w", "-l", "/dev/shm/log", "-o",
				"-c listen_addresses=* -c port=5442 -c unix_socket_directories=/dev/shm -c shared_memory_type=sysv", "start"},
		} {
			if args[0] == bin+"initdb" {
				_, err := h.Run(ctx, "install", "-d", "-o", "postgres", "/var/lib/pgha/pg")
				must(t, err)
			}
			_, err := h.RunAs(ctx, "postgres", args[0], args[1:]...)
			must(t, err)
		}
	}
	ids := map[string]bool{}
	for _, h := range l.Hosts() {
		cfg, err := pgx.ParseConfig("postgres://postgres@" + h.Name() + ":5442/postgres?sslmode=disable")
		must(t, err)
		cfg.DialFunc = l.Dial
		cfg.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
		conn, err := pgx.ConnectConfig(ctx, cfg)
		must(t, err)
		var id, from string
		must(t, conn.QueryRow(ctx, "select system_identifier::text, host(inet_client_addr()) from pg_control_system()").Scan(&id, &from))
		must(t, conn.Close(ctx))
		ids[id] = true
		if from != ClientAddr().String() {
			t.Errorf("%s sees the client as %s", h.Name(), from)
		}
	}
	if len(ids) != 2 {
		t.Errorf("system identifiers %v, want two", ids)
	}
	out, err := l.Command(ctx, "psql", "-XAtc", "select 40+2", "-h", l.Host("bb").Addr().String(), "-p", "5442", "-U", "postgres").CombinedOutput()
	if err != nil || string(out) != "42\n" {
		t.Errorf("psql from the switch: %q, %v", out, err)
	}
	// The survivor of a power failure goes on; the other recovers.
	must(t, l.Host("aa").PowerOff())
	must(t, l.Host("aa").PowerOn(ctx))
	_, err = l.Host("aa").RunAs(ctx, "postgres", bin+"pg_ctl", "-D", "/var/lib/pgha/pg", "-w", "-l", "/dev/shm/log", "-o",
		"-c port=5442 -c unix_socket_directories=/dev/shm -c shared_memory_type=sysv", "start")
	must(t, err)
}

// namespaces lists every network, mount and PID namespace that a thread of the
// machine is in or that this process holds open.
func namespaces(t *testing.T) map[string]bool {
	t.Helper()
	seen := map[string]bool{}
	for _, pattern := range []string{"/proc/[0-9]*/task/*/ns/net", "/proc/[0-9]*/task/*/ns/mnt", "/proc/[0-9]*/task/*/ns/pid", "/proc/self/fd/*"} {
		paths, err := filepath.Glob(pattern)
		must(t, err)
		for _, path := range paths {
			if ns, err := os.Readlink(path); err == nil {
				seen[ns] = true
			}
		}
	}
	return seen
}

func TestCloseLeavesNothing(t *testing.T) {
	ctx := testCtx(t)
	l := newLab(t, "aa", "bb")
	_, err := l.AddHost(ctx, "cc", HostOptions{TmpfsBytes: 1 << 20})
	must(t, err)
	a := l.Host("aa")
	_, err = a.Run(ctx, "sh", "-c", "setsid sleep 100000 >/dev/null 2>&1 &")
	must(t, err)
	client := l.Command(ctx, "sh", "-c", "setsid sleep 100003 >/dev/null 2>&1 & echo $!")
	out, err := client.Output()
	must(t, err)
	clientPID := strings.TrimSpace(string(out))

	var own []string
	for _, path := range []string{l.switchPath, strings.TrimSuffix(l.switchPath, "net") + "mnt",
		fmt.Sprintf("/proc/%d/ns/net", a.PID()), fmt.Sprintf("/proc/%d/ns/mnt", a.PID()), fmt.Sprintf("/proc/%d/ns/pid", a.PID())} {
		ns, err := os.Readlink(path)
		must(t, err)
		own = append(own, ns)
	}
	before := namespaces(t)
	for _, ns := range own {
		if !before[ns] {
			t.Fatalf("namespace %s is not seen", ns)
		}
	}
	must(t, l.Close())
	must(t, l.Close())
	eventually(t, "end of the namespaces", func() error {
		after := namespaces(t)
		for _, ns := range own {
			if after[ns] {
				return fmt.Errorf("%s is still there", ns)
			}
		}
		return nil
	})
	if _, err := os.Stat("/proc/" + clientPID + "/ns/net"); err == nil {
		t.Error("a client survived")
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	must(t, err)
	if strings.Contains(string(mounts), "pgha") {
		t.Errorf("a mount is left:\n%s", mounts)
	}
	if _, err := l.AddHost(ctx, "dd", HostOptions{}); err == nil {
		t.Error("added a host to a closed lab")
	}
	if err := a.PowerOn(ctx); err == nil {
		t.Error("powered on a host of a closed lab")
	}
}

// doomedOwner makes a lab, says what is in it, and waits to be killed.
func doomedOwner() error {
	ctx := context.Background()
	l, err := New(ctx, Options{Dir: os.Getenv("LAB_TEST_DIR")})
	if err != nil {
		return err
	}
	h, err := l.AddHost(ctx, "aa", HostOptions{})
	if err != nil {
		return err
	}
	if _, err := h.Run(ctx, "sh", "-c", "setsid sleep 100000 >/dev/null 2>&1 &"); err != nil {
		return err
	}
	client := l.Command(ctx, "sleep", "100004")
	if err := client.Start(); err != nil {
		return err
	}
	procs, err := h.Processes()
	if err != nil {
		return err
	}
	fmt.Print(client.Process.Pid)
	for _, p := range procs {
		fmt.Print(" ", p.PID)
	}
	fmt.Println()
	select {}
}

func TestDeadOwnerLeavesNothing(t *testing.T) {
	ctx := testCtx(t)
	self, err := os.Executable()
	must(t, err)
	owner := exec.Command(self)
	owner.Env = append(os.Environ(), helperEnv+"=owner", "LAB_TEST_DIR="+t.TempDir())
	owner.Stderr = t.Output()
	stdout, err := owner.StdoutPipe()
	must(t, err)
	must(t, owner.Start())
	line, err := bufio.NewReader(stdout).ReadString('\n')
	kerr := owner.Process.Kill()
	_ = owner.Wait()
	must(t, err)
	must(t, kerr)
	pids := strings.Fields(line)
	if len(pids) < 3 {
		t.Fatalf("the owner said %q", line)
	}
	alive := func(pid string) bool {
		_, err := os.Readlink("/proc/" + pid + "/ns/net") // a zombie has none
		return err == nil
	}
	eventually(t, "death of the host", func() error {
		if i := slices.IndexFunc(pids[1:], alive); i >= 0 {
			return fmt.Errorf("process %s lives", pids[1+i])
		}
		return nil
	})
	if _, err := New(ctx, Options{Dir: ""}); err == nil {
		t.Error("made a lab without a directory")
	}
	newLab(t) // a lab elsewhere on the machine may have been first
	if alive(pids[0]) {
		t.Error("the client of a dead lab lives")
	}
}

func TestDrops(t *testing.T) {
	tests := []struct {
		name     string
		cuts     []pair
		isolated []string
		want     []drop
	}{
		{name: "none"},
		{"two hosts", []pair{pairOf("bb", "aa")}, nil, []drop{{"forward", "p-aa", "p-bb"}, {"forward", "p-bb", "p-aa"}}},
		{"clients first", []pair{pairOf("zz", Clients)}, nil, []drop{{"input", "p-zz", ""}, {"output", "", "p-zz"}}},
		{"clients last", []pair{pairOf(Clients, "aa")}, nil, []drop{{"input", "p-aa", ""}, {"output", "", "p-aa"}}},
		{"isolated", nil, []string{"aa"}, []drop{{"forward", "", "p-aa"}, {"forward", "p-aa", ""}, {"input", "p-aa", ""}, {"output", "", "p-aa"}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			cuts, isolated := map[pair]bool{}, map[string]bool{}
			for _, c := range tt.cuts {
				cuts[c] = true
			}
			for _, i := range tt.isolated {
				isolated[i] = true
			}
			less := func(a, b drop) bool { return fmt.Sprint(a) < fmt.Sprint(b) }
			if diff := cmp.Diff(tt.want, drops(cuts, isolated), cmp.AllowUnexported(drop{}), cmpopts.SortSlices(less), cmpopts.EquateEmpty()); diff != "" {
				t.Error(diff)
			}
		})
	}
}
