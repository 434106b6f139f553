package node

import (
	"bytes"
	"context"
	"crypto/sha256"
	"debug/elf"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"pgha/cluster"
	"pgha/internal/fsx"
)

const (
	// programMax is the most that a program may be, in bytes.
	programMax = 512 << 20
	// programTimeout bounds what is asked of a program that is not known yet.
	programTimeout = 30 * time.Second
	programName    = "pgha"
)

// ProgramInfo is what a program says of itself.
type ProgramInfo struct {
	Program string `json:"program"` // pgha
	Version string `json:"version"`
	Go      string `json:"go,omitempty"`
}

// Self says what this program is.
func Self(goVersion string) ProgramInfo {
	return ProgramInfo{Program: programName, Version: Version, Go: goVersion}
}

// Check says why this program could not run this host's node. It changes nothing,
// and may be asked while the node runs.
func Check(p Paths) error {
	state, cfg, err := load(p)
	if err != nil {
		return err
	}
	own, err := lookupOwners(cfg.Role)
	if err != nil {
		return err
	}
	dir := pkiDir(p, own)
	for _, r := range cfg.Role.Roles() {
		if err := dir.Verify(state.ClusterID, state.Node, r); err != nil {
			return wrongCertificates(err)
		}
	}
	if cfg.Role != cluster.RoleData {
		return nil
	}
	if _, err := cluster.LoadSealingKey(p.sealingKey()); err != nil {
		return fmt.Errorf("load sealing key: %w", err)
	}
	return nil
}

// Inspect says what the program at path is, and its SHA-256 in hexadecimal. It
// fails for everything that is no pgha for this host.
func Inspect(ctx context.Context, path string) (ProgramInfo, string, error) {
	var info ProgramInfo
	st, err := os.Stat(path)
	switch {
	case err != nil:
		return info, "", fmt.Errorf("read program: %w", err)
	case !st.Mode().IsRegular():
		return info, "", fmt.Errorf("%s is no program: give the file of a pgha", path)
	case st.Size() > programMax:
		return info, "", fmt.Errorf("%s is %s, no pgha is as large", path, FormatBytes(uint64(st.Size())))
	}
	if err := checkMachine(path); err != nil {
		return info, "", err
	}
	if st.Mode().Perm()&0o111 == 0 {
		return info, "", fmt.Errorf("%s may not be executed: chmod +x %s", path, path)
	}
	sum, err := fileSum(path)
	if err != nil {
		return info, "", err
	}
	out, err := askProgram(ctx, path, "version", "--json")
	if err != nil {
		return info, sum, fmt.Errorf("%s does not say its version, so it is no pgha that works here: %w", path, err)
	}
	if err := json.Unmarshal(out, &info); err != nil || info.Program != programName || info.Version == "" {
		return info, sum, fmt.Errorf("%s is no pgha: asked for its version it says %q", path, firstLine(string(out)))
	}
	return info, sum, nil
}

// checkMachine refuses what this host's kernel would not run, and says why.
func checkMachine(path string) error {
	own, err := elf.Open(ownImage)
	if err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	defer func() { _ = own.Close() }()
	f, err := elf.Open(path)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) {
			return fmt.Errorf("read program: %w", err)
		}
		return fmt.Errorf("%s is no program for Linux: give the file of a pgha, unpacked", path)
	}
	defer func() { _ = f.Close() }()
	if f.Machine != own.Machine || f.Class != own.Class || f.Data != own.Data {
		return fmt.Errorf("%s is a program for %s, this host is %s: get the one for this architecture", path, machineName(f.Machine), machineName(own.Machine))
	}
	return nil
}

func machineName(m elf.Machine) string {
	return strings.ToLower(strings.TrimPrefix(m.String(), "EM_"))
}

func fileSum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("read program: %w", err)
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read program: %w", err)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// askProgram runs a program that is not known to work.
func askProgram(ctx context.Context, path string, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, programTimeout, fmt.Errorf("it has not ended within %s", programTimeout))
	defer cancel()
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env, cmd.Dir, cmd.WaitDelay = childEnv, "/", time.Second
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &limited{w: &out}, &limited{w: &complaint}
	err := cmd.Run()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	if err != nil {
		if text := firstLine(complaint.String()); text != "" {
			return nil, fmt.Errorf("%w: %s", err, strings.TrimPrefix(text, "pgha: "))
		}
		return nil, err
	}
	return out.Bytes(), nil
}

// limited keeps the beginning of what is written to it.
type limited struct{ w *bytes.Buffer }

func (l *limited) Write(p []byte) (int, error) {
	if room := 64<<10 - l.w.Len(); room > 0 {
		l.w.Write(p[:min(room, len(p))])
	}
	return len(p), nil
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(strings.TrimSpace(s), "\n")
	return line
}

// receive stores a program beside the installed one, if it is the one that sum
// names and nothing longer than a program may be.
func receive(installed, sum string, r io.Reader) error {
	err := fsx.WriteFrom(candidate(installed), &checked{r: io.LimitReader(r, programMax+1), sum: sum, h: sha256.New()}, 0o755, fsx.Keep, fsx.Keep)
	switch {
	case errors.Is(err, fs.ErrPermission), errors.Is(err, syscall.EROFS):
		return fmt.Errorf("store the new program: %s, where the installed one lies, cannot be written: replace it by hand and restart pgha: %w", filepath.Dir(installed), err)
	case err != nil:
		return fmt.Errorf("store the new program: %w", err)
	}
	return nil
}

// checked ends with an error when what was read is not what it should be.
type checked struct {
	r   io.Reader
	sum string
	h   interface {
		io.Writer
		Sum(b []byte) []byte
	}
	n int64
}

func (c *checked) Read(p []byte) (int, error) {
	k, err := c.r.Read(p)
	_, _ = c.h.Write(p[:k]) // never fails
	if c.n += int64(k); c.n > programMax {
		return k, fmt.Errorf("it is longer than %s", FormatBytes(programMax))
	}
	if errors.Is(err, io.EOF) && hex.EncodeToString(c.h.Sum(nil)) != c.sum {
		return k, errors.New("what came is not what was announced: its checksum differs")
	}
	return k, err
}

// keepInstalled sees to it that the installed program is the one that runs: it is
// what a trial that fails falls back to. An operator may have replaced it.
func keepInstalled(installed string) error {
	running, err := fileSum(ownImage)
	if err != nil {
		return err
	}
	if sum, err := fileSum(installed); err == nil && sum == running {
		return nil
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.Open(ownImage)
	if err != nil {
		return fmt.Errorf("read this program: %w", err)
	}
	defer func() { _ = f.Close() }()
	if err := fsx.WriteFrom(installed, f, 0o755, fsx.Keep, fsx.Keep); err != nil {
		return fmt.Errorf("put back the program that runs: %w", err)
	}
	return nil
}
