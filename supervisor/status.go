package supervisor

import (
	"fmt"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// State is where a supervised process is in its life.
type State int

// The states. Stopped is the zero value.
const (
	Stopped    State = iota // not supervised and, unless detached, not running
	Waiting                 // not started yet: the reason says what it waits for
	Starting                // being prepared or started
	Running                 // the process lives; see Status.Health for how well
	BackingOff              // ended; a restart is due after a short wait
	Stopping                // asked to end
	Failed                  // failed too often, or the exit forbids a restart
)

var stateNames = [...]string{"stopped", "waiting", "starting", "running", "backing off", "stopping", "failed"}

// String returns the state in lower-case words.
func (s State) String() string {
	if s < 0 || int(s) >= len(stateNames) {
		return fmt.Sprintf("state(%d)", int(s))
	}
	return stateNames[s]
}

// MarshalText encodes the state as its name.
func (s State) MarshalText() ([]byte, error) { return []byte(s.String()), nil }

// UnmarshalText decodes a name made by MarshalText.
func (s *State) UnmarshalText(text []byte) error {
	for i, name := range stateNames {
		if name == string(text) {
			*s = State(i)
			return nil
		}
	}
	return fmt.Errorf("decode process state: unknown name %q", text)
}

// Status is a snapshot of a supervised process.
type Status struct {
	Name      string       `json:"name"`
	State     State        `json:"state"`
	Reason    string       `json:"reason,omitempty"` // why it is in State
	Since     time.Time    `json:"since"`            // when it entered State
	PID       int          `json:"pid,omitempty"`    // 0 when nothing runs
	Adopted   bool         `json:"adopted,omitempty"`
	StartedAt time.Time    `json:"started_at,omitzero"` // start of the running child
	Restarts  int          `json:"restarts"`            // starts after the first, by this supervisor
	LastExit  *ExitStatus  `json:"last_exit,omitempty"`
	LastLog   []string     `json:"last_log,omitempty"` // last lines of output
	Health    HealthStatus `json:"health,omitzero"`
}

// HealthStatus is the result of the last health check of the running child.
type HealthStatus struct {
	Err     string    `json:"err,omitempty"`    // empty when healthy
	Since   time.Time `json:"since,omitzero"`   // when it became healthy or unhealthy
	Checked time.Time `json:"checked,omitzero"` // zero until the first check
}

// Event is one change of state.
type Event struct {
	At     time.Time `json:"at"`
	Name   string    `json:"name"`
	From   State     `json:"from"`
	To     State     `json:"to"`
	Reason string    `json:"reason,omitempty"`
}

// ExitStatus says how a child ended.
type ExitStatus struct {
	// Known is false for an adopted child that was not ours to wait for: that it
	// ended is all that the kernel tells.
	Known   bool           `json:"known"`
	Code    int            `json:"code"`             // exit code, -1 when Signal is set or Known is false
	Signal  syscall.Signal `json:"signal,omitempty"` // what killed it, or 0
	Core    bool           `json:"core,omitempty"`   // it dumped core
	PID     int            `json:"pid"`
	At      time.Time      `json:"at"`
	Ran     time.Duration  `json:"ran"`                // from start to exit
	LastLog []string       `json:"last_log,omitempty"` // its last lines of output
}

// quoteLines is how many lines of output String quotes, quoteMax their length.
const (
	quoteLines = 3
	quoteMax   = 300
)

// String tells how the child ended, with its last lines of output.
func (e ExitStatus) String() string {
	var b strings.Builder
	switch {
	case !e.Known:
		b.WriteString("ended, exit status unknown (it was adopted)")
	case e.Signal != 0:
		fmt.Fprintf(&b, "killed by %s", unix.SignalName(e.Signal))
		if e.Core {
			b.WriteString(" (core dumped)")
		}
	default:
		fmt.Fprintf(&b, "exit code %d", e.Code)
	}
	last := e.LastLog[max(0, len(e.LastLog)-quoteLines):]
	for i, line := range last {
		sep := " | "
		if i == 0 {
			sep = "; last output: "
		}
		if len(line) > quoteMax {
			line = line[:quoteMax] + "…"
		}
		b.WriteString(sep + strings.ToValidUTF8(line, "\uFFFD"))
	}
	return b.String()
}
