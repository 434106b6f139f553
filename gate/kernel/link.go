package kernel

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nfgenHeader is the length of struct nfgenmsg, which every message of
// nf_tables begins with: family, version, resource id.
const nfgenHeader = 4

// link is a connection to nf_tables. It is kept, because closing one makes the
// kernel wait until what was deleted through it can be freed, some 15 ms.
type link struct {
	nft *nftables.Conn
	// raw is for what nft's decoder passes over in silence: the expressions it
	// doesn't know, byteorder of the guard among them.
	raw *netlink.Conn
}

// connect gives the netlink address too from which nft's batches come.
func connect(netns int) (l *link, address uint32, err error) {
	nft, err := nftables.New(nftables.WithNetNSFd(netns), nftables.AsLasting())
	if err != nil {
		return nil, 0, err
	}
	address, err = nft.GetPortID()
	if err != nil {
		return nil, 0, errors.Join(err, nft.CloseLasting())
	}
	raw, err := netlink.Dial(unix.NETLINK_NETFILTER, &netlink.Config{NetNS: netns})
	if err != nil {
		return nil, 0, errors.Join(err, nft.CloseLasting())
	}
	return &link{nft: nft, raw: raw}, address, nil
}

func (l *link) close() error { return errors.Join(l.nft.CloseLasting(), l.raw.Close()) }

// rules gives the rules of the table's chains, by chain and in order. An
// expression that the gate never uses is nil in its rule.
func (l *link) rules() (map[string][][]expr.Any, error) {
	attrs, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: unix.NFTA_RULE_TABLE, Data: []byte(table.Name + "\x00")}})
	if err != nil {
		return nil, err
	}
	msgs, err := l.raw.Execute(netlink.Message{
		Header: netlink.Header{
			Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE,
			Flags: netlink.Request | netlink.Dump,
		},
		Data: append([]byte{byte(table.Family), unix.NFNETLINK_V0, 0, 0}, attrs...),
	})
	if err != nil {
		return nil, err
	}
	rules := map[string][][]expr.Any{}
	for _, m := range msgs {
		if len(m.Data) < nfgenHeader {
			return nil, errors.New("decode rule: message too short")
		}
		chain, exprs, err := decodeRule(m.Data[nfgenHeader:])
		if err != nil {
			return nil, fmt.Errorf("decode rule: %w", err)
		}
		rules[chain] = append(rules[chain], exprs)
	}
	return rules, nil
}

func decodeRule(attrs []byte) (chain string, exprs []expr.Any, err error) {
	ad, err := decoder(attrs)
	if err != nil {
		return "", nil, err
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_RULE_CHAIN:
			chain = ad.String()
		case unix.NFTA_RULE_EXPRESSIONS:
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				list.ByteOrder = binary.BigEndian
				for list.Next() {
					e, err := decodeExpr(list.Bytes())
					if err != nil {
						return err
					}
					exprs = append(exprs, e)
				}
				return nil
			})
		}
	}
	return chain, exprs, ad.Err()
}

// decodeExpr gives nil for an expression that the gate never uses.
func decodeExpr(attrs []byte) (expr.Any, error) {
	ad, err := decoder(attrs)
	if err != nil {
		return nil, err
	}
	var name string
	var data []byte
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_EXPR_NAME:
			name = ad.String()
		case unix.NFTA_EXPR_DATA:
			data = ad.Bytes()
		}
	}
	if err := ad.Err(); err != nil {
		return nil, err
	}
	var e expr.Any
	switch name {
	case "byteorder":
		return decodeByteorder(data)
	case "meta":
		e = &expr.Meta{}
	case "cmp":
		e = &expr.Cmp{}
	case "payload":
		e = &expr.Payload{}
	case "lookup":
		e = &expr.Lookup{}
	case "bitwise":
		e = &expr.Bitwise{}
	case "objref":
		e = &expr.Objref{}
	case "reject":
		e = &expr.Reject{}
	case "immediate": // the gate loads nothing but verdicts
		e = &expr.Verdict{}
	default:
		return nil, nil
	}
	if err := expr.Unmarshal(byte(table.Family), data, e); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if lookup, ok := e.(*expr.Lookup); ok {
		lookup.SetID = 0 // the kernel's number of the set
	}
	return e, nil
}

func decodeByteorder(attrs []byte) (expr.Any, error) {
	ad, err := decoder(attrs)
	if err != nil {
		return nil, err
	}
	var b expr.Byteorder
	for ad.Next() {
		switch ad.Type() {
		case unix.NFTA_BYTEORDER_SREG:
			b.SourceRegister = ad.Uint32()
		case unix.NFTA_BYTEORDER_DREG:
			b.DestRegister = ad.Uint32()
		case unix.NFTA_BYTEORDER_OP:
			b.Op = expr.ByteorderOp(ad.Uint32())
		case unix.NFTA_BYTEORDER_LEN:
			b.Len = ad.Uint32()
		case unix.NFTA_BYTEORDER_SIZE:
			b.Size = ad.Uint32()
		}
	}
	return &b, ad.Err()
}

// decoder reads attributes with numbers in the network's order, as all of
// nf_tables has them.
func decoder(attrs []byte) (*netlink.AttributeDecoder, error) {
	ad, err := netlink.NewAttributeDecoder(attrs)
	if err != nil {
		return nil, err
	}
	ad.ByteOrder = binary.BigEndian
	return ad, nil
}
