package cluster

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

func sampleToken() Token {
	t := Token{
		ID: "0123456789abcdef", Secret: "00112233445566778899aabbccddeeff", ClusterID: "6f1e7bde-0d3c-4b8e-9d0b-3f7a3d1f1a11",
		Role: RoleWitness, Addrs: []string{"10.0.0.1:8432", "[fd00::2]:8432", "node3.example.com:9000"}, Expires: time.Unix(1900000000, 0).UTC(),
	}
	for i := range t.Pin {
		t.Pin[i] = byte(i * 7)
	}
	return t
}

// open is a token as fmt may not show it; cmp must see the fields.
type open Token

func TestTokenRoundTrip(t *testing.T) {
	for _, role := range []NodeRole{RoleData, RoleWitness} {
		want := sampleToken()
		want.Role = role
		text := must[string](t)(want.encode())
		if !strings.HasPrefix(text, "pgha1_") || strings.Trim(text[6:], "abcdefghijklmnopqrstuvwxyz234567") != "" {
			t.Errorf("%q is not one plain word", text)
		}
		got := must[Token](t)(ParseToken(" \t" + text + "\n"))
		if d := cmp.Diff(open(want), open(got)); d != "" {
			t.Errorf("token differs after a round trip:\n%s", d)
		}
	}
}

func TestTokenEncodeRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Token){
		"id":         func(t *Token) { t.ID = "12" },
		"secret":     func(t *Token) { t.Secret = "zz" },
		"cluster":    func(t *Token) { t.ClusterID = "x" },
		"role":       func(t *Token) { t.Role = "boss" },
		"no address": func(t *Token) { t.Addrs = nil },
		"no port":    func(t *Token) { t.Addrs = []string{"10.0.0.1"} },
		"port 0":     func(t *Token) { t.Addrs = []string{"10.0.0.1:0"} },
		"bad host":   func(t *Token) { t.Addrs = []string{"a b:1"} },
		"no host":    func(t *Token) { t.Addrs = []string{":8432"} },
		"too many":   func(t *Token) { t.Addrs = make([]string, 17) },
	} {
		tok := sampleToken()
		spoil(&tok)
		if s, err := tok.encode(); err == nil {
			t.Errorf("%s: encoded as %s", name, s)
		}
	}
}

func TestTokenOneCharacterAltered(t *testing.T) {
	text := must[string](t)(sampleToken().encode())
	others := "abcdefghijklmnopqrstuvwxyz0123456789_-=+/ \n\x00AZ\xff"
	for i := range text {
		for j := range others {
			if others[j] == text[i] {
				continue
			}
			if _, err := ParseToken(text[:i] + others[j:j+1] + text[i+1:]); !errors.Is(err, ErrTokenMalformed) && !errors.Is(err, ErrTokenVersion) {
				t.Fatalf("character %d of %d changed from %q to %q: %v", i, len(text), text[i], others[j], err)
			}
		}
		if _, err := ParseToken(text[:i] + text[i+1:]); err == nil {
			t.Errorf("character %d missing: not noticed", i)
		}
		if i > 0 && text[i] != text[i-1] {
			if _, err := ParseToken(text[:i-1] + text[i:i+1] + text[i-1:i] + text[i+1:]); err == nil {
				t.Errorf("characters %d and %d swapped: not noticed", i-1, i)
			}
		}
		if _, err := ParseToken(text[:i]); !errors.Is(err, ErrTokenMalformed) {
			t.Errorf("cut to %d characters: %v", i, err)
		}
	}
}

func TestParseTokenSaysWhatIsWrong(t *testing.T) {
	text := must[string](t)(sampleToken().encode())
	for _, c := range []struct {
		in   string
		want error
		says string
	}{
		{"", ErrTokenMalformed, "empty"},
		{"hello", ErrTokenMalformed, "not a pgha token"},
		{"K10abc::server:secret", ErrTokenMalformed, "not a pgha token"},
		{"pgha2_" + text[6:], ErrTokenVersion, "version 2"},
		{text[:len(text)-9], ErrTokenMalformed, "incomplete or mistyped: copy it again"},
		{strings.ToUpper(text), ErrTokenMalformed, ""},
		{text + text, ErrTokenMalformed, "incomplete or mistyped"},
		{tokenPrefix + strings.Repeat("a", 1<<20), ErrTokenMalformed, "incomplete or mistyped"},
	} {
		_, err := ParseToken(c.in)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.says) {
			t.Errorf("ParseToken(%.20q): got %v, want %s: %q", c.in, err, c.want, c.says)
		}
		if err != nil && strings.Contains(err.Error(), text[30:60]) {
			t.Errorf("the error repeats the token: %v", err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	text, err := sampleToken().encode()
	if err != nil {
		f.Fatal(err)
	}
	for _, s := range []string{"", "_", "pgha1_", "pgha_", "pgha0_", "pgha1_a", "pgha99999999_x", text, text[:40], text + "\n" + text, tokenPrefix + strings.Repeat("7", 300)} {
		f.Add(s)
	}
	// A checksum over nonsense: what is behind it must hold by itself.
	for _, b := range [][]byte{make([]byte, tokenFixed), append(make([]byte, tokenFixed-1), 255, 1), append([]byte{1}, make([]byte, tokenFixed)...)} {
		sum := tokenSum(b)
		f.Add(tokenPrefix + tokenEncoding.EncodeToString(append(b, byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))))
	}
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := ParseToken(s)
		if err != nil {
			if !errors.Is(err, ErrTokenMalformed) && !errors.Is(err, ErrTokenVersion) {
				t.Fatalf("untyped error %v", err)
			}
			return
		}
		if again, err := tok.encode(); err != nil || again != strings.TrimSpace(s) {
			t.Fatalf("%q was accepted, but is %q, %v", s, again, err)
		}
	})
}
