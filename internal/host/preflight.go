package host

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
)

// Requirements is what a node needs of its host. Fields left at their zero
// value are not checked.
type Requirements struct {
	// Address must be on one of the host's interfaces.
	Address netip.Addr
	// Ports must be free; the key says in errors what the port is for.
	Ports map[string]uint16
	// EmptyDirs must be empty or missing.
	EmptyDirs []string
	// Space maps directories, existing or not, to the free bytes needed there.
	Space map[string]uint64
}

// Preflight checks the host and gives everything that is wrong with it, joined
// into one error, a line each. It changes nothing.
func Preflight(r Requirements) error {
	if !IsRoot() {
		// Without root the checks below see only half of the machine.
		return errors.New("not root: run the command with sudo")
	}
	var errs []error
	if r.Address.IsValid() {
		errs = append(errs, checkAddress(r.Address))
	}
	for _, name := range slices.Sorted(maps.Keys(r.Ports)) {
		errs = append(errs, checkPort(name, r.Ports[name]))
	}
	for _, dir := range r.EmptyDirs {
		empty, err := DirEmpty(dir)
		if err == nil && !empty {
			err = fmt.Errorf("directory %s is not empty: move its content away, or name another", dir)
		}
		errs = append(errs, err)
	}
	for _, dir := range slices.Sorted(maps.Keys(r.Space)) {
		free, _, err := DiskFree(dir)
		if need := r.Space[dir]; err == nil && free < need {
			err = fmt.Errorf("disk nearly full: %s has %d MiB free, %d MiB are needed", dir, free>>20, need>>20)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

func checkAddress(a netip.Addr) error {
	has, err := HasAddress(a)
	if err != nil {
		return err
	}
	if !has {
		return fmt.Errorf("address %s is not on this host: name one that is (ip addr shows them)", a)
	}
	return nil
}

func checkPort(name string, port uint16) error {
	proc, pid, found, err := PortOwner(port)
	switch {
	case err != nil:
		return err
	case found && pid == 0:
		return fmt.Errorf("port %d (%s) is taken by %s: stop it, or choose another port", port, name, proc)
	case found:
		return fmt.Errorf("port %d (%s) is taken by %s (pid %d): stop it, or choose another port", port, name, proc, pid)
	}
	return nil
}
