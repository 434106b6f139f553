package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/term"

	"pgha/node"
)

func isTerminal(f *os.File) bool { return term.IsTerminal(int(f.Fd())) }

// printJSON writes v for programs.
func printJSON(w io.Writer, v any) error {
	e := json.NewEncoder(w)
	e.SetIndent("", "  ")
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("print: %w", err)
	}
	return nil
}

var errDeclined = errors.New("nothing was changed")

// confirm asks before something that cannot be taken back or that changes the
// host. Without a terminal there is nobody to ask.
func confirm(yes bool, question string) error {
	if yes {
		return nil
	}
	if !isTerminal(os.Stdin) {
		return fmt.Errorf("there is no terminal to ask on: run it with --yes (%w)", errDeclined)
	}
	fmt.Fprintf(os.Stderr, "%s [y/N] ", question)
	line, err := bufio.NewReader(os.Stdin).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read answer: %w", err)
	}
	switch strings.ToLower(strings.TrimSpace(line)) {
	case "y", "yes":
		return nil
	}
	return errDeclined
}

// progress tells on stderr what a command is doing or waiting for, a line a
// change, so that nobody stares at a silent screen.
type progress struct {
	start time.Time
	last  string
}

func newProgress() *progress { return &progress{start: time.Now()} }

func (p *progress) say(format string, args ...any) {
	text := fmt.Sprintf(format, args...)
	if text == p.last || text == "" {
		return
	}
	p.last = text
	fmt.Fprintf(os.Stderr, "  %5.1fs  %s\n", time.Since(p.start).Seconds(), text)
}

// waitingText says what is waited for; the daemon's own texts may begin so.
func waitingText(what string) string {
	if strings.HasPrefix(what, "waiting ") {
		return what
	}
	return "waiting: " + what
}

// waitStatus asks the local daemon until done says so. What it waits for is
// shown; when time runs out the error says what was still missing.
func waitStatus(ctx context.Context, p *progress, paths node.Paths, limit time.Duration, done func(node.Status) (bool, string)) (node.Status, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took longer than %s", limit))
	defer cancel()
	local, missing := node.NewLocal(paths), "the daemon to start"
	for {
		ask, end := context.WithTimeout(ctx, 10*time.Second)
		s, err := local.Status(ask)
		end()
		switch {
		case err == nil:
			var ok bool
			if ok, missing = done(s); ok {
				return s, nil
			}
		case !errors.Is(err, node.ErrNotRunning) && ctx.Err() == nil:
			missing = err.Error()
		}
		p.say("%s", waitingText(missing))
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				return s, fmt.Errorf("%w; still waiting: %s. The node goes on by itself: pgha status, pgha logs", context.Cause(ctx), missing)
			}
			return s, fmt.Errorf("interrupted while waiting: %s. The node goes on by itself: pgha status, pgha logs", missing)
		case <-time.After(300 * time.Millisecond):
		}
	}
}
