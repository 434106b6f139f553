package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"pgha/internal/fsx"
	"pgha/systemd"
)

const (
	// imageEnv hands a new image what the one before it in the same process knew.
	imageEnv = "PGHA_IMAGE"
	// ownImage is the program that this process runs, also when its file was
	// replaced.
	ownImage = "/proc/self/exe"

	// trialTime is how long a new version has to show that it is healthy.
	trialTime = time.Minute
	// trialGrace is how long after that its own end may take, before it is replaced
	// without one.
	trialGrace = 20 * time.Second
	// imageWatchdog is how long systemd waits for a sign of life while images
	// change. A version that hangs at once is ended then, and the installed one
	// started.
	imageWatchdog = 30 * time.Second
)

// handed is what a program hands to the next one in its process.
type handed struct {
	// Installed is the path of the installed program: what a service manager
	// starts. The program that runs may be another, on trial.
	Installed string `json:"installed"`
	// Trial names the trial that the program is.
	Trial string `json:"trial,omitempty"`
	// Why the image before gave way, where that was not planned.
	Why string `json:"why,omitempty"`
	// Stop says that a signal to stop came too late for the image before.
	Stop bool `json:"stop,omitempty"`
	// Replica says that the gate's kernel half was last opened for a replica, and
	// never since for an owner.
	Replica bool `json:"replica,omitempty"`
}

// Image is the program that this process runs, with what it was handed by the one
// that ran in the process before, if there was one.
type Image struct {
	handed
	inPlace bool // there was one before
	log     *slog.Logger
	trial   *trial      // this image is on trial
	failed  *trial      // the last one, if it has failed
	news    bool        // nobody was told of that yet
	guard   *time.Timer // ends a trial that does not even end by itself

	mu        sync.Mutex
	confirmed bool
}

// trial is a version that has to prove itself, on disk from before its start
// until it has.
type trial struct {
	ID        string    `json:"id"`
	Version   string    `json:"version"`
	From      string    `json:"from"` // the version before
	Actor     string    `json:"actor"`
	Installed string    `json:"installed"`
	PID       int       `json:"pid"`
	Started   time.Time `json:"started"`
	// Before is how the node was, which is what it has to be again.
	Before health `json:"before"`
	// Failed says why it did not prove itself; "" while it may still.
	Failed   string    `json:"failed,omitempty"`
	FailedAt time.Time `json:"failed_at,omitzero"`
}

// candidate is where the program of a trial lies: beside the installed one, so
// that a rename installs it.
func candidate(installed string) string { return installed + ".new" }

// previous is where the program that was replaced is kept.
func previous(installed string) string { return installed + ".previous" }

// BeginImage says what this process was handed. It must be called once, before
// Open. A trial that has begun and that this process is not has failed; if it is
// this process, it is replaced when it is neither healthy in time nor ends.
func BeginImage(p Paths, log *slog.Logger) (*Image, error) {
	im := &Image{log: log.With("component", "pgha")}
	if text, ok := os.LookupEnv(imageEnv); ok {
		if err := errors.Join(json.Unmarshal([]byte(text), &im.handed), os.Unsetenv(imageEnv)); err != nil {
			return nil, fmt.Errorf("read %s: %w", imageEnv, err)
		}
		im.inPlace = true
	}
	if im.Installed == "" {
		path, err := os.Executable()
		if err != nil {
			return nil, fmt.Errorf("find this program's path: %w", err)
		}
		im.Installed = path
	}
	if im.Stop {
		// It is caught like the one that came too late.
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			return nil, fmt.Errorf("repeat the signal to stop: %w", err)
		}
	}
	return im, im.readTrial(p)
}

func (im *Image) readTrial(p Paths) error {
	var t trial
	err := fsx.ReadJSON(p.trial(), &t)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("read trial of a new version (remove %s if there is none under way): %w", p.trial(), err)
	}
	switch {
	case t.Failed != "":
		im.failed = &t
	case im.inPlace && im.Trial == t.ID && t.PID == os.Getpid():
		im.trial = &t
		im.guard = time.AfterFunc(trialTime+trialGrace, func() {
			next := im.back("it was not healthy in time, and did not end either")
			im.log.Error("the new version has failed", "version", t.Version, "err", next.exec(false))
		})
	case t.Version == Version:
		return removeTrial(p) // it was installed, and ended before it could note that
	default:
		t.Failed, t.FailedAt = im.Why, time.Now().UTC()
		if t.Failed == "" {
			t.Failed = "it ended before it had shown that it is healthy"
		}
		im.failed, im.news = &t, true
		im.log.Error("the new version has failed; the one before it runs again", "version", t.Version, "why", t.Failed)
		return fsx.WriteJSON(p.trial(), t, 0o600)
	}
	return nil
}

// Ended says how this process ends after its node has: a trial that ends by
// itself, and was not asked to, gives way to the installed program. ctx is the
// process's own.
func (im *Image) Ended(ctx context.Context, err error) error {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.trial == nil || im.confirmed {
		return err
	}
	im.guard.Stop()
	var next *Reexec
	if errors.As(err, &next) || ctx.Err() != nil {
		return err
	}
	why := "it ended by itself"
	if err != nil {
		why = err.Error()
	}
	return im.back(why)
}

// back is the way back to the installed program.
func (im *Image) back(why string) *Reexec {
	return &Reexec{Path: im.Installed, hand: handed{Installed: im.Installed, Why: why}}
}

// onTrial returns the trial that this image is, if it has not proved itself.
func (im *Image) onTrial() *trial {
	im.mu.Lock()
	defer im.mu.Unlock()
	if im.confirmed {
		return nil
	}
	return im.trial
}

// confirm ends the trial well.
func (im *Image) confirm() {
	im.mu.Lock()
	defer im.mu.Unlock()
	im.confirmed = true
	im.guard.Stop()
}

// Reexec ends a daemon in order to run another program in its process: the error
// that Run returns then, on which the process has to call Exec.
type Reexec struct {
	Path string // of the program
	hand handed
	// replica is asked last, when nothing of this image runs any more.
	replica func() bool
}

// Error implements error.
func (r *Reexec) Error() string { return "run " + r.Path + " in this process" }

// Exec replaces this process's program, and returns only where that fails. ctx is
// that of the process: if it has ended, the next program stops at once.
func (r *Reexec) Exec(ctx context.Context) error { return r.exec(ctx.Err() != nil) }

func (r *Reexec) exec(stop bool) error {
	h := r.hand
	h.Stop = stop
	h.Replica = r.replica != nil && r.replica()
	err := execImage(r.Path, h)
	// What this process ran until now can go on.
	h.Trial, h.Why = "", "it cannot be executed: "+err.Error()
	return errors.Join(fmt.Errorf("run %s in this process: %w", r.Path, err), execImage(ownImage, h))
}

func execImage(path string, h handed) error {
	text, err := json.Marshal(h)
	if err != nil {
		return fmt.Errorf("encode image: %w", err)
	}
	env := slices.DeleteFunc(os.Environ(), func(e string) bool { return strings.HasPrefix(e, imageEnv+"=") })
	// No file but the standard ones stays open, and so no lock is kept: Go opens
	// all files so.
	return syscall.Exec(path, []string{h.Installed, "run"}, append(env, imageEnv+"="+string(text)))
}

// reexec has the daemon end, leaving its children running, and another program
// run in its process. It returns at once; whatever answers a request has a moment
// to do so.
func (n *Node) reexec(next *Reexec) {
	if n.keeper != nil {
		next.replica = n.keeper.pass.replica.Load
	}
	// The watchdog is not fed while images change.
	n.notifyWatchdog(imageWatchdog)
	n.end(next)
}

// notifyWatchdog sets the time within which systemd expects a sign of life, where
// it does at all.
func (n *Node) notifyWatchdog(d time.Duration) {
	if systemd.WatchdogInterval() <= 0 {
		return
	}
	if err := systemd.Notify(fmt.Sprintf("WATCHDOG_USEC=%d\nWATCHDOG=1", d.Microseconds())); err != nil {
		n.log.Warn("cannot tell systemd", "err", err)
	}
}

// giveWay ends the node's parts for a program that takes over in this process.
// Nothing keeps it from that: what goes wrong here, the next program finds as it
// would after a crash.
func (n *Node) giveWay(next *Reexec) error {
	n.event(EventRestart, n.cfg.Name, actorPgha, "pgha gives way to another program in its process; Patroni, PostgreSQL and HAProxy go on")
	if err := errors.Join(n.promiseRestart(), n.detachChildren(), n.saveEvents()); err != nil {
		n.log.Error("cannot prepare for the next program", "err", err)
	}
	if s := n.etcd.Swap(nil); s != nil {
		s.Stop()
	}
	n.log.Info("running another program in this process", "path", next.Path)
	return next
}
