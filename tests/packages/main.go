package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"

	"pgha/internal/host"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := install(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "packages:", err)
		os.Exit(1)
	}
}

func install(ctx context.Context, names []string) error {
	present, err := installed(ctx)
	if err != nil {
		return err
	}
	var missing []host.Package
	for _, name := range names {
		if !present[name] {
			missing = append(missing, host.Package{Name: name, Why: "the tests run it"})
		}
	}
	return host.InstallPackages(ctx, missing, os.Stderr)
}

// installed gives the names of the packages that are installed.
func installed(ctx context.Context) (map[string]bool, error) {
	out, err := exec.CommandContext(ctx, "dpkg-query", "--show", "--showformat", "${db:Status-Status} ${Package}\n").Output()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return nil, fmt.Errorf("list installed packages: %w: %s", err, exit.Stderr)
	case err != nil:
		return nil, fmt.Errorf("list installed packages: %w: the tests need Debian", err)
	}
	present := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		if name, ok := strings.CutPrefix(strings.TrimSpace(line), "installed "); ok {
			present[name] = true
		}
	}
	return present, nil
}
