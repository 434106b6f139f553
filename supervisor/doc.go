// Package supervisor starts, watches and restarts operating-system processes
// that must outlive the supervising process. It knows nothing about what the
// children do.
//
// Invariants:
//
//   - A child never depends on its supervisor: it has its own session, writes to
//     a file and not to a pipe, has no parent-death signal, and nothing here kills
//     it except [Process.Stop], [Process.StopBy], [Process.Kill],
//     [Process.Restart], a failed health check, or a leftover with another
//     configuration being replaced.
//   - Never two of one name. A lock file keeps a second supervisor away, and
//     [Process.Start] looks for a leftover of a supervisor that died (pid file
//     first, then a scan of /proc for the marker, which covers a crash between
//     fork and the writing of the pid file) and adopts or ends it.
//   - No signal is sent and no exit is awaited by pid: a pidfd is opened first and
//     the identity (boot, start time, marker) is read while it proves that the pid
//     was not recycled. Only exact children are reaped, never "any child".
//   - One goroutine owns the state of a process. Every change passes through one
//     function, which logs it, keeps it in a ring and tells the subscribers.
//   - What is done about a leftover and when a restart is due are pure functions
//     (leftover.go, budget.go).
//
// Files in Spec.RunDir: NAME.pid (identity of the running child), NAME.tail (how
// far its output has been read) and NAME.lock. They should lie on a tmpfs.
package supervisor
