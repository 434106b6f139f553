package haproxy

import (
	"crypto/sha512"
	"encoding/base64"
	"strings"
)

// statusHash returns a crypt(3) hash of password for a userlist. Its salt comes
// from the password, so that the same input renders the same file and nothing is
// reloaded for nothing; the password is long and random.
func statusHash(user, password string) string {
	sum := sha512.Sum512([]byte("pgha status page\x00" + user + "\x00" + password))
	salt := base64.RawURLEncoding.EncodeToString(sum[:12])
	return sha512Crypt(password, strings.NewReplacer("-", ".", "_", "/").Replace(salt))
}

const cryptAlphabet = "./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

// sha512Crypt is the scheme $6$ of crypt(3) with its usual 5000 rounds, after
// Drepper's specification. The salt has at most 16 characters.
func sha512Crypt(password, salt string) string {
	const rounds = 5000
	p, s := []byte(password), []byte(salt)

	h := sha512.New()
	h.Write(p)
	h.Write(s)
	h.Write(p)
	b := h.Sum(nil)

	h.Reset()
	h.Write(p)
	h.Write(s)
	h.Write(repeat(b, len(p)))
	for n := len(p); n > 0; n >>= 1 {
		if n&1 != 0 {
			h.Write(b)
		} else {
			h.Write(p)
		}
	}
	a := h.Sum(nil)

	h.Reset()
	for range p {
		h.Write(p)
	}
	pp := repeat(h.Sum(nil), len(p))

	h.Reset()
	for range 16 + int(a[0]) {
		h.Write(s)
	}
	ss := repeat(h.Sum(nil), len(s))

	for i := range rounds {
		h.Reset()
		if i&1 != 0 {
			h.Write(pp)
		} else {
			h.Write(a)
		}
		if i%3 != 0 {
			h.Write(ss)
		}
		if i%7 != 0 {
			h.Write(pp)
		}
		if i&1 != 0 {
			h.Write(a)
		} else {
			h.Write(pp)
		}
		a = h.Sum(nil)
	}
	return "$6$" + salt + "$" + cryptEncode(a)
}

// repeat returns n bytes of b, b, b...
func repeat(b []byte, n int) []byte {
	out := make([]byte, 0, n+len(b))
	for len(out) < n {
		out = append(out, b...)
	}
	return out[:n]
}

// cryptEncode writes three bytes in four characters, the bytes in the scheme's
// own order.
func cryptEncode(a []byte) string {
	var out strings.Builder
	put := func(v uint, n int) {
		for ; n > 0; n-- {
			out.WriteByte(cryptAlphabet[v&0x3f])
			v >>= 6
		}
	}
	x, y, z := 0, 21, 42
	for range 21 {
		put(uint(a[x])<<16|uint(a[y])<<8|uint(a[z]), 4)
		x, y, z = y+1, z+1, x+1
	}
	put(uint(a[63]), 2)
	return out.String()
}
