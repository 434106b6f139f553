package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/postgres"
	"pgha/supervisor"
	"pgha/systemd"
)

// trialEvery is how often a new version looks whether it has proved itself.
const trialEvery = 250 * time.Millisecond

// UpgradeReport tells of a new version on trial on a node, or of the last one
// that has failed there.
type UpgradeReport struct {
	ID      string    `json:"id"`
	Version string    `json:"version"`
	From    string    `json:"from"` // the version before
	Started time.Time `json:"started"`
	// Failed says why it runs no more; "" while it is on trial.
	Failed string `json:"failed,omitempty"`
}

func (t *trial) report() *UpgradeReport {
	if t == nil {
		return nil
	}
	return &UpgradeReport{ID: t.ID, Version: t.Version, From: t.From, Started: t.Started, Failed: t.Failed}
}

// report tells of the trial that this image is or, if it is none, of the last
// one that has failed; nil for neither.
func (im *Image) report() *UpgradeReport {
	if t := im.onTrial(); t != nil {
		return t.report()
	}
	return im.failed.report()
}

// health is what a new version must leave as it was.
type health struct {
	Problems   []string       `json:"problems,omitempty"` // the parts that have one
	Children   map[string]int `json:"children,omitempty"` // process ids of those that run
	Postgres   string         `json:"postgres,omitempty"` // primary, replica or "" for none
	Postmaster int            `json:"postmaster,omitempty"`
}

// health looks at the parts of this node.
func (n *Node) health() health {
	n.mu.Lock()
	h := health{Problems: slices.Sorted(maps.Keys(n.problems)), Children: map[string]int{}}
	n.mu.Unlock()
	if n.cfg.Role != cluster.RoleData {
		return h
	}
	for _, p := range []*supervisor.Process{n.patroni, n.haproxy} {
		if st := p.Status(); st.State == supervisor.Running {
			h.Children[st.Name] = st.PID
		}
	}
	switch p := n.keeper.watcher.Latest(); p.Kind {
	case postgres.Primary:
		h.Postgres, h.Postmaster = pgPrimary, p.PID
	case postgres.Recovery:
		h.Postgres, h.Postmaster = pgReplica, p.PID
	}
	return h
}

// trialObservation is what decideTrial looks at.
type trialObservation struct {
	before, now health
	etcd        bool // its member has a leader, and is none that only learns
	read        bool // a round was done on the cluster's state, read by this version
	owner, open bool // of the gate
	elapsed     time.Duration
}

type trialAction int

const (
	trialWait trialAction = iota
	trialConfirm
	trialBack
)

// decideTrial says what becomes of a new version, with what is missing.
func decideTrial(o trialObservation) (trialAction, string) {
	missing := ""
	switch {
	case !o.etcd:
		missing = "its etcd member has no leader"
	case !o.read:
		missing = "it has not read the cluster's state"
	}
	for _, name := range slices.Sorted(maps.Keys(o.before.Children)) {
		if missing == "" && o.now.Children[name] == 0 {
			missing = name + " does not run"
		}
	}
	switch {
	case missing != "":
	case o.before.Postgres != "" && o.now.Postgres == "":
		missing = "PostgreSQL does not answer"
	case o.owner && o.now.Postgres == pgPrimary && !o.open:
		missing = "the gate is shut"
	default:
		for _, p := range o.now.Problems {
			if !slices.Contains(o.before.Problems, p) {
				missing = "there is a problem with its " + p
				break
			}
		}
	}
	switch {
	case missing == "":
		return trialConfirm, ""
	case o.elapsed > trialTime:
		return trialBack, fmt.Sprintf("%s, %s after its start", missing, trialTime)
	}
	return trialWait, missing
}

// observeTrial looks at this node as the version on trial finds it. first is when
// it first read the cluster's state, for the next look.
func (n *Node) observeTrial(ctx context.Context, t *trial, start time.Time, first *time.Time) trialObservation {
	o := trialObservation{before: t.Before, now: n.health(), elapsed: time.Since(start)}
	if srv := n.etcd.Load(); srv != nil {
		if st, err := srv.Status(ctx); err == nil {
			o.etcd = st.HasLeader && !st.Learner
		}
	}
	n.mu.Lock()
	if first.IsZero() && n.world.ViewedAt.After(start) {
		*first = n.world.ViewedAt
	}
	o.read = !first.IsZero() && n.lastTick.After(*first)
	n.mu.Unlock()
	if n.keeper != nil {
		g := n.keeper.report(ctx)
		o.owner, o.open = g.Self, g.Open
	}
	return o
}

// prove makes a version on trial the installed one when it is healthy, or gives
// way to the one before. For any other it does nothing.
func (n *Node) prove(ctx context.Context) error {
	if f := n.image.failed; f != nil && n.image.news {
		n.event(EventUpgrade, n.cfg.Name, f.Actor, "the upgrade to %s has failed, %s runs again: %s", f.Version, Version, f.Failed)
	}
	t := n.image.onTrial()
	if t == nil {
		return nil
	}
	start, first, last := time.Now(), time.Time{}, ""
	for {
		what, why := decideTrial(n.observeTrial(ctx, t, start, &first))
		if what == trialConfirm {
			err := n.install(ctx, t)
			if err == nil {
				return nil
			}
			what, why = trialBack, "it cannot be installed: "+err.Error()
		}
		if what == trialBack {
			n.log.Error("the new version gives way to the one before", "version", Version, "before", t.From, "why", why)
			n.reexec(n.image.back(why))
			return nil
		}
		if why != last {
			last = why
			n.log.Info("this version is on trial", "version", Version, "waiting_for", why)
		}
		if !sleep(ctx, trialEvery) {
			return nil
		}
	}
}

// install makes the program on trial the installed one. When a crash comes
// between its steps, the next start finds the new version installed.
func (n *Node) install(ctx context.Context, t *trial) error {
	if err := swapPrograms(t.Installed); err != nil {
		return err
	}
	n.image.confirm()
	if err := removeTrial(n.paths); err != nil {
		n.log.Error("cannot forget the trial that has gone well", "err", err)
	}
	if err := n.renewUnit(ctx, t.Installed); err != nil {
		n.log.Error("cannot renew the unit file", "err", err)
	}
	now := n.health()
	n.event(EventUpgrade, n.cfg.Name, t.Actor, "pgha was upgraded from %s to %s; %s", t.From, Version, went(t.Before, now))
	return nil
}

// went says in words what became of the children.
func went(before, now health) string {
	var on, changed []string
	add := func(name string, was, is int) {
		switch {
		case was == 0:
		case was == is:
			on = append(on, name)
		default:
			changed = append(changed, name)
		}
	}
	add("PostgreSQL", before.Postmaster, now.Postmaster)
	for _, name := range slices.Sorted(maps.Keys(before.Children)) {
		add(name, before.Children[name], now.Children[name])
	}
	text := "nothing ran beside it"
	if len(on) > 0 {
		text = strings.Join(on, ", ") + " went on"
	}
	if len(changed) > 0 {
		text += "; " + strings.Join(changed, ", ") + " was started anew"
	}
	return text
}

// swapPrograms puts the program on trial in the place of the installed one, which
// it keeps beside. At no moment is there none.
func swapPrograms(installed string) error {
	aside := previous(installed) + ".tmp"
	if err := os.Remove(aside); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove leftover: %w", err)
	}
	if err := os.Link(installed, aside); err != nil {
		return fmt.Errorf("keep the program before: %w", err)
	}
	if err := os.Rename(aside, previous(installed)); err != nil {
		return fmt.Errorf("keep the program before: %w", err)
	}
	if err := os.Rename(candidate(installed), installed); err != nil {
		return fmt.Errorf("install the new program: %w", err)
	}
	return fsx.SyncDir(filepath.Dir(installed))
}

func removeTrial(p Paths) error {
	if err := os.Remove(p.trial()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove trial: %w", err)
	}
	return fsx.SyncDir(p.Lib)
}

// renewUnit writes the unit file of this version, where it is another one.
func (n *Node) renewUnit(ctx context.Context, installed string) error {
	if n.opts.Foreground {
		return nil
	}
	old, err := os.ReadFile(systemd.UnitPath)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // somebody keeps it elsewhere
	}
	if err != nil {
		return fmt.Errorf("read unit file: %w", err)
	}
	text, err := systemd.UnitText(installed)
	if err != nil || string(text) == string(old) {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	return systemd.Install(ctx, installed)
}
