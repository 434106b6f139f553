package patroni

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// harmless are complaints of Patroni's validator about the moment, or about
// itself, rather than about the configuration.
var harmless = []string{
	"is not reachable",               // etcd may start later
	"is already in use",              // Patroni itself runs, on a reload
	"must not contain \"127.0.0.1\"", // a loopback address is right where all nodes are on one host
	"bootstrap.pg_hba",               // 3.x wants it; postgresql.pg_hba is used instead
}

// Validate has Patroni check the configuration file, as OSUser when this process
// is root, and returns its complaints as one error. Complaints that do not speak
// against the file are dropped. Nothing is created.
func Validate(ctx context.Context, patroniBin, yamlPath string) error {
	cmd := exec.CommandContext(ctx, patroniBin, "--validate-config", yamlPath)
	// Patroni takes settings from PATRONI_* variables too, and must not here.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "LC_ALL=C.UTF-8", "HOME=/", "PYTHONDONTWRITEBYTECODE=1"}
	cmd.Dir = "/"
	if os.Geteuid() == 0 {
		cred, err := osCredential()
		if err != nil {
			return fmt.Errorf("validate %s: %w", yamlPath, err)
		}
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: cred}
	}
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &exit) || exit.ExitCode() != 1:
		return fmt.Errorf("validate %s: run %s: %w: %s", yamlPath, patroniBin, err, lastLine(string(out)))
	}
	if complaints := realComplaints(string(out)); len(complaints) > 0 {
		return fmt.Errorf("validate %s: %s", yamlPath, strings.Join(complaints, "; "))
	}
	return nil
}

// realComplaints returns the lines of the validator's output that are not
// harmless. A traceback is one complaint: what follows the last stack frame.
func realComplaints(out string) []string {
	if _, trace, ok := strings.Cut(out, "Traceback (most recent call last):\n"); ok {
		lines := strings.Split(strings.TrimSpace(trace), "\n")
		i := slices.IndexFunc(lines, func(l string) bool { return !strings.HasPrefix(l, " ") })
		return []string{strings.Join(strings.Fields(strings.Join(lines[max(i, 0):], " ")), " ")}
	}
	var real []string
	for line := range strings.Lines(out) {
		line = strings.TrimSpace(line)
		if line != "" && !slices.ContainsFunc(harmless, func(h string) bool { return strings.Contains(line, h) }) {
			real = append(real, line)
		}
	}
	return real
}

// osCredential returns the ids of PostgreSQL's OS user, with all its groups.
func osCredential() (*syscall.Credential, error) {
	u, err := user.Lookup(OSUser)
	if err != nil {
		return nil, fmt.Errorf("look up user %s: %w", OSUser, err)
	}
	ids, err := u.GroupIds()
	if err != nil {
		return nil, fmt.Errorf("look up groups of user %s: %w", OSUser, err)
	}
	parse := func(s string) (uint32, error) {
		n, err := strconv.ParseUint(s, 10, 32)
		if err != nil {
			return 0, fmt.Errorf("read ids of user %s: %w", OSUser, err)
		}
		return uint32(n), nil
	}
	uid, err := parse(u.Uid)
	if err != nil {
		return nil, err
	}
	gid, err := parse(u.Gid)
	if err != nil {
		return nil, err
	}
	cred := &syscall.Credential{Uid: uid, Gid: gid}
	for _, id := range ids {
		g, err := parse(id)
		if err != nil {
			return nil, err
		}
		cred.Groups = append(cred.Groups, g)
	}
	return cred, nil
}
