package systemd

import (
	"fmt"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// Notify sends a state to the service manager, in the notation of sd_notify(3).
// Without a manager that listens it does nothing.
func Notify(state string) error {
	if _, err := daemon.SdNotify(false, state); err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	return nil
}

// NotifyReady tells the service manager that the daemon has started.
func NotifyReady() error { return Notify(daemon.SdNotifyReady) }

// NotifyStopping tells the service manager that the daemon is on its way down.
func NotifyStopping() error { return Notify(daemon.SdNotifyStopping) }

// NotifyWatchdog tells the service manager that the daemon is alive and well.
func NotifyWatchdog() error { return Notify(daemon.SdNotifyWatchdog) }

// NotifyStatus shows a line of text in "systemctl status".
func NotifyStatus(text string) error { return Notify("STATUS=" + text) }

// WatchdogInterval gives the time within which the service manager expects
// NotifyWatchdog; call it at half of that. It is 0 where no watchdog runs.
func WatchdogInterval() time.Duration {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		return 0 // a variable that cannot be read is none of a manager's
	}
	return interval
}
