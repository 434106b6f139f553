package sqladmin

import (
	"context"
	"errors"
	"fmt"

	"github.com/jackc/pgx/v5"
)

// Dial connects to a database of the primary as the superuser. The caller of
// what takes a Dial closes nothing: each connection is closed where it was made.
type Dial func(ctx context.Context, database string) (*pgx.Conn, error)

// maintenance is the database that is always there.
const maintenance = "postgres"

// Refusal is why something is not done, in words for the operator. Nothing was
// changed.
type Refusal struct{ Message string }

// Error implements error.
func (r *Refusal) Error() string { return r.Message }

func refuse(format string, args ...any) error { return &Refusal{fmt.Sprintf(format, args...)} }

// with runs f on a connection to a database.
func (dial Dial) with(ctx context.Context, database string, f func(*pgx.Conn) error) error {
	conn, err := dial(ctx, database)
	if err != nil {
		return fmt.Errorf("connect to database %s: %w", database, err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	return f(conn)
}

// CreateDatabase makes a database that belongs to owner, or to the superuser if
// that is empty, and in which nobody but the owner and whom [CreateUser] lets in
// may do anything. It refuses with a [Refusal] a name that is taken and an owner
// that is not there. A creation that was interrupted is completed by the next.
func CreateDatabase(ctx context.Context, dial Dial, name, owner string) error {
	if err := CheckNewDatabase(name); err != nil {
		return &Refusal{err.Error()}
	}
	err := dial.with(ctx, maintenance, func(conn *pgx.Conn) error { return createDatabase(ctx, conn, name, owner) })
	if err != nil {
		return err
	}
	// Before PostgreSQL 15 everybody may make tables in the schema public.
	return dial.with(ctx, name, func(conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, "REVOKE CREATE ON SCHEMA public FROM PUBLIC"); err != nil {
			return fmt.Errorf("close the schema public of %s: %w", name, err)
		}
		return nil
	})
}

func createDatabase(ctx context.Context, conn *pgx.Conn, name, owner string) error {
	if owner == "" {
		owner = "postgres"
	} else if _, err := lookupRole(ctx, conn, owner); err != nil {
		return err
	}
	var has string
	var open bool
	err := conn.QueryRow(ctx, "SELECT pg_get_userbyid(datdba), datallowconn FROM pg_database WHERE datname = $1", name).Scan(&has, &open)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		// Until everybody is locked out of it, nobody can connect.
		if _, err := conn.Exec(ctx, "CREATE DATABASE "+quote(name)+" OWNER "+quote(owner)+" ALLOW_CONNECTIONS false"); err != nil {
			return fmt.Errorf("create database: %w", err)
		}
	case err != nil:
		return fmt.Errorf("look for database %s: %w", name, err)
	case open:
		return refuse("there is a database %q already, of %s: choose another name", name, has)
	case has != owner:
		return refuse("there is a database %q already, of %s, that takes no connections: choose another name, or give the owner it has", name, has)
	}
	for _, sql := range []string{
		"REVOKE ALL ON DATABASE " + quote(name) + " FROM PUBLIC",
		"ALTER DATABASE " + quote(name) + " ALLOW_CONNECTIONS true",
	} {
		if _, err := conn.Exec(ctx, sql); err != nil {
			return fmt.Errorf("complete database %s: %w", name, err)
		}
	}
	return nil
}

// Database is one of the cluster's, as List shows it.
type Database struct {
	Name        string `json:"name"`
	Owner       string `json:"owner"`
	Bytes       int64  `json:"bytes"`
	Connections int    `json:"connections"` // now
	// Public says that every user of the cluster may connect.
	Public bool `json:"public,omitempty"`
}

// Databases lists the databases, without templates, by name.
func Databases(ctx context.Context, dial Dial) (out []Database, err error) {
	err = dial.with(ctx, maintenance, func(conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, `
SELECT d.datname, pg_get_userbyid(d.datdba), pg_database_size(d.oid),
  (SELECT count(*)::int FROM pg_stat_activity a WHERE a.datid = d.oid AND a.pid <> pg_backend_pid()),
  EXISTS (SELECT FROM aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) x WHERE x.grantee = 0 AND x.privilege_type = 'CONNECT')
FROM pg_database d WHERE NOT d.datistemplate ORDER BY 1`)
		if err == nil {
			out, err = pgx.CollectRows(rows, pgx.RowToStructByPos[Database])
		}
		if err != nil {
			return fmt.Errorf("list databases: %w", err)
		}
		return nil
	})
	return out, err
}

// Size returns how many bytes a copy of the whole server takes, its WAL
// included.
func Size(ctx context.Context, conn *pgx.Conn) (bytes int64, err error) {
	err = conn.QueryRow(ctx, `
SELECT (SELECT coalesce(sum(pg_tablespace_size(oid)), 0) FROM pg_tablespace)::bigint
     + (SELECT coalesce(sum(size), 0) FROM pg_ls_waldir())::bigint`).Scan(&bytes)
	if err != nil {
		return 0, fmt.Errorf("read the size of the databases: %w", err)
	}
	return bytes, nil
}
