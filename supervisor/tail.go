package supervisor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"pgha/internal/fsx"
)

const (
	tailEvery = 200 * time.Millisecond
	saveEvery = 2 * time.Second
	lastLines = 20
	maxLine   = 64 << 10 // a longer line is split
	readChunk = 64 << 10
	// Bounds on one poll, so that a flood does not keep the lock for ever.
	maxRead      = 16 << 20
	maxRecord    = 500 // lines
	maxRotations = 8
)

// tail follows the file that a child writes its output to and logs it line by
// line. Where it stands is saved, so that the next supervisor goes on there:
// after a crash lines may be logged twice, but none is left out.
type tail struct {
	spec Spec
	log  *slog.Logger

	mu       sync.Mutex
	f        *os.File // nil until opened
	off      int64    // everything before it has been read
	partial  []byte   // read, but not yet a whole line
	record   []string // lines that may be continued; empty between polls
	ring     []string // last lines of this child
	saved    tailPos
	savedAt  time.Time
	collapse bool // the file system can cut off the start of a file
	failing  bool // the last poll failed, and that has been logged

	stop chan struct{}
	done chan struct{}
}

// tailPos is saved in NAME.tail.
type tailPos struct {
	Dev    uint64 `json:"dev"`
	Inode  uint64 `json:"inode"`
	Offset int64  `json:"offset"`
}

// openOutput opens LogFile for appending, as the child's output. It belongs to
// the child's user, who may want to open it again as /dev/stderr.
func openOutput(s Spec) (*os.File, error) {
	if err := os.MkdirAll(filepath.Dir(s.LogFile), 0o755); err != nil {
		return nil, fmt.Errorf("make directory of log file: %w", err)
	}
	f, err := os.OpenFile(s.LogFile, os.O_WRONLY|os.O_APPEND|os.O_CREATE|syscall.O_NOFOLLOW, 0o640)
	if err != nil {
		return nil, fmt.Errorf("open log file: %w", err)
	}
	if s.User != nil {
		if err := f.Chown(int(s.User.UID), int(s.User.GID)); err != nil {
			return nil, errors.Join(fmt.Errorf("set owner of log file: %w", err), f.Close())
		}
	}
	return f, nil
}

// newTail starts to follow the log of s.
func newTail(s Spec, log *slog.Logger) *tail {
	t := &tail{spec: s, log: log, collapse: true, stop: make(chan struct{}), done: make(chan struct{})}
	go func() {
		defer close(t.done)
		tick := time.NewTicker(tailEvery)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				t.poll(false)
			case <-t.stop:
				t.close()
				return
			}
		}
	}()
	return t
}

// end reads what there is, saves the position and ends the goroutine.
func (t *tail) end() { close(t.stop); <-t.done }

// begin forgets the last lines of the previous child.
func (t *tail) begin() {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.ring = nil
}

// last returns the last lines of the child's output.
func (t *tail) last() []string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return append([]string(nil), t.ring...)
}

// poll reads what has been written since the last time. final says that the
// writer is gone, so that an unfinished line is a line.
func (t *tail) poll(final bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	err := t.read(final)
	t.tell()
	if err != nil && !t.failing {
		t.log.Warn("cannot follow the output", "file", t.spec.LogFile, "err", err)
	}
	t.failing = err != nil
}

func (t *tail) read(final bool) error {
	if err := t.open(); err != nil || t.f == nil {
		return err
	}
	st, err := t.f.Stat()
	if err != nil {
		return fmt.Errorf("read size: %w", err)
	}
	if st.Size() < t.off {
		t.off, t.partial = 0, nil // somebody truncated it
	}
	for range maxRotations {
		if err := t.readOn(max(t.spec.LogMax-t.off, readChunk)); err != nil {
			return err
		}
		if t.off < t.spec.LogMax {
			break
		}
		if err := t.rotate(); err != nil {
			return err
		}
	}
	if final {
		t.flush()
	}
	if time.Since(t.savedAt) >= saveEvery {
		return t.save()
	}
	return nil
}

// readOn reads to the end of the file, or about limit bytes.
func (t *tail) readOn(limit int64) error {
	buf := make([]byte, readChunk)
	for end := t.off + limit; t.off < end; {
		n, err := t.f.ReadAt(buf, t.off)
		t.off += int64(n)
		t.split(buf[:n])
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read output: %w", err)
		}
	}
	return nil
}

// flush takes an unfinished line for a whole one.
func (t *tail) flush() {
	t.emit(t.partial)
	t.partial = nil
}

func (t *tail) split(data []byte) {
	for len(data) > 0 {
		i := bytes.IndexByte(data, '\n')
		if i < 0 {
			t.partial = append(t.partial, data...)
			if len(t.partial) > maxLine {
				t.flush()
			}
			return
		}
		t.emit(append(t.partial, data[:i]...))
		t.partial, data = nil, data[i+1:]
	}
}

func (t *tail) emit(raw []byte) {
	for len(raw) > maxLine {
		t.emit(raw[:maxLine])
		raw = raw[maxLine:]
	}
	line := strings.TrimRight(strings.ToValidUTF8(string(raw), "\uFFFD"), "\r")
	if line == "" {
		return
	}
	t.remember(line)
	if next := t.spec.Continues; len(t.record) == 0 || len(t.record) == maxRecord || next == nil || !next(t.record, line) {
		t.tell()
	}
	t.record = append(t.record, line)
}

// tell logs what has been read. Of several lines that belong together, the log
// has a summary, and all of them at Debug.
func (t *tail) tell() {
	if len(t.record) == 0 {
		return
	}
	all := strings.Join(t.record, "\n")
	level, msg := slog.LevelInfo, all
	if t.spec.ParseLine != nil {
		level, msg = t.spec.ParseLine(all)
	}
	t.log.Log(context.Background(), level, msg, "stream", "output")
	if len(t.record) > 1 {
		t.log.Debug(all, "stream", "output")
	}
	t.record = nil
}

func (t *tail) remember(line string) {
	if t.ring = append(t.ring, line); len(t.ring) > lastLines {
		t.ring = t.ring[1:]
	}
}

// open opens the log file on the first call, and again when another file has
// taken its place.
func (t *tail) open() error {
	st, err := os.Lstat(t.spec.LogFile)
	if err != nil {
		if t.f != nil || errors.Is(err, fs.ErrNotExist) {
			return nil // the child still has the old one
		}
		return fmt.Errorf("find log file: %w", err)
	}
	if t.f != nil {
		if cur, err := t.f.Stat(); err == nil && os.SameFile(cur, st) {
			return nil
		}
		// Read the old one to its end before turning to the new one.
		if err := t.readOn(maxRead); err != nil {
			return err
		}
	}
	f, err := os.OpenFile(t.spec.LogFile, os.O_RDWR|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return fmt.Errorf("open log file: %w", err)
	}
	if t.f != nil {
		t.flush()
		_ = t.f.Close()
		t.f, t.off = f, 0
		return nil
	}
	t.f = f
	return t.resume(f)
}

// resume finds where to go on in a file that was there before us: where the last
// supervisor stood, or else at its end.
func (t *tail) resume(f *os.File) error {
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("read size: %w", err)
	}
	t.off = st.Size()
	var pos tailPos
	if err := fsx.ReadJSON(t.spec.file(".tail"), &pos); err == nil {
		if dev, ino := fileID(st); dev == pos.Dev && ino == pos.Inode {
			t.off = max(pos.Offset, 0)
			if t.off > st.Size() {
				t.off = 0
			}
		}
	}
	// What came before is not logged again, but is worth showing.
	buf := make([]byte, min(t.off, 4096))
	if n, err := f.ReadAt(buf, t.off-int64(len(buf))); err == nil || errors.Is(err, io.EOF) {
		lines := strings.Split(strings.ToValidUTF8(string(buf[:n]), "\uFFFD"), "\n")
		for i, line := range lines {
			if line != "" && (i > 0 || int64(len(buf)) == t.off) {
				t.remember(line)
			}
		}
	}
	return nil
}

func fileID(st fs.FileInfo) (dev, ino uint64) {
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		return uint64(sys.Dev), sys.Ino //nolint:unconvert // Dev is narrower on some architectures
	}
	return 0, 0
}

// save writes down where to go on: at the start of an unfinished line.
func (t *tail) save() error { return t.saveAt(t.off - int64(len(t.partial))) }

func (t *tail) saveAt(off int64) error {
	st, err := t.f.Stat()
	if err != nil {
		return fmt.Errorf("read size: %w", err)
	}
	pos := tailPos{Offset: max(off, 0)}
	pos.Dev, pos.Inode = fileID(st)
	t.savedAt = time.Now()
	if pos == t.saved {
		return nil
	}
	if err := fsx.WriteJSON(t.spec.file(".tail"), pos, 0o600); err != nil {
		return fmt.Errorf("save position in output: %w", err)
	}
	t.saved = pos
	return nil
}

func (t *tail) close() {
	t.poll(false)
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.f == nil {
		return
	}
	if err := t.save(); err != nil {
		t.log.Warn("cannot save how far the output has been read", "err", err)
	}
	_ = t.f.Close()
	t.f = nil
}
