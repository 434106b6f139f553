package node

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/pki"
	"pgha/sqladmin"
)

// dialMember connects to the PostgreSQL of a data node as the superuser: through
// the private socket on this node, else over TLS with the operator's certificate.
func (n *Node) dialMember(ctx context.Context, m cluster.Member, database string) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("connect_timeout=10")
	if err != nil {
		return nil, fmt.Errorf("prepare connection: %w", err)
	}
	c.User, c.Database, c.Fallbacks, c.Password = "postgres", database, nil, ""
	if m.Name == n.cfg.Name {
		c.Host, c.Port, c.TLSConfig = n.paths.pgSocket(), n.cfg.Ports.Postgres, nil
		return pgx.ConnectConfig(ctx, c)
	}
	admin, err := pki.NewReloader(n.pki, pki.RoleAdmin, n.opts.Log)
	if err != nil {
		return nil, fmt.Errorf("load the operator's certificate: %w", err)
	}
	c.Host, c.Port = m.Addr.String(), m.Ports.Postgres
	c.TLSConfig = admin.ClientConfig(nil)
	c.TLSConfig.ServerName = c.Host
	return pgx.ConnectConfig(ctx, c)
}

// primaryDial connects to databases of the primary.
func (n *Node) primaryDial(ctx context.Context) (sqladmin.Dial, error) {
	if err := n.notOnWitness("has no key to the data"); err != nil {
		return nil, err
	}
	l, err := n.readLeadership(ctx)
	if err != nil {
		return nil, err
	}
	if l.serving() == "" {
		return nil, refused(cluster.CodeUnavailable, "there is no primary now: see pgha status")
	}
	m, err := n.memberNamed(l.serving())
	if err != nil {
		return nil, err
	}
	return func(ctx context.Context, database string) (*pgx.Conn, error) { return n.dialMember(ctx, m, database) }, nil
}

// orList writes names as "a or b".
func orList(names []string) string {
	out := ""
	for i, name := range names {
		switch {
		case i == 0:
		case i == len(names)-1:
			out += " or "
		default:
			out += ", "
		}
		out += name
	}
	return out
}

// sqlError makes a refusal of sqladmin one of an operation.
func sqlError(err error) error {
	var r *sqladmin.Refusal
	if errors.As(err, &r) {
		return refused(cluster.CodeConflict, "%s", r.Message)
	}
	return err
}

// DatabaseRequest asks for a new database.
type DatabaseRequest struct {
	Name  string `json:"name"`
	Owner string `json:"owner,omitempty"` // "" = the superuser
}

// UserRequest asks for a user, or for what becomes of one.
type UserRequest struct {
	Name string `json:"name"`
	// Verifier is what PostgreSQL keeps of the password ([sqladmin.Verifier]): the
	// password itself stays on the operator's side.
	Verifier string `json:"verifier,omitempty"`
	Database string `json:"database,omitempty"`
	ReadOnly bool   `json:"read_only,omitempty"`
}

func (n *Node) createDatabase(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req DatabaseRequest
	dial, err := n.sqlOperation(ctx, raw, &req)
	if err != nil {
		return nil, err
	}
	if err := sqladmin.CreateDatabase(ctx, dial, req.Name, req.Owner); err != nil {
		return nil, sqlError(err)
	}
	owner := cmp.Or(req.Owner, "postgres")
	o.Say("database %s belongs to %s; nobody else may connect to it", req.Name, owner)
	n.event(EventConfig, "", o.Actor(), "database %s was made, for %s", req.Name, owner)
	return req, nil
}

func (n *Node) createUser(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req UserRequest
	dial, err := n.sqlOperation(ctx, raw, &req)
	if err != nil {
		return nil, err
	}
	u := sqladmin.NewUser{Name: req.Name, Verifier: req.Verifier, Database: req.Database, ReadOnly: req.ReadOnly}
	if err := sqladmin.CreateUser(ctx, dial, u); err != nil {
		return nil, sqlError(err)
	}
	text := "user " + req.Name + " was made"
	switch {
	case req.ReadOnly:
		text += ", and may read in database " + req.Database
	case req.Database != "":
		text += ", and may read and write in database " + req.Database
	}
	o.Say("%s", text)
	n.event(EventSecrets, "", o.Actor(), "%s", text)
	return struct{}{}, nil
}

func (n *Node) setUserPassword(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req UserRequest
	dial, err := n.sqlOperation(ctx, raw, &req)
	if err != nil {
		return nil, err
	}
	if err := sqladmin.SetPassword(ctx, dial, req.Name, req.Verifier); err != nil {
		return nil, sqlError(err)
	}
	o.Say("user %s has a new password; sessions that are open go on", req.Name)
	n.event(EventSecrets, "", o.Actor(), "user %s was given a new password", req.Name)
	return struct{}{}, nil
}

func (n *Node) dropUser(ctx context.Context, o *Operation, raw json.RawMessage) (any, error) {
	var req UserRequest
	dial, err := n.sqlOperation(ctx, raw, &req)
	if err != nil {
		return nil, err
	}
	o.Leaves("user %s may not be able to log in: repeat the command, or let it in again with pgha psql -c 'ALTER ROLE \"%s\" LOGIN'", req.Name, req.Name)
	if err := sqladmin.DropUser(ctx, dial, req.Name); err != nil {
		var r *sqladmin.Refusal
		if errors.As(err, &r) {
			o.Leaves("")
		}
		return nil, sqlError(err)
	}
	o.Say("user %s was dropped, and its sessions were ended", req.Name)
	n.event(EventSecrets, "", o.Actor(), "user %s was dropped", req.Name)
	return struct{}{}, nil
}

// sqlOperation decodes a request and finds the primary.
func (n *Node) sqlOperation(ctx context.Context, raw json.RawMessage, req any) (sqladmin.Dial, error) {
	if err := decodeRequest(raw, req); err != nil {
		return nil, err
	}
	return n.primaryDial(ctx)
}

func (n *Node) databasesHandler(w http.ResponseWriter, r *http.Request) {
	dial, err := n.primaryDial(r.Context())
	var out []sqladmin.Database
	if err == nil {
		out, err = sqladmin.Databases(r.Context(), dial)
	}
	reply(w, out, err)
}

func (n *Node) usersHandler(w http.ResponseWriter, r *http.Request) {
	dial, err := n.primaryDial(r.Context())
	var out []sqladmin.User
	if err == nil {
		out, err = sqladmin.Users(r.Context(), dial)
	}
	reply(w, out, err)
}

// Databases lists the databases of the cluster.
func (l *Local) Databases(ctx context.Context) ([]sqladmin.Database, error) {
	var out []sqladmin.Database
	return out, l.call(ctx, http.MethodGet, "/v1/databases", nil, &out)
}

// Users lists the users of the cluster's databases.
func (l *Local) Users(ctx context.Context) ([]sqladmin.User, error) {
	var out []sqladmin.User
	return out, l.call(ctx, http.MethodGet, "/v1/users", nil, &out)
}
