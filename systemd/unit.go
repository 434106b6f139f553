package systemd

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"text/template"

	"github.com/coreos/go-systemd/v22/dbus"

	"pgha/internal/fsx"
)

const (
	// UnitName is the name of pgha's unit.
	UnitName = "pgha.service"
	// UnitPath is where Install writes it.
	UnitPath = "/etc/systemd/system/" + UnitName
)

// ErrNoSystemd says that the host was not booted with systemd.
var ErrNoSystemd = errors.New("this host was not booted with systemd")

//go:embed pgha.service.tmpl
var unitSource string

var unitTemplate = template.Must(template.New(UnitName).Parse(unitSource))

// plainPath keeps to characters that mean nothing to systemd's parser.
var plainPath = regexp.MustCompile(`^/[A-Za-z0-9/._+-]+$`)

// Available reports whether the host was booted with systemd.
func Available() bool {
	// sd_booted(3) looks at the same directory.
	info, err := os.Lstat("/run/systemd/system")
	return err == nil && info.IsDir()
}

// UnitText gives the unit file for the binary at binPath. It fails if binPath
// is not an absolute, clean path of letters, digits and "/._+-".
func UnitText(binPath string) ([]byte, error) {
	if !plainPath.MatchString(binPath) || filepath.Clean(binPath) != binPath {
		return nil, fmt.Errorf("path of the pgha binary %q cannot stand in a unit file: "+
			"move it to an absolute path of letters, digits and . _ + -, as /usr/local/bin/pgha", binPath)
	}
	var b bytes.Buffer
	if err := unitTemplate.Execute(&b, binPath); err != nil {
		return nil, fmt.Errorf("render %s: %w", UnitName, err)
	}
	return b.Bytes(), nil
}

// Install writes the unit file and enables the unit; it does not start it. It
// also keeps needrestart away from it, as KeepNeedrestartAway does. It may be
// repeated. It fails with ErrNoSystemd where there is none.
func Install(ctx context.Context, binPath string) error {
	text, err := UnitText(binPath)
	if err != nil {
		return err
	}
	return withConn(ctx, func(conn *dbus.Conn) error {
		if err := fsx.WriteFile(UnitPath, text, 0o644, fsx.Keep, fsx.Keep); err != nil {
			return fmt.Errorf("install %s: %w", UnitName, err)
		}
		if err := KeepNeedrestartAway(); err != nil {
			return err
		}
		// The second reload makes the manager see the link that enabling has made.
		if err := conn.ReloadContext(ctx); err != nil {
			return fmt.Errorf("reload systemd: %w", err)
		}
		if _, _, err := conn.EnableUnitFilesContext(ctx, []string{UnitName}, false, true); err != nil {
			return fmt.Errorf("enable %s: %w", UnitName, err)
		}
		if err := conn.ReloadContext(ctx); err != nil {
			return fmt.Errorf("reload systemd: %w", err)
		}
		return nil
	})
}

// Uninstall stops and disables the unit and removes its file, and what Install
// has told needrestart. It may be repeated, and does nothing where the unit is
// not installed. It fails with ErrNoSystemd where there is no systemd.
func Uninstall(ctx context.Context) error {
	return withConn(ctx, func(conn *dbus.Conn) error {
		if err := LetNeedrestart(); err != nil {
			return err
		}
		state, err := unitState(ctx, conn, UnitName)
		if err != nil {
			return err
		}
		if state.LoadState == "not-found" {
			return nil
		}
		if err := runJob(ctx, conn.StopUnitContext, "stop", UnitName); err != nil {
			return err
		}
		if _, err := conn.DisableUnitFilesContext(ctx, []string{UnitName}, false); err != nil {
			return fmt.Errorf("disable %s: %w", UnitName, err)
		}
		if err := os.Remove(UnitPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove unit file: %w", err)
		}
		if err := conn.ReloadContext(ctx); err != nil {
			return fmt.Errorf("reload systemd: %w", err)
		}
		// A unit that ended in failure would stay listed without a file. One that
		// did not is forgotten already, and resetting it is an error.
		_ = conn.ResetFailedUnitContext(ctx, UnitName)
		return nil
	})
}

// Start starts the unit and waits until it is ready, has failed, or ctx ends.
func Start(ctx context.Context) error {
	return withConn(ctx, func(conn *dbus.Conn) error {
		return runJob(ctx, conn.StartUnitContext, "start", UnitName)
	})
}

// Stop stops the unit and waits until it has ended or ctx ends. A unit that
// does not run is no error.
func Stop(ctx context.Context) error {
	return withConn(ctx, func(conn *dbus.Conn) error {
		return runJob(ctx, conn.StopUnitContext, "stop", UnitName)
	})
}

// UnitState is what systemd knows about the unit, in systemd's own words.
type UnitState struct {
	// LoadState is "loaded", or "not-found" where the unit is not installed.
	LoadState string
	// ActiveState is "active", "activating", "deactivating", "inactive" or "failed".
	ActiveState string
	// SubState is finer: "running", "auto-restart", "stop-sigterm", ...
	SubState string
	// UnitFileState is "enabled" where the unit starts at boot.
	UnitFileState string
	// Result is "success", or why the last run ended: "exit-code", "watchdog", ...
	Result string
	// StatusText is what the daemon has last said through NotifyStatus.
	StatusText string
	// MainPID is the daemon's process id, 0 where none runs.
	MainPID int
	// Restarts counts the automatic restarts since the last start by hand.
	Restarts int
}

// State asks systemd about the unit. It fails with ErrNoSystemd where there is
// none.
func State(ctx context.Context) (UnitState, error) {
	var s UnitState
	err := withConn(ctx, func(conn *dbus.Conn) (err error) {
		s, err = unitState(ctx, conn, UnitName)
		return err
	})
	return s, err
}

func unitState(ctx context.Context, conn *dbus.Conn, unit string) (UnitState, error) {
	props, err := conn.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return UnitState{}, fmt.Errorf("read state of %s: %w", unit, err)
	}
	text := func(name string) string { s, _ := props[name].(string); return s }
	number := func(name string) int { n, _ := props[name].(uint32); return int(n) }
	return UnitState{
		LoadState: text("LoadState"), ActiveState: text("ActiveState"), SubState: text("SubState"),
		UnitFileState: text("UnitFileState"), Result: text("Result"), StatusText: text("StatusText"),
		MainPID: number("MainPID"), Restarts: number("NRestarts"),
	}, nil
}

// withConn runs do with a connection to systemd.
func withConn(ctx context.Context, do func(*dbus.Conn) error) error {
	if !Available() {
		return ErrNoSystemd
	}
	conn, err := dbus.NewSystemdConnectionContext(ctx)
	if err != nil {
		bus, busErr := dbus.NewSystemConnectionContext(ctx)
		if busErr != nil {
			return fmt.Errorf("connect to systemd: %w", errors.Join(err, busErr))
		}
		conn = bus
	}
	defer conn.Close()
	return do(conn)
}

// job is a method of dbus.Conn that queues a job for a unit.
type job func(ctx context.Context, name, mode string, done chan<- string) (int, error)

// runJob queues a job and waits for its end.
func runJob(ctx context.Context, queue job, verb, unit string) error {
	done := make(chan string, 1)
	if _, err := queue(ctx, unit, "replace", done); err != nil {
		return fmt.Errorf("%s %s: %w", verb, unit, err)
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("%s %s: job ended with %q: see journalctl -u %s", verb, unit, result, unit)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s %s: %w", verb, unit, ctx.Err())
	}
}
