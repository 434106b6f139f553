package sqladmin

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/jackc/pgx/v5"
)

// maxName is the length of a name in PostgreSQL, in bytes.
const maxName = 63

// newName is what a new name may be: what needs no quotes but for the hyphen.
var newName = regexp.MustCompile(`^[a-z][a-z0-9_-]*$`)

// reservedRoles are the product's own and those that PostgreSQL keeps.
var reservedRoles = []string{"postgres", "replicator", "rewinder", "public", "none", "all"}

// reservedDatabases are PostgreSQL's own and words of pg_hba.conf.
var reservedDatabases = []string{"postgres", "template0", "template1", "replication", "all", "sameuser", "samerole", "samegroup"}

// CheckNewRole says what is wrong with the name of a role to be made, or nil.
func CheckNewRole(name string) error { return checkNew("user", name, CheckRole) }

// CheckNewDatabase says what is wrong with the name of a database to be made, or
// nil.
func CheckNewDatabase(name string) error { return checkNew("database", name, checkDatabase) }

func checkNew(what, name string, check func(string) error) error {
	if err := check(name); err != nil {
		return err
	}
	if !newName.MatchString(name) {
		return fmt.Errorf("%q cannot be the name of a %s: use lower-case letters, digits, _ and -, beginning with a letter", name, what)
	}
	return nil
}

// CheckRole says why a role of that name is not an application's, or nil. The
// name may be any that an existing database has.
func CheckRole(name string) error {
	switch {
	case slices.Contains(reservedRoles, name), strings.HasPrefix(name, "pg_"), strings.HasPrefix(name, "pgha"):
		return fmt.Errorf("%q is pgha's or PostgreSQL's own and no application's user: choose another name", name)
	}
	return checkLength("user", name)
}

func checkDatabase(name string) error {
	if slices.Contains(reservedDatabases, name) || strings.HasPrefix(name, "pg_") {
		return fmt.Errorf("%q is PostgreSQL's own and no application's database: choose another name", name)
	}
	return checkLength("database", name)
}

func checkLength(what, name string) error {
	switch {
	case name == "":
		return fmt.Errorf("the name of the %s is empty", what)
	case len(name) > maxName:
		return fmt.Errorf("the name of the %s has %d bytes: PostgreSQL keeps %d", what, len(name), maxName)
	case strings.ContainsRune(name, 0):
		return fmt.Errorf("the name of the %s holds a zero byte", what)
	}
	return nil
}

func quote(name string) string { return pgx.Identifier{name}.Sanitize() }
