package haproxy

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"go.uber.org/goleak"
)

var discard = log.New(io.Discard, "", 0)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newPair returns a HAProxy before a primary n1 and a replica n2.
func newPair(t *testing.T) (p *proxy, ca *testCA, n1, n2 *fakeNode) {
	t.Helper()
	dir, uid, gid := newDir(t)
	ca = newTestCA(t, dir)
	n1, n2 = newFakeNode(t, ca, "n1", "n1"), newFakeNode(t, ca, "n2", "n2")
	n1.role.Store(rolePrimary)
	n2.role.Store(roleReplica)
	p = newProxy(t, ca, dir, uid, gid, n1, n2)
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_rw/n2": false, "be_ro/n1": false, "be_ro/n2": true})
	return p, ca, n1, n2
}

func TestRoutingFollowsPatroni(t *testing.T) {
	p, _, n1, n2 := newPair(t)
	rw, ro := open(t, p.conf.Ports.ReadWrite), open(t, p.conf.Ports.ReadOnly)
	if rw.node != "n1" || ro.node != "n2" {
		t.Fatalf("read-write went to %s, read-only to %s", rw.node, ro.node)
	}
	must(t, rw.echo())
	must(t, ro.echo())
	if a, b, c := p.health(t, "/rw"), p.health(t, "/ro"), p.health(t, "/"); a != 200 || b != 200 || c != 404 {
		t.Errorf("health: /rw %d, /ro %d, / %d", a, b, c)
	}

	// The replica goes: its sessions are cut, and reads go to the primary.
	n2.role.Store(roleNone)
	p.waitStatus(t, map[string]bool{"be_ro/n1": false, "be_ro/n2": false})
	if err := ro.echo(); err == nil {
		t.Error("a session to a replica that is down lives on")
	}
	must(t, rw.echo())
	if s := open(t, p.conf.Ports.ReadOnly); s.node != "n1" {
		t.Errorf("without a replica, read-only went to %s", s.node)
	}
	if code := p.health(t, "/ro"); code != 200 {
		t.Errorf("health without a replica: /ro %d", code)
	}

	// Nobody is primary.
	n1.role.Store(roleNone)
	p.waitStatus(t, map[string]bool{"be_rw/n1": false, "be_rw/n2": false})
	must(t, rw.echo()) // it may be Patroni that is down: PostgreSQL ends its sessions itself
	if s, err := dialPort(p.conf.Ports.ReadWrite); err == nil {
		t.Errorf("without a primary, read-write went to %s", s.node)
	}
	if a, b := p.health(t, "/rw"), p.health(t, "/ro"); a != 503 || b != 503 {
		t.Errorf("health without a primary: /rw %d, /ro %d", a, b)
	}

	// The other one takes over.
	n2.role.Store(rolePrimary)
	n1.role.Store(roleReplica)
	p.waitStatus(t, map[string]bool{"be_rw/n1": false, "be_rw/n2": true, "be_ro/n1": true, "be_ro/n2": false})
	must(t, p.runtime.ShutdownSessions(t.Context(), BackendReadWrite, "n1"))
	if err := rw.echo(); err == nil {
		t.Error("a session to the old primary lives on")
	}
	rw, ro = open(t, p.conf.Ports.ReadWrite), open(t, p.conf.Ports.ReadOnly)
	if rw.node != "n2" || ro.node != "n1" {
		t.Errorf("after the change, read-write went to %s, read-only to %s", rw.node, ro.node)
	}

	// Two say that they are.
	n1.role.Store(rolePrimary)
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_rw/n2": true})
	if s, err := dialPort(p.conf.Ports.ReadWrite); err == nil {
		t.Errorf("between two primaries, read-write went to %s", s.node)
	}
	if code := p.health(t, "/rw"); code != 503 {
		t.Errorf("health between two primaries: /rw %d", code)
	}
}

func TestCheckWantsTheNodesName(t *testing.T) {
	dir, uid, gid := newDir(t)
	ca := newTestCA(t, dir)
	n1, n2 := newFakeNode(t, ca, "n1", "n1"), newFakeNode(t, ca, "n2", "n1")
	n1.role.Store(rolePrimary)
	n2.role.Store(roleReplica)
	p := newProxy(t, ca, dir, uid, gid, n1, n2)
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_ro/n2": false})
	stats, err := p.runtime.ShowStat(t.Context())
	must(t, err)
	for _, s := range stats {
		if s.Backend == BackendReadOnly && s.Server == "n2" && (s.CheckStatus != "L6RSP" || s.CheckCode != 0) {
			t.Errorf("n2 is down for another reason: %+v", s)
		}
	}
}

func TestStatusPage(t *testing.T) {
	p, ca, _, _ := newPair(t)
	cfg := ca.clientTLS(t, "")
	base := fmt.Sprintf("https://127.0.0.1:%d", p.conf.Ports.Stats)
	for _, path := range []string{"/", "/metrics", "/;csv"} {
		if code, body, _ := p.get(t, base+path, cfg, "", ""); code != 401 || strings.Contains(body, "be_rw") {
			t.Errorf("%s without a password: %d", path, code)
		}
		if code, _, _ := p.get(t, base+path, cfg, statusUser, "wrong"); code != 401 {
			t.Errorf("%s with a wrong password: %d", path, code)
		}
		code, body, _ := p.get(t, base+path, cfg, statusUser, statusPassword)
		if code != 200 || !strings.Contains(body, "be_rw") || strings.Contains(body, "2.6.") && path == "/" {
			t.Errorf("%s with the password: %d, %.200s", path, code, body)
		}
	}
	resp, err := http.Get(fmt.Sprintf("http://127.0.0.1:%d/", p.conf.Ports.Stats))
	if err == nil {
		resp.Body.Close()
		t.Errorf("the status page answers without TLS: %d", resp.StatusCode)
	}
}

func TestReplaceCertificates(t *testing.T) {
	p, ca, n1, n2 := newPair(t)
	ctx := t.Context()
	session := open(t, p.conf.Ports.ReadWrite)
	workers, err := p.master.Workers(ctx)
	must(t, err)

	cert := func(bundle string) ([]byte, string) {
		t.Helper()
		data, err := os.ReadFile(bundle)
		must(t, err)
		pair := ca.clientTLS(t, bundle).Certificates[0]
		return data, pair.Leaf.SerialNumber.String()
	}
	data, serial := cert(ca.bundle(t, "stats2.pem", "status", p.uid, p.gid))
	must(t, p.runtime.SetCert(ctx, p.conf.StatsBundle, data))
	url := fmt.Sprintf("https://127.0.0.1:%d/", p.conf.Ports.Stats)
	if _, _, leaf := p.get(t, url, ca.clientTLS(t, ""), statusUser, statusPassword); leaf.SerialNumber.String() != serial {
		t.Error("the status page has the old certificate")
	}

	data, serial = cert(ca.bundle(t, "haproxy2.pem", "haproxy", p.uid, p.gid))
	must(t, p.runtime.SetCert(ctx, p.conf.Bundle, data))
	for _, n := range []*fakeNode{n1, n2} {
		waitFor(t, "checks with the new certificate", func(context.Context) error {
			if got := n.client.Load(); got != serial {
				return fmt.Errorf("certificate %s, want %s", got, serial)
			}
			return nil
		})
	}
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_ro/n2": true})

	// A CA file with another CA besides is taken; one that lacks ours is a way to
	// see that it is in use.
	other := newTestCA(t, t.TempDir())
	must(t, p.runtime.SetCA(ctx, p.conf.CAFile, append(append([]byte("\n"), other.pem...), ca.pem...)))
	must(t, session.echo())
	must(t, p.runtime.SetCA(ctx, p.conf.CAFile, other.pem))
	p.waitStatus(t, map[string]bool{"be_rw/n1": false, "be_ro/n2": false})
	must(t, p.runtime.SetCA(ctx, p.conf.CAFile, ca.pem))
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_ro/n2": true})

	// What does not fit is refused, and the next good one is taken.
	block, _ := pem.Decode(data)
	for what, bad := range map[string][]byte{"garbage": []byte("garbage"), "a key alone": pem.EncodeToMemory(block)} {
		if err := p.runtime.SetCert(ctx, p.conf.StatsBundle, bad); err == nil {
			t.Errorf("%s is taken for a certificate", what)
		}
	}
	if err := p.runtime.SetCert(ctx, "/nonexistent.pem", data); err == nil {
		t.Error("a certificate that is not in use can be replaced")
	}
	must(t, p.runtime.SetCert(ctx, p.conf.StatsBundle, data))

	after, err := p.master.Workers(ctx)
	must(t, err)
	if len(after) != 1 || after[0] != workers[0] {
		t.Errorf("workers were %+v and are %+v", workers, after)
	}
}

func TestReload(t *testing.T) {
	p, _, n1, n2 := newPair(t)
	ctx := t.Context()
	s := open(t, p.conf.Ports.ReadWrite)

	// With checks that get no answer, the new worker knows only what was saved.
	must(t, p.runtime.SaveState(ctx, p.conf.withDefaults().StateFile))
	n1.stalled.Store(true)
	n2.stalled.Store(true)
	must(t, p.master.Reload(ctx))
	stats, err := p.runtime.ShowStat(ctx)
	must(t, err)
	for _, s := range stats {
		if s.Backend == BackendReadWrite && s.Server == "n2" && s.Up {
			t.Error("after a reload, a replica counts as primary")
		}
	}
	n1.stalled.Store(false)
	n2.stalled.Store(false)
	must(t, s.echo())

	// The other way to ask.
	before, err := p.master.Workers(ctx)
	must(t, err)
	must(t, p.cmd.Process.Signal(syscall.SIGUSR2))
	waitFor(t, "another worker", func(ctx context.Context) error {
		now, err := p.master.Workers(ctx)
		if err != nil {
			return err
		}
		for _, w := range now {
			if !w.Old && w.PID != before[0].PID {
				return nil
			}
		}
		return fmt.Errorf("workers are %+v", now)
	})
	p.waitStatus(t, map[string]bool{"be_rw/n1": true, "be_rw/n2": false})
	must(t, s.echo())
	if s := open(t, p.conf.Ports.ReadWrite); s.node != "n1" {
		t.Errorf("a new session went to %s", s.node)
	}

	good, err := os.ReadFile(p.file)
	must(t, err)
	must(t, os.WriteFile(p.file, append(good, "nonsense here\n"...), 0o600))
	if err := p.master.Reload(ctx); !errors.Is(err, ErrReloadFailed) {
		t.Errorf("a broken file gives %v", err)
	}
	must(t, s.echo())
	if s := open(t, p.conf.Ports.ReadWrite); s.node != "n1" {
		t.Errorf("a new session went to %s", s.node)
	}
	must(t, os.WriteFile(p.file, good, 0o600))
	must(t, p.master.Reload(ctx))
	must(t, s.echo())
}

func TestRuntimeServers(t *testing.T) {
	p, _, n1, n2 := newPair(t)
	ctx := t.Context()
	s := open(t, p.conf.Ports.ReadWrite)
	must(t, p.runtime.ShutdownSessions(ctx, BackendReadWrite, "n1"))
	if err := s.echo(); err == nil {
		t.Error("a session outlives ShutdownSessions")
	}

	s = open(t, p.conf.Ports.ReadWrite)
	must(t, p.runtime.SetServerState(ctx, BackendReadWrite, "n1", StateDrain))
	must(t, s.echo())
	if s, err := dialPort(p.conf.Ports.ReadWrite); err == nil {
		t.Errorf("a draining server gave a session to %s", s.node)
	}
	must(t, p.runtime.SetServerState(ctx, BackendReadWrite, "n1", StateMaint))
	must(t, s.echo())
	must(t, p.runtime.SetServerState(ctx, BackendReadWrite, "n1", StateReady))
	p.waitStatus(t, map[string]bool{"be_rw/n1": true})

	// Faster than the checks: they do not answer, and the flip is done.
	n1.stalled.Store(true)
	n2.stalled.Store(true)
	must(t, p.runtime.SetServerState(ctx, BackendReadWrite, "n1", StateMaint))
	must(t, p.runtime.SetServerHealth(ctx, BackendReadWrite, "n2", true))
	if s := open(t, p.conf.Ports.ReadWrite); s.node != "n2" {
		t.Errorf("after the flip, read-write went to %s", s.node)
	}

	for what, err := range map[string]error{
		"an unknown server":  p.runtime.SetServerState(ctx, BackendReadWrite, "n9", StateReady),
		"an unknown backend": p.runtime.ShutdownSessions(ctx, "be_x", "n1"),
		"an unknown state":   p.runtime.SetServerState(ctx, BackendReadWrite, "n1", "asleep"),
		"two commands":       p.runtime.SetServerState(ctx, BackendReadWrite, "n1; show info", StateReady),
		"a missing socket":   Runtime{p.dir + "/none"}.ShutdownSessions(ctx, BackendReadWrite, "n1"),
	} {
		if err == nil {
			t.Errorf("%s gives no error", what)
		}
	}
	info, err := p.runtime.Info(ctx)
	if err != nil || info["Name"] != "HAProxy" || info["node"] != "n1" {
		t.Errorf("info: %v, %v", info, err)
	}
}
