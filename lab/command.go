package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Command returns a command that runs inside the host, as root and with / as
// working directory (Cmd.Dir has no effect). Its environment is that of a fresh
// login; append to Cmd.Env. It gets its own process group.
//
// Cmd.Process is a guard outside the host: to signal the command itself use
// Signal. The end of the guard, by Cmd.Process.Kill or the context's, kills the
// command, though not its descendants. A command that dies by signal N gives
// exit status 128+N. Start fails if the host is off.
func (h *Host) Command(ctx context.Context, path string, args ...string) *exec.Cmd {
	return h.command(ctx, "/root", nil, path, args)
}

// CommandAs is Command as another user, with that user's groups and home. Start
// fails if there is no such user.
func (h *Host) CommandAs(ctx context.Context, name, path string, args ...string) *exec.Cmd {
	u, err := user.Lookup(name)
	if err != nil {
		return &exec.Cmd{Err: fmt.Errorf("run as %s on %s: %w", name, h.name, err)}
	}
	return h.command(ctx, u.HomeDir, []string{"--reuid", u.Uid, "--regid", u.Gid, "--init-groups"}, path, args)
}

func (h *Host) command(ctx context.Context, home string, ids []string, path string, args []string) *exec.Cmd {
	// The shell is outside the PID namespace and the command is its child, in
	// it. nsenter can fork by itself, but then stops itself when the command is
	// stopped, and stays so.
	argv := []string{
		"--no-fork", "-t", strconv.Itoa(h.PID()), "-m", "-n", "-p", "-u", "-i", "--",
		"/bin/sh", "-c", `"$@"; exit $?`, "sh", "setpriv", "--pdeathsig", "KILL",
	}
	argv = append(argv, ids...)
	argv = append(append(argv, "--", path), args...)
	cmd := exec.CommandContext(ctx, "nsenter", argv...)
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"HOME=" + home, "LANG=C.UTF-8", h.lab.marker,
	}
	if term, ok := os.LookupEnv("TERM"); ok {
		cmd.Env = append(cmd.Env, "TERM="+term)
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.WaitDelay = waitDelay
	if !h.Alive() {
		cmd.Err = h.errOff()
	}
	return cmd
}

// Run runs a command inside the host and returns what it wrote to its standard
// output. An error carries what it wrote to standard error. It returns when the
// command does, though it may have left a daemon that holds its output.
func (h *Host) Run(ctx context.Context, path string, args ...string) (string, error) {
	return runCommand(h.Command(ctx, path, args...), h.name)
}

// RunAs is Run as another user.
func (h *Host) RunAs(ctx context.Context, user, path string, args ...string) (string, error) {
	return runCommand(h.CommandAs(ctx, user, path, args...), h.name)
}

func runCommand(cmd *exec.Cmd, host string) (string, error) {
	// Files in memory, as a pipe would be waited on until the last descendant
	// has closed it.
	stdout, err := memFile("stdout")
	if err != nil {
		return "", err
	}
	defer func() { _ = stdout.Close() }()
	stderr, err := memFile("stderr")
	if err != nil {
		return "", err
	}
	defer func() { _ = stderr.Close() }()
	cmd.Stdout, cmd.Stderr = stdout, stderr
	runErr := cmd.Run()
	said, err := readBack(stdout)
	if err != nil {
		return "", err
	}
	if runErr == nil {
		return said, nil
	}
	complaint, err := readBack(stderr)
	if err != nil {
		return said, err
	}
	return said, fmt.Errorf("run on %s: %w: %s", host, runErr, strings.TrimSpace(complaint))
}

func memFile(name string) (*os.File, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make file for %s: %w", name, err)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func readBack(f *os.File) (string, error) {
	var b bytes.Buffer
	if _, err := io.Copy(&b, io.NewSectionReader(f, 0, 1<<40)); err != nil {
		return "", fmt.Errorf("read %s: %w", f.Name(), err)
	}
	return b.String(), nil
}
