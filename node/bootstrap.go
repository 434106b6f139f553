package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/patroni"
	"pgha/supervisor"
)

// found writes the cluster's record at the founder's first start. It may be
// repeated: a record of the same cluster is left as it is.
func (n *Node) found(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	store := n.store.Load()
	if store == nil { // etcd has ended meanwhile
		return n.notReady()
	}
	if id, err := store.Identity(ctx); err == nil && id.ID == n.state.ClusterID {
		return n.markFounded()
	}
	if n.state.Settings == nil {
		return errors.New("found the cluster: the settings that init wrote are gone from the state file: pgha reset, then init again")
	}
	secrets, err := os.ReadFile(n.paths.secrets())
	if err != nil {
		return fmt.Errorf("read secrets: %w", err)
	}
	caKey, err := os.ReadFile(n.paths.sealedCAKey())
	if err != nil {
		return fmt.Errorf("read CA key: %w", err)
	}
	if err := store.Create(ctx, n.identity(), n.self(), *n.state.Settings, secrets, caKey); err != nil {
		return err
	}
	return n.markFounded()
}

// markFounded takes away this node's right to begin a cluster.
func (n *Node) markFounded() error {
	if n.founded.Load() {
		return nil
	}
	if err := n.changeState(func(s *State) { s.Founded = true }); err != nil {
		return fmt.Errorf("note that the cluster is founded: %w", err)
	}
	n.founded.Store(true)
	return nil
}

// self is this node's own entry in the roster.
func (n *Node) self() cluster.Member {
	return selfMember(n.cfg, n.state)
}

func selfMember(cfg Config, s State) cluster.Member {
	return cluster.Member{
		Name: cfg.Name, Role: cfg.Role, Addr: cfg.Address, Ports: cfg.Ports, SANs: s.SANs,
		JoinedAt: s.CreatedAt, State: cluster.StateMember, Version: Version,
	}
}

// pendingFile marks a bootstrap that has begun: only with it may a data
// directory that looks like a database be taken for a half-made one.
func (n *Node) pendingFile() string { return filepath.Join(n.paths.Lib, "bootstrap-pending") }

// beforePatroni runs before each start of Patroni, restarts included.
func (n *Node) beforePatroni(ctx context.Context) error {
	if !n.state.Founder || n.state.Adopted != "" {
		return nil
	}
	w, err := n.observe(ctx)
	if err != nil {
		return err
	}
	if !w.Viewed {
		return errors.New("the cluster's state cannot be read yet")
	}
	return n.repairBootstrap(ctx, w)
}

// repairBootstrap undoes a bootstrap that was cut off, for instance because
// the host lost power during initdb. Patroni's own marker has no lease, so
// every node would wait for it for ever.
func (n *Node) repairBootstrap(ctx context.Context, w world) error {
	info, err := patroni.InspectDataDir(n.cfg.Postgres.DataDir)
	if err != nil {
		return err
	}
	_, err = os.Stat(n.pendingFile())
	pending := err == nil
	act, why := patroni.DecideBootstrapRepair(patroni.BootstrapObservation{
		Initialized: w.View.Initialized, SystemID: w.View.SystemID, Leader: w.View.Leader,
		BootstrapNode: true, Pending: pending, DataDir: info.State, PostgresRunning: info.Running,
	})
	switch act {
	case patroni.BootstrapRefuse:
		return fmt.Errorf("start Patroni: %s", why)
	case patroni.BootstrapWait:
		return fmt.Errorf("start Patroni: %s", why)
	case patroni.BootstrapStopPostgres:
		n.log.Warn("stopping the PostgreSQL of a half-made bootstrap", "why", why)
		if err := n.stopPostgres(ctx); err != nil {
			return err
		}
		return n.repairBootstrap(ctx, w)
	case patroni.BootstrapRepair:
		if err := n.undoBootstrap(ctx, w, info.State); err != nil {
			return err
		}
		n.log.Warn("a half-made bootstrap was undone", "why", why)
	}
	if w.View.SystemID == "" && !pending {
		return fsx.WriteFile(n.pendingFile(), []byte(time.Now().UTC().Format(time.RFC3339)+"\n"), 0o600, fsx.Keep, fsx.Keep)
	}
	if w.View.SystemID != "" {
		return n.bootstrapDone()
	}
	return nil
}

// endUnfinishedBootstrap ends a Patroni that a dead daemon has left in the
// middle of a bootstrap. It has lost etcd on the way and would neither finish
// nor give up; the next start of Patroni undoes what it has begun. SIGKILL,
// because there is nothing worth a shutdown.
func (n *Node) endUnfinishedBootstrap(ctx context.Context) error {
	if _, err := os.Stat(n.pendingFile()); err != nil {
		return nil // none was begun
	}
	pid, err := supervisor.Lookup(n.paths.Run, "patroni")
	if err != nil || pid == 0 {
		return err
	}
	n.log.Warn("ending the Patroni of an unfinished bootstrap", "pid", pid)
	// With its process group: an initdb that lives on would remove the directory
	// that the next one makes. PostgreSQL is in none of Patroni's groups.
	return terminate(ctx, -pid, syscall.SIGKILL, 10*time.Second)
}

// bootstrapDone forgets that a bootstrap was under way.
func (n *Node) bootstrapDone() error {
	if err := os.Remove(n.pendingFile()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove bootstrap marker: %w", err)
	}
	return nil
}

func (n *Node) undoBootstrap(ctx context.Context, w world, dir patroni.DataDirState) error {
	if dir != patroni.DataDirEmpty {
		to, err := patroni.MoveAside(n.cfg.Postgres.DataDir)
		if err != nil {
			return err
		}
		n.log.Warn("the half-made data directory was moved aside", "to", to)
	}
	if !w.View.Initialized {
		return nil
	}
	c, err := n.etcdClient()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	key := patroni.Prefix(n.cfg.Cluster) + patroni.KeyInitialize
	_, err = c.Txn(ctx).
		If(clientv3.Compare(clientv3.Value(key), "=", "")).
		Then(clientv3.OpDelete(key)).Commit()
	if err != nil {
		return fmt.Errorf("delete the marker of the half-made bootstrap: %w", err)
	}
	return nil
}

// prepareAdopted gives Patroni what it otherwise learns from its own
// bootstrap: the dynamic configuration of a cluster that it did not make.
func (n *Node) prepareAdopted(ctx context.Context, w world, cfg patroni.Config) error {
	if n.state.Adopted == "" || w.View.Config != nil {
		return nil
	}
	value, err := json.Marshal(patroni.BootstrapDynamic(cfg))
	if err != nil {
		return fmt.Errorf("encode dynamic configuration: %w", err)
	}
	c, err := n.etcdClient()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	key := patroni.Prefix(n.cfg.Cluster) + patroni.KeyConfig
	_, err = c.Txn(ctx).
		If(clientv3.Compare(clientv3.CreateRevision(key), "=", 0)).
		Then(clientv3.OpPut(key, string(value))).Commit()
	if err != nil {
		return fmt.Errorf("write dynamic configuration: %w", err)
	}
	return nil
}

// dynamicConfig keeps what must be the same on all nodes, such as the slots of
// the members, as the roster asks for. The primary's node does it.
func (n *Node) dynamicConfig(ctx context.Context, w world, cfg patroni.Config) error {
	if !w.Viewed || w.View.Leader != n.cfg.Name {
		return nil
	}
	if w.View.SystemID != "" {
		if err := n.bootstrapDone(); err != nil {
			return err
		}
	}
	if w.View.Config == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	patch := patroni.DynamicPatch(w.View.Config, cfg, goneSlots(w)...)
	if len(patch) == 0 {
		return nil
	}
	if err := n.restClient(w, n.cfg.Address, n.cfg.Ports.Patroni).PatchConfig(ctx, patch); err != nil {
		return fmt.Errorf("change dynamic configuration: %w", err)
	}
	return nil
}

// goneSlots names former members whose slots still hold WAL back.
func goneSlots(w world) []string {
	slots, _ := w.View.Config["slots"].(map[string]any)
	known := map[string]bool{}
	for _, m := range w.Members {
		known[patroni.SlotName(m.Name)] = true
	}
	var gone []string
	for name, v := range slots {
		// Only slots as pgha makes them; an operator's own carry more.
		if slot, ok := v.(map[string]any); ok && len(slot) == 1 && slot["type"] == "physical" && !known[name] {
			gone = append(gone, name)
		}
	}
	return gone
}
