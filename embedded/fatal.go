package embedded

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.etcd.io/etcd/server/v3/storage/wal"
	"go.uber.org/zap/zapcore"

	"pgha/internal/fsx"
)

// fatalRecord is what FatalFile holds: why the member last ended against its
// will. It outlives the process so that the next one need not find out again.
type fatalRecord struct {
	Time     time.Time `json:"time"`
	Cause    string    `json:"cause"`
	MemberID string    `json:"member_id,omitempty"` // hexadecimal
	Message  string    `json:"message"`
}

// causes gives each error that may be recorded its name in the file.
var causes = []struct {
	name string
	err  error
}{
	{"disk-full", ErrDiskFull},
	{"corrupt", ErrCorrupt},
	{"needs-rejoin", ErrNeedsRejoin},
	{"removed", ErrRemoved},
	{"io", ErrIO},
	{"internal", ErrInternal},
}

func causeName(err error) string {
	for _, c := range causes {
		if errors.Is(err, c.err) {
			return c.name
		}
	}
	return "internal"
}

func (r fatalRecord) err() error {
	for _, c := range causes {
		if c.name == r.Cause {
			return c.err
		}
	}
	return ErrInternal
}

// refuses reports whether the recorded cause still stands for the data of
// member id: such data does not get better by trying again.
func (r fatalRecord) refuses(id string) bool {
	if r.MemberID != id {
		return false
	}
	err := r.err()
	return errors.Is(err, ErrCorrupt) || errors.Is(err, ErrNeedsRejoin) || errors.Is(err, ErrRemoved)
}

// readRecord returns nil when there is none.
func readRecord(path string) (*fatalRecord, error) {
	var r fatalRecord
	err := fsx.ReadJSON(path, &r)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &r, nil
}

func writeRecord(path, memberID string, cause error) error {
	r := fatalRecord{Time: time.Now().UTC(), Cause: causeName(cause), MemberID: memberID, Message: cause.Error()}
	return fsx.WriteJSON(path, r, 0o600)
}

func clearRecord(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove %s: %w", path, err)
	}
	return nil
}

// fatalHook runs where etcd would end the process. See the package comment.
type fatalHook struct {
	cfg      Config
	log      *slog.Logger
	memberID atomic.Pointer[string] // of the data, once known
	once     sync.Once
	err      error         // set before ch is closed
	ch       chan struct{} // closed when etcd has failed
}

func newFatalHook(cfg Config) *fatalHook {
	return &fatalHook{cfg: cfg, log: cfg.Log, ch: make(chan struct{})}
}

// OnWrite implements zapcore.CheckWriteHook. It never returns: the goroutine
// must not go on, and to unwind it would release locks over broken state.
func (h *fatalHook) OnWrite(ce *zapcore.CheckedEntry, fields []zapcore.Field) {
	h.once.Do(func() {
		h.err = classify(ce.Message, fields)
		id := ""
		if p := h.memberID.Load(); p != nil {
			id = *p
		}
		if err := writeRecord(h.cfg.FatalFile, id, h.err); err != nil {
			// On a full disk this may fail as well; Start looks at the space.
			h.log.Error("cannot record why etcd failed", "error", err)
		}
		h.log.Error("etcd failed, this process must end", "cause", causeName(h.err), "error", h.err)
		if h.cfg.OnFatal != nil {
			h.cfg.OnFatal(h.err)
		}
		close(h.ch)
	})
	select {}
}

// classify turns etcd's last words into one of our errors. Where libraries
// format an error instead of wrapping it, only its text is left to go by.
func classify(msg string, fields []zapcore.Field) error {
	var cause error
	for _, f := range fields {
		if err, ok := f.Interface.(error); ok && f.Type == zapcore.ErrorType {
			cause = err
		}
	}
	text := msg
	if cause != nil {
		text += ": " + cause.Error()
	}
	has := func(parts ...string) bool {
		for _, p := range parts {
			if strings.Contains(text, p) {
				return true
			}
		}
		return false
	}
	switch {
	case errors.Is(cause, syscall.ENOSPC), errors.Is(cause, syscall.EDQUOT), has("no space left on device", "disk quota exceeded"):
		return fmt.Errorf("%w: %s; free space and start again", ErrDiskFull, text)
	case errors.Is(cause, syscall.EIO), errors.Is(cause, syscall.EROFS), has("input/output error", "read-only file system"):
		return fmt.Errorf("%w: %s; check the disk and the kernel's log", ErrIO, text)
	case has("tocommit", "Was the raft log corrupted, truncated, or lost"):
		return fmt.Errorf("%w: %s; %s", ErrNeedsRejoin, text, adviceRejoin)
	case errors.Is(cause, wal.ErrCRCMismatch), errors.Is(cause, wal.ErrSnapshotMismatch), errors.Is(cause, wal.ErrSnapshotNotFound),
		has("crc mismatch", "failed to read WAL", "failed to open WAL", "failed to repair WAL", "failed to unmarshal",
			"failed to open database", "failed to recover v3 backend", "invalid database", "checksum error", "freelist", "is out of range"):
		return fmt.Errorf("%w: %s; %s", ErrCorrupt, text, adviceRejoin)
	default:
		return fmt.Errorf("%w: %s", ErrInternal, text)
	}
}

// adviceRejoin is what an operator does with a member whose data is of no use.
const adviceRejoin = "take this host out of the cluster (pgha reset --force) and join it again"
