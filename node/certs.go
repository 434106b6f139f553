package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"syscall"
	"time"

	"pgha/cluster"
	"pgha/pki"
	"pgha/supervisor"
)

// renewCertificates replaces the certificates that are past two thirds of
// their life, or whose names no longer match the roster, and has every part
// load them without a restart.
func (n *Node) renewCertificates(ctx context.Context, w world) error {
	due, err := n.dueCertificates(w, time.Now())
	if err != nil || len(due) == 0 {
		return err
	}
	return n.reissue(ctx, w, due)
}

// dueCertificates returns the roles to renew, each with its reason.
func (n *Node) dueCertificates(w world, now time.Time) (map[pki.Role]string, error) {
	specs := n.leafSpecs(w)
	trust, err := n.pki.Trust()
	if err != nil {
		return nil, err
	}
	due := map[pki.Role]string{}
	for role, spec := range specs {
		b, err := n.pki.Bundle(role)
		if err != nil {
			return nil, fmt.Errorf("read certificate %s: %w", role, err)
		}
		if ok, why := pki.NeedsRenewal(b, spec, trust, now); ok {
			due[role] = why
		}
	}
	return due, nil
}

// leafSpecs says what this node's certificates must look like; it is empty
// until the roster names this node.
func (n *Node) leafSpecs(w world) map[pki.Role]pki.LeafSpec {
	i := slices.IndexFunc(w.Members, func(m cluster.Member) bool { return m.Name == n.cfg.Name })
	if i < 0 {
		return nil
	}
	return cluster.LeafSpecs(n.identity(), w.Members[i], w.Members, w.Settings)
}

func (n *Node) identity() cluster.Identity {
	return cluster.Identity{ID: n.state.ClusterID, Name: n.state.ClusterName, CreatedAt: n.state.CreatedAt}
}

// reissue makes a new key and has a new certificate signed for each role.
func (n *Node) reissue(ctx context.Context, w world, due map[pki.Role]string) error {
	n.renewMu.Lock()
	defer n.renewMu.Unlock()
	keys, csrs := map[pki.Role][]byte{}, map[pki.Role][]byte{}
	for role := range due {
		key, csr, err := pki.NewKeyAndCSR(string(role))
		if err != nil {
			return fmt.Errorf("make key for %s: %w", role, err)
		}
		keys[role], csrs[role] = key, csr
	}
	signed, ca, err := n.sign(ctx, w, csrs)
	if err != nil {
		return err
	}
	var errs []error
	for _, role := range slices.Sorted(maps.Keys(due)) {
		b := pki.Bundle{KeyPEM: keys[role], CertPEM: signed[role], CAPEM: ca}
		if err := n.pki.WriteBundle(role, b); err != nil {
			errs = append(errs, fmt.Errorf("write certificate %s: %w", role, err))
			continue
		}
		n.log.Info("certificate renewed", "role", role, "why", due[role])
		if err := n.loadCert(ctx, role); err != nil {
			errs = append(errs, fmt.Errorf("load new certificate %s: %w", role, err))
		}
	}
	return errors.Join(errs...)
}

// sign has requests signed: by this node where it holds the CA's key, and by
// a data node otherwise. It returns the certificates and that of the CA.
func (n *Node) sign(ctx context.Context, w world, csrs map[pki.Role][]byte) (certs map[pki.Role][]byte, caPEM []byte, err error) {
	if n.sealing == nil {
		return n.renewRemotely(ctx, w, csrs)
	}
	ca, err := n.ca()
	if err != nil {
		return nil, nil, err
	}
	specs := n.leafSpecs(w)
	out := map[pki.Role][]byte{}
	for role, csr := range csrs {
		if out[role], err = ca.Sign(csr, specs[role], time.Now()); err != nil {
			return nil, nil, fmt.Errorf("sign certificate %s: %w", role, err)
		}
	}
	return out, ca.CertPEM(), nil
}

// ca opens the CA's key, which stands sealed on data nodes.
func (n *Node) ca() (*pki.CA, error) {
	if n.sealing == nil {
		return nil, errors.New("a witness holds no CA key: ask a data node")
	}
	cert, err := n.pki.CACert()
	if err != nil {
		return nil, err
	}
	sealed, err := os.ReadFile(n.paths.sealedCAKey())
	if err != nil {
		return nil, fmt.Errorf("read CA key: %w", err)
	}
	key, err := cluster.OpenCAKey(*n.sealing, n.state.ClusterID, sealed)
	if err != nil {
		return nil, fmt.Errorf("open CA key: %w", err)
	}
	return pki.LoadCA(cert, key)
}

// loadCert has the part that uses a role's certificate read it again. etcd and
// the API read theirs at each handshake.
func (n *Node) loadCert(ctx context.Context, role pki.Role) error {
	switch role {
	case pki.RolePostgres:
		return n.reloadPostgres(ctx)
	case pki.RolePatroni:
		return signalRunning(n.patroni, syscall.SIGHUP)
	case pki.RoleHAProxy:
		if n.haproxy.Status().State != supervisor.Running {
			return nil // it reads the file when it starts
		}
		pem, err := os.ReadFile(n.pki.BundlePath(role))
		if err != nil {
			return fmt.Errorf("read certificate: %w", err)
		}
		return n.runtime.SetCert(ctx, n.pki.BundlePath(role), pem)
	}
	return nil
}

// signalRunning sends sig to a child; one that does not run has nothing to
// reload.
func signalRunning(p *supervisor.Process, sig syscall.Signal) error {
	if p.Status().State != supervisor.Running {
		return nil
	}
	return p.Signal(sig)
}
