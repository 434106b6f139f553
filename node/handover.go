package node

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/gate"
	"pgha/patroni"
)

// How PostgreSQL's leadership is handed over from a primary that runs to a
// replica. Everything that does so on purpose goes through handOver.

const (
	// handOverPoll is the pause between two looks at how far it is.
	handOverPoll = 50 * time.Millisecond
	// checkpointTimeout bounds the checkpoint before the primary is stopped. The
	// stop makes another one, which is then short.
	checkpointTimeout = 2 * time.Minute

	pathCheckpoint = "/v1/checkpoint"
)

// steps hears what is done to the cluster, as it happens. An [Operation] is one.
type steps interface {
	Say(format string, args ...any)
	Leaves(format string, args ...any)
}

// sayer is a steps for those who only want the steps.
type sayer struct {
	say  func(string, ...any)
	left string
}

// Say implements steps.
func (s *sayer) Say(format string, args ...any) { s.say(format, args...) }

// Leaves implements steps.
func (s *sayer) Leaves(format string, args ...any) { s.left = fmt.Sprintf(format, args...) }

// logSteps is for what nobody watches.
func (n *Node) logSteps(what string) steps {
	return &sayer{say: func(format string, args ...any) { n.log.Info(what, "step", fmt.Sprintf(format, args...)) }}
}

// handOver moves PostgreSQL's leadership to the replica called target, or with ""
// to the best one, and tells each step with say. It works on any data node and
// returns when the new primary takes writes and the old one is back as its
// replica, in sync where commits wait for it. A refusal is a [cluster.Error], and
// nothing has been changed; any other error says what state is left.
func (n *Node) handOver(ctx context.Context, say func(string, ...any), target string) error {
	s := &sayer{say: say}
	_, err := n.moveLeadership(ctx, s, target, true)
	if err != nil && s.left != "" {
		err = fmt.Errorf("%w; %s", err, s.left)
	}
	return err
}

// handOverMember is a member as decideHandOver looks at it.
type handOverMember struct {
	MemberStatus
	streaming bool // the primary sees it stream
}

// handOverObservation is what decideHandOver looks at.
type handOverObservation struct {
	leader   string // the gate's owner, with the gate open and Patroni's leader key; "" = there is none
	paused   bool
	underWay string // what an earlier request to Patroni asks for; "" = there is none
	async    bool
	maxLag   uint64 // bytes that a replica may lack when replication is asynchronous
	members  []handOverMember
}

func (o handOverObservation) member(name string) (handOverMember, bool) {
	i := slices.IndexFunc(o.members, func(m handOverMember) bool { return m.Name == name })
	if i < 0 {
		return handOverMember{}, false
	}
	return o.members[i], true
}

// decideHandOver names the replica that the leadership can go to: target, or with
// "" the best one. The refusal says what is wrong and what to do.
func decideHandOver(o handOverObservation, target string) (string, error) {
	m, known := o.member(target)
	switch {
	case target != "" && !known:
		return "", unknownNode(target, namesOf(o.members))
	case target != "" && m.Role == cluster.RoleWitness:
		return "", refused(cluster.CodeBadRequest, "%s is a witness and has no PostgreSQL: name a data node", target)
	case o.leader == "":
		return "", refused(cluster.CodeConflict, "there is no primary that could hand over: see pgha status; if no replica takes over by itself: pgha failover")
	case target == o.leader:
		return "", refused(cluster.CodeConflict, "%s is the primary already", target)
	case o.paused:
		return "", refused(cluster.CodeConflict, "automatic failover is paused, and nobody is promoted meanwhile: pgha resume, then repeat")
	case o.underWay != "":
		return "", refused(cluster.CodeConflict, "Patroni has been asked for %s already: wait until it is over", o.underWay)
	case target != "":
		if why := o.unfit(m); why != "" {
			return "", refused(cluster.CodeConflict, "%s cannot take over: %s", target, why)
		}
		return target, nil
	}
	var fit []handOverMember
	var reasons []string
	for _, m := range o.members {
		if m.Role != cluster.RoleData || m.Name == o.leader {
			continue
		}
		if why := o.unfit(m); why != "" {
			reasons = append(reasons, m.Name+": "+why)
			continue
		}
		fit = append(fit, m)
	}
	if len(fit) == 0 {
		if len(reasons) == 0 {
			reasons = []string{"there is no replica"}
		}
		return "", refused(cluster.CodeConflict, "nobody can take over from %s: %s", o.leader, strings.Join(reasons, "; "))
	}
	best := slices.MinFunc(fit, func(a, b handOverMember) int {
		return cmp.Or(-compareBool(a.Sync, b.Sync), cmp.Compare(a.LagBytes, b.LagBytes), cmp.Compare(a.Name, b.Name))
	})
	return best.Name, nil
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// unfit says why a member cannot take over from the primary, or "".
func (o handOverObservation) unfit(m handOverMember) string {
	leader, _ := o.member(o.leader)
	switch {
	case !m.Reachable:
		return "its pgha does not answer"
	case m.Maintenance != nil:
		return "it is in maintenance (pgha maintenance leave " + m.Name + ")"
	case m.Postgres != pgReplica:
		return "it is not a running replica" + paren(m.State)
	case m.NoFailover:
		return "it is tagged nofailover"
	case !m.streaming:
		return "it does not stream from " + o.leader
	case m.Timeline != 0 && leader.Timeline != 0 && m.Timeline != leader.Timeline:
		return fmt.Sprintf("it is on timeline %d, and %s on %d", m.Timeline, o.leader, leader.Timeline)
	case !o.async && !m.Sync:
		return fmt.Sprintf("it is not in sync yet (lag %s), and could lack acknowledged commits", lagText(m.LagBytes))
	case o.async && (m.LagBytes < 0 || uint64(m.LagBytes) > o.maxLag):
		return fmt.Sprintf("it lags too far behind (%s, and %s are allowed)", lagText(m.LagBytes), FormatBytes(o.maxLag))
	}
	return ""
}

func refused(code cluster.Code, format string, args ...any) error {
	return &cluster.Error{Code: code, Message: fmt.Sprintf(format, args...)}
}

func unknownNode(name string, known []string) error {
	return refused(cluster.CodeBadRequest, "there is no node %q: the cluster has %s", name, strings.Join(known, ", "))
}

func namesOf(members []handOverMember) []string {
	var out []string
	for _, m := range members {
		out = append(out, m.Name)
	}
	return out
}

// observeHandOver looks at everything that a hand-over depends on.
func (n *Node) observeHandOver(ctx context.Context) (handOverObservation, leadership, error) {
	l, err := n.readLeadership(ctx)
	if err != nil {
		return handOverObservation{}, l, err
	}
	o := handOverObservation{leader: l.serving(), paused: l.View.Paused, async: !l.View.Synchronous(), maxLag: l.View.MaxLag()}
	o.underWay = l.Request.pending(o.leader)
	streaming := map[string]bool{}
	if o.leader != "" {
		m, err := n.memberNamed(o.leader)
		if err != nil {
			return o, l, err
		}
		st, err := n.primaryStatus(ctx, m)
		if err != nil {
			return o, l, refused(cluster.CodeUnavailable, "the primary %s does not answer (%v): if it is lost and no replica takes over by itself: pgha failover", o.leader, err)
		}
		for _, r := range st.Replication {
			streaming[r.ApplicationName] = streaming[r.ApplicationName] || r.State == "streaming"
		}
	}
	for _, m := range n.status(ctx).Members {
		m.Sync = slices.Contains(l.View.Sync.Standbys, m.Name)
		o.members = append(o.members, handOverMember{MemberStatus: m, streaming: streaming[m.Name]})
	}
	return o, l, nil
}

func (n *Node) primaryStatus(ctx context.Context, m cluster.Member) (patroni.NodeStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	return n.patroniOf(m).Status(ctx)
}

// HandOverResult is what a hand-over has done.
type HandOverResult struct {
	From  string `json:"from"`
	To    string `json:"to"`
	Epoch uint64 `json:"epoch"`
	// Paused is for about how long nobody took writes, in nanoseconds.
	Paused time.Duration `json:"paused"`
}

// handing is a hand-over on its way.
type handing struct {
	n     *Node
	tell  steps
	r     HandOverResult
	asked chan error // Patroni's answer
	async bool

	answer error // a bad one
	shut   bool  // the old primary's gate has been seen shut
	owned  bool  // the new one has been seen to own it
	seen   time.Time
}

// moveLeadership is handOver for an operation. With follow it waits for the old
// primary to be back.
func (n *Node) moveLeadership(ctx context.Context, tell steps, target string, follow bool) (HandOverResult, error) {
	o, l, err := n.observeHandOver(ctx)
	if err != nil {
		return HandOverResult{}, err
	}
	to, err := decideHandOver(o, target)
	if err != nil {
		return HandOverResult{}, err
	}
	h := &handing{n: n, tell: tell, async: o.async, asked: make(chan error, 1), r: HandOverResult{From: o.leader, Epoch: l.Record.Epoch}}
	m, _ := o.member(to)
	tell.Say("handing over from %s to %s (lag %s)", o.leader, to, lagText(m.LagBytes))
	old, err := n.memberNamed(o.leader)
	if err != nil {
		return h.r, err
	}
	tell.Say("checkpoint on %s, so that it stops quickly", o.leader)
	if err := n.checkpointOn(ctx, old); err != nil {
		if ctx.Err() != nil {
			return h.r, err
		}
		tell.Say("without it: %v", err)
	}
	tell.Say("asking Patroni")
	tell.Leaves("Patroni was asked to hand over from %s to %s and may still do so: pgha status shows who is the primary", o.leader, to)
	go func() { h.asked <- n.patroniOf(old).Switchover(ctx, o.leader, to) }()
	if err := h.waitOpen(ctx, to); err != nil {
		return h.r, err
	}
	h.r.To = to
	if err := h.waitWritable(ctx); err != nil {
		return h.r, err
	}
	if !follow {
		return h.r, nil
	}
	return h.r, h.waitFollows(ctx)
}

// waitOpen waits until the gate's record says that the new owner's is open.
func (h *handing) waitOpen(ctx context.Context, to string) error {
	last := "Patroni has not begun"
	h.seen = time.Now()
	for {
		l, err := h.n.readLeadership(ctx)
		if err == nil {
			var done bool
			last = fmt.Sprintf("the gate's record names %s, %s", l.Record.Owner, l.Record.State)
			done, err = h.look(l, to)
			if done || err != nil {
				return err
			}
		} else if ctx.Err() == nil {
			last = err.Error() // etcd may elect a leader of its own just now
		}
		if !sleep(ctx, handOverPoll) {
			return fmt.Errorf("hand over to %s: %w; last seen: %s", to, context.Cause(ctx), last)
		}
	}
}

// look says whether it is done, and tells of what is new.
func (h *handing) look(l leadership, to string) (done bool, err error) {
	from, rec := h.r.From, l.Record
	select {
	case h.answer = <-h.asked:
	default:
	}
	switch {
	case rec.Owner == from && rec.State != gate.Shut && h.shut:
		h.tell.Leaves("%s is the primary again, and no acknowledged write is lost", from)
		return false, fmt.Errorf("%s did not take over from %s: pgha logs patroni on %s says why", to, from, to)
	case rec.Owner == from && rec.State != gate.Shut:
		h.seen = time.Now()
		if h.answer != nil && l.Request.pending(from) == "" {
			h.tell.Leaves("") // it has not begun
			return false, notSwitched(h.answer, from, to)
		}
	case rec.Owner == from && !h.shut:
		h.shut = true
		h.tell.Say("%s has stopped and shut its gate", from)
		h.tell.Leaves("%s has stopped for %s to take over, which goes on by itself: pgha status shows who is the primary", from, to)
	case rec.Owner == from: // still nobody
	case rec.Owner != to:
		h.tell.Leaves("%s is the primary, or about to be: see pgha status", rec.Owner)
		return false, fmt.Errorf("%s has taken over instead of %s", rec.Owner, to)
	default:
		if !h.owned {
			h.owned, h.shut = true, true
			h.r.Epoch = rec.Epoch
			h.tell.Say("%s owns the gate (epoch %d) and is promoted", to, rec.Epoch)
			h.tell.Leaves("%s is being promoted and goes on by itself: pgha status", to)
		}
		if rec.State == gate.Open {
			h.r.Paused = time.Since(h.seen).Round(10 * time.Millisecond)
			return true, nil
		}
	}
	return false, nil
}

// notSwitched makes one sentence of what Patroni says.
func notSwitched(err error, from, to string) error {
	var status *patroni.StatusError
	if errors.As(err, &status) {
		return refused(cluster.CodeConflict, "Patroni does not hand over from %s to %s: %s", from, to, status.Message)
	}
	return refused(cluster.CodeUnavailable, "the Patroni of %s could not be asked to hand over: %v", from, err)
}

// waitWritable waits until the new primary's kernel passes clients to a
// PostgreSQL that takes writes.
func (h *handing) waitWritable(ctx context.Context) error {
	m, err := h.n.memberNamed(h.r.To)
	if err != nil {
		return err
	}
	for {
		r, err := h.n.reportOf(ctx, m)
		if err == nil && r.takesWrites() {
			h.tell.Say("%s takes writes; for about %s nobody did", h.r.To, h.r.Paused)
			h.tell.Leaves("%s is the primary; %s is still coming back as its replica, by itself", h.r.To, h.r.From)
			return nil
		}
		if !sleep(ctx, handOverPoll) {
			return fmt.Errorf("wait until %s takes writes: %w", h.r.To, context.Cause(ctx))
		}
	}
}

// waitFollows waits until the old primary follows the new one.
func (h *handing) waitFollows(ctx context.Context) error {
	h.tell.Say("waiting for %s to follow as a replica", h.r.From)
	m, err := h.n.memberNamed(h.r.To)
	if err != nil {
		return err
	}
	wake := h.n.waker()
	last := "it does not stream yet"
	for streamed := 0; ; {
		st, err := h.n.primaryStatus(ctx, m)
		l, lerr := h.n.readLeadership(ctx)
		i := slices.IndexFunc(st.Replication, func(r patroni.ReplicaStatus) bool {
			return r.ApplicationName == h.r.From && r.State == "streaming"
		})
		old, _ := l.View.Member(h.r.From)
		switch {
		case err != nil || lerr != nil:
			last = errors.Join(err, lerr).Error()
		case l.Record.Owner != h.r.To:
			h.tell.Leaves("%s is the primary, or about to be: see pgha status", l.Record.Owner)
			return fmt.Errorf("%s has lost the leadership again, to %s", h.r.To, l.Record.Owner)
		case i < 0:
			streamed = 0
		case l.Request != request{}:
			last = "Patroni has not cleared the request away yet"
		case streamed < 5:
			// A round of the primary's Patroni that began before it streamed may still
			// take it out of those in sync.
			streamed++
		case h.async || old.Tags["nosync"] == true || len(l.View.Sync.Standbys) > 0: // of several replicas one confirms
			h.tell.Say("%s follows as a replica", h.r.From)
			h.tell.Leaves("%s is the primary, and %s its replica", h.r.To, h.r.From)
			return nil
		default:
			last = "it streams, and is not in sync yet"
		}
		// It makes the old primary's slot, and waits for the one in sync, in its next
		// round.
		wake(ctx, h.r.To)
		if !sleep(ctx, 4*handOverPoll) {
			return fmt.Errorf("wait until %s follows: %w; %s", h.r.From, context.Cause(ctx), last)
		}
	}
}
