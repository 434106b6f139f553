package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"pgha/node"
)

func checkPsql(e edge) {
	if got := e.sql("n2", "SELECT pg_is_in_recovery(), inet_server_addr() = '"+e.bed.Addr("n1")+"'"); got != "f|t" {
		e.t.Errorf("pgha psql on the replica does not lead to the primary: %q", got)
	}
	if got := e.sql("n1", "SELECT pg_is_in_recovery(), inet_server_addr() = '"+e.bed.Addr("n2")+"'", "--node", "n2"); got != "t|t" {
		e.t.Errorf("pgha psql --node n2 does not lead to n2: %q", got)
	}
	if got := e.sql("n1", "SELECT ssl, current_user FROM pg_stat_ssl WHERE pid = pg_backend_pid()"); got != "t|postgres" {
		e.t.Errorf("pgha psql is no TLS session of the superuser: %q", got)
	}
	e.refused("witness", []string{"a witness holds no key to the data"}, "psql", "-c", "SELECT 1")
	e.refused("n1", []string{`"witness" is no data node`, "n1, n2"}, "psql", "--node", "witness", "-c", "SELECT 1")
	e.refused("n1", []string{`"nobody" is no data node`}, "psql", "--node", "nobody", "-c", "SELECT 1")
	e.refused("spare", []string{"this host is not a node"}, "psql", "-c", "SELECT 1")
	if s := e.tell("n1", "psql", "-X", "-c", "SELECT no_such_column"); s.code == 0 {
		e.t.Error("pgha psql hides psql's exit status")
	}
}

func checkTokens(e edge) {
	var a node.TokenAnswer
	e.json(e.done("n1", "token", "create", "--json"), &a)
	find := func(host string) (state string) {
		var list []struct{ ID, State string }
		out := e.done(host, "token", "list", "--json")
		if strings.Contains(out, a.Token) || strings.Contains(out, secretOf(a.Token)) {
			e.t.Error("pgha token list shows a secret")
		}
		e.json(out, &list)
		for _, k := range list {
			if k.ID == a.ID {
				state = k.State
			}
		}
		return state
	}
	for _, host := range []string{"n1", "n2", "witness"} {
		if got := find(host); got != "valid" {
			e.t.Errorf("a new token is %q on %s, want valid", got, host)
		}
	}
	e.says(e.done("n1", "token", "list"), a.ID, "valid", "used", "witness")
	e.says(e.done("witness", "token", "revoke", a.ID), a.ID)
	if got := find("n2"); got != "revoked" {
		e.t.Errorf("a revoked token is %q, want revoked", got)
	}
	e.refused("spare", []string{"the token " + a.ID + " was revoked", "pgha token create"}, e.joinArgs("spare", a.Token)...)
	e.refused("n1", []string{"there is no token", "pgha token list"}, "token", "revoke", "0123456789abcdef")
	e.refused("n1", []string{"token revoke needs one token's ID"}, "token", "revoke")
	for _, path := range []string{"/var/lib/pgha/*", "/etc/pgha/*"} {
		if left := e.files("spare", path); len(left) > 0 {
			e.t.Errorf("a refused join has left %v", left)
		}
	}
	e.quiet("spare")
	if got := edgeRoster(e.healthy("n1")); got != "n1 n2 witness" {
		e.t.Errorf("after a refused join the roster is %q", got)
	}
}

// secretOf is the part of a token that nobody may see again.
func secretOf(token string) string { return token[len(token)/2:] }

func checkJSON(e edge) {
	for _, args := range [][]string{
		{"status", "--json"}, {"token", "list", "--json"},
		{"cert", "list", "--json"}, {"cert", "renew", "--json"}, {"version", "--json"},
	} {
		for _, host := range []string{"n1", "witness"} {
			var v any
			e.json(e.done(host, args...), &v)
		}
	}
	e.refused("witness", []string{"a witness lets nobody in: make the token on n1 or n2"}, "token", "create", "--json")
	var a node.TokenAnswer
	// It stays valid, so that the firewalls do not change in the steps that follow.
	e.json(e.done("n1", "token", "create", "--json"), &a)
	if a.Role != "data" {
		e.t.Errorf("a data node's token is for a %q", a.Role)
	}
	e.json(e.done("n1", "token", "create", "--json", "--witness", "--name", "third", "--ttl", "30m"), &a)
	if a.Role != "witness" {
		e.t.Errorf("a witness's token is for a %q", a.Role)
	}
	var revoked struct{ Revoked string }
	e.json(e.done("n1", "token", "revoke", "--json", a.ID), &revoked)
	if revoked.Revoked != a.ID {
		e.t.Errorf("pgha token revoke says %+v, want %s", revoked, a.ID)
	}
}

// checkLogs asks for every component's log. With the daemon down it must work
// too.
func checkLogs(e edge, host string) {
	e.t.Helper()
	for _, component := range node.LogComponents {
		out := strings.TrimSpace(e.done(host, "logs", "-n", "3", component))
		if n := strings.Count(out, "\n") + 1; out == "" || n > 3 {
			e.t.Errorf("pgha logs -n 3 %s on %s: %d lines: %q", component, host, n, out)
		}
		for line := range strings.Lines(out) {
			if component != "postgres" && component != "pgha" && !strings.Contains(line, " "+component+" ") {
				e.t.Errorf("pgha logs %s shows another's line: %q", component, line)
			}
		}
		for line := range strings.Lines(strings.TrimSpace(e.done(host, "logs", "--json", "-n", "3", component))) {
			var rec struct{ Component, Msg string }
			if err := json.Unmarshal([]byte(line), &rec); err != nil || rec.Component == "" || rec.Msg == "" {
				e.t.Errorf("pgha logs --json %s: no record: %q (%v)", component, line, err)
			}
		}
		e.follows(host, component, func() {}, func(line string) bool { return line != "" }, "-n", "1")
	}
	e.refused(host, []string{`there is no component "nothing"`, "haproxy"}, "logs", "nothing")
}

// follows runs pgha logs -f until it prints a line that is wanted. cause is
// called again and again: what it writes before the command has found the log's
// end is not followed.
func (e edge) follows(host, component string, cause func(), want func(string) bool, more ...string) {
	e.t.Helper()
	ctx, cancel := context.WithCancel(e.long())
	defer cancel()
	cmd := e.bed.Host(host).Command(ctx, bin, append(append([]string{"logs", "-f"}, more...), component)...)
	out, err := cmd.StdoutPipe()
	e.must(err)
	e.must(cmd.Start())
	ended := make(chan bool, 1)
	go func() {
		found := false
		for in := bufio.NewScanner(out); !found && in.Scan(); {
			found = want(in.Text())
		}
		ended <- found
	}()
	var found bool
	for again := true; again; {
		cause()
		select {
		case found = <-ended:
			again = false
		case <-time.After(time.Second):
		}
	}
	cancel()
	_ = cmd.Wait() // killed, if all is well
	if !found {
		e.t.Errorf("pgha logs -f %s on %s ended without the line", component, host)
	}
}

func checkStopAndRun(e edge) {
	checkLogs(e, "n1")
	e.follows("n1", "postgres", func() { e.tell("n1", "psql", "-X", "-c", "SELECT 'followed by a test'::int") },
		func(line string) bool { return strings.Contains(line, "followed by a test") }, "-n", "0")
	w := e.writer(1<<41, "n1", "n2")
	e.must(e.bed.Signal("n1", syscall.SIGTERM))
	e.quiet("n1")
	h := e.bed.Host("n1")
	control, err := h.Run(e.long(), "/usr/lib/postgresql/15/bin/pg_controldata", "-D", edgeDataDir)
	e.must(err)
	// It has handed over first, and may have been a replica again when it stopped.
	if state := fieldOf(control, "Database cluster state"); state != "shut down" && state != "shut down in recovery" {
		e.t.Errorf("pg_controldata after SIGTERM: %q, want an orderly end", state)
	}
	daemonDown(e, "n1")
	e.status("n2", "n2 to be the primary", func(s node.Status) bool { return s.Leader == "n2" })
	e.acked(w)
	e.must(e.bed.Run(e.long(), "n1"))
	s := e.healthy("n1")
	if s.Leader != "n2" || edgeMember(s, "n1").Postgres != "replica" {
		e.t.Errorf("the stopped primary has not come back as a replica: %+v", s)
	}
	e.noneLost("n2", w)
}

func fieldOf(text, name string) string {
	for line := range strings.Lines(text) {
		if key, value, ok := strings.Cut(line, ":"); ok && key == name {
			return strings.TrimSpace(value)
		}
	}
	return ""
}

// daemonDown checks what pgha says on a node whose daemon does not run.
func daemonDown(e edge, host string) {
	e.t.Helper()
	p := e.tell(host, "status")
	if p.code != 3 {
		e.t.Errorf("pgha status with the daemon down: exit status %d, want 3", p.code)
	}
	e.says(p.out, "pgha is not running on this host", `the data node "`+host+`" of cluster "main"`, "pgha run", "ask another node")
	p = e.tell(host, "status", "--json")
	var s struct {
		Health, Verdict string
		ToDo            []string `json:"to_do"`
	}
	e.json(p.out, &s)
	if p.code != 3 || s.Health != "unknown" || s.Verdict == "" || len(s.ToDo) == 0 {
		e.t.Errorf("pgha status --json with the daemon down: exit status %d, %+v", p.code, s)
	}
	e.refused(host, []string{"the daemon is not running on this host"}, "token", "list")
	e.refused(host, []string{"the daemon is not running on this host"}, "token", "create")
	e.refused(host, []string{"the daemon is not running on this host"}, "psql", "-c", "SELECT 1")
	e.refused(host, []string{"the daemon is not running on this host"}, "cert", "list")
	checkLogs(e, host)
}

// nft runs nft on a host.
func (e edge) nft(host string, args ...string) string {
	e.t.Helper()
	out, err := e.bed.Host(host).Run(e.long(), "nft", args...)
	e.must(err)
	return out
}

func checkFirewall(e edge) {
	rules := e.bed.Host("n2").Dir() + "/other.nft"
	e.must(os.WriteFile(rules, []byte("table inet other { chain in { type filter hook input priority 5; tcp dport 4242 drop; }; }\n"+
		"table ip pgha { chain other { tcp dport 4243 drop; }; }\n"), 0o644))
	e.nft("n2", "-f", rules)
	list := func(table ...string) string { return e.nft("n2", append([]string{"-s", "list", "table"}, table...)...) }
	ours, other, namesake := list("inet", "pgha"), list("inet", "other"), list("ip", "pgha")
	if !strings.Contains(ours, "5442") {
		e.t.Fatalf("the firewall does not speak of PostgreSQL's port:\n%s", ours)
	}
	back := func(why string) {
		e.until("the firewall's table to be back after "+why, func() error {
			// It may not be there at all.
			out, err := e.bed.Host("n2").Run(e.long(), "nft", "-s", "list", "table", "inet", "pgha")
			if err == nil && out != ours {
				err = fmt.Errorf("it is another: %s", out)
			}
			return err
		})
	}
	e.nft("n2", "delete", "table", "inet", "pgha")
	back("its removal")
	e.nft("n2", "flush", "table", "inet", "pgha")
	back("the removal of its rules")
	if got := list("inet", "other") + list("ip", "pgha"); got != other+namesake {
		e.t.Errorf("other tables were touched:\n%s\nwant:\n%s", got, other+namesake)
	}
	w := e.writer(1<<42, "n2")
	e.nft("n2", "flush", "ruleset")
	back("nft flush ruleset")
	e.until("the gate's table to be back too, and no other", func() error {
		if got := strings.Fields(strings.ReplaceAll(e.tables("n2"), "table inet ", "")); !slices.Contains(got, "pgha_gate") || len(got) != 2 {
			return fmt.Errorf("there are %q", got)
		}
		return nil
	})
	e.acked(w)
	e.noneFailed("n1", w, "the ruleset was flushed")
	e.healthy("n2")
}
