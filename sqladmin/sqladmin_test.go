package sqladmin

import (
	"context"
	"encoding/base64"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/jackc/pgx/v5"
)

func TestNames(t *testing.T) {
	long := strings.Repeat("a", 64)
	for name, want := range map[string]string{
		"shop": "", "shop_2-eu": "", strings.Repeat("a", 63): "",
		"": "is empty", long: "64 bytes", "Shop": "lower-case", "2shop": "lower-case", `sh"op`: "lower-case", "sh op": "lower-case", "müller": "lower-case",
		"a\x00b": "zero byte", "postgres": "own", "replicator": "own", "rewinder": "own", "pg_monitor": "own", "pgha_exporter": "own", "public": "own", "none": "own",
	} {
		if err := CheckNewRole(name); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("CheckNewRole(%q) = %v, want %q", name, err, want)
		}
	}
	for name, want := range map[string]string{
		"shop": "", "replicator": "", // a role's name, not a database's
		"template1": "own", "postgres": "own", "all": "own", "replication": "own", "Shop": "lower-case", "": "is empty", long: "64 bytes",
	} {
		if err := CheckNewDatabase(name); want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("CheckNewDatabase(%q) = %v, want %q", name, err, want)
		}
	}
	// What an adopted server has can be given a new password and dropped.
	if err := CheckRole("Müller & Co"); err != nil {
		t.Error(err)
	}
}

// TestVerifier takes the example of RFC 7677.
func TestVerifier(t *testing.T) {
	salt, err := base64.StdEncoding.DecodeString("W22ZaJ0SNY7soEsUEjb6gQ==")
	if err != nil {
		t.Fatal(err)
	}
	got, err := verifier("pencil", salt)
	if err != nil {
		t.Fatal(err)
	}
	want := "SCRAM-SHA-256$4096:W22ZaJ0SNY7soEsUEjb6gQ==$WG5d8oPm3OtcPnkdi4Uo7BkeZkBFzpcXkuLmtbsT4qY=:wfPLwcE6nTWhTAmQ7tl2KeoiWGPlZqQxSrmfPwDl2dU="
	if d := cmp.Diff(want, got); d != "" {
		t.Errorf("verifier (-want +got):\n%s", d)
	}
	for password, want := range map[string]string{
		"short": "5 characters", strings.Repeat("x", 257): "257 characters", "geheimes wört": "printable ASCII", "tab\tulator": "printable ASCII",
	} {
		if _, err := Verifier(password); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("Verifier(%q): %v, want %q", password, err, want)
		}
	}
	for _, text := range []string{"", "plain", "md5d41d8cd98f00b204e9800998ecf8427e", want + "'; DROP ROLE x; --"} {
		if checkVerifier(text) == nil {
			t.Errorf("checkVerifier(%q) accepts it", text)
		}
	}
}

func TestGeneratePassword(t *testing.T) {
	a, errA := GeneratePassword()
	b, errB := GeneratePassword()
	if err := errors.Join(errA, errB); err != nil {
		t.Fatal(err)
	}
	if a == b || len(a) != generatedLength || strings.Trim(a, generatedAlphabet) != "" {
		t.Errorf("generated %q and %q", a, b)
	}
	if _, err := Verifier(a); err != nil {
		t.Error(err)
	}
}

// refused says whether err is a refusal that says what is wanted.
func refused(t *testing.T, what string, err error, want string) {
	t.Helper()
	var r *Refusal
	if !errors.As(err, &r) || !strings.Contains(err.Error(), want) {
		t.Errorf("%s: error is %v, want a refusal that says %q", what, err, want)
	}
}

func verifierOf(t *testing.T, password string) string {
	t.Helper()
	v, err := Verifier(password)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

const password = "a password of a test"

func TestDatabasesAndUsers(t *testing.T) {
	s := newServer(t)
	ctx := t.Context()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	denied := func(what string, err error) {
		t.Helper()
		if err == nil || !strings.Contains(err.Error(), "permission denied") && !strings.Contains(err.Error(), "read-only transaction") {
			t.Errorf("%s: error is %v, want that it is denied", what, err)
		}
	}
	user := func(u NewUser) NewUser { u.Verifier = verifierOf(t, password); return u }

	refused(t, "an owner who is not there", CreateDatabase(ctx, s.dial, "shop", "shop"), `no user "shop"`)
	must(CreateUser(ctx, s.dial, user(NewUser{Name: "shop"})))
	refused(t, "a name that is taken", CreateUser(ctx, s.dial, user(NewUser{Name: "shop"})), "already")
	must(CreateDatabase(ctx, s.dial, "shop", "shop"))
	refused(t, "a database that is there", CreateDatabase(ctx, s.dial, "shop", "shop"), "already")
	refused(t, "a database that is not there", CreateUser(ctx, s.dial, user(NewUser{Name: "clerk", Database: "nothing"})), `no database "nothing"`)
	refused(t, "a reader of nothing", CreateUser(ctx, s.dial, user(NewUser{Name: "clerk", ReadOnly: true})), "--db")
	refused(t, "a password in the clear", CreateUser(ctx, s.dial, NewUser{Name: "clerk", Verifier: password}), "verifier")

	s.must(t, "shop", password, "shop", "CREATE TABLE goods (id serial PRIMARY KEY); INSERT INTO goods DEFAULT VALUES; CREATE SCHEMA back; CREATE TABLE back.office (n int)")
	must(CreateUser(ctx, s.dial, user(NewUser{Name: "clerk", Database: "shop"})))
	must(CreateUser(ctx, s.dial, user(NewUser{Name: "reader-1", Database: "shop", ReadOnly: true})))
	s.must(t, "shop", password, "shop", "CREATE TABLE later (n int)")
	s.must(t, "clerk", password, "shop", "INSERT INTO goods DEFAULT VALUES; INSERT INTO later VALUES (1); DELETE FROM back.office; CREATE TABLE own (n int)")
	s.must(t, "reader-1", password, "shop", "SELECT * FROM goods; SELECT * FROM later; SELECT * FROM back.office")
	denied("a reader writes", s.as(t, "reader-1", password, "shop", "INSERT INTO later VALUES (2)"))
	denied("a reader writes all the same", s.as(t, "reader-1", password, "shop", "SET default_transaction_read_only = off; INSERT INTO later VALUES (2)"))
	must(CreateUser(ctx, s.dial, user(NewUser{Name: "stranger"})))
	denied("a stranger connects", s.as(t, "stranger", password, "shop", "SELECT"))

	t.Run("a creation that was interrupted", func(t *testing.T) {
		s.must(t, "postgres", "", "postgres", "CREATE DATABASE half OWNER shop ALLOW_CONNECTIONS false")
		refused(t, "by another owner", CreateDatabase(ctx, s.dial, "half", "clerk"), "of shop")
		refused(t, "a user for it", CreateUser(ctx, s.dial, user(NewUser{Name: "early", Database: "half"})), "again")
		must(CreateDatabase(ctx, s.dial, "half", "shop"))
		s.must(t, "shop", password, "half", "CREATE TABLE t (n int)")
		denied("a stranger connects", s.as(t, "stranger", password, "half", "SELECT"))
	})

	t.Run("a new password", func(t *testing.T) {
		must(SetPassword(ctx, s.dial, "clerk", verifierOf(t, "another password")))
		if err := s.as(t, "clerk", password, "shop", "SELECT"); err == nil {
			t.Error("the old password still lets in")
		}
		s.must(t, "clerk", "another password", "shop", "SELECT")
		refused(t, "nobody", SetPassword(ctx, s.dial, "nobody", verifierOf(t, password)), "no user")
		refused(t, "pgha's own", SetPassword(ctx, s.dial, "replicator", verifierOf(t, password)), "own")
	})

	t.Run("lists", func(t *testing.T) {
		databases, err := Databases(ctx, s.dial)
		must(err)
		for i := range databases {
			if databases[i].Bytes == 0 {
				t.Errorf("%s has no size", databases[i].Name)
			}
			databases[i].Bytes, databases[i].Connections = 0, 0
		}
		if d := cmp.Diff([]Database{{Name: "half", Owner: "shop"}, {Name: "postgres", Owner: "postgres", Public: true}, {Name: "shop", Owner: "shop"}}, databases); d != "" {
			t.Errorf("databases (-want +got):\n%s", d)
		}
		users, err := Users(ctx, s.dial)
		must(err)
		for i := range users {
			users[i].Connections = 0 // those of a moment ago may not have ended
		}
		want := []User{
			{Name: "clerk", Password: true, Databases: []string{"shop"}},
			{Name: "postgres", Superuser: true, Databases: []string{"postgres"}, Own: true},
			{Name: "reader-1", Password: true, ReadOnly: true, Databases: []string{"shop"}},
			{Name: "shop", Password: true, Databases: []string{"half", "shop"}},
			{Name: "stranger", Password: true, Databases: []string{}},
		}
		if d := cmp.Diff(want, users); d != "" {
			t.Errorf("users (-want +got):\n%s", d)
		}
	})

	t.Run("drop", func(t *testing.T) {
		err := DropUser(ctx, s.dial, "clerk")
		refused(t, "an owner of a table", err, `owns table own (in shop): give that to another user first (pgha psql -d shop -c 'REASSIGN OWNED BY "clerk" TO OTHER_USER')`)
		s.must(t, "clerk", "another password", "shop", "SELECT") // nothing has changed
		refused(t, "an owner of databases", DropUser(ctx, s.dial, "shop"), "database half (in postgres)")
		refused(t, "a superuser", DropUser(ctx, s.dial, "postgres"), "own")
		refused(t, "nobody", DropUser(ctx, s.dial, "nobody"), "no user")

		s.must(t, "postgres", "", "shop", `REASSIGN OWNED BY "clerk" TO shop`)
		session, err := s.login(ctx, "clerk", "another password", "shop")
		must(err)
		must(DropUser(ctx, s.dial, "clerk"))
		if err := session.Ping(ctx); err == nil {
			t.Error("a session of the user that was dropped goes on")
		}
		_ = session.Close(ctx)
		must(DropUser(ctx, s.dial, "reader-1"))
		s.must(t, "shop", password, "shop", "SELECT * FROM own")
	})

	t.Run("an object that is made while the user is dropped", func(t *testing.T) {
		must(CreateUser(ctx, s.dial, user(NewUser{Name: "racer", Database: "shop"})))
		dials := 0
		dial := func(ctx context.Context, database string) (*pgx.Conn, error) {
			if dials++; dials == 4 { // after the first look, which is at two databases
				s.must(t, "postgres", "", "shop", "CREATE TABLE raced (n int); ALTER TABLE raced OWNER TO racer")
			}
			return s.dial(ctx, database)
		}
		refused(t, "the owner of a table", DropUser(ctx, dial, "racer"), "table raced (in shop)")
		s.must(t, "racer", password, "shop", "SELECT * FROM raced")
	})

	log, err := os.ReadFile(filepath.Join(s.dir, "log"))
	must(err)
	if !strings.Contains(string(log), "CREATE ROLE") {
		t.Error("the server's log has no statements")
	}
	for _, secret := range []string{password, "another password"} {
		if strings.Contains(string(log), secret) {
			t.Error("the server's log holds a password")
		}
	}
}
