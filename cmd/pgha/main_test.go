package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"pgha/lab"
	"pgha/node"
)

func TestMain(m *testing.M) {
	lab.MaybeInit()
	os.Exit(m.Run())
}

// capture returns what f writes to standard output and to standard error. What
// it reads from standard input is in.
func capture(t *testing.T, in string, f func()) (stdout, stderr string) {
	t.Helper()
	file := func(name, text string) *os.File {
		f, err := os.CreateTemp(t.TempDir(), name)
		if err == nil {
			_, err = f.WriteString(text)
		}
		if err == nil {
			_, err = f.Seek(0, io.SeekStart)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		return f
	}
	oldIn, oldOut, oldErr := os.Stdin, os.Stdout, os.Stderr
	defer func() { os.Stdin, os.Stdout, os.Stderr = oldIn, oldOut, oldErr }()
	i, o, e := file("in", in), file("out", ""), file("err", "")
	os.Stdin, os.Stdout, os.Stderr = i, o, e
	f()
	read := func(f *os.File) string {
		b, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	return read(o), read(e)
}

// A wrong command line is answered by one line on standard error that says what
// to do; nothing is run and nothing printed. (No case gets as far as the host.)
func TestUsageErrors(t *testing.T) {
	for _, tc := range []struct {
		args string
		code int
		want string
	}{
		{"bogus", 1, `no command "bogus": see pgha help`},
		{"--bogus", 1, "not defined: -bogus: see pgha help"},
		{"init --bogus", 1, "not defined: -bogus: see pgha init --help"},
		{"init --name", 1, "needs an argument: -name: see pgha init --help"},
		{"init n1", 1, `init takes no argument, but was given "n1"`},
		{"join --bogus", 1, "see pgha join --help"},
		{"run x", 1, "run takes no argument"},
		{"reset x", 1, "reset takes no argument"},
		{"demo x", 1, "demo takes no argument"},
		{"version x", 1, "version takes no argument"},
		{"status x", 3, "status takes no argument"},
		{"status --bogus", 3, "see pgha status --help"},
		{"token bogus", 1, "use pgha token with one of create, list, revoke"},
		{"token create x", 1, `token create takes no argument, but was given "x"`},
		{"token create --ttl soon", 1, "see pgha token create --help"},
		{"token create --uses many", 1, "see pgha token create --help"},
		{"token revoke", 1, "needs one token's ID: see pgha token list"},
		{"token revoke a b", 1, "needs one token's ID"},
		{"token list x", 1, "token list takes no argument"},
		{"cert bogus", 1, "use pgha cert with one of list, renew, ca"},
		{"cert ca x", 1, "cert ca takes no argument"},
		{"logs a b", 1, "logs takes one component"},
		{"logs bogus", 1, "use one of pgha, etcd, patroni, postgres, haproxy"},
		{"logs --lines -1", 1, "--lines must not be negative"},
		{"logs --lines many", 1, "see pgha logs --help"},
		{"psql --node", 1, "--node needs the name"},
		{"completion ksh", 1, "use bash, zsh or fish"},
	} {
		t.Run(tc.args, func(t *testing.T) {
			var code int
			out, errs := capture(t, "", func() { code = run(append([]string{"pgha"}, strings.Fields(tc.args)...)) })
			if code != tc.code || out != "" {
				t.Errorf("exit status %d, want %d; standard output %q", code, tc.code, out)
			}
			if !strings.HasPrefix(errs, "pgha: ") || strings.Count(errs, "\n") != 1 || !strings.Contains(errs, tc.want) {
				t.Errorf("standard error %q, want one line with %q", errs, tc.want)
			}
		})
	}
}

func TestHelp(t *testing.T) {
	// Not "help": the library's help command, once it has run, has itself for a
	// subcommand for the rest of the process, and fish's completion would then
	// not come to an end, be it in the next run of this test.
	for _, c := range [][2]string{
		{"completion fish", "complete -c pgha"},
		{"", "pgha join --witness TOKEN"},
		{"token", "make a token for a new node"},
		{"init --help", "--no-service"},
		{"psql --help", "--node NAME"},
		{"version", "pgha " + node.Version},
		{"version --json", `"version": "` + node.Version + `"`},
		{"completion bash", "complete -F _pgha pgha"},
		{"completion zsh", "#compdef pgha"},
	} {
		args, want := c[0], c[1]
		var code int
		out, errs := capture(t, "", func() { code = run(append([]string{"pgha"}, strings.Fields(args)...)) })
		if code != 0 || errs != "" || !strings.Contains(out, want) {
			t.Errorf("pgha %s: exit status %d, %q, prints %q", args, code, errs, out)
		}
	}
}

// The completion scripts ask pgha itself.
func TestCompletion(t *testing.T) {
	defer func(args []string) { os.Args = args }(os.Args)
	for args, want := range map[string][]string{
		"": {"init", "join", "status", "config", "token", "psql", "logs", "cert", "run", "reset", "member", "leave", "demo", "version", "completion",
			"events", "rotate", "switchover", "failover", "pause", "resume", "maintenance", "upgrade", "recover", "snapshot", "restart", "reload", "reinit", "db", "user", "help", "h"},
		"config":     {"show", "get", "set", "unset", "edit", "diff", "history", "rollback", "help", "h"},
		"token":      {"create", "list", "revoke", "help", "h"},
		"member":     {"list", "remove", "replace", "help", "h"},
		"logs":       node.LogComponents,
		"completion": {"bash", "zsh", "fish"},
	} {
		words := append(append([]string{"pgha"}, strings.Fields(args)...), "--generate-bash-completion")
		os.Args = words // the library looks there too
		out, _ := capture(t, "", func() { run(words) })
		if diff := cmp.Diff(want, strings.Fields(out)); diff != "" {
			t.Errorf("pgha %s (-want +got):\n%s", args, diff)
		}
	}
}

func TestExitError(t *testing.T) {
	if got := cannotTell(nil); got != nil {
		t.Errorf("no error became %v", got)
	}
	said := exitError{code: 2}
	if got := cannotTell(said); !errors.Is(got, said) {
		t.Errorf("%v became %v", said, got)
	}
	cause := errors.New("broken")
	var exit exitError
	if got := cannotTell(cause); !errors.As(got, &exit) || exit.code != 3 || !errors.Is(got, cause) || got.Error() != "broken" {
		t.Errorf("%v became %#v", cause, got)
	}
	if said.Error() != "exit status 2" {
		t.Errorf("message %q", said.Error())
	}
}

func TestConfirm(t *testing.T) {
	if err := confirm(true, "?"); err != nil {
		t.Errorf("--yes: %v", err)
	}
	var err error
	_, errs := capture(t, "yes\n", func() { err = confirm(false, "Really?") })
	if !errors.Is(err, errDeclined) || !strings.Contains(err.Error(), "--yes") {
		t.Errorf("without a terminal: %v", err)
	}
	if errs != "" {
		t.Errorf("nobody is there, but was asked %q", errs)
	}
}

func TestPsqlNode(t *testing.T) {
	for _, tc := range []struct {
		in, name, rest string
		fails          bool
	}{
		{"", "", "", false},
		{"-c x", "", "-c x", false},
		{"--node n2", "n2", "", false},
		{"--node n2 -c x", "n2", "-c x", false},
		{"--node=n2 -c x", "n2", "-c x", false},
		{"-c x --node n2", "", "-c x --node n2", false}, // psql's to refuse
		{"--node", "", "", true},
		{"--node=", "", "", true},
	} {
		t.Run(tc.in, func(t *testing.T) {
			name, rest, err := psqlNode(strings.Fields(tc.in))
			if name != tc.name || strings.Join(rest, " ") != tc.rest || (err != nil) != tc.fails {
				t.Errorf("psqlNode = %q, %q, %v", name, rest, err)
			}
		})
	}
	if _, _, err := psqlNode([]string{"--node", ""}); err == nil {
		t.Error("an empty name was taken for the primary's")
	}
}

func TestProgress(t *testing.T) {
	_, errs := capture(t, "", func() {
		p := newProgress()
		for _, s := range []string{"one", "one", "", "two", "one"} {
			p.say("%s", s)
		}
	})
	var got []string
	for line := range strings.Lines(errs) {
		got = append(got, strings.Fields(line)[1])
	}
	if diff := cmp.Diff([]string{"one", "two", "one"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestPrintJSON(t *testing.T) {
	var b bytes.Buffer
	if err := printJSON(&b, map[string]int{"a": 1}); err != nil || b.String() != "{\n  \"a\": 1\n}\n" {
		t.Errorf("%q, %v", b.String(), err)
	}
	if err := printJSON(&b, func() {}); err == nil {
		t.Error("a function was printed")
	}
}

func TestCutHidesTheSecret(t *testing.T) {
	token := "pgha1_" + strings.Repeat("x", 200)
	if got := cut(token); got != token[:12] || cut("short") != "short" {
		t.Errorf("cut is %q", got)
	}
}

func TestFirstOf(t *testing.T) {
	for want, in := range map[string][]string{"": {"", ""}, "a": {"", "a", "b"}} {
		if got := firstOf(in...); got != want {
			t.Errorf("firstOf(%q) = %q", in, got)
		}
	}
	if got := firstOf(); got != "" {
		t.Errorf("firstOf() = %q", got)
	}
}

func TestWaitingText(t *testing.T) {
	for in, want := range map[string]string{"the copy": "waiting: the copy", "waiting for etcd": "waiting for etcd"} {
		if got := waitingText(in); got != want {
			t.Errorf("waitingText(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLocalRoute(t *testing.T) {
	if a, err := localRoute("127.0.0.1:8432"); err != nil || fmt.Sprint(a) != "127.0.0.1" {
		t.Errorf("route to loopback is from %v, %v", a, err)
	}
	if _, err := localRoute("nowhere"); err == nil {
		t.Error("a route to nowhere")
	}
}
