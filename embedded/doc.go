// Package embedded runs one etcd member inside this process and looks after
// the membership of its cluster.
//
// # What holds
//
//   - A member starts from what is on its disk. Without data it either makes
//     the cluster (Config.Bootstrap, the first node alone) or joins one that
//     already lists it as a learner that has never run. A member that has run
//     before is never started from an empty directory: it would have forgotten
//     what it voted for.
//   - Data is inspected before etcd touches it, because etcd answers damage by
//     ending the process. Damage, a full disk, another cluster's data and the
//     data of a removed member are refused with an error that says what to do.
//   - The number of voters stays odd. DecideMembership and
//     DecideLeaderPlacement are pure; the Server's methods carry them out.
//   - Stop ends, whatever state the cluster is in.
//
// # Fatal errors
//
// etcd meets an error that it cannot survive (a failed write to its log, a
// broken invariant) with log.Fatal or log.Panic. Here both first write the
// cause to Config.FatalFile, then call Config.OnFatal, then block the goroutine
// for ever: nothing runs past the point at which etcd wanted the process dead,
// no lock is released, no vote or write leaves this member. Done is closed and
// Err tells the cause. The owner must then end the process; memory, locks and
// ports of the dead member are given back by that alone. A bare Go panic inside
// etcd or raft (there are a few that bypass the logger) cannot be caught and
// ends the process with a stack trace; the next Start inspects what it left.
//
// The record is read again by the next Start. A full disk is refused until
// there is space; damage, a lost directory and removal are refused as long as
// the same member's data is there; other causes are logged and tried again.
//
// # Corruption checks
//
// Start verifies the write-ahead log's checksums, reads every page and key of
// the database, and compares the two. etcd's own InitialCorruptCheck stays off:
// it asks every peer before it serves anyone, so that one powered-off peer
// would delay each start by seven seconds. Instead the leader compares the
// members' hashes at each compaction (CompactHashCheck); a difference shows as
// a CORRUPT alarm in Status.
//
// # Snapshots
//
// SaveSnapshot writes the keyspace that this member has, quorum or not, to one
// file with a hash over everything. Restore makes a member of a new cluster of
// one from that: with new IDs, so that members of the old one, alive or not, are
// strangers to it for good. Exchange puts it in the old one's place in one step.
//
// # Learners
//
// etcd's gRPC layer refuses most calls on a learner. A cluster of two nodes has
// one for as long as no witness has joined, and that node's Patroni speaks to
// its local member alone; so the calls that Patroni makes are answered on a
// learner too. They go through the leader, as on any follower.
//
// # One per process
//
// etcd's metrics and its log segment size are global to the process. Several
// members in one process work (the tests do it), but share those.
package embedded
