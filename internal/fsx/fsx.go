// Package fsx writes files so that a crash or a power cut leaves either the
// old content or the new one, never a mixture.
package fsx

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// Keep as a uid or gid leaves the owner as the process creates it.
const Keep = -1

// WriteFile replaces path atomically: it writes a temporary file in the same
// directory, sets mode and owner before the content can be read, syncs it,
// renames it over path and syncs the directory. uid and gid may be Keep.
func WriteFile(path string, data []byte, mode fs.FileMode, uid, gid int) error {
	return WriteFrom(path, bytes.NewReader(data), mode, uid, gid)
}

// WriteFrom is WriteFile for content that does not have to be in memory. An error
// of r, which may be one about its content, leaves path as it was.
func WriteFrom(path string, r io.Reader, mode fs.FileMode, uid, gid int) (err error) {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, "."+filepath.Base(path)+".tmp-*")
	if err != nil {
		return fmt.Errorf("create temporary file for %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
	}()
	if uid != Keep || gid != Keep {
		if err = f.Chown(uid, gid); err != nil {
			return fmt.Errorf("set owner of %s: %w", path, err)
		}
	}
	if err = f.Chmod(mode); err != nil {
		return fmt.Errorf("set mode of %s: %w", path, err)
	}
	if _, err = io.Copy(f, r); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	if err = f.Sync(); err != nil {
		return fmt.Errorf("sync %s: %w", path, err)
	}
	if err = os.Rename(f.Name(), path); err != nil {
		return fmt.Errorf("replace %s: %w", path, err)
	}
	// The file is in place: from here on nothing must be removed.
	if cerr := f.Close(); cerr != nil {
		return fmt.Errorf("close %s: %w", path, cerr)
	}
	return SyncDir(dir)
}

// WriteJSON writes v as indented JSON with WriteFile, owned by this process.
func WriteJSON(path string, v any, mode fs.FileMode) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode %s: %w", path, err)
	}
	return WriteFile(path, append(data, '\n'), mode, Keep, Keep)
}

// ReadJSON decodes the file at path into v. A missing file gives an error that
// satisfies errors.Is(err, fs.ErrNotExist).
func ReadJSON(path string, v any) error {
	data, err := os.ReadFile(path)
	if err != nil {
		return fmt.Errorf("read %s: %w", path, err)
	}
	if err := json.Unmarshal(data, v); err != nil {
		return fmt.Errorf("decode %s: %w", path, err)
	}
	return nil
}

// SyncDir makes a rename or a removal inside dir durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open directory %s: %w", dir, err)
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", dir, err)
	}
	return nil
}
