// Package haproxy renders HAProxy's configuration and speaks to a running
// HAProxy through its two sockets, the runtime API and the master's.
//
// Invariants:
//
//   - TLS of database sessions is passed through; HAProxy sees no data.
//   - A server counts as up only while Patroni, reached over TLS with a
//     certificate in the server's own name, says that it has the role.
//   - Sessions to a server that goes down are cut at once.
//   - A read-write session is given to nobody while two servers claim to be
//     primary.
package haproxy
