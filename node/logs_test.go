package node

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

// record is a line of the daemon's log.
func record(component, level, msg, more string) string {
	return fmt.Sprintf(`{"time":"2026-01-02T03:04:05.678Z","level":%q,"msg":%q,"component":%q%s}`+"\n", level, msg, component, more)
}

// tempPaths are a node's paths in a directory of the test's own.
func tempPaths(t *testing.T) Paths {
	t.Helper()
	dir := t.TempDir()
	p := Paths{Etc: dir + "/etc", Lib: dir + "/lib", Run: dir + "/run", Log: dir + "/log"}
	for _, d := range []string{p.Etc, p.Lib, p.Run, p.Log} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return p
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// messages are the last words of the lines that Logs prints.
func messages(t *testing.T, p Paths, q LogQuery) []string {
	t.Helper()
	var out bytes.Buffer
	if err := Logs(t.Context(), p, &out, q); err != nil {
		t.Fatal(err)
	}
	var got []string
	for line := range strings.Lines(out.String()) {
		f := strings.Fields(strings.TrimRight(line, "}\"\n"))
		got = append(got, f[len(f)-1])
	}
	return got
}

func TestLogsFilter(t *testing.T) {
	p := tempPaths(t)
	write(t, p.DaemonLog(), record("pgha", "INFO", "one", "")+record("etcd", "INFO", "two", "")+record("patroni", "WARN", "three", "")+
		record("join", "INFO", "four", "")+record("haproxy", "INFO", "five", "")+"{\"level\":\"INFO\",\"msg\":\"cut\n"+record("pgha", "INFO", "six", "")+"half a re")
	for _, tc := range []struct {
		name string
		q    LogQuery
		want []string
	}{
		{"everything, cut-off records too", LogQuery{Lines: 50}, []string{"one", "two", "three", "four", "five", `{"level":"INFO","msg":"cut`, "six"}},
		{"the last ones", LogQuery{Lines: 2}, []string{`{"level":"INFO","msg":"cut`, "six"}},
		{"none", LogQuery{Lines: 0}, nil},
		{"the daemon with its small parts", LogQuery{Lines: 50, Component: "pgha"}, []string{"one", "four", "six"}},
		{"the last of a component", LogQuery{Lines: 2, Component: "pgha"}, []string{"four", "six"}},
		{"etcd", LogQuery{Lines: 50, Component: "etcd"}, []string{"two"}},
		{"patroni", LogQuery{Lines: 50, Component: "patroni"}, []string{"three"}},
		{"haproxy", LogQuery{Lines: 50, Component: "haproxy"}, []string{"five"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if diff := cmp.Diff(tc.want, messages(t, p, tc.q)); diff != "" {
				t.Errorf("lines (-want +got):\n%s", diff)
			}
		})
	}
}

func TestLogsForm(t *testing.T) {
	p := tempPaths(t)
	line := record("patroni", "WARN", "no lock", `,"stream":"stderr","pid":7,"a":"b"`)
	write(t, p.DaemonLog(), line)
	var out bytes.Buffer
	if err := Logs(t.Context(), p, &out, LogQuery{Lines: 1, JSON: true}); err != nil {
		t.Fatal(err)
	}
	if out.String() != line {
		t.Errorf("JSON is %q, want %q", out.String(), line)
	}
	out.Reset()
	if err := Logs(t.Context(), p, &out, LogQuery{Lines: 1}); err != nil {
		t.Fatal(err)
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 678e6, time.UTC).Local().Format("2006-01-02 15:04:05.000")
	if want := at + " WARN  patroni   no lock a=b pid=7\n"; out.String() != want {
		t.Errorf("text is %q, want %q", out.String(), want)
	}
}

func TestLogsErrors(t *testing.T) {
	p := tempPaths(t)
	for component, want := range map[string]string{
		"":         "there is no log yet",
		"postgres": "has written no log on this host yet",
		"mysql":    `no component "mysql": use one of pgha, etcd, patroni, postgres, haproxy`,
	} {
		err := Logs(t.Context(), p, &bytes.Buffer{}, LogQuery{Component: component, Lines: 1})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("component %q: error %v, want %q", component, err, want)
		}
	}
}

func TestLogsPostgres(t *testing.T) {
	p := tempPaths(t)
	old, young := p.Log+"/postgres/postgresql-Mon.log", p.Log+"/postgres/postgresql-Tue.log"
	write(t, old, "LOG: old\n")
	write(t, young, "LOG: young\n")
	if err := os.Chtimes(old, time.Time{}, time.Now().Add(-time.Hour)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"young"}, messages(t, p, LogQuery{Component: "postgres", Lines: 9})); diff != "" {
		t.Error(diff)
	}
	var out bytes.Buffer
	if err := Logs(t.Context(), p, &out, LogQuery{Component: "postgres", Lines: 9, JSON: true}); err != nil {
		t.Fatal(err)
	}
	if want := `{"component":"postgres","msg":"LOG: young"}` + "\n"; out.String() != want {
		t.Errorf("JSON is %q, want %q", out.String(), want)
	}
}

// sink collects what a followed log prints.
type sink struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *sink) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *sink) wait(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		s.mu.Lock()
		got := s.b.String()
		s.mu.Unlock()
		if got == want {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("the log shows %q, want %q", got, want)
		}
	}
}

func TestLogsFollow(t *testing.T) {
	defer goleak.VerifyNone(t)
	p := tempPaths(t)
	line := func(n int) string { return record("pgha", "INFO", fmt.Sprint("line ", n), "") }
	write(t, p.DaemonLog(), line(1)+line(2)+line(3)[:20])
	ctx, cancel := context.WithCancel(t.Context())
	out, ended := &sink{}, make(chan error, 1)
	go func() { ended <- Logs(ctx, p, out, LogQuery{Lines: 1, Follow: true, JSON: true}) }()
	out.wait(t, line(2))

	f, err := os.OpenFile(p.DaemonLog(), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	say := func(f *os.File, s string) {
		if _, err := f.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	say(f, line(3)[20:]+record("etcd", "INFO", "too", ""))
	all := line(2) + line(3) + record("etcd", "INFO", "too", "")
	out.wait(t, all)

	// What the old file gets after the new one is there is not lost.
	if err := os.Rename(p.DaemonLog(), p.DaemonLog()+".1"); err != nil {
		t.Fatal(err)
	}
	say(f, line(4))
	write(t, p.DaemonLog(), line(5))
	all += line(4) + line(5)
	out.wait(t, all)

	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// A line that comes between the last look at a file and the look at its
// successor is shown.
func TestFollowReadsToTheEnd(t *testing.T) {
	dir := t.TempDir()
	old, young := dir+"/old", dir+"/young"
	write(t, old, "1\n")
	write(t, young, "3\n")
	f, err := os.Open(old)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	newest := func() (string, error) {
		write(t, old, "1\n2\n") // asked for after all of it was read
		return young, nil
	}
	out := &sink{}
	show := func(line []byte) (string, bool) {
		if string(line) == "3" {
			cancel()
		}
		return string(line), true
	}
	if err := follow(ctx, out, f, nil, newest, show); err != nil {
		t.Fatal(err)
	}
	if got := out.b.String(); got != "1\n2\n3\n" {
		t.Errorf("followed %q", got)
	}
}

func TestLastLogError(t *testing.T) {
	p := tempPaths(t)
	if got := LastLogError(p); got != "" {
		t.Errorf("an error without a log: %q", got)
	}
	write(t, p.DaemonLog(), record("pgha", "ERROR", "old", "")+record("pgha", "ERROR", "problem", `,"err":"disk full"`)+
		record("etcd", "ERROR", "noise", "")+record("pgha", "INFO", "fine", "")+"{cut")
	if got := LastLogError(p); got != "problem: disk full" {
		t.Errorf("last error is %q", got)
	}
	write(t, p.DaemonLog(), record("pgha", "ERROR", "alone", ""))
	if got := LastLogError(p); got != "alone" {
		t.Errorf("last error is %q", got)
	}
}
