package node

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"pgha/pki"
)

// LogComponents are the names that Logs takes. "pgha" is the daemon without
// its children and etcd; "postgres" is PostgreSQL's own log.
var LogComponents = []string{"pgha", "etcd", "patroni", "postgres", "haproxy"}

// LogQuery says what Logs prints.
type LogQuery struct {
	Component string // one of LogComponents; "" = all but postgres
	Lines     int    // how many matching lines back to begin
	Follow    bool   // go on until ctx ends
	JSON      bool   // as the log file has them
}

// logPoll is how often a followed log is looked at.
const logPoll = 300 * time.Millisecond

// Logs prints this node's log. It works while the daemon is down.
func Logs(ctx context.Context, p Paths, w io.Writer, q LogQuery) error {
	if q.Component != "" && !slices.Contains(LogComponents, q.Component) {
		return fmt.Errorf("there is no component %q: use one of %s", q.Component, strings.Join(LogComponents, ", "))
	}
	newest := func() (string, error) { return p.DaemonLog(), nil }
	show := func(line []byte) (string, bool) { return showRecord(line, q) }
	if q.Component == "postgres" {
		newest = func() (string, error) { return newestLog(filepath.Join(p.Log, "postgres")) }
		show = func(line []byte) (string, bool) {
			if q.JSON {
				b, err := json.Marshal(map[string]string{"component": "postgres", "msg": string(line)})
				return string(b), err == nil
			}
			return string(line), true
		}
	}
	path, err := newest()
	if err != nil {
		return err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no log yet: %s", path)
	}
	if err != nil {
		return fmt.Errorf("open log: %w", err)
	}
	defer func() { _ = f.Close() }()
	tail, rest, err := lastLines(f, q.Lines, show)
	if err != nil {
		return err
	}
	for _, l := range tail {
		fmt.Fprintln(w, l)
	}
	if !q.Follow {
		return nil
	}
	return follow(ctx, w, f, rest, newest, show)
}

// lastLines reads f to its end and returns the last n lines that show
// accepts, and what stands after the last line break.
func lastLines(f *os.File, n int, show func([]byte) (string, bool)) (tail []string, rest []byte, err error) {
	r := bufio.NewReader(f)
	for {
		line, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return tail, line, nil
		}
		if err != nil {
			return nil, nil, fmt.Errorf("read log: %w", err)
		}
		if text, ok := show(bytes.TrimSuffix(line, []byte("\n"))); ok && n > 0 {
			if len(tail) == n {
				tail = tail[1:]
			}
			tail = append(tail, text)
		}
	}
}

// follow prints what is appended, and goes on with the next file when the log
// is rotated. It closes f.
func follow(ctx context.Context, w io.Writer, f *os.File, rest []byte, newest func() (string, error), show func([]byte) (string, bool)) error {
	defer func() { _ = f.Close() }() // it was only read
	var next *os.File
	for {
		data, err := io.ReadAll(f)
		if err != nil {
			return fmt.Errorf("read log: %w", err)
		}
		rest = append(rest, data...)
		for {
			line, after, ok := bytes.Cut(rest, []byte("\n"))
			if !ok {
				break
			}
			if text, ok := show(line); ok {
				fmt.Fprintln(w, text)
			}
			rest = after
		}
		if len(data) > 0 {
			continue
		}
		if next != nil { // and nothing has come since it was there
			_ = f.Close()
			f, rest, next = next, nil, nil
			continue
		}
		if next = rotated(f, newest); next != nil {
			continue
		}
		if !sleep(ctx, logPoll) {
			return nil
		}
	}
}

// rotated opens the file that has taken f's place, or returns nil.
func rotated(f *os.File, newest func() (string, error)) *os.File {
	path, err := newest()
	if err != nil {
		return nil
	}
	now, err := os.Stat(path)
	if err != nil {
		return nil
	}
	old, err := f.Stat()
	if err != nil || os.SameFile(now, old) {
		return nil
	}
	next, err := os.Open(path)
	if err != nil {
		return nil
	}
	return next
}

// showRecord renders one record of the daemon's log for people.
func showRecord(line []byte, q LogQuery) (string, bool) {
	var m map[string]any
	if json.Unmarshal(line, &m) != nil {
		return string(line), q.Component == "" // a line cut off by a crash
	}
	comp, _ := m["component"].(string)
	if q.Component != "" && comp != q.Component && !(q.Component == "pgha" && !slices.Contains(LogComponents, comp)) {
		return "", false
	}
	if q.JSON {
		return string(line), true
	}
	at, _ := m["time"].(string)
	if t, err := time.Parse(time.RFC3339Nano, at); err == nil {
		at = t.Local().Format("2006-01-02 15:04:05.000")
	}
	var attrs strings.Builder
	for _, k := range slices.Sorted(maps.Keys(m)) {
		switch k {
		case "time", "level", "msg", "component", "stream":
		default:
			fmt.Fprintf(&attrs, " %s=%v", k, m[k])
		}
	}
	return fmt.Sprintf("%s %-5v %-9s %v%s", at, m["level"], comp, m["msg"], attrs.String()), true
}

func newestLog(dir string) (string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("list logs: %w", err)
	}
	path, at := "", time.Time{}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && !e.IsDir() && info.ModTime().After(at) {
			path, at = filepath.Join(dir, e.Name()), info.ModTime()
		}
	}
	if path == "" {
		return "", fmt.Errorf("PostgreSQL has written no log on this host yet (%s)", dir)
	}
	return path, nil
}

// LastLogError returns the daemon's last error message, for when it is down.
func LastLogError(p Paths) string {
	f, err := os.Open(p.DaemonLog())
	if err != nil {
		return ""
	}
	defer func() { _ = f.Close() }()
	tail, _, err := lastLines(f, 1, func(line []byte) (string, bool) {
		var m struct{ Level, Msg, Err, Component string }
		if json.Unmarshal(line, &m) != nil || m.Level != "ERROR" || m.Component != "pgha" {
			return "", false
		}
		return strings.TrimSuffix(m.Msg+": "+m.Err, ": "), true
	})
	if err != nil || len(tail) == 0 {
		return ""
	}
	return tail[0]
}

// CAPath is where clients on this host find the CA certificate.
func CAPath(p Paths) string { return pki.Dir{Path: p.PKI()}.CAPath() }

// AdminBundlePath is the operator's certificate, key included.
func AdminBundlePath(p Paths) string { return pki.Dir{Path: p.PKI()}.BundlePath(pki.RoleAdmin) }

// StatsPassword is the file with the password of HAProxy's status page, whose
// user is "pgha". Only root can read it.
func (p Paths) StatsPassword() string { return filepath.Join(p.Lib, "stats-password") }

// Units is the file that remembers the states of the distribution's services
// from before pgha.
func (p Paths) Units() string { return filepath.Join(p.Lib, "units.json") }
