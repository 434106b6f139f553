package e2e

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"pgha/lab"
)

// oldPatroni answers as a Patroni that is too old, and has all its libraries.
const oldPatroni = "#!/usr/bin/python3\nprint('patroni 2.1.4')\n"

// TestInputFresh gives bad input to hosts that are no nodes.
func TestInputFresh(t *testing.T) {
	bed := newBed(t)
	if err := bed.AddHosts(within(t, inputWait), "fresh"); err != nil {
		t.Fatal(err)
	}
	if _, err := bed.Lab.AddHost(within(t, inputWait), "small", lab.HostOptions{TmpfsBytes: 64 << 20}); err != nil {
		t.Fatal(err)
	}
	addr := bed.Addr("fresh")
	start := func(more ...string) []string {
		return append([]string{"init", "--no-service", "--yes", "--name", "fresh", "--address", addr}, more...)
	}
	without := func(flag string, args []string) []string {
		return slices.DeleteFunc(slices.Clone(args), func(a string) bool { return a == flag })
	}
	script := filepath.Join(bed.Host("fresh").Dir(), "old-patroni")
	if err := os.WriteFile(script, []byte(oldPatroni), 0o755); err != nil {
		t.Fatal(err)
	}
	// Nothing is ever installed on the machine that runs the tests.
	noApt := hide("/usr/bin/apt-get", "/dev/null")
	noPatroni := hide("/usr/bin/patroni", "/dev/null")
	noPostgres := hide("/usr/lib/postgresql", "")

	cases := []refusal{
		{name: "init without root", args: start(), user: "nobody", want: []string{"this needs root: run it with sudo"}},
		{name: "join without root", args: []string{"join", "x"}, user: "nobody", want: []string{"sudo"}},
		{name: "run without root", args: []string{"run"}, user: "nobody", want: []string{"sudo"}},
		{name: "reset without root", args: []string{"reset", "--yes"}, user: "nobody", want: []string{"sudo"}},
		{name: "psql without root", args: []string{"psql"}, user: "nobody", want: []string{"sudo"}},
		{name: "demo without root", args: []string{"demo"}, user: "nobody", want: []string{"sudo"}},
		{name: "no systemd", args: without("--no-service", start()), want: []string{"not booted with systemd", "--no-service"}},
		{name: "join without systemd", args: []string{"join", "x"}, want: []string{"not booted with systemd", "--no-service"}},
		{name: "nobody to ask", args: without("--yes", start()), want: []string{"no terminal to ask on", "--yes", "nothing was changed"}},

		{name: "packages missing, install refused", args: without("--yes", start()), before: both(noApt, noPatroni, noPostgres),
			want: []string{"postgresql, patroni, python3-etcd, python3-idna must be installed", "run it with --yes"}},
		{name: "packages missing, unknown distribution", args: start(), before: both(noApt, noPatroni),
			want: []string{"has no apt-get", "install patroni python3-etcd python3-idna yourself"}},
		{name: "PostgreSQL missing", args: start(), before: both(noApt, noPostgres), want: []string{"has no apt-get", "install postgresql yourself"}},
		{name: "Patroni too old", args: start(), before: both(noApt, hide("/usr/bin/patroni", script)), want: []string{"patroni 2.1.4 is too old: install 3.0.0 or newer"}},
		{name: "PostgreSQL too old", args: start(), before: both(noApt, noPostgres, place("/usr/lib/postgresql/13/bin/postgres", "")),
			want: []string{"PostgreSQL 13 is not supported: install 14 to"}},

		{name: "port taken", args: start(), before: listen(addr, "5432"), want: []string{"port 5432 (read_write) is taken by python3 (pid ", "--port NAME=N"}},
		{name: "two ports taken", args: start("--port", "api=9000"), before: both(listen(addr, "9000"), listen(addr, "8008")),
			want: []string{"port 8008 (patroni) is taken by python3 (pid ", "port 9000 (api) is taken by python3 (pid "}},
		{name: "address of nobody", args: start("--address", "10.123.0.200"), want: []string{"address 10.123.0.200 is not on this host", "--address"}},
		{name: "address that is none", args: start("--address", "fresh"), want: []string{`--address "fresh" is not an IP address`}},
		{name: "address of this host alone", args: start("--address", "127.0.0.1"), want: []string{`"127.0.0.1" is not an address that other nodes can reach`}},
		{name: "address of everybody", args: start("--address", "0.0.0.0"), want: []string{"other nodes can reach"}},
		{name: "node name", args: start("--name", "Node-1"), want: []string{`node name "Node-1" is not allowed`, "--name"}},
		{name: "reserved name", args: start("--name", "postgres"), want: []string{`"postgres" is reserved`, "--name"}},
		{name: "cluster name", args: start("--cluster", "my shop"), want: []string{"--cluster", `"my shop" is not allowed`}},
		{name: "clients that are no network", args: start("--clients", "10.0.0.1"), want: []string{`--clients "10.0.0.1" is not a network`, "10.0.0.0/16"}},
		{name: "clients that are nothing", args: start("--clients", "all"), want: []string{"--clients"}},
		{name: "probe", args: start("--probe", "azure"), want: []string{`--probe "azure" is not an IP address`}},
		{name: "probe from everywhere", args: start("--probe", "0.0.0.0"), want: []string{"probe address 0.0.0.0"}},
		{name: "profile", args: start("--profile", "hasty"), want: []string{`profile "hasty" is not known`, "fast, steady, wide"}},
		{name: "port without a number", args: start("--port", "postgres"), want: []string{"--port postgres", "NAME=N"}},
		{name: "port out of range", args: start("--port", "postgres=65536"), want: []string{"--port postgres=65536", "1 to 65535"}},
		{name: "port of nothing", args: start("--port", "mysql=3306"), want: []string{`no port "mysql"`, "etcd_peer"}},
		{name: "two ports the same", args: start("--port", "postgres=5432"), want: []string{"5432 is the port of both postgres and read_write"}},
		{name: "load balancer's name", args: start("--san", "not a name"), want: []string{"--san", "neither a host name nor an IP address"}},
		{name: "memory that is none", args: start("--memory", "much"), want: []string{"--memory", "512MB or 4GB"}},
		{name: "too little memory", args: start("--memory", "64MB"), want: []string{"64MB is out of range", "128MB"}},
		{name: "nothing to adopt", args: start("--adopt", "/nowhere"), want: []string{"/nowhere is not a PostgreSQL data directory"}},
		{name: "something else to adopt", args: start("--adopt", "/etc"), want: []string{"/etc is not a PostgreSQL data directory"}},
		{name: "an argument", args: start("fresh"), want: []string{"init takes no argument"}},
		{name: "unknown flag", args: start("--witness"), want: []string{"not defined: -witness", "pgha init --help"}},
		{name: "unknown command", args: []string{"start"}, want: []string{`no command "start"`}},

		{name: "data directory not empty", args: start(), before: place("/var/lib/pgha/postgres/15/data/PG_VERSION", "15\n"),
			want: []string{"/var/lib/pgha/postgres/15/data is not empty", "--adopt"}},
		{name: "etcd data of a node", args: start(), before: place("/var/lib/pgha/etcd/member/snap/db", "x"), want: []string{"etcd data of a node", "state.json is missing"}},
		{name: "certificates of a node", args: start(), before: place("/var/lib/pgha/pki/ca.crt", "x"), want: []string{"certificates of a node", "state.json is missing"}},
		{name: "a configuration", args: start(), before: place("/etc/pgha/pgha.yml", "name: fresh\n"), want: []string{"/etc/pgha/pgha.yml is there", "move it away"}},
		{name: "a damaged state", args: start(), before: place("/var/lib/pgha/state.json", "{"), want: []string{"/var/lib/pgha/state.json"}},
		{name: "half a join", args: start(), before: place("/var/lib/pgha/state.json", `{"cluster_id":"c","node":"fresh","phase":"preparing"}`),
			want: []string{"pgha join was interrupted", "pgha reset"}},
		{name: "run on no node", args: []string{"run"}, want: []string{"/etc/pgha/pgha.yml does not exist", "pgha init, or pgha join TOKEN"}},
		{name: "reset of no node", args: []string{"reset", "--yes"}, want: []string{"this host is not a node: there is nothing to reset"}},
		{name: "psql on no node", args: []string{"psql"}, want: []string{"not a node of a cluster"}},
		{name: "token on no node", args: []string{"token", "create"}, want: []string{"the daemon is not running on this host"}},
		{name: "logs of no node", args: []string{"logs"}, want: []string{"there is no log yet"}},
		{name: "certificates of no node", args: []string{"cert", "ca"}, want: []string{"ca.crt"}},

		{name: "no token", args: []string{"join", "--no-service"}, want: []string{"join needs the token", "pgha join TOKEN"}},
		{name: "no token but a word", args: []string{"join", "--no-service", "please"}, want: []string{"not a pgha token", "pgha token create"}},
		{name: "empty token", args: []string{"join", "--no-service", " "}, want: []string{"the token is empty"}},
		{name: "token of another version", args: []string{"join", "--no-service", "pgha9_abc"}, want: []string{"of version 9", "install the same pgha"}},
		{name: "half a token", args: []string{"join", "--no-service", "pgha1_abc"}, want: []string{"incomplete or mistyped: copy it again"}},
		{name: "no token file", args: []string{"join", "--no-service", "--token-file", "/nowhere"}, want: []string{"read token", "/nowhere"}},
		{name: "token twice", args: []string{"join", "--no-service", "--token-file", "/nowhere", "x"}, want: []string{"not both"}},
		{name: "token in an empty file", args: []string{"join", "--no-service", "--token-file", "-"}, want: []string{"the token is empty"}},
		{name: "two tokens", args: []string{"join", "x", "--no-service", "y"}, want: []string{"join takes one token"}},
	}
	refuses(t, bed, "fresh", cases, nil)
	refuses(t, bed, "small", []refusal{
		{name: "disk nearly full", args: []string{"init", "--no-service", "--yes", "--name", "small", "--address", bed.Addr("small")},
			want: []string{"the disk of /var/lib/pgha is nearly full", "of 64.0 MB", "a data node needs 1.0 GB", "free some space"}},
	}, nil)

	t.Run("status of no node", func(t *testing.T) {
		for _, user := range []string{"", "nobody"} {
			out, _, code := inputRun(t, bed.Host("fresh"), user, "status")
			if code != 3 || !strings.Contains(out, "not a node of a cluster: run pgha init") {
				t.Errorf("as %q: exit status %d, %q", user, code, out)
			}
		}
	})
}

// listen has another program listen on a port.
func listen(addr, port string) func(*testing.T, *lab.Host) {
	const code = "import socket,sys,time\ns=socket.socket()\ns.bind(('',int(sys.argv[1])))\ns.listen()\ntime.sleep(3600)"
	return inputServing(addr+":"+port, "python3", "-c", code, port)
}
