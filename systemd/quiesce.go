package systemd

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"

	"pgha/internal/fsx"
)

// CompetingUnits gives the patterns of the distribution's units that would
// compete with a data node's children for ports and data directories.
func CompetingUnits() []string {
	return append(CompetingWitnessUnits(),
		"postgresql.service", "postgresql@*.service",
		"patroni.service", "patroni@*.service",
		"haproxy.service")
}

// CompetingWitnessUnits gives the patterns for a witness: it runs etcd alone,
// and the host may have a PostgreSQL or HAProxy of its own.
func CompetingWitnessUnits() []string {
	return []string{"etcd.service"}
}

// UnitChange is a unit that Quiesce has found, as it was before.
type UnitChange struct {
	// Unit is the unit's name.
	Unit string `json:"unit"`
	// WasActive says that it ran, or was about to.
	WasActive bool `json:"was_active"`
	// FileState is systemd's word for its file: "enabled", "disabled", "static",
	// ...; empty for an instance of a template, which has no file.
	FileState string `json:"file_state,omitempty"`
	// Masked says that Quiesce masks it. A file that an administrator has put
	// into /etc/systemd/system cannot be masked, only disabled.
	Masked bool `json:"masked"`
}

// Quiesce stops, disables and masks the units that match the patterns, those of
// CompetingUnits if none are given, and returns what it has changed. What was
// before is kept in statePath for Restore; a second call adds to it and never
// overwrites the first record of a unit. Where there is no systemd there is
// nothing to do, and no error.
func Quiesce(ctx context.Context, statePath string, patterns ...string) ([]UnitChange, error) {
	if !Available() {
		return nil, nil
	}
	if len(patterns) == 0 {
		patterns = CompetingUnits()
	}
	var changes []UnitChange
	err := withConn(ctx, func(conn *dbus.Conn) (err error) {
		if changes, err = competing(ctx, conn, patterns); err != nil || len(changes) == 0 {
			return err
		}
		if err := record(statePath, changes); err != nil {
			return err
		}
		return quiesce(ctx, conn, changes)
	})
	if err != nil {
		return nil, fmt.Errorf("quiesce the distribution's units: %w", err)
	}
	return changes, nil
}

// competing lists the units that match and are not out of the way already.
func competing(ctx context.Context, conn *dbus.Conn, patterns []string) ([]UnitChange, error) {
	found := map[string]UnitChange{}
	files, err := conn.ListUnitFilesByPatternsContext(ctx, nil, patterns)
	if err != nil {
		return nil, fmt.Errorf("list unit files: %w", err)
	}
	for _, f := range files {
		name := filepath.Base(f.Path)
		found[name] = UnitChange{
			Unit: name, FileState: f.Type,
			Masked: !isMasked(f.Type) && !strings.HasPrefix(f.Path, "/etc/systemd/system/"),
		}
	}
	units, err := conn.ListUnitsByPatternsContext(ctx, nil, patterns)
	if err != nil {
		return nil, fmt.Errorf("list units: %w", err)
	}
	for _, u := range units {
		c := found[u.Name]
		c.Unit = u.Name
		c.WasActive = u.ActiveState != "inactive" && u.ActiveState != "failed"
		found[u.Name] = c
	}
	var changes []UnitChange
	for _, name := range slices.Sorted(maps.Keys(found)) {
		if c := found[name]; c.WasActive || c.Masked || c.enabled() {
			changes = append(changes, c)
		}
	}
	return changes, nil
}

func isMasked(fileState string) bool { return strings.HasPrefix(fileState, "masked") }

func (c UnitChange) enabled() bool { return c.FileState == "enabled" }

// record adds the changes to the file at statePath.
func record(statePath string, changes []UnitChange) error {
	var known []UnitChange
	if err := fsx.ReadJSON(statePath, &known); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, c := range changes {
		if !slices.ContainsFunc(known, func(k UnitChange) bool { return k.Unit == c.Unit }) {
			known = append(known, c)
		}
	}
	return fsx.WriteJSON(statePath, known, 0o600)
}

func quiesce(ctx context.Context, conn *dbus.Conn, changes []UnitChange) error {
	// A masked unit has lost its ExecStop=, and PostgreSQL its clean shutdown:
	// stopping comes before masking.
	for _, c := range changes {
		if c.WasActive {
			if err := runJob(ctx, conn.StopUnitContext, "stop", c.Unit); err != nil {
				return err
			}
		}
	}
	for _, c := range changes {
		if c.enabled() {
			if _, err := conn.DisableUnitFilesContext(ctx, []string{c.Unit}, false); err != nil {
				return fmt.Errorf("disable %s: %w", c.Unit, err)
			}
		}
		if c.Masked {
			if _, err := conn.MaskUnitFilesContext(ctx, []string{c.Unit}, false, false); err != nil {
				return fmt.Errorf("mask %s: %w", c.Unit, err)
			}
		}
	}
	if err := conn.ReloadContext(ctx); err != nil {
		return fmt.Errorf("reload systemd: %w", err)
	}
	return nil
}

// Restore takes back what Quiesce has recorded in statePath: it unmasks,
// enables and starts the units as they were, and removes the record. It goes
// through all units and returns the errors joined; the record is then kept.
// Without a record, or without systemd, there is nothing to do and no error.
func Restore(ctx context.Context, statePath string) error {
	var changes []UnitChange
	err := fsx.ReadJSON(statePath, &changes)
	if errors.Is(err, fs.ErrNotExist) || !Available() {
		return nil
	}
	if err != nil {
		return fmt.Errorf("restore the distribution's units: %w", err)
	}
	err = withConn(ctx, func(conn *dbus.Conn) error { return restore(ctx, conn, changes) })
	if err != nil {
		return fmt.Errorf("restore the distribution's units: %w", err)
	}
	if err := os.Remove(statePath); err != nil {
		return fmt.Errorf("restore the distribution's units: %w", err)
	}
	return fsx.SyncDir(filepath.Dir(statePath))
}

func restore(ctx context.Context, conn *dbus.Conn, changes []UnitChange) error {
	var errs []error
	for _, c := range changes {
		if c.Masked {
			if _, err := conn.UnmaskUnitFilesContext(ctx, []string{c.Unit}, false); err != nil {
				errs = append(errs, fmt.Errorf("unmask %s: %w", c.Unit, err))
				continue
			}
		}
		if c.enabled() {
			if _, _, err := conn.EnableUnitFilesContext(ctx, []string{c.Unit}, false, false); err != nil {
				errs = append(errs, fmt.Errorf("enable %s: %w", c.Unit, err))
			}
		}
	}
	if err := conn.ReloadContext(ctx); err != nil {
		return errors.Join(append(errs, fmt.Errorf("reload systemd: %w", err))...)
	}
	for _, c := range changes {
		if c.WasActive {
			if err := runJob(ctx, conn.StartUnitContext, "start", c.Unit); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}
