package patroni

import (
	"log/slog"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseLogLine(t *testing.T) {
	for _, tc := range []struct {
		line  string
		level slog.Level
		msg   string
	}{
		{"2026-11-23 09:00:00,123 INFO: no action. I am (n1), the leader with the lock", slog.LevelInfo, "no action. I am (n1), the leader with the lock"},
		{"2026-11-23 09:00:00,123 WARNING: Postgresql is not running.", slog.LevelWarn, "Postgresql is not running."},
		{"2026-11-23 09:00:00,123 ERROR: get_postgresql_status", slog.LevelError, "get_postgresql_status"},
		{"2026-11-23 09:00:00,123 CRITICAL: system ID mismatch", slog.LevelError, "system ID mismatch"},
		{"/run/pgha/postgres:5442 - no response", slog.LevelInfo, "/run/pgha/postgres:5442 - no response"},
	} {
		if l, m := ParseLogLine(tc.line); l != tc.level || m != tc.msg {
			t.Errorf("%q gave %v %q, want %v %q", tc.line, l, m, tc.level, tc.msg)
		}
	}
}

// What Patroni writes, and what is left of it.
const patroniLog = `2026-11-23 15:24:36,891 INFO: Lock owner: n1; I am n1
/run/pgha/postgres:5442 - no response
2026-11-23 15:24:36,891 WARNING: Exception happened during processing of request from 10.123.0.12:57052
2026-11-23 15:24:36,891 WARNING: Traceback (most recent call last):
  File "/usr/lib/python3.11/ssl.py", line 1243, in send
    return self._sslobj.write(data)
           ^^^^^^^^^^^^^^^^^^^^^^^^
ssl.SSLEOFError: EOF occurred in violation of protocol (_ssl.c:2393)
2026-11-23 15:24:36,891 ERROR: get_postgresql_status
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/patroni/api.py", line 744, in query
    with self.patroni.postgresql.connection().cursor() as cursor:
psycopg2.OperationalError: connection to server on socket "/run/pgha/postgres/.s.PGSQL.5442" failed: No such file or directory
	Is the server running locally and accepting connections on that socket?
During handling of the above exception, another exception occurred:
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/patroni/api.py", line 750, in query
    raise PostgresConnectionException('connection problems')
patroni.exceptions.PostgresConnectionException: 'connection problems'
/run/pgha/postgres:5442 - rejecting connections
2026-11-23 15:24:37,891 ERROR: failed to connect
Traceback (most recent call last):
  File "/usr/lib/python3/dist-packages/patroni/api.py", line 744, in query
psycopg2.OperationalError: failed: No such file or directory
	Is the server running locally and accepting connections on that socket?
/run/pgha/postgres:5442 - rejecting connections
Traceback (most recent call last):
  File "/usr/bin/patroni", line 8, in <module>
    sys.exit(main())
KeyError: 'x'
2026-11-23 15:24:38,891 INFO: the end`

func TestLogOfTracebacks(t *testing.T) {
	var record, got []string
	tell := func() {
		if len(record) > 0 {
			level, msg := ParseLogLine(strings.Join(record, "\n"))
			got = append(got, level.String()+" "+msg)
		}
		record = nil
	}
	for _, line := range strings.Split(patroniLog, "\n") {
		if len(record) == 0 || !ContinuesLog(record, line) {
			tell()
		}
		record = append(record, line)
	}
	tell()
	want := []string{
		"INFO Lock owner: n1; I am n1",
		"INFO /run/pgha/postgres:5442 - no response",
		"WARN Exception happened during processing of request from 10.123.0.12:57052",
		"WARN ssl.SSLEOFError: EOF occurred in violation of protocol (_ssl.c:2393)",
		"ERROR get_postgresql_status: patroni.exceptions.PostgresConnectionException: 'connection problems'",
		"INFO /run/pgha/postgres:5442 - rejecting connections",
		"ERROR failed to connect: psycopg2.OperationalError: failed: No such file or directory",
		"INFO /run/pgha/postgres:5442 - rejecting connections",
		"ERROR KeyError: 'x'",
		"INFO the end",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("records (-want +got):\n%s", diff)
	}
}
