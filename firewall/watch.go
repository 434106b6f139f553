package firewall

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
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
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: f.netns})
	if err != nil {
		return fmt.Errorf("connect to nf_tables: %w", explain(err))
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer func() { _ = conn.Close() }() // closing twice is harmless
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nf_tables: %w", explain(err))
	}
	for touched := f.isApplied(); ; {
		if touched {
			diff, err := f.drift(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				return fmt.Errorf("watch firewall: %w", err)
			}
			if diff != "" {
				f.log.Warn("firewall table was changed by somebody else", "difference", diff)
				onForeignChange()
			}
			touched = false
		}
		// The monitor of google/nftables decodes every message of every table, and
		// stops at what it does not know. The table's name is all we need.
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.ENOBUFS):
			touched = true // messages were lost: ours may be among them
		case err != nil:
			return fmt.Errorf("watch firewall: %w", err)
		}
		for _, m := range msgs {
			touched = touched || concernsTable(m)
		}
	}
}

func (f *Firewall) isApplied() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied != nil
}

// concernsTable reports whether m announces a change inside the table "inet
// pgha".
func concernsTable(m netlink.Message) bool {
	const header = 4 // struct nfgenmsg: family, version, resource id
	if m.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(m.Data) < header || m.Data[0] != byte(table.Family) {
		return false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[header:])
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
