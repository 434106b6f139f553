package cluster

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"pgha/pki"
)

// MaxClockSkew is how far apart the clocks of two nodes may be.
const MaxClockSkew = 5 * time.Second

// Paths of the join API.
const (
	PathHello = "/v1/hello"
	PathJoin  = "/v1/join"
	PathRenew = "/v1/renew"
)

// Hello is what a member tells anyone who asks.
type Hello struct {
	ClusterID   string    `json:"cluster_id"`
	ClusterName string    `json:"cluster_name"`
	Node        string    `json:"node"`
	Version     string    `json:"version"`  // of pgha
	PGMajor     int       `json:"pg_major"` // 0: not known here
	Signs       bool      `json:"signs"`    // false on a witness: it cannot take a new member in
	Time        time.Time `json:"time"`
}

// JoinRequest is what a new node asks. [Join] fills TokenID, Secret and Time.
type JoinRequest struct {
	TokenID string              `json:"token_id"`
	Secret  string              `json:"secret"`
	Name    string              `json:"name"`
	Role    NodeRole            `json:"role"`
	Addr    netip.Addr          `json:"addr"`
	Ports   Ports               `json:"ports"`
	SANs    []string            `json:"sans,omitempty"`
	CSRs    map[pki.Role][]byte `json:"csrs"` // PEM, one for each of Role.Roles()
	Time    time.Time           `json:"time"`
	Version string              `json:"version"`
	PGMajor int                 `json:"pg_major"` // 0 on a witness
	// DryRun asks what would be refused, and changes nothing. The answer holds
	// nothing either.
	DryRun bool `json:"dry_run,omitempty"`
}

// JoinResponse is what a new node needs to start.
type JoinResponse struct {
	Identity       `json:"identity"`
	CAPEM          []byte              `json:"ca"`    // what ca.crt holds: the CA that signs comes first
	Certs          map[pki.Role][]byte `json:"certs"` // PEM
	Members        []Member            `json:"members"`
	InitialCluster map[string]string   `json:"initial_cluster"` // etcd name to peer URL, the new node's included
	Settings       Settings            `json:"settings"`
	Secrets        *Secrets            `json:"secrets,omitempty"`       // data nodes only
	SealedCAKey    []byte              `json:"sealed_ca_key,omitempty"` // data nodes only
	ClusterKey     []byte              `json:"cluster_key,omitempty"`   // data nodes only; see SealingKeyFrom
}

// RenewRequest asks for new certificates, for any of the node's own roles.
type RenewRequest struct {
	CSRs map[pki.Role][]byte `json:"csrs"` // PEM
}

// RenewResponse holds the new certificates.
type RenewResponse struct {
	CAPEM []byte              `json:"ca"`
	Certs map[pki.Role][]byte `json:"certs"` // PEM
}

// wireJSON is the request as it is sent; its own MarshalJSON refuses.
func (r JoinRequest) wireJSON() ([]byte, error) {
	type plain JoinRequest
	return json.Marshal(plain(r))
}

// wireJSON is the response as it is sent; its own MarshalJSON refuses.
func (r JoinResponse) wireJSON() ([]byte, error) {
	type plain JoinResponse
	return json.Marshal(struct {
		*plain
		Secrets *plainSecrets `json:"secrets,omitempty"` // in place of plain's, which refuses
	}{(*plain)(&r), (*plainSecrets)(r.Secrets)})
}

// CSRHash identifies a join by the public keys of its certificate requests,
// whose signatures are checked: only the holder of the private keys can have
// made them.
func CSRHash(csrs map[pki.Role][]byte) (string, error) {
	roles := make([]pki.Role, 0, len(csrs))
	for r := range csrs {
		roles = append(roles, r)
	}
	slices.Sort(roles)
	h := sha256.New()
	for _, role := range roles {
		block, _ := pem.Decode(csrs[role])
		if block == nil {
			return "", fmt.Errorf("certificate request for %q is not PEM", string(role))
		}
		csr, err := x509.ParseCertificateRequest(block.Bytes)
		if err != nil {
			return "", fmt.Errorf("certificate request for %q: %w", string(role), err)
		}
		if err := csr.CheckSignature(); err != nil {
			return "", fmt.Errorf("certificate request for %q: %w", string(role), err)
		}
		fmt.Fprintf(h, "%d:%s:%d:", len(role), role, len(csr.RawSubjectPublicKeyInfo))
		h.Write(csr.RawSubjectPublicKeyInfo)
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

// member is the roster entry that the request asks for.
func (r JoinRequest) member(csrHash string, now time.Time) Member {
	return Member{
		Name: r.Name, Role: r.Role, Addr: r.Addr, Ports: r.Ports, SANs: r.SANs, JoinedAt: stamp(now),
		TokenID: r.TokenID, CSRHash: csrHash, State: StateJoining, Version: r.Version,
	}
}

// check returns the hash of the request's keys, or everything that is wrong
// with the request whatever the state of the cluster.
func (r JoinRequest) check() (csrHash string, err error) {
	errs := []error{r.member("", time.Time{}).Validate()}
	if len(r.Version) > 100 {
		errs = append(errs, errors.New("the version is too long"))
	}
	if r.Role.validate() == nil {
		errs = append(errs, checkRoles(r.CSRs, r.Role, true))
	}
	hash, err := CSRHash(r.CSRs)
	if err := errors.Join(append(errs, err)...); err != nil {
		return "", refuse(CodeBadRequest, "the join request is not valid: %s", oneLine(err))
	}
	return hash, nil
}

// checkRoles refuses requests for roles that a node does not have and, when
// whole is set, a set that lacks one.
func checkRoles(csrs map[pki.Role][]byte, node NodeRole, whole bool) error {
	allowed := node.Roles()
	for role := range csrs {
		if !slices.Contains(allowed, role) {
			return fmt.Errorf("a %s node gets no certificate for %q", string(node), string(role))
		}
	}
	if len(csrs) == 0 || whole && len(csrs) != len(allowed) {
		return fmt.Errorf("certificate requests are missing: there are %d, a %s node has %d", len(csrs), string(node), len(allowed))
	}
	return nil
}

func oneLine(err error) string { return strings.ReplaceAll(err.Error(), "\n", "; ") }

// joinAction is what an admissible join does to the store.
type joinAction int

const (
	joinRefused joinAction = iota
	joinNew                // consume the token and write the member
	joinReplace            // take out the member that the token replaces, then look again
	joinRepeat             // the token has been consumed by this very join
)

// joinFacts is what the decision about a join rests on. The secret has been
// proved already.
type joinFacts struct {
	token   tokenRecord
	members []Member
	node    string // the member that decides
	version string
	pgMajor int // 0: not known
	now     time.Time
}

// decideJoin is the whole policy of joins; it has no effects.
func decideJoin(f joinFacts, req JoinRequest, csrHash string) (joinAction, error) {
	if err := decideToken(f, req); err != nil {
		return joinRefused, err
	}
	if skew := f.now.Sub(req.Time).Abs(); skew > MaxClockSkew {
		return joinRefused, clocksApart(skew, f.node, f.now, req.Name, req.Time)
	}
	if !CompatibleVersions(f.version, req.Version) {
		return joinRefused, refuse(CodeVersion, "pgha is %s here and %s on %s: install the same version on both", f.version, req.Version, req.Name)
	}
	if req.Role == RoleData && f.pgMajor != 0 && req.PGMajor != f.pgMajor {
		return joinRefused, refuse(CodePGMajor, "the cluster runs PostgreSQL %d, %s has PostgreSQL %d: install PostgreSQL %d on it",
			f.pgMajor, req.Name, req.PGMajor, f.pgMajor)
	}
	for _, m := range f.members {
		if m.Name == req.Name && m.TokenID == req.TokenID && m.CSRHash == csrHash {
			if m.Addr != req.Addr || m.Ports != req.Ports || m.Role != req.Role {
				return joinRefused, refuse(CodeNameTaken, "the join of %s was begun with address %s and other ports or the like: repeat it with the same", m.Name, m.Addr)
			}
			return joinRepeat, nil
		}
	}
	switch f.token.state(f.now) {
	case TokenUsed:
		return joinRefused, refuse(CodeTokenUsed, "the token %s has been used%s: create a new one (pgha token create)", f.token.ID, usedBy(f.token))
	case TokenExpired:
		return joinRefused, refuse(CodeTokenExpired, "the token %s expired at %s: create a new one (pgha token create)", f.token.ID, clock(f.token.Expires))
	}
	action := joinNew
	for _, m := range f.members {
		if m.Name == f.token.Replaces && m.TokenID != f.token.ID { // its name and address become free
			action = joinReplace
			continue
		}
		if m.Name == req.Name {
			return joinRefused, refuse(CodeNameTaken, "the cluster has a member %s already (%s, %s, since %s): choose another name; or run pgha leave on that node, or pgha member replace %s if it is gone for good",
				m.Name, m.Addr, string(m.State), clock(m.JoinedAt), m.Name)
		}
		if m.Addr == req.Addr {
			return joinRefused, refuse(CodeAddressTaken, "member %s has the address %s already: each node needs its own", m.Name, m.Addr)
		}
	}
	return action, nil
}

// decideToken holds the rules of the token that a repeated join must meet too.
func decideToken(f joinFacts, req JoinRequest) error {
	switch f.token.state(f.now) {
	case TokenRevoked:
		return refuse(CodeTokenRevoked, "the token %s was revoked: create a new one (pgha token create)", f.token.ID)
	case TokenLocked:
		return refuse(CodeTokenLocked, "the token %s is locked after %d wrong secrets: create a new one (pgha token create)", f.token.ID, f.token.Wrong)
	}
	if req.Role != f.token.Role {
		return refuse(CodeTokenRole, "the token %s is for a %s node, %s is to be a %s node: create one for that role", f.token.ID, string(f.token.Role), req.Name, string(req.Role))
	}
	if f.token.Name != "" && req.Name != f.token.Name {
		return refuse(CodeTokenName, "the token %s is for the node %s, not for %s", f.token.ID, f.token.Name, req.Name)
	}
	return nil
}

func usedBy(r tokenRecord) string {
	var b strings.Builder
	for i, u := range r.UsedBy {
		sep := ", "
		if i == 0 {
			sep = " by "
		}
		fmt.Fprintf(&b, "%s%s at %s", sep, u.Name, clock(u.At))
	}
	return b.String()
}

func clocksApart(skew time.Duration, a string, at time.Time, b string, bt time.Time) error {
	const layout = "2006-01-02T15:04:05.000Z"
	return refuse(CodeClocksApart, "the clocks are %s apart: on %s it is %s, on %s it is %s: synchronise both and repeat (at most %s is allowed)",
		skew.Round(time.Millisecond), a, at.UTC().Format(layout), b, bt.UTC().Format(layout), MaxClockSkew)
}

func clock(t time.Time) string { return t.UTC().Format(time.RFC3339) }

// CompatibleVersions says whether two versions of pgha may be in one cluster:
// same major version, minor versions next to each other. What is no version
// (a build from a working tree) is compatible with everything.
func CompatibleVersions(a, b string) bool {
	aMajor, aMinor, aOK := parseVersion(a)
	bMajor, bMinor, bOK := parseVersion(b)
	if !aOK || !bOK {
		return true
	}
	return aMajor == bMajor && max(aMinor, bMinor)-min(aMinor, bMinor) <= 1
}

func parseVersion(v string) (major, minor uint64, ok bool) {
	parts := strings.SplitN(strings.TrimPrefix(v, "v"), ".", 3)
	if len(parts) < 2 {
		return 0, 0, false
	}
	major, err1 := strconv.ParseUint(parts[0], 10, 32)
	minor, err2 := strconv.ParseUint(parts[1], 10, 32)
	return major, minor, err1 == nil && err2 == nil
}
