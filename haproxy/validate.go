package haproxy

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
)

// Validate has HAProxy check the configuration file at path, with the
// certificates that it names. The error carries HAProxy's own words.
func Validate(ctx context.Context, bin, path string) error {
	out, err := exec.CommandContext(ctx, bin, "-c", "-f", path).CombinedOutput()
	if err == nil {
		return nil
	}
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return fmt.Errorf("validate %s: run %s: %w", path, bin, err)
	}
	var alerts []string
	for line := range strings.Lines(string(out)) {
		line = strings.TrimSpace(line)
		// The rest are notices, and a last alert that says only that there were some.
		if _, alert, ok := strings.Cut(line, "[ALERT]"); ok && !strings.Contains(line, "Fatal errors found") {
			_, message, _ := strings.Cut(alert, " : ")
			alerts = append(alerts, strings.TrimSpace(message))
		}
	}
	if len(alerts) == 0 {
		alerts = append(alerts, strings.TrimSpace(string(out)))
	}
	return fmt.Errorf("validate %s: %s", path, strings.Join(alerts, "; "))
}
