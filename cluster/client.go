package cluster

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"time"

	"pgha/pki"
)

const (
	dialTimeout    = 5 * time.Second
	requestTimeout = finishTimeout + 10*time.Second
	maxAnswer      = 4 << 20
)

// JoinOptions alter [Join]; the zero value is right outside of tests.
type JoinOptions struct {
	// Dial opens the TCP connection; nil: net.Dialer with 5 s.
	Dial func(ctx context.Context, network, addr string) (net.Conn, error)
	// Now is the clock that is compared with the members'; nil: time.Now.
	Now func() time.Time
	// RetryFor is how long Join goes on while the cluster can be reached but
	// cannot take a member in (another one is being promoted; no quorum).
	// 0: a minute; negative: one round only.
	RetryFor time.Duration
	// RetryEvery is the mean pause between rounds; 0: 2 s.
	RetryEvery time.Duration
	// Progress is told what Join waits for.
	Progress func(string)
}

// Join asks the members named in the token, one after the other, to take this
// node in. Nothing is sent before a member has proved by TLS that it belongs to
// the CA that the token pins; then its clock is compared, build makes the
// request (once; TokenID, Secret and Time are filled in here), and the request
// is sent. It may be repeated with the same keys until it succeeds.
//
// Refusals are [*Error]: those of the server as they are, besides
// [ErrUnreachable] (with the cause for every address), [ErrPinMismatch],
// [ErrOtherCluster] and [ErrClocksApart]. An error of build comes back wrapped.
func Join(ctx context.Context, tok Token, build func(Hello) (JoinRequest, error), opts JoinOptions) (JoinResponse, error) {
	if opts.Now == nil {
		opts.Now = time.Now
	}
	if opts.RetryFor == 0 {
		opts.RetryFor = time.Minute
	}
	if opts.RetryEvery <= 0 {
		opts.RetryEvery = 2 * time.Second
	}
	j := &joiner{tok: tok, build: build, opts: opts}
	deadline := time.Now().Add(opts.RetryFor)
	for {
		resp, err := j.round(ctx)
		if err == nil || !isCode(err, CodeMembership) && !isCode(err, CodeUnavailable) || time.Now().After(deadline) {
			return resp, err
		}
		if opts.Progress != nil {
			opts.Progress("waiting: " + err.Error())
		}
		// Jitter, because nodes that join together would meet again and again.
		pause := opts.RetryEvery/2 + rand.N(opts.RetryEvery)
		select {
		case <-ctx.Done():
			return JoinResponse{}, fmt.Errorf("join: %w; last: %w", ctx.Err(), err)
		case <-time.After(pause):
		}
	}
}

type joiner struct {
	tok   Token
	build func(Hello) (JoinRequest, error)
	opts  JoinOptions
	req   *JoinRequest
}

// attempt is what came of one address.
type attempt struct {
	addr string
	err  *Error
}

// nextAddress are the refusals that another member may not share.
var nextAddress = []Code{CodePinMismatch, CodeOtherCluster, CodeMembership, CodeUnavailable, CodeCannotSign, CodeUnreachable}

func (j *joiner) round(ctx context.Context) (JoinResponse, error) {
	var failed []attempt
	for _, addr := range j.tok.Addrs {
		resp, err := j.at(ctx, addr)
		if err == nil {
			return resp, nil
		}
		var e *Error
		if ctx.Err() != nil || !errors.As(err, &e) || !slices.Contains(nextAddress, e.Code) {
			return JoinResponse{}, err
		}
		failed = append(failed, attempt{addr, e})
	}
	return JoinResponse{}, summary(failed)
}

// summary makes one error of those of all addresses: the gravest gives the
// code, in the order of nextAddress.
func summary(failed []attempt) error {
	if len(failed) == 0 {
		return refuse(CodeTokenMalformed, "the token names no address")
	}
	worst := slices.MinFunc(failed, func(a, b attempt) int {
		return slices.Index(nextAddress, a.err.Code) - slices.Index(nextAddress, b.err.Code)
	})
	if len(failed) == 1 && worst.err.Code != CodeUnreachable {
		return worst.err
	}
	var parts []string
	for _, f := range failed {
		parts = append(parts, f.addr+": "+f.err.Message)
	}
	head := "no member of the cluster took this node in"
	if worst.err.Code == CodeUnreachable {
		head = "no member of the cluster can be reached"
	}
	return refuse(worst.err.Code, "%s: %s", head, strings.Join(parts, "; ")).because(worst.err)
}

// at runs the protocol with one member.
func (j *joiner) at(ctx context.Context, addr string) (JoinResponse, error) {
	c, done := newClient(pki.PinnedConfig(j.tok.Pin, j.tok.ClusterID, nil), j.opts.Dial)
	defer done()
	var hello Hello
	sent := j.opts.Now()
	start := time.Now()
	if err := call(ctx, c, http.MethodGet, addr, PathHello, nil, &hello); err != nil {
		return JoinResponse{}, err
	}
	if err := j.checkHello(hello, addr, sent, time.Since(start)); err != nil {
		return JoinResponse{}, err
	}
	if j.req == nil {
		req, err := j.build(hello)
		if err != nil {
			return JoinResponse{}, fmt.Errorf("prepare join: %w", err)
		}
		j.req = &req
	}
	req := *j.req
	req.TokenID, req.Secret, req.Time = j.tok.ID, j.tok.Secret, j.opts.Now().UTC()
	body, err := req.wireJSON()
	if err != nil {
		return JoinResponse{}, fmt.Errorf("encode join request: %w", err)
	}
	var resp JoinResponse
	if err := call(ctx, c, http.MethodPost, addr, PathJoin, body, &resp); err != nil {
		return JoinResponse{}, err
	}
	if req.DryRun {
		return resp, nil
	}
	return resp, j.checkResponse(resp, req)
}

// checkHello compares cluster and clock before anything is sent.
func (j *joiner) checkHello(h Hello, addr string, sent time.Time, rtt time.Duration) error {
	if h.ClusterID != j.tok.ClusterID {
		return refuse(CodeOtherCluster, "%s is of cluster %s (%s), the token of cluster %s", addr, h.ClusterName, h.ClusterID, j.tok.ClusterID)
	}
	// The member read its clock somewhere within the round trip: the middle is
	// the best guess, half of it the largest error.
	here := sent.Add(rtt / 2)
	if skew := h.Time.Sub(here).Abs(); skew-rtt/2 > MaxClockSkew {
		return clocksApart(skew, h.Node, h.Time, "this node", here)
	}
	if !h.Signs {
		return refuse(CodeCannotSign, "%s is a witness and cannot take members in", h.Node)
	}
	return nil
}

// checkResponse refuses an answer that a node could not start with.
func (j *joiner) checkResponse(r JoinResponse, req JoinRequest) error {
	if r.ID != j.tok.ClusterID {
		return refuse(CodeOtherCluster, "the answer is of cluster %s, the token of cluster %s", r.ID, j.tok.ClusterID)
	}
	if pin, err := pki.PinOf(r.CAPEM); err != nil || pin != j.tok.Pin {
		return refuse(CodePinMismatch, "the answer holds another CA than the one that the token pins")
	}
	whole := len(r.Members) > 0 && r.InitialCluster[req.Name] != ""
	for _, role := range req.Role.Roles() {
		whole = whole && len(r.Certs[role]) > 0
	}
	if req.Role == RoleData {
		whole = whole && r.Secrets != nil && len(r.SealedCAKey) > 0 && len(r.ClusterKey) == len(SealingKey{})
	}
	if !whole {
		return refuse(CodeVersion, "the answer is not complete: install the same version of pgha on both nodes")
	}
	return nil
}

// Renew asks the members at addrs (host:port of the API), one after the other,
// for new certificates. conf proves this node's identity with its current one
// and verifies the member.
func Renew(ctx context.Context, conf *tls.Config, addrs []string, req RenewRequest) (RenewResponse, error) {
	body, err := json.Marshal(req)
	if err != nil {
		return RenewResponse{}, fmt.Errorf("encode renewal: %w", err)
	}
	c, done := newClient(conf, nil)
	defer done()
	errs := []error{errors.New("renew certificates: no member has signed")}
	for _, addr := range addrs {
		var resp RenewResponse
		if err = call(ctx, c, http.MethodPost, addr, PathRenew, body, &resp); err == nil {
			return resp, nil
		}
		errs = append(errs, fmt.Errorf("%s: %w", addr, err))
	}
	return RenewResponse{}, errors.Join(errs...)
}

// newClient returns a client for one exchange; done closes its connections.
func newClient(conf *tls.Config, dial func(context.Context, string, string) (net.Conn, error)) (c *http.Client, done func()) {
	if dial == nil {
		dial = (&net.Dialer{Timeout: dialTimeout}).DialContext
	}
	t := &http.Transport{
		// No proxy: the secret goes to the member itself.
		Proxy: nil, DialContext: dial, TLSClientConfig: conf, TLSHandshakeTimeout: dialTimeout,
		MaxResponseHeaderBytes: 64 << 10,
	}
	return &http.Client{
		Transport: t,
		Timeout:   requestTimeout,
		CheckRedirect: func(*http.Request, []*http.Request) error {
			return http.ErrUseLastResponse // members do not redirect
		},
	}, t.CloseIdleConnections
}

// call makes one request; every error is an [*Error] but for a bug here.
func call(ctx context.Context, c *http.Client, method, addr, path string, body []byte, out any) error {
	req, err := http.NewRequestWithContext(ctx, method, "https://"+addr+path, bytes.NewReader(body))
	if err != nil {
		return refuse(CodeUnreachable, "not an address: %s", addr)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		return transportError(addr, err)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswer))
	if err := errors.Join(err, resp.Body.Close()); err != nil {
		return transportError(addr, err)
	}
	if resp.StatusCode != http.StatusOK {
		var e Error
		if json.Unmarshal(data, &e) != nil || e.Code == "" || e.Message == "" {
			return refuse(CodeUnavailable, "%s answered %s", addr, resp.Status)
		}
		return &e
	}
	if err := json.Unmarshal(data, out); err != nil {
		return refuse(CodeVersion, "%s gave an answer that this version of pgha does not understand: install the same on both nodes", addr)
	}
	return nil
}

// transportError puts a failed exchange into words.
func transportError(addr string, err error) *Error {
	var ue *url.Error
	if errors.As(err, &ue) {
		err = ue.Err // without method and URL
	}
	var invalid x509.CertificateInvalidError
	switch {
	case errors.Is(err, pki.ErrPinMismatch):
		return refuse(CodePinMismatch, "%s does not prove that it is of the token's cluster: there is someone in the middle, or the token is of another cluster (%s); nothing was sent", addr, err).because(err)
	case errors.Is(err, pki.ErrOtherCluster):
		return refuse(CodeOtherCluster, "%s is of another cluster than the token (%s); nothing was sent", addr, err).because(err)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return refuse(CodeClocksApart, "by this node's clock the certificate of %s is not valid now (%s): set the clock and repeat", addr, err).because(err)
	default:
		return refuse(CodeUnreachable, "%s", err).because(err)
	}
}
