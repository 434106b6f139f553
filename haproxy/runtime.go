package haproxy

import (
	"bytes"
	"context"
	"encoding/csv"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"time"

	"pgha/internal/fsx"
)

// ServerState is what an operator wants of a server.
type ServerState string

// The states for Runtime.SetServerState.
const (
	StateReady ServerState = "ready" // as the checks say
	StateDrain ServerState = "drain" // no new sessions
	StateMaint ServerState = "maint" // no new sessions and no checks
)

// Runtime speaks to the newest worker of a running HAProxy. Sessions that older
// workers still carry after a reload are out of its reach. It is safe for
// concurrent use.
type Runtime struct{ Socket string }

// defaultTimeout bounds a command whose context has no deadline.
const defaultTimeout = 10 * time.Second

// maxAnswer bounds what is read of an answer.
const maxAnswer = 16 << 20

// command sends one command and returns the answer.
func command(ctx context.Context, socket, cmd string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, defaultTimeout)
	defer cancel()
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: socket, Net: "unix"})
	if err != nil {
		return "", fmt.Errorf("connect to HAProxy: %w", err)
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })
	defer stop()
	if _, err := io.WriteString(conn, cmd+"\n"); err != nil {
		return "", fmt.Errorf("send to HAProxy: %w", errors.Join(ctx.Err(), err))
	}
	// The master answers on the same connection for as long as it is open.
	if err := conn.CloseWrite(); err != nil {
		return "", fmt.Errorf("send to HAProxy: %w", err)
	}
	var out bytes.Buffer
	if _, err := io.Copy(&out, io.LimitReader(conn, maxAnswer)); err != nil {
		return "", fmt.Errorf("read HAProxy's answer: %w", errors.Join(ctx.Err(), err))
	}
	return strings.TrimSpace(out.String()), nil
}

// silent runs a command that answers nothing, or one of the given words, when it
// is done.
func (r Runtime) silent(ctx context.Context, cmd string, fine ...string) error {
	answer, err := command(ctx, r.Socket, cmd)
	if err != nil {
		return err
	}
	if answer == "" {
		return nil
	}
	for _, f := range fine {
		if strings.Contains(answer, f) {
			return nil
		}
	}
	return fmt.Errorf("haproxy refused: %s", strings.Join(strings.Fields(answer), " "))
}

func target(backend, server string) (string, error) {
	if !namePattern.MatchString(backend) || !namePattern.MatchString(server) {
		return "", fmt.Errorf("%q and %q do not name a server", backend, server)
	}
	return backend + "/" + server, nil
}

// SetServerState sets the administrative state of a server. StateReady leaves it
// to the checks whether the server is up.
func (r Runtime) SetServerState(ctx context.Context, backend, server string, state ServerState) error {
	return r.onServer(ctx, "set the state of a server", "set server %s state "+string(state), backend, server)
}

// SetServerHealth makes a server up or down now, as if checks had found it so.
// The next checks may find otherwise. Down cuts the sessions of a replica.
func (r Runtime) SetServerHealth(ctx context.Context, backend, server string, up bool) error {
	health := "down"
	if up {
		health = "up"
	}
	return r.onServer(ctx, "set the health of a server", "set server %s health "+health, backend, server)
}

// ShutdownSessions cuts all sessions to a server.
func (r Runtime) ShutdownSessions(ctx context.Context, backend, server string) error {
	return r.onServer(ctx, "cut the sessions to a server", "shutdown sessions server %s", backend, server)
}

func (r Runtime) onServer(ctx context.Context, what, format, backend, server string) error {
	t, err := target(backend, server)
	if err == nil {
		err = r.silent(ctx, fmt.Sprintf(format, t))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return nil
}

// SetCert replaces the certificate that was loaded from path, for all binds and
// servers that use it, without a reload. The file itself is the caller's to
// write, for the next reload. A pem that does not fit changes nothing.
func (r Runtime) SetCert(ctx context.Context, path string, pem []byte) error {
	return r.replace(ctx, "cert", path, pem)
}

// SetCA replaces the CA file that was loaded from path, like SetCert. HAProxy
// 2.6 was seen to crash when a certificate and a CA file are both replaced so
// while health checks use them: a Master.Reload is the safe way.
func (r Runtime) SetCA(ctx context.Context, path string, pem []byte) error {
	return r.replace(ctx, "ca-file", path, pem)
}

func (r Runtime) replace(ctx context.Context, kind, path string, pem []byte) error {
	if !pathPattern.MatchString(path) {
		return fmt.Errorf("replace a certificate in HAProxy: %q is no path that it can have loaded", path)
	}
	// An empty line would end the payload.
	var lines []string
	for line := range strings.Lines(string(pem)) {
		if line = strings.TrimSpace(line); line != "" {
			lines = append(lines, line)
		}
	}
	set := fmt.Sprintf("set ssl %s %s <<\n%s\n", kind, path, strings.Join(lines, "\n"))
	if err := r.silent(ctx, set, "ransaction created", "ransaction updated"); err != nil {
		return fmt.Errorf("replace %s in HAProxy: %w", path, err)
	}
	if err := r.silent(ctx, fmt.Sprintf("commit ssl %s %s", kind, path), "Success!"); err != nil {
		_, abort := command(ctx, r.Socket, fmt.Sprintf("abort ssl %s %s", kind, path))
		return fmt.Errorf("replace %s in HAProxy: %w", path, errors.Join(err, abort))
	}
	return nil
}

// SaveState writes the servers' states to Config.StateFile, where the next
// worker reads them: call it before a reload. The file can be read by all; it
// holds addresses and states.
func (r Runtime) SaveState(ctx context.Context, stateFile string) error {
	answer, err := command(ctx, r.Socket, "show servers state")
	if err != nil {
		return fmt.Errorf("save the states of HAProxy's servers: %w", err)
	}
	if err := fsx.WriteFile(stateFile, []byte(answer+"\n"), 0o644, fsx.Keep, fsx.Keep); err != nil {
		return fmt.Errorf("save the states of HAProxy's servers: %w", err)
	}
	return nil
}

// Info returns the fields of "show info", such as "CurrConns" and "Uptime_sec".
func (r Runtime) Info(ctx context.Context) (map[string]string, error) {
	answer, err := command(ctx, r.Socket, "show info")
	if err != nil {
		return nil, fmt.Errorf("read HAProxy's information: %w", err)
	}
	info := map[string]string{}
	for line := range strings.Lines(answer) {
		if k, v, ok := strings.Cut(line, ":"); ok {
			info[k] = strings.TrimSpace(v)
		}
	}
	return info, nil
}

// ServerStat is the state of a server in a backend.
type ServerStat struct {
	Backend, Server string
	Status          string // "UP", "UP 1/2", "DOWN", "MAINT", "DRAIN", ...
	Up              bool
	Addr            string
	CheckStatus     string // "L7OK", "L4CON", "L6RSP", ...; empty before the first check
	CheckCode       int    // HTTP status of the last check, 0 when none
	CheckDuration   time.Duration
	CheckMessage    string        // why the last check failed, if HAProxy says
	LastChange      time.Duration // since the status changed
	Queue           int           // sessions waiting
	Sessions        int           // sessions now
	SessionsTotal   uint64
	BytesIn         uint64 // from clients
	BytesOut        uint64
	ConnectErrors   uint64
}

// ShowStat returns the states of all servers.
func (r Runtime) ShowStat(ctx context.Context) ([]ServerStat, error) {
	answer, err := command(ctx, r.Socket, "show stat")
	if err != nil {
		return nil, fmt.Errorf("read the states of HAProxy's servers: %w", err)
	}
	return ParseStat([]byte(answer))
}

// ParseStat reads the CSV of "show stat". Only servers are in the result, not
// the sums of frontends and backends.
func ParseStat(data []byte) ([]ServerStat, error) {
	rd := csv.NewReader(bytes.NewReader(bytes.TrimPrefix(data, []byte("# "))))
	rd.FieldsPerRecord = -1 // lines end in a comma in some versions
	rows, err := rd.ReadAll()
	if err != nil {
		return nil, fmt.Errorf("read HAProxy's statistics: %w", err)
	}
	if len(rows) == 0 {
		return nil, errors.New("read HAProxy's statistics: they are empty")
	}
	column := map[string]int{}
	for i, name := range rows[0] {
		column[name] = i
	}
	for _, name := range []string{"pxname", "svname", "status", "type"} {
		if _, ok := column[name]; !ok {
			return nil, fmt.Errorf("read HAProxy's statistics: no column %q", name)
		}
	}
	var stats []ServerStat
	for _, row := range rows[1:] {
		text := func(name string) string {
			if i, ok := column[name]; ok && i < len(row) {
				return row[i]
			}
			return ""
		}
		// A field without a value is empty, which is 0.
		number := func(name string) uint64 {
			n, _ := strconv.ParseUint(text(name), 10, 64)
			return n
		}
		if text("type") != "2" {
			continue
		}
		message := text("last_chk")
		if message == "" {
			message = text("check_desc")
		}
		stats = append(stats, ServerStat{
			Backend: text("pxname"), Server: text("svname"), Status: text("status"),
			Up: strings.HasPrefix(text("status"), "UP"), Addr: text("addr"),
			CheckStatus: strings.TrimPrefix(text("check_status"), "* "), CheckCode: int(number("check_code")),
			CheckDuration: time.Duration(number("check_duration")) * time.Millisecond, CheckMessage: message,
			LastChange: time.Duration(number("lastchg")) * time.Second,
			Queue:      int(number("qcur")), Sessions: int(number("scur")), SessionsTotal: number("stot"),
			BytesIn: number("bin"), BytesOut: number("bout"), ConnectErrors: number("econ"),
		})
	}
	return stats, nil
}
