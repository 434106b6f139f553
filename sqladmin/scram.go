package sqladmin

import (
	"crypto/hmac"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"fmt"
	"regexp"
)

const (
	// scramIterations and scramSalt are PostgreSQL's own choices, salt in bytes.
	scramIterations = 4096
	scramSalt       = 16

	minPassword = 8
	maxPassword = 256

	// generatedLength is the number of characters of a generated password, of
	// generatedAlphabet: 62^32 are more than 190 bits. It needs no quoting in a
	// URL, a shell or a service file.
	generatedLength   = 32
	generatedAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
)

// Verifier returns what PostgreSQL stores of a password for SCRAM-SHA-256, with
// a new salt. It refuses a password that is shorter than 8 or longer than 256
// characters or holds others than printable ASCII, which clients would encode in
// different ways.
func Verifier(password string) (string, error) {
	if len(password) < minPassword || len(password) > maxPassword {
		return "", fmt.Errorf("the password has %d characters: use %d to %d", len(password), minPassword, maxPassword)
	}
	for _, r := range password {
		if r < ' ' || r > '~' {
			return "", errors.New("the password holds characters that clients encode in different ways: use printable ASCII")
		}
	}
	salt := make([]byte, scramSalt)
	if _, err := rand.Read(salt); err != nil {
		return "", fmt.Errorf("make salt: %w", err)
	}
	return verifier(password, salt)
}

func verifier(password string, salt []byte) (string, error) {
	salted, err := pbkdf2.Key(sha256.New, password, salt, scramIterations, sha256.Size)
	if err != nil {
		return "", fmt.Errorf("derive key of the password: %w", err)
	}
	mac := func(text string) []byte {
		h := hmac.New(sha256.New, salted)
		h.Write([]byte(text))
		return h.Sum(nil)
	}
	stored := sha256.Sum256(mac("Client Key"))
	b64 := base64.StdEncoding.EncodeToString
	return fmt.Sprintf("SCRAM-SHA-256$%d:%s$%s:%s", scramIterations, b64(salt), b64(stored[:]), b64(mac("Server Key"))), nil
}

var verifierPattern = regexp.MustCompile(`^SCRAM-SHA-256\$[0-9]{4,9}:[A-Za-z0-9+/=]{8,}\$[A-Za-z0-9+/=]{44}:[A-Za-z0-9+/=]{44}$`)

// checkVerifier refuses what Verifier does not make: PostgreSQL would take it
// for a password in the clear.
func checkVerifier(s string) error {
	if !verifierPattern.MatchString(s) {
		return errors.New("this is no SCRAM-SHA-256 verifier")
	}
	return nil
}

// GeneratePassword returns a new password of 32 letters and digits.
func GeneratePassword() (string, error) {
	// 248 is the largest multiple of the alphabet's size that fits in a byte.
	const limit = 256 - 256%len(generatedAlphabet)
	out := make([]byte, 0, generatedLength)
	for b := make([]byte, generatedLength); ; {
		if _, err := rand.Read(b); err != nil {
			return "", fmt.Errorf("make password: %w", err)
		}
		for _, v := range b {
			if int(v) < limit {
				out = append(out, generatedAlphabet[int(v)%len(generatedAlphabet)])
			}
			if len(out) == generatedLength {
				return string(out), nil
			}
		}
	}
}
