package pki

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
)

// onlyBlock returns the content of the single PEM block in data.
func onlyBlock(data []byte, typ string) ([]byte, error) {
	block, rest := pem.Decode(data)
	switch {
	case block == nil:
		return nil, fmt.Errorf("no PEM block, want one %s", typ)
	case block.Type != typ:
		return nil, fmt.Errorf("PEM block %q, want %s", block.Type, typ)
	case len(bytes.TrimSpace(rest)) > 0:
		return nil, fmt.Errorf("data after the PEM block, want one %s", typ)
	}
	return block.Bytes, nil
}

func parseCert(data []byte) (*x509.Certificate, error) {
	der, err := onlyBlock(data, pemCertificate)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse certificate: %w", err)
	}
	return cert, nil
}

func certPEM(cert *x509.Certificate) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: cert.Raw})
}

func parseKey(data []byte) (*ecdsa.PrivateKey, error) {
	der, err := onlyBlock(data, pemKey)
	if err != nil {
		return nil, err
	}
	parsed, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse private key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("private key is not ECDSA")
	}
	return key, nil
}

func encodeKey(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, fmt.Errorf("encode private key: %w", err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemKey, Bytes: der}), nil
}

// keyFits reports the two key identifiers when key is not that of cert.
func keyFits(key *ecdsa.PrivateKey, cert *x509.Certificate) error {
	if key.PublicKey.Equal(cert.PublicKey) {
		return nil
	}
	have, err := keyID(&key.PublicKey)
	if err != nil {
		return err
	}
	return fmt.Errorf("private key %x does not belong to certificate %q with key %x", have, cert.Subject, cert.SubjectKeyId)
}
