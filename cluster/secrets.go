package cluster

import (
	"bytes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"

	"golang.org/x/crypto/chacha20poly1305"

	"pgha/internal/fsx"
)

// Users that go with the passwords in [Secrets].
const (
	PatroniRESTUser = "patroni"
	StatsPageUser   = "pgha"
)

// Secrets are the passwords that the data nodes share. A witness never gets
// them.
type Secrets struct {
	PatroniREST string `json:"patroni_rest"` // password of PatroniRESTUser
	StatsPage   string `json:"stats_page"`   // password of StatsPageUser

	// Former are earlier values of PatroniREST, the newest first, while some node
	// may not have taken the present one. Patroni accepts one password: callers try
	// the present one, then these.
	Former [formerPasswords]string `json:"former,omitzero"`
	// Generation grows with each rotation.
	Generation int64 `json:"generation,omitempty"`
}

// formerPasswords is how many rotations may begin before every node has taken
// the first of them.
const formerPasswords = 3

// plainSecrets is Secrets with an ordinary JSON form, for sealing and the wire.
type plainSecrets Secrets

// NewSecrets generates every secret: 43 characters of a-z, A-Z and 0-9, which
// is 256 bits.
func NewSecrets() (Secrets, error) {
	var s Secrets
	for _, p := range []*string{&s.PatroniREST, &s.StatsPage} {
		v, err := randomBase62(43)
		if err != nil {
			return Secrets{}, fmt.Errorf("generate secrets: %w", err)
		}
		*p = v
	}
	return s, nil
}

func randomBase62(n int) (string, error) {
	const alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
	out := make([]byte, 0, n)
	var buf [64]byte
	for len(out) < n {
		if _, err := rand.Read(buf[:]); err != nil {
			return "", err
		}
		for _, b := range buf {
			// 248 is the largest multiple of 62: above it characters would
			// not be equally likely.
			if b < 248 && len(out) < n {
				out = append(out, alphabet[b%62])
			}
		}
	}
	return string(out), nil
}

// SealingKey seals the secrets and the CA's key. It exists on data nodes only,
// in a file; etcd never holds it.
type SealingKey [chacha20poly1305.KeySize]byte

// NewSealingKey generates a key.
func NewSealingKey() (SealingKey, error) {
	var k SealingKey
	if _, err := rand.Read(k[:]); err != nil {
		return SealingKey{}, fmt.Errorf("generate sealing key: %w", err)
	}
	return k, nil
}

// SealingKeyFrom takes the key out of [JoinResponse].ClusterKey.
func SealingKeyFrom(b []byte) (SealingKey, error) {
	if len(b) != len(SealingKey{}) {
		return SealingKey{}, fmt.Errorf("sealing key has %d bytes, not %d", len(b), len(SealingKey{}))
	}
	return SealingKey(b), nil
}

// Save writes the key to path, mode 0600.
func (k SealingKey) Save(path string) error {
	data := base64.StdEncoding.AppendEncode(nil, k[:])
	if err := fsx.WriteFile(path, append(data, '\n'), 0o600, fsx.Keep, fsx.Keep); err != nil {
		return fmt.Errorf("save sealing key: %w", err)
	}
	return nil
}

// LoadSealingKey reads a key that [SealingKey.Save] wrote. It refuses a file
// that others may read. A missing file satisfies errors.Is(err, fs.ErrNotExist).
func LoadSealingKey(path string) (SealingKey, error) {
	st, err := os.Stat(path)
	if err != nil {
		return SealingKey{}, fmt.Errorf("load sealing key: %w", err)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return SealingKey{}, fmt.Errorf("load sealing key: %s is open to others (mode %04o): run chmod 600 on it", path, st.Mode().Perm())
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return SealingKey{}, fmt.Errorf("load sealing key: %w", err)
	}
	raw, err := base64.StdEncoding.DecodeString(string(bytes.TrimSpace(data)))
	if err != nil {
		// The decoder's error would quote nothing secret, but says nothing either.
		return SealingKey{}, fmt.Errorf("load sealing key: %s is damaged", path)
	}
	k, err := SealingKeyFrom(raw)
	if err != nil {
		return SealingKey{}, fmt.Errorf("load sealing key: %s is damaged: %w", path, err)
	}
	return k, nil
}

// sealVersion is the first byte of a sealed value.
const sealVersion = 1

// ErrSealed means that a sealed value does not open: another key, another
// cluster, another name, or the value was altered.
var ErrSealed = errors.New("sealed value does not open: wrong key, or it belongs elsewhere, or it was altered")

// Seal encrypts plain (XChaCha20-Poly1305, random nonce) and binds it to the
// cluster and to name: it opens under the same two only.
func Seal(k SealingKey, clusterID, name string, plain []byte) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	out := make([]byte, 1+aead.NonceSize(), 1+aead.NonceSize()+len(plain)+aead.Overhead())
	out[0] = sealVersion
	if _, err := rand.Read(out[1:]); err != nil {
		return nil, fmt.Errorf("seal %s: %w", name, err)
	}
	return aead.Seal(out, out[1:], plain, sealedTo(clusterID, name)), nil
}

// Open decrypts what [Seal] made; [ErrSealed] when it does not open.
func Open(k SealingKey, clusterID, name string, sealed []byte) ([]byte, error) {
	aead, err := k.aead()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, err)
	}
	head := 1 + aead.NonceSize()
	if len(sealed) < head || sealed[0] != sealVersion {
		return nil, fmt.Errorf("open %s: %w", name, ErrSealed)
	}
	plain, err := aead.Open(nil, sealed[1:head], sealed[head:], sealedTo(clusterID, name))
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", name, ErrSealed)
	}
	return plain, nil
}

func (k SealingKey) aead() (cipher.AEAD, error) { return chacha20poly1305.NewX(k[:]) }

func sealedTo(clusterID, name string) []byte {
	return []byte("pgha\x00" + clusterID + "\x00" + name)
}

// SealSecrets seals s for [Store.Create].
func SealSecrets(k SealingKey, clusterID string, s Secrets) ([]byte, error) {
	data, err := json.Marshal(plainSecrets(s))
	if err != nil {
		return nil, fmt.Errorf("encode secrets: %w", err)
	}
	return Seal(k, clusterID, keySecrets, data)
}

// OpenSecrets opens what [SealSecrets] made.
func OpenSecrets(k SealingKey, clusterID string, sealed []byte) (Secrets, error) {
	data, err := Open(k, clusterID, keySecrets, sealed)
	if err != nil {
		return Secrets{}, err
	}
	var s Secrets
	if err := json.Unmarshal(data, &s); err != nil {
		return Secrets{}, errors.New("decode secrets: not the JSON that was sealed")
	}
	return s, nil
}

// SealCAKey seals the CA's private key for [Store.Create] and for the disk.
func SealCAKey(k SealingKey, clusterID string, keyPEM []byte) ([]byte, error) {
	return Seal(k, clusterID, keyCAKey, keyPEM)
}

// OpenCAKey opens what [SealCAKey] made.
func OpenCAKey(k SealingKey, clusterID string, sealed []byte) ([]byte, error) {
	return Open(k, clusterID, keyCAKey, sealed)
}
