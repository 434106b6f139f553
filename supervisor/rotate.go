package supervisor

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// rotate moves what has been read of the log file into LogFile.1. The child keeps
// its descriptor, so the file itself must stay. Where the file system can cut off
// the start of a file (ext4, xfs) that is atomic and nothing the child writes
// meanwhile is lost; LogFile.1 and LogFile are then one stream, divided at a
// block and not at a line. Elsewhere it is copy and truncate, and a line written
// in the microseconds between the two is lost.
func (t *tail) rotate() error {
	if err := t.shift(); err != nil {
		return err
	}
	cut, err := t.cutPoint()
	if err != nil {
		return err
	}
	kept := int64(0)
	if t.collapse && cut > 0 {
		if err := t.keep(0, cut); err != nil {
			return err
		}
		// Saved before: a crash between the two makes us repeat, not leave out.
		if err := t.saveAt(t.off - int64(len(t.partial)) - cut); err != nil {
			return err
		}
		if err := unix.Fallocate(int(t.f.Fd()), unix.FALLOC_FL_COLLAPSE_RANGE, 0, cut); err == nil {
			t.off -= cut
			return nil
		}
		t.collapse, kept = false, cut
	}
	return t.truncate(kept)
}

// cutPoint is how much can be cut off the start: whole blocks, all of them read,
// and not the whole file.
func (t *tail) cutPoint() (int64, error) {
	var sfs unix.Statfs_t
	if err := unix.Fstatfs(int(t.f.Fd()), &sfs); err != nil {
		return 0, fmt.Errorf("read block size: %w", err)
	}
	bs := max(int64(sfs.Bsize), 1) //nolint:unconvert // narrower on some architectures
	return (t.off - 1) / bs * bs, nil
}

// truncate empties the log file, whose first kept bytes have been copied already.
func (t *tail) truncate(kept int64) error {
	// Again while the child writes, but not for ever.
	for range 10 {
		if err := t.keep(kept, t.off); err != nil {
			return err
		}
		kept = t.off
		if err := t.readOn(maxRead); err != nil {
			return err
		}
		if t.off == kept {
			break
		}
	}
	if err := t.f.Truncate(0); err != nil {
		return fmt.Errorf("truncate log file: %w", err)
	}
	t.off = 0
	return t.saveAt(0)
}

// shift renames LogFile.1 to .2 and so on; the oldest falls off, before a new one
// is written, since the disk may be full.
func (t *tail) shift() error {
	for i := t.spec.LogKeep; i > 0; i-- {
		var err error
		if i == t.spec.LogKeep {
			err = os.Remove(t.rotated(i))
		} else {
			err = os.Rename(t.rotated(i), t.rotated(i+1))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("shift old log files: %w", err)
		}
	}
	return nil
}

func (t *tail) rotated(i int) string { return t.spec.LogFile + "." + strconv.Itoa(i) }

// keep appends the part of the log file from one offset to another to LogFile.1.
// On a full disk that part is given up: a log that grows on would be worse.
func (t *tail) keep(from, to int64) error {
	dst, err := os.OpenFile(t.rotated(1), os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o640)
	if err != nil {
		return fmt.Errorf("open old log file: %w", err)
	}
	_, err = io.Copy(dst, io.NewSectionReader(t.f, from, to-from))
	if err := errors.Join(err, dst.Close()); err != nil {
		if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
			t.log.Warn("disk full: old output is dropped", "file", t.rotated(1), "err", err)
			return nil
		}
		return fmt.Errorf("copy to old log file: %w", err)
	}
	return nil
}
