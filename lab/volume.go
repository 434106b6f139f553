package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Volume is a disk of a host's own, with ext4 on it, which can be filled and
// stalled without harm to the machine's.
type Volume struct {
	// Path is where the host sees it, below /var/lib/pgha.
	Path string
	// Bytes is its size. It takes up only what is written to it.
	Bytes int64
}

// mountVolumes makes the volumes and mounts them on the host's disk. The mounts
// are seen by the hosts of this lab alone, and end with the lab; the loop
// devices end with the mounts.
func (h *Host) mountVolumes(volumes []Volume) error {
	for i, v := range volumes {
		rel, ok := strings.CutPrefix(filepath.Clean(v.Path), "/var/lib/pgha/")
		if !ok {
			return fmt.Errorf("volume %s does not lie below /var/lib/pgha", v.Path)
		}
		point := filepath.Join(h.dir, "lib", rel)
		image := filepath.Join(h.dir, fmt.Sprintf("volume-%d.ext4", i))
		if err := os.MkdirAll(point, 0o755); err != nil {
			return fmt.Errorf("make mount point: %w", err)
		}
		if err := makeImage(image, v.Bytes); err != nil {
			return err
		}
		err := h.lab.do(func() error { // a child has the mounts of the thread that makes it
			return runTool("mount", "-o", "loop,noatime", image, point)
		})
		if err != nil {
			return err
		}
		h.volumes = append(h.volumes, filepath.Clean(v.Path))
	}
	return nil
}

// makeImage makes a file with an empty ext4, none of it reserved.
func makeImage(path string, bytes int64) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("make volume: %w", err)
	}
	if err := errors.Join(f.Truncate(bytes), f.Close()); err != nil {
		return fmt.Errorf("make volume: %w", err)
	}
	if err := runTool("mkfs.ext4", "-q", "-m", "0", path); err != nil {
		return err
	}
	// Programs ask for an empty directory.
	return runTool("debugfs", "-w", "-R", "rmdir lost+found", path)
}

func runTool(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, out)
	}
	return nil
}

func (h *Host) hasVolume(path string) bool { return slices.Contains(h.volumes, filepath.Clean(path)) }
