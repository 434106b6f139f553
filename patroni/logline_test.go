package patroni

import (
	"log/slog"
	"testing"
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
		{"Traceback (most recent call last):", slog.LevelInfo, "Traceback (most recent call last):"},
	} {
		if l, m := ParseLogLine(tc.line); l != tc.level || m != tc.msg {
			t.Errorf("%q gave %v %q, want %v %q", tc.line, l, m, tc.level, tc.msg)
		}
	}
}
