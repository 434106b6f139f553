package haproxy

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"
)

// ErrReloadFailed says that HAProxy did not take the new configuration and goes
// on with the old one. Validate gives the reason.
var ErrReloadFailed = errors.New("haproxy refused the new configuration and goes on with the old one")

// Master speaks to the master process of an HAProxy that was started with -W and
// -S Socket.
type Master struct{ Socket string }

// Worker is a worker process.
type Worker struct {
	PID     int
	Old     bool // replaced by a reload, and here until its last session ends
	Reloads int  // since it was started
}

// processes is the answer to "show proc".
type processes struct {
	reloads, failed int
	workers         []Worker
}

// Workers returns the worker processes.
func (m Master) Workers(ctx context.Context) ([]Worker, error) {
	p, err := m.processes(ctx)
	if err != nil {
		return nil, err
	}
	return p.workers, nil
}

func (m Master) processes(ctx context.Context) (processes, error) {
	answer, err := command(ctx, m.Socket, "show proc")
	if err != nil {
		return processes{}, fmt.Errorf("list HAProxy's processes: %w", err)
	}
	p, err := parseProcesses(answer)
	if err != nil {
		return processes{}, fmt.Errorf("list HAProxy's processes: %w", err)
	}
	return p, nil
}

var failedPattern = regexp.MustCompile(`\[failed: (\d+)\]`)

func parseProcesses(answer string) (processes, error) {
	var p processes
	var master, old bool
	for line := range strings.Lines(answer) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			old = strings.Contains(line, "old workers")
			continue
		}
		f := strings.Fields(line)
		if len(f) < 3 {
			continue
		}
		pid, err := strconv.Atoi(f[0])
		if err != nil {
			return processes{}, fmt.Errorf("no process id in %q", line)
		}
		reloads, err := strconv.Atoi(f[2])
		if err != nil {
			return processes{}, fmt.Errorf("no number of reloads in %q", line)
		}
		switch f[1] {
		case "master":
			master = true
			p.reloads = reloads
			if failed := failedPattern.FindStringSubmatch(line); failed != nil {
				p.failed, _ = strconv.Atoi(failed[1])
			}
		case "worker":
			p.workers = append(p.workers, Worker{PID: pid, Old: old, Reloads: reloads})
		}
	}
	if !master {
		return processes{}, fmt.Errorf("no master in %q", answer)
	}
	return p, nil
}

// Reload makes HAProxy read its configuration file again, and waits until a new
// worker serves or the attempt has failed, which is ErrReloadFailed. Sessions
// stay with the old worker. Save the servers' states first.
func (m Master) Reload(ctx context.Context) error {
	before, err := m.processes(ctx)
	if err != nil {
		return fmt.Errorf("reload HAProxy: %w", err)
	}
	// The answer tells the outcome from 2.7 on; the counters do in every version.
	// The master may close the connection before it has answered.
	_, sendErr := command(ctx, m.Socket, "reload")
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		now, err := m.processes(ctx)
		switch {
		case err != nil:
			// The master executes itself anew and is away for a moment.
		case now.failed > before.failed:
			return fmt.Errorf("reload HAProxy: %w", ErrReloadFailed)
		case now.reloads > before.reloads && hasNewWorker(before, now):
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("reload HAProxy: %w", errors.Join(ctx.Err(), sendErr, err))
		case <-tick.C:
		}
	}
}

func hasNewWorker(before, now processes) bool {
	known := map[int]bool{}
	for _, w := range before.workers {
		known[w.PID] = true
	}
	for _, w := range now.workers {
		if !w.Old && !known[w.PID] {
			return true
		}
	}
	return false
}
