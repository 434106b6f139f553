package sqladmin

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/jackc/pgx/v5"
)

// NewUser is a login role to be made.
type NewUser struct {
	Name     string
	Verifier string // of the password, as Verifier makes it
	// Database is one that the user may work in; none if empty.
	Database string
	// ReadOnly lets the user read in Database and no more.
	ReadOnly bool
}

// role is what is known of one.
type role struct {
	oid              uint32
	login, superuser bool
}

func lookupRole(ctx context.Context, conn *pgx.Conn, name string) (role, error) {
	var r role
	err := conn.QueryRow(ctx, "SELECT oid, rolcanlogin, rolsuper FROM pg_roles WHERE rolname = $1", name).Scan(&r.oid, &r.login, &r.superuser)
	if errors.Is(err, pgx.ErrNoRows) {
		return r, refuse("there is no user %q: see pgha user list, or make it with pgha user create %s", name, name)
	}
	if err != nil {
		return r, fmt.Errorf("look for user %s: %w", name, err)
	}
	return r, nil
}

// CreateUser makes a login role, with what it needs for its database. All of it
// is one transaction. It refuses with a [Refusal] a name that is taken and a
// database that is not there.
//
// In its database a user may connect, use all schemas of it, and read, write and
// make tables; one that is read-only may read. That holds for the tables that
// are there and for those that the database's owner makes later.
func CreateUser(ctx context.Context, dial Dial, u NewUser) error {
	if err := errors.Join(CheckNewRole(u.Name), checkVerifier(u.Verifier)); err != nil {
		return &Refusal{err.Error()}
	}
	if u.ReadOnly && u.Database == "" {
		return refuse("a user that may only read needs the database that it reads: --db NAME")
	}
	if u.Database != "" {
		if err := hasDatabase(ctx, dial, u.Database); err != nil {
			return err
		}
	}
	database := u.Database
	if database == "" {
		database = maintenance
	}
	return dial.with(ctx, database, func(conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error { return createUser(ctx, tx, u) })
	})
}

func hasDatabase(ctx context.Context, dial Dial, name string) error {
	if err := checkDatabase(name); err != nil {
		return &Refusal{err.Error()}
	}
	return dial.with(ctx, maintenance, func(conn *pgx.Conn) error {
		var open bool
		err := conn.QueryRow(ctx, "SELECT datallowconn FROM pg_database WHERE datname = $1", name).Scan(&open)
		switch {
		case errors.Is(err, pgx.ErrNoRows):
			return refuse("there is no database %q: see pgha db list, or make it with pgha db create %s", name, name)
		case err != nil:
			return fmt.Errorf("look for database %s: %w", name, err)
		case !open:
			return refuse("the database %q takes no connections: if its making was interrupted, run pgha db create %s again", name, name)
		}
		return nil
	})
}

func createUser(ctx context.Context, tx pgx.Tx, u NewUser) error {
	_, err := lookupRole(ctx, tx.Conn(), u.Name)
	var missing *Refusal
	switch {
	case err == nil:
		return refuse("there is a user %q already: a new password is pgha user passwd %s", u.Name, u.Name)
	case !errors.As(err, &missing):
		return err
	}
	sql := []string{fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", quote(u.Name), u.Verifier)}
	if u.ReadOnly {
		sql = append(sql, "ALTER ROLE "+quote(u.Name)+" SET default_transaction_read_only = on")
	}
	if u.Database != "" {
		grants, err := grants(ctx, tx, u)
		if err != nil {
			return err
		}
		sql = append(sql, grants...)
	}
	for _, s := range sql {
		if _, err := tx.Exec(ctx, s); err != nil {
			return fmt.Errorf("create user: %w", err)
		}
	}
	return nil
}

// grants lists the statements that let u work in the database that tx is in.
func grants(ctx context.Context, tx pgx.Tx, u NewUser) ([]string, error) {
	var owner string
	err := tx.QueryRow(ctx, "SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = current_database()").Scan(&owner)
	if err != nil {
		return nil, fmt.Errorf("look for the owner of database %s: %w", u.Database, err)
	}
	rows, err := tx.Query(ctx, `SELECT nspname::text FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' ORDER BY 1`)
	if err != nil {
		return nil, fmt.Errorf("list schemas: %w", err)
	}
	schemas, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("list schemas: %w", err)
	}
	database, schema, tables, sequences := "CONNECT, TEMPORARY", "USAGE, CREATE", "SELECT, INSERT, UPDATE, DELETE", "USAGE, SELECT, UPDATE"
	if u.ReadOnly {
		database, schema, tables, sequences = "CONNECT", "USAGE", "SELECT", "SELECT"
	}
	to := " TO " + quote(u.Name)
	sql := []string{"GRANT " + database + " ON DATABASE " + quote(u.Database) + to}
	for _, s := range schemas {
		sql = append(sql,
			"GRANT "+schema+" ON SCHEMA "+quote(s)+to,
			"GRANT "+tables+" ON ALL TABLES IN SCHEMA "+quote(s)+to,
			"GRANT "+sequences+" ON ALL SEQUENCES IN SCHEMA "+quote(s)+to,
		)
	}
	later := "ALTER DEFAULT PRIVILEGES FOR ROLE " + quote(owner) + " GRANT "
	return append(sql, later+tables+" ON TABLES"+to, later+sequences+" ON SEQUENCES"+to), nil
}

// SetPassword gives a user another password. Sessions that are open stay.
func SetPassword(ctx context.Context, dial Dial, name, verifier string) error {
	if err := errors.Join(CheckRole(name), checkVerifier(verifier)); err != nil {
		return &Refusal{err.Error()}
	}
	return dial.with(ctx, maintenance, func(conn *pgx.Conn) error {
		r, err := lookupRole(ctx, conn, name)
		if err != nil {
			return err
		}
		if !r.login {
			return refuse("%q is a group: it does not log in", name)
		}
		if _, err := conn.Exec(ctx, fmt.Sprintf("ALTER ROLE %s PASSWORD '%s'", quote(name), verifier)); err != nil {
			return fmt.Errorf("set password of %s: %w", name, err)
		}
		return nil
	})
}

// User is a login role, as List shows it.
type User struct {
	Name      string `json:"name"`
	Superuser bool   `json:"superuser,omitempty"`
	ReadOnly  bool   `json:"read_only,omitempty"`
	// Password is false when the user cannot log in with one.
	Password    bool     `json:"password"`
	Connections int      `json:"connections"` // now
	Databases   []string `json:"databases"`   // that it was let into, or owns
	// Own says that it is pgha's, and not an application's.
	Own bool `json:"own,omitempty"`
}

// Users lists the roles that can log in, by name.
func Users(ctx context.Context, dial Dial) (out []User, err error) {
	err = dial.with(ctx, maintenance, func(conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, `
SELECT r.rolname, r.rolsuper, coalesce('default_transaction_read_only=on' = ANY (s.setconfig), false), r.rolpassword IS NOT NULL,
  (SELECT count(*)::int FROM pg_stat_activity a WHERE a.usesysid = r.oid AND a.backend_type = 'client backend' AND a.pid <> pg_backend_pid()),
  ARRAY(SELECT d.datname::text FROM pg_database d WHERE NOT d.datistemplate AND (d.datdba = r.oid
    OR EXISTS (SELECT FROM aclexplode(d.datacl) x WHERE x.grantee = r.oid AND x.privilege_type = 'CONNECT')) ORDER BY 1),
  false
FROM pg_authid r LEFT JOIN pg_db_role_setting s ON s.setrole = r.oid AND s.setdatabase = 0
WHERE r.rolcanlogin ORDER BY 1`)
		if err == nil {
			out, err = pgx.CollectRows(rows, pgx.RowToStructByPos[User])
		}
		if err != nil {
			return fmt.Errorf("list users: %w", err)
		}
		return nil
	})
	for i := range out {
		out[i].Own = CheckRole(out[i].Name) != nil
	}
	return out, err
}

// ownedShown is how many of a role's objects a refusal names.
const ownedShown = 5

// DropUser ends a user's sessions and drops it, with its privileges. It refuses
// with a [Refusal], which names them, while the user owns anything.
func DropUser(ctx context.Context, dial Dial, name string) error {
	if err := CheckRole(name); err != nil {
		return &Refusal{err.Error()}
	}
	return dial.with(ctx, maintenance, func(conn *pgx.Conn) error {
		r, err := lookupRole(ctx, conn, name)
		if err != nil {
			return err
		}
		if r.superuser {
			return refuse("%q is a superuser and no application's user: take that away first with pgha psql -c 'ALTER ROLE %s NOSUPERUSER'", name, quote(name))
		}
		if err := ownsNothing(ctx, conn, dial, name, r.oid); err != nil {
			return err
		}
		return dropUser(ctx, conn, dial, name, r)
	})
}

// dropUser drops a role that owns nothing. Its sessions are ended first, and it
// is looked at again: DROP OWNED would take away what it has made meanwhile.
func dropUser(ctx context.Context, conn *pgx.Conn, dial Dial, name string, r role) error {
	if _, err := conn.Exec(ctx, "ALTER ROLE "+quote(name)+" NOLOGIN"); err != nil {
		return fmt.Errorf("drop user %s: %w", name, err)
	}
	err := func() error {
		if err := endSessions(ctx, conn, r.oid); err != nil {
			return err
		}
		if err := ownsNothing(ctx, conn, dial, name, r.oid); err != nil {
			return err
		}
		databases, err := dependent(ctx, conn, r.oid)
		if err != nil {
			return err
		}
		for _, d := range append(databases, maintenance) { // that of the server's own objects last
			err := dial.with(ctx, d, func(conn *pgx.Conn) error {
				_, err := conn.Exec(ctx, "DROP OWNED BY "+quote(name))
				return err
			})
			if err != nil {
				return fmt.Errorf("take away the privileges of %s in database %s: %w", name, d, err)
			}
		}
		if _, err := conn.Exec(ctx, "DROP ROLE "+quote(name)); err != nil {
			return fmt.Errorf("drop user %s: %w", name, err)
		}
		return nil
	}()
	if err != nil && r.login {
		_, back := conn.Exec(context.WithoutCancel(ctx), "ALTER ROLE "+quote(name)+" LOGIN")
		return errors.Join(err, back)
	}
	return err
}

// endSessions ends the sessions of a role and waits until they are gone.
func endSessions(ctx context.Context, conn *pgx.Conn, oid uint32) error {
	var left int
	err := conn.QueryRow(ctx, `SELECT count(*)::int FROM (SELECT pg_terminate_backend(pid, 10000) AS ended FROM pg_stat_activity WHERE usesysid = $1) s WHERE NOT ended`, oid).Scan(&left)
	if err != nil {
		return fmt.Errorf("end sessions: %w", err)
	}
	if left > 0 {
		return fmt.Errorf("end sessions: %d have not ended", left)
	}
	return nil
}

// dependent lists the databases in which something refers to a role.
func dependent(ctx context.Context, conn *pgx.Conn, oid uint32) ([]string, error) {
	rows, err := conn.Query(ctx, `
SELECT DISTINCT d.datname::text FROM pg_shdepend s JOIN pg_database d ON d.oid = s.dbid
WHERE s.refclassid = 'pg_authid'::regclass AND s.refobjid = $1 AND d.datname <> 'postgres' ORDER BY 1`, oid)
	if err == nil {
		var out []string
		if out, err = pgx.CollectRows(rows, pgx.RowTo[string]); err == nil {
			return out, nil
		}
	}
	return nil, fmt.Errorf("look for what refers to the user: %w", err)
}

// ownsNothing refuses a role that owns something, with how to give that away.
func ownsNothing(ctx context.Context, conn *pgx.Conn, dial Dial, name string, oid uint32) error {
	databases, err := dependent(ctx, conn, oid)
	if err != nil {
		return err
	}
	var owned, ways []string
	for _, d := range append([]string{maintenance}, databases...) {
		var here []string
		err := dial.with(ctx, d, func(conn *pgx.Conn) (err error) {
			// Objects of the server as a whole are seen from the first database alone.
			rows, err := conn.Query(ctx, `
SELECT pg_describe_object(classid, objid, objsubid) FROM pg_shdepend
WHERE refclassid = 'pg_authid'::regclass AND refobjid = $1 AND deptype = 'o'
  AND (dbid = (SELECT oid FROM pg_database WHERE datname = current_database()) OR dbid = 0 AND current_database() = 'postgres')
ORDER BY 1`, oid)
			if err == nil {
				here, err = pgx.CollectRows(rows, pgx.RowTo[string])
			}
			return err
		})
		if err != nil {
			return fmt.Errorf("look for what the user owns in database %s: %w", d, err)
		}
		for _, o := range here {
			owned = append(owned, fmt.Sprintf("%s (in %s)", o, d))
		}
		if len(here) > 0 {
			ways = append(ways, fmt.Sprintf(`pgha psql -d %s -c 'REASSIGN OWNED BY %s TO OTHER_USER'`, quoteShell(d), quote(name)))
		}
	}
	if len(owned) == 0 {
		return nil
	}
	text := strings.Join(owned[:min(len(owned), ownedShown)], ", ")
	if more := len(owned) - ownedShown; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return refuse("the user %q owns %s: give that to another user first (%s), or drop it", name, text, strings.Join(ways, "; "))
}

// quoteShell quotes a name for a shell where that is needed.
func quoteShell(s string) string {
	if newName.MatchString(s) {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
