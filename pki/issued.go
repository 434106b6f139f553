package pki

import (
	"crypto/x509"
	"time"
)

// IssuedAt returns when a certificate that a cluster's CA signed was made: it is
// valid from a little earlier, for the sake of clocks that are behind.
func IssuedAt(c *x509.Certificate) time.Time { return c.NotBefore.Add(backdate) }
