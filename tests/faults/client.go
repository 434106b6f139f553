package faults

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
)

// Bounds of one attempt. A client that waited longer would hide an outage, and
// make one longer.
const (
	connectTimeout   = 1500 * time.Millisecond
	statementTimeout = 1500 * time.Millisecond
)

// Target is what a client works on.
type Target struct {
	Config *pgx.ConnConfig   // with the DialFunc of where the client is
	Names  map[string]string // servers by address
	Routed bool              // by way of HAProxy
	Keys   []int             // registers to work on, every other time
}

// Client does one operation after the other, each a statement of its own, and
// records them.
type Client struct {
	name    string
	target  Target
	history *History
	ids     *atomic.Int64
	rng     *rand.Rand

	conn *pgx.Conn
	raw  net.Conn
	last map[int]int // what it last knew of each register
	stop context.CancelFunc
	done chan struct{}
}

// Schema returns the statements that make what clients work on.
func Schema(registers int) []string {
	return []string{
		"CREATE TABLE IF NOT EXISTS fault_rows (id bigint PRIMARY KEY)",
		"CREATE TABLE IF NOT EXISTS fault_registers (key int PRIMARY KEY, value int NOT NULL)",
		fmt.Sprintf("INSERT INTO fault_registers SELECT k, 0 FROM generate_series(1, %d) k ON CONFLICT (key) DO UPDATE SET value = 0", registers),
	}
}

// StartClient begins to work, until Stop. Clients of one history share ids,
// which gives each row its id and each register's write its value.
func StartClient(name string, t Target, h *History, ids *atomic.Int64, seed uint64) *Client {
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{
		name: name, target: t, history: h, ids: ids, rng: rand.New(rand.NewPCG(seed, seed)),
		last: map[int]int{}, stop: cancel, done: make(chan struct{}),
	}
	go c.run(ctx)
	return c
}

// Stop ends the client once its operation has ended.
func (c *Client) Stop() {
	c.stop()
	<-c.done
}

func (c *Client) run(ctx context.Context) {
	defer close(c.done)
	defer c.hangUp()
	for turn := 0; ctx.Err() == nil; turn++ {
		op := Op{Client: c.name, Routed: c.target.Routed, Kind: Append, ID: c.ids.Add(1)}
		if turn%2 == 1 {
			c.choose(&op)
		}
		op.Invoke = c.history.Now()
		err := c.do(&op)
		op.Return = c.history.Now()
		op.Outcome = outcome(err)
		pause := 15 * time.Millisecond
		if err != nil {
			op.Err, pause = err.Error(), 50*time.Millisecond
		}
		c.history.add(op)
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

// choose picks an operation on a register.
func (c *Client) choose(op *Op) {
	op.Key = c.target.Keys[c.rng.IntN(len(c.target.Keys))]
	op.Value = int(op.ID)
	switch c.rng.IntN(3) {
	case 0:
		op.Kind, op.Value = Read, 0
	case 1:
		op.Kind = Write
	default:
		op.Kind, op.Old = CAS, c.last[op.Key]
	}
}

// errDefinite is an error after which the operation certainly has no effect.
type errDefinite struct{ error }

func (e errDefinite) Unwrap() error { return e.error }

var errRecovery = errDefinite{errors.New("the server is a replica")}

// outcome tells what an error leaves open. A server that answers a statement
// with an error has undone it; one that ends the session (FATAL) may have
// committed before.
func outcome(err error) Outcome {
	var definite errDefinite
	var said *pgconn.PgError
	switch {
	case err == nil:
		return Done
	case errors.As(err, &definite), pgconn.SafeToRetry(err):
		return Refused
	case errors.As(err, &said) && said.Severity == "ERROR":
		return Refused
	}
	return Unknown
}

const (
	// where names the server that runs the statement, and the timeline that it
	// writes to.
	where     = ` RETURNING host(inet_server_addr()), ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int`
	appendSQL = `INSERT INTO fault_rows (id) VALUES ($1)` + where
	writeSQL  = `UPDATE fault_registers SET value = $2 WHERE key = $1` + where
	casSQL    = `UPDATE fault_registers SET value = $2 WHERE key = $1 AND value = $3` + where
	readSQL   = `SELECT host(inet_server_addr()), pg_is_in_recovery(), value FROM fault_registers WHERE key = $1`
)

func (c *Client) do(op *Op) error {
	if err := c.connect(); err != nil {
		return errDefinite{err}
	}
	// Not by a context: pgx would then have the server cancel the statement,
	// and a commit that waits for its replica would become visible before it is
	// there.
	raw := c.raw
	timer := time.AfterFunc(statementTimeout, func() { _ = raw.Close() })
	defer timer.Stop()
	err := c.ask(context.Background(), op)
	if c.conn.IsClosed() {
		c.hangUp()
	}
	return err
}

func (c *Client) ask(ctx context.Context, op *Op) error {
	var addr string
	var err error
	switch op.Kind {
	case Append:
		err = c.conn.QueryRow(ctx, appendSQL, op.ID).Scan(&addr, &op.Timeline)
	case Write:
		err = c.conn.QueryRow(ctx, writeSQL, op.Key, op.Value).Scan(&addr, &op.Timeline)
	case CAS:
		err = c.conn.QueryRow(ctx, casSQL, op.Key, op.Value, op.Old).Scan(&addr, &op.Timeline)
		op.Swapped = err == nil
		if errors.Is(err, pgx.ErrNoRows) {
			return nil
		}
	case Read:
		var recovery bool
		if err = c.conn.QueryRow(ctx, readSQL, op.Key).Scan(&addr, &recovery, &op.Value); err == nil && recovery {
			return errRecovery
		}
	}
	if err != nil {
		return err
	}
	op.Server = c.target.Names[addr]
	if op.Kind != Append {
		c.last[op.Key] = op.Value
	}
	return nil
}

// connect makes a session if there is none. It is kept as long as it lives,
// also with a replica: one that is promoted is then seen from within.
func (c *Client) connect() error {
	if c.conn != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), connectTimeout)
	defer cancel()
	cfg := c.target.Config.Copy()
	cfg.DefaultQueryExecMode = pgx.QueryExecModeExec // one round trip a statement
	dial := cfg.DialFunc
	var once sync.Once
	cfg.DialFunc = func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
		err = errors.New("this session has its connection: no requests to cancel")
		once.Do(func() { conn, err = dial(ctx, network, addr) })
		if err == nil {
			c.raw = conn
		}
		return conn, err
	}
	conn, err := pgx.ConnectConfig(ctx, cfg)
	if err != nil {
		return err
	}
	c.conn = conn
	return nil
}

func (c *Client) hangUp() {
	if c.conn == nil {
		return
	}
	_ = c.raw.Close() // before pgx says goodbye to a server that may be stopped
	ctx, cancel := context.WithTimeout(context.Background(), time.Second)
	defer cancel()
	_ = c.conn.Close(ctx)
	c.conn = nil
}
