package cluster

import (
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash/crc32"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"
)

// Token is what an operator carries from the cluster to a new node.
type Token struct {
	ID        string // 16 hexadecimal digits; not secret
	Secret    string // 128 bits, hexadecimal
	Pin       [32]byte
	ClusterID string
	Role      NodeRole
	Addrs     []string // host:port of the API of members that can sign
	Expires   time.Time
}

const (
	tokenPrefix   = "pgha1_"
	tokenIDLen    = 8
	tokenSecret   = 16
	tokenFixed    = 1 + tokenIDLen + tokenSecret + 32 + 16 + 8 + 1
	maxTokenAddrs = 16
	maxTokenText  = 16 << 10
)

// tokenEncoding has letters and digits only, so that a double click selects
// the whole token in any terminal.
var tokenEncoding = base32.NewEncoding("abcdefghijklmnopqrstuvwxyz234567").WithPadding(base32.NoPadding)

var tokenRoles = []NodeRole{1: RoleData, 2: RoleWitness}

// encode gives the printed form: the version, then the fields and a CRC-32
// over both. A CRC finds every single altered character.
func (t Token) encode() (string, error) {
	id, err := hex.DecodeString(t.ID)
	if err != nil || len(id) != tokenIDLen {
		return "", fmt.Errorf("encode token: id %q is not %d hexadecimal digits", t.ID, 2*tokenIDLen)
	}
	secret, err := hex.DecodeString(t.Secret)
	if err != nil || len(secret) != tokenSecret {
		return "", fmt.Errorf("encode token: the secret is not %d hexadecimal digits", 2*tokenSecret)
	}
	cluster, err := uuid.Parse(t.ClusterID)
	if err != nil {
		return "", fmt.Errorf("encode token: cluster id: %w", err)
	}
	if err := validateTokenAddrs(t.Addrs); err != nil {
		return "", fmt.Errorf("encode token: %w", err)
	}
	var role byte
	for i, r := range tokenRoles {
		if r == t.Role {
			role = byte(i)
		}
	}
	if role == 0 {
		return "", fmt.Errorf("encode token: %w", t.Role.validate())
	}
	b := append(make([]byte, 0, tokenFixed+64), role)
	b = append(b, id...)
	b = append(b, secret...)
	b = append(b, t.Pin[:]...)
	b = append(b, cluster[:]...)
	b = binary.BigEndian.AppendUint64(b, uint64(t.Expires.Unix()))
	b = append(b, byte(len(t.Addrs)))
	for _, a := range t.Addrs {
		b = append(append(b, byte(len(a))), a...)
	}
	b = binary.BigEndian.AppendUint32(b, tokenSum(b))
	return tokenPrefix + tokenEncoding.EncodeToString(b), nil
}

func tokenSum(b []byte) uint32 {
	return crc32.Update(crc32.ChecksumIEEE([]byte(tokenPrefix)), crc32.IEEETable, b)
}

// ParseToken reads the printed form; white space around it is ignored.
// [ErrTokenMalformed] when it is no token, or incomplete or mistyped;
// [ErrTokenVersion] when another version of pgha made it. Nothing of the input
// is repeated in the error.
func ParseToken(s string) (Token, error) {
	s = strings.TrimSpace(s)
	if s == "" {
		return Token{}, refuse(CodeTokenMalformed, "the token is empty")
	}
	version, body, ok := strings.Cut(s, "_")
	digits, isToken := strings.CutPrefix(version, "pgha")
	if !ok || !isToken {
		return Token{}, refuse(CodeTokenMalformed, "this is not a pgha token: one begins with %q (pgha token create prints it)", tokenPrefix)
	}
	if version+"_" != tokenPrefix {
		if n, err := strconv.ParseUint(digits, 10, 16); err == nil && n > 0 {
			return Token{}, refuse(CodeTokenVersion, "the token is of version %d, this pgha reads version 1: install the same pgha on both nodes", n)
		}
		return Token{}, mistyped()
	}
	if len(s) > maxTokenText {
		return Token{}, mistyped()
	}
	b, err := tokenEncoding.DecodeString(body)
	// Encoding again rejects what the decoder lets pass: line breaks inside
	// and unused bits that are not zero.
	if err != nil || tokenEncoding.EncodeToString(b) != body || len(b) < tokenFixed+4 {
		return Token{}, mistyped()
	}
	b, sum := b[:len(b)-4], b[len(b)-4:]
	if tokenSum(b) != binary.BigEndian.Uint32(sum) {
		return Token{}, mistyped()
	}
	return decodeToken(b)
}

func mistyped() error {
	return refuse(CodeTokenMalformed, "the token is incomplete or mistyped: copy it again, whole, as one word")
}

// decodeToken takes the fields apart; b has tokenFixed bytes or more.
func decodeToken(b []byte) (Token, error) {
	next := func(n int) []byte {
		f := b[:n]
		b = b[n:]
		return f
	}
	var t Token
	role := int(next(1)[0])
	if role == 0 || role >= len(tokenRoles) {
		return Token{}, mistyped()
	}
	t.Role = tokenRoles[role]
	t.ID = hex.EncodeToString(next(tokenIDLen))
	t.Secret = hex.EncodeToString(next(tokenSecret))
	t.Pin = [32]byte(next(32))
	t.ClusterID = uuid.UUID(next(16)).String()
	t.Expires = time.Unix(int64(binary.BigEndian.Uint64(next(8))), 0).UTC()
	for n := int(next(1)[0]); n > 0; n-- {
		if len(b) == 0 || len(b) < 1+int(b[0]) {
			return Token{}, mistyped()
		}
		t.Addrs = append(t.Addrs, string(next(1 + int(b[0]))[1:]))
	}
	if len(b) != 0 || validateTokenAddrs(t.Addrs) != nil {
		return Token{}, mistyped()
	}
	return t, nil
}

func validateTokenAddrs(addrs []string) error {
	if len(addrs) == 0 || len(addrs) > maxTokenAddrs {
		return fmt.Errorf("a token holds 1 to %d addresses, not %d", maxTokenAddrs, len(addrs))
	}
	for _, a := range addrs {
		host, port, err := net.SplitHostPort(a)
		if err != nil || len(a) > 255 {
			return fmt.Errorf("address %q is not host:port", a)
		}
		if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
			return fmt.Errorf("address %q has no port from 1 to 65535", a)
		}
		if _, err := netip.ParseAddr(host); err != nil && !dnsRE.MatchString(host) {
			return fmt.Errorf("address %q does not begin with a host name or an IP address", a)
		}
	}
	return nil
}
