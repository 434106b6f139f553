package systemd

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNeedrestart(t *testing.T) {
	root := t.TempDir()
	path := filepath.Join(root, "needrestart", "conf.d", "pgha.conf")
	for range 2 { // it may be repeated
		if err := keepNeedrestartAway(path); err != nil {
			t.Fatal(err)
		}
	}
	// As needrestart reads it, and matches the names of services.
	out, err := exec.Command("perl", "-e", `
use strict; use warnings;
our %nrconf = (blacklist_rc => [qr(^theirs)]);
eval do { local(@ARGV, $/) = $ARGV[0]; <>};
die $@ if $@;
foreach my $rc (qw(pgha.service postgresql@15-main.service haproxy.service patroni.service theirs.service ssh.service)) {
	print "$rc\n" if grep { $rc =~ /$_/; } @{$nrconf{blacklist_rc}};
}`, path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if d := cmp.Diff("pgha.service\npostgresql@15-main.service\nhaproxy.service\npatroni.service\ntheirs.service\n", string(out)); d != "" {
		t.Errorf("services that needrestart leaves alone (-want +got):\n%s", d)
	}
	for range 2 {
		if err := letNeedrestart(path); err != nil {
			t.Fatal(err)
		}
	}
	if left, err := os.ReadDir(root); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v (%v)", left, err)
	}
	// What is needrestart's stays.
	if err := keepNeedrestartAway(path); err != nil {
		t.Fatal(err)
	}
	theirs := filepath.Join(filepath.Dir(path), "theirs.conf")
	if err := os.WriteFile(theirs, nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if err := letNeedrestart(path); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(theirs); err != nil {
		t.Error(err)
	}
}
