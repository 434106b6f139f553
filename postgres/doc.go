// Package postgres tells what the local PostgreSQL is doing, and tells it at
// once. It looks; when asked to, it ends replication connections, or a server that
// hangs. It starts nothing.
//
// Invariants:
//
//   - A [Probe] never claims more than was proved after Probe.At: the clock is
//     read before the question is asked. What is in doubt is [Unknown].
//   - [Gone] is proved each time: no postmaster, by the identity of the process
//     and not its number alone, and no process left on the server's shared memory.
//     A killed postmaster's sessions can finish and acknowledge the commit that
//     they are at, so Gone waits for the last of them.
//   - [Primary] and [Recovery] are answers of the server itself, on a connection
//     whose other end is a child of the very postmaster that is being watched, and
//     which lived when the answer had come.
//   - A server that answers with an error is alive. [Hung] is for one that does not
//     answer at all, the old connection or new ones, through at least two questions:
//     the time in which this process itself was stopped does not count.
//   - The postmaster is watched by its pidfd, so its end is seen at once, also while
//     a question is out.
//
// One question is out at a time. One connection is kept for it, as a superuser
// through the unix socket, so that neither a full server nor a shut port stands in
// the way; new connections are tried beside it, for a stopped postmaster leaves
// the old ones working.
package postgres
