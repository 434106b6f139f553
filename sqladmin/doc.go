// Package sqladmin makes, lists and drops databases and login roles for
// applications, on a connection that the caller opens as the superuser.
//
// Invariants:
//
//   - The server never sees a password: its SCRAM-SHA-256 verifier is computed
//     here, so that no log of statements can hold more than that.
//   - Names are checked before anything is sent and quoted in every statement.
//     The roles and databases that the product or PostgreSQL needs are refused.
//   - Nothing that a role owns is ever dropped with it.
//   - What was interrupted can be repeated: a database takes connections only
//     once it is complete, and a user is made in one transaction.
package sqladmin
