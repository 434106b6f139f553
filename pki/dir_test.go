package pki

import (
	"bytes"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func TestParseBundle(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	b := issue(t, ca, specFor(clusterA, "n1", RoleNode), now)
	other := issue(t, newCA(t, clusterA, now), specFor(clusterA, "n1", RoleNode), now)
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	for _, tc := range []struct {
		name string
		data []byte
		want string
	}{
		{"whole", b.Encode(), ""},
		{"text before the blocks", cat([]byte("a note\n"), b.Encode()), ""},
		{"leaf before key", cat(b.CertPEM, b.KeyPEM, b.CAPEM), ""},
		{"empty", nil, "incomplete"},
		{"no key", cat(b.CertPEM, b.CAPEM), "incomplete"},
		{"no CA", cat(b.KeyPEM, b.CertPEM), "incomplete"},
		{"cut off", b.Encode()[:len(b.Encode())-40], "cut off"},
		{"two keys", cat(b.KeyPEM, b.Encode()), "unexpected"},
		{"three certificates", cat(b.Encode(), b.CAPEM), "unexpected"},
		{"strange block", cat(pem.EncodeToMemory(&pem.Block{Type: "EC PARAMETERS"}), b.Encode()), "EC PARAMETERS"},
		{"key of another", cat(other.KeyPEM, b.CertPEM, b.CAPEM), "does not belong"},
		{"CA of another", cat(b.KeyPEM, b.CertPEM, other.CAPEM), "issued by"},
		{"CA before leaf", cat(b.KeyPEM, b.CAPEM, b.CertPEM), "does not belong"},
		{"leaf in the place of the CA", cat(b.KeyPEM, b.CertPEM, b.CertPEM), "is no CA"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			got, err := ParseBundle(tc.data)
			if tc.want != "" {
				if err == nil || !strings.Contains(err.Error(), tc.want) {
					t.Fatalf("got %v, want an error with %q", err, tc.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(b.Encode()), string(got.Encode())); diff != "" {
				t.Fatalf("bundle differs (-want +got):\n%s", diff)
			}
		})
	}
}

func TestDirModesAndOwners(t *testing.T) {
	owner := Owner{UID: 12345, GID: 23456}
	ca := newCA(t, clusterA, time.Now())
	// A umask must not narrow what another user is to reach.
	old := syscall.Umask(0o077)
	defer syscall.Umask(old)
	d := newDir(t, ca, map[Role]Owner{RolePostgres: owner}, RoleNode, RolePostgres)
	self := Owner{os.Geteuid(), os.Getegid()}
	for _, tc := range []struct {
		path  string
		mode  fs.FileMode
		owner Owner
	}{
		{d.Path, fs.ModeDir | 0o711, self},
		{d.CAPath(), 0o644, self},
		{d.BundlePath(RoleNode), 0o600, self},
		{d.BundlePath(RolePostgres), 0o600, owner},
	} {
		st, err := os.Stat(tc.path)
		if err != nil {
			t.Fatal(err)
		}
		sys := st.Sys().(*syscall.Stat_t)
		if got := (Owner{int(sys.Uid), int(sys.Gid)}); st.Mode() != tc.mode || got != tc.owner {
			t.Errorf("%s: %v %v, want %v %v", tc.path, st.Mode(), got, tc.mode, tc.owner)
		}
	}
	if err := d.Verify(clusterA, "n1", RolePostgres); err != nil {
		t.Error(err)
	}
}

func TestDirRefusesToWrite(t *testing.T) {
	now := time.Now()
	ca := newCA(t, clusterA, now)
	d := newDir(t, ca, nil, RoleNode)
	before, err := os.ReadFile(d.BundlePath(RoleNode))
	if err != nil {
		t.Fatal(err)
	}
	b := issue(t, ca, specFor(clusterA, "n1", RoleNode), now)
	mixed := b
	mixed.KeyPEM = issue(t, ca, specFor(clusterA, "n1", RoleNode), now).KeyPEM
	if err := d.WriteBundle(RoleNode, mixed); err == nil {
		t.Error("wrote a key that does not fit")
	}
	if err := d.WriteBundle(RoleNode, Bundle{}); err == nil {
		t.Error("wrote an empty bundle")
	}
	if err := d.WriteBundle(RoleNode, issue(t, ca, specFor(clusterA, "n1", RoleAdmin), now)); err == nil {
		t.Error("wrote an admin's certificate as the node's")
	}
	if err := d.WriteCA(b.CertPEM); err == nil {
		t.Error("wrote a leaf as CA")
	}
	if after, err := os.ReadFile(d.BundlePath(RoleNode)); err != nil || !bytes.Equal(before, after) {
		t.Errorf("a refused write changed the file: %v", err)
	}
}

func TestDirMissing(t *testing.T) {
	d := Dir{Path: t.TempDir()}
	if _, err := d.Bundle(RoleNode); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Bundle: %v", err)
	}
	if _, err := d.CACert(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("CACert: %v", err)
	}
	if err := d.Verify(clusterA, "n1", RoleNode); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Verify: %v", err)
	}
}

func TestVerify(t *testing.T) {
	now := time.Now()
	ca, twin := newCA(t, clusterA, now), newCA(t, clusterA, now)
	foreign := newCA(t, clusterB, now)
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, d Dir)
		node   string
		role   Role
		want   []string // parts of the message; none = accepted
		is     error
	}{
		{name: "good"},
		{name: "expired is not Verify's business", damage: func(t *testing.T, d Dir) {
			spec := specFor(clusterA, "n1", RoleNode)
			spec.Lifetime = time.Nanosecond
			must(t, d.WriteBundle(RoleNode, issue(t, ca, spec, now)))
		}},
		{name: "other node", node: "n2", want: []string{":n1:", ":n2:"}},
		{name: "no bundle of the role", role: RoleAdmin, is: fs.ErrNotExist},
		{name: "bundle of another role", role: RoleAdmin, damage: func(t *testing.T, d Dir) {
			must(t, os.Rename(d.BundlePath(RoleNode), d.BundlePath(RoleAdmin)))
		}, want: []string{":n1:node", ":n1:admin"}},
		{name: "CA of another cluster", damage: func(t *testing.T, d Dir) {
			must(t, d.WriteCA(foreign.CertPEM()))
		}, want: []string{clusterA, clusterB}, is: ErrOtherCluster},
		{name: "bundle of another cluster", damage: func(t *testing.T, d Dir) {
			must(t, d.WriteBundle(RoleNode, issue(t, foreign, specFor(clusterB, "n1", RoleNode), now)))
		}, want: []string{clusterA, clusterB}, is: ErrOtherCluster},
		{name: "bundle of another cluster by this CA", damage: func(t *testing.T, d Dir) {
			must(t, d.WriteBundle(RoleNode, issue(t, misled(ca), specFor(clusterB, "n1", RoleNode), now)))
		}, want: []string{clusterA, clusterB}, is: ErrOtherCluster},
		{name: "another CA of this cluster", damage: func(t *testing.T, d Dir) {
			must(t, d.WriteCA(twin.CertPEM()))
		}, want: []string{"does not chain"}},
		{name: "CA renewed with its key", damage: func(t *testing.T, d Dir) {
			must(t, d.WriteCA(selfRenewed(t, ca)))
		}, want: []string{"another CA certificate"}},
		{name: "mode", damage: func(t *testing.T, d Dir) {
			must(t, os.Chmod(d.BundlePath(RoleNode), 0o640))
		}, want: []string{"0640", "0600"}},
		{name: "owner", damage: func(t *testing.T, d Dir) {
			must(t, os.Chown(d.BundlePath(RoleNode), 12345, 0))
		}, want: []string{"12345:0", "0:0"}},
		{name: "broken CA", damage: func(t *testing.T, d Dir) {
			must(t, os.WriteFile(d.CAPath(), []byte("x"), 0o644))
		}, want: []string{"ca.crt"}},
		{name: "broken bundle", damage: func(t *testing.T, d Dir) {
			must(t, os.WriteFile(d.BundlePath(RoleNode), []byte("x"), 0o600))
		}, want: []string{"node.pem"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			d := newDir(t, ca, nil, RoleNode)
			if tc.damage != nil {
				tc.damage(t, d)
			}
			node, role := "n1", RoleNode
			if tc.node != "" {
				node = tc.node
			}
			if tc.role != "" {
				role = tc.role
			}
			err := d.Verify(clusterA, node, role)
			if tc.want == nil && tc.is == nil {
				must(t, err)
				return
			}
			if err == nil {
				t.Fatal("accepted")
			}
			if tc.is != nil && !errors.Is(err, tc.is) {
				t.Errorf("%v does not wrap %v", err, tc.is)
			}
			for _, part := range tc.want {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%v does not show %q", err, part)
				}
			}
		})
	}
}
