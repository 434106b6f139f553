package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/pki"
)

// Steps of a replacement of the CA, as an operator asks for them.
const (
	RotateCAStart  = "start"  // make a new CA that is trusted beside the present one
	RotateCASign   = "sign"   // reissue every certificate by the new one
	RotateCAFinish = "finish" // trust the new one alone
	RotateCABack   = "back"   // undo the last of these that can be undone
)

// RotateCARequest asks for a step.
type RotateCARequest struct {
	Step string `json:"step"`
	// FormerDestroyed is the operator's word that the machines of past generations
	// which have not joined again cannot come back as they were.
	FormerDestroyed bool `json:"former_destroyed,omitempty"`
}

// RotateCAResult is the state after a step.
type RotateCAResult struct {
	Phase   cluster.CAPhase `json:"phase"`
	Trusted []CAReport      `json:"trusted_cas"` // the one that signs first
	Next    string          `json:"next,omitempty"`
}

// caPlan is what a request means in the present phase.
type caPlan int

const (
	caRefuse caPlan = iota
	caAwait         // it was begun before: wait until all have followed
	caStart
	caSign
	caBack
	caDrop
)

// rotationFacts is what the decision about a request goes by.
type rotationFacts struct {
	phase   cluster.CAPhase
	signed  bool     // the next CA has signed, now or before it was taken back
	behind  []string // members that have not confirmed the present state
	joining []string // members that are just joining
	former  []string // of past generations, that may come back as they were
}

// decideRotation says what a request does, or why it is refused.
func decideRotation(f rotationFacts, step string) (caPlan, string) {
	phase, behind, joining := f.phase, f.behind, f.joining
	if len(joining) > 0 && step != RotateCABack {
		return caRefuse, fmt.Sprintf("%s is just joining: wait until it is a member, or take it out, and repeat", strings.Join(joining, " and "))
	}
	waits := fmt.Sprintf("not every member has confirmed the step before (%s): bring it up, run pgha rotate ca%s again, and then this", strings.Join(behind, ", "), flagOf(phase))
	switch step {
	case RotateCAStart:
		switch {
		case phase == cluster.CATrust:
			return caAwait, ""
		case phase == cluster.CASign:
			return caRefuse, "a replacement of the CA is under way, and the new one signs already: end it with pgha rotate ca --finish, or go back with --back"
		case len(behind) > 0:
			return caRefuse, fmt.Sprintf("not every member has confirmed the end of the last replacement (%s): bring it up, run pgha rotate ca --finish again, and then this", strings.Join(behind, ", "))
		}
		return caStart, ""
	case RotateCASign:
		switch {
		case phase == cluster.CASign:
			return caAwait, ""
		case phase == cluster.CADone:
			return caRefuse, "no replacement of the CA is under way: begin one with pgha rotate ca"
		case len(behind) > 0:
			return caRefuse, waits
		}
		return caSign, ""
	case RotateCAFinish:
		switch {
		case phase == cluster.CADone && len(behind) > 0:
			return caAwait, ""
		case phase == cluster.CADone:
			return caRefuse, "no replacement of the CA is under way: begin one with pgha rotate ca"
		case phase == cluster.CATrust:
			return caRefuse, "the new CA does not sign yet: give clients the file of both (pgha cert ca), then run pgha rotate ca --sign"
		case len(behind) > 0:
			return caRefuse, waits
		case len(f.former) > 0:
			return caRefuse, formerBack(f.former, step)
		}
		return caDrop, ""
	case RotateCABack:
		switch {
		case phase == cluster.CASign:
			return caBack, ""
		case phase == cluster.CATrust && !f.signed:
			return caDrop, "" // nobody has a certificate of the next
		case phase == cluster.CATrust && len(joining) > 0:
			return caRefuse, fmt.Sprintf("%s is just joining, maybe by the CA that would be trusted no more: wait until it is a member, or take it out, and repeat", strings.Join(joining, " and "))
		case phase == cluster.CATrust && len(behind) > 0:
			return caAwait, "" // they may have certificates of the next
		case phase == cluster.CATrust && len(f.former) > 0:
			return caRefuse, formerBack(f.former, step)
		case phase == cluster.CATrust:
			return caDrop, ""
		}
		return caRefuse, "there is nothing to go back from: one CA is trusted, and it signs"
	}
	return caRefuse, fmt.Sprintf("%q is no step: use %s, %s, %s or %s", step, RotateCAStart, RotateCASign, RotateCAFinish, RotateCABack)
}

// formerBack says why a CA cannot be dropped while nodes of a past generation
// have certificates of it: nobody could tell them that they were replaced, and
// enough of them would serve as the cluster that they were.
func formerBack(former []string, step string) string {
	return fmt.Sprintf("%s, of a generation that was replaced, could come back with certificates of the CA that is to be dropped, would be refused before it hears that it was replaced, and could serve on: destroy each such machine, or run pgha reset on it, and then give pgha rotate ca%s --former-destroyed",
		strings.Join(former, " and "), caFlags[step])
}

// flagOf is how the present phase is asked for again.
func flagOf(p cluster.CAPhase) string {
	switch p {
	case cluster.CASign:
		return " --sign"
	case cluster.CADone:
		return " --finish"
	}
	return ""
}

// caFlags says how a step is asked for.
var caFlags = map[string]string{RotateCAStart: "", RotateCASign: " --sign", RotateCAFinish: " --finish", RotateCABack: " --back"}

// rotateCA is the operation behind pgha rotate ca. Its steps stand in etcd, and
// every node follows by itself: the operation only takes them, and waits.
func (n *Node) rotateCA(ctx context.Context, o *Operation, body json.RawMessage) (any, error) {
	var req RotateCARequest
	if err := decodeRequest(body, &req); err != nil {
		return nil, err
	}
	state, err := n.stepCA(ctx, o, req)
	if err != nil {
		return nil, err
	}
	again := "pgha rotate ca" + caFlags[req.Step]
	if req.Step == RotateCABack { // there is nothing more to step back
		again = "pgha rotate ca" + flagOf(state.Phase)
	}
	o.Leaves("%s; every node follows by itself as soon as it can, and %s goes on waiting for that", caInWords(state), again)
	n.wake()
	what := map[cluster.CAPhase]string{
		cluster.CATrust: "it trusts both CAs, in every part",
		cluster.CASign:  "its certificates are of the new CA, in every part",
		cluster.CADone:  "it trusts one CA alone, in every part",
	}[state.Phase]
	_, err = n.awaitTaken(ctx, o, what, func(cluster.Member) bool { return true },
		func(t cluster.Taken) bool { return t.CA >= state.Step }, false)
	var late *notTaken
	if errors.As(err, &late) {
		return nil, late.refusal(ctx, "this step is not done until every member has confirmed it; "+again+" goes on waiting, and a node that is gone for good is taken out with pgha member remove")
	}
	if err != nil {
		return nil, err
	}
	r := RotateCAResult{Phase: state.Phase, Next: caNext(state.Phase)}
	cas, err := pki.TrustedCAs(state.Trust())
	if err != nil {
		return nil, err
	}
	for _, ca := range cas {
		r.Trusted = append(r.Trusted, CAReport{Fingerprint: ca.Fingerprint, NotAfter: ca.NotAfter})
	}
	o.Say("every member has confirmed: %s", caInWords(state))
	if r.Next != "" {
		o.Say("next: %s", r.Next)
	}
	return r, nil
}

// caNext is what an operator does after a phase; "" for nothing.
func caNext(p cluster.CAPhase) string {
	switch p {
	case cluster.CATrust:
		return "give every client that checks the server the file that pgha cert ca prints now (it holds both), then run pgha rotate ca --sign"
	case cluster.CASign:
		return "when all clients have got on with the new certificates, run pgha rotate ca --finish; until then pgha rotate ca --back undoes the change"
	}
	return ""
}

// caInWords describes a state.
func caInWords(s *cluster.CAState) string {
	prints := []string{}
	for _, c := range s.Certs {
		f, _ := pki.Fingerprint(c) // it was parsed
		prints = append(prints, f)
	}
	if len(prints) == 1 {
		return "the CA " + prints[0] + " signs and is trusted alone"
	}
	return fmt.Sprintf("the CA %s signs, and %s is trusted beside it", prints[0], prints[1])
}

// mayComeBack names the members of past generations, but those that have joined
// again in their own place. It reads them with a quorum: after a start this node
// does not have them from its disk.
func (n *Node) mayComeBack(ctx context.Context, store *cluster.Store, members []cluster.Member) ([]string, error) {
	c, err := n.etcdClient()
	if err != nil {
		return nil, err
	}
	r, err := c.Get(ctx, store.Prefix()+keyGeneration)
	if err != nil {
		return nil, fmt.Errorf("read generation: %w", err)
	}
	if len(r.Kvs) == 0 {
		return nil, nil // it was never begun anew
	}
	var g Generation
	if err := json.Unmarshal(r.Kvs[0].Value, &g); err != nil {
		return nil, fmt.Errorf("decode generation: %w", err)
	}
	return absent(g.Former, members), nil
}

// absent names those of former that are not members at the same address.
func absent(former, members []cluster.Member) (out []string) {
	for _, f := range former {
		if !slices.ContainsFunc(members, func(m cluster.Member) bool { return m.Name == f.Name && m.Addr == f.Addr }) {
			out = append(out, fmt.Sprintf("%s (%s)", f.Name, f.Addr))
		}
	}
	return out
}

// stepCA writes the next state, if the request means one, and returns the state
// that the members are to follow.
func (n *Node) stepCA(ctx context.Context, o *Operation, req RotateCARequest) (*cluster.CAState, error) {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	store := n.store.Load()
	if store == nil {
		return nil, n.notReady()
	}
	last, err := n.caStep()
	if err != nil {
		return nil, err
	}
	state, rev, err := store.CAState(ctx, n.sealing)
	// After etcd was put back from a snapshot the nodes' files are what is right.
	lost := err == nil && state != nil && state.Step < last
	if err == nil && (state == nil || lost) {
		state, err = n.ownCAState(last)
	}
	if err != nil {
		return nil, err
	}
	members, _, err := store.Members(ctx)
	if err != nil {
		return nil, err
	}
	taken, err := store.TakenBy(ctx)
	if err != nil {
		return nil, err
	}
	var behind, joining []string
	for _, m := range members {
		if m.State == cluster.StateJoining {
			joining = append(joining, m.Name)
		}
		if taken[m.Name].CA < state.Step && !lost {
			behind = append(behind, m.Name)
		}
	}
	facts := rotationFacts{phase: state.Phase, signed: state.Signed, behind: behind, joining: joining}
	if !req.FormerDestroyed {
		if facts.former, err = n.mayComeBack(ctx, store, members); err != nil {
			return nil, err
		}
	}
	plan, why := decideRotation(facts, req.Step)
	if plan == caRefuse {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: why}
	}
	if plan == caAwait {
		o.Say("goes on: %s", caInWords(state))
		return state, nil
	}
	next, err := n.nextCAState(*state, plan)
	if err != nil {
		return nil, err
	}
	next.By, next.At = o.Actor(), time.Now()
	if err := store.PutCAState(ctx, *n.sealing, next, rev); err != nil {
		return nil, err
	}
	o.Say("%s", caInWords(&next))
	n.event(EventSecrets, "", o.Actor(), "the CA: %s", caInWords(&next))
	if plan == caSign || plan == caBack {
		return &next, n.revokeForCA(ctx, o, store)
	}
	return &next, nil
}

// revokeForCA revokes the join tokens, which name the CA that signed before.
func (n *Node) revokeForCA(ctx context.Context, o *Operation, store *cluster.Store) error {
	ids, err := store.RevokeTokens(ctx)
	if len(ids) > 0 {
		o.Say("join tokens %s are revoked: they name the other CA; make new ones when every member has confirmed", strings.Join(ids, ", "))
	}
	return err
}

// ownCAState is the state that this node's files are in: of a cluster that has
// the CA that init has made, or that has lost what etcd knew.
func (n *Node) ownCAState(step int64) (*cluster.CAState, error) {
	trust, err := n.pki.Trust()
	if err != nil {
		return nil, err
	}
	certs, err := pki.Trusted(trust)
	if err != nil {
		return nil, err
	}
	if len(certs) > 1 {
		return nil, &cluster.Error{Code: cluster.CodeConflict, Message: "etcd was put back to before the replacement of the CA that these nodes are in the middle of: put back a snapshot of etcd from later (pgha snapshot list)"}
	}
	key, err := os.ReadFile(n.paths.sealedCAKey())
	if err != nil {
		return nil, fmt.Errorf("read CA key: %w", err)
	}
	return &cluster.CAState{Step: step, Phase: cluster.CADone, Certs: certs, Keys: [][]byte{key}}, nil
}

func (n *Node) nextCAState(s cluster.CAState, plan caPlan) (cluster.CAState, error) {
	switch plan {
	case caSign:
		return s.Sign()
	case caBack:
		return s.Back()
	case caDrop:
		return s.Drop()
	}
	ca, err := pki.NewCA(n.state.ClusterID, n.state.ClusterName, time.Now())
	if err != nil {
		return s, err
	}
	key, err := ca.KeyPEM()
	if err != nil {
		return s, err
	}
	sealed, err := cluster.SealCAKey(*n.sealing, n.state.ClusterID, key)
	if err != nil {
		return s, err
	}
	return s.Start(ca.CertPEM(), sealed)
}

// caToDo reminds of a replacement of the CA that has not ended.
func caToDo(w world) []string {
	if w.CA == nil {
		return nil
	}
	var behind []string
	for _, m := range w.Members {
		if w.Taken[m.Name].CA < w.CA.Step {
			behind = append(behind, m.Name)
		}
	}
	slices.Sort(behind)
	since := w.CA.At.Local().Format(time.DateTime)
	switch {
	case len(behind) > 0:
		return []string{fmt.Sprintf("the CA is being replaced since %s, and %s has not followed yet: it does so by itself when it can (pgha rotate ca%s waits for it)", since, strings.Join(behind, " and "), flagOf(w.CA.Phase))}
	case w.CA.Phase != cluster.CADone:
		return []string{fmt.Sprintf("the CA is being replaced (%s since %s): %s", caInWords(w.CA), since, caNext(w.CA.Phase))}
	}
	return nil
}
