package patroni

import (
	"log/slog"
	"regexp"
	"strings"
)

// logLine is Patroni's own format: time, level, message.
var logLine = regexp.MustCompile(`^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ([A-Z]+): (.*)$`)

// ParseLogLine splits a line of Patroni's log into its level and message. Other
// lines, such as those of a traceback or of pg_basebackup, are taken as
// information.
func ParseLogLine(line string) (slog.Level, string) {
	m := logLine.FindStringSubmatch(line)
	if m == nil {
		return slog.LevelInfo, strings.TrimRight(line, " \r")
	}
	switch m[1] {
	case "DEBUG":
		return slog.LevelDebug, m[2]
	case "WARNING":
		return slog.LevelWarn, m[2]
	case "ERROR", "CRITICAL":
		return slog.LevelError, m[2]
	}
	return slog.LevelInfo, m[2]
}
