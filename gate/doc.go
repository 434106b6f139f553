// Package gate decides which node's kernel may let clients through to a
// PostgreSQL that takes writes, and sees to it that there is never more than
// one.
//
// One key in etcd, the [Record], names the owner. The owner renews it with a
// transaction every beat; each renewal that is committed lets its kernel pass
// clients until a moment that is reckoned from before it was sent. When the
// renewals stop, the kernel shuts by itself, without any process, and another
// node that has waited for longer than that takes the record and Patroni's
// leader key in one transaction. docs/adr/0010-gate.md has the protocol, what it
// assumes and why it is safe, 0011 what the kernel does, 0012 what happens
// without a quorum.
//
// Invariants:
//
//   - Clients reach a writable PostgreSQL through its owner's element in the
//     kernel and through nothing else, in both directions.
//   - The owner's element ends no later than the promise that is committed, or
//     than what all other members have agreed to while there is no quorum.
//   - A promise counts from a clock that was read before it was sent; what
//     others have promised counts from after it was received.
//   - Nobody becomes the owner before every promise of the last one is over, as
//     the candidate's own clock has measured it with a margin, or before the
//     last one has said that its gate is shut. It says so after its kernel has
//     confirmed it, and opens again only with another commit.
//   - Nobody is promoted who is not the owner, or while a replica's element may be
//     left.
//   - An answer that is lost counts as whatever is worse. No transaction is
//     sent twice, and each is bound to the revision of the record that it knows,
//     so that one that is carried out late does no harm.
//   - What the kernel does not confirm is not known. What it was last asked for
//     then counts as promised and not as shut.
//
// The files: record.go has the record and the types that go in and out.
// decide.go has the decisions, pure functions of an observation, a reason with
// each. machine.go has the [Machine], which keeps what must be remembered
// between them and does nothing itself; the simulation drives it, and so does
// [Gate], in gate.go, with a real etcd, kernel and clock behind small
// interfaces. guards.go names the rules that the tests take out one at a time.
// status.go tells what the gate believes, and how long the phases of a failover
// took. The kernel's side is in package kernel below this one.
package gate
