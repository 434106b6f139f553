package gate

import (
	"encoding/json"
	"fmt"
	"time"
)

// State is what an owner says of its gate.
type State string

// The states of a record.
const (
	// Promoting: the owner's PostgreSQL does not take writes yet, and its gate is
	// shut. It may open at any time: others wait for it as for an open one.
	Promoting State = "promoting"
	// Open: the owner's gate may be open until its promise has run out.
	Open State = "open"
	// Shut: the owner's gate is shut and opens only after another commit. Nobody
	// has to wait for anything.
	Shut State = "shut"
)

// Record is the value of the gate's key in etcd. The node that it names is the
// only one whose kernel may let clients through to a writable PostgreSQL.
type Record struct {
	Owner string `json:"owner"`
	// Epoch grows by one with each change of owner.
	Epoch uint64 `json:"epoch"`
	// Seq grows by one with each write.
	Seq uint64 `json:"seq"`
	// PromiseMS is for how long after it sent this record the owner's gate may
	// stay open, in milliseconds.
	PromiseMS int64 `json:"promise_ms"`
	State     State `json:"state"`
	// Last is the node whose gate was the last to be allowed to open: it has every
	// write that was acknowledged to clients. "" = none has been yet.
	Last string `json:"last,omitempty"`
}

// Promise is PromiseMS as a duration.
func (r Record) Promise() time.Duration { return time.Duration(r.PromiseMS) * time.Millisecond }

// Encode returns the record as it stands in etcd.
func (r Record) Encode() string {
	b, err := json.Marshal(r)
	if err != nil { // numbers and strings alone
		return ""
	}
	return string(b)
}

// ParseRecord reads a record. One that cannot be read is an error: nobody may
// own a gate whose record is not understood.
func ParseRecord(data []byte) (Record, error) {
	var r Record
	if err := json.Unmarshal(data, &r); err != nil {
		return Record{}, fmt.Errorf("parse gate record: %w", err)
	}
	if r.Owner == "" || r.PromiseMS <= 0 || (r.State != Promoting && r.State != Open && r.State != Shut) {
		return Record{}, fmt.Errorf("parse gate record: %s is not one", data)
	}
	return r, nil
}

// Sync is Patroni's key of that name.
type Sync struct {
	Leader   string
	Standbys []string
	Quorum   int   // above 0, no single standby is sure to have every commit
	Rev      int64 // its revision in etcd; 0 = absent
}

// View is what one linearizable transaction has shown of etcd.
type View struct {
	Record    *Record // nil: there is none
	RecordRev int64   // 0: there is none

	Leader string // the leader key's value; "" = absent

	// Lease is the lease of this node's own member key: the session of its
	// Patroni. 0 when it has none.
	Lease int64

	Sync        Sync
	Synchronous bool   // synchronous_mode of the cluster's settings
	Paused      bool   // Patroni is paused
	ConfigRev   int64  // revision of Patroni's config key
	MaxLag      uint64 // bytes that an asynchronous replica may lack
	Optime      uint64 // the primary's position as it reported it last
	// Timeline is the record's owner's, as its member key says; 0 = unknown.
	Timeline int
	// Target is whom a planned switchover names; "" = nobody.
	Target string
	// NoFailover says that this node is tagged not to be promoted.
	NoFailover bool
	// Successor tells an owner whether another node looks fit to take over.
	Successor bool
}

// Kind is what an Op does.
type Kind string

// The operations on etcd. Each returns a View, whether its conditions held or
// not.
const (
	None     Kind = ""
	Read     Kind = "read"     // nothing but the view
	Create   Kind = "create"   // the first record of a cluster
	Beat     Kind = "beat"     // the owner renews its promise
	Claim    Kind = "claim"    // the holder of the leader key becomes owner
	Takeover Kind = "takeover" // a candidate becomes owner and overwrites the leader key
	Release  Kind = "release"  // the owner says that its gate is shut
)

// Op is one transaction on etcd. It must be sent once: an answer that is lost
// leaves it open whether it was carried out.
type Op struct {
	Kind Kind
	At   Moment // read before it is sent: what it promises counts from here

	// The conditions, all of which must hold. Read has none.
	Record *int64  // mod revision of the record; 0 = absent
	Leader *string // value of the leader key; "" = absent
	Lease  *int64  // lease of this node's member key
	Sync   *int64  // mod revision of the sync key; 0 = absent
	Config *int64  // mod revision of the config key

	Put Record // the new record; not for Read
	// hold is for how long a beat opens the gate. It promises as much at least.
	hold time.Duration
	// TakeLeader is the lease on which the leader key is overwritten with this
	// node's name in the same transaction; 0 = the key is left alone. It is
	// overwritten and never deleted: a living old primary would take it back.
	TakeLeader int64
}

// Result is the answer to an Op.
type Result struct {
	Done bool // the conditions held and the record was written
	View View // after the operation
}

// Process is what is known of this node's PostgreSQL.
type Process string

// What PostgreSQL may be doing; package postgres proves it.
const (
	Unknown  Process = "unknown"
	Gone     Process = "gone" // proved: no process of it is left
	Starting Process = "starting"
	Recovery Process = "recovery" // it said that it is a replica
	Primary  Process = "primary"  // it said that it takes writes
	Hung     Process = "hung"
)

// Local is what a node knows of its own PostgreSQL and Patroni.
type Local struct {
	// At is the clock before PostgreSQL was asked.
	At      Moment
	Process Process
	// Timeline, Received and Replayed (bytes) and StreamedAt (when replication was
	// last seen to stream) are a replica's.
	Timeline   int
	Received   uint64
	Replayed   uint64
	StreamedAt time.Duration
	// WasPrimary says of a server that hangs that its last answer was that it takes
	// writes.
	WasPrimary bool
	// Restarting says that Patroni is restarting PostgreSQL on purpose.
	Restarting bool
	// PatroniUp says that Patroni answers and can act.
	PatroniUp bool
	// Stopping says that this node is being stopped or leaves the cluster.
	Stopping bool
}

// writable says whether PostgreSQL takes writes, or would if it went on.
func (l Local) writable() bool {
	return l.Process == Primary || (l.Process == Hung && l.WasPrimary)
}
