package host

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParsePolicy(t *testing.T) {
	const out = `postgresql-15:
  Installed: 15.14-0+deb12u1
  Candidate: 15.15-0+deb12u1
  Version table:
     15.15-0+deb12u1 500
        500 http://mirror.example/debian bookworm/main amd64 Packages
 *** 15.14-0+deb12u1 100
        100 /var/lib/dpkg/status
patroni:
  Installed: (none)
  Candidate: 3.0.2-1
  Version table:
     3.0.2-1 500
        500 http://mirror.example/debian bookworm/main amd64 Packages
haproxy:
  Installed: 2.6.12-1+deb12u2
  Candidate: (none)
  Version table:
 *** 2.6.12-1+deb12u2 100
        100 /var/lib/dpkg/status
`
	want := map[string]Candidate{
		"postgresql-15": {Installed: "15.14-0+deb12u1", Available: "15.15-0+deb12u1"},
		"patroni":       {Available: "3.0.2-1"},
		"haproxy":       {Installed: "2.6.12-1+deb12u2"},
	}
	if d := cmp.Diff(want, parsePolicy(out)); d != "" {
		t.Errorf("versions (-want +got):\n%s", d)
	}
}

// TestCandidates asks the apt of this host, which has the packages.
func TestCandidates(t *testing.T) {
	got, err := Candidates(t.Context(), "haproxy", "patroni", "no-such-package-at-all")
	if err != nil {
		t.Fatal(err)
	}
	if got["haproxy"].Installed == "" || got["patroni"].Installed == "" || len(got) != 2 {
		t.Errorf("versions are %v", got)
	}
}
