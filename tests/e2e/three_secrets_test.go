package e2e

import (
	"bytes"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgha/cluster"
	"pgha/pki"
)

// secrets: nothing secret is on the witness, in a log, on a command line or in
// an environment.
func (c *trio) secrets(t *testing.T) {
	hidden, tokens := c.hidden(t)
	// The search finds what is there to be found.
	if got := c.search(t, "n1", []string{"/var/lib/pgha/patroni"}, hidden); !slices.Contains(got, "/var/lib/pgha/patroni/patroni.yml holds Patroni's password") {
		t.Errorf("Patroni's password is not found in its own configuration: %v", got)
	}
	if got := c.search(t, "n1", []string{"/var/lib/pgha/pki"}, hidden); !slices.Contains(got, "/var/lib/pgha/pki/sealing.key holds the sealing key") {
		t.Errorf("the sealing key is not found in its own file: %v", got)
	}
	everything := map[string][]byte{}
	for what, v := range hidden {
		everything[what] = v
	}
	for what, v := range tokens {
		everything[what] = v
	}
	if got := c.search(t, "witness", []string{"/var/lib/pgha", "/etc/pgha", "/run", "/var/log/pgha"}, everything); len(got) > 0 {
		t.Errorf("on the witness: %s", strings.Join(got, "; "))
	}
	for _, name := range []string{"sealing.key", "ca.key.sealed", "secrets.sealed", "stats-password", "patroni.pem", "postgres.pem", "haproxy.pem", "admin.pem"} {
		for _, dir := range []string{"/var/lib/pgha", "/var/lib/pgha/pki"} {
			if _, err := os.Stat(c.Host("witness").Path(filepath.Join(dir, name))); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("the witness has %s in %s: %v", name, dir, err)
			}
		}
	}
	for _, h := range trioHosts {
		if got := c.search(t, h, []string{"/var/log/pgha"}, everything); len(got) > 0 {
			t.Errorf("in the logs of %s: %s", h, strings.Join(got, "; "))
		}
		said := []byte(c.Errors(h))
		for what, v := range everything {
			if bytes.Contains(said, v) {
				t.Errorf("pgha on %s printed %s", h, what)
			}
		}
		c.processesHide(t, h, hidden)
	}
}

// hidden returns all that must not be seen, by its name in messages: the
// cluster's secrets, and those of the join tokens, which are only typed once.
func (c *trio) hidden(t *testing.T) (secrets, tokens map[string][]byte) {
	t.Helper()
	s := c.secretsOf(t, "n1")
	keyText := bytes.TrimSpace(c.readFile(t, "n1", "/var/lib/pgha/pki/sealing.key"))
	raw, err := base64.StdEncoding.DecodeString(string(keyText))
	if err != nil {
		t.Fatal(err)
	}
	key, err := cluster.SealingKeyFrom(raw)
	if err != nil {
		t.Fatal(err)
	}
	node, err := c.pkiOf("n1").Bundle(pki.RoleNode)
	if err != nil {
		t.Fatal(err)
	}
	id, err := pki.IdentityOf(node.Leaf)
	if err != nil {
		t.Fatal(err)
	}
	caKey, err := cluster.OpenCAKey(key, id.ClusterID, c.readFile(t, "n1", "/var/lib/pgha/pki/ca.key.sealed"))
	if err != nil {
		t.Fatal(err)
	}
	login := func(user, password string) []byte {
		return base64.StdEncoding.AppendEncode(nil, []byte(user+":"+password))
	}
	secrets = map[string][]byte{
		"Patroni's password":         []byte(s.PatroniREST),
		"Patroni's password, sent":   login(cluster.PatroniRESTUser, s.PatroniREST),
		"the status page's password": []byte(s.StatsPage),
		"the status page's, sent":    login(cluster.StatsPageUser, s.StatsPage),
		"the sealing key":            keyText,
		"the sealing key, raw":       raw,
		"the CA's key":               keyLine(t, caKey),
	}
	for _, role := range cluster.RoleData.Roles() {
		b, err := c.pkiOf("n1").Bundle(role)
		if err != nil {
			t.Fatal(err)
		}
		secrets["n1's key "+string(role)] = keyLine(t, b.KeyPEM)
	}
	tokens = map[string][]byte{}
	for what, text := range map[string]string{"n2's token": c.founded.Data.Token, "the witness's token": c.founded.Witness.Token} {
		tok, err := cluster.ParseToken(text)
		if err != nil {
			t.Fatal(err)
		}
		tokens[what], tokens[what+"'s secret"] = []byte(text), []byte(tok.Secret)
	}
	return secrets, tokens
}

// keyLine is a line of a private key's PEM form that no other file has.
func keyLine(t *testing.T, data []byte) []byte {
	t.Helper()
	block, _ := pem.Decode(data)
	if block == nil {
		t.Fatal("a key is not PEM")
	}
	lines := strings.Split(string(pem.EncodeToMemory(block)), "\n")
	return []byte(lines[2]) // the first of its lines is the same for all keys of a kind
}

func (c *trio) readFile(t *testing.T, host, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(c.Host(host).Path(path))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// search looks for secrets in all files below dirs of a host.
func (c *trio) search(t *testing.T, host string, dirs []string, secrets map[string][]byte) []string {
	t.Helper()
	var found []string
	files := 0
	for _, dir := range dirs {
		err := filepath.WalkDir(c.Host(host).Path(dir), func(path string, d fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil // a draft that became a file
			}
			if err != nil || !d.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			files++
			for what, v := range secrets {
				if bytes.Contains(data, v) {
					found = append(found, fmt.Sprintf("%s holds %s", strings.TrimPrefix(path, c.Host(host).Path("/")), what))
				}
			}
			return err
		})
		if err != nil {
			t.Fatalf("search %s of %s: %v", dir, host, err)
		}
	}
	if files == 0 {
		t.Fatalf("there are no files in %v of %s to search", dirs, host)
	}
	slices.Sort(found)
	return found
}

// processesHide: no process of a host shows a secret to those who may list it.
func (c *trio) processesHide(t *testing.T, host string, secrets map[string][]byte) {
	t.Helper()
	procs, err := c.Host(host).Processes()
	if err != nil {
		t.Fatal(err)
	}
	looked := 0
	for _, p := range procs {
		env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", p.PID))
		if err != nil {
			continue // it has ended
		}
		looked++
		shown := append([]byte(strings.Join(p.Cmdline, "\x00")+"\x00"), env...)
		for what, v := range secrets {
			if bytes.Contains(shown, v) {
				t.Errorf("%s on %s shows %s", p.Comm, host, what)
			}
		}
	}
	if looked < 2 {
		t.Errorf("only %d processes of %s could be looked at", looked, host)
	}
}
