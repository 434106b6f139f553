package systemd_test

import (
	"bufio"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"pgha/tests/systemd/machine"
)

// units answer on port 7000 with the boot id, which is new at every boot.
var units = map[string]string{
	"answer.socket": `[Socket]
ListenStream=7000
Accept=yes

[Install]
WantedBy=sockets.target
`,
	"answer@.service": `[Service]
ExecStart=cat /proc/sys/kernel/random/boot_id
StandardOutput=socket
`,
}

// TestMachines holds the promises that every other test on machines rests on.
func TestMachines(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	start := time.Now()
	step := func(what string) { t.Logf("%6.2fs %s", time.Since(start).Seconds(), what) }

	n := machine.Network(t)
	step("network and root file system")
	alpha := n.Boot(t, "alpha")
	step("alpha is up")
	beta := n.Boot(t, "beta")
	step("beta is up")

	t.Run("identity", func(t *testing.T) {
		for _, m := range []*machine.Machine{alpha, beta} {
			if got := must(ctx, t, m, "cat", "/proc/1/comm"); got != "systemd" {
				t.Errorf("PID 1 of %s is %q, want systemd", m.Name(), got)
			}
			if got := must(ctx, t, m, "hostname"); got != m.Name() {
				t.Errorf("host name of %s is %q", m.Name(), got)
			}
		}
		for _, file := range []string{"/etc/machine-id", "/proc/sys/kernel/random/boot_id"} {
			if a, b := must(ctx, t, alpha, "cat", file), must(ctx, t, beta, "cat", file); a == b {
				t.Errorf("%s is %q on both machines", file, a)
			}
		}
	})

	t.Run("run", func(t *testing.T) {
		t.Setenv("PGHA_LEAK", "1")
		if env := must(ctx, t, alpha, "env"); strings.Contains(env, "PGHA_LEAK") {
			t.Errorf("the test's environment reached the machine:\n%s", env)
		}
		out, err := alpha.Run(ctx, "sh", "-c", "echo out; echo err >&2; exit 3")
		if want := "out\nerr\n"; out != want {
			t.Errorf("output is %q, want %q", out, want)
		}
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 3 {
			t.Errorf("error is %v, want exit status 3", err)
		}
	})

	t.Run("packages without a network", func(t *testing.T) {
		install := []string{"apt-get", "install", "--yes", "--quiet"}
		out := must(ctx, t, alpha, append(append(install, "--print-uris"), machine.Packages...)...)
		if strings.Contains(out, "://") {
			t.Errorf("apt would download:\n%s", out)
		}
		must(ctx, t, alpha, "apt-get", "update")
		must(ctx, t, alpha, append(install, "nftables")...)
	})

	t.Run("unit and reboot", func(t *testing.T) {
		install(ctx, t, alpha)
		before := ask(ctx, t, n, alpha)
		if id := must(ctx, t, beta, "bash", "-c", "cat </dev/tcp/"+alpha.Addr()+"/7000"); id != before {
			t.Errorf("beta read %q from alpha, want %q", id, before)
		}
		must(ctx, t, alpha, "nft", "add table inet smoke")

		step("reboot alpha")
		if err := alpha.Reboot(ctx); err != nil {
			t.Fatal(err)
		}
		step("alpha is up again")

		if after := ask(ctx, t, n, alpha); after == before {
			t.Errorf("the socket answers with the boot id %q from before the reboot", after)
		}
		if rules := must(ctx, t, alpha, "nft", "list tables"); rules != "" {
			t.Errorf("nftables after the reboot: %q, want none", rules)
		}
	})

	t.Run("firewall", func(t *testing.T) {
		must(ctx, t, alpha, "nft", `table inet smoke {
			chain in {
				type filter hook input priority 0
				tcp dport 7000 reject with tcp reset
			}
		}`)
		if out, err := beta.Run(ctx, "bash", "-c", "cat </dev/tcp/"+alpha.Addr()+"/7000"); err == nil {
			t.Errorf("beta read %q through the closed firewall", out)
		}
		must(ctx, t, alpha, "nft", "delete table inet smoke")
		if ask(ctx, t, n, alpha) == "" {
			t.Error("no answer after the firewall was opened")
		}
	})

	t.Run("power cut", func(t *testing.T) {
		before := ask(ctx, t, n, alpha)
		step("cut alpha's power")
		alpha.PowerOff()
		step("alpha is off")
		if _, err := alpha.Run(ctx, "true"); err == nil {
			t.Error("a command ran on a machine that is off")
		}
		if err := alpha.PowerOn(ctx); err != nil {
			t.Fatal(err)
		}
		step("alpha is up again")
		if after := ask(ctx, t, n, alpha); after == before {
			t.Errorf("the socket answers with the boot id %q from before the power cut", after)
		}
	})
}

// install puts the units on the machine, for now and for every boot.
func install(ctx context.Context, t *testing.T, m *machine.Machine) {
	t.Helper()
	for name, text := range units {
		src := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(src, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		if err := m.Copy(src, "/etc/systemd/system/"+name); err != nil {
			t.Fatal(err)
		}
	}
	must(ctx, t, m, "systemctl", "enable", "--now", "answer.socket")
}

// ask returns what the unit on the machine answers to the bridge.
func ask(ctx context.Context, t *testing.T, n *machine.Net, m *machine.Machine) string {
	t.Helper()
	conn, err := n.Dial(ctx, "tcp", m.Addr()+":7000")
	if err != nil {
		t.Fatalf("ask %s: %v", m.Name(), err)
	}
	defer conn.Close()
	line, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Fatalf("ask %s: %v", m.Name(), err)
	}
	return strings.TrimSpace(line)
}

func must(ctx context.Context, t *testing.T, m *machine.Machine, args ...string) string {
	t.Helper()
	out, err := m.Run(ctx, args...)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return strings.TrimSpace(out)
}
