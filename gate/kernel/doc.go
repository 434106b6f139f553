// Package kernel is the kernel's side of the gate: TCP to and from
// PostgreSQL's own port passes only until a moment that the kernel itself
// watches over. Once [Kernel.Open] has returned, no process is needed to shut
// the gate again.
//
// The table "inet pgha_gate" holds everything:
//
//	set owner, set replica     the port, with a timeout, while the gate is open
//	set moved                  the port, while ownership is known to have moved
//	chain guard                meta time < WALL accept
//	chain input, chain output  the hooks, before filter's own chains
//
// and its rules say: a packet to the port (input) or from it (output) passes if
// the port is in "replica" or "owner" and the guard accepts; otherwise it is
// counted and dropped, or answered with a reset while the port is in "moved".
//
// Invariants:
//
//   - Two clocks must both allow a packet. The element's timeout starts when
//     the kernel takes the batch, so a process that was stopped between
//     computing the rest and handing it over would open too late: the guard,
//     an absolute time on the wall clock that is computed nowhere but at the
//     beginning, stops that. A wall clock that is set forward shuts the gate
//     early, until the next refresh; one that is set back is covered by the
//     timeout.
//   - Every change is one batch. In a refresh and in the step from replica to
//     owner there is no moment at which a packet finds the gate shut, and in no
//     change one at which it finds it open longer than the old or the new state
//     allows.
//   - At most one of "owner" and "replica" holds the port.
//   - Without a right table there is no gate, so whatever wants the gate shut
//     ([Kernel.Install], [Kernel.Shut], [Kernel.Moved]) reads the whole table
//     back and replaces it, shut, where it isn't exactly as it should be.
//   - A right table is never replaced: a daemon that starts again leaves open
//     connections alone.
//   - Other tables cannot open the gate: an accept ends only its own chain, a
//     drop is final. Loopback is not exempt. Unix sockets are not gated.
package kernel
