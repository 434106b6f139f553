package node

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"pgha/cluster"
)

// operationClient serves the operations of n on a socket and returns its client.
func operationClient(t *testing.T, n *Node) *Local {
	t.Helper()
	p := Paths{Run: t.TempDir()}
	l, err := net.Listen("unix", p.Socket())
	if err != nil {
		t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/operations/{kind}", n.operationHandler)
	mux.HandleFunc("DELETE /v1/operations/{id}", n.interruptHandler)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- serveHTTP(ctx, l, mux, discardLog()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return NewLocal(p)
}

// withOperation adds an operation for the time of a test.
func withOperation(t *testing.T, kind string, spec operationSpec) {
	t.Helper()
	operations[kind] = spec
	t.Cleanup(func() { delete(operations, kind) })
}

func TestOperation(t *testing.T) {
	n := &Node{log: discardLog(), opts: Options{Log: discardLog()}, cfg: Config{Name: "n1", Role: cluster.RoleData}}
	local := operationClient(t, n)
	begun := make(chan struct{}, 1)
	withOperation(t, "add", operationSpec{run: func(_ *Node, _ context.Context, o *Operation, req json.RawMessage) (any, error) {
		var v struct{ A, B int }
		if err := decodeRequest(req, &v); err != nil {
			return nil, err
		}
		o.Say("adding %d and %d for %s", v.A, v.B, o.Actor())
		return v.A + v.B, nil
	}})
	withOperation(t, "wait", operationSpec{run: func(_ *Node, ctx context.Context, o *Operation, _ json.RawMessage) (any, error) {
		o.Leaves("half is done")
		begun <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	withOperation(t, "refuse", operationSpec{run: func(*Node, context.Context, *Operation, json.RawMessage) (any, error) {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: "it cannot be"}
	}})
	withOperation(t, "locked", operationSpec{lock: true, run: func(*Node, context.Context, *Operation, json.RawMessage) (any, error) {
		t.Error("it ran without the lock")
		return nil, nil
	}})

	var steps []string
	note := func(s string) { steps = append(steps, s) }
	var sum int
	req := OperationRequest{ID: "1", Actor: "ann", Request: json.RawMessage(`{"A":2,"B":3}`)}
	if err := local.Operate(t.Context(), "add", req, &sum, note); err != nil || sum != 5 {
		t.Fatalf("add: %d, %v", sum, err)
	}
	if len(steps) != 1 || steps[0] != "adding 2 and 3 for ann@n1" {
		t.Errorf("steps: %q", steps)
	}

	refused := func(kind, req string, code cluster.Code, words ...string) {
		t.Helper()
		err := local.Operate(t.Context(), kind, OperationRequest{ID: "2", Actor: "ann", Request: json.RawMessage(req)}, nil, note)
		var refusal *cluster.Error
		if !errors.As(err, &refusal) || refusal.Code != code {
			t.Errorf("%s: %v, want code %s", kind, err, code)
			return
		}
		for _, w := range words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %q lacks %q", kind, err, w)
			}
		}
	}
	refused("add", `{"C":1}`, cluster.CodeBadRequest, "C")
	refused("nosuch", `null`, cluster.CodeBadRequest, "add, ", "locked, ")
	refused("refuse", `null`, cluster.CodeConflict, "it cannot be")
	refused("locked", `null`, cluster.CodeUnavailable)

	// The operator goes away: the operation ends, and says what it has left.
	ctx, cancel := context.WithCancel(t.Context())
	go func() { <-begun; cancel() }()
	var failed *OperationError
	if err := local.Operate(ctx, "wait", OperationRequest{ID: "3"}, nil, note); !errors.As(err, &failed) || failed.Left != "half is done" || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("interrupted: %v", err)
	}
	err := local.Operate(t.Context(), "wait", OperationRequest{ID: "4", Timeout: time.Millisecond}, nil, note)
	if !errors.As(err, &failed) || failed.Left != "half is done" || !strings.Contains(err.Error(), "not done within 1ms") {
		t.Errorf("too late: %v", err)
	}

	n.cfg.Role = cluster.RoleWitness
	n.world.Members = []cluster.Member{{Name: "n1", Role: cluster.RoleData}, {Name: "w", Role: cluster.RoleWitness}}
	withOperation(t, "data", operationSpec{data: true})
	refused("data", `null`, cluster.CodeBadRequest, "run it on n1")
}
