package faults

import (
	"fmt"
	"os"
	"strings"
	"sync"
	"syscall"
	"time"
)

var diskFaults = []fault{
	{
		name: "wal-full", what: "the disk of the primary's PostgreSQL is full", expect: either, lasts: 20 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.fill(r.leader, postgresVolume) },
	},
	{
		name: "replica-wal-full", what: "the disk of the replica's PostgreSQL is full", expect: stays, lasts: 20 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.fill(r.replica, postgresVolume) },
	},
	{
		name: "etcd-full", what: "the disk of etcd on the primary's host is full", expect: either, lasts: 20 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.fill(r.leader, etcdVolume) },
	},
	{
		name: "disk-stalled-1", what: "the disks of the primary's PostgreSQL and etcd stall for 1 s", expect: either, lasts: time.Second, bound: failoverBound,
		inject: func(r *trial) func() { return r.stall(time.Second, r.leader, postgresVolume, etcdVolume) },
	},
	{
		name: "disk-stalled-10", what: "the disks of the primary's PostgreSQL and etcd stall for 10 s", quick: true, expect: either, lasts: 10 * time.Second, bound: time.Minute,
		inject: func(r *trial) func() { return r.stall(10*time.Second, r.leader, postgresVolume, etcdVolume) },
	},
	{
		name: "etcd-stalled-5", what: "the disk of the primary's etcd stalls for 5 s", expect: either, lasts: 5 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() { return r.stall(5*time.Second, r.leader, etcdVolume) },
	},
	{
		name: "postgres-stalled-5", what: "the disk of the primary's PostgreSQL stalls for 5 s", expect: either, lasts: 5 * time.Second, bound: failoverBound,
		inject: func(r *trial) func() { return r.stall(5*time.Second, r.leader, postgresVolume) },
	},
}

// fill fills a disk, until it is undone.
func (r *trial) fill(host, path string) func() {
	r.Helper()
	undo, err := r.Host(host).FillDisk(path)
	r.must(err)
	return func() {
		r.must(undo())
		r.revive(host)
	}
}

// revive starts the host's pgha if it has ended, as its unit would.
func (r *trial) revive(host string) {
	r.Helper()
	n, err := r.Host(host).SignalAll(isDaemon, 0)
	r.must(err)
	if n == 0 {
		r.Logf("pgha of %s has ended, and is started again", host)
		r.must(r.Bed.Run(r.Context(), host))
	}
}

// stall stops disks for a time, which undoing it waits for.
func (r *trial) stall(d time.Duration, host string, paths ...string) func() {
	errs := make([]error, len(paths))
	var wg sync.WaitGroup
	for i, p := range paths {
		wg.Go(func() { errs[i] = r.Host(host).StallDisk(p, d) })
	}
	return func() {
		wg.Wait()
		for _, err := range errs {
			r.must(err)
		}
		r.revive(host)
	}
}

// clockFaults set the clock of Patroni, the only part that decides by the time
// of day. It is done in its Python, as a host here shares the machine's clock
// and the machine's clock is not the tests' to set; what the kernel's gate does
// when the clock of its host is set is tested with the gate.
var clockFaults = []fault{
	{
		name: "clock-forward", what: "the clock of the primary's Patroni is set forward by 1 h", quick: true, expect: stays, lasts: 20 * time.Second, bound: blipBound,
		inject: func(r *trial) func() { return r.setClock(r.leader, time.Hour) },
	},
	{
		name: "clock-back", what: "the clock of the primary's Patroni is set back by 1 h", expect: stays, lasts: 20 * time.Second, bound: blipBound,
		inject: func(r *trial) func() { return r.setClock(r.leader, -time.Hour) },
	},
	{
		name: "clock-forward-then-lost", what: "the clocks of both Patronis are set forward by 1 h, and then the primary's host loses power",
		expect: moves, bound: failoverBound,
		inject: func(r *trial) func() {
			heal := r.setClock(r.replica, time.Hour)
			r.setClock(r.leader, time.Hour)
			r.powerOff(r.leader)
			return func() {
				heal()
				r.powerOn(r.leader)
			}
		},
	},
}

// pythonHook makes every reading of the clock in a host's Python differ by what
// a file says, if there is one.
const pythonHook = `import time as _t, datetime as _d
_time = _t.time
def _offset():
    try:
        with open("/run/lab-clock") as f:
            return float(f.read())
    except (OSError, ValueError):
        return 0.0
_t.time = lambda: _time() + _offset()
class _datetime(_d.datetime):
    @classmethod
    def now(cls, tz=None):
        return cls.fromtimestamp(_t.time(), tz)
    @classmethod
    def utcnow(cls):
        return cls.utcfromtimestamp(_t.time())
_d.datetime = _datetime
`

// setClock restarts the host's Patroni with a clock that can be set, which is
// no fault by itself, and then sets it.
func (r *trial) setClock(host string, by time.Duration) func() {
	r.Helper()
	ctx := within(r.T, patience)
	r.must(os.WriteFile(r.Host(host).Path("/run/lab-hook.py"), []byte(pythonHook), 0o644))
	point, err := r.Host(host).Run(ctx, "sh", "-c", `p=$(python3 -c "import sitecustomize; print(sitecustomize.__file__)") && p=$(readlink -f "$p") && mount --bind /run/lab-hook.py "$p" && echo "$p"`)
	r.must(err)
	r.signal(host, isPatroni, syscall.SIGKILL)
	_, err = r.healthy(ctx)
	r.must(err)
	r.must(os.WriteFile(r.Host(host).Path("/run/lab-clock"), fmt.Appendf(nil, "%f", by.Seconds()), 0o644))
	r.injected = r.history.Now()
	r.until("Patroni's log to show its clock", func() error { return r.loggedAt(host, by) })
	return func() {
		r.must(os.Remove(r.Host(host).Path("/run/lab-clock")))
		_, err := r.Host(host).Run(ctx, "umount", strings.TrimSpace(point))
		r.must(err)
		r.signal(host, isPatroni, syscall.SIGKILL)
	}
}

// loggedAt fails unless the last line of a host's Patroni log was written by a
// clock that differs by that much.
func (r *trial) loggedAt(host string, by time.Duration) error {
	data, err := os.ReadFile(r.Host(host).Path("/var/log/pgha/patroni.log"))
	if err != nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(string(data)), "\n")
	stamp, _, _ := strings.Cut(lines[len(lines)-1], ",")
	at, err := time.ParseInLocation(time.DateTime, stamp, time.Local)
	if err != nil {
		return err
	}
	if off := time.Until(at) - by; off.Abs() > by.Abs()/2 {
		return fmt.Errorf("its clock shows %s", stamp)
	}
	return nil
}
