package systemd

import (
	"context"

	"github.com/coreos/go-systemd/v22/dbus"
)

// StopReason tells why the daemon was asked to end.
type StopReason int

const (
	// Unknown means that systemd was not asked, could not be, or has nothing to do with it.
	Unknown StopReason = iota
	// StopUnit means that the unit alone is being stopped.
	StopUnit
	// RestartUnit means that the unit will be started again at once.
	RestartUnit
	// Shutdown means that the whole system goes down: whatever still runs will be killed.
	Shutdown
)

// String gives the reason as a word.
func (r StopReason) String() string {
	switch r {
	case StopUnit:
		return "stop"
	case RestartUnit:
		return "restart"
	case Shutdown:
		return "shutdown"
	default:
		return "unknown"
	}
}

// WhyStopping asks systemd why the daemon was sent SIGTERM. It has to be called
// before the daemon ends, for the answer is in the job that waits for that end.
// It gives Unknown where systemd is absent or does not answer before ctx ends.
func WhyStopping(ctx context.Context) StopReason {
	reason := Unknown
	err := withConn(ctx, func(conn *dbus.Conn) error {
		state, err := conn.SystemStateContext(ctx)
		if err != nil {
			return err
		}
		system, _ := state.Value.Value().(string)
		jobs, err := conn.ListJobsContext(ctx)
		if err != nil && system != "stopping" {
			return err
		}
		reason = decideStop(system, jobs)
		return nil
	})
	if err != nil {
		return Unknown
	}
	return reason
}

// decideStop is the decision behind WhyStopping.
func decideStop(system string, jobs []dbus.JobStatus) StopReason {
	// At shutdown there is a stop job for every unit: the system's state comes
	// first.
	if system == "stopping" {
		return Shutdown
	}
	for _, j := range jobs {
		if j.Unit != UnitName {
			continue
		}
		switch j.JobType {
		case "restart", "try-restart":
			return RestartUnit
		case "stop":
			return StopUnit
		}
	}
	return Unknown
}
