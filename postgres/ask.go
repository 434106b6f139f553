package postgres

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"golang.org/x/sys/unix"
)

const (
	sqlCannotConnectNow = "57P03"

	roleSQL = `SELECT pg_is_in_recovery()`

	// Without a WAL receiver the control file tells the timeline.
	recoverySQL = `
SELECT coalesce(pg_wal_lsn_diff(greatest(pg_last_wal_receive_lsn(), pg_last_wal_replay_lsn()), '0/0'), 0)::int8,
       coalesce(pg_wal_lsn_diff(pg_last_wal_replay_lsn(), '0/0'), 0)::int8,
       coalesce(r.status = 'streaming', false),
       coalesce(r.received_tli, (SELECT greatest(c.timeline_id, m.min_recovery_end_timeline)
                                   FROM pg_control_checkpoint() c, pg_control_recovery() m))
  FROM (VALUES (1)) one LEFT JOIN pg_stat_wal_receiver r ON true`

	// The name of the WAL file tells the timeline at once after a promotion; the
	// control file would at the next checkpoint.
	primarySQL = `
SELECT pg_wal_lsn_diff(w.lsn, '0/0')::int8,
       ('x' || substr(pg_walfile_name(w.lsn), 1, 8))::bit(32)::int4,
       s.pid IS NOT NULL, coalesce(s.application_name, ''), coalesce(s.state, ''), coalesce(s.sync_state, ''),
       coalesce(greatest(pg_wal_lsn_diff(w.lsn, s.flush_lsn), 0)::int8, -1), s.reply_time,
       (SELECT count(*) FROM pg_stat_get_activity(NULL) WHERE wait_event = 'SyncRep')
  FROM (SELECT pg_current_wal_lsn() AS lsn) w LEFT JOIN pg_stat_replication s ON true
 ORDER BY s.application_name, s.pid`

	terminateSQL = `
SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_replication WHERE application_name = $1`
)

// errDialedOnce keeps pgx from dialing again to cancel a statement: the server
// ends that itself, and a stopped one is not to be burdened with more.
var errDialedOnce = errors.New("connection is used up")

// connect makes a new connection, and sees to it that pm is what listens.
func (w *Watcher) connect(ctx context.Context, pm *postmaster) (*pgx.Conn, error) {
	c, err := pgx.ParseConfig("sslmode=disable")
	if err != nil {
		return nil, fmt.Errorf("prepare connection: %w", err)
	}
	// The environment, which ParseConfig reads too, has no say.
	c.Host, c.Port, c.User, c.Database, c.Password = w.cfg.SocketDir, w.cfg.Port, w.cfg.User, "postgres", ""
	c.TLSConfig, c.Fallbacks, c.ValidateConnect, c.AfterConnect = nil, nil, nil, nil
	c.ConnectTimeout = 0 // ctx bounds it
	c.RuntimeParams = map[string]string{
		"application_name":     "pgha",
		"statement_timeout":    strconv.FormatInt(w.cfg.Timeout.Milliseconds(), 10),
		"idle_session_timeout": "0",
		"search_path":          "pg_catalog",
	}
	dialed := false
	c.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) {
		if dialed {
			return nil, errDialedOnce
		}
		dialed = true
		var d net.Dialer
		conn, err := d.DialContext(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		if err := listensAs(conn, pm.pid); err != nil {
			return nil, errors.Join(err, conn.Close())
		}
		return conn, nil
	}
	conn, err := pgx.ConnectConfig(ctx, c)
	if err != nil {
		return nil, fmt.Errorf("connect to PostgreSQL: %w", err)
	}
	return conn, nil
}

// listensAs returns an error unless process pid is what conn was made to.
func listensAs(conn net.Conn, pid int) error {
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		return fmt.Errorf("see who listens: %s is not a unix socket", conn.RemoteAddr().Network())
	}
	rc, err := unixConn.SyscallConn()
	if err != nil {
		return fmt.Errorf("see who listens: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	if err := rc.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); err != nil {
		return fmt.Errorf("see who listens: %w", err)
	}
	if credErr != nil {
		return fmt.Errorf("see who listens: %w", credErr)
	}
	if int(cred.Pid) != pid {
		return fmt.Errorf("process %d listens on the socket, not the postmaster %d of the data directory", cred.Pid, pid)
	}
	return nil
}

// discard closes a connection in whatever state it is, without waiting for the
// server.
func discard(conn *pgx.Conn) {
	_ = conn.PgConn().Conn().Close()
	_ = conn.Close(context.Background())
	<-conn.PgConn().CleanupDone()
}

// use runs f on the kept connection, or on a new one if there is none or it has
// broken meanwhile. It must be called with the turn held. ctx ends early when
// the postmaster does.
func (w *Watcher) use(ctx context.Context, pm *postmaster, f func(context.Context, *pgx.Conn) error) error {
	ctx, cancel := context.WithTimeout(ctx, w.cfg.Timeout)
	defer cancel()
	defer context.AfterFunc(pm.life, cancel)()
	for {
		reused := w.conn != nil
		if !reused {
			conn, err := w.connect(ctx, pm)
			if err == nil || answered(err) {
				pm.fresh = silence{} // as good as any other new connection
			}
			if err != nil {
				return err
			}
			w.conn = conn
		}
		err := f(ctx, w.conn)
		if err == nil || !w.conn.IsClosed() {
			return err
		}
		w.dropConn()
		if !reused || ctx.Err() != nil {
			return err
		}
	}
}

func (w *Watcher) dropConn() {
	if w.conn != nil {
		discard(w.conn)
		w.conn = nil
	}
}

// question asks the server what it is, and then what it does in that role. With
// Kind set in the probe that it returns, an error is of the second part.
func question(ctx context.Context, conn *pgx.Conn, p Probe) (Probe, error) {
	var recovery bool
	if err := conn.QueryRow(ctx, roleSQL).Scan(&recovery); err != nil {
		return p, fmt.Errorf("ask PostgreSQL for its role: %w", err)
	}
	if recovery {
		p.Kind = Recovery
		return p, askRecovery(ctx, conn, &p)
	}
	p.Kind = Primary
	return p, askPrimary(ctx, conn, &p)
}

func askRecovery(ctx context.Context, conn *pgx.Conn, p *Probe) error {
	err := conn.QueryRow(ctx, recoverySQL).Scan(&p.ReceivedLSN, &p.ReplayedLSN, &p.Streaming, &p.Timeline)
	if err != nil {
		return fmt.Errorf("ask PostgreSQL how far it has recovered: %w", err)
	}
	if p.Streaming {
		p.StreamedAt = p.At
	}
	return nil
}

func askPrimary(ctx context.Context, conn *pgx.Conn, p *Probe) error {
	rows, err := conn.Query(ctx, primarySQL)
	if err != nil {
		return fmt.Errorf("ask PostgreSQL for its replicas: %w", err)
	}
	var r Replica
	var is bool
	var reply *time.Time
	_, err = pgx.ForEachRow(rows, []any{&p.WriteLSN, &p.Timeline, &is, &r.Name, &r.State, &r.SyncState, &r.LagBytes, &reply, &p.SyncWaiting}, func() error {
		if !is {
			return nil
		}
		r.ReplyTime = time.Time{}
		if reply != nil {
			r.ReplyTime = *reply
		}
		p.Replicas = append(p.Replicas, r)
		if r.SyncState == "sync" || r.SyncState == "quorum" {
			p.SyncStandbys = append(p.SyncStandbys, r.Name)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("ask PostgreSQL for its replicas: %w", err)
	}
	return nil
}

// answered reports whether an error came from the server, which lives then.
func answered(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr)
}

// refused reports whether the server is there and lets nobody in yet, or no more.
func refused(err error) bool {
	var pgErr *pgconn.PgError
	return errors.As(err, &pgErr) && pgErr.Code == sqlCannotConnectNow
}

// diskSpace measures the file system of the WAL; zeros when it cannot.
func diskSpace(dataDir string) (free, total uint64) {
	var st unix.Statfs_t
	err := unix.Statfs(filepath.Join(dataDir, "pg_wal"), &st)
	if errors.Is(err, os.ErrNotExist) {
		err = unix.Statfs(dataDir, &st)
	}
	if err != nil {
		return 0, 0
	}
	return st.Bavail * uint64(st.Frsize), st.Blocks * uint64(st.Frsize)
}
