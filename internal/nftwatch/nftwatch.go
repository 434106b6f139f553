// Package nftwatch hears of changes of one nf_tables table in the kernel.
//
// The monitor of google/nftables decodes every message of every table, and stops
// at what it does not know. Here the table's name is all that is read.
package nftwatch

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// header is the length of struct nfgenmsg, which every message of nf_tables
// begins with: family, version, resource id.
const header = 4

// Watch calls look once when it listens, so that no change before goes unseen,
// and then after each change of or inside the table, in the same goroutine. own,
// if not nil, tells by the address of the socket that asked for it which changes
// do not count. look may be called once too often; an error of it ends Watch.
//
// Watch blocks until ctx ends, then returns nil; any other end is an error. netns
// is the file descriptor of a network namespace, 0 for the process's own.
func Watch(ctx context.Context, netns int, table *nftables.Table, own func(address uint32) bool, look func() error) error {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return fmt.Errorf("connect to nf_tables: %w", Explain(err))
	}
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	defer func() { _ = conn.Close() }() // closing twice is harmless
	if err := conn.JoinGroup(unix.NFNLGRP_NFTABLES); err != nil {
		return fmt.Errorf("subscribe to nf_tables: %w", Explain(err))
	}
	for touched := true; ctx.Err() == nil; {
		if touched {
			if err := look(); err != nil && ctx.Err() == nil {
				return err
			}
			touched = false
		}
		msgs, err := conn.Receive()
		switch {
		case ctx.Err() != nil:
		case errors.Is(err, unix.ENOBUFS):
			touched = true // messages were lost: some may be about our table
		case err != nil:
			return fmt.Errorf("receive changes: %w", err)
		}
		for _, m := range msgs {
			touched = touched || concerns(m, table) && (own == nil || !own(m.Header.PID))
		}
	}
	return nil
}

// concerns reports whether m announces a change of or inside the table.
func concerns(m netlink.Message, table *nftables.Table) bool {
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

// Explain adds what to do to the errors of nf_tables that an operator can do
// something about.
func Explain(err error) error {
	switch {
	case errors.Is(err, unix.EPERM):
		return fmt.Errorf("%w: run as root or with CAP_NET_ADMIN", err)
	case errors.Is(err, unix.EPROTONOSUPPORT), errors.Is(err, unix.EAFNOSUPPORT):
		return fmt.Errorf("%w: this kernel has no nf_tables", err)
	}
	return err
}
