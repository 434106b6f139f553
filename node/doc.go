// Package node is the daemon: the one place where etcd, Patroni, HAProxy, the
// firewall and the certificates meet. It holds the node's roles, the order in
// which its parts start, the loops that bring the host to the desired state,
// and the API through which operators and peers speak to it.
//
// Invariants:
//
//   - A node that has a cluster identity never makes a new one: a missing or
//     foreign CA, certificate or etcd member stops it with both values shown.
//   - Children (Patroni, HAProxy) outlive the daemon. It adopts them before
//     anything that can wait, and stops them only when it was asked to stop.
//   - What the daemon does to the host is derived from the roster, the settings
//     and Patroni's keys, again and again; no step relies on an earlier event.
//   - What an operator asks for is an [Operation]: it holds the cluster's lock from
//     its first look to its end, tells its steps, can be repeated, and ends with
//     the command line that asked for it. What several nodes have to do stands in
//     etcd, and each follows it in its rounds, also one that was down.
//   - PostgreSQL's leadership is handed over in one place, moveLeadership.
//   - A node that was removed, that belongs to a past generation, or whose disk is
//     older than what others have seen of it stays out of service, also after a
//     restart, until it is reset.
//   - Decisions are pure functions (decide…, assess); effects stand elsewhere.
package node
