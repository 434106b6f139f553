// Package testbed runs a real pgha cluster on a lab's hosts: the demo, the
// end-to-end tests and the benchmark drive it with the same commands that an
// operator would type, and watch it with real clients.
package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"pgha/lab"
	"pgha/node"
)

// Memory is what PostgreSQL is sized to on a host of a testbed.
const Memory = "512MB"

// Bed is a cluster in the making on a lab. Its methods may be called from
// several goroutines at once.
type Bed struct {
	Lab *lab.Lab
	bin string
	dir string

	mu      sync.Mutex
	daemons map[string]*daemon
}

// daemon is a pgha that runs in a host's foreground.
type daemon struct {
	cmd  *exec.Cmd
	out  *os.File
	done chan struct{}
	err  error // valid once done is closed
}

// New makes an empty lab below dir. bin is the pgha program to run.
func New(ctx context.Context, dir, bin string) (*Bed, error) {
	l, err := lab.New(ctx, lab.Options{Dir: filepath.Join(dir, "hosts")})
	if err != nil {
		return nil, err
	}
	return &Bed{Lab: l, bin: bin, dir: dir, daemons: map[string]*daemon{}}, nil
}

// Close ends everything.
func (b *Bed) Close() error { return b.Lab.Close() }

// Host returns the host called name, which must exist.
func (b *Bed) Host(name string) *lab.Host { return b.Lab.Host(name) }

// Addr returns the address of a host.
func (b *Bed) Addr(name string) string { return b.Host(name).Addr().String() }

// AddHosts makes hosts with disks of their own.
func (b *Bed) AddHosts(ctx context.Context, names ...string) error {
	for _, n := range names {
		if _, err := b.Lab.AddHost(ctx, n, lab.HostOptions{}); err != nil {
			return err
		}
	}
	return nil
}

// Pgha runs one pgha command on a host and returns its standard output. An
// error carries its standard error.
func (b *Bed) Pgha(ctx context.Context, host string, args ...string) (string, error) {
	return b.Host(host).Run(ctx, b.bin, args...)
}

// Start runs a pgha command that stays in the foreground: run, init or join
// with --no-service. Its output goes to a file that Output returns.
func (b *Bed) Start(ctx context.Context, host string, args ...string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	out, err := os.OpenFile(filepath.Join(b.dir, host+".out"), os.O_CREATE|os.O_WRONLY|os.O_APPEND|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("make output file: %w", err)
	}
	// It lives until it is stopped, whatever becomes of ctx.
	cmd := b.Host(host).Command(context.WithoutCancel(ctx), b.bin, args...)
	stderr, err := os.OpenFile(filepath.Join(b.dir, host+".err"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return errors.Join(fmt.Errorf("make output file: %w", err), out.Close())
	}
	cmd.Stdout, cmd.Stderr = out, stderr
	if err := cmd.Start(); err != nil {
		return errors.Join(fmt.Errorf("start pgha %s on %s: %w", strings.Join(args, " "), host, err), out.Close(), stderr.Close())
	}
	d := &daemon{cmd: cmd, out: out, done: make(chan struct{})}
	b.daemons[host] = d
	go func() {
		d.err = errors.Join(cmd.Wait(), out.Close(), stderr.Close())
		close(d.done)
	}()
	return nil
}

// Output returns what the host's last started daemon wrote to standard output.
func (b *Bed) Output(host string) ([]byte, error) {
	return os.ReadFile(filepath.Join(b.dir, host+".out"))
}

// Errors returns what the host's daemons wrote to standard error.
func (b *Bed) Errors(host string) string {
	data, err := os.ReadFile(filepath.Join(b.dir, host+".err"))
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func (b *Bed) daemon(host string) *daemon {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.daemons[host]
}

// InitResult is what init prints with --json.
type InitResult struct {
	Cluster   string           `json:"cluster"`
	ClusterID string           `json:"cluster_id"`
	Data      node.TokenAnswer `json:"join_token"`
	Witness   node.TokenAnswer `json:"witness_token"`
}

// Init makes host the first node, in the foreground, and waits until it
// accepts writes.
func (b *Bed) Init(ctx context.Context, host string, args ...string) (InitResult, error) {
	var r InitResult
	all := append([]string{"init", "--no-service", "--yes", "--json", "--memory", Memory, "--name", host,
		"--address", b.Addr(host), "--clients", lab.Subnet().String()}, args...)
	return r, b.startAndRead(ctx, host, &r, all...)
}

// Join makes host a node, in the foreground, and waits until it takes part.
func (b *Bed) Join(ctx context.Context, host, token string, args ...string) (node.Status, error) {
	var s node.Status
	all := append([]string{"join", "--no-service", "--yes", "--json", "--memory", Memory, "--name", host, "--address", b.Addr(host)}, args...)
	return s, b.startAndRead(ctx, host, &s, append(all, token)...)
}

// startAndRead starts a command and waits for the JSON value that it prints
// when it is ready.
func (b *Bed) startAndRead(ctx context.Context, host string, v any, args ...string) error {
	if err := b.Start(ctx, host, args...); err != nil {
		return err
	}
	d := b.daemon(host)
	return Until(ctx, args[0]+" on "+host, func() error {
		out, err := b.Output(host)
		if err != nil {
			return err
		}
		if err := json.NewDecoder(bytes.NewReader(out)).Decode(v); err == nil {
			return nil
		}
		select {
		case <-d.done:
			return Stop(fmt.Errorf("pgha %s ended: %w: %s", args[0], d.err, lastLines(b.Errors(host), 15)))
		default:
			return fmt.Errorf("it has printed no result yet; last it said: %s", lastLines(b.Errors(host), 3))
		}
	})
}

// Run starts the daemon of a host that is a node already.
func (b *Bed) Run(ctx context.Context, host string) error { return b.Start(ctx, host, "run") }

// Kill sends the host's daemon SIGKILL and waits for its end. Its children
// live on.
func (b *Bed) Kill(host string) error { return b.Signal(host, syscall.SIGKILL) }

// Signal sends a deadly signal to the host's daemon and waits for its end.
func (b *Bed) Signal(host string, sig syscall.Signal) error {
	d := b.daemon(host)
	if d == nil {
		return fmt.Errorf("no pgha was started on %s", host)
	}
	if err := b.Host(host).Signal(d.cmd, sig); err != nil {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-time.After(3 * time.Minute):
		return fmt.Errorf("pgha on %s did not end within three minutes of %v", host, sig)
	}
}

// PowerOff cuts the host's power.
func (b *Bed) PowerOff(host string) error {
	if err := b.Host(host).PowerOff(); err != nil {
		return err
	}
	if d := b.daemon(host); d != nil {
		<-d.done
	}
	return nil
}

// PowerOn boots the host and starts its daemon, as a unit would.
func (b *Bed) PowerOn(ctx context.Context, host string) error {
	if err := b.Host(host).PowerOn(ctx); err != nil {
		return err
	}
	return b.Run(ctx, host)
}

// Status asks a host's pgha status.
func (b *Bed) Status(ctx context.Context, host string) (node.Status, error) {
	var s node.Status
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var out bytes.Buffer
	cmd := b.Host(host).Command(ctx, b.bin, "status", "--json")
	var errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if ctx.Err() != nil { // it was killed, and has said nothing
		return s, fmt.Errorf("run pgha status on %s: %w", host, context.Cause(ctx))
	}
	if err != nil && !errors.As(err, &exit) {
		return s, fmt.Errorf("run pgha status on %s: %w", host, err)
	}
	if err := json.Unmarshal(out.Bytes(), &s); err != nil {
		return s, fmt.Errorf("read pgha status of %s: %w: %s%s", host, err, out.String(), errs.String())
	}
	return s, nil
}

// WaitStatus asks host until ok accepts the status.
func (b *Bed) WaitStatus(ctx context.Context, host, what string, ok func(node.Status) bool) (node.Status, error) {
	var s node.Status
	err := Until(ctx, what, func() (err error) {
		if s, err = b.Status(ctx, host); err != nil {
			return err
		}
		if !ok(s) {
			return fmt.Errorf("status is %s: %s %v; %s", s.Health, s.Verdict, s.ToDo, Members(s))
		}
		return nil
	})
	return s, err
}

// WaitHealthy waits until host says that any one node may be lost.
func (b *Bed) WaitHealthy(ctx context.Context, host string) (node.Status, error) {
	return b.WaitStatus(ctx, host, "a healthy cluster", func(s node.Status) bool { return s.Health == node.Healthy })
}

// Three brings up n1 and n2 with PostgreSQL and a witness, healthy.
func (b *Bed) Three(ctx context.Context, initArgs ...string) error {
	if err := b.AddHosts(ctx, "n1", "n2", "witness"); err != nil {
		return err
	}
	r, err := b.Init(ctx, "n1", initArgs...)
	if err != nil {
		return err
	}
	if _, err := b.Join(ctx, "n2", r.Data.Token); err != nil {
		return err
	}
	if _, err := b.Join(ctx, "witness", r.Witness.Token, "--witness"); err != nil {
		return err
	}
	_, err = b.WaitHealthy(ctx, "n1")
	return err
}

// Members writes a status's members in one line, for messages.
func Members(s node.Status) string {
	var out []string
	for _, m := range s.Members {
		out = append(out, fmt.Sprintf("%s[reach=%t pg=%s/%s tl=%d lag=%d sync=%t etcd=%s %s %v]", m.Name, m.Reachable, m.Postgres, m.State, m.Timeline, m.LagBytes, m.Sync, m.Etcd, m.Waiting, m.Problems))
	}
	return strings.Join(out, " ")
}

// stopError ends Until at once.
type stopError struct{ error }

// Stop makes an error after which Until does not try again.
func Stop(err error) error { return stopError{err} }

// Until calls f until it returns nil or ctx ends; the error then says what was
// waited for and what was last wrong.
func Until(ctx context.Context, what string, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		var stop stopError
		if errors.As(err, &stop) {
			return fmt.Errorf("wait for %s: %w", what, stop.error)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; last: %w", what, context.Cause(ctx), err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
