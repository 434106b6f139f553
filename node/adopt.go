package node

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"pgha/patroni"
	"pgha/supervisor"
)

// ownedSettings are settings of an adopted PostgreSQL that pgha or Patroni
// sets itself, or that name files outside the data directory.
var ownedSettings = map[string]bool{
	"data_directory": true, "hba_file": true, "ident_file": true, "external_pid_file": true,
	"listen_addresses": true, "port": true, "unix_socket_directories": true, "cluster_name": true,
	"ssl": true, "ssl_cert_file": true, "ssl_key_file": true, "ssl_ca_file": true,
	"log_directory": true, "logging_collector": true, "log_destination": true, "stats_temp_directory": true,
	"include_dir": true, "include": true, "include_if_exists": true,
	"wal_level": true, "hot_standby": true, "max_wal_senders": true, "max_replication_slots": true,
	"synchronous_standby_names": true, "primary_conninfo": true, "primary_slot_name": true,
}

// adoptedSettings returns the settings of an adopted data directory whose
// configuration Debian keeps in /etc/postgresql: what the operator has set
// stays, what the cluster needs to own goes.
func adoptedSettings(major int, dir string) ([]byte, error) {
	conf := filepath.Join("/etc/postgresql", fmt.Sprint(major), filepath.Base(dir), "postgresql.conf")
	data, err := os.ReadFile(conf)
	if errors.Is(err, fs.ErrNotExist) {
		return []byte("# made by pgha: this data directory had no postgresql.conf\n"), nil
	}
	if err != nil {
		return nil, fmt.Errorf("read settings of the adopted PostgreSQL: %w", err)
	}
	files := [][]byte{data}
	extra, err := filepath.Glob(filepath.Join(filepath.Dir(conf), "conf.d", "*.conf"))
	if err != nil {
		return nil, fmt.Errorf("find settings of the adopted PostgreSQL: %w", err)
	}
	for _, path := range extra {
		data, err := os.ReadFile(path)
		if err != nil {
			return nil, fmt.Errorf("read settings of the adopted PostgreSQL: %w", err)
		}
		files = append(files, data)
	}
	return append([]byte("# taken over by pgha from "+conf+"\n"), keepSettings(files...)...), nil
}

// keepSettings returns the lines of postgresql.conf files that set something
// that pgha does not own.
func keepSettings(files ...[]byte) []byte {
	var out bytes.Buffer
	for _, f := range files {
		sc := bufio.NewScanner(bytes.NewReader(f))
		for sc.Scan() {
			line := strings.TrimSpace(sc.Text())
			name, _, _ := strings.Cut(strings.ReplaceAll(line, "=", " "), " ")
			if line == "" || line[0] == '#' || ownedSettings[strings.ToLower(name)] {
				continue
			}
			out.WriteString(line + "\n")
		}
	}
	return out.Bytes()
}

// stockSettings are what initdb and Debian write into every postgresql.conf: nobody
// has chosen them.
var stockSettings = map[string]string{
	"shared_buffers": "128MB", "max_connections": "100", "max_wal_size": "1GB", "min_wal_size": "80MB",
	"log_line_prefix": "%m [%p] %q%u@%d ",
}

// settingRE is a line of postgresql.conf: name, and value with or without quotes.
var settingRE = regexp.MustCompile(`^\s*([A-Za-z_][A-Za-z0-9_.]*)\s*=?\s*(?:'((?:[^'\\]|'')*)'|([^\s#'=]+))\s*(?:#.*)?$`)

// carriedSettings returns what the operator of an adopted PostgreSQL has chosen for
// himself among the parameters that pgha sizes or sets to its own taste. As settings
// of the cluster they stay, and can be changed.
func carriedSettings(conf []byte) map[string]string {
	out := map[string]string{}
	for line := range strings.Lines(string(conf)) {
		m := settingRE.FindStringSubmatch(strings.TrimRight(line, "\r\n"))
		if m == nil {
			continue
		}
		name, value := strings.ToLower(m[1]), strings.ReplaceAll(m[2], "''", "'")+m[3]
		delete(out, name) // the last one counts
		if !patroni.Adjustable(name) || value == stockSettings[name] || patroni.CheckParameter(name, value) != nil {
			continue
		}
		if patroni.IsShared(name) && patroni.CheckShared(name, value, value) != nil {
			continue // Patroni would not take it
		}
		out[name] = value
	}
	return out
}

// adoptedConf is the postgresql.conf that an adopted data directory will have.
func adoptedConf(info patroni.DataDirInfo, dir string) ([]byte, error) {
	if !info.Config {
		return adoptedSettings(info.Major, dir)
	}
	data, err := os.ReadFile(filepath.Join(dir, "postgresql.conf"))
	if errors.Is(err, fs.ErrNotExist) { // Patroni has been here
		data, err = os.ReadFile(filepath.Join(dir, "postgresql.base.conf"))
	}
	if err != nil {
		return nil, fmt.Errorf("read settings of the adopted PostgreSQL: %w", err)
	}
	return data, nil
}

// adoptRoles makes the database roles that Patroni makes at a bootstrap of its
// own, and cannot lead without. Nobody may connect to the database yet, so
// PostgreSQL is run in single-user mode.
func adoptRoles(binDir, dir string, owner *supervisor.User) error {
	// With -j a statement ends at a semicolon and an empty line.
	input := strings.Join(patroni.RoleSQL(), ";\n\n") + ";\n\n"
	cmd := exec.Command(filepath.Join(binDir, "postgres"), "--single", "-j", "-D", dir, patroni.Superuser)
	cmd.Env, cmd.Dir, cmd.Stdin = childEnv, "/", strings.NewReader(input)
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: owner.UID, Gid: owner.GID, Groups: owner.Groups}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("create database roles: %w: %s", err, strings.TrimSpace(string(out)))
	}
	// It exits with success whatever becomes of the statements.
	for line := range strings.Lines(string(out)) {
		if strings.Contains(line, "ERROR:") || strings.Contains(line, "FATAL:") {
			return fmt.Errorf("create database roles: %s", strings.TrimSpace(line))
		}
	}
	return nil
}
