// Package faults breaks whole clusters in every way that a lab can, while real
// clients write down what they did and the kernel what left each host.
//
// Invariants, checked after every fault by pure functions over the recordings:
//
//   - what was acknowledged is there in the end (synchronous mode), and what
//     was refused is not ([Lost], [Unwanted]);
//   - no two servers take writes in turns: the reigns of primaries follow each
//     other ([Reigns]);
//   - the registers behave as if there were one copy of each ([Linearizable]);
//   - no session of an old primary is answered once the new one has
//     acknowledged a write, by packet capture and not by any log ([Shut]).
//
// Time is the test program's monotonic clock alone. An operation is known to
// have taken effect between its call and its return, so that an order is
// claimed only where one operation was called after another had returned.
package faults
