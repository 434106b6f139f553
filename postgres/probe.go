package postgres

import (
	"log/slog"
	"time"
)

// Kind is what is known of the local PostgreSQL.
type Kind string

const (
	// Unknown is every case of doubt.
	Unknown Kind = "unknown"
	// Gone is proved: there is no postmaster, and no process is left attached to
	// its shared memory.
	Gone Kind = "gone"
	// Starting means that the postmaster is there, and refuses connections with 57P03. It is
	// starting up, shutting down, or in recovery and not yet consistent. It says
	// nothing of sessions that were opened before.
	Starting Kind = "starting"
	// Recovery means that it has answered that it is in recovery, so it takes no writes.
	Recovery Kind = "recovery"
	// Primary means that it has answered that it is not in recovery.
	Primary Kind = "primary"
	// Hung means that the postmaster is there and has not answered for Config.HungAfter, on
	// the kept connection or on new ones.
	Hung Kind = "hung"
)

// Probe is one look at the local PostgreSQL. The slices are shared: do not
// change them.
type Probe struct {
	// At is the monotonic clock (Config.Now) before the question was asked. The
	// statement was true at some time after it.
	At   time.Duration
	Kind Kind
	// PID is the postmaster, and Started its start time in clock ticks since boot
	// (field 22 of /proc/PID/stat): together its identity. Both are 0 while none
	// is known to live.
	PID     int
	Started uint64
	// ReadOnly is kept for later; it is false.
	ReadOnly bool
	// Timeline is the one being written (Primary) or received (Recovery); 0 when
	// not known.
	Timeline int
	// ReceivedLSN is how far the standby has WAL on its disk, never less than
	// ReplayedLSN, which is how far it has replayed it. Both are of Recovery, in
	// bytes, 0 when not known.
	ReceivedLSN, ReplayedLSN uint64
	// WriteLSN is how far the primary has written WAL, in bytes; 0 when not known.
	WriteLSN uint64
	// Streaming: the standby's WAL receiver is streaming.
	Streaming bool
	// StreamedAt is At of the last probe, this or an earlier one, that found it
	// streaming; 0 if none did.
	StreamedAt time.Duration
	// SyncStandbys are the names of the standbys that the primary counts as
	// synchronous now, in order.
	SyncStandbys []string
	// Replicas are the primary's replication connections, by name.
	Replicas []Replica
	// SyncWaiting is how many of the primary's sessions wait for a synchronous
	// standby to confirm a commit.
	SyncWaiting int
	// DiskFree and DiskTotal are of the file system of the WAL (the data
	// directory's, unless pg_wal is a link to elsewhere), in bytes. DiskFree is what
	// PostgreSQL may use. Both are 0 when not known: look at DiskTotal first.
	DiskFree, DiskTotal uint64
	// Err says why Kind is not better known, or what could not be asked. It may be
	// there beside a Kind that is known.
	Err string
}

// Replica is one replication connection of the primary.
type Replica struct {
	Name      string // application_name
	State     string // startup, catchup, streaming, backup or stopping
	SyncState string // async, potential, sync or quorum
	LagBytes  int64  // of WAL that it has not flushed to its disk; -1 when not known
	// ReplyTime is when it sent its last reply, by its own clock; zero before the
	// first. It changes with each sign of life.
	ReplyTime time.Time
}

// Config is what a Watcher needs to know.
type Config struct {
	DataDir   string
	SocketDir string // with PostgreSQL's unix socket
	Port      uint16 // which names the socket
	User      string // superuser; postgres when empty
	// Every is the time between two probes; 100 ms when 0.
	Every time.Duration
	// Timeout bounds one question, the connecting included; 1 s when 0.
	Timeout time.Duration
	// HungAfter is the silence after which a server is Hung; 15 s when 0.
	HungAfter time.Duration
	// Now reads the monotonic clock; when nil, the time since this process started.
	Now func() time.Duration
	Log *slog.Logger // nil: nothing is logged
}

var processStart = time.Now()

func (c Config) withDefaults() Config {
	if c.User == "" {
		c.User = "postgres"
	}
	if c.Every <= 0 {
		c.Every = 100 * time.Millisecond
	}
	if c.Timeout <= 0 {
		c.Timeout = time.Second
	}
	if c.HungAfter <= 0 {
		c.HungAfter = 15 * time.Second
	}
	if c.Now == nil {
		c.Now = func() time.Duration { return time.Since(processStart) }
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	c.Log = c.Log.With("component", "postgres")
	return c
}
