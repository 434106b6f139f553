package node

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"time"

	"pgha/cluster"
	"pgha/patroni"
	"pgha/pki"
)

const (
	// askTimeout bounds a question to a peer: a host that is gone answers nothing.
	askTimeout = 1500 * time.Millisecond
	// seenFresh is how long a peer's answer counts as lately.
	seenFresh = 5 * time.Second
	// maxRestClients is how many clients of Patroni's API are kept.
	maxRestClients = 100
	// peerBody is the most that is read of a peer's answer, in bytes.
	peerBody = 4 << 20
)

// peers asks the other members for their reports and remembers the answers.
type peers struct {
	n      *Node
	client *http.Client

	mu   sync.Mutex
	last map[string]Report // by name, with the time of this node's clock
}

func (p *peers) init(n *Node) {
	p.n, p.last = n, map[string]Report{}
	p.client = &http.Client{Transport: &http.Transport{
		// Certificate and CAs are read at each connection, so new ones are used at
		// once.
		DialTLSContext:      n.certs.DialTLS(askTimeout, n.isPeer),
		MaxIdleConnsPerHost: 2, IdleConnTimeout: 30 * time.Second,
		DisableCompression: true,
	}}
}

// isPeer accepts the node certificates of this cluster only.
func (n *Node) isPeer(id pki.Identity) error {
	if id.ClusterID != n.state.ClusterID {
		return fmt.Errorf("the certificate is of cluster %s, this is cluster %s", id.ClusterID, n.state.ClusterID)
	}
	if id.Role != pki.RoleNode {
		return fmt.Errorf("the certificate is of role %s, not of a node", id.Role)
	}
	return nil
}

// loop keeps the answers fresh for the decisions that need them.
func (p *peers) loop(ctx context.Context) error {
	t := time.NewTicker(2 * time.Second)
	defer t.Stop()
	for {
		p.ask(ctx, p.n.snapshot().Members)
		select {
		case <-ctx.Done():
			p.client.CloseIdleConnections()
			return nil
		case <-t.C:
		}
	}
}

// ask returns the reports of all members that answer now, but this one.
func (p *peers) ask(ctx context.Context, members []cluster.Member) map[string]Report {
	var wg sync.WaitGroup
	var mu sync.Mutex
	out := map[string]Report{}
	for _, m := range members {
		if m.Name == p.n.cfg.Name {
			continue
		}
		wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, askTimeout)
			defer cancel()
			var r Report
			if err := p.call(ctx, http.MethodGet, m.APIAddr(), "/v1/node", nil, &r); err != nil {
				if errors.Is(err, cluster.ErrNoMember) {
					p.n.doubtful(doubtFor)
				}
				return // no answer is the answer
			}
			r.At = time.Now()
			mu.Lock()
			out[m.Name] = r
			mu.Unlock()
		})
	}
	wg.Wait()
	p.mu.Lock()
	for name, r := range out {
		p.last[name] = r
	}
	p.mu.Unlock()
	return out
}

// lately returns the answers that are not older than seenFresh.
func (p *peers) lately() map[string]Report {
	p.mu.Lock()
	defer p.mu.Unlock()
	out := map[string]Report{}
	for name, r := range p.last {
		if time.Since(r.At) < seenFresh {
			out[name] = r
		}
	}
	return out
}

// call speaks to a peer's API; an error answer becomes a *cluster.Error.
func (p *peers) call(ctx context.Context, method, addr, path string, in, out any) error {
	return callAPI(ctx, p.client, method, "https://"+addr+path, in, out)
}

// callAPI does one request with JSON both ways.
func callAPI(ctx context.Context, c *http.Client, method, url string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("encode request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, url, body)
	if err != nil {
		return fmt.Errorf("make request: %w", err)
	}
	req.Header.Set("Content-Type", "application/json")
	return doAPI(c, req, out)
}

// doAPI sends a request and reads the answer as JSON into out, if that is not nil.
func doAPI(c *http.Client, req *http.Request, out any) error {
	url := req.URL
	resp, err := c.Do(req)
	if err != nil {
		return err // net/http names the method and the address
	}
	defer func() { _ = resp.Body.Close() }()
	data, err := io.ReadAll(io.LimitReader(resp.Body, peerBody))
	if err != nil {
		return fmt.Errorf("read answer of %s: %w", url, err)
	}
	if resp.StatusCode >= 300 {
		var e cluster.Error
		if json.Unmarshal(data, &e) == nil && e.Message != "" {
			return &e
		}
		return fmt.Errorf("%s %w %s", url, errAnswered, resp.Status)
	}
	if out == nil {
		return nil
	}
	if err := json.Unmarshal(data, out); err != nil {
		return fmt.Errorf("decode answer of %s: %w", url, err)
	}
	return nil
}

// renewRemotely has a data node sign this node's requests.
func (n *Node) renewRemotely(ctx context.Context, w world, csrs map[pki.Role][]byte) (certs map[pki.Role][]byte, caPEM []byte, err error) {
	own, err := n.pki.CACert()
	if err != nil {
		return nil, nil, err
	}
	errs := []error{errors.New("renew certificates: no data node signs")}
	for _, m := range w.Members {
		if m.Role != cluster.RoleData {
			continue
		}
		ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
		var resp cluster.RenewResponse
		err := n.seen.call(ctx, http.MethodPost, m.APIAddr(), "/v1/renew", cluster.RenewRequest{CSRs: csrs}, &resp)
		cancel()
		if err == nil && !bytes.Equal(resp.CAPEM, own) {
			err = errors.New("it signs with another CA than this node expects: it is just changing") // and so is tried again
		}
		if err == nil {
			return resp.Certs, resp.CAPEM, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", m.Name, err))
	}
	return nil, nil, errors.Join(errs...)
}

// restClient speaks to a member's Patroni as this node. Clients are kept, and
// with them their connections.
func (n *Node) restClient(w world, addr netip.Addr, port uint16) *patroni.Client {
	user, password := "", "" // reading needs the certificate only
	var former []string
	if w.Secrets != nil {
		user, password, former = cluster.PatroniRESTUser, w.Secrets.PatroniREST, w.Secrets.FormerPasswords()
	}
	url := "https://" + hostPort(addr, port)
	// Another client for other passwords and other CAs.
	key := [3]string{url, user, strings.Join(append(former, password), " ") + string(n.certs.Trust())}
	n.mu.Lock()
	defer n.mu.Unlock()
	c, ok := n.rest[key]
	if !ok {
		if len(n.rest) > maxRestClients { // of passwords and CAs that are no more
			clear(n.rest)
		}
		c = patroni.NewClient(url, n.certs.ClientConfig(nil), user, password, former...)
		n.rest[key] = c
	}
	return c
}
