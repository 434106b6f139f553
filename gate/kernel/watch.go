package kernel

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
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
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: k.netns})
	if err != nil {
		return fmt.Errorf("connect to nf_tables: %w", explain(err))
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer func() { _ = conn.Close() }() // closing twice is harmless
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nf_tables: %w", explain(err))
	}
	s, err := k.Read(ctx)
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("watch gate: %w", err)
	}
	for touched := !s.Installed; ctx.Err() == nil; {
		if touched {
			k.log.Warn("gate is missing or was changed by somebody else")
			changed()
			touched = false
		}
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, unix.ENOBUFS):
			touched = true // messages were lost: some may be about our table
		case err != nil:
			return fmt.Errorf("watch gate: %w", err)
		}
		for _, m := range msgs {
			touched = touched || concernsTable(m) && !k.isOwn(m)
		}
	}
	return nil
}

// isOwn reports whether m announces a change that this Kernel made: it bears
// the address of the socket that asked for it.
func (k *Kernel) isOwn(m netlink.Message) bool {
	return m.Header.PID != 0 && m.Header.PID == k.address.Load()
}

// concernsTable reports whether m announces a change of or inside the table.
func concernsTable(m netlink.Message) bool {
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < nfgenHeader || m.Data[0] != byte(table.Family) {
		return false
	}
	ad, err := decoder(m.Data[nfgenHeader:])
	if err != nil {
		return true // unreadable: looking costs little
	}
	// The first attribute type of every kind of object is its table's name.
	for ad.Next() {
		if ad.Type() == unix.NFTA_TABLE_NAME {
			return strings.TrimRight(ad.String(), "\x00") == table.Name
		}
	}
	return ad.Err() != nil
}
