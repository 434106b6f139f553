package supervisor

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"pgha/internal/fsx"
	"pgha/internal/procstat"
)

// pidFile identifies a running child, in Spec.RunDir.
type pidFile struct {
	PID       int      `json:"pid"`
	Start     uint64   `json:"start_time_ticks"`
	BootID    string   `json:"boot_id"`
	Marker    string   `json:"marker"`
	ArgvHash  string   `json:"argv_hash"` // of the specification it was started with
	Argv      []string `json:"argv"`      // as /proc showed it after the start
	StartedAt string   `json:"started_at"`
}

func writePIDFile(s Spec, c *child) error {
	boot, err := readBootID()
	if err != nil {
		return err
	}
	hash, err := s.hash()
	if err != nil {
		return err
	}
	argv, err := readCmdline(c.pid)
	if err != nil {
		return err
	}
	return fsx.WriteJSON(s.file(".pid"), pidFile{
		PID: c.pid, Start: c.start, BootID: boot, Marker: s.Marker, ArgvHash: hash, Argv: argv,
		StartedAt: c.startedAt.UTC().Format(time.RFC3339),
	}, 0o644)
}

// Lookup returns the pid of the living process that the pid file of name in
// runDir records, or 0 when there is none. It needs no supervisor.
func Lookup(runDir, name string) (pid int, err error) {
	var pf pidFile
	if err := fsx.ReadJSON(filepath.Join(runDir, name+".pid"), &pf); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return 0, nil
		}
		return 0, err
	}
	boot, err := readBootID()
	if err != nil {
		return 0, err
	}
	st, err := procstat.Read(pf.PID)
	if err != nil || pf.BootID != boot || st.Started != pf.Start || st.State == 'Z' {
		return 0, nil
	}
	return pf.PID, nil
}

// action is what to do about a process that may be a leftover of ours.
type action int

const (
	actIgnore  action = iota // not ours, or gone: leave it alone
	actAdopt                 // ours and as wanted: supervise it
	actReplace               // ours but not as wanted: end it, then start
	actRefuse                // cannot be told: start nothing
)

// sighting is what is known of a process that may be a leftover.
type sighting struct {
	recorded           bool // the pid file names it; otherwise the scan found it
	alive              bool
	sameBoot           bool // recorded only: boot id
	sameStart          bool // recorded only: start time
	sameHash           bool // recorded only: specification
	marker             markerState
	sameArgv           bool
	sameProgram        bool
	sameUser           bool
	leader, descendant bool // of its session; of another candidate
}

// decideLeftover says what to do about a process. A child's own children inherit
// its marker, so that a process which is not recorded needs more than that.
func decideLeftover(o sighting) (action, string) {
	switch {
	case o.recorded && !o.sameBoot:
		return actIgnore, "the pid file is from another boot"
	case !o.alive:
		return actIgnore, "it has ended"
	case o.recorded && !o.sameStart:
		return actIgnore, "its pid belongs to another process now"
	case o.recorded && o.marker == markerAbsent:
		return actIgnore, "it does not carry our marker"
	case o.recorded && o.marker == markerOther:
		return actRefuse, "it carries another marker"
	case o.recorded && !o.sameHash:
		return actReplace, "it was started with another configuration"
	case o.recorded && !o.sameArgv:
		return actReplace, "it runs with another command line"
	case o.recorded:
		return actAdopt, "recorded in the pid file"
	case !o.leader || o.descendant:
		return actIgnore, "it was started by another process with our marker"
	case o.marker == markerUnreadable && o.sameArgv && o.sameUser:
		return actAdopt, "found by its command line"
	case o.marker != markerSame:
		return actIgnore, "it does not carry our marker"
	case !o.sameProgram:
		return actIgnore, "it is another program, started by a child of ours"
	case !o.sameArgv:
		return actReplace, "it runs with another command line"
	case !o.sameUser:
		return actReplace, "it runs as another user"
	default:
		return actAdopt, "found by its marker"
	}
}

// interpreters is how many arguments an interpreter may put before the path of
// the script it runs, plus one.
const interpreters = 4

// sameArgv reports whether a command line read from /proc is the one of s, or
// starts with recorded. More arguments may follow: HAProxy appends its own when
// it executes itself again.
func sameArgv(cmdline, recorded []string, s Spec) bool {
	if len(recorded) > 0 && hasPrefix(cmdline, recorded) {
		return true
	}
	for i := range min(len(cmdline), interpreters) {
		if cmdline[i] == s.Path && hasPrefix(cmdline[i+1:], s.Args) {
			return true
		}
	}
	return false
}

func sameProgram(cmdline []string, path string) bool {
	return slices.ContainsFunc(cmdline[:min(len(cmdline), interpreters)], func(a string) bool {
		return filepath.Base(a) == filepath.Base(path)
	})
}

func hasPrefix(s, prefix []string) bool {
	return len(s) >= len(prefix) && slices.Equal(s[:len(prefix)], prefix)
}

// leftover is a process found by findLeftovers, with the decision about it.
type leftover struct {
	*child
	action   action
	reason   string
	recorded bool
}

// findLeftovers returns the processes to adopt or to replace: the one of the pid
// file if that is valid, otherwise what a scan of /proc brings. The caller
// releases them.
func findLeftovers(s Spec, log *slog.Logger) ([]leftover, error) {
	found, err := recordedLeftover(s, log)
	if err != nil || found != nil {
		return found, err
	}
	return scanLeftovers(s)
}

func recordedLeftover(s Spec, log *slog.Logger) ([]leftover, error) {
	var pf pidFile
	if err := fsx.ReadJSON(s.file(".pid"), &pf); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			log.Warn("pid file is unusable, looking for the process by its marker", "err", err)
		}
		return nil, nil
	}
	boot, err := readBootID()
	if err != nil {
		return nil, err
	}
	hash, err := s.hash()
	if err != nil {
		return nil, err
	}
	o := sighting{recorded: true, sameBoot: pf.BootID == boot, sameHash: pf.ArgvHash == hash}
	c, err := holdPID(pf.PID)
	if noProcess(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	other := look(c, s, pf.Argv, &o)
	if o.marker == markerUnreadable && pf.Marker != s.Marker {
		o.marker, other = markerOther, pf.Marker
	}
	if o.sameStart = c.start == pf.Start; o.sameBoot && o.sameStart && !o.alive {
		// After a restart in place it is our child still, and must be reaped.
		var st ExitStatus
		_ = c.control(func(fd int) error { reap(fd, &st); return nil })
	}
	act, reason := decideLeftover(o)
	if act == actIgnore || act == actRefuse {
		c.release()
	}
	switch act {
	case actIgnore:
		log.Info("no living process behind the pid file", "pid", pf.PID, "reason", reason)
		return nil, nil
	case actRefuse:
		return nil, fmt.Errorf("process %d, recorded in %s, belongs to %q and not to %q: stop it first",
			pf.PID, s.file(".pid"), other, s.Marker)
	}
	return []leftover{{c, act, reason, true}}, nil
}

// noProcess reports whether err of holdPID says that there is no such process;
// other errors (no file descriptors left) do not allow that conclusion.
func noProcess(err error) bool {
	return errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT)
}

// look fills in what /proc tells about c and returns the marker that it carries.
func look(c *child, s Spec, recorded []string, o *sighting) (marker string) {
	st, err := c.identify()
	o.marker, marker = readMarker(c.pid, s.Marker)
	cmdline, cerr := readCmdline(c.pid)
	uid, uerr := readUID(c.pid)
	want := uint32(os.Geteuid())
	if s.User != nil {
		want = s.User.UID
	}
	o.leader = st.Session == c.pid
	o.sameArgv = sameArgv(cmdline, recorded, s)
	o.sameProgram = sameProgram(cmdline, s.Path)
	o.sameUser = uid == want
	// Last: it proves that all of the above was about this process.
	o.alive = err == nil && cerr == nil && uerr == nil && st.State != 'Z' && c.alive()
	return marker
}

// scanLeftovers looks for children that no pid file records: a supervisor that
// died between fork and writing it left one, and so does a lost run directory.
func scanLeftovers(s Spec) ([]leftover, error) {
	pids, err := allPIDs()
	if err != nil {
		return nil, err
	}
	type candidate struct {
		c *child
		o sighting
	}
	candidates := map[int]candidate{}
	for _, pid := range pids {
		if mark, _ := readMarker(pid, s.Marker); mark != markerSame && mark != markerUnreadable || pid == os.Getpid() {
			continue
		}
		c, err := holdPID(pid)
		if noProcess(err) {
			continue
		}
		if err != nil {
			for _, cand := range candidates {
				cand.c.release()
			}
			return nil, err
		}
		var o sighting
		look(c, s, nil, &o)
		if act, _ := decideLeftover(o); act == actIgnore {
			c.release()
			continue
		}
		candidates[pid] = candidate{c, o}
	}
	var found []leftover
	for pid, cand := range candidates {
		cand.o.descendant = hasAncestor(pid, func(p int) bool { _, ok := candidates[p]; return ok })
		act, reason := decideLeftover(cand.o)
		if act == actIgnore {
			cand.c.release()
			continue
		}
		found = append(found, leftover{cand.c, act, reason, false})
	}
	if len(found) > 1 {
		// Which of them is the right one cannot be told.
		for i := range found {
			found[i].action, found[i].reason = actReplace, "there is more than one"
		}
	}
	return found, nil
}

// hasAncestor reports whether a forebear of pid satisfies match.
func hasAncestor(pid int, match func(int) bool) bool {
	for range 64 {
		st, err := procstat.Read(pid)
		if err != nil || st.Parent <= 1 {
			return false
		}
		if pid = st.Parent; match(pid) {
			return true
		}
	}
	return false
}
