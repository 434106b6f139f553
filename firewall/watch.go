package firewall

import (
	"context"
	"fmt"

	"pgha/internal/nftwatch"
)

// Watch calls onForeignChange whenever it sees that the kernel no longer holds
// what the last Apply or Remove wrote: after "nft flush ruleset", a restart of
// the distribution's firewall service, or a hand that edits the table. The
// callback runs in Watch's goroutine and would usually call Apply; nothing calls
// it again if that fails. What this Firewall writes itself is never reported.
//
// Watch also compares once when it starts, so a change between Apply and Watch
// is not lost. It blocks until ctx ends, then returns nil; any other end is an
// error, and the table is watched no more.
func (f *Firewall) Watch(ctx context.Context, onForeignChange func()) error {
	first := true
	look := func() error {
		if first {
			first = false
			if !f.isApplied() {
				return nil
			}
		}
		diff, err := f.drift(ctx)
		if err == nil && diff != "" {
			f.log.Warn("firewall table was changed by somebody else", "difference", diff)
			onForeignChange()
		}
		return err
	}
	if err := nftwatch.Watch(ctx, f.netns, table, nil, look); err != nil {
		return fmt.Errorf("watch firewall: %w", err)
	}
	return nil
}

func (f *Firewall) isApplied() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied != nil
}
