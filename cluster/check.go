package cluster

import "context"

// CheckJoin asks the cluster whether it would take this node in, and changes
// nothing on either side. Its errors are those of [Join].
func CheckJoin(ctx context.Context, tok Token, build func(Hello) (JoinRequest, error), opts JoinOptions) error {
	opts.RetryFor = -1
	_, err := Join(ctx, tok, func(h Hello) (JoinRequest, error) {
		req, err := build(h)
		req.DryRun = true
		return req, err
	}, opts)
	return err
}
