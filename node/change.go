package node

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"time"

	"github.com/google/uuid"

	"pgha/cluster"
	"pgha/internal/fsx"
)

// What a node does with a program that comes to it: it takes it in, tries what can
// be tried, and gives way to it.

// trialRequest asks a node to run a program that it has.
type trialRequest struct {
	SHA256 string `json:"sha256"`
	Actor  string `json:"actor"`
}

// checkProgram tries what can be tried of a program that was brought here.
func (n *Node) checkProgram(ctx context.Context, sum string) programState {
	path := candidate(n.image.Installed)
	if have, err := fileSum(path); err != nil || have != sum {
		return programState{}
	}
	info, _, err := Inspect(ctx, path)
	if err == nil {
		_, err = askProgram(ctx, path, "run", "--check")
	}
	if err != nil {
		return programState{There: true, Refused: err.Error()}
	}
	return programState{There: true, Version: info.Version}
}

// beginTrial has this daemon give way to a program that was brought here. It
// returns once that is under way.
func (n *Node) beginTrial(ctx context.Context, sum, actor string) (_ *UpgradeReport, err error) {
	conflict := func(format string, args ...any) (*UpgradeReport, error) {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: fmt.Sprintf(format, args...)}
	}
	if !n.upgradeMu.TryLock() {
		return conflict("%s is about to change its program already", n.cfg.Name)
	}
	defer func() {
		if err != nil { // else nothing is to begin any more
			n.upgradeMu.Unlock()
		}
	}()
	if t := n.image.onTrial(); t != nil {
		return conflict("%s has %s on trial: wait until that is over", n.cfg.Name, t.Version)
	}
	if n.stopping.Load() || n.leaving.Load() {
		return conflict("%s is being stopped", n.cfg.Name)
	}
	st := n.checkProgram(ctx, sum)
	switch {
	case st.Refused != "":
		return conflict("%s", st.Refused)
	case !st.There:
		return conflict("the program is not on %s any more: run the command again", n.cfg.Name)
	}
	if err := keepInstalled(n.image.Installed); err != nil {
		return nil, err
	}
	if err := n.promiseRestart(); err != nil {
		return nil, err
	}
	id, err := uuid.NewRandom()
	if err != nil {
		return nil, fmt.Errorf("make id of trial: %w", err)
	}
	t := trial{
		ID: id.String(), Version: st.Version, From: Version, Actor: actor, Installed: n.image.Installed,
		PID: os.Getpid(), Started: time.Now().UTC(), Before: n.health(),
	}
	if err := fsx.WriteJSON(n.paths.trial(), t, 0o600); err != nil {
		return nil, err
	}
	n.event(EventUpgrade, n.cfg.Name, actor, "pgha %s is on trial", t.Version)
	n.reexec(&Reexec{Path: candidate(t.Installed), hand: handed{Installed: t.Installed, Trial: t.ID}})
	return t.report(), nil
}

// runAnew is the operation that has this daemon give way to the program that it
// runs.
func (n *Node) runAnew(_ context.Context, o *Operation, _ json.RawMessage) (any, error) {
	conflict := func(text string) (any, error) {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: n.cfg.Name + text}
	}
	if !n.upgradeMu.TryLock() {
		return conflict(" is about to change its program already")
	}
	if n.image.onTrial() != nil {
		n.upgradeMu.Unlock()
		return conflict(" has a new version on trial: wait until that is over")
	}
	if err := n.promiseRestart(); err != nil {
		n.upgradeMu.Unlock()
		return nil, err
	}
	o.Say("%s: pgha alone starts anew", n.cfg.Name)
	n.reexec(&Reexec{Path: ownImage, hand: handed{Installed: n.image.Installed}})
	return struct{}{}, nil
}

// programHandler takes a program in. Its sender waits for the answer, so that it
// may take as long as the network needs.
func (n *Node) programHandler(w http.ResponseWriter, r *http.Request) {
	control := http.NewResponseController(w)
	_ = control.SetReadDeadline(time.Now().Add(programTransfer))
	if !n.upgradeMu.TryLock() {
		reply(w, nil, &cluster.Error{Code: cluster.CodeConflict, Message: "another program is on its way to " + n.cfg.Name})
		return
	}
	defer n.upgradeMu.Unlock()
	if n.image.onTrial() != nil {
		reply(w, nil, &cluster.Error{Code: cluster.CodeConflict, Message: n.cfg.Name + " has a new version on trial: wait until that is over"})
		return
	}
	reply(w, struct{}{}, receive(n.image.Installed, r.URL.Query().Get("sha256"), r.Body))
}

func (n *Node) programCheckHandler(w http.ResponseWriter, r *http.Request) {
	var req programCheck
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	// The answer takes longer than a request may to arrive.
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	reply(w, n.checkProgram(r.Context(), req.SHA256), nil)
}

func (n *Node) programTrialHandler(w http.ResponseWriter, r *http.Request) {
	var req trialRequest
	if err := decode(w, r, &req); err != nil {
		reply(w, nil, err)
		return
	}
	_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
	t, err := n.beginTrial(r.Context(), req.SHA256, clipped(req.Actor))
	reply(w, t, err)
}
