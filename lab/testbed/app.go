package testbed

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/lab"
)

// Database, user and password of the application that a testbed runs.
const (
	AppUser     = "app"
	AppDatabase = "app"
	AppPassword = "not-a-secret-outside-of-the-lab"
)

// CreateApp makes the application's user, database and table, as an operator
// would: with pgha psql.
func (b *Bed) CreateApp(ctx context.Context, host string) error {
	for _, args := range AppSetup() {
		if _, err := b.Pgha(ctx, host, args...); err != nil {
			return fmt.Errorf("set up the application: %w", err)
		}
	}
	return nil
}

// AppSetup returns the arguments of the pgha commands that make the
// application's user, database and table.
func AppSetup() [][]string {
	var all [][]string
	for _, c := range [][]string{
		{"postgres", fmt.Sprintf("CREATE ROLE %s LOGIN PASSWORD '%s'", AppUser, AppPassword)},
		{"postgres", fmt.Sprintf("CREATE DATABASE %s OWNER %s", AppDatabase, AppUser)},
		{AppDatabase, fmt.Sprintf("SET ROLE %s; CREATE TABLE t (id bigint PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())", AppUser)},
	} {
		all = append(all, []string{"psql", "-d", c[0], "-X", "-q", "-v", "ON_ERROR_STOP=1", "-c", c[1]})
	}
	return all
}

// CA returns the cluster's CA certificate as host has it.
func (b *Bed) CA(ctx context.Context, host string) (*x509.CertPool, error) {
	pem, err := b.Pgha(ctx, host, "cert", "ca")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM([]byte(pem)) {
		return nil, errors.New("pgha cert ca printed no certificate")
	}
	return pool, nil
}

// Dialer connects from where clients are; a lab is one.
type Dialer interface {
	Dial(ctx context.Context, network, addr string) (net.Conn, error)
}

var _ Dialer = (*lab.Lab)(nil)

// AppConfig connects as the application to port of a host, from where clients
// are, with sslmode=verify-full.
func AppConfig(l Dialer, pool *x509.CertPool, addr string, port uint16) (*pgx.ConnConfig, error) {
	c, err := pgx.ParseConfig(fmt.Sprintf("host=%s port=%d user=%s password=%s dbname=%s connect_timeout=2", addr, port, AppUser, AppPassword, AppDatabase))
	if err != nil {
		return nil, fmt.Errorf("prepare connection: %w", err)
	}
	c.TLSConfig = &tls.Config{RootCAs: pool, ServerName: addr, MinVersion: tls.VersionTLS12}
	c.Fallbacks = nil
	c.DialFunc = func(ctx context.Context, network, a string) (net.Conn, error) { return l.Dial(ctx, network, a) }
	return c, nil
}

// Write is one attempt of a Writer.
type Write struct {
	ID       int64
	Via      string // address of the HAProxy
	Sent, At time.Time
	Err      error // nil: the commit was acknowledged
}

// Writer is an application that writes all the time: one row a transaction, on
// a connection that it keeps until it fails, through the HAProxy of one node
// and, when that fails, of the next.
type Writer struct {
	lab    Dialer
	pool   *x509.CertPool
	addrs  []string
	cancel context.CancelFunc
	done   chan struct{}

	mu     sync.Mutex
	writes []Write
}

// writeTimeout bounds one attempt of a Writer; a client that waits longer would
// hide an outage.
const writeTimeout = 2 * time.Second

// dialTimeout bounds the TCP handshake of an attempt: a host that is gone does
// not answer, and a load balancer would not have chosen it.
const dialTimeout = 500 * time.Millisecond

// StartWriter begins to write through port 5432 of the hosts, the first one by
// preference. IDs start at base.
func (b *Bed) StartWriter(ctx context.Context, base int64, hosts ...string) (*Writer, error) {
	pool, err := b.CA(ctx, hosts[0])
	if err != nil {
		return nil, err
	}
	var addrs []string
	for _, h := range hosts {
		addrs = append(addrs, b.Addr(h))
	}
	return NewWriter(ctx, b.Lab, pool, base, addrs...), nil
}

// NewWriter begins to write through port 5432 of the addresses. It goes on when
// ctx ends, until Stop.
func NewWriter(ctx context.Context, d Dialer, pool *x509.CertPool, base int64, addrs ...string) *Writer {
	w := &Writer{lab: d, pool: pool, addrs: addrs, done: make(chan struct{})}
	ctx, w.cancel = context.WithCancel(context.WithoutCancel(ctx))
	go w.run(ctx, base)
	return w
}

func (w *Writer) run(ctx context.Context, id int64) {
	defer close(w.done)
	var conn *pgx.Conn
	via := 0
	for ; ctx.Err() == nil; id++ {
		rec := Write{ID: id, Via: w.addrs[via], Sent: time.Now()}
		rec.Err = w.write(ctx, &conn, rec.Via, id)
		rec.At = time.Now()
		if ctx.Err() != nil {
			break
		}
		w.mu.Lock()
		w.writes = append(w.writes, rec)
		w.mu.Unlock()
		pause := 5 * time.Millisecond
		if rec.Err != nil {
			via = (via + 1) % len(w.addrs)
			pause = 20 * time.Millisecond
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	closeConn(conn)
}

// write commits one row; a connection that has failed is not used again.
func (w *Writer) write(ctx context.Context, conn **pgx.Conn, addr string, id int64) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	if *conn == nil {
		c, err := AppConfig(w.lab, w.pool, addr, 5432)
		if err != nil {
			return err
		}
		dial := c.DialFunc
		c.DialFunc = func(ctx context.Context, network, a string) (net.Conn, error) {
			ctx, cancel := context.WithTimeout(ctx, dialTimeout)
			defer cancel()
			return dial(ctx, network, a)
		}
		if *conn, err = pgx.ConnectConfig(ctx, c); err != nil {
			*conn = nil
			return err
		}
	}
	_, err := (*conn).Exec(ctx, "INSERT INTO t (id) VALUES ($1)", id)
	if err != nil {
		closeConn(*conn)
		*conn = nil
	}
	return err
}

func closeConn(c *pgx.Conn) {
	if c == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), 100*time.Millisecond)
	defer cancel()
	_ = c.Close(ctx) // the server may be gone: that is what is being tested
}

// Stop ends the writer and returns all its attempts in order.
func (w *Writer) Stop() []Write {
	w.cancel()
	<-w.done
	return w.Writes()
}

// Writes returns the attempts so far, in order.
func (w *Writer) Writes() []Write {
	w.mu.Lock()
	defer w.mu.Unlock()
	return append([]Write(nil), w.writes...)
}

// WaitAck waits for a commit that was sent after now.
func (w *Writer) WaitAck(ctx context.Context) (Write, error) {
	since := time.Now()
	var got Write
	err := Until(ctx, "an acknowledged write", func() error {
		var last error
		for _, r := range w.Writes() {
			if r.Sent.Before(since) {
				continue
			}
			if r.Err == nil {
				got = r
				return nil
			}
			last = r.Err
		}
		return fmt.Errorf("none yet: %w", orNothing(last))
	})
	return got, err
}

func orNothing(err error) error {
	if err == nil {
		return errors.New("nothing was tried")
	}
	return err
}

// Outage is the longest time without an acknowledged write.
func Outage(writes []Write) (longest time.Duration, from, to time.Time) {
	var last time.Time
	for _, r := range writes {
		if r.Err != nil {
			continue
		}
		if gap := r.At.Sub(last); !last.IsZero() && gap > longest {
			longest, from, to = gap, last, r.At
		}
		last = r.At
	}
	return longest, from, to
}

// Acked returns the ids of the commits that were acknowledged.
func Acked(writes []Write) []int64 {
	var ids []int64
	for _, r := range writes {
		if r.Err == nil {
			ids = append(ids, r.ID)
		}
	}
	return ids
}

// Failed returns the attempts that failed.
func Failed(writes []Write) []Write {
	var out []Write
	for _, r := range writes {
		if r.Err != nil {
			out = append(out, r)
		}
	}
	return out
}

// Lost returns the acknowledged ids that the primary does not have.
func (b *Bed) Lost(ctx context.Context, host string, writes []Write) ([]int64, error) {
	out, err := b.Pgha(ctx, host, "psql", "-d", AppDatabase, "-X", "-A", "-t", "-c", "SELECT id FROM t")
	if err != nil {
		return nil, err
	}
	have := map[string]bool{}
	for line := range strings.Lines(out) {
		have[strings.TrimSpace(line)] = true
	}
	var lost []int64
	for _, id := range Acked(writes) {
		if !have[fmt.Sprint(id)] {
			lost = append(lost, id)
		}
	}
	return lost, nil
}
