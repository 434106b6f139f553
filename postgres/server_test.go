package postgres

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"go.uber.org/goleak"

	"pgha/internal/pgdata"
)

// patience is for what a busy machine takes long over; nothing is expected to
// need it.
const patience = 2 * time.Minute

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// server is a real PostgreSQL in a directory of its own, on a unix socket alone.
type server struct {
	dir, data string
	bin       string
	cred      *syscall.Credential
}

const testPort = 5442 // names the socket; nothing listens on it

// emptyServer returns a server without a data directory. What it starts is
// killed in the end, stopped or not.
func emptyServer(t *testing.T) *server {
	t.Helper()
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin/postgres")
	must(t, err)
	if len(bins) == 0 {
		t.Fatal("no PostgreSQL in /usr/lib/postgresql: install the package postgresql")
	}
	u, err := user.Lookup("postgres")
	must(t, err)
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	must(t, err)
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	must(t, err)
	// Not t.TempDir: the server's user must reach it, and a socket's path is short.
	dir, err := os.MkdirTemp("", "pghapg")
	must(t, err)
	must(t, os.Chown(dir, int(uid), int(gid)))
	s := &server{
		dir: dir, data: filepath.Join(dir, "data"), bin: filepath.Dir(bins[len(bins)-1]),
		cred: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)},
	}
	t.Cleanup(func() {
		if t.Failed() {
			s.printLogs(t)
		}
		waitFor(t, "the server to end", func() bool {
			pids := s.pids(t)
			s.signal(t, syscall.SIGKILL, pids...) // ends a stopped process too
			return len(pids) == 0
		})
		removeSegment(t, s.data)
		must(t, os.RemoveAll(dir))
	})
	return s
}

// newServer returns a server with a new database that is not started.
func newServer(t *testing.T, settings ...string) *server {
	t.Helper()
	s := emptyServer(t)
	s.run(t, "initdb", "-D", s.data, "--no-sync", "-U", "postgres")
	s.write(t, "pg_hba.conf", "local all postgres peer map=test\nlocal replication postgres peer map=test\n")
	s.write(t, "pg_ident.conf", "test postgres postgres\ntest root postgres\n")
	s.set(t, "listen_addresses = ''", fmt.Sprintf("port = %d", testPort), "fsync = off", "shared_buffers = 16MB", "logging_collector = on")
	s.set(t, settings...)
	return s
}

// standby returns a copy of s that streams from it when started.
func (s *server) standby(t *testing.T, name string) *server {
	t.Helper()
	b := emptyServer(t)
	b.run(t, "pg_basebackup", "-D", b.data, "-h", s.dir, "-p", strconv.Itoa(testPort), "-U", "postgres", "--no-sync", "-c", "fast")
	b.write(t, "standby.signal", "")
	b.set(t, fmt.Sprintf("primary_conninfo = 'host=%s port=%d user=postgres application_name=%s'", s.dir, testPort, name))
	return b
}

func (s *server) run(t *testing.T, name string, args ...string) {
	t.Helper()
	cmd := exec.Command(filepath.Join(s.bin, name), args...)
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: s.cred}
	if out, err := cmd.CombinedOutput(); err != nil {
		s.printLogs(t)
		t.Fatalf("%s %s: %v: %s", name, strings.Join(args, " "), err, out)
	}
}

// ctl runs pg_ctl; what it starts must not inherit our pipes.
func (s *server) ctl(t *testing.T, verb string, args ...string) {
	t.Helper()
	args = append([]string{verb, "-D", s.data, "-s", "-t", "120"}, args...)
	if verb == "start" || verb == "restart" {
		args = append(args, "-l", filepath.Join(s.dir, "start.log"), "-o", "-k "+s.dir)
	}
	s.run(t, "pg_ctl", args...)
}

func (s *server) write(t *testing.T, name, text string) {
	t.Helper()
	path := filepath.Join(s.data, name)
	must(t, os.WriteFile(path, []byte(text), 0o600))
	must(t, os.Chown(path, int(s.cred.Uid), int(s.cred.Gid)))
}

func (s *server) set(t *testing.T, settings ...string) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(s.data, "postgresql.auto.conf"), os.O_APPEND|os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteString(strings.Join(settings, "\n") + "\n")
	must(t, err)
	must(t, f.Close())
}

func (s *server) printLogs(t *testing.T) {
	t.Helper()
	logs, _ := filepath.Glob(filepath.Join(s.data, "log", "*"))
	for _, path := range append(logs, filepath.Join(s.dir, "start.log")) {
		if text, err := os.ReadFile(path); err == nil {
			t.Logf("%s:\n%s", path, text)
		}
	}
}

// pids returns every process that works in the data directory.
func (s *server) pids(t *testing.T) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	must(t, err)
	var pids []int
	for _, e := range entries {
		if pid, err := strconv.Atoi(e.Name()); err == nil {
			if works, err := pgdata.WorksIn(pid, s.data); err == nil && works {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

func (s *server) signal(t *testing.T, sig syscall.Signal, pids ...int) {
	t.Helper()
	for _, pid := range pids {
		if err := syscall.Kill(pid, sig); err != nil && err != syscall.ESRCH {
			t.Fatalf("send %v to %d: %v", sig, pid, err)
		}
	}
}

// postmaster returns the pid in the pid file.
func (s *server) postmaster(t *testing.T) int {
	t.Helper()
	f, err := pgdata.ReadPIDFile(s.data)
	must(t, err)
	return f.PID
}

func (s *server) dial(ctx context.Context) (*pgx.Conn, error) {
	return pgx.Connect(ctx, fmt.Sprintf("host=%s port=%d user=postgres database=postgres sslmode=disable", s.dir, testPort))
}

// session opens a client session and returns its backend's pid too.
func (s *server) session(t *testing.T) (*pgx.Conn, int) {
	t.Helper()
	conn, err := s.dial(t.Context())
	must(t, err)
	t.Cleanup(func() { discard(conn) })
	return conn, int(conn.PgConn().PID())
}

func (s *server) exec(t *testing.T, sql string) {
	t.Helper()
	conn, err := s.dial(t.Context())
	must(t, err)
	defer discard(conn)
	_, err = conn.Exec(t.Context(), sql)
	must(t, err)
}

// config is patient: only a server that is really silent is Hung by it.
func (s *server) config(t *testing.T) Config {
	return Config{
		DataDir: s.data, SocketDir: s.dir, Port: testPort, Every: 20 * time.Millisecond, Timeout: 20 * time.Second, HungAfter: time.Hour,
		Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
}

// watching is a watcher that runs, with a subscription.
type watching struct {
	*Watcher
	ch  <-chan Probe
	now func() time.Duration
}

// watch runs a watcher until the test ends.
func watch(t *testing.T, cfg Config) *watching {
	t.Helper()
	w := New(cfg)
	w.tryNewEvery = 100 * time.Millisecond
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- w.Run(ctx) }()
	ch, unsubscribe := w.Subscribe()
	t.Cleanup(func() {
		unsubscribe()
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return &watching{Watcher: w, ch: ch, now: w.cfg.Now}
}

// until reads probes until one is as wanted, and fails if one comes before that
// may not.
func (w *watching) until(t *testing.T, what string, want func(Probe) bool, never ...Kind) Probe {
	t.Helper()
	deadline := time.After(patience)
	for {
		select {
		case p := <-w.ch:
			if want(p) {
				return p
			}
			for _, k := range never {
				if p.Kind == k {
					t.Fatalf("%s while waiting for %s: %+v", k, what, p)
				}
			}
		case <-deadline:
			t.Fatalf("gave up waiting for %s; last seen %+v", what, w.Latest())
		}
	}
}

// kind is until for a kind, in a probe that was begun after the call.
func (w *watching) kind(t *testing.T, k Kind, never ...Kind) Probe {
	t.Helper()
	from := w.now()
	return w.until(t, string(k), func(p Probe) bool { return p.Kind == k && p.At >= from }, never...)
}

// waitFor polls until cond holds.
func waitFor(t *testing.T, what string, cond func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !cond(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("gave up waiting for %s", what)
		}
	}
}
