package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	clientv3 "go.etcd.io/etcd/client/v3"

	"pgha/cluster"
	"pgha/lab"
	"pgha/lab/testbed"
	"pgha/node"
)

// inputClusters are a cluster of n1 and a witness, another cluster of o1, and a
// host that is no node.
type inputClusters struct {
	bed  *testbed.Bed
	mine testbed.InitResult
	his  testbed.InitResult // o1's
	etcd *clientv3.Client   // of n1
}

// TestInputJoin gives bad input to nodes, and to a host that wants to be one.
func TestInputJoin(t *testing.T) {
	c := newInputClusters(t)
	expiring := c.token(t, "n1", "--ttl", "1m", "--witness")

	t.Run("join", c.badJoins)
	t.Run("in the middle", c.inTheMiddle)
	t.Run("on nodes", c.onNodes)
	t.Run("files", c.badFiles)
	t.Run("foreign etcd data", c.foreignEtcd)
	t.Run("unreachable", c.unreachable)
	t.Run("expired", func(t *testing.T) {
		until := time.Now().Add(2 * time.Minute)
		for _, info := range c.tokens(t) {
			if info.State == "valid" && info.Expires.Before(until) {
				until = info.Expires
			}
		}
		err := testbed.Until(within(t, inputWait), "the token to expire", func() error {
			if time.Now().After(until) {
				return nil
			}
			return fmt.Errorf("%s left", time.Until(until))
		})
		if err != nil {
			t.Fatal(err)
		}
		refuses(t, c.bed, "x1", []refusal{{name: "token", args: c.join("--witness", expiring), want: []string{"this token expired at", "pgha token create"}}}, inputRoster(c.etcd))
	})
	t.Run("and good input is taken", func(t *testing.T) {
		// Nothing of all that stands in the way.
		if _, err := c.bed.Join(within(t, inputWait), "x1", c.token(t, "n1", "--witness"), "--witness"); err != nil {
			t.Fatal(err)
		}
	})
}

func newInputClusters(t *testing.T) *inputClusters {
	t.Helper()
	c := &inputClusters{bed: newBed(t)}
	ctx := within(t, 2*inputWait)
	if err := c.bed.AddHosts(ctx, "n1", "w1", "o1", "x1"); err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	var errMine, errHis error
	wg.Go(func() {
		if c.mine, errMine = c.bed.Init(ctx, "n1"); errMine == nil {
			_, errMine = c.bed.Join(ctx, "w1", c.mine.Witness.Token, "--witness")
		}
	})
	wg.Go(func() { c.his, errHis = c.bed.Init(ctx, "o1", "--cluster", "other") })
	wg.Wait()
	err := errors.Join(errMine, errHis)
	if err == nil {
		c.etcd, err = edgeDialEtcd(c.bed.Host("n1"))
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.etcd.Close(); err != nil && !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	})
	// The last that a join writes comes after its command's end.
	err = testbed.Until(ctx, "the witness to be a full member", func() error {
		members, _, err := cluster.NewStore(c.etcd, c.mine.ClusterID).Members(ctx)
		for _, m := range members {
			if m.State != cluster.StateMember {
				err = errors.Join(err, fmt.Errorf("%s is %s", m.Name, m.State))
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// join are the arguments of a join of x1.
func (c *inputClusters) join(more ...string) []string {
	return append([]string{"join", "--no-service", "--yes", "--name", "x1", "--address", c.bed.Addr("x1")}, more...)
}

// ask runs a command that has to succeed and decodes the JSON that it prints.
func (c *inputClusters) ask(t *testing.T, v any, host string, args ...string) {
	t.Helper()
	out, errs, code := inputRun(t, c.bed.Host(host), "", args...)
	if code != 0 {
		t.Fatalf("pgha %v on %s: exit status %d: %s", args, host, code, errs)
	}
	if err := json.Unmarshal([]byte(out), v); err != nil {
		t.Fatalf("read the answer of pgha %v: %v: %s", args, err, out)
	}
}

func (c *inputClusters) token(t *testing.T, host string, args ...string) string {
	t.Helper()
	var a node.TokenAnswer
	c.ask(t, &a, host, append([]string{"token", "create", "--json"}, args...)...)
	return a.Token
}

// inputToken is a token as pgha token list shows it.
type inputToken struct {
	ID      string    `json:"id"`
	State   string    `json:"state"`
	Expires time.Time `json:"expires"`
}

func (c *inputClusters) tokens(t *testing.T) (list []inputToken) {
	t.Helper()
	c.ask(t, &list, "n1", "token", "list", "--json")
	return list
}

// mistype changes one letter in the middle of a token.
func mistype(token string) string {
	b := []byte(token)
	i := len(b) / 2
	if b[i]++; b[i] > 'z' || b[i] == '8' {
		b[i] = 'a'
	}
	return string(b)
}

func (c *inputClusters) badJoins(t *testing.T) {
	data, used := c.mine.Data.Token, c.mine.Witness.Token
	free := c.token(t, "n1", "--witness", "--uses", "20")
	var revoked node.TokenAnswer
	c.ask(t, &revoked, "n1", "token", "create", "--json", "--witness")
	c.ask(t, &struct{}{}, "n1", "token", "revoke", "--json", revoked.ID)
	preparing := fmt.Sprintf(`{"cluster_id":%q,"cluster_name":"other","node":"x1","role":"witness","phase":"preparing"}`, c.his.ClusterID)
	file := filepath.Join(c.bed.Host("x1").Dir(), "token")
	if err := os.WriteFile(file, []byte(data[:len(data)-1]+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	apt := hide("/usr/bin/apt-get", "/dev/null")
	refuses(t, c.bed, "x1", []refusal{
		{name: "a letter is missing", args: c.join(data[:len(data)-1]), want: []string{"incomplete or mistyped: copy it again, whole"}},
		{name: "a letter is missing in a file", args: c.join("--token-file", file), want: []string{"incomplete or mistyped"}},
		{name: "a letter is wrong", args: c.join(mistype(data)), want: []string{"incomplete or mistyped"}},
		{name: "cut in two", args: c.join(data[:50], data[50:]), want: []string{"join takes one token, but was given 2 arguments"}},
		{name: "another version's", args: c.join(strings.Replace(data, "pgha1_", "pgha2_", 1)), want: []string{"of version 2, this pgha reads version 1"}},
		{name: "data token for a witness", args: c.join("--witness", data), want: []string{"for a data node: run pgha join TOKEN, without --witness"}},
		{name: "witness token for a data node", args: c.join(free), want: []string{"for a witness node: run pgha join --witness TOKEN"}},
		{name: "two tokens", args: c.join(free, free), want: []string{"join takes one token"}},
		{name: "used", args: c.join("--witness", used), want: []string{"has been used by w1 at", "pgha token create"}},
		{name: "revoked", args: c.join("--witness", revoked.Token), want: []string{revoked.ID + " was revoked", "pgha token create"}},
		{name: "for another node", args: c.join("--witness", c.token(t, "n1", "--witness", "--name", "y1")), want: []string{"is for the node y1, not for x1"}},
		{name: "name of the witness", args: c.join("--witness", "--name", "w1", free), want: []string{"has a member w1 already (" + c.bed.Addr("w1"), "choose another name"}},
		{name: "name of the first node", args: c.join("--name", "n1", data), want: []string{"has a member n1 already", "choose another name"}},
		{name: "address of the witness", args: c.join("--witness", "--address", c.bed.Addr("w1"), free), before: alias(c.bed.Addr("w1")),
			want: []string{"member w1 has the address " + c.bed.Addr("w1") + " already"}},
		{name: "address of nobody", args: c.join("--witness", "--address", "10.123.0.200", free), want: []string{"10.123.0.200 is not on this host"}},
		{name: "reserved name", args: c.join("--witness", "--name", "admin", free), want: []string{`"admin" is reserved`}},
		{name: "load balancer's name", args: c.join("--san", "-", data), want: []string{"--san"}},
		{name: "a flag of init", args: c.join("--cluster", "x", data), want: []string{"not defined: -cluster", "pgha join --help"}},
		{name: "nobody to ask", args: []string{"join", "--no-service", "--name", "x1", data}, want: []string{"no terminal to ask on", "--yes"}},
		{name: "packages missing, install refused", args: []string{"join", "--no-service", "--name", "x1", data}, before: both(apt, hide("/usr/bin/patroni", "/dev/null")),
			want: []string{"patroni, python3-etcd, python3-idna must be installed", "--yes"}},
		{name: "another PostgreSQL", args: c.join(data), before: both(apt, hide("/usr/lib/postgresql", ""), place("/usr/lib/postgresql/17/bin/postgres", "")),
			want: []string{"PostgreSQL 15 is needed and not installed here: install postgresql-15"}},
		{name: "port taken", args: c.join("--witness", free), before: listen(c.bed.Addr("x1"), "2380"), want: []string{"port 2380 (etcd_peer) is taken by python3 (pid "}},
		{name: "data directory not empty", args: c.join(data), before: place("/var/lib/pgha/postgres/15/data/base", ""), want: []string{"is not empty"}},
		{name: "half a join to another cluster", args: c.join("--witness", free), before: place("/var/lib/pgha/state.json", preparing),
			want: []string{"unfinished join of this host is to cluster " + c.his.ClusterID, "of cluster " + c.mine.ClusterID, "pgha reset"}},
	}, inputRoster(c.etcd))
}

// inTheMiddle has somebody else answer at the address that the token names: he
// learns nothing, and is found out.
func (c *inputClusters) inTheMiddle(t *testing.T) {
	x := c.bed.Host("x1")
	key, cert := filepath.Join(x.Dir(), "mitm.key"), filepath.Join(x.Dir(), "mitm.crt")
	inputDo(t, x, "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
		"-subj", "/CN=n1", "-addext", "subjectAltName=IP:"+c.bed.Addr("n1"), "-keyout", key, "-out", cert)
	bundle := filepath.Join(x.Dir(), "o1.pem")
	data, err := os.ReadFile(c.bed.Host("o1").Path("/var/lib/pgha/pki/node.pem"))
	if err == nil {
		err = os.WriteFile(bundle, data, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	answer := func(cert, key string, more ...string) func(*testing.T, *lab.Host) {
		args := append([]string{"s_server", "-accept", "8432", "-cert", cert, "-key", key, "-quiet"}, more...)
		return both(alias(c.bed.Addr("n1")), inputServing(apiOf(c.bed, "n1"), "openssl", args...))
	}
	want := []string{apiOf(c.bed, "n1") + " does not prove that it is of the token's cluster", "someone in the middle", "nothing was sent"}
	refuses(t, c.bed, "x1", []refusal{
		{name: "with a certificate of his own", args: c.join(c.mine.Data.Token), before: answer(cert, key), want: want},
		{name: "with another cluster's", args: c.join(c.mine.Data.Token), before: answer(bundle, bundle, "-cert_chain", bundle), want: want},
	}, inputRoster(c.etcd))
}

func (c *inputClusters) onNodes(t *testing.T) {
	roster := inputRoster(c.etcd)
	n1 := []string{"init", "--no-service", "--yes", "--name", "n1", "--address", c.bed.Addr("n1")}
	refuses(t, c.bed, "n1", []refusal{
		{name: "init on a node", args: n1, want: []string{`already node "n1" of cluster "main" (` + c.mine.ClusterID, "pgha status", "pgha reset"}},
		{name: "join on a node", args: []string{"join", "--no-service", "--yes", c.his.Data.Token}, want: []string{`already node "n1" of cluster "main"`, "pgha reset"}},
		{name: "run beside the daemon", args: []string{"run"}, want: []string{"pgha runs on this host already (pid ", "pgha status"}},
		{name: "token that lives too short", args: []string{"token", "create", "--ttl", "1s"}, want: []string{"a token lives 1m0s to 168h0m0s, not 1s"}},
		{name: "token that lives too long", args: []string{"token", "create", "--ttl", "1000h"}, want: []string{"not 1000h0m0s"}},
		{name: "token that lives never", args: []string{"token", "create", "--ttl", "0s"}, want: []string{"--ttl"}},
		{name: "token with too many uses", args: []string{"token", "create", "--uses", "99"}, want: []string{"1 to 20 uses, not 99"}},
		{name: "token without a use", args: []string{"token", "create", "--uses", "0"}, want: []string{"--uses"}},
		{name: "token for a bad name", args: []string{"token", "create", "--name", "Y"}, want: []string{`"Y" is not allowed`}},
		{name: "token for one, used by many", args: []string{"token", "create", "--name", "y", "--uses", "2"}, want: []string{"one node y cannot have 2 uses"}},
		{name: "revoke of nothing", args: []string{"token", "revoke", "0123"}, want: []string{`no token "0123"`, "pgha token list"}},
		{name: "revoke of a path", args: []string{"token", "revoke", "../members/w1"}, want: []string{"no token"}},
		{name: "psql on nobody", args: []string{"psql", "--node", "n7"}, want: []string{`"n7" is no data node of this cluster: use one of n1`}},
		{name: "psql on the witness", args: []string{"psql", "--node=w1"}, want: []string{`"w1" is no data node`}},
		{name: "logs of nothing", args: []string{"logs", "mysql"}, want: []string{`no component "mysql"`}},
		{name: "tokens without root", args: []string{"token", "list"}, user: "nobody", want: []string{"this needs root: run it with sudo"}},
		{name: "reset with nobody to ask", args: []string{"reset"}, want: []string{"--yes", "nothing was changed"}},
	}, roster)
	refuses(t, c.bed, "w1", []refusal{
		{name: "join twice", args: []string{"join", "--witness", "--no-service", "--yes", c.mine.Witness.Token}, want: []string{`already node "w1" of cluster "main"`}},
		{name: "init on a witness", args: []string{"init", "--no-service", "--yes"}, want: []string{`already node "w1"`}},
		{name: "psql on a witness", args: []string{"psql"}, want: []string{"a witness holds no key to the data", "data node"}},
	}, roster)
	t.Run("status without root", func(t *testing.T) {
		out, _, code := inputRun(t, c.bed.Host("n1"), "nobody", "status")
		if code != 3 || !strings.Contains(out, "sudo pgha status") {
			t.Errorf("exit status %d, %q", code, out)
		}
	})
}

// badFiles lets a node that is stopped start with files that are not its own.
func (c *inputClusters) badFiles(t *testing.T) {
	if err := c.bed.Signal("o1", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	const config, state, pki = "/etc/pgha/pgha.yml", "/var/lib/pgha/state.json", "/var/lib/pgha/pki"
	run := []string{"run"}
	addr := "address: " + c.bed.Addr("o1")
	foreign := func(t *testing.T, h *lab.Host) {
		t.Helper()
		away(pki)(t, h)
		c.copyTree(t, "n1", h, pki)
	}
	refuses(t, c.bed, "o1", []refusal{
		{name: "unknown key", args: run, before: change(config, addr, addr+"\nadress: x"), want: []string{config + ":", `key "adress": there is no such key`}},
		{name: "wrong type", args: run, before: change(config, "stats: 8404", "stats: yes"), want: []string{config + ":", `key "ports.stats"`, "a number from 1 to 65535"}},
		{name: "out of range", args: run, before: change(config, "stats: 8404", "stats: 84040"), want: []string{config + ":", `key "ports.stats": 84040 is out of range`}},
		{name: "port twice", args: run, before: change(config, "stats: 8404", "stats: 8405"), want: []string{config + ":", "8405 is the port of both stats and health"}},
		{name: "bad address", args: run, before: change(config, addr, "address: o1"), want: []string{config + ":", `key "address"`, "not an IP address"}},
		{name: "another node's name", args: run, before: change(config, "name: o1", "name: n1"), want: []string{`data node "n1" of cluster "other"`, `data node "o1" of cluster "other"`, "pgha reset"}},
		{name: "another cluster's name", args: run, before: change(config, "cluster: other", "cluster: main"), want: []string{`of cluster "main"`, `of cluster "other"`}},
		{name: "no configuration", args: run, before: away(config), want: []string{config + " does not exist"}},
		{name: "no state", args: run, before: away(state), want: []string{"not a node of a cluster"}},
		{name: "init without the state", args: []string{"init", "--no-service", "--yes", "--name", "o1", "--address", c.bed.Addr("o1")}, before: away(state),
			want: []string{state + " is missing: restore that file"}},
		{name: "CA missing", args: run, before: away(pki + "/ca.crt"), want: []string{pki + "/ca.crt", "restore it from a backup"}},
		{name: "all certificates missing", args: run, before: away(pki), want: []string{pki + "/ca.crt", "restore it from a backup"}},
		{name: "another cluster's certificates", args: run, before: foreign, want: []string{c.mine.ClusterID, c.his.ClusterID, "put this node's own files back"}},
	}, nil)
}

// copyTree copies a directory of one host to another, owners and all.
func (c *inputClusters) copyTree(t *testing.T, from string, to *lab.Host, path string) {
	t.Helper()
	// Both see the machine's /tmp, where the hosts' disks are.
	bridge := filepath.Join(to.Dir(), "copy-"+filepath.Base(path))
	inputDo(t, c.bed.Host(from), "cp", "-a", path, bridge)
	inputDo(t, to, "mv", bridge, path)
}

// foreignEtcd starts a node on another cluster's etcd data. The daemon stays up
// to say what is wrong, with both clusters named, and does not touch the data.
func (c *inputClusters) foreignEtcd(t *testing.T) {
	const dir = "/var/lib/pgha/etcd"
	o1 := c.bed.Host("o1")
	t.Run("refused", func(t *testing.T) {
		away(dir)(t, o1)
		c.copyTree(t, "n1", o1, dir)
		look := func() map[string]string {
			all := map[string]string{}
			inputTree(t, o1, dir, all, func(string) bool { return false })
			return all
		}
		before := look()
		if err := c.bed.Run(within(t, inputWait), "o1"); err != nil {
			t.Fatal(err)
		}
		both := func(s string) bool {
			return strings.Contains(s, c.mine.ClusterID) && strings.Contains(s, c.his.ClusterID)
		}
		_, err := c.bed.WaitStatus(within(t, inputWait), "o1", "the refusal of the data", func(s node.Status) bool {
			return both(strings.Join(s.Problems, "\n"))
		})
		if err != nil {
			t.Fatal(err)
		}
		out, _, code := inputRun(t, o1, "", "status")
		if code != 3 || !both(out) || !strings.Contains(out, "move the directory aside") {
			t.Errorf("exit status %d; status does not say whose data this is:\n%s", code, out)
		}
		if err := c.bed.Signal("o1", syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, look()); diff != "" {
			t.Errorf("the data was changed (-before +after):\n%s", diff)
		}
	})
	if err := c.bed.Run(within(t, inputWait), "o1"); err != nil {
		t.Fatal(err)
	}
	_, err := c.bed.WaitStatus(within(t, inputWait), "o1", "the node to serve again on its own data", func(s node.Status) bool { return s.Leader == "o1" })
	if err != nil {
		t.Fatal(err)
	}
}

// unreachable asks a cluster that does not answer: its daemon is stopped, then
// its host is off. The join ends by itself, and names whom it has asked.
func (c *inputClusters) unreachable(t *testing.T) {
	args := c.join(c.his.Data.Token)
	want := []string{"no member of the cluster can be reached", apiOf(c.bed, "o1")}
	if err := c.bed.Signal("o1", syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	refuses(t, c.bed, "x1", []refusal{{name: "port closed", args: args, want: append(want, "refused")}}, nil)
	if err := c.bed.PowerOff("o1"); err != nil {
		t.Fatal(err)
	}
	refuses(t, c.bed, "x1", []refusal{{name: "host off", args: args, want: append(want, "timeout")}}, nil)
}
