package pki

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"pgha/internal/fsx"
)

const (
	caFile     = "ca.crt"
	dirMode    = 0o711
	caMode     = 0o644
	bundleMode = 0o600
)

// Owner is the user and group that a bundle belongs to.
type Owner struct{ UID, GID int }

// Dir is a node's certificate directory: ca.crt (0644) and one ROLE.pem (0600)
// a role. The directory's mode is 0711, so that PostgreSQL's and HAProxy's
// users reach the file of their role and cannot list the others; the parents
// must let them pass too.
type Dir struct {
	Path   string
	Owners map[Role]Owner // a missing role belongs to this process
}

// BundlePath returns the path of a role's bundle, whether or not it exists.
func (d Dir) BundlePath(r Role) string { return filepath.Join(d.Path, string(r)+".pem") }

// CAPath returns the path of the CA certificate, whether or not it exists.
func (d Dir) CAPath() string { return filepath.Join(d.Path, caFile) }

// Bundle reads the bundle of a role. The error satisfies
// errors.Is(err, fs.ErrNotExist) when there is none, and otherwise names the
// file and what is wrong with it.
func (d Dir) Bundle(r Role) (Bundle, error) {
	data, err := os.ReadFile(d.BundlePath(r))
	if err != nil {
		return Bundle{}, fmt.Errorf("read %s bundle: %w", r, err)
	}
	b, err := ParseBundle(data)
	if err != nil {
		return Bundle{}, fmt.Errorf("read %s: %w", d.BundlePath(r), err)
	}
	return b, nil
}

// WriteBundle replaces the bundle of a role atomically, mode 0600, owned as
// Owners says; it makes the directory when it is missing. It refuses a bundle
// that ParseBundle refuses or that was signed for another role.
func (d Dir) WriteBundle(r Role, b Bundle) error {
	data := b.Encode()
	parsed, err := ParseBundle(data)
	if err != nil {
		return fmt.Errorf("write %s bundle: %w", r, err)
	}
	id, err := IdentityOf(parsed.Leaf)
	if err != nil {
		return fmt.Errorf("write %s bundle: %w", r, err)
	}
	if id.Role != r {
		return fmt.Errorf("write %s bundle: certificate is of role %q", r, id.Role)
	}
	if err := d.make(); err != nil {
		return err
	}
	uid, gid := fsx.Keep, fsx.Keep
	if o, ok := d.Owners[r]; ok {
		uid, gid = o.UID, o.GID
	}
	return fsx.WriteFile(d.BundlePath(r), data, bundleMode, uid, gid)
}

// Trust returns ca.crt: the certificates of the CAs that are believed, PEM, the
// one that signs first. The error satisfies errors.Is(err, fs.ErrNotExist) when
// there is none; a file that holds anything else is an error.
func (d Dir) Trust() ([]byte, error) {
	data, err := os.ReadFile(d.CAPath())
	if err != nil {
		return nil, fmt.Errorf("read CA certificate: %w", err)
	}
	if _, _, err := parseTrust(data); err != nil {
		return nil, fmt.Errorf("read %s: %w", d.CAPath(), err)
	}
	return data, nil
}

// CACert returns the certificate of the CA that signs, PEM, with the errors of
// [Dir.Trust].
func (d Dir) CACert() ([]byte, error) {
	trust, err := d.Trust()
	if err != nil {
		return nil, err
	}
	return Signer(trust)
}

// WriteCA replaces ca.crt atomically, mode 0644; it makes the directory when it
// is missing. It refuses what is not one cluster's CA certificates.
func (d Dir) WriteCA(trustPEM []byte) error {
	if _, _, err := parseTrust(trustPEM); err != nil {
		return fmt.Errorf("write CA certificate: %w", err)
	}
	if err := d.make(); err != nil {
		return err
	}
	return fsx.WriteFile(d.CAPath(), trustPEM, caMode, fsx.Keep, fsx.Keep)
}

// make creates the directory; the chmod undoes a umask and an older mode.
func (d Dir) make() error {
	if err := os.MkdirAll(d.Path, dirMode); err != nil {
		return fmt.Errorf("create certificate directory: %w", err)
	}
	if err := os.Chmod(d.Path, dirMode); err != nil {
		return fmt.Errorf("set mode of certificate directory: %w", err)
	}
	return fsx.SyncDir(filepath.Dir(d.Path))
}

// Verify checks that CA and bundle on disk belong together and to this
// cluster, node and role, and that nobody but the owner reads the key. The
// error shows the value found and the value wanted; it wraps ErrOtherCluster,
// or fs.ErrNotExist when a file is missing. An expired certificate passes:
// that is for NeedsRenewal to say.
func (d Dir) Verify(clusterID, node string, r Role) error {
	trust, err := d.Trust()
	if err != nil {
		return err
	}
	cas, caCluster, err := parseTrust(trust)
	if err != nil {
		return fmt.Errorf("read %s: %w", d.CAPath(), err)
	}
	if caCluster != clusterID {
		return fmt.Errorf("%s: %w: found %s, want %s", d.CAPath(), ErrOtherCluster, caCluster, clusterID)
	}
	if err := d.checkAccess(r); err != nil {
		return err
	}
	b, err := d.Bundle(r)
	if err != nil {
		return err
	}
	path := d.BundlePath(r)
	id, err := IdentityOf(b.Leaf)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	want := Identity{ClusterID: clusterID, Node: node, Role: r}
	if id.ClusterID != clusterID {
		return fmt.Errorf("%s: %w: found %s, want %s", path, ErrOtherCluster, id, want)
	}
	if id != want {
		return fmt.Errorf("%s: certificate is of %s, want %s", path, id, want)
	}
	ca, err := issuedByOne(b.Leaf, cas)
	if err != nil {
		return fmt.Errorf("%s does not chain to %s: %w", path, d.CAPath(), err)
	}
	if inside, err := parseCert(b.CAPEM); err != nil || !bytes.Equal(inside.Raw, ca.Raw) {
		return fmt.Errorf("%s carries another CA certificate than %s", path, d.CAPath())
	}
	return nil
}

// checkAccess compares mode and owner of a bundle with what WriteBundle sets.
func (d Dir) checkAccess(r Role) error {
	path := d.BundlePath(r)
	st, err := os.Stat(path)
	if err != nil {
		return fmt.Errorf("check %s bundle: %w", r, err)
	}
	if m := st.Mode().Perm(); m&0o077 != 0 {
		return fmt.Errorf("%s has mode %04o, want %04o: its key is open to others", path, m, fs.FileMode(bundleMode))
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("check owner of %s: not supported here", path)
	}
	want, ok := d.Owners[r]
	if !ok {
		want = Owner{UID: os.Geteuid(), GID: os.Getegid()}
	}
	if have := (Owner{UID: int(sys.Uid), GID: int(sys.Gid)}); have != want {
		return fmt.Errorf("%s belongs to %d:%d, want %d:%d", path, have.UID, have.GID, want.UID, want.GID)
	}
	return nil
}
