package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/cluster"
	"pgha/internal/host"
	"pgha/patroni"
	"pgha/sqladmin"
)

const (
	taskSetAside = "set-data-aside"

	// setAsideTimeout bounds the stop of a replica and the renaming of its data.
	setAsideTimeout = 3 * time.Minute
	// copyProgress is the least time between two words about a copy that runs.
	copyProgress = 3 * time.Second
)

// ReinitRequest asks for a new copy of the primary's data on a replica.
type ReinitRequest struct {
	Node string `json:"node"`
	// Discard deletes the data that the replica has, first. Without it that is
	// moved aside, for which there must be room.
	Discard bool `json:"discard,omitempty"`
}

// ReinitResult says what a new copy has cost.
type ReinitResult struct {
	Node string `json:"node"`
	From string `json:"from"`
	// Aside is the directory that holds the old data; "" if it was deleted, or
	// there was none.
	Aside string `json:"aside,omitempty"`
	Bytes int64  `json:"bytes"` // of the data that was to be copied
}

// decideReinit says why a node's data cannot be replaced, or nil.
func decideReinit(o handOverObservation, name string) error {
	m, known := o.member(name)
	switch {
	case !known:
		return unknownNode(name, namesOf(o.members))
	case m.Role == cluster.RoleWitness:
		return refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL: name a data node", name)
	case o.leader == "":
		return refused(cluster.CodeConflict, "there is no primary to copy from, and what %s has may be the last copy: see pgha status", name)
	case name == o.leader:
		return refused(cluster.CodeConflict, "%s is the primary, and its data is what the others copy: hand over first with pgha switchover", name)
	case !m.Reachable:
		return refused(cluster.CodeConflict, "the pgha of %s does not answer: bring it back first", name)
	case o.paused:
		return refused(cluster.CodeConflict, "automatic failover is paused, and Patroni copies nothing meanwhile: pgha resume first")
	case o.underWay != "":
		return refused(cluster.CodeConflict, "Patroni has been asked for %s already: wait until it is over", o.underWay)
	}
	return nil
}

// reinit replaces a replica's data by a copy of the primary's.
func (n *Node) reinit(ctx context.Context, op *Operation, raw json.RawMessage) (any, error) {
	var req ReinitRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	o, _, err := n.observeHandOver(ctx)
	if err != nil {
		return nil, err
	}
	if err := decideReinit(o, req.Node); err != nil {
		return nil, err
	}
	m, err := n.memberNamed(req.Node)
	if err != nil {
		return nil, err
	}
	primary, err := n.memberNamed(o.leader)
	if err != nil {
		return nil, err
	}
	conn, err := n.dialMember(ctx, primary, "postgres")
	if err != nil {
		return nil, fmt.Errorf("connect to the primary %s: %w", o.leader, err)
	}
	defer func() { _ = conn.Close(context.WithoutCancel(ctx)) }()
	r := ReinitResult{Node: req.Node, From: o.leader}
	if r.Bytes, err = sqladmin.Size(ctx, conn); err != nil {
		return nil, err
	}
	before, _ := n.primaryStatus(ctx, m) // its Patroni may be what is broken
	if req.Discard {
		op.Say("%s: deleting its data", req.Node)
		op.Leaves("Patroni on %s was asked to delete its data and to copy that of %s, and goes on by itself: pgha status", req.Node, o.leader)
		if err := n.patroniOf(m).Reinitialize(ctx, true); err != nil {
			return nil, fmt.Errorf("have %s copy anew: %w", req.Node, err)
		}
	} else {
		op.Say("%s: stopping PostgreSQL and moving its data aside", req.Node)
		op.Leaves("%s may have stopped; it starts again by itself, with its old data or a new copy: pgha status", req.Node)
		var a setAsideAnswer
		if err := n.onNode(ctx, m, taskSetAside, setAsideRequest{Bytes: uint64(r.Bytes), Primary: o.leader}, &a); err != nil {
			return nil, err
		}
		if r.Aside = a.Path; r.Aside != "" {
			op.Say("%s: the old data is in %s", req.Node, r.Aside)
		}
	}
	n.event(EventRecovery, req.Node, op.Actor(), "its data is replaced by a copy of %s's (%s)%s", o.leader, FormatBytes(uint64(r.Bytes)), asideText(r.Aside))
	op.Leaves("%s copies the data of %s and goes on by itself: pgha status; %s", req.Node, o.leader, kept(r.Aside))
	if err := n.watchCopy(ctx, op, conn, primary, m, before.PostmasterStart); err != nil {
		return nil, err
	}
	h := &handing{n: n, tell: op, async: o.async, r: HandOverResult{From: req.Node, To: o.leader}}
	if err := h.waitFollows(ctx); err != nil {
		return nil, err
	}
	if r.Aside != "" {
		op.Say("remove the old data when you are sure: rm -r %s on %s", r.Aside, req.Node)
	}
	return r, nil
}

func asideText(path string) string {
	if path == "" {
		return ""
	}
	return "; the old data is in " + path
}

func kept(path string) string {
	if path == "" {
		return "its old data is gone"
	}
	return "its old data is in " + path
}

// copyWatch says when it is time for another word about a copy.
type copyWatch struct {
	at   time.Time
	done int64
}

// due holds back all but what is new after a while: more as the copy is larger.
func (c *copyWatch) due(now time.Time, done, total int64) bool {
	if done <= c.done || now.Sub(c.at) < copyProgress || done-c.done < total/50 && now.Sub(c.at) < 10*copyProgress {
		return false
	}
	c.at, c.done = now, done
	return true
}

// watchCopy tells how far the copy is until PostgreSQL has started from it.
func (n *Node) watchCopy(ctx context.Context, tell steps, conn *pgx.Conn, primary, m cluster.Member, before string) error {
	tell.Say("%s: copying the data of %s", m.Name, primary.Name)
	watch, state := copyWatch{at: time.Now()}, ""
	for {
		st, err := n.primaryStatus(ctx, m)
		switch {
		case err != nil: // Patroni is only starting
		case st.PostmasterStart != "" && st.PostmasterStart != before:
			tell.Say("%s: PostgreSQL has started from the copy", m.Name)
			return nil
		case st.State != state:
			state = st.State
			tell.Say("%s: %s", m.Name, state)
		}
		if done, total, err := copied(ctx, conn, m); err == nil && watch.due(time.Now(), done, total) {
			tell.Say("%s: copied %s of %s", m.Name, FormatBytes(uint64(done)), FormatBytes(uint64(max(done, total))))
		}
		l, err := n.readLeadership(ctx)
		if err == nil && l.serving() != "" && l.serving() != primary.Name {
			return fmt.Errorf("%s has taken over from %s, from which %s was copying: Patroni begins again by itself, see pgha status", l.serving(), primary.Name, m.Name)
		}
		if !sleep(ctx, 300*time.Millisecond) {
			return fmt.Errorf("wait for the copy on %s: %w", m.Name, context.Cause(ctx))
		}
	}
}

// copied asks the primary how far the copy of a member is, in bytes.
func copied(ctx context.Context, conn *pgx.Conn, m cluster.Member) (done, total int64, err error) {
	err = conn.QueryRow(ctx, `
SELECT coalesce(sum(b.backup_streamed), 0)::bigint, coalesce(sum(b.backup_total), 0)::bigint
FROM pg_stat_progress_basebackup b JOIN pg_stat_activity a USING (pid) WHERE a.client_addr = $1::inet`, m.Addr.String()).Scan(&done, &total)
	if err != nil {
		return 0, 0, fmt.Errorf("ask for the progress of the copy: %w", err)
	}
	return done, total, nil
}

type setAsideRequest struct {
	Bytes   uint64 `json:"bytes"`   // that the copy will take
	Primary string `json:"primary"` // as whoever asks knows it
}

type setAsideAnswer struct {
	Path string `json:"path"` // of the old data; "" if there was none
}

// setAsideObservation is what decideSetAside looks at.
type setAsideObservation struct {
	self, primary, leader string // primary by who asks, leader by Patroni's key as this node sees it
	owner                 bool   // this node owns the gate
	dir                   string
	info                  patroni.DataDirInfo
	need, free            uint64
}

// decideSetAside says why this node's data may not be moved aside, or nil.
func decideSetAside(o setAsideObservation) error {
	// Not all of the copy: its WAL goes on growing meanwhile.
	need := o.need + o.need/10
	switch {
	case o.owner || o.leader == o.self:
		return refused(cluster.CodeConflict, "%s is the primary: its data stays where it is", o.self)
	case o.leader == "" || o.leader != o.primary:
		return refused(cluster.CodeConflict, "%s sees no primary %s to copy from: see pgha status", o.self, o.primary)
	case o.info.State == patroni.DataDirEmpty:
		return nil
	case o.info.Tablespaces:
		return refused(cluster.CodeConflict, "the data of %s has tablespaces outside of %s, which cannot be moved aside: repeat with --discard, which deletes them too", o.self, o.dir)
	case o.free < need:
		return refused(cluster.CodeConflict, "%s has no room for a second copy: it needs %s and has %s in %s: free some, or repeat with --discard, which deletes the old data first", o.self, FormatBytes(need), FormatBytes(o.free), filepath.Dir(o.dir))
	}
	return nil
}

// setAsideTask stops this node's PostgreSQL, moves its data aside and lets
// Patroni start, which copies the primary's. If it fails, or the daemon ends,
// Patroni starts with what is there.
func (n *Node) setAsideTask(ctx context.Context, raw json.RawMessage) (any, error) {
	var req setAsideRequest
	if err := decodeRequest(raw, &req); err != nil {
		return nil, err
	}
	dir := n.cfg.Postgres.DataDir
	info, err := patroni.InspectDataDir(dir)
	if err != nil {
		return nil, err
	}
	free, _, err := host.DiskFree(filepath.Dir(dir))
	if err != nil {
		return nil, err
	}
	o := setAsideObservation{
		self: n.cfg.Name, primary: req.Primary, leader: n.snapshot().View.Leader, owner: n.keeper.gate.Status().Self,
		dir: dir, info: info, need: req.Bytes, free: free,
	}
	if err := decideSetAside(o); err != nil {
		return nil, err
	}
	if info.State == patroni.DataDirEmpty {
		n.wake()
		return setAsideAnswer{}, nil
	}
	if !n.settingAside.CompareAndSwap(false, true) {
		return nil, refused(cluster.CodeConflict, "the data of %s is being moved aside already", n.cfg.Name)
	}
	defer n.wake()
	defer n.settingAside.Store(false)
	// Whoever asked may go away: this ends in one state or the other.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), setAsideTimeout)
	defer cancel()
	if err := n.patroni.Stop(ctx); err != nil {
		return nil, fmt.Errorf("stop PostgreSQL: %w", err)
	}
	if err := n.stopPostgres(ctx); err != nil {
		return nil, err
	}
	if now, err := patroni.InspectDataDir(dir); err != nil || now.Running {
		return nil, errors.Join(err, fmt.Errorf("PostgreSQL still runs in %s", dir))
	}
	// It may have become the primary while it was being stopped, and have what
	// nobody else has.
	switch l, err := n.readLeadership(ctx); {
	case err != nil:
		return nil, err
	case l.Record.Owner != req.Primary || l.View.Leader != req.Primary:
		return nil, refused(cluster.CodeConflict, "the leadership has moved meanwhile (the gate's owner is %s): nothing was moved aside, and PostgreSQL starts again", l.Record.Owner)
	}
	path, err := patroni.SetAside(dir)
	if err != nil {
		return nil, err
	}
	n.log.Warn("this node's data was moved aside, for a new copy", "to", path)
	// Its parent may be a directory in which PostgreSQL's user cannot make it.
	err = os.Mkdir(dir, 0o700)
	if err == nil {
		err = os.Lchown(dir, info.UID, info.GID) // whoever owns the parent may have put a link in its place
	}
	if err != nil {
		return nil, fmt.Errorf("make the directory of the new copy: %w; the old data is in %s", err, path)
	}
	return setAsideAnswer{Path: path}, nil
}
