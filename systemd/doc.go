// Package systemd installs and drives pgha's unit, speaks the service's side of
// sd_notify, and keeps the distribution's own PostgreSQL, Patroni, HAProxy and
// etcd units from competing with pgha.
//
// Everything goes over D-Bus, by systemd's private socket where it can be
// reached: it is there without a D-Bus daemon and until the very end of a
// shutdown. On a host that was not booted with systemd the functions that need
// it fail with [ErrNoSystemd], and the others do nothing.
//
// Invariant: what [Quiesce] changes is on disk before the first change, so that
// [Restore] can take it back whenever Quiesce was interrupted.
package systemd
