package patroni

import (
	"log/slog"
	"regexp"
	"slices"
	"strings"
)

// logLine is Patroni's own format: time, level, message.
var logLine = regexp.MustCompile(`^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+ ([A-Z]+): (.*)$`)

const traceback = "Traceback (most recent call last):"

// chained lines stand between the tracebacks of exceptions that led to each
// other.
var chained = []string{
	"During handling of the above exception, another exception occurred:",
	"The above exception was the direct cause of the following exception:",
}

func indented(line string) bool { return strings.HasPrefix(line, " ") || strings.HasPrefix(line, "\t") }

// ContinuesLog says whether a line of Patroni's log belongs to those before it:
// Python writes a traceback below the message that it is of.
func ContinuesLog(lines []string, line string) bool {
	last := lines[len(lines)-1]
	if line == traceback {
		return logLine.MatchString(last) || slices.Contains(chained, last)
	}
	if lines[0] != traceback && !strings.HasSuffix(lines[0], " "+traceback) && !slices.Contains(lines, traceback) {
		return false
	}
	// Below the calls, which Python indents by spaces, stands the exception.
	return indented(line) || slices.Contains(chained, line) || strings.HasPrefix(last, " ") && !logLine.MatchString(line)
}

// ParseLogLine splits a line of Patroni's log into its level and message. Of one
// with a traceback, the message ends with the exception. Other lines, such as
// those of pg_basebackup, are taken as information.
func ParseLogLine(record string) (slog.Level, string) {
	line, trace, _ := strings.Cut(record, "\n")
	level, msg := parseLogLine(line)
	if trace == "" {
		return level, msg
	}
	if line == traceback {
		level = slog.LevelError // nobody has caught it
	}
	exception := ""
	for _, l := range strings.Split(trace, "\n") {
		if !indented(l) && l != traceback && !slices.Contains(chained, l) {
			exception = l
		}
	}
	return level, strings.TrimPrefix(strings.TrimPrefix(msg+": "+exception, traceback), ": ")
}

func parseLogLine(line string) (slog.Level, string) {
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
