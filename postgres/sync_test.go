package postgres

import (
	"context"
	"testing"
)

// TestSyncWaiting counts the commits that wait for a standby that is not there.
func TestSyncWaiting(t *testing.T) {
	s := newServer(t, "synchronous_standby_names = 's2'", "synchronous_commit = local")
	s.ctl(t, "start")
	w := watch(t, s.config(t))
	w.until(t, "no commit that waits", func(p Probe) bool { return p.Kind == Primary && p.SyncWaiting == 0 })
	conn, _ := s.session(t)
	done := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.WithoutCancel(t.Context()), "SET synchronous_commit = on; CREATE TABLE waits ()")
		done <- err
	}()
	w.until(t, "a commit that waits", func(p Probe) bool { return p.SyncWaiting == 1 })
	s.exec(t, "ALTER SYSTEM SET synchronous_standby_names = ''")
	s.exec(t, "SELECT pg_reload_conf()")
	must(t, <-done)
	w.until(t, "no commit that waits", func(p Probe) bool { return p.SyncWaiting == 0 })
}
