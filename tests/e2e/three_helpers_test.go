package e2e

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"

	"pgha/lab/testbed"
	"pgha/node"
)

// trioWait bounds a wait for something that takes seconds on a machine that
// has nothing else to do.
const trioWait = 4 * time.Minute

var trioHosts = []string{"n1", "n2", "witness"}

// trio is the cluster of TestThree, and what was written to it so far.
type trio struct {
	*testbed.Bed
	founded   testbed.InitResult
	nextID    int64
	writers   []*testbed.Writer
	recorders []*recorder
	writes    []testbed.Write // of those that have ended
}

// idsEach is how many ids a writer or recorder has for its own.
const idsEach = int64(1) << 32

func (c *trio) ids() int64 {
	c.nextID += idsEach
	return c.nextID
}

// healthy waits until every node says that any one node may be lost, and that
// n1's view is the others' too.
func (c *trio) healthy(t *testing.T) node.Status {
	t.Helper()
	var first node.Status
	for i, h := range trioHosts {
		s, err := c.WaitHealthy(within(t, trioWait), h)
		if err != nil {
			t.Fatalf("the cluster is not healthy, asked %s: %v", h, err)
		}
		if i == 0 {
			first = s
		}
		if s.Leader != first.Leader {
			t.Fatalf("%s says the primary is %s, %s says %s", h, s.Leader, trioHosts[0], first.Leader)
		}
	}
	return first
}

// await asks host until ok accepts the status.
func (c *trio) await(t *testing.T, host, what string, ok func(node.Status) bool) node.Status {
	t.Helper()
	s, err := c.WaitStatus(within(t, trioWait), host, what, ok)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// trioMember returns a member's entry.
func trioMember(t *testing.T, s node.Status, name string) node.MemberStatus {
	t.Helper()
	i := slices.IndexFunc(s.Members, func(m node.MemberStatus) bool { return m.Name == name })
	if i < 0 {
		t.Fatalf("status knows no member %s: %s", name, testbed.Members(s))
	}
	return s.Members[i]
}

// replicaOf names the data node that is not the primary.
func replicaOf(s node.Status) string {
	if s.Leader == "n1" {
		return "n2"
	}
	return "n1"
}

// exitCode runs pgha status for people on host and returns its exit status.
func (c *trio) exitCode(t *testing.T, host string) (code int, text string) {
	t.Helper()
	out, err := c.Host(host).Command(t.Context(), bin, "status").CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return exit.ExitCode(), string(out)
	case err != nil:
		t.Fatalf("run pgha status on %s: %v", host, err)
	}
	return 0, string(out)
}

// writer starts an application that writes through the hosts' HAProxies, and
// waits for its first commit.
func (c *trio) writer(t *testing.T, hosts ...string) *testbed.Writer {
	t.Helper()
	w, err := c.StartWriter(t.Context(), c.ids(), hosts...)
	if err != nil {
		t.Fatal(err)
	}
	c.writers = append(c.writers, w)
	t.Cleanup(func() { w.Stop() })
	c.goesOn(t, w)
	return w
}

// goesOn waits for a commit that is sent from now on.
func (c *trio) goesOn(t *testing.T, w *testbed.Writer) {
	t.Helper()
	if _, err := w.WaitAck(within(t, trioWait)); err != nil {
		t.Fatal(err)
	}
}

// unharmed fails if the writer has met any error.
func (c *trio) unharmed(t *testing.T, w *testbed.Writer) {
	t.Helper()
	c.goesOn(t, w)
	failed := testbed.Failed(w.Writes())
	for _, f := range failed[:min(3, len(failed))] {
		t.Errorf("a client saw an error, via %s at %s, after %s: %v", f.Via, f.Sent.Format(time.StampMilli), f.At.Sub(f.Sent), f.Err)
	}
	if len(failed) > 3 {
		t.Errorf("and %d errors more", len(failed)-3)
	}
}

// nothingLost ends all writers and recorders and checks that every commit that was ever
// acknowledged is there.
func (c *trio) nothingLost(t *testing.T) {
	t.Helper()
	for _, w := range c.writers {
		c.writes = append(c.writes, w.Stop()...)
	}
	for _, r := range c.recorders {
		r.stop()
		for _, k := range r.taken() {
			c.writes = append(c.writes, testbed.Write{ID: k.id, Via: k.host, Sent: k.sent, At: k.at})
		}
	}
	c.writers, c.recorders = nil, nil
	lost, err := c.Lost(within(t, trioWait), "n1", c.writes)
	if err != nil {
		t.Fatal(err)
	}
	if len(lost) > 0 {
		t.Errorf("%d of %d acknowledged commits are lost, the first is %d", len(lost), len(testbed.Acked(c.writes)), lost[0])
	}
}

// connect opens a session as the application, with a connection configuration
// that the caller may change.
func (c *trio) connect(t *testing.T, host string, port uint16, change func(*pgx.ConnConfig)) (*pgx.Conn, error) {
	t.Helper()
	pool, err := c.CA(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	cfg, err := testbed.AppConfig(c.Lab, pool, c.Addr(host), port)
	if err != nil {
		t.Fatal(err)
	}
	cfg.ConnectTimeout = time.Minute
	if change != nil {
		change(cfg)
	}
	conn, err := pgx.ConnectConfig(within(t, trioWait), cfg)
	if err == nil {
		t.Cleanup(func() { _ = conn.Close(context.Background()) }) // its host may be off by then
	}
	return conn, err
}

// report asks the daemon of host what it knows of itself.
func (c *trio) report(ctx context.Context, host string) (node.Report, error) {
	var r node.Report
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return c.Host(host).Dial(ctx, "unix", "/run/pgha/pgha.sock")
	}}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://pgha/v1/node", nil)
	if err != nil {
		return r, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return r, fmt.Errorf("ask pgha on %s: %w", host, err)
	}
	defer func() { _ = resp.Body.Close() }()
	if err := json.NewDecoder(resp.Body).Decode(&r); err != nil {
		return r, fmt.Errorf("ask pgha on %s: %w", host, err)
	}
	return r, nil
}

// child waits until the daemon of host says that its child runs and that ok.
func (c *trio) child(t *testing.T, host, name, what string, ok func(node.ChildReport) bool) node.ChildReport {
	t.Helper()
	var found node.ChildReport
	err := testbed.Until(within(t, trioWait), name+" on "+host+" "+what, func() error {
		r, err := c.report(t.Context(), host)
		if err != nil {
			return err
		}
		i := slices.IndexFunc(r.Children, func(k node.ChildReport) bool { return k.Name == name })
		if i < 0 {
			return fmt.Errorf("it has no child %s", name)
		}
		if found = r.Children[i]; found.State != "running" || !ok(found) {
			return fmt.Errorf("it is %+v", found)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// trioPIDs are the process ids, on its own host, of what runs on a data node.
type trioPIDs struct {
	Patroni, Postmaster, HAProxy int
	Workers                      []int // of HAProxy
}

func (c *trio) pids(t *testing.T, host string) trioPIDs {
	t.Helper()
	alive := func(node.ChildReport) bool { return true }
	p := trioPIDs{
		Patroni: c.child(t, host, "patroni", "to run", alive).PID,
		HAProxy: c.child(t, host, "haproxy", "to run", alive).PID,
	}
	files, err := filepath.Glob(c.Host(host).Path("/var/lib/pgha/postgres/*/data/postmaster.pid"))
	if err != nil || len(files) != 1 {
		t.Fatalf("find the postmaster's pid file on %s: %v, %v", host, files, err)
	}
	text, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	line, _, _ := strings.Cut(string(text), "\n")
	if p.Postmaster, err = strconv.Atoi(line); err != nil {
		t.Fatalf("read %s: %v", files[0], err)
	}
	procs, err := c.Host(host).Processes()
	if err != nil {
		t.Fatal(err)
	}
	master, postmaster := 0, false
	for _, k := range procs {
		if k.NSPID == p.HAProxy {
			master = k.PID
		}
		postmaster = postmaster || k.NSPID == p.Postmaster && k.Comm == "postgres"
	}
	for _, k := range procs {
		if k.PPID == master && k.Comm == "haproxy" {
			p.Workers = append(p.Workers, k.NSPID)
		}
	}
	if !postmaster || len(p.Workers) == 0 {
		t.Fatalf("on %s PostgreSQL or HAProxy does not run as its pid file says: %+v", host, p)
	}
	return p
}

// took is a row that a PostgreSQL took, and on which timeline.
type took struct {
	host     string
	timeline int
	id       int64
	sent, at time.Time
}

// recorder tries all the time to write to the PostgreSQL of each data node,
// past HAProxy and from the node's own host, where no cut link is in the way:
// what it was able to do is what somebody could have done.
type recorder struct {
	stop func() // waits for the end

	mu   sync.Mutex
	rows []took
}

// record starts a recorder. Its rows are among those that must not be lost.
func (c *trio) record(t *testing.T) *recorder {
	t.Helper()
	pool, err := c.CA(t.Context(), "n1")
	if err != nil {
		t.Fatal(err)
	}
	r := &recorder{}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	var wg sync.WaitGroup
	for _, name := range []string{"n1", "n2"} {
		cfg, err := testbed.AppConfig(c.Lab, pool, c.Addr(name), 5442)
		if err != nil {
			t.Fatal(err)
		}
		h := c.Host(name)
		cfg.DialFunc = func(ctx context.Context, network, addr string) (net.Conn, error) { return h.Dial(ctx, network, addr) }
		first := c.ids()
		wg.Go(func() { r.run(ctx, h.Name(), cfg, first) })
	}
	r.stop = func() {
		cancel()
		wg.Wait()
	}
	c.recorders = append(c.recorders, r)
	t.Cleanup(r.stop)
	return r
}

// run writes to one PostgreSQL until ctx ends.
func (r *recorder) run(ctx context.Context, host string, cfg *pgx.ConnConfig, id int64) {
	var conn *pgx.Conn
	for ; ctx.Err() == nil; id++ {
		k := took{host: host, id: id, sent: time.Now()}
		err := k.insert(ctx, &conn, cfg)
		k.at = time.Now()
		pause := 50 * time.Millisecond
		if err == nil {
			pause = 10 * time.Millisecond
			r.mu.Lock()
			r.rows = append(r.rows, k)
			r.mu.Unlock()
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	if conn != nil {
		_ = conn.Close(context.WithoutCancel(ctx)) // its server may be gone
	}
}

// insert writes the row, on a connection that is kept until it fails.
func (k *took) insert(ctx context.Context, conn **pgx.Conn, cfg *pgx.ConnConfig) (err error) {
	const insert = `INSERT INTO t (id) VALUES ($1) RETURNING ('x' || substr(pg_walfile_name(pg_current_wal_lsn()), 1, 8))::bit(32)::int`
	try, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	if *conn == nil {
		if *conn, err = pgx.ConnectConfig(try, cfg); err != nil {
			*conn = nil
			return err
		}
	}
	if err = (*conn).QueryRow(try, insert, k.id).Scan(&k.timeline); err != nil {
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 100*time.Millisecond)
		defer cancel()
		_ = (*conn).Close(end) // likewise
		*conn = nil
	}
	return err
}

func (r *recorder) taken() []took {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.rows)
}

// turn is a reign: one primary on one timeline.
type turn struct {
	host     string
	timeline int
}

// turns returns who was the primary, in order, or an error if two were at
// once: a timeline must have one primary alone, and nobody may take a row that
// was sent after a later timeline had begun to take rows.
func turns(all []took) ([]turn, error) {
	type span struct {
		turn
		first, last took // the first to be acknowledged, the last to be sent
	}
	spans := map[int]*span{}
	for _, k := range all {
		s := spans[k.timeline]
		switch {
		case s == nil:
			spans[k.timeline] = &span{turn{k.host, k.timeline}, k, k}
			continue
		case s.host != k.host:
			return nil, fmt.Errorf("both %s and %s took rows on timeline %d", s.host, k.host, k.timeline)
		}
		if k.at.Before(s.first.at) {
			s.first = k
		}
		if k.sent.After(s.last.sent) {
			s.last = k
		}
	}
	var order []turn
	var before *span
	for _, tl := range slices.Sorted(maps.Keys(spans)) {
		s := spans[tl]
		if before != nil && before.last.sent.After(s.first.at) {
			return nil, fmt.Errorf("%s took a row on timeline %d that was sent %s after %s had begun timeline %d",
				before.host, before.timeline, before.last.sent.Sub(s.first.at), s.host, s.timeline)
		}
		order = append(order, s.turn)
		before = s
	}
	return order, nil
}

func TestTurns(t *testing.T) {
	base := time.Now()
	row := func(host string, timeline, sent, at int) took {
		return took{host: host, timeline: timeline, sent: base.Add(time.Duration(sent) * time.Millisecond), at: base.Add(time.Duration(at) * time.Millisecond)}
	}
	for name, c := range map[string]struct {
		rows []took
		want []turn
		bad  string
	}{
		"one primary":           {rows: []took{row("n1", 1, 0, 1), row("n1", 1, 2, 3)}, want: []turn{{"n1", 1}}},
		"failover and back":     {rows: []took{row("n2", 2, 10, 12), row("n1", 1, 0, 1), row("n1", 3, 20, 22)}, want: []turn{{"n1", 1}, {"n2", 2}, {"n1", 3}}},
		"under way at the turn": {rows: []took{row("n1", 1, 5, 30), row("n2", 2, 6, 8)}, want: []turn{{"n1", 1}, {"n2", 2}}},
		"two primaries":         {rows: []took{row("n1", 1, 0, 1), row("n2", 2, 2, 4), row("n1", 1, 5, 6)}, bad: "sent 1ms after n2 had begun timeline 2"},
		"one timeline for both": {rows: []took{row("n1", 2, 0, 1), row("n2", 2, 5, 6)}, bad: "both n1 and n2"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := turns(c.rows)
			if c.bad == "" && err != nil || c.bad != "" && (err == nil || !strings.Contains(err.Error(), c.bad)) {
				t.Fatalf("error %v, want %q", err, c.bad)
			}
			if !slices.Equal(got, c.want) {
				t.Errorf("turns %v, want %v", got, c.want)
			}
		})
	}
}

// reigns waits until the primary of today has taken a row, ends the recorder
// and returns who was the primary; it fails the test if two were at once.
func (r *recorder) reigns(t *testing.T, today turn) []turn {
	t.Helper()
	err := testbed.Until(within(t, trioWait), fmt.Sprintf("a row of %s on timeline %d", today.host, today.timeline), func() error {
		rows := r.taken()
		if !slices.ContainsFunc(rows, func(k took) bool { return k.host == today.host && k.timeline == today.timeline }) {
			return fmt.Errorf("none of %d rows is", len(rows))
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	r.stop()
	order, err := turns(r.taken())
	if err != nil {
		t.Fatal(err)
	}
	return order
}

// trioDial connects from some place of the lab.
type trioDial func(ctx context.Context, network, addr string) (net.Conn, error)

// httpsFrom returns a client that dials from there with this configuration.
func httpsFrom(dial trioDial, cfg *tls.Config) *http.Client {
	return &http.Client{Timeout: time.Minute, Transport: &http.Transport{DialContext: dial, TLSClientConfig: cfg, DisableKeepAlives: true}}
}
