package sqladmin

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"

	"github.com/jackc/pgx/v5"
)

// server is a real PostgreSQL on a unix socket alone. Its superuser may come from
// root too; everybody else needs a password.
type server struct{ dir string }

func newServer(t *testing.T) server {
	t.Helper()
	bins, err := filepath.Glob("/usr/lib/postgresql/*/bin")
	if err != nil || len(bins) == 0 {
		t.Fatalf("no PostgreSQL in /usr/lib/postgresql: install the package postgresql (%v)", err)
	}
	u, err := user.Lookup("postgres")
	if err != nil {
		t.Fatal(err)
	}
	uid, _ := strconv.ParseUint(u.Uid, 10, 32)
	gid, _ := strconv.ParseUint(u.Gid, 10, 32)
	// Not t.TempDir: the server's user must reach it, and a socket's path is short.
	dir, err := os.MkdirTemp("", "pghasql")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(dir, int(uid), int(gid)); err != nil {
		t.Fatal(err)
	}
	data := filepath.Join(dir, "data")
	run := func(name string, args ...string) error {
		cmd := exec.Command(filepath.Join(bins[len(bins)-1], name), args...)
		cmd.Dir = "/"
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, out)
		}
		return nil
	}
	t.Cleanup(func() {
		if err := run("pg_ctl", "stop", "-D", data, "-s", "-m", "immediate", "-t", "120"); err != nil {
			t.Error(err)
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := run("initdb", "-D", data, "--no-sync", "-U", "postgres"); err != nil {
		t.Fatal(err)
	}
	write := func(name, text string) {
		path := filepath.Join(data, name)
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(path, int(uid), int(gid)); err != nil {
			t.Fatal(err)
		}
	}
	write("pg_hba.conf", "local all postgres peer map=test\nlocal all all scram-sha-256\n")
	write("pg_ident.conf", "test postgres postgres\ntest root postgres\n")
	write("postgresql.auto.conf", "listen_addresses = ''\nfsync = off\nshared_buffers = 16MB\nlog_statement = all\nunix_socket_directories = '"+dir+"'\n")
	if err := run("pg_ctl", "start", "-D", data, "-s", "-t", "120", "-l", filepath.Join(dir, "log")); err != nil {
		t.Fatal(err)
	}
	return server{dir}
}

func (s server) dial(ctx context.Context, database string) (*pgx.Conn, error) {
	return s.login(ctx, "postgres", "", database)
}

func (s server) login(ctx context.Context, user, password, database string) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("sslmode=disable")
	if err != nil {
		return nil, err
	}
	c.Host, c.Port, c.User, c.Password, c.Database = s.dir, 5432, user, password, database
	return pgx.ConnectConfig(ctx, c)
}

// as runs a statement in a session of its own.
func (s server) as(t *testing.T, user, password, database, sql string) error {
	t.Helper()
	conn, err := s.login(t.Context(), user, password, database)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close(context.WithoutCancel(t.Context())) }()
	_, err = conn.Exec(t.Context(), sql)
	return err
}

func (s server) must(t *testing.T, user, password, database, sql string) {
	t.Helper()
	if err := s.as(t, user, password, database, sql); err != nil {
		t.Fatalf("%s in %s: %s: %v", user, database, sql, err)
	}
}
