package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"pgha/patroni"
	"pgha/postgres"
)

const (
	// rolesEvery is the pause between looks at the database's roles.
	rolesEvery   = 30 * time.Second
	rolesTimeout = 10 * time.Second
)

// rolesLoop looks, on the primary, after the database roles that pgha itself
// uses: somebody may have given them a password, or taken a right from them.
func (n *Node) rolesLoop(ctx context.Context) error {
	for sleep(ctx, rolesEvery) {
		if n.keeper == nil || !n.keeper.gate.Status().Self || n.keeper.watcher.Latest().Kind != postgres.Primary {
			n.partProblem(ctx, "database roles", nil) // the primary says it
			continue
		}
		n.partProblem(ctx, "database roles", n.checkRoles(ctx))
	}
	return nil
}

// checkRoles puts right what is wrong with the roles, with an event that names it.
func (n *Node) checkRoles(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rolesTimeout)
	defer cancel()
	c, err := n.localPostgres(ctx)
	if err != nil {
		return rolesError(err)
	}
	defer func() { _ = c.Close(context.WithoutCancel(ctx)) }()
	found, err := roleDrift(ctx, c)
	if err != nil || len(found) == 0 {
		return rolesError(err)
	}
	// A standby that is away must not hold this up.
	sql := append([]string{"SET synchronous_commit = local"}, patroni.RoleSQL()...)
	for _, s := range sql {
		if _, err := c.Exec(ctx, s); err != nil {
			return fmt.Errorf("put the database roles right (%s): %w", strings.Join(found, "; "), rolesError(err))
		}
	}
	for _, f := range found {
		n.event(EventSecrets, n.cfg.Name, actorPgha, "a database role of pgha's own was changed by hand: %s; put right", f)
	}
	return nil
}

// roleDrift names what differs from [patroni.RoleSQL].
func roleDrift(ctx context.Context, c *pgx.Conn) ([]string, error) {
	rows, err := c.Query(ctx, patroni.RoleDriftSQL())
	if err != nil {
		return nil, fmt.Errorf("check the database roles: %w", err)
	}
	found, err := pgx.CollectRows(rows, pgx.RowTo[string])
	if err != nil {
		return nil, fmt.Errorf("check the database roles: %w", err)
	}
	return found, nil
}

// rolesError says what to do where pgha cannot: its own superuser was changed.
func rolesError(err error) error {
	var pg *pgconn.PgError
	if err == nil || !errors.As(err, &pg) {
		return err
	}
	const by = "as another superuser, or in single-user mode (man postgres)"
	switch pg.Code {
	case "28000": // invalid_authorization_specification
		return fmt.Errorf("pgha cannot log in as %s (%s): run ALTER ROLE %s LOGIN %s", patroni.Superuser, pg.Message, patroni.Superuser, by)
	case "42501": // insufficient_privilege
		return fmt.Errorf("%s is no superuser any more (%s): run ALTER ROLE %s SUPERUSER %s", patroni.Superuser, pg.Message, patroni.Superuser, by)
	}
	return err
}
