package cluster

import (
	"encoding/json"
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"pgha/pki"
)

// csrs makes keys and certificate requests for every role of a node. The
// requests ask for names that no certificate may carry.
func csrs(t testing.TB, role NodeRole) map[pki.Role][]byte {
	t.Helper()
	out := map[pki.Role][]byte{}
	for _, r := range role.Roles() {
		_, csr, err := pki.NewKeyAndCSR("evil.example.com")
		if err != nil {
			t.Fatal(err)
		}
		out[r] = csr
	}
	return out
}

func TestDecideJoin(t *testing.T) {
	now := time.Unix(1900000000, 0)
	const tid = "0123456789abcdef"
	addr := func(s string) netip.Addr { return netip.MustParseAddr(s) }
	base := func() (joinFacts, JoinRequest) {
		f := joinFacts{
			token:   tokenRecord{ID: tid, Role: RoleData, Uses: 1, Expires: now.Add(time.Hour)},
			members: []Member{{Name: "node1", Addr: addr("10.0.0.1"), Role: RoleData, Ports: DefaultPorts(), State: StateMember}},
			node:    "node1", version: "1.2.0", pgMajor: 15, now: now,
		}
		r := JoinRequest{
			TokenID: tid, Name: "node2", Role: RoleData, Addr: addr("10.0.0.2"), Ports: DefaultPorts(), Time: now, Version: "1.2.0", PGMajor: 15,
		}
		return f, r
	}
	// begun is a join that has consumed the token already.
	begun := func(f *joinFacts, r *JoinRequest) {
		f.token.UsedBy = []tokenUse{{Name: "node2", At: now}}
		m := r.member("hash", now)
		f.members = append(f.members, m)
	}
	revoked := now
	for _, c := range []struct {
		name   string
		change func(*joinFacts, *JoinRequest)
		want   joinAction
		err    error
		says   string
	}{
		{"first join", func(*joinFacts, *JoinRequest) {}, joinNew, nil, ""},
		{"witness without PostgreSQL", func(f *joinFacts, r *JoinRequest) {
			f.token.Role, r.Role, r.PGMajor = RoleWitness, RoleWitness, 0
		}, joinNew, nil, ""},
		{"second use of two", func(f *joinFacts, _ *JoinRequest) {
			f.token.Uses, f.token.UsedBy = 2, []tokenUse{{Name: "node1"}}
		}, joinNew, nil, ""},
		{"name restriction met", func(f *joinFacts, _ *JoinRequest) { f.token.Name = "node2" }, joinNew, nil, ""},
		{"clock within the limit", func(_ *joinFacts, r *JoinRequest) { r.Time = now.Add(-MaxClockSkew) }, joinNew, nil, ""},
		{"PostgreSQL not known here", func(f *joinFacts, r *JoinRequest) { f.pgMajor, r.PGMajor = 0, 17 }, joinNew, nil, ""},

		{"repeat", begun, joinRepeat, nil, ""},
		{"repeat after the expiry", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.token.Expires = now.Add(-time.Minute)
		}, joinRepeat, nil, ""},
		{"repeat by a full member", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.members[1].State = StateMember
		}, joinRepeat, nil, ""},
		{"repeat with another address", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			r.Addr = addr("10.0.0.3")
		}, joinRefused, ErrNameTaken, "10.0.0.2"},
		{"repeat with other ports", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			r.Ports.EtcdPeer = 999
		}, joinRefused, ErrNameTaken, "repeat it with the same"},
		{"repeat with a revoked token", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.token.RevokedAt = &revoked
		}, joinRefused, ErrTokenRevoked, tid},
		{"used token, same name, other keys", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.members[1].CSRHash = "other"
		}, joinRefused, ErrTokenUsed, "by node2"},
		{"used token, other node", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			r.Name, r.Addr = "node3", addr("10.0.0.3")
		}, joinRefused, ErrTokenUsed, "by node2 at 2030-03-17"},
		{"used token, member gone", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.members = f.members[:1]
		}, joinRefused, ErrTokenUsed, "by node2"},
		{"same keys and name, other token", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.token.UsedBy = nil
			f.members[1].TokenID = "fedcba9876543210"
		}, joinRefused, ErrNameTaken, "node2"},

		{"in the place of another", func(f *joinFacts, _ *JoinRequest) { f.token.Replaces = "node1" }, joinReplace, nil, ""},
		{"in the place of its own name and address", func(f *joinFacts, r *JoinRequest) {
			f.token.Replaces, r.Name, r.Addr = "node1", "node1", addr("10.0.0.1")
		}, joinReplace, nil, ""},
		{"in the place of one that is out already", func(f *joinFacts, _ *JoinRequest) { f.token.Replaces = "gone" }, joinNew, nil, ""},
		{"in the place of its own name, again", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.token.Replaces = "node2"
		}, joinRepeat, nil, ""},
		{"in the place of its own name, again with other keys", func(f *joinFacts, r *JoinRequest) {
			begun(f, r)
			f.token.Replaces, f.members[1].CSRHash = "node2", "other"
		}, joinRefused, ErrTokenUsed, "by node2"},
		{"in the place of another, with a third one's address", func(f *joinFacts, r *JoinRequest) {
			f.members = append(f.members, Member{Name: "node3", Addr: addr("10.0.0.3")})
			f.token.Replaces, r.Addr = "node1", addr("10.0.0.3")
		}, joinRefused, ErrAddressTaken, "node3 has the address"},

		{"revoked", func(f *joinFacts, _ *JoinRequest) { f.token.RevokedAt = &revoked }, joinRefused, ErrTokenRevoked, "pgha token create"},
		{"locked", func(f *joinFacts, _ *JoinRequest) { f.token.Wrong = maxWrongSecrets }, joinRefused, ErrTokenLocked, "10 wrong secrets"},
		{"expired", func(f *joinFacts, _ *JoinRequest) { f.token.Expires = now }, joinRefused, ErrTokenExpired, "2030-03-17T17:46:40Z"},
		{"data with a witness's token", func(f *joinFacts, _ *JoinRequest) { f.token.Role = RoleWitness }, joinRefused, ErrTokenRole, "for a witness node"},
		{"witness with a data token", func(_ *joinFacts, r *JoinRequest) { r.Role = RoleWitness }, joinRefused, ErrTokenRole, "for a data node"},
		{"other name than the token's", func(f *joinFacts, _ *JoinRequest) { f.token.Name = "node7" }, joinRefused, ErrTokenName, "node7, not for node2"},
		{"clock behind", func(_ *joinFacts, r *JoinRequest) { r.Time = now.Add(-MaxClockSkew - time.Millisecond) }, joinRefused, ErrClocksApart, "17:46:34.999Z"},
		{"clock ahead", func(_ *joinFacts, r *JoinRequest) { r.Time = now.Add(time.Hour) }, joinRefused, ErrClocksApart, "on node1 it is 2030-03-17T17:46:40.000Z, on node2 it is 2030-03-17T18:46:40.000Z"},
		{"other PostgreSQL", func(_ *joinFacts, r *JoinRequest) { r.PGMajor = 17 }, joinRefused, ErrPGMajor, "install PostgreSQL 15"},
		{"no PostgreSQL", func(_ *joinFacts, r *JoinRequest) { r.PGMajor = 0 }, joinRefused, ErrPGMajor, "PostgreSQL 15"},
		{"other version", func(_ *joinFacts, r *JoinRequest) { r.Version = "1.4.0" }, joinRefused, ErrVersion, "1.2.0 here and 1.4.0"},
		{"name taken", func(_ *joinFacts, r *JoinRequest) { r.Name = "node1" }, joinRefused, ErrNameTaken, "node1 already (10.0.0.1"},
		{"address taken", func(_ *joinFacts, r *JoinRequest) { r.Addr = addr("10.0.0.1") }, joinRefused, ErrAddressTaken, "node1 has the address 10.0.0.1"},
	} {
		f, r := base()
		c.change(&f, &r)
		got, err := decideJoin(f, r, "hash")
		if got != c.want || (c.err == nil) != (err == nil) || c.err != nil && (!errors.Is(err, c.err) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: got %d, %v; want %d, %v %q", c.name, got, err, c.want, c.err, c.says)
		}
	}
}

func TestJoinRequestCheck(t *testing.T) {
	good := func() JoinRequest {
		return JoinRequest{
			Name: "node2", Role: RoleWitness, Addr: netip.MustParseAddr("10.0.0.2"), Ports: DefaultPorts(), CSRs: csrs(t, RoleWitness),
		}
	}
	r := good()
	if hash, err := r.check(); err != nil || len(hash) != 64 {
		t.Fatalf("good request: %q, %v", hash, err)
	}
	for want, spoil := range map[string]func(*JoinRequest){
		`node name "Node2"`:                      func(r *JoinRequest) { r.Name = "Node2" },
		`"patroni" is reserved`:                  func(r *JoinRequest) { r.Name = "patroni" },
		`role "boss"`:                            func(r *JoinRequest) { r.Role = "boss" },
		`address is missing`:                     func(r *JoinRequest) { r.Addr = netip.Addr{} },
		`0.0.0.0 cannot be`:                      func(r *JoinRequest) { r.Addr = netip.IPv4Unspecified() },
		`port api is 0`:                          func(r *JoinRequest) { r.Ports.API = 0 },
		`"a b" is neither`:                       func(r *JoinRequest) { r.SANs = []string{"a b"} },
		`a witness node gets no certificate for`: func(r *JoinRequest) { r.CSRs = csrs(t, RoleData) },
		`there are 0`:                            func(r *JoinRequest) { r.CSRs = nil },
		`a data node has 5`:                      func(r *JoinRequest) { r.Role = RoleData },
		`"node" is not PEM`:                      func(r *JoinRequest) { r.CSRs[pki.RoleNode] = []byte("x") },
		`request for "node": x509`:               func(r *JoinRequest) { r.CSRs[pki.RoleNode] = breakSignature(t, r.CSRs[pki.RoleNode]) },
		`version is too long`:                    func(r *JoinRequest) { r.Version = strings.Repeat("1", 101) },
	} {
		r := good()
		spoil(&r)
		_, err := r.check()
		if !errors.Is(err, ErrBadRequest) || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("got %v, want bad_request with %q in one line", err, want)
		}
	}
}

func TestCSRHash(t *testing.T) {
	a := csrs(t, RoleData)
	h1 := must[string](t)(CSRHash(a))
	if h2 := must[string](t)(CSRHash(a)); h1 != h2 {
		t.Error("the hash depends on the order of the map")
	}
	b := map[pki.Role][]byte{}
	for r, c := range a {
		b[r] = c
	}
	b[pki.RoleNode], b[pki.RoleAdmin] = a[pki.RoleAdmin], a[pki.RoleNode]
	if h2 := must[string](t)(CSRHash(b)); h1 == h2 {
		t.Error("keys of two roles swapped: the same hash")
	}
}

func TestWireFormsCarryEverything(t *testing.T) {
	sec := Secrets{PatroniREST: "a", StatsPage: "b"}
	resp := JoinResponse{Identity: Identity{ID: "i", Name: "n"}, Secrets: &sec, ClusterKey: []byte{1}, SealedCAKey: []byte{2}, InitialCluster: map[string]string{"a": "b"}}
	var got JoinResponse
	if err := json.Unmarshal(must[[]byte](t)(resp.wireJSON()), &got); err != nil {
		t.Fatal(err)
	}
	if got.Secrets == nil || *got.Secrets != sec || got.ID != "i" || got.ClusterKey[0] != 1 || got.SealedCAKey[0] != 2 || got.InitialCluster["a"] != "b" {
		t.Error("the response has lost something")
	}
	resp.Secrets = nil
	if data := must[[]byte](t)(resp.wireJSON()); strings.Contains(string(data), "secrets") {
		t.Errorf("a witness's answer: %s", data)
	}
	var req JoinRequest
	if err := json.Unmarshal(must[[]byte](t)(JoinRequest{TokenID: "t", Secret: "s", Name: "n"}.wireJSON()), &req); err != nil || req.Secret != "s" || req.Name != "n" {
		t.Errorf("the request has lost something: %v", err)
	}
}
