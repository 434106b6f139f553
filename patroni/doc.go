// Package patroni knows everything about Patroni that depends on its version:
// its configuration, its REST API, its keys in etcd, and the repair of a
// bootstrap that was cut off. It also reads what little of a PostgreSQL data
// directory must be known before PostgreSQL runs.
//
// Invariants:
//
//   - PostgreSQL takes no connection over TCP without TLS, and no superuser,
//     replication or rewind login by password.
//   - Patroni speaks to the local etcd only, and to its own PostgreSQL only
//     through the unix socket.
//   - Role names are normalised: no caller sees the difference between the
//     "master" of Patroni 3 and the "primary" of Patroni 4.
//   - A data directory is never deleted here, only moved aside.
package patroni
