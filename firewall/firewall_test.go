package firewall

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/vishvananda/netns"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

// TestTextIsWhatTheKernelHolds loads the ruleset's text with nft in one
// namespace and applies the policy over netlink in another: both must list the
// same.
func TestTextIsWhatTheKernelHolds(t *testing.T) {
	for name, policy := range testPolicies() {
		t.Run(name, func(t *testing.T) {
			r, err := Compile(policy)
			if err != nil {
				t.Fatal(err)
			}
			byText, byNetlink := newNS(t), newNS(t)
			nft(t, byText, r.String(), "-f", "-")
			apply(t, newFirewall(t, byNetlink), policy)
			if d := cmp.Diff(nft(t, byText, "", "list", "ruleset"), nft(t, byNetlink, "", "list", "ruleset")); d != "" {
				t.Errorf("-text +netlink:\n%s", d)
			}
		})
	}
}

func TestPackets(t *testing.T) {
	const ssh = 22
	policy := Policy{
		Mode: ModePorts, Ports: testPorts,
		Members: addrs("10.9.0.1", "10.9.0.2", "fd00:9::2"),
		Clients: prefixes("10.9.0.3/32"),
		Probes:  addrs("10.9.0.4"),
	}
	open := policy
	open.JoinOpen = true
	const server4, server6 = "10.9.0.1", "fd00:9::1"
	member, clients, probe, stranger := "10.9.0.2", "10.9.0.3", "10.9.0.4", "10.9.0.5"
	type attempt struct {
		from, to string
		port     uint16
		dropped  string // the counter that must rise; "" where it must connect
	}
	tests := map[string]struct {
		policy   Policy
		attempts []attempt
	}{
		"member": {policy, []attempt{
			{member, server4, 5442, ""}, {member, server4, 5432, ""}, {member, server4, 5433, ""},
			{member, server4, 8008, ""}, {member, server4, 2379, ""}, {member, server4, 2380, ""},
			{member, server4, 8404, ""}, {member, server4, 8405, ""}, {member, server4, 8432, ""},
			{"fd00:9::2", server6, 2380, ""}, {member, server4, ssh, ""},
		}},
		"client": {policy, []attempt{
			{clients, server4, 5432, ""}, {clients, server4, 5433, ""}, {clients, server4, 8404, ""},
			{clients, server4, 8405, ""}, {clients, server4, 8432, ""}, {clients, server4, ssh, ""},
			{clients, server4, 5442, "drop_postgres"}, {clients, server4, 8008, "drop_patroni"},
			{clients, server4, 2379, "drop_etcdclient"}, {clients, server4, 2380, "drop_etcdpeer"},
		}},
		"probe": {policy, []attempt{
			{probe, server4, 8405, ""}, {probe, server4, 5432, ""}, {probe, server4, 5433, ""}, {probe, server4, ssh, ""},
			{probe, server4, 8404, "drop_stats"}, {probe, server4, 8432, "drop_api"}, {probe, server4, 5442, "drop_postgres"},
		}},
		"stranger": {policy, []attempt{
			{stranger, server4, ssh, ""}, {"fd00:9::3", server6, ssh, ""},
			{stranger, server4, 5432, "drop_readwrite"}, {stranger, server4, 5433, "drop_readonly"},
			{stranger, server4, 8405, "drop_health"}, {stranger, server4, 8432, "drop_api"},
			{"fd00:9::3", server6, 5432, "drop_readwrite"}, {"fd00:9::3", server6, 2380, "drop_etcdpeer"},
		}},
		"stranger while joining is open": {open, []attempt{
			{stranger, server4, 8432, ""}, {"fd00:9::3", server6, 8432, ""},
			{stranger, server4, 5432, "drop_readwrite"}, {stranger, server4, 2380, "drop_etcdpeer"},
		}},
	}
	server, client := newPair(t)
	var ports []uint16
	for _, n := range testPorts.all() {
		ports = append(ports, n.port)
	}
	echo(t, server, append(ports, ssh)...)
	f := newFirewall(t, server)
	for name, tc := range tests {
		t.Run(name, func(t *testing.T) {
			apply(t, f, tc.policy)
			for _, a := range tc.attempts {
				if a.dropped == "" {
					conn, err := dial(t, client, a.from, a.to, a.port, 30*time.Second)
					if err != nil {
						t.Errorf("%+v: %v", a, err)
						continue
					}
					if err := talk(conn, 30*time.Second); err != nil {
						t.Errorf("%+v: talk: %v", a, err)
					}
					continue
				}
				before := dropped(t, f, a.dropped)
				_, err := dial(t, client, a.from, a.to, a.port, 100*time.Millisecond)
				if !timedOut(err) {
					t.Errorf("%+v: error is %v, want a timeout", a, err)
				}
				if dropped(t, f, a.dropped) == before {
					t.Errorf("%+v: counter %s did not rise", a, a.dropped)
				}
			}
		})
	}
	t.Run("loopback", func(t *testing.T) {
		apply(t, f, policy)
		for _, to := range []string{"127.0.0.1", server4, server6} {
			if _, err := dial(t, server, "", to, 5442, 30*time.Second); err != nil {
				t.Error(err)
			}
		}
	})
	t.Run("connection of a removed member is cut", func(t *testing.T) {
		apply(t, f, policy)
		conn, err := dial(t, client, member, server4, 5442, 30*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if err := talk(conn, 30*time.Second); err != nil {
			t.Fatal(err)
		}
		without := policy
		without.Members = addrs("10.9.0.1")
		apply(t, f, without)
		if err := talk(conn, 100*time.Millisecond); !timedOut(err) {
			t.Errorf("error is %v, want a timeout", err)
		}
		if dropped(t, f, "drop_postgres") == 0 {
			t.Error("counter drop_postgres did not rise")
		}
		apply(t, f, policy)
		// Dropped, not reset: the session goes on where it stood.
		if err := talk(conn, 30*time.Second); err != nil {
			t.Errorf("talk as a member again: %v", err)
		}
	})
}

func timedOut(err error) bool {
	var netErr net.Error
	return errors.As(err, &netErr) && netErr.Timeout()
}

// talk sends a byte and waits for its echo.
func talk(conn net.Conn, timeout time.Duration) error {
	if err := conn.SetDeadline(time.Now().Add(timeout)); err != nil {
		return err
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		return err
	}
	_, err := conn.Read(make([]byte, 1))
	return err
}

func TestJoinPortIsRateLimited(t *testing.T) {
	server, client := newPair(t)
	f := newFirewall(t, server)
	p := testPolicies()["members"]
	p.JoinOpen = true
	apply(t, f, p)
	send := flood(t, client, 8432)
	eventually(t, "new connections over the limit are dropped", func() bool {
		send()
		return dropped(t, f, "drop_api") > 0
	})
}

// TestReplaceIsAtomic replaces the table again and again under a stream of
// packets to a closed port. A second table behind ours counts what gets through.
func TestReplaceIsAtomic(t *testing.T) {
	server, client := newPair(t)
	nft(t, server, `table inet behind {
		counter leaked { packets 0 bytes 0 }
		chain input { type filter hook input priority filter; tcp dport 5442 counter name leaked; }
	}`, "-f", "-")
	leaked := func() bool {
		return !strings.Contains(nft(t, server, "", "list", "counter", "inet", "behind", "leaked"), "packets 0 ")
	}
	f := newFirewall(t, server)
	a, b := testPolicies()["members"], testPolicies()["full"]
	apply(t, f, a)

	send := flood(t, client, 5442)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				send()
			}
		}
	}()
	for range 50 {
		apply(t, f, b)
		eventually(t, "packets arrive", func() bool { return dropped(t, f, "drop_postgres") > 0 })
		apply(t, f, a)
	}
	if leaked() {
		t.Error("packets got through while the table was replaced")
	}
	// The same stream without the table shows that the test can fail.
	if err := f.Remove(context.Background()); err != nil {
		t.Error(err)
	}
	eventually(t, "packets get through without the table", leaked)
	close(stop)
	<-stopped
}

// flood gives a function that sends one SYN to the server's port through a raw
// socket in the namespace.
func flood(t *testing.T, ns netns.NsHandle, port uint16) func() {
	t.Helper()
	var fd int
	inNS(t, ns, func() (err error) {
		fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW, unix.IPPROTO_TCP)
		return err
	})
	t.Cleanup(func() { _ = unix.Close(fd) })
	to := &unix.SockaddrInet4{Addr: netip.MustParseAddr("10.9.0.1").As4()}
	segment := make([]byte, 20)
	segment[0], segment[1] = 0xc0, 0x00
	segment[2], segment[3] = byte(port>>8), byte(port)
	segment[12], segment[13] = 5<<4, 0x02
	return func() { _ = unix.Sendto(fd, segment, 0, to) }
}

func TestForeignTablesAreUntouched(t *testing.T) {
	ns := newNS(t)
	nft(t, ns, `
		table inet other {
			set s { type ipv4_addr; elements = { 10.1.2.3 }; }
			chain input {
				type filter hook input priority filter; policy drop;
				tcp dport 22 counter packets 7 bytes 700 accept
			}
		}
		table ip pgha {
			chain input {
				tcp dport 5432 drop
			}
		}
		table inet pgha_gate {
			chain input { type filter hook input priority -20; }
		}
	`, "-f", "-")
	before := nft(t, ns, "", "list", "ruleset")
	f := newFirewall(t, ns)
	apply(t, f, testPolicies()["full"])
	with := nft(t, ns, "", "list", "ruleset")
	if !strings.Contains(with, "table inet pgha {") {
		t.Errorf("the table is not in the ruleset:\n%s", with)
	}
	nft(t, ns, "", "delete", "table", "inet", "pgha")
	if d := cmp.Diff(before, nft(t, ns, "", "list", "ruleset")); d != "" {
		t.Errorf("Apply changed foreign tables (-before +after):\n%s", d)
	}
	apply(t, f, testPolicies()["members"])
	for range 2 { // the second time there is nothing to remove
		if err := f.Remove(context.Background()); err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(before, nft(t, ns, "", "list", "ruleset")); d != "" {
			t.Errorf("Remove changed foreign tables (-before +after):\n%s", d)
		}
	}
}

func TestApplyAgainKeepsCounters(t *testing.T) {
	server, client := newPair(t)
	f := newFirewall(t, server)
	policy := testPolicies()["members"]
	apply(t, f, policy)
	send := flood(t, client, 5442)
	eventually(t, "a packet is dropped", func() bool { send(); return dropped(t, f, "drop_postgres") > 0 })
	apply(t, f, policy)
	// A new process finds the table of the old one in place.
	again := newFirewall(t, server)
	apply(t, again, policy)
	if dropped(t, again, "drop_postgres") == 0 {
		t.Error("applying the same policy again reset the counters")
	}
}

func TestInSync(t *testing.T) {
	tamper := map[string]string{
		"flush ruleset":     "flush ruleset",
		"delete table":      "delete table inet pgha",
		"dormant table":     "add table inet pgha { flags dormant; }",
		"flush chain":       "flush chain inet pgha input",
		"policy":            "add chain inet pgha input { policy drop; }",
		"inserted rule":     "insert rule inet pgha input accept",
		"replaced rule":     "replace rule inet pgha input handle HANDLE tcp dport 22 drop",
		"added chain":       "add chain inet pgha more { type filter hook input priority 0; }",
		"added set":         "add set inet pgha more { type ipv4_addr; }",
		"added counter":     "add counter inet pgha more",
		"added element":     "add element inet pgha members4 { 10.66.0.1 }",
		"deleted element":   "delete element inet pgha members4 { 10.0.0.11 }",
		"exchanged element": "delete element inet pgha members4 { 10.0.0.11 }; add element inet pgha members4 { 10.66.0.1 }",
		"flushed interval":  "flush set inet pgha clients4",
	}
	ctx := context.Background()
	ns := newNS(t)
	f := newFirewall(t, ns)
	if ok, err := f.InSync(ctx); ok || err != nil {
		t.Errorf("before the first Apply: in sync %v, error %v", ok, err)
	}
	policy := testPolicies()["full"]
	for name, command := range tamper {
		t.Run(name, func(t *testing.T) {
			apply(t, f, policy)
			if ok, err := f.InSync(ctx); !ok || err != nil {
				t.Fatalf("after Apply: in sync %v, error %v", ok, err)
			}
			list := nft(t, ns, "", "-a", "list", "chain", "inet", "pgha", "input")
			_, handle, _ := strings.Cut(list, "members4 accept # handle ")
			handle, _, _ = strings.Cut(handle, "\n")
			nft(t, ns, "", strings.ReplaceAll(command, "HANDLE", handle))
			if ok, err := f.InSync(ctx); ok || err != nil {
				t.Errorf("after tampering: in sync %v, error %v", ok, err)
			}
		})
	}
	if err := f.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if ok, err := f.InSync(ctx); !ok || err != nil {
		t.Errorf("after Remove: in sync %v, error %v", ok, err)
	}
	nft(t, ns, "", "add table inet pgha")
	if ok, err := f.InSync(ctx); ok || err != nil {
		t.Errorf("with a table after Remove: in sync %v, error %v", ok, err)
	}
}

func TestWatch(t *testing.T) {
	defer goleak.VerifyNone(t, goleak.IgnoreCurrent())
	ns := newNS(t)
	f := newFirewall(t, ns)
	members, full := testPolicies()["members"], testPolicies()["full"]
	apply(t, f, members)

	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	var calls atomic.Int64
	var want atomic.Pointer[Policy]
	want.Store(&members)
	ended := make(chan error, 1)
	go func() {
		ended <- f.Watch(ctx, func() {
			calls.Add(1)
			if err := f.Apply(ctx, *want.Load()); err != nil && ctx.Err() == nil {
				t.Error(err)
			}
		})
	}()
	listing := func() string { return nft(t, ns, "", "list", "ruleset") }
	for _, command := range []string{"flush ruleset", "delete element inet pgha members4 { 10.0.0.11 }", "add rule inet pgha input accept"} {
		before, good := calls.Load(), listing()
		nft(t, ns, "", command)
		eventually(t, command+" is noticed", func() bool { return calls.Load() > before })
		eventually(t, command+" is undone", func() bool { return listing() == good })
	}

	// What Apply writes and what happens in other tables is no foreign change.
	// The flush at the end shows that Watch has read all that came before it.
	before := calls.Load()
	want.Store(&full)
	apply(t, f, full)
	nft(t, ns, "", "add table inet other; add chain inet other pgha; add rule inet other pgha accept")
	if err := f.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	apply(t, f, full)
	nft(t, ns, "", "flush ruleset")
	eventually(t, "the flush is noticed", func() bool { return calls.Load() > before })
	eventually(t, "the flush is undone", func() bool {
		ok, err := f.InSync(ctx)
		return ok && err == nil
	})
	if got := calls.Load() - before; got != 1 {
		t.Errorf("%d changes reported, want 1", got)
	}

	cancel()
	if err := <-ended; err != nil {
		t.Errorf("Watch ended with %v", err)
	}
}

func TestWatchNoticesWhatHappenedBefore(t *testing.T) {
	ns := newNS(t)
	f := newFirewall(t, ns)
	apply(t, f, testPolicies()["members"])
	nft(t, ns, "", "flush ruleset")
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if err := f.Watch(ctx, cancel); err != nil {
		t.Fatal(err)
	}
}

func TestManyClients(t *testing.T) {
	server, client := newPair(t)
	echo(t, server, 5432)
	f := newFirewall(t, server)
	policy := Policy{Mode: ModePorts, Ports: testPorts, Members: addrs("10.9.0.1")}
	a4, a6 := netip.MustParseAddr("11.0.0.0"), netip.MustParseAddr("fd01::")
	for range 5000 { // every other address, so that nothing can be merged
		policy.Clients = append(policy.Clients, netip.PrefixFrom(a4, 32), netip.PrefixFrom(a6, 128))
		a4, a6 = a4.Next().Next(), a6.Next().Next()
	}
	apply(t, f, policy)
	if _, err := dial(t, client, "10.9.0.2", "10.9.0.1", 5432, 100*time.Millisecond); err == nil {
		t.Error("a stranger got through")
	}
	policy.Clients = append(policy.Clients, prefixes("10.9.0.2/32", "fd00:9::2/128")...)
	apply(t, f, policy)
	for from, to := range map[string]string{"10.9.0.2": "10.9.0.1", "fd00:9::2": "fd00:9::1"} {
		if _, err := dial(t, client, from, to, 5432, 30*time.Second); err != nil {
			t.Error(err)
		}
	}
	if n := strings.Count(nft(t, server, "", "list", "set", "inet", "pgha", "clients4"), "11.0."); n != 5000 {
		t.Errorf("the kernel holds %d clients of 5000", n)
	}
}

func TestApplyEnds(t *testing.T) {
	ns := newNS(t)
	f := newFirewall(t, ns)
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := f.Apply(ctx, testPolicies()["members"]); !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v, want context.Canceled", err)
	}
	if err := f.Apply(context.Background(), Policy{Mode: "host"}); err == nil {
		t.Error("a bad policy was applied")
	}
	if got := nft(t, ns, "", "list", "ruleset"); got != "" {
		t.Errorf("something was written:\n%s", got)
	}
}
