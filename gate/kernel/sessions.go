package kernel

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"pgha/internal/nftwatch"
)

// The kernel's interface to sockets, linux/sock_diag.h and linux/inet_diag.h.
const (
	sockDiagByFamily = 20
	sockDestroy      = 21
	diagHeader       = 8  // of a request, before the socket's id
	diagID           = 48 // the id: ports, addresses, interface, cookie
	diagMsgID        = 4  // where the id is in an answer
)

// sessionStates are those in which a socket may have something to send: all but
// LISTEN, TIME_WAIT and the two of a session that is not yet there.
const sessionStates = ^uint32(1<<10 | 1<<6 | 1<<3 | 1<<12)

// EndSessions ends every TCP session with the port on this host, and returns
// how many there were. The gate must be shut.
//
// A gate that shuts holds answers back and does not undo them: those that the
// server has given stay in its socket, and the kernel goes on trying to send
// them for a minute or more, also when the process has long gone. They were
// given under an ownership that has ended, so they must be gone before the gate
// opens under another. It fails on a kernel without CONFIG_INET_DIAG_DESTROY.
func (k *Kernel) EndSessions(ctx context.Context) (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	n, err := k.endSessions()
	if err != nil {
		return n, fmt.Errorf("end sessions of port %d: %w", k.port, nftwatch.Explain(err))
	}
	return n, nil
}

func (k *Kernel) endSessions() (ended int, err error) {
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: k.netns})
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, conn.Close()) }()
	for _, family := range []byte{unix.AF_INET, unix.AF_INET6} {
		var id [diagID]byte
		binary.BigEndian.PutUint16(id[:], k.port)
		found, err := conn.Execute(diagRequest(sockDiagByFamily, netlink.Request|netlink.Dump, family, id[:]))
		if err != nil {
			return ended, fmt.Errorf("list sockets: %w", err)
		}
		for _, m := range found {
			if len(m.Data) < diagMsgID+diagID {
				return ended, errors.New("decode socket: message too short")
			}
			id := m.Data[diagMsgID : diagMsgID+diagID]
			if binary.BigEndian.Uint16(id) != k.port {
				continue
			}
			_, err := conn.Execute(diagRequest(sockDestroy, netlink.Request|netlink.Acknowledge, family, id))
			if errors.Is(err, unix.ENOENT) {
				continue // it has ended by itself
			}
			if err != nil {
				return ended, fmt.Errorf("destroy socket: %w", err)
			}
			ended++
		}
	}
	return ended, nil
}

// diagRequest is a struct inet_diag_req_v2.
func diagRequest(kind netlink.HeaderType, flags netlink.HeaderFlags, family byte, id []byte) netlink.Message {
	data := make([]byte, diagHeader, diagHeader+diagID)
	data[0], data[1] = family, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(data[4:], sessionStates)
	return netlink.Message{Header: netlink.Header{Type: kind, Flags: flags}, Data: append(data, id...)}
}
