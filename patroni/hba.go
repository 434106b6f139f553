package patroni

import (
	"fmt"
	"net/netip"
	"strings"
)

// Names of the maps in pg_ident.conf.
const (
	localMap = "pgha_local"
	certMap  = "pgha_cert"
)

// PGHBA returns the lines of pg_hba.conf. There is no line without TLS but for
// the unix socket, and the first match decides: the three roles of the product
// log in by certificate or not at all, everyone else by password.
func PGHBA(c Config) []string {
	lines := []string{
		fmt.Sprintf("local all %s peer map=%s", Superuser, localMap),
		fmt.Sprintf("local replication %s peer map=%s", ReplicationUser, localMap),
		// From anywhere: the certificate is the guard, and the firewall says who
		// reaches the port.
		fmt.Sprintf("hostssl all %s all cert map=%s", Superuser, certMap),
	}
	for _, m := range c.Members {
		net := single(m.Addr)
		lines = append(lines,
			fmt.Sprintf("hostssl replication %s %s cert map=%s", ReplicationUser, net, certMap),
			fmt.Sprintf("hostssl postgres %s %s cert map=%s", RewindUser, net, certMap))
	}
	lines = append(lines, fmt.Sprintf("hostssl all %s,%s all reject", ReplicationUser, RewindUser))
	// Behind what the product's own roles need, so that they cannot be shadowed,
	// and before the lines for everyone else.
	lines = append(lines, c.HBA...)
	for _, m := range c.Members {
		lines = append(lines, fmt.Sprintf("hostssl all all %s scram-sha-256", single(m.Addr)))
	}
	for _, net := range c.ClientNets {
		lines = append(lines, fmt.Sprintf("hostssl all all %s scram-sha-256", net.Masked()))
	}
	return lines
}

// PGIdent returns the lines of pg_ident.conf: which OS user may be which role
// over the socket, and which certificate over TLS.
func PGIdent(Config) []string {
	return []string{
		localMap + " " + OSUser + " " + Superuser,
		localMap + " root " + Superuser,
		localMap + " " + OSUser + " " + ReplicationUser,
		certMap + " " + CNPatroni + " " + ReplicationUser,
		certMap + " " + CNPatroni + " " + RewindUser,
		certMap + " " + CNAdmin + " " + Superuser,
	}
}

func single(a netip.Addr) netip.Prefix {
	a = a.Unmap().WithZone("")
	return netip.PrefixFrom(a, a.BitLen())
}

// rewindFunctions are what pg_rewind calls.
var rewindFunctions = []string{
	"pg_ls_dir(text, boolean, boolean)", "pg_stat_file(text, boolean)",
	"pg_read_binary_file(text)", "pg_read_binary_file(text, bigint, bigint, boolean)",
}

// RoleDriftSQL returns a query for what differs from [RoleSQL], a text a row.
// Run it as Superuser: others may not see whether there are passwords.
func RoleDriftSQL() string {
	var functions []string
	for _, f := range rewindFunctions {
		functions = append(functions, "('pg_catalog."+f+"')")
	}
	return fmt.Sprintf(`WITH want (name, replication) AS (VALUES ('%[1]s', true), ('%[2]s', false)),
role AS (SELECT want.*, a.* FROM want LEFT JOIN pg_catalog.pg_authid a ON a.rolname = want.name)
SELECT name || ' ' || what FROM role, LATERAL (VALUES
  (oid IS NULL, 'does not exist'),
  (NOT rolcanlogin, 'may not log in'),
  (rolpassword IS NOT NULL, 'has a password'),
  (replication AND NOT rolreplication, 'may not replicate'),
  (NOT replication AND rolreplication, 'may replicate'),
  (rolsuper, 'is a superuser'),
  (rolcreatedb OR rolcreaterole OR rolbypassrls, 'has rights that it needs not'),
  (rolconnlimit <> -1, 'has a limit of connections')
) AS v (wrong, what) WHERE wrong
UNION ALL
SELECT name || ' may not call ' || f FROM role, (VALUES %[3]s) AS v (f)
WHERE NOT replication AND oid IS NOT NULL AND NOT rolsuper AND NOT pg_catalog.has_function_privilege(oid, f, 'EXECUTE')`,
		ReplicationUser, RewindUser, strings.Join(functions, ", "))
}

// RoleSQL returns statements that make the roles of the product, and may be run
// again. Patroni runs the like after initdb; an adopted data directory has not
// seen it. Run them as Superuser in the database postgres of the primary.
func RoleSQL() []string {
	role := func(name, options string) string {
		return fmt.Sprintf(`DO $$BEGIN
IF NOT EXISTS (SELECT FROM pg_catalog.pg_roles WHERE rolname = '%[1]s') THEN CREATE ROLE %[1]s; END IF;
ALTER ROLE %[1]s LOGIN %[2]s PASSWORD NULL;
END$$`, name, options)
	}
	const plain = "NOSUPERUSER NOCREATEDB NOCREATEROLE NOBYPASSRLS CONNECTION LIMIT -1 "
	sql := []string{role(ReplicationUser, plain+"REPLICATION"), role(RewindUser, plain+"NOREPLICATION")}
	for _, f := range rewindFunctions {
		sql = append(sql, fmt.Sprintf("GRANT EXECUTE ON FUNCTION pg_catalog.%s TO %s", f, RewindUser))
	}
	return sql
}
