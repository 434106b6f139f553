package faults

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"syscall"
	"testing"
	"time"

	"pgha/lab"
	"pgha/lab/testbed"
)

// trial is one fault, done once, with its clients and captures.
type trial struct {
	*cluster
	*testing.T
	seed     uint64
	history  *History
	leader   string // at first
	replica  string
	clients  []*Client
	captures map[string][]*Capture
	first    int64         // id of the trial
	injected time.Duration // when the fault began
	ended    time.Duration // when the clients were stopped
}

func (c *cluster) begin(t *testing.T, seed uint64) *trial {
	t.Helper()
	s, err := c.healthy(within(t, patience))
	if err != nil {
		t.Fatal(err)
	}
	r := &trial{cluster: c, T: t, seed: seed, history: NewHistory(), leader: s.Leader, replica: otherThan(s.Leader), captures: map[string][]*Capture{}}
	// Ids serve as values as well, and a register holds 0 at first.
	r.first = c.ids.Add(1)
	if _, err := c.sql(within(t, time.Minute), s.Leader, Schema(registers)...); err != nil {
		t.Fatal(err)
	}
	for _, h := range dataHosts {
		r.capture(h)
	}
	t.Cleanup(r.stopClients)
	for _, h := range dataHosts {
		for i := range 2 {
			r.client(fmt.Sprintf("client %d of %s", i+1, h), r.target(h, readWritePort, c.Lab.Dial))
		}
		for _, from := range []string{h, "witness"} {
			r.client(fmt.Sprintf("prober of %s from %s", h, from), r.target(h, postgresPort, c.Host(from).Dial))
		}
	}
	r.served(0)
	return r
}

func otherThan(data string) string {
	if data == dataHosts[0] {
		return dataHosts[1]
	}
	return dataHosts[0]
}

func (r *trial) target(host string, port uint16, dial func(context.Context, string, string) (net.Conn, error)) Target {
	r.Helper()
	target, err := r.cluster.target(host, port, dial)
	r.must(err)
	return target
}

func (r *trial) client(name string, target Target) {
	r.clients = append(r.clients, StartClient(name, target, r.history, &r.ids, r.seed+uint64(len(r.clients))))
}

func (r *trial) stopClients() {
	for _, c := range r.clients {
		c.Stop()
	}
	r.clients = nil
}

func (r *trial) capture(host string) {
	r.Helper()
	c, err := StartCapture(r.Host(host).InNetwork, postgresPort, r.history.At)
	r.must(err)
	r.captures[host] = append(r.captures[host], c)
	r.Cleanup(func() { _, _ = c.Stop() })
}

func (r *trial) must(err error) {
	r.Helper()
	if err != nil {
		r.Fatal(err)
	}
}

// until waits for a condition.
func (r *trial) until(what string, f func() error) {
	r.Helper()
	r.must(testbed.Until(within(r.T, patience), what, f))
}

// ack waits for a row that was sent after since, and that ok.
func (r *trial) ack(what string, since time.Duration, ok func(Op) bool) {
	r.Helper()
	r.until(what, func() error {
		last := ""
		for _, op := range slices.Backward(r.history.Ops()) {
			if op.Kind != Append || !op.Routed || op.Invoke < since {
				continue
			}
			if op.Outcome == Done && ok(op) {
				return nil
			}
			last = op.Server + op.Err
		}
		return fmt.Errorf("none yet; last: %s", last)
	})
}

// servedBy waits until a server takes a row that is sent from now on.
func (r *trial) servedBy(server string) {
	r.Helper()
	r.ack("a row taken by "+server, r.history.Now(), func(op Op) bool { return op.Server == server })
}

// served waits until each client has a row acknowledged that was sent after
// since, by way of each node.
func (r *trial) served(since time.Duration) {
	r.Helper()
	for _, c := range r.clients {
		if c.target.Routed {
			r.ack("a row of "+c.name, since, func(op Op) bool { return op.Client == c.name })
		}
	}
}

// lasts keeps a fault up until it is d old.
func (r *trial) lasts(d time.Duration) {
	timer := time.NewTimer(r.injected + d - r.history.Now())
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-r.Context().Done():
	}
}

func (r *trial) powerOff(host string) {
	r.Helper()
	r.must(r.PowerOff(host))
}

// powerOn boots a host and starts its daemon, watched from its first packet on.
func (r *trial) powerOn(host string) {
	r.Helper()
	r.must(r.Host(host).PowerOn(r.Context()))
	if slices.Contains(dataHosts, host) {
		r.capture(host)
	}
	r.must(r.Bed.Run(r.Context(), host))
}

// signal sends a signal to all processes of a host that match; there must be
// some.
func (r *trial) signal(host string, match func(lab.Proc) bool, sig syscall.Signal) {
	r.Helper()
	n, err := r.Host(host).SignalAll(match, sig)
	r.must(err)
	if n == 0 {
		r.Fatalf("no process of %s to send %v to", host, sig)
	}
	r.Logf("%v: sent to %d processes of %s", sig, n, host)
}

// result is what is reported of one trial.
type result struct {
	gap   time.Duration
	moved bool
}

// recordings are what a trial has left.
type recordings struct {
	primary string // in the end
	ops     []Op
	have    map[int64]bool // rows that the primary has in the end
	reigns  []Reign
	sent    map[string][]Packet // by host
}

// finish waits until the cluster is whole, ends the clients, and checks what
// holds whatever was done: that primaries follow each other, and that none
// answers after the next.
func (r *trial) finish() recordings {
	r.Helper()
	s, err := r.healthy(within(r.T, patience))
	r.must(err)
	r.served(r.history.Now())
	r.ended = r.history.Now()
	r.stopClients()
	rec := recordings{primary: s.Leader, ops: r.history.Ops(), sent: map[string][]Packet{}}
	rec.have, err = r.rows(within(r.T, time.Minute), s.Leader, r.first)
	r.must(err)
	if unwanted := Unwanted(rec.ops, rec.have); len(unwanted) > 0 {
		r.Errorf("%d refused rows are there: %v", len(unwanted), describe(rec.ops, unwanted))
	}
	rec.reigns, err = Reigns(rec.ops)
	if err != nil {
		r.Errorf("two primaries: %v", err)
	}
	for host, captures := range r.captures {
		for _, c := range captures {
			packets, err := c.Stop()
			r.must(err)
			rec.sent[host] = append(rec.sent[host], packets...)
		}
		slices.SortStableFunc(rec.sent[host], func(a, b Packet) int { return int(a.At - b.At) })
	}
	if err := Shut(rec.reigns, rec.sent); err != nil {
		r.Errorf("the gate was open for too long: %v", err)
	}
	return rec
}

// end finishes a trial of a synchronous cluster, in which nothing may be lost.
func (r *trial) end(expect expectation, bound time.Duration) result {
	r.Helper()
	rec := r.finish()
	ops, reigns, sent := rec.ops, rec.reigns, rec.sent
	if lost := Lost(ops, rec.have); len(lost) > 0 {
		r.Errorf("%d acknowledged rows are lost: %v", len(lost), describe(ops, lost))
	}
	if err := Linearizable(ops, time.Minute); err != nil {
		r.Error(err)
	}
	res := result{moved: slices.ContainsFunc(reigns, func(g Reign) bool { return g.Server != reigns[0].Server })}
	if expect == stays && res.moved || expect == moves && !res.moved {
		r.Errorf("the primary was %s at first; reigns: %v; want: %s", r.leader, describeReigns(reigns), expect)
	}
	var at time.Duration
	res.gap, at = Gap(ops, r.injected, r.ended)
	if res.gap > bound {
		r.Errorf("no row was acknowledged for %s, more than %s", res.gap.Round(time.Millisecond), bound)
	}
	r.Logf("%d operations; %s; longest gap %s, %s after the fault began; packets seen: n1 %d, n2 %d", len(ops), describeReigns(reigns),
		res.gap.Round(time.Millisecond), (at - r.injected).Round(time.Millisecond), len(sent["n1"]), len(sent["n2"]))
	r.dump(ops, sent)
	return res
}

func describeReigns(reigns []Reign) string {
	out := ""
	for i, g := range reigns {
		if i > 0 {
			out += fmt.Sprintf(", %s later ", (g.FirstAck - reigns[i-1].LastCall).Round(time.Millisecond))
		}
		out += fmt.Sprintf("%s on timeline %d", g.Server, g.Timeline)
	}
	return out
}

// describe tells of the first few rows.
func describe(ops []Op, ids []int64) []string {
	var out []string
	for _, op := range ops {
		if op.Kind == Append && slices.Contains(ids, op.ID) && len(out) < 5 {
			out = append(out, fmt.Sprintf("%d by %s at %s–%s: %s %s on timeline %d %s", op.ID, op.Client, op.Invoke, op.Return, op.Outcome, op.Server, op.Timeline, op.Err))
		}
	}
	return out
}

// dump writes a failed trial's recordings beside the hosts' logs, if these are
// kept.
func (r *trial) dump(ops []Op, sent map[string][]Packet) {
	if os.Getenv("PGHA_FAULTS_KEEP") == "" || !r.Failed() {
		return
	}
	f, err := os.Create(r.dir + "/history-" + fmt.Sprint(r.first))
	r.must(err)
	fmt.Fprintf(f, "began %s, fault at %s\n", r.history.begin.Format(time.RFC3339Nano), r.injected)
	for _, op := range ops {
		fmt.Fprintf(f, "%s %+v\n", r.history.begin.Add(op.Return).Format("15:04:05.000000"), op)
	}
	for host, packets := range sent {
		for _, p := range packets {
			fmt.Fprintf(f, "%s %s %+v\n", r.history.begin.Add(p.At).Format("15:04:05.000000"), host, p)
		}
	}
	r.must(errors.Join(f.Close()))
	r.Logf("recordings: %s; fault at %s", f.Name(), r.history.begin.Add(r.injected).Format("15:04:05.000"))
}
