package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"time"

	"pgha/cluster"
)

// A task is a part of an operation that the daemon of another data node has to do
// on its own host. Each can be repeated.

// pathTask is where a data node asks another for a task; its name follows.
const pathTask = "/v1/tasks/"

type task func(n *Node, ctx context.Context, req json.RawMessage) (any, error)

// tasks are what data nodes may ask of each other, by name.
var tasks map[string]task

// init, not an initialiser: the tasks' functions lead back to the table.
func init() {
	tasks = map[string]task{
		taskReload:   (*Node).reloadTask,
		taskRestart:  (*Node).restartTask,
		taskRenew:    (*Node).renewProgramsTask,
		taskPackages: (*Node).packagesTask,
		taskUpgrade:  (*Node).upgradePackagesTask,
		taskSetAside: (*Node).setAsideTask,
	}
}

// onNode has a data node, which may be this one, do a task.
func (n *Node) onNode(ctx context.Context, m cluster.Member, name string, in, out any) error {
	if m.Name != n.cfg.Name {
		return n.seen.call(ctx, http.MethodPost, m.APIAddr(), pathTask+name, in, out)
	}
	req, err := json.Marshal(in)
	if err != nil {
		return fmt.Errorf("encode request: %w", err)
	}
	result, err := tasks[name](n, ctx, req)
	if err != nil || out == nil {
		return err
	}
	data, err := json.Marshal(result)
	if err == nil {
		err = json.Unmarshal(data, out)
	}
	if err != nil {
		return fmt.Errorf("hand over result: %w", err)
	}
	return nil
}

// taskHandler serves the other data nodes.
func (n *Node) taskHandler(w http.ResponseWriter, r *http.Request) {
	var req json.RawMessage
	run, known := tasks[r.PathValue("task")]
	err := decode(w, r, &req)
	switch {
	case err != nil:
	case !known:
		err = refused(cluster.CodeBadRequest, "%s does not know the task %q: it may run an older pgha", n.cfg.Name, r.PathValue("task"))
	case n.cfg.Role != cluster.RoleData:
		err = refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL", n.cfg.Name)
	}
	if err != nil {
		reply(w, nil, err)
		return
	}
	// It may take longer than a request may to arrive.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	result, err := run(n, r.Context(), req)
	reply(w, result, err)
}
