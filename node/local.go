package node

import (
	"context"
	"errors"
	"net"
	"net/http"
	"net/url"

	"pgha/cluster"
)

// ErrNotRunning says that the daemon does not answer on this host.
var ErrNotRunning = errors.New("the daemon is not running on this host")

// Local speaks to this host's daemon through its unix socket.
type Local struct{ http *http.Client }

// NewLocal returns a client; it does not connect yet.
func NewLocal(p Paths) *Local {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", p.Socket())
	}
	return &Local{http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

func (l *Local) call(ctx context.Context, method, path string, in, out any) error {
	return localError(callAPI(ctx, l.http, method, "http://pgha"+path, in, out))
}

// Status returns the cluster's status as this node sees it.
func (l *Local) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, l.call(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Report returns what this node knows of itself.
func (l *Local) Report(ctx context.Context) (Report, error) {
	var r Report
	return r, l.call(ctx, http.MethodGet, "/v1/node", nil, &r)
}

// CreateToken makes a join token.
func (l *Local) CreateToken(ctx context.Context, req TokenRequest) (TokenAnswer, error) {
	var a TokenAnswer
	return a, l.call(ctx, http.MethodPost, "/v1/tokens", req, &a)
}

// Tokens lists the join tokens, without their secrets.
func (l *Local) Tokens(ctx context.Context) ([]cluster.TokenInfo, error) {
	var t []cluster.TokenInfo
	return t, l.call(ctx, http.MethodGet, "/v1/tokens", nil, &t)
}

// RevokeToken makes a token useless.
func (l *Local) RevokeToken(ctx context.Context, id string) error {
	return l.call(ctx, http.MethodDelete, "/v1/tokens/"+url.PathEscape(id), nil, nil)
}

// RenewCertificates replaces all certificates of this node.
func (l *Local) RenewCertificates(ctx context.Context) error {
	return l.call(ctx, http.MethodPost, "/v1/certificates", nil, nil)
}
