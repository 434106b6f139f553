package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	mvccpb "go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/internal/fsx"
)

const (
	// eventsKept is how many events stay in etcd, the newest.
	eventsKept = 2000
	// eventsWaiting is how many a node keeps while there is no quorum.
	eventsWaiting = 500
	// eventsPruned is how often the oldest are taken away.
	eventsPruned = time.Minute
	eventTimeout = 3 * time.Second

	eventPrefix = "/pgha-events/"
)

// EventKind says what an event is about.
type EventKind string

// Kinds of events.
const (
	EventRole       EventKind = "role"       // a PostgreSQL or the gate has changed its role
	EventFault      EventKind = "fault"      // something is wrong, or right again
	EventRestart    EventKind = "restart"    // a daemon, Patroni, HAProxy or PostgreSQL has started again
	EventMembership EventKind = "membership" // nodes and voters came and went
	EventConfig     EventKind = "config"
	EventSecrets    EventKind = "secrets" // passwords and certificates
	EventOperation  EventKind = "operation"
	EventUpgrade    EventKind = "upgrade"
	EventRecovery   EventKind = "recovery"
)

// actorPgha is the actor of what pgha does by itself.
const actorPgha = "pgha"

// Event is something that happened to the cluster, in words.
type Event struct {
	At      time.Time `json:"at"`
	Node    string    `json:"node"` // who tells
	Kind    EventKind `json:"kind"`
	Subject string    `json:"subject,omitempty"` // the node that it is about
	Actor   string    `json:"actor"`             // an operator, or pgha
	Text    string    `json:"text"`
}

// eventLog holds the events that are not stored yet.
type eventLog struct {
	mu      sync.Mutex
	waiting []Event
	last    time.Time // of the newest, so that no two are of the same moment
	kick    chan struct{}
}

// event tells of something that has happened. It never waits: the event is stored
// in the cluster soon after, or when there is a quorum again.
func (n *Node) event(kind EventKind, subject, actor, format string, args ...any) {
	e := Event{Node: n.cfg.Name, Kind: kind, Subject: subject, Actor: actor, Text: oneLine(fmt.Sprintf(format, args...))}
	n.log.Info("event", "kind", string(kind), "subject", subject, "actor", actor, "text", e.Text)
	n.news.mu.Lock()
	defer n.news.mu.Unlock()
	e.At = time.Now().UTC()
	if !e.At.After(n.news.last) {
		e.At = n.news.last.Add(time.Microsecond)
	}
	n.news.last = e.At
	n.news.waiting = append(n.news.waiting, e)
	if over := len(n.news.waiting) - eventsWaiting; over > 0 {
		n.news.waiting = slices.Delete(n.news.waiting, 0, over)
	}
	if n.news.kick != nil {
		select {
		case n.news.kick <- struct{}{}:
		default:
		}
	}
}

// oneLine writes a text, such as that of joined errors, on one line.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

func (n *Node) eventDir() string { return eventPrefix + n.state.ClusterID + "/" }

// eventKey sorts by time; two nodes never share one.
func (n *Node) eventKey(e Event) string {
	return fmt.Sprintf("%s%020d-%s", n.eventDir(), e.At.UnixNano(), e.Node)
}

// keepEvents stores what event has taken until ctx ends.
func (n *Node) keepEvents(ctx context.Context) error {
	kick := make(chan struct{}, 1)
	n.news.mu.Lock()
	n.news.kick = kick
	var old []Event
	err := fsx.ReadJSON(n.paths.events(), &old)
	n.news.waiting = append(old, n.news.waiting...)
	n.news.mu.Unlock()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.log.Warn("cannot read the events that were not stored", "err", err)
	}
	kick <- struct{}{}
	t := time.NewTicker(time.Second)
	defer t.Stop()
	pruned := time.Now()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-kick:
		case <-t.C:
		}
		if err := n.storeEvents(ctx); err != nil {
			n.log.Debug("events wait for etcd", "err", err)
		}
		if time.Since(pruned) > eventsPruned {
			pruned = time.Now()
			if err := n.pruneEvents(ctx); err != nil {
				n.log.Debug("cannot prune events", "err", err)
			}
		}
	}
}

// storeEvents writes the waiting events, in their order.
func (n *Node) storeEvents(ctx context.Context) error {
	for {
		n.news.mu.Lock()
		batch := slices.Clone(n.news.waiting[:min(len(n.news.waiting), 100)])
		n.news.mu.Unlock()
		if len(batch) == 0 {
			return nil
		}
		c, err := n.etcdClient()
		if err != nil {
			return err
		}
		var ops []clientv3.Op
		for _, e := range batch {
			value, err := json.Marshal(e)
			if err != nil {
				return fmt.Errorf("encode event: %w", err)
			}
			ops = append(ops, clientv3.OpPut(n.eventKey(e), string(value)))
		}
		try, cancel := context.WithTimeout(ctx, eventTimeout)
		_, err = c.Txn(try).Then(ops...).Commit()
		cancel()
		if err != nil {
			return fmt.Errorf("store events: %w", err)
		}
		n.news.mu.Lock()
		// The oldest may have been dropped meanwhile.
		n.news.waiting = slices.DeleteFunc(n.news.waiting, func(e Event) bool { return !e.At.After(batch[len(batch)-1].At) })
		n.news.mu.Unlock()
	}
}

// saveEvents stores what is left when the daemon ends: in the cluster, or on disk
// for the next daemon.
func (n *Node) saveEvents() error {
	ctx, cancel := context.WithTimeout(context.Background(), eventTimeout)
	defer cancel()
	_ = n.storeEvents(ctx) // what it did not store goes to disk
	n.news.mu.Lock()
	defer n.news.mu.Unlock()
	if len(n.news.waiting) == 0 {
		if err := os.Remove(n.paths.events()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove stored events: %w", err)
		}
		return nil
	}
	return fsx.WriteJSON(n.paths.events(), n.news.waiting, 0o600)
}

// pruneEvents takes the oldest away, on the node that leads etcd.
func (n *Node) pruneEvents(ctx context.Context) error {
	srv := n.etcd.Load()
	if srv == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	if st, err := srv.Status(ctx); err != nil || !st.IsLeader {
		return err
	}
	c := srv.Client()
	r, err := c.Get(ctx, n.eventDir(), clientv3.WithPrefix(), clientv3.WithCountOnly(), clientv3.WithSerializable())
	if err != nil || r.Count <= eventsKept {
		return err
	}
	r, err = c.Get(ctx, n.eventDir(), clientv3.WithPrefix(), clientv3.WithKeysOnly(), clientv3.WithLimit(r.Count-eventsKept), clientv3.WithSerializable())
	if err != nil || len(r.Kvs) == 0 {
		return err
	}
	_, err = c.Delete(ctx, n.eventDir(), clientv3.WithRange(string(r.Kvs[len(r.Kvs)-1].Key)+"\x00"))
	return err
}

// events returns the newest limit events since a time, the oldest first, and
// etcd's revision. It needs no quorum.
func (n *Node) events(ctx context.Context, since time.Time, limit int64) ([]Event, int64, error) {
	c, err := n.etcdClient()
	if err != nil {
		return nil, 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, eventTimeout)
	defer cancel()
	from := n.eventDir()
	if !since.IsZero() {
		from += fmt.Sprintf("%020d", since.UnixNano())
	}
	r, err := c.Get(ctx, from, clientv3.WithRange(clientv3.GetPrefixRangeEnd(n.eventDir())), clientv3.WithSerializable(),
		clientv3.WithSort(clientv3.SortByKey, clientv3.SortDescend), clientv3.WithLimit(limit))
	if err != nil {
		return nil, 0, fmt.Errorf("read events: %w", err)
	}
	out := decodeEvents(r.Kvs)
	slices.Reverse(out)
	return out, r.Header.Revision, nil
}

func decodeEvents(kvs []*mvccpb.KeyValue) []Event {
	var out []Event
	for _, kv := range kvs {
		var e Event
		if json.Unmarshal(kv.Value, &e) == nil {
			out = append(out, e)
		}
	}
	return out
}

// eventsHandler streams events, one a line: those of the past, and with follow
// those to come until the client goes away.
func (n *Node) eventsHandler(w http.ResponseWriter, r *http.Request) {
	q := r.URL.Query()
	limit, err := strconv.ParseInt(q.Get("limit"), 10, 64)
	if err != nil || limit <= 0 {
		limit = eventsKept
	}
	since, _ := time.Parse(time.RFC3339Nano, q.Get("since")) // no time: from the beginning
	past, rev, err := n.events(r.Context(), since, limit)
	if err != nil {
		reply(w, nil, err)
		return
	}
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Time{}) // it lasts longer than a request may take to arrive
	w.Header().Set("Content-Type", "application/x-ndjson")
	lines := json.NewEncoder(w)
	send := func(events []Event) {
		for _, e := range events {
			_ = lines.Encode(e) // when the client has gone, the context ends
		}
		_ = control.Flush()
	}
	send(past)
	for ctx := r.Context(); q.Get("follow") != "" && ctx.Err() == nil; {
		c, err := n.etcdClient()
		if err != nil {
			sleep(ctx, time.Second)
			continue
		}
		watched, cancel := context.WithCancel(ctx)
		for resp := range c.Watch(watched, n.eventDir(), clientv3.WithPrefix(), clientv3.WithRev(rev+1), clientv3.WithFilterDelete()) {
			if resp.CompactRevision > rev {
				rev = resp.CompactRevision // what is older is gone
			}
			if resp.Err() != nil {
				break
			}
			var kvs []*mvccpb.KeyValue
			for _, e := range resp.Events {
				kvs = append(kvs, e.Kv)
				rev = max(rev, e.Kv.ModRevision)
			}
			send(decodeEvents(kvs))
		}
		cancel()
		sleep(ctx, 500*time.Millisecond)
	}
}

// Events hands the events since a time to each, the oldest first; with follow
// those to come too, until ctx ends. limit 0 means all.
func (l *Local) Events(ctx context.Context, since time.Time, limit int, follow bool, each func(Event)) error {
	path := "/v1/events?limit=" + strconv.Itoa(limit)
	if !since.IsZero() {
		path += "&since=" + since.UTC().Format(time.RFC3339Nano)
	}
	if follow {
		path += "&follow=1"
	}
	_, err := l.stream(ctx, http.MethodGet, path, nil, func(line json.RawMessage) (bool, error) {
		var e Event
		if err := json.Unmarshal(line, &e); err != nil {
			return false, fmt.Errorf("decode event: %w", err)
		}
		each(e)
		return false, nil
	})
	if ctx.Err() != nil {
		return nil // the operator has seen enough
	}
	return err
}
