package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
)

const (
	// lockTTL is for how many seconds the lock of an operation outlives a daemon
	// that died with it.
	lockTTL = 15
	// lockTimeout bounds the taking and the giving back of the lock.
	lockTimeout = 5 * time.Second
	// lockTries is how often its lease is asked for: what was on its way when
	// etcd's leader was lost is answered by nobody.
	lockTries = 3
	// operationTimeout bounds an operation whose operator gave no limit.
	operationTimeout = time.Hour

	operationPrefix = "/pgha-operation/"
)

// operationSpec says what an operation needs.
type operationSpec struct {
	run  func(n *Node, ctx context.Context, o *Operation, req json.RawMessage) (any, error)
	lock bool // no other operation with a lock runs in the cluster meanwhile
	data bool // only a data node can do it
	save bool // the cluster's state is saved before
}

// operations are what an operator can ask a daemon to do, by name. Each runs in
// the daemon of the node whose command line was used, and tells its steps.
var operations map[string]operationSpec

// init, not an initialiser: the operations' functions lead back to the table.
func init() {
	operations = map[string]operationSpec{
		"recover-quorum":     {run: (*Node).recoverQuorum},
		"snapshot-restore":   {run: (*Node).restoreSnapshot},
		"config":             {run: (*Node).configOperation, lock: true, data: true},
		"leave":              {run: (*Node).leaveOperation, lock: true},
		"member-remove":      {run: (*Node).memberRemove, lock: true, data: true, save: true},
		"member-replace":     {run: (*Node).memberReplace, lock: true, data: true, save: true},
		"switchover":         {run: (*Node).switchover, lock: true, data: true},
		"rotate-passwords":   {run: (*Node).rotatePasswords, lock: true, data: true, save: true},
		"rotate-ca":          {run: (*Node).rotateCA, lock: true, data: true, save: true},
		"renew-certificates": {run: (*Node).renewCertsOf, lock: true, data: true},
		"failover":           {run: (*Node).failover, lock: true, data: true},
		"pause":              {run: (*Node).pause, lock: true, data: true},
		"resume":             {run: (*Node).pause, lock: true, data: true},
		"maintenance":        {run: (*Node).maintenance, lock: true, data: true},
		"upgrade":            {run: (*Node).upgrade, lock: true, data: true},
		"run-anew":           {run: (*Node).runAnew, lock: true},
		"restart":            {run: (*Node).restart, lock: true, data: true},
		"reload":             {run: (*Node).reload, data: true},
		"reinit":             {run: (*Node).reinit, lock: true, data: true},
		"upgrade-postgres":   {run: (*Node).upgradePostgres, lock: true, data: true},
		"db-create":          {run: (*Node).createDatabase, data: true},
		"user-create":        {run: (*Node).createUser, data: true},
		"user-passwd":        {run: (*Node).setUserPassword, data: true},
		"user-drop":          {run: (*Node).dropUser, data: true},
	}
}

// Operation is one that runs.
type Operation struct {
	id, kind, actor string
	log             *slog.Logger
	out             func(OperationLine)

	mu   sync.Mutex
	left string
}

// OperationLine is a line of the answer to a running operation: a step, or the
// end with its result or its error.
type OperationLine struct {
	Step   string          `json:"step,omitempty"`
	Done   bool            `json:"done,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
	Error  *cluster.Error  `json:"error,omitempty"`
	// Left says what state an operation that did not succeed has left.
	Left string `json:"left,omitempty"`
}

// OperationRequest asks for an operation.
type OperationRequest struct {
	ID      string          `json:"id"`                // to cancel it by; any text
	Actor   string          `json:"actor"`             // who asks, as the command line knows it
	Timeout time.Duration   `json:"timeout,omitempty"` // nanoseconds; 0 = the default of an hour
	Request json.RawMessage `json:"request,omitempty"`
}

// OperationInfo tells of the operation that holds the cluster's lock.
type OperationInfo struct {
	Kind  string    `json:"kind"`
	Node  string    `json:"node"` // whose daemon runs it
	Actor string    `json:"actor"`
	Since time.Time `json:"since"`
}

// Say tells the operator of a step as it happens.
func (o *Operation) Say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	o.log.Info("operation", "kind", o.kind, "step", text)
	o.out(OperationLine{Step: text})
}

// Leaves says what state the cluster is left in if the operation ends from here
// on without success.
func (o *Operation) Leaves(format string, args ...any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left = fmt.Sprintf(format, args...)
}

// Actor is who asked, for events and the history, as "root@n1".
func (o *Operation) Actor() string { return o.actor }

// decodeRequest reads an operation's request strictly.
func decodeRequest(req json.RawMessage, v any) error {
	if len(req) == 0 {
		return nil
	}
	d := json.NewDecoder(bytes.NewReader(req))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return &cluster.Error{Code: cluster.CodeBadRequest, Message: "the request cannot be read: " + err.Error()}
	}
	return nil
}

// runs are the operations that run in this daemon, by id.
type runs struct {
	mu     sync.Mutex
	cancel map[string]context.CancelCauseFunc
}

// errInterrupted says that the operator has ended an operation.
var errInterrupted = errors.New("interrupted")

func (r *runs) add(id string, cancel context.CancelCauseFunc) (done func()) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.cancel == nil {
		r.cancel = map[string]context.CancelCauseFunc{}
	}
	r.cancel[id] = cancel
	return func() {
		r.mu.Lock()
		defer r.mu.Unlock()
		delete(r.cancel, id)
	}
}

func (r *runs) interrupt(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	cancel, ok := r.cancel[id]
	if ok {
		cancel(errInterrupted)
	}
	return ok
}

// operationHandler runs an operation and streams its steps, a JSON value a line.
func (n *Node) operationHandler(w http.ResponseWriter, r *http.Request) {
	var req OperationRequest
	kind := r.PathValue("kind")
	spec, known := operations[kind]
	err := decode(w, r, &req)
	if err == nil && !known {
		err = &cluster.Error{Code: cluster.CodeBadRequest, Message: fmt.Sprintf("there is no operation %q: use one of %s", kind, strings.Join(slices.Sorted(maps.Keys(operations)), ", "))}
	}
	if err == nil && spec.data {
		err = n.notOnWitness("has no passwords and cannot do this")
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	control := http.NewResponseController(w)
	// It may take longer than a request may to arrive.
	_ = control.SetReadDeadline(time.Time{})
	w.Header().Set("Content-Type", "application/x-ndjson")
	var mu sync.Mutex
	lines := json.NewEncoder(w)
	out := func(l OperationLine) {
		mu.Lock()
		defer mu.Unlock()
		_ = lines.Encode(l) // whoever has gone reads it in the log
		_ = control.Flush()
	}
	out(n.runOperation(r.Context(), kind, spec, req, out))
}

// runOperation runs one to its end.
func (n *Node) runOperation(ctx context.Context, kind string, spec operationSpec, req OperationRequest, out func(OperationLine)) OperationLine {
	if req.Timeout <= 0 {
		req.Timeout = operationTimeout
	}
	ctx, stop := context.WithTimeoutCause(ctx, req.Timeout, fmt.Errorf("not done within %s", req.Timeout))
	defer stop()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer n.runs.add(req.ID, cancel)()
	o := &Operation{id: req.ID, kind: kind, actor: req.Actor + "@" + n.cfg.Name, log: n.log, out: out}

	result, err := n.lockAndRun(ctx, cancel, spec, o, req.Request)
	if err == nil {
		data, err := json.Marshal(result)
		if err == nil {
			n.event(EventOperation, "", o.actor, "%s is done", kind)
			return OperationLine{Done: true, Result: data}
		}
		return OperationLine{Done: true, Error: &cluster.Error{Code: cluster.CodeUnavailable, Message: "encode result: " + err.Error()}}
	}
	// Why it was cut short says more than where.
	var refusal *cluster.Error
	if !errors.As(err, &refusal) {
		if cause := context.Cause(ctx); errors.Is(cause, errInterrupted) {
			err = cause
		} else if cause != nil {
			err = fmt.Errorf("%w: %w", cause, err)
		}
		refusal = &cluster.Error{Code: cluster.CodeUnavailable, Message: err.Error()}
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	n.log.Warn("operation failed", "kind", kind, "actor", o.actor, "err", err, "left", o.left)
	if o.left != "" { // it had begun
		n.event(EventOperation, "", o.actor, "%s has failed: %s; %s", kind, err, o.left)
	}
	return OperationLine{Done: true, Error: refusal, Left: o.left}
}

func (n *Node) lockAndRun(ctx context.Context, cancel context.CancelCauseFunc, spec operationSpec, o *Operation, req json.RawMessage) (any, error) {
	if spec.lock {
		unlock, err := n.lockOperation(ctx, cancel, o)
		if err != nil {
			return nil, err
		}
		defer unlock()
	}
	if spec.save {
		if err := n.safetySnapshot(ctx, o); err != nil {
			return nil, err
		}
	}
	return spec.run(n, ctx, o, req)
}

func (n *Node) operationKey() string { return operationPrefix + n.state.ClusterID }

// lockOperation takes the cluster's lock, of which there is one, and keeps it
// until the returned function is called. An operation that loses it ends.
func (n *Node) lockOperation(ctx context.Context, lost context.CancelCauseFunc, o *Operation) (unlock func(), err error) {
	c, err := n.etcdClient()
	if err != nil {
		return nil, err
	}
	value, err := json.Marshal(OperationInfo{Kind: o.kind, Node: n.cfg.Name, Actor: o.actor, Since: time.Now().UTC().Truncate(time.Second)})
	if err != nil {
		return nil, fmt.Errorf("encode lock: %w", err)
	}
	lease, err := grantLease(ctx, c)
	if err != nil {
		return nil, noLock(err)
	}
	try, cancel := context.WithTimeout(ctx, lockTimeout)
	defer cancel()
	release := func() {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), lockTimeout)
		defer cancel()
		for {
			c, err := n.etcdClient() // the member may have been started again meanwhile
			if err == nil {
				// A change of etcd's leader swallows what was asked just before it.
				try, stop := context.WithTimeout(end, time.Second)
				_, err = c.Revoke(try, lease.ID)
				stop()
			}
			if err == nil || errors.Is(err, rpctypes.ErrLeaseNotFound) {
				return
			}
			if !sleep(end, 100*time.Millisecond) {
				n.log.Warn("cannot give the operation's lock back; it ends by itself", "seconds", lockTTL, "err", err)
				return
			}
		}
	}
	key := n.operationKey()
	r, err := c.Txn(try).If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, string(value), clientv3.WithLease(lease.ID))).
		Else(clientv3.OpGet(key)).Commit()
	if err == nil && !r.Succeeded {
		err = busy(r.Responses[0].GetResponseRange().Kvs[0].Value)
	}
	if err != nil {
		release()
		var refusal *cluster.Error
		if errors.As(err, &refusal) {
			return nil, err
		}
		return nil, noLock(err)
	}
	keep, end := context.WithCancel(context.WithoutCancel(ctx))
	beats, err := c.KeepAlive(keep, lease.ID)
	if err != nil {
		end()
		release()
		return nil, noLock(err)
	}
	go func() {
		n.keepLock(keep, lease.ID, beats)
		if keep.Err() == nil {
			lost(errors.New("the operation has lost the cluster's lock, as without a quorum"))
		}
	}()
	return func() { end(); release() }, nil
}

// keepLock returns when the lock is given back, which ends ctx, or lost.
func (n *Node) keepLock(ctx context.Context, lease clientv3.LeaseID, beats <-chan *clientv3.LeaseKeepAliveResponse) {
	for held := time.Now(); ; {
		for range beats {
			held = time.Now()
		}
		// This node's etcd member may be starting again, in this process: the lock
		// does not end with it.
		if time.Since(held) > lockTTL*time.Second || !sleep(ctx, 200*time.Millisecond) {
			return
		}
		beats = nil
		if c, err := n.etcdClient(); err == nil {
			beats, _ = c.KeepAlive(ctx, lease) // else again in a moment
		}
		if beats == nil {
			closed := make(chan *clientv3.LeaseKeepAliveResponse)
			close(closed)
			beats = closed
		}
	}
}

// grantLease asks for the lock's lease. One that was granted and not heard of
// ends by itself.
func grantLease(ctx context.Context, c *clientv3.Client) (lease *clientv3.LeaseGrantResponse, err error) {
	for range lockTries {
		try, cancel := context.WithTimeout(ctx, lockTimeout)
		lease, err = c.Grant(try, lockTTL)
		cancel()
		if err == nil || ctx.Err() != nil {
			break
		}
	}
	return lease, err
}

func noLock(err error) error {
	return &cluster.Error{Code: cluster.CodeUnavailable, Message: "the cluster's lock cannot be had, so nothing was begun (is there a quorum? pgha status): " + err.Error()}
}

func busy(value []byte) error {
	var o OperationInfo
	if err := json.Unmarshal(value, &o); err != nil {
		return fmt.Errorf("decode lock: %w", err)
	}
	return &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf("another operation is under way: %s by %s, running on %s since %s: wait until it has ended",
		o.Kind, o.Actor, o.Node, o.Since.Format(time.DateTime))}
}

// notOnWitness refuses, on a witness, what only a data node can do, naming those.
func (n *Node) notOnWitness(why string) error {
	if n.cfg.Role == cluster.RoleData {
		return nil
	}
	return refused(cluster.CodeBadRequest, "a witness %s: run it on %s", why, orList(n.dataNodes()))
}

// dataNodes names the data nodes of the roster.
func (n *Node) dataNodes() []string {
	var out []string
	for _, m := range n.snapshot().Members {
		if m.Role == cluster.RoleData {
			out = append(out, m.Name)
		}
	}
	return out
}

// Operate has the daemon run an operation and calls step for each of its steps.
// result, a pointer or nil, takes what it returns. When ctx ends the operation is
// asked to end, and what state it has left comes with the error, which is a
// [OperationError].
func (l *Local) Operate(ctx context.Context, kind string, req OperationRequest, result any, step func(string)) error {
	run, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	stop := context.AfterFunc(ctx, func() {
		late, cancel := context.WithTimeout(run, 2*time.Second)
		defer cancel()
		if l.call(late, http.MethodDelete, "/v1/operations/"+req.ID, nil, nil) != nil {
			end()
		}
	})
	defer stop()
	last, err := l.stream(run, http.MethodPost, "/v1/operations/"+kind, req, func(line json.RawMessage) (bool, error) {
		var o OperationLine
		if err := json.Unmarshal(line, &o); err != nil {
			return false, fmt.Errorf("decode step: %w", err)
		}
		if !o.Done {
			step(o.Step)
		}
		return o.Done, nil
	})
	if err != nil {
		return err
	}
	var o OperationLine
	if err := json.Unmarshal(last, &o); err != nil || !o.Done {
		return &OperationError{Err: errors.New("the daemon went away before the operation ended"), Left: "look at pgha status and pgha events"}
	}
	if o.Error != nil {
		return &OperationError{Err: o.Error, Left: o.Left}
	}
	if result == nil {
		return nil
	}
	if err := json.Unmarshal(o.Result, result); err != nil {
		return fmt.Errorf("decode result: %w", err)
	}
	return nil
}

// OperationError is why an operation failed, with the state that it has left.
type OperationError struct {
	Err  error
	Left string // "" when nothing was begun
}

// Error implements error.
func (e *OperationError) Error() string {
	if e.Left == "" {
		return e.Err.Error()
	}
	return e.Err.Error() + ". State now: " + e.Left
}

// Unwrap returns the cause.
func (e *OperationError) Unwrap() error { return e.Err }

// interruptHandler ends an operation at the operator's wish.
func (n *Node) interruptHandler(w http.ResponseWriter, r *http.Request) {
	if !n.runs.interrupt(r.PathValue("id")) {
		reply(w, nil, &cluster.Error{Code: cluster.CodeConflict, Message: "that operation does not run any more"})
		return
	}
	reply(w, struct{}{}, nil)
}
