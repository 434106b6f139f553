package embedded

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/server/v3/etcdserver/api/membership"
)

// peerTimeout bounds one question to one peer.
const peerTimeout = 3 * time.Second

// maxMembersBody bounds the answer: nine members are some kilobytes.
const maxMembersBody = 1 << 20

// peersToAsk is InitialCluster without this member.
func (c Config) peersToAsk() map[string]string {
	peers := maps.Clone(c.InitialCluster)
	maps.DeleteFunc(peers, func(_, u string) bool { return u == c.PeerURL })
	return peers
}

// joinCluster asks the members of cfg.InitialCluster for the membership and
// returns it in the form of an initial cluster. It refuses to start a member
// that the cluster knows to have run: etcd would start it with an empty log and
// panic on the first message that refers to what it once acknowledged.
func joinCluster(ctx context.Context, cfg Config) (map[string]string, error) {
	info := cfg.tlsInfo()
	tc, err := info.ClientConfig()
	if err != nil {
		return nil, fmt.Errorf("load etcd certificate: %w", err)
	}
	tc.MinVersion = tls.VersionTLS13
	transport := &http.Transport{TLSClientConfig: tc}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: peerTimeout}

	var failures []string
	answered := false
	for name, u := range cfg.peersToAsk() {
		members, err := fetchMembers(ctx, client, u)
		if errors.Is(err, ErrOtherCluster) {
			return nil, err
		}
		if err != nil {
			failures = append(failures, fmt.Sprintf("%s at %s: %v", name, u, err))
			continue
		}
		answered = true
		i := slices.IndexFunc(members, func(m *membership.Member) bool { return slices.Contains(m.PeerURLs, cfg.PeerURL) })
		if i < 0 {
			continue // that peer may lag behind: ask the others
		}
		if self := members[i]; !self.IsLearner || self.Name != "" {
			return nil, fmt.Errorf("%w: the cluster lists %s (%s) as a member that has run, but %s is empty; %s",
				ErrNeedsRejoin, cfg.PeerURL, self.ID, cfg.DataDir, adviceRejoin)
		}
		return initialCluster(cfg, members), nil
	}
	switch {
	case answered:
		return nil, fmt.Errorf("%w: the cluster does not list %s; join it with a token first", ErrNotMember, cfg.PeerURL)
	case len(failures) == 0:
		return nil, fmt.Errorf("%w: a member without data must be told whom to ask (initial cluster)", ErrConfig)
	default:
		return nil, fmt.Errorf("%w: %s; check that the members run and that their peer port is open to this node",
			ErrNoPeer, strings.Join(failures, ", "))
	}
}

// initialCluster takes the list as the cluster has it, which etcd compares with
// its own answer. Names matter to etcd only as keys: members that have not run
// have none yet.
func initialCluster(cfg Config, members []*membership.Member) map[string]string {
	out := make(map[string]string, len(members))
	for _, m := range members {
		switch {
		case len(m.PeerURLs) == 0:
		case slices.Contains(m.PeerURLs, cfg.PeerURL):
			out[cfg.Name] = cfg.PeerURL
		default:
			out["member-"+m.ID.String()] = m.PeerURLs[0]
		}
	}
	return out
}

func fetchMembers(ctx context.Context, client *http.Client, peerURL string) (members []*membership.Member, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, peerURL+"/members", nil)
	if err != nil {
		return nil, fmt.Errorf("build request: %w", err)
	}
	resp, err := client.Do(req)
	if err != nil {
		return nil, tlsError(peerURL, err)
	}
	defer func() { err = errors.Join(err, resp.Body.Close()) }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxMembersBody))
	if err != nil {
		return nil, tlsError(peerURL, err)
	}
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("got %s", resp.Status)
	}
	if err := json.Unmarshal(body, &members); err != nil {
		return nil, fmt.Errorf("decode members: %w", err)
	}
	return members, nil
}

// tlsError tells another cluster's certificates from a peer that is away.
func tlsError(peerURL string, err error) error {
	var unknown x509.UnknownAuthorityError
	if errors.As(err, &unknown) || strings.Contains(err.Error(), "unknown certificate authority") {
		return fmt.Errorf("%w: certificates of %s and of this node come from different CAs: %w", ErrOtherCluster, peerURL, err)
	}
	return err
}
