package patroni

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// drive loads the launcher and the installed Patroni, and asks the proof about
// the method as it came and as it is replaced.
const drive = `
import sys
sys.path.insert(0, sys.argv[1])
sys.dont_write_bytecode = True
import launcher
from patroni.dcs import etcd3
try:
    launcher.prove(etcd3)
    print('as it came: safe')
except SystemExit as e:
    print('as it came: refused with', e.code)
etcd3.Etcd3._update_leader = launcher.patched_update_leader(etcd3)
launcher.prove(etcd3)
print('replaced: safe')
from patroni.postgresql import config
try:
    launcher.prove_standbys(config)
    print('standbys, as it came: safe')
except SystemExit as e:
    print('standbys, as it came: refused with', e.code)
handler = config.ConfigHandler
handler.get_server_parameters = launcher.patched_server_parameters(handler.get_server_parameters)
launcher.prove_standbys(config)
print('standbys, replaced: safe')
with open(sys.argv[1] + '/own.conf', 'w') as f:
    f.write("synchronous_standby_names = 'theirs'\n")
print('of others:', launcher.written_standby_names(sys.argv[1] + '/own.conf'), launcher.written_standby_names('/nowhere'))
`

func TestLauncherProvesTheReplacement(t *testing.T) {
	v, err := InstalledVersion(t.Context(), "/usr/bin/patroni")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "launcher.py"), Launcher(), 0o644); err != nil {
		t.Fatal(err)
	}
	python, args, err := Interpreter("/usr/bin/patroni")
	if err != nil {
		t.Fatal(err)
	}
	if !v.StealsLeaderKey() {
		// A fixed Patroni is started as it is: the launcher is not used at all.
		t.Logf("Patroni %s needs no launcher", v)
		return
	}
	out, err := exec.Command(python, append(args, "-c", drive, dir)...).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{
		"\nas it came: refused with 70", "\nreplaced: safe",
		"\nstandbys, as it came: refused with 70", "\nstandbys, replaced: safe", "\nof others: None None",
	} {
		if !strings.Contains("\n"+string(out), want) {
			t.Errorf("the launcher said %q, want %q in it", out, want)
		}
	}
}

func TestInterpreterOfAProgramThatIsNoScript(t *testing.T) {
	bin := filepath.Join(t.TempDir(), "patroni")
	if err := os.WriteFile(bin, []byte("\x7fELF"), 0o755); err != nil {
		t.Fatal(err)
	}
	if _, _, err := Interpreter(bin); err == nil || !strings.Contains(err.Error(), "no script") {
		t.Fatalf("got %v", err)
	}
}
