package cluster

import (
	"context"
	"errors"
)

var errEnough = errors.New("that is enough")

// CheckToken finds out, without changing anything on either side, whether a
// member named in the token can be reached, is the one that the token pins,
// and has the same time.
func CheckToken(ctx context.Context, tok Token, opts JoinOptions) (Hello, error) {
	var got Hello
	opts.RetryFor = -1
	_, err := Join(ctx, tok, func(h Hello) (JoinRequest, error) {
		got = h
		return JoinRequest{}, errEnough
	}, opts)
	if errors.Is(err, errEnough) {
		return got, nil
	}
	return got, err
}
