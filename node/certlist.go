package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"slices"
	"strings"
	"time"

	"pgha/cluster"
	"pgha/pki"
)

// CertReport describes a certificate of a node.
type CertReport struct {
	Role     pki.Role  `json:"role"`
	NotAfter time.Time `json:"not_after"`
	RenewAt  time.Time `json:"renew_at"` // when the node renews it by itself
	Serial   string    `json:"serial"`
	Issuer   string    `json:"issuer"` // fingerprint of the CA
	Names    []string  `json:"names,omitempty"`
}

// CAReport describes a CA certificate.
type CAReport struct {
	Fingerprint string    `json:"fingerprint"` // the beginning of its SHA-256
	NotAfter    time.Time `json:"not_after"`
}

func certReport(role pki.Role, b pki.Bundle) CertReport {
	c := CertReport{Role: role, NotAfter: b.Leaf.NotAfter, RenewAt: pki.RenewAt(b.Leaf), Serial: b.Leaf.SerialNumber.Text(16), Names: slices.Clone(b.Leaf.DNSNames)}
	c.Issuer, _ = pki.Fingerprint(b.CAPEM) // the bundle was parsed: it is one
	for _, ip := range b.Leaf.IPAddresses {
		c.Names = append(c.Names, ip.String())
	}
	return c
}

// trusted describes the CAs that this node believes.
func (n *Node) trusted() []CAReport {
	trust, err := n.pki.Trust()
	if err != nil {
		return nil // whoever uses it says so
	}
	cas, err := pki.TrustedCAs(trust)
	if err != nil {
		return nil
	}
	var out []CAReport
	for _, ca := range cas {
		out = append(out, CAReport{Fingerprint: ca.Fingerprint, NotAfter: ca.NotAfter})
	}
	return out
}

// CertsReport are the certificates of a node.
type CertsReport struct {
	Node      string       `json:"node"`
	Reachable bool         `json:"reachable"`
	Trusted   []CAReport   `json:"trusted_cas,omitempty"` // the one that signs first
	Certs     []CertReport `json:"certificates,omitempty"`
}

func (n *Node) certsHandler(w http.ResponseWriter, r *http.Request) {
	reply(w, n.allCerts(r.Context()), nil)
}

// allCerts asks every member for its certificates.
func (n *Node) allCerts(ctx context.Context) []CertsReport {
	w := n.snapshot()
	reports := n.seen.ask(ctx, w.Members)
	reports[n.cfg.Name] = n.report(ctx)
	if len(w.Members) == 0 { // not read yet
		w.Members = []cluster.Member{{Name: n.cfg.Name}}
	}
	var out []CertsReport
	for _, m := range w.Members {
		r, ok := reports[m.Name]
		out = append(out, CertsReport{Node: m.Name, Reachable: ok, Trusted: r.Trusted, Certs: r.Certs})
	}
	return out
}

// Certificates returns the certificates of all members that answer.
func (l *Local) Certificates(ctx context.Context) ([]CertsReport, error) {
	var out []CertsReport
	return out, l.call(ctx, http.MethodGet, "/v1/certificates", nil, &out)
}

// pathRenewNow has a member renew all its certificates.
const pathRenewNow = "/v1/certificates"

// RenewOrder asks for the renewal of all certificates of nodes.
type RenewOrder struct {
	Nodes []string `json:"nodes,omitempty"` // none: all
}

// renewCertsOf is the operation behind pgha cert renew.
func (n *Node) renewCertsOf(ctx context.Context, o *Operation, body json.RawMessage) (any, error) {
	var req RenewOrder
	if err := decodeRequest(body, &req); err != nil {
		return nil, err
	}
	roster := n.snapshot().Members
	var known []string
	for _, m := range roster {
		known = append(known, m.Name)
	}
	for _, name := range req.Nodes {
		if !slices.Contains(known, name) {
			return nil, &cluster.Error{Code: cluster.CodeNoMember, Message: fmt.Sprintf("the cluster has no member %q: it has %s", name, strings.Join(known, ", "))}
		}
	}
	var silent []string
	for _, m := range roster {
		if len(req.Nodes) > 0 && !slices.Contains(req.Nodes, m.Name) {
			continue
		}
		o.Leaves("the certificates of the nodes named above are renewed, the others' are as they were; both are good")
		try, cancel := context.WithTimeout(ctx, time.Minute)
		var err error
		if m.Name == n.cfg.Name {
			err = n.renewNow(try)
		} else {
			err = n.seen.call(try, http.MethodPost, m.APIAddr(), pathRenewNow, nil, nil)
		}
		cancel()
		var refusal *cluster.Error
		switch {
		case err == nil:
			o.Say("%s: its certificates are renewed; open sessions go on", m.Name)
			n.event(EventSecrets, m.Name, o.Actor(), "the certificates of %s are renewed", m.Name)
		case errors.As(err, &refusal):
			return nil, &cluster.Error{Code: refusal.Code, Message: fmt.Sprintf("renew the certificates of %s: %s", m.Name, refusal.Message)}
		default:
			o.Say("%s: it does not answer: %v", m.Name, err)
			silent = append(silent, m.Name)
		}
	}
	if len(silent) > 0 {
		return nil, &cluster.Error{Code: cluster.CodeUnavailable, Message: fmt.Sprintf("%s did not answer; its certificates are as they were, and it renews them by itself in time: start it and repeat pgha cert renew %s", strings.Join(silent, " and "), silent[0])}
	}
	return n.allCerts(ctx), nil
}

// AllCACerts returns the certificates of the CAs that this host trusts, PEM, and
// what is to be said about them; "" for nothing.
func AllCACerts(p Paths) (pem []byte, note string, err error) {
	trust, err := pki.Dir{Path: p.PKI()}.Trust()
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", fmt.Errorf("%w: is this host a node?", err)
	}
	if err != nil {
		return nil, "", err
	}
	cas, err := pki.TrustedCAs(trust)
	if err != nil {
		return nil, "", err
	}
	if len(cas) > 1 {
		note = fmt.Sprintf("The CA is being replaced: this file holds %s, which signs, and %s. Give it to every client whole.", cas[0].Fingerprint, cas[1].Fingerprint)
	}
	return trust, note, nil
}
