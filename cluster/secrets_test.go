package cluster

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"pgha/pki"
)

func TestNewSecrets(t *testing.T) {
	a, b := must[Secrets](t)(NewSecrets()), must[Secrets](t)(NewSecrets())
	re := regexp.MustCompile(`^[0-9A-Za-z]{43}$`)
	seen := map[string]bool{}
	for _, s := range []string{a.PatroniREST, a.StatsPage, b.PatroniREST, b.StatsPage} {
		if !re.MatchString(s) {
			t.Errorf("secret of %d characters is not 43 of base62", len(s))
		}
		seen[s] = true
	}
	if len(seen) != 4 {
		t.Error("secrets repeat")
	}
}

func TestSealBindsToKeyClusterAndName(t *testing.T) {
	k, other := must[SealingKey](t)(NewSealingKey()), must[SealingKey](t)(NewSealingKey())
	plain := []byte("the plain text of the secret")
	sealed := must[[]byte](t)(Seal(k, "c1", "secrets", plain))
	if bytes.Contains(sealed, plain[:8]) {
		t.Error("the sealed value shows the plain text")
	}
	if got := must[[]byte](t)(Open(k, "c1", "secrets", sealed)); !bytes.Equal(got, plain) {
		t.Errorf("opened as %q", got)
	}
	if again := must[[]byte](t)(Seal(k, "c1", "secrets", plain)); bytes.Equal(again, sealed) {
		t.Error("sealing twice gives the same: the nonce is not random")
	}
	for name, open := range map[string]func() ([]byte, error){
		"other key":     func() ([]byte, error) { return Open(other, "c1", "secrets", sealed) },
		"other cluster": func() ([]byte, error) { return Open(k, "c2", "secrets", sealed) },
		"other name":    func() ([]byte, error) { return Open(k, "c1", "ca-key", sealed) },
		"empty":         func() ([]byte, error) { return Open(k, "c1", "secrets", nil) },
		"cut":           func() ([]byte, error) { return Open(k, "c1", "secrets", sealed[:len(sealed)-1]) },
		"head alone":    func() ([]byte, error) { return Open(k, "c1", "secrets", sealed[:25]) },
	} {
		if got, err := open(); !errors.Is(err, ErrSealed) {
			t.Errorf("%s: got %q, %v; want ErrSealed", name, got, err)
		}
	}
	for i := range sealed {
		bad := bytes.Clone(sealed)
		bad[i] ^= 1
		if _, err := Open(k, "c1", "secrets", bad); !errors.Is(err, ErrSealed) {
			t.Fatalf("byte %d altered: %v", i, err)
		}
	}
}

func TestSealSecretsAndCAKeyAreNotInterchangeable(t *testing.T) {
	k := must[SealingKey](t)(NewSealingKey())
	want := must[Secrets](t)(NewSecrets())
	sealed := must[[]byte](t)(SealSecrets(k, "c1", want))
	if got := must[Secrets](t)(OpenSecrets(k, "c1", sealed)); got != want {
		t.Error("the secrets differ after sealing and opening")
	}
	if _, err := OpenCAKey(k, "c1", sealed); !errors.Is(err, ErrSealed) {
		t.Errorf("secrets opened as the CA's key: %v", err)
	}
	ca := must[[]byte](t)(SealCAKey(k, "c1", []byte("pem")))
	if got := must[[]byte](t)(OpenCAKey(k, "c1", ca)); string(got) != "pem" {
		t.Errorf("CA key opened as %q", got)
	}
}

func TestSealingKeyFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "cluster.key")
	if _, err := LoadSealingKey(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	k := must[SealingKey](t)(NewSealingKey())
	if err := k.Save(path); err != nil {
		t.Fatal(err)
	}
	if st := must[fs.FileInfo](t)(os.Stat(path)); st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v", st.Mode())
	}
	if got := must[SealingKey](t)(LoadSealingKey(path)); got != k {
		t.Error("another key was loaded than saved")
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := LoadSealingKey(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("open file: %v", err)
	}
	for _, bad := range []string{"", "AAAA\n", "not base64!"} {
		if err := os.WriteFile(path, []byte(bad), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadSealingKey(path); err == nil || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("file %q: %v", bad, err)
		}
	}
}

// Whatever is done with a value that holds secrets, they do not come out.
func TestNothingSecretIsPrinted(t *testing.T) {
	tok := sampleToken()
	key := SealingKey([]byte("SECRETSECRETSECRETSECRETSECRETSE"))
	sec := Secrets{PatroniREST: "SECRETpatroni", StatsPage: "SECRETstats"}
	req := JoinRequest{TokenID: tok.ID, Secret: tok.Secret, Name: "node2", CSRs: map[pki.Role][]byte{}}
	resp := JoinResponse{Secrets: &sec, ClusterKey: key[:]}
	values := []any{
		tok, &tok, key, &key, sec, &sec, req, &req, resp, &resp, []Secrets{sec}, map[string]Token{"a": tok},
		struct{ S Secrets }{sec}, struct{ S *Secrets }{&sec}, struct{ R JoinResponse }{resp}, struct{ K SealingKey }{key}, [1]JoinRequest{req},
	}
	leaks := []string{"SECRET", tok.Secret, fmt.Sprintf("%x", "SECRET"), fmt.Sprintf("%X", "SECRET"), "83 69 67", "0x53, 0x45", "U0VDUkVU"}
	check := func(how, out string) {
		t.Helper()
		if out == "" {
			t.Errorf("%s: nothing was printed: the test proves nothing", how)
		}
		for _, l := range leaks {
			if strings.Contains(out, l) {
				t.Errorf("%s shows a secret: %s", how, out)
			}
		}
	}
	for _, v := range values {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d"} {
			check(fmt.Sprintf("%s of %T", verb, v), fmt.Sprintf(verb, v))
		}
		var text, js bytes.Buffer
		slog.New(slog.NewTextHandler(&text, nil)).Info("x", "v", v)
		check(fmt.Sprintf("slog text of %T", v), text.String())
		slog.New(slog.NewJSONHandler(&js, nil)).Info("x", "v", v)
		check(fmt.Sprintf("slog JSON of %T", v), js.String())
		data, err := json.Marshal(v)
		check(fmt.Sprintf("JSON of %T", v), string(data)+fmt.Sprint(err))
	}
	// The check itself must be able to fail.
	if !strings.Contains(fmt.Sprintf("%v", plainSecrets(sec)), leaks[0]) {
		t.Error("the test would not notice a leak")
	}
}
