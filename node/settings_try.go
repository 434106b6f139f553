package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"pgha/cluster"
	"pgha/internal/fsx"
	"pgha/internal/host"
	"pgha/patroni"
)

// dataFileLimit is more bytes than the version or the control file has.
const dataFileLimit = 1 << 16

// SettingsTrial asks a data node whether its PostgreSQL would start with settings.
type SettingsTrial struct {
	Settings cluster.Settings `json:"settings"`
	Names    []string         `json:"names"` // of the parameters that change
}

// SettingsVerdict is a data node's answer.
type SettingsVerdict struct {
	Refusal string `json:"refusal,omitempty"` // why PostgreSQL would not start, or pgha not render
	// Values are what the named parameters would be, as pg_settings shows them.
	Values map[string]string `json:"values,omitempty"`
}

func (n *Node) settingsTryHandler(w http.ResponseWriter, r *http.Request) {
	var t SettingsTrial
	if err := decode(w, r, &t); err != nil {
		reply(w, nil, err)
		return
	}
	reply(w, n.trySettings(r.Context(), t), nil)
}

// trySettings has the installed PostgreSQL read the whole configuration that this
// node would have, with its libraries, in a directory of its own and up to where
// it would begin to use memory and to listen.
func (n *Node) trySettings(ctx context.Context, t SettingsTrial) SettingsVerdict {
	ctx, cancel := context.WithTimeout(ctx, settingsTimeout)
	defer cancel()
	v := SettingsVerdict{Values: map[string]string{}}
	if err := n.tryPostgres(ctx, t, v.Values); err != nil {
		v.Refusal = err.Error()
	}
	return v
}

func (n *Node) tryPostgres(ctx context.Context, t SettingsTrial, values map[string]string) (err error) {
	w := n.snapshot()
	w.Settings = t.Settings
	cfg := n.patroniConfig(w)
	if w.Secrets == nil {
		return errors.New("this node cannot read the cluster's secrets yet")
	}
	if _, err := patroni.Render(cfg); err != nil {
		return err
	}
	dir, err := n.trialDir()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	params := trialParameters(cfg, w.View.Config)
	// One by one first: PostgreSQL's complaint about a single value says more.
	for _, name := range t.Names {
		for _, p := range params {
			if strings.EqualFold(p.Name, name) {
				if err := n.trialFile(trialConf(dir), []byte(confLine(p))); err != nil {
					return err
				}
				if _, err := n.trial(ctx, dir, name); err != nil {
					return err
				}
			}
		}
	}
	var conf strings.Builder
	base := filepath.Join(cfg.DataDir, "postgresql.base.conf")
	fmt.Fprintf(&conf, "include_if_exists = %s\n", confQuote(base))
	for _, p := range params {
		conf.WriteString(confLine(p))
	}
	if err := n.trialFile(trialConf(dir), []byte(conf.String())); err != nil {
		return err
	}
	for _, name := range t.Names {
		value, err := n.trial(ctx, dir, name)
		if err != nil && strings.Contains(err.Error(), "unrecognized configuration parameter") {
			continue // one of an extension that is taken away again
		}
		if err != nil {
			return err
		}
		values[name] = value
	}
	return n.tryStart(ctx, dir, cfg.PGMajor)
}

// tryStart goes as far into PostgreSQL's start as its need of memory is known:
// libraries are loaded by then.
func (n *Node) tryStart(ctx context.Context, dir string, major int) error {
	if major < 15 { // it cannot tell
		_, err := n.trial(ctx, dir, "shared_buffers")
		return err
	}
	text, err := n.trial(ctx, dir, "shared_memory_size")
	if err != nil {
		return err
	}
	mb, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		return fmt.Errorf("read PostgreSQL's need of memory: %w", err)
	}
	if have := host.Memory(); have > 0 && mb<<20 > have/10*8 {
		return fmt.Errorf("PostgreSQL would need %s of shared memory, and this host has %s: leave a fifth of it at least (shared_buffers takes the most)", FormatBytes(mb<<20), FormatBytes(have))
	}
	huge, err := n.trial(ctx, dir, "huge_pages")
	if err != nil || huge != "on" {
		return err
	}
	pages, err := n.trial(ctx, dir, "shared_memory_size_in_huge_pages")
	if err != nil {
		return err
	}
	need, err := strconv.Atoi(pages)
	if err != nil {
		return fmt.Errorf("read PostgreSQL's need of huge pages: %w", err)
	}
	if have := hugePages(); have < need {
		return fmt.Errorf("huge_pages=on needs %d huge pages, and this host has %d (vm.nr_hugepages): use try, or give it more", need, have)
	}
	return nil
}

// trialParameters are all parameters that this node's PostgreSQL would get.
func trialParameters(cfg patroni.Config, config map[string]any) []patroni.Parameter {
	params := cfg.Parameters()
	have := map[string]bool{}
	for _, p := range params {
		have[p.Name] = true
	}
	shared, _ := patroni.SharedParameters(patroni.Patched(config, cfg), cfg)
	for name, value := range shared {
		if !have[name] {
			params = append(params, patroni.Parameter{Name: name, Value: value})
		}
	}
	return params
}

// trialDir makes a directory for a trial: the configuration, and what PostgreSQL
// takes for its data as far as a trial goes, for it looks for its version and the
// control file. It stays root's: PostgreSQL's user gets the data when it is
// complete, and so cannot lead root astray with a link.
func (n *Node) trialDir() (string, error) {
	dir, err := os.MkdirTemp(n.paths.patroniDir(), "trial-")
	if err != nil {
		return "", fmt.Errorf("make directory for the trial: %w", err)
	}
	err = func() error {
		if err := os.Chmod(dir, 0o711); err != nil {
			return fmt.Errorf("prepare the trial: %w", err)
		}
		data := trialData(dir)
		if err := os.MkdirAll(filepath.Join(data, "global"), 0o700); err != nil {
			return fmt.Errorf("prepare the trial: %w", err)
		}
		for _, name := range []string{"PG_VERSION", "global/pg_control"} {
			content, err := readDataFile(n.cfg.Postgres.DataDir, name)
			if errors.Is(err, fs.ErrNotExist) {
				return errors.New("this node has no database yet: wait until it has its copy")
			}
			if err != nil {
				return fmt.Errorf("prepare the trial: %w", err)
			}
			if err := n.trialFile(filepath.Join(data, name), content); err != nil {
				return err
			}
		}
		u := n.owners.postgres
		for _, d := range []string{filepath.Join(data, "global"), data} {
			if err := os.Lchown(d, int(u.UID), int(u.GID)); err != nil {
				return fmt.Errorf("prepare the trial: %w", err)
			}
		}
		return nil
	}()
	if err != nil {
		return "", errors.Join(err, os.RemoveAll(dir))
	}
	return dir, nil
}

func trialConf(dir string) string { return filepath.Join(dir, "postgresql.conf") }

func trialData(dir string) string { return filepath.Join(dir, "data") }

// readDataFile reads one of PostgreSQL's small files. The directory belongs to
// PostgreSQL's user, who could put there a link to what root alone may read, or
// something that is no file.
func readDataFile(dir, name string) (data []byte, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, root.Close()) }()
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	st, err := f.Stat()
	switch {
	case err != nil:
		return nil, err
	case !st.Mode().IsRegular() || st.Size() > dataFileLimit:
		return nil, fmt.Errorf("%s in %s is none of PostgreSQL's files", name, dir)
	}
	return io.ReadAll(io.LimitReader(f, dataFileLimit))
}

func (n *Node) trialFile(path string, data []byte) error {
	u := n.owners.postgres
	return fsx.WriteFile(path, data, 0o600, int(u.UID), int(u.GID))
}

// trial has PostgreSQL print one parameter and returns it, or its complaint.
func (n *Node) trial(ctx context.Context, dir, name string) (string, error) {
	u := n.owners.postgres
	cmd := exec.CommandContext(ctx, filepath.Join(n.cfg.Postgres.BinDir, "postgres"),
		"-D", trialData(dir), "-c", "config_file="+trialConf(dir), "-C", name)
	cmd.Env, cmd.Dir = childEnv, "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: u.UID, Gid: u.GID, Groups: u.Groups}}
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		if text := complaintOf(complaint.String()); text != "" {
			return "", errors.New(text)
		}
		return "", fmt.Errorf("try PostgreSQL's configuration: %w", err)
	}
	return strings.TrimSuffix(out.String(), "\n"), nil
}

var logRE = regexp.MustCompile(`(LOG|FATAL|ERROR|HINT|DETAIL|PANIC):\s+(.*)`)

// complaintOf finds in what PostgreSQL wrote why it did not start.
func complaintOf(text string) string {
	var logged, fatal []string
	last, about := "", &fatal // about takes a detail or a hint
	for line := range strings.Lines(text) {
		line = strings.TrimSpace(line)
		m := logRE.FindStringSubmatch(line)
		switch {
		case m == nil:
			if line != "" {
				last = line
			}
		case m[1] == "LOG":
			if !strings.Contains(m[2], "skipping missing configuration file") {
				logged = append(logged, m[2])
			}
			about = &logged
		case (m[1] == "HINT" || m[1] == "DETAIL") && len(*about) > 0:
			(*about)[len(*about)-1] += ": " + strings.TrimSuffix(m[2], ".")
		default:
			fatal = append(fatal, strings.TrimSuffix(m[2], "."))
			about = &fatal
		}
	}
	if len(logged) > 0 { // that the file has errors says less than which
		return strings.Join(logged, "; ")
	}
	if len(fatal) > 0 {
		return strings.Join(fatal, ": ")
	}
	return last
}

// confLine is a parameter's line of postgresql.conf.
func confLine(p patroni.Parameter) string { return p.Name + " = " + confQuote(p.Value) + "\n" }

// confQuote writes a value as postgresql.conf wants it.
func confQuote(s string) string {
	return "'" + strings.NewReplacer(`'`, `''`, `\`, `\\`).Replace(s) + "'"
}

// hugePages is how many huge pages the host has.
func hugePages() int {
	data, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "HugePages_Total:"); ok {
			n, _ := strconv.Atoi(strings.TrimSpace(rest)) // 0 is none
			return n
		}
	}
	return 0
}
