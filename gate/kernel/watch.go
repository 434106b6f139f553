package kernel

import (
	"context"
	"fmt"

	"pgha/internal/nftwatch"
)

// Watch calls changed after somebody else has changed the gate's table: after
// "nft flush ruleset", a restart of the distribution's firewall service, or a
// hand that edits it. The callback runs in Watch's goroutine and would usually
// call Install; nothing calls it again if that fails. It may be called once too
// often, never for what this Kernel writes itself, and not when the kernel lets
// an element run out.
//
// Watch also calls changed when it starts, if the table isn't right then, so
// nothing is lost between Install and Watch. It blocks until ctx ends, then
// returns nil; any other end is an error, and the table is watched no more.
func (k *Kernel) Watch(ctx context.Context, changed func()) error {
	first := true
	look := func() error {
		if first {
			first = false
			if s, err := k.Read(ctx); err != nil || s.Installed {
				return err
			}
		}
		k.log.Warn("gate is missing or was changed by somebody else")
		changed()
		return nil
	}
	if err := nftwatch.Watch(ctx, k.netns, table, k.isOwn, look); err != nil {
		return fmt.Errorf("watch gate: %w", err)
	}
	return nil
}

// isOwn reports whether this Kernel asked for a change from the socket with that
// address.
func (k *Kernel) isOwn(address uint32) bool {
	return address != 0 && address == k.address.Load()
}
