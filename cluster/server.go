package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"time"

	"pgha/pki"
)

// finishTimeout bounds what follows once a token is consumed; it goes on when
// the joiner hangs up.
const finishTimeout = 30 * time.Second

// joinAttempts is how often a join is evaluated anew because the roster or the
// token changed in between.
const joinAttempts = 10

// Membership adds etcd members.
type Membership interface {
	// AddLearner makes the member with this peer URL a learner and returns the
	// etcd members' names and peer URLs. A member that is there already, in
	// whatever role, is no error. A member that has not started has no name
	// in etcd: any unique key may stand for it.
	AddLearner(ctx context.Context, peerURL string) (initialCluster map[string]string, err error)
}

// Replacement is a member that gives its place to another.
type Replacement struct {
	Old    string // who is taken out
	By     string // who made the token
	Token  string // its id
	New    Member // who joins
	DryRun bool   // only say whether it would be refused
}

// Server takes new members in and renews certificates. All fields but those
// marked optional must be set, and not changed once it serves. It is safe for
// concurrent use; a Server must not be copied.
type Server struct {
	Store      *Store
	Identity   Identity
	Node       string                     // name of the member that serves
	Version    string                     // of pgha
	PGMajor    func() int                 // optional; 0 when not known
	CA         func() (*pki.CA, error)    // nil on a witness
	Trust      func() ([]byte, error)     // optional: ca.crt, where it holds more than CA's certificate
	Key        func() (SealingKey, error) // nil on a witness
	Membership Membership
	// Replace takes a member that is gone for good out of the cluster, in favour
	// of one that joins. It refuses, with an [*Error], while that one may still be
	// alive or the others cannot do without it. nil: no token replaces anybody.
	Replace  func(context.Context, Replacement) error
	OnMember func(Member)     // optional; called before the answer: opens the firewall
	Now      func() time.Time // optional
	Log      *slog.Logger     // optional

	fails failures
}

func (s *Server) now() time.Time {
	if s.Now == nil {
		return time.Now()
	}
	return s.Now()
}

func (s *Server) log() *slog.Logger {
	if s.Log == nil {
		return slog.New(slog.DiscardHandler)
	}
	return s.Log
}

// Hello says who this member is and what time it has. It needs no etcd.
func (s *Server) Hello() Hello {
	return Hello{
		ClusterID: s.Identity.ID, ClusterName: s.Identity.Name, Node: s.Node, Version: s.Version,
		PGMajor: s.pgMajor(), Signs: s.signs(), Time: s.now().UTC(),
	}
}

func (s *Server) signs() bool { return s.CA != nil && s.Key != nil }

func (s *Server) pgMajor() int {
	if s.PGMajor == nil {
		return 0
	}
	return s.PGMajor()
}

// Join takes a new member in: it checks token and request, signs, consumes the
// token and writes the member in one transaction, adds the etcd learner and
// answers. A refusal (an [*Error]) before the transaction changes nothing, but
// for the count of wrong secrets; after it, the same request may be repeated
// until it is answered. Other errors mean that etcd did not answer.
func (s *Server) Join(ctx context.Context, remote netip.Addr, req JoinRequest) (JoinResponse, error) {
	if !s.fails.allow(remote, s.now()) {
		return JoinResponse{}, refuse(CodeTooManyAttempts, "too many failed attempts from %s: wait a minute", remote)
	}
	if !s.signs() {
		return JoinResponse{}, refuse(CodeCannotSign, "%s is a witness and cannot take members in: ask a data node", s.Node)
	}
	ca, err := s.CA()
	if err != nil {
		return JoinResponse{}, fmt.Errorf("load CA: %w", err)
	}
	key, err := s.Key()
	if err != nil {
		return JoinResponse{}, fmt.Errorf("load sealing key: %w", err)
	}
	for range joinAttempts {
		resp, done, err := s.tryJoin(ctx, remote, req, ca, key)
		if done || err != nil {
			return resp, err
		}
	}
	return JoinResponse{}, refuse(CodeUnavailable, "the roster keeps changing: repeat the join")
}

// tryJoin evaluates the request against one revision of the store. done is
// false when the store has changed before the result could be written.
func (s *Server) tryJoin(ctx context.Context, remote netip.Addr, req JoinRequest, ca *pki.CA, key SealingKey) (_ JoinResponse, done bool, err error) {
	v, err := s.Store.joinView(ctx, req.TokenID)
	if err != nil {
		return JoinResponse{}, false, err
	}
	if err := s.authenticate(ctx, remote, v, req); err != nil {
		return JoinResponse{}, false, err
	}
	hash, err := req.check()
	if err != nil {
		return JoinResponse{}, false, err
	}
	now := s.now()
	action, err := decideJoin(joinFacts{
		token: v.token, members: v.members, node: s.Node, version: s.Version, pgMajor: s.pgMajor(), now: now,
	}, req, hash)
	if err != nil {
		return JoinResponse{}, false, err
	}
	self := req.member(hash, now)
	if action == joinRepeat {
		for _, m := range v.members {
			if m.Name == self.Name {
				self = resume(self, m)
			}
		}
	}
	// Signing comes first: whatever it refuses is refused before a change.
	resp, err := s.prepare(ca, key, v, self, req.CSRs, now)
	if err != nil {
		return JoinResponse{}, false, err
	}
	if action == joinReplace {
		if s.Replace == nil {
			return JoinResponse{}, false, refuse(CodeCannotSign, "%s cannot replace a member: ask another data node", s.Node)
		}
		r := Replacement{Old: v.token.Replaces, By: v.token.CreatedBy, Token: v.token.ID, New: self, DryRun: req.DryRun}
		if err := s.Replace(ctx, r); err != nil {
			return JoinResponse{}, false, err
		}
	}
	if req.DryRun {
		return JoinResponse{}, true, nil
	}
	if action == joinReplace {
		return JoinResponse{}, false, nil // the roster has changed
	}
	written, err := s.Store.admit(ctx, v, self, now)
	if err != nil || !written {
		return JoinResponse{}, false, err
	}
	resp, err = s.finish(ctx, self, resp)
	return resp, true, err
}

// resume is the entry of a join that is repeated: a finished one stays as it is.
func resume(self, stored Member) Member {
	if stored.State == StateMember {
		return stored
	}
	self.Rev = stored.Rev
	return self
}

// authenticate checks the secret. An unknown token and a wrong secret look the
// same to the caller; the log tells them apart.
func (s *Server) authenticate(ctx context.Context, remote netip.Addr, v joinView, req JoinRequest) error {
	if v.found && v.token.matches(req.Secret) {
		return nil
	}
	s.fails.note(remote, s.now())
	cause := errors.New("token id is not known")
	if v.found {
		cause = fmt.Errorf("wrong secret for token %s (%d before)", v.token.ID, v.token.Wrong)
		if err := s.Store.countWrongSecret(ctx, v.token.ID); err != nil {
			cause = fmt.Errorf("%w; %w", cause, err)
		}
	}
	return refuse(CodeTokenUnknown, "the cluster %s does not know this token: it was deleted, or made elsewhere; create a new one (pgha token create)", s.Identity.Name).because(cause)
}

// prepare makes everything of the answer that does not depend on etcd's members.
func (s *Server) prepare(ca *pki.CA, key SealingKey, v joinView, self Member, csrs map[pki.Role][]byte, now time.Time) (JoinResponse, error) {
	roster := slices.DeleteFunc(append(slices.Clone(v.members), self), func(m Member) bool {
		return m.Name == v.token.Replaces && m.TokenID != self.TokenID
	})
	certs, err := sign(ca, LeafSpecs(s.Identity, self, roster, v.settings), csrs, now)
	if err != nil {
		return JoinResponse{}, err
	}
	trust, err := s.trust(ca)
	if err != nil {
		return JoinResponse{}, err
	}
	resp := JoinResponse{Identity: s.Identity, CAPEM: trust, Certs: certs, Settings: v.settings}
	if self.Role == RoleData {
		secrets, err := OpenSecrets(key, s.Identity.ID, v.sealedSecrets)
		if err != nil {
			return JoinResponse{}, err
		}
		resp.Secrets, resp.SealedCAKey, resp.ClusterKey = &secrets, v.sealedCAKey, key[:]
	}
	return resp, nil
}

// trust returns the CA certificates for a joiner, ca's first.
func (s *Server) trust(ca *pki.CA) ([]byte, error) {
	if s.Trust == nil {
		return ca.CertPEM(), nil
	}
	trust, err := s.Trust()
	if err != nil {
		return nil, fmt.Errorf("load CA certificates: %w", err)
	}
	if first, err := pki.Signer(trust); err != nil || !bytes.Equal(first, ca.CertPEM()) {
		return nil, refuse(CodeUnavailable, "%s is just changing to another CA: repeat the join", s.Node)
	}
	return trust, nil
}

func sign(ca *pki.CA, specs map[pki.Role]pki.LeafSpec, csrs map[pki.Role][]byte, now time.Time) (map[pki.Role][]byte, error) {
	certs := make(map[pki.Role][]byte, len(csrs))
	for role, csr := range csrs {
		spec, ok := specs[role]
		if !ok {
			return nil, refuse(CodeBadRequest, "there is no certificate for %q on this node", string(role))
		}
		cert, err := ca.Sign(csr, spec, now)
		if err != nil {
			return nil, refuse(CodeBadRequest, "%s", oneLine(err)).because(err)
		}
		certs[role] = cert
	}
	return certs, nil
}

// finish does what follows the transaction; every step can be repeated.
func (s *Server) finish(ctx context.Context, self Member, resp JoinResponse) (JoinResponse, error) {
	// The joiner may hang up; a half-made member is for nobody's good.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), finishTimeout)
	defer cancel()
	if s.OnMember != nil {
		s.OnMember(self)
	}
	initial, err := s.Membership.AddLearner(ctx, self.PeerURL())
	if err != nil {
		return JoinResponse{}, refuse(CodeMembership, "%s is in the roster, but etcd does not take it in yet (%s): repeat the same command", self.Name, oneLine(err)).because(err)
	}
	resp.Members, _, err = s.Store.Members(ctx)
	if err != nil {
		return JoinResponse{}, err
	}
	resp.InitialCluster = initialCluster(initial, resp.Members, self)
	return resp, nil
}

// initialCluster gives every peer URL the name of its member in the roster:
// etcd itself does not know the names of members that have not started.
func initialCluster(etcd map[string]string, members []Member, self Member) map[string]string {
	byURL := map[string]string{self.PeerURL(): self.Name}
	for _, m := range members {
		byURL[m.PeerURL()] = m.Name
	}
	out := map[string]string{self.Name: self.PeerURL()}
	for name, url := range etcd {
		if n, ok := byURL[url]; ok {
			name = n
		}
		out[name] = url
	}
	return out
}

// Renew signs new certificates for peer, which has proved its identity by its
// current node certificate. It refuses with [ErrNoMember] who is not in the
// roster any more, and with [ErrOtherCluster] who is of another cluster.
func (s *Server) Renew(ctx context.Context, peer pki.Identity, req RenewRequest) (RenewResponse, error) {
	if peer.ClusterID != s.Identity.ID {
		return RenewResponse{}, refuse(CodeOtherCluster, "%s is of cluster %s, this is cluster %s (%s)", peer.Node, peer.ClusterID, s.Identity.ID, s.Identity.Name)
	}
	if peer.Role != pki.RoleNode {
		return RenewResponse{}, refuse(CodeBadRequest, "certificates are renewed with the %q certificate, not with the one for %q", string(pki.RoleNode), string(peer.Role))
	}
	if !s.signs() {
		return RenewResponse{}, refuse(CodeCannotSign, "%s is a witness and cannot sign: ask a data node", s.Node)
	}
	members, _, err := s.Store.Members(ctx)
	if err != nil {
		return RenewResponse{}, err
	}
	i := slices.IndexFunc(members, func(m Member) bool { return m.Name == peer.Node })
	if i < 0 {
		return RenewResponse{}, noMember(peer.Node)
	}
	self := members[i]
	if err := checkRoles(req.CSRs, self.Role, false); err != nil {
		return RenewResponse{}, refuse(CodeBadRequest, "%s", err)
	}
	set, _, err := s.Store.Settings(ctx)
	if err != nil {
		return RenewResponse{}, err
	}
	ca, err := s.CA()
	if err != nil {
		return RenewResponse{}, fmt.Errorf("load CA: %w", err)
	}
	certs, err := sign(ca, LeafSpecs(s.Identity, self, members, set), req.CSRs, s.now())
	if err != nil {
		return RenewResponse{}, err
	}
	return RenewResponse{CAPEM: ca.CertPEM(), Certs: certs}, nil
}
