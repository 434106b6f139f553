package e2e

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
)

// TestHalfMadeBootstrap cuts off the first node's init while PostgreSQL's data
// is being made. Each host is a cluster of its own.
func TestHalfMadeBootstrap(t *testing.T) {
	e := edge{t, newBed(t)}
	e.hosts("early", "late", "killed", "orphan")
	e.steps(
		edgeStep{"PowerCutDuringInitdb", func(e edge) {
			e.beginInit("early")
			e.waitRunning("early", "initdb", "")
			e.halfMade("early")
			repairedAfterPowerCut(e, "early")
		}},
		edgeStep{"PowerCutAfterInitdb", func(e edge) {
			e.beginInit("late")
			e.waitRunning("late", "postgres", "--config-file")
			repairedAfterPowerCut(e, "late")
		}},
		edgeStep{"DaemonKilledDuringInitdb", func(e edge) {
			e.beginInit("killed")
			e.waitRunning("killed", "initdb", "")
			e.must(e.bed.Kill("killed"))
			if len(e.running("killed", "patroni")) != 1 {
				e.t.Error("Patroni has not outlived the daemon")
			}
			e.must(e.bed.Run(e.long(), "killed"))
			writable(e, "killed")
		}},
		edgeStep{"DaemonKilledAndPatroniAlone", func(e edge) {
			e.beginInit("orphan")
			e.waitRunning("orphan", "initdb", "")
			e.must(e.bed.Kill("orphan"))
			// It is given the time to find that etcd, which holds the marker of its
			// bootstrap, is away.
			e.until("Patroni to miss etcd", func() error {
				if p := e.running("orphan", "initdb"); len(p) > 0 {
					return errRuns(p)
				}
				text, err := os.ReadFile(filepath.Join(e.bed.Host("orphan").Dir(), "log", "patroni.log"))
				if err == nil && !strings.Contains(string(text), "Connection refused") {
					err = errors.New("it has not")
				}
				return err
			})
			e.must(e.bed.Run(e.long(), "orphan"))
			writable(e, "orphan")
		}},
	)
}

type errRuns []lab.Proc

func (e errRuns) Error() string {
	var out []string
	for _, p := range e {
		out = append(out, strings.Join(p.Cmdline, " "))
	}
	return "there still runs " + strings.Join(out, "; ")
}

// beginInit starts pgha init and does not wait for it.
func (e edge) beginInit(host string) {
	e.t.Helper()
	e.must(e.bed.Start(e.long(), host, "init", "--no-service", "--yes", "--json", "--memory", testbed.Memory,
		"--name", host, "--address", e.bed.Addr(host), "--clients", lab.Subnet().String()))
}

// halfMade waits until there is something of a database.
func (e edge) halfMade(host string) {
	e.t.Helper()
	for ctx := e.long(); ctx.Err() == nil; {
		if len(e.files(host, edgeDataDir+"/PG_VERSION")) > 0 {
			return
		}
	}
	e.t.Fatalf("initdb on %s has written nothing", host)
}

func repairedAfterPowerCut(e edge, host string) {
	e.t.Helper()
	e.must(e.bed.PowerOff(host))
	disk := filepath.Join(e.bed.Host(host).Dir(), "lib", "postgres", "15")
	half, err := os.ReadDir(filepath.Join(disk, "data"))
	e.must(err)
	if len(half) == 0 {
		e.t.Fatal("the power was cut before anything was written")
	}
	e.must(e.bed.PowerOn(e.long(), host))
	writable(e, host)
	aside, err := filepath.Glob(filepath.Join(disk, "data.failed-*"))
	e.must(err)
	if len(aside) != 1 {
		e.t.Fatalf("the half-made directory was moved to %v, want one", aside)
	}
	kept, err := os.ReadDir(aside[0])
	e.must(err)
	// What a server that ran has left behind is not all that there was.
	if len(kept) < len(half) {
		e.t.Errorf("of %d entries of the half-made directory %d were kept", len(half), len(kept))
	}
	e.says(e.done(host, "logs", "-n", "1000", "pgha"), "the half-made data directory was moved aside", aside[0][strings.LastIndex(aside[0], "data.failed"):])
}

// writable waits until a host is the primary of a cluster of one.
func writable(e edge, host string) {
	e.t.Helper()
	s := e.status(host, host+" to be the primary", func(s node.Status) bool { return s.Leader == host && s.Waiting == "" })
	if m := edgeMember(s, host); m.Timeline != 1 || m.Etcd != "voter" || len(s.Members) != 1 {
		e.t.Errorf("a cluster of one is %s", testbed.Members(s))
	}
	e.must(e.bed.CreateApp(e.long(), host))
	w := e.writer(1, host)
	e.noneLost(host, w)
	if got := e.sql(host, "SELECT rolname FROM pg_roles WHERE rolname IN ('replicator', 'rewinder') ORDER BY 1"); got != "replicator\nrewinder" {
		e.t.Errorf("PostgreSQL's roles are %q", got)
	}
	if left := e.files(host, "/var/lib/pgha/bootstrap-pending"); len(left) > 0 {
		e.t.Errorf("the bootstrap still counts as begun: %v", left)
	}
}
