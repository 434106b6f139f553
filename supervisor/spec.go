package supervisor

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"time"
)

// MarkerEnv is the environment variable that holds Spec.Marker in every child.
const MarkerEnv = "PGHA_CHILD"

// Defaults for the fields of Spec and RestartPolicy that are left zero.
const (
	DefaultLogMax         = 10 << 20 // bytes
	DefaultLogKeep        = 3
	DefaultGrace          = 10 * time.Second
	DefaultHealthEvery    = time.Second
	DefaultHealthTimeout  = time.Second
	DefaultHealthFailures = 3
	DefaultHealthGrace    = 30 * time.Second
	DefaultMinBackoff     = 250 * time.Millisecond
	DefaultMaxBackoff     = 30 * time.Second
	DefaultBudgetFailures = 5
	DefaultBudgetHalfLife = time.Minute
	minLogMax             = 64 << 10
)

// Spec describes one supervised process.
type Spec struct {
	// Name is the component's name, used in logs and file names: lower-case
	// letters, digits, "-" and "_".
	Name string
	// Path is the absolute path of the program, Args its arguments without
	// argv[0]. Neither may hold a secret: every user of the host can read them.
	Path string
	Args []string
	// Env is the child's complete environment as KEY=value; nothing is inherited.
	// Variables of the supervisor's own service (NOTIFY_SOCKET, WATCHDOG_*,
	// LISTEN_*, INVOCATION_ID, JOURNAL_STREAM) are dropped if present, and
	// PGHA_CHILD=<Marker> is added.
	Env []string
	// Dir is the working directory; empty means "/".
	Dir string
	// User is whom the child runs as; nil means as this process.
	User *User
	// Marker is what proves, in /proc/PID/environ, that a leftover is ours. It
	// must be unique to this component of this installation.
	Marker string

	// RunDir holds the pid file and its companions. It is made if missing.
	RunDir string

	// LogFile receives the child's standard output and error, appended. The
	// supervisor follows it and logs each line with component and stream=output.
	// At LogMax bytes it is rotated to LogFile.1 … LogFile.LogKeep.
	LogFile string
	LogMax  int64
	LogKeep int
	// ParseLine may give a line of output its level and shorten its text. Nil
	// logs the line as it is at Info.
	ParseLine func(line string) (level slog.Level, msg string)
	// Continues, if not nil, says whether a line belongs to those before it, which
	// ParseLine then gets all at once, with newlines between them. They have to be
	// written at once too.
	Continues func(lines []string, line string) bool

	// StopSignal asks the child to end (default SIGTERM); after Grace it is
	// killed.
	StopSignal syscall.Signal
	Grace      time.Duration
	// ReplaceSignal is sent instead of StopSignal to a leftover that runs with
	// another configuration than this Spec, so that an upgrade need not do all
	// that a stop does. Zero means StopSignal.
	ReplaceSignal syscall.Signal
	// KillGroup makes the end of the child the end of its whole process group:
	// what is left of the group after the child itself has ended is killed.
	KillGroup bool

	// OOMScoreAdj is written to /proc/PID/oom_score_adj after the start; nil
	// leaves what the child inherits from this process.
	OOMScoreAdj *int
	Limits      Limits

	Restart RestartPolicy
	// Exit may classify an exit that nobody asked for. Nil restarts always.
	Exit func(ExitStatus) Verdict

	// Health, if not nil, is called every HealthEvery while the child runs and
	// must obey its context, which ends after HealthTimeout. HealthFailures
	// failures in a row mean that the child hangs: it is killed and restarted.
	// Until the first success, but for HealthGrace at most, failures are shown
	// and not counted.
	Health         func(ctx context.Context) error
	HealthEvery    time.Duration
	HealthTimeout  time.Duration
	HealthFailures int
	HealthGrace    time.Duration

	// Before, if not nil, runs before each start and restart, not before an
	// adoption. It must obey its context. An error counts as a failed start.
	Before func(ctx context.Context) error
}

// User is a numeric identity. Groups are the supplementary groups; without them
// the child has none.
type User struct {
	UID, GID uint32
	Groups   []uint32
}

// Limits are resource limits of the child. Zero leaves a limit as it is.
type Limits struct {
	// NoFile is the number of files that the child may have open (soft limit;
	// the hard limit is raised to it when lower).
	NoFile uint64
}

// RestartPolicy says when an ended child is started again. Zero fields take the
// Default constants.
type RestartPolicy struct {
	// The wait before a restart starts at MinBackoff and doubles up to MaxBackoff
	// as recent failures add up; up to a quarter of it is taken off at random.
	MinBackoff, MaxBackoff time.Duration
	Budget                 Budget
	// GiveUp ends the attempts when the budget is spent. Otherwise they go on,
	// in state Failed, every MaxBackoff.
	GiveUp bool
}

// Budget is how many failures are borne: a counter that each failure raises by
// one and that halves every HalfLife. Above Failures the state is Failed.
type Budget struct {
	Failures int
	HalfLife time.Duration
}

// Verdict is what Spec.Exit says about an exit.
type Verdict struct {
	// Stop means: do not restart. The state becomes Failed with Reason.
	Stop   bool
	Reason string
}

// VerdictRestart is the Verdict that leaves the exit to the RestartPolicy.
var VerdictRestart = Verdict{}

// VerdictStop is the Verdict that a restart would be useless or harmful.
func VerdictStop(reason string) Verdict { return Verdict{Stop: true, Reason: reason} }

var nameRE = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]*$`)

// withDefaults returns a copy of s in which every zero field with a default has
// it, or all that is wrong with s.
func (s Spec) withDefaults() (Spec, error) {
	var errs []error
	check := func(ok bool, format string, args ...any) {
		if !ok {
			errs = append(errs, fmt.Errorf(format, args...))
		}
	}
	check(nameRE.MatchString(s.Name), "name %q must be made of a-z, 0-9, - and _", s.Name)
	check(filepath.IsAbs(s.Path), "path %q must be absolute", s.Path)
	check(filepath.IsAbs(s.RunDir), "run directory %q must be absolute", s.RunDir)
	check(filepath.IsAbs(s.LogFile), "log file %q must be absolute", s.LogFile)
	check(s.Dir == "" || filepath.IsAbs(s.Dir), "working directory %q must be absolute", s.Dir)
	check(s.Marker != "" && !strings.ContainsAny(s.Marker, "\x00\n"), "marker %q must be one non-empty line", s.Marker)
	for _, e := range s.Env {
		k, _, ok := strings.Cut(e, "=")
		// The value is not shown: it may be a secret.
		check(ok && k != "" && !strings.Contains(e, "\x00"), "environment entry %q is not KEY=value", k)
	}
	for _, a := range s.Args {
		check(!strings.Contains(a, "\x00"), "argument %q holds a NUL byte", a)
	}
	check(s.LogMax == 0 || s.LogMax >= minLogMax, "log maximum %d is below %d bytes", s.LogMax, minLogMax)
	check(s.LogKeep >= 0, "number of kept logs %d is negative", s.LogKeep)
	if s.OOMScoreAdj != nil {
		check(*s.OOMScoreAdj >= -1000 && *s.OOMScoreAdj <= 1000, "OOM score adjustment %d is not within -1000 and 1000", *s.OOMScoreAdj)
	}
	check(s.Grace >= 0 && s.HealthEvery >= 0 && s.HealthTimeout >= 0 && s.HealthGrace >= 0 && s.HealthFailures >= 0,
		"grace and health settings must not be negative")
	r := &s.Restart
	check(r.MinBackoff >= 0 && r.MaxBackoff >= 0 && r.Budget.Failures >= 0 && r.Budget.HalfLife >= 0,
		"restart policy must not be negative")
	s.setDefaults()
	check(r.MinBackoff <= r.MaxBackoff, "smallest back-off %v is above the largest %v", r.MinBackoff, r.MaxBackoff)
	if err := errors.Join(errs...); err != nil {
		return s, fmt.Errorf("check process %q: %w", s.Name, err)
	}
	s.Args, s.Env = slices.Clone(s.Args), childEnv(s.Env, s.Marker)
	return s, nil
}

func (s *Spec) setDefaults() {
	s.Dir = cmp.Or(s.Dir, "/")
	s.LogMax = cmp.Or(s.LogMax, DefaultLogMax)
	s.LogKeep = cmp.Or(s.LogKeep, DefaultLogKeep)
	s.StopSignal = cmp.Or(s.StopSignal, syscall.SIGTERM)
	s.ReplaceSignal = cmp.Or(s.ReplaceSignal, s.StopSignal)
	s.Grace = cmp.Or(s.Grace, DefaultGrace)
	s.HealthEvery = cmp.Or(s.HealthEvery, DefaultHealthEvery)
	s.HealthTimeout = cmp.Or(s.HealthTimeout, DefaultHealthTimeout)
	s.HealthFailures = cmp.Or(s.HealthFailures, DefaultHealthFailures)
	s.HealthGrace = cmp.Or(s.HealthGrace, DefaultHealthGrace)
	r := &s.Restart
	r.MinBackoff = cmp.Or(r.MinBackoff, DefaultMinBackoff)
	r.MaxBackoff = cmp.Or(r.MaxBackoff, max(DefaultMaxBackoff, r.MinBackoff))
	r.Budget.Failures = cmp.Or(r.Budget.Failures, DefaultBudgetFailures)
	r.Budget.HalfLife = cmp.Or(r.Budget.HalfLife, DefaultBudgetHalfLife)
}

// childEnv drops from env what belongs to the supervisor's own service: a child
// that saw it would report its state to systemd in the supervisor's name.
func childEnv(env []string, marker string) []string {
	out := make([]string, 0, len(env)+1)
	for _, e := range env {
		k, _, _ := strings.Cut(e, "=")
		switch {
		case k == "NOTIFY_SOCKET", k == "INVOCATION_ID", k == "JOURNAL_STREAM", k == MarkerEnv,
			strings.HasPrefix(k, "WATCHDOG_"), strings.HasPrefix(k, "LISTEN_"):
		default:
			out = append(out, e)
		}
	}
	return append(out, MarkerEnv+"="+marker)
}

// hash identifies what a running child was started with.
func (s Spec) hash() (string, error) {
	env := slices.Sorted(slices.Values(s.Env))
	data, err := json.Marshal([]any{s.Path, s.Args, env, s.Dir, s.User, s.Limits})
	if err != nil {
		return "", fmt.Errorf("hash specification of %s: %w", s.Name, err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:]), nil
}

func (s Spec) file(ext string) string { return filepath.Join(s.RunDir, s.Name+ext) }
