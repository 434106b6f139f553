package kernel

import (
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	setOwner   = string(Owner)
	setReplica = string(Replica)
	setMoved   = "moved"

	chainGuard  = "guard"
	chainInput  = "input"
	chainOutput = "output"

	counterDropped = "dropped"
	counterReset   = "resets"

	// metaTimeNS loads the wall clock in nanoseconds since 1970, 8 bytes in the
	// host's order (NFT_META_TIME_NS, Linux 5.4).
	metaTimeNS expr.MetaKey = 30

	// Where TCP's header has what the rules look at.
	offsetSource, offsetDest, offsetFlags = 0, 2, 13

	tcpRST = 0x04
)

// The table is the gate's own: the table "inet pgha" is replaced as a whole
// whenever the policy changes.
var table = &nftables.Table{Name: "pgha_gate", Family: nftables.TableFamilyINet}

var (
	setNames     = []string{setMoved, setOwner, setReplica}
	counterNames = []string{counterDropped, counterReset}

	// chainPriority runs the chains before those of the table "inet pgha".
	chainPriority = *nftables.ChainPriorityFilter - 20
)

// chain is a chain as it should be.
type chain struct {
	name  string
	hook  *nftables.ChainHook // nil for a chain that others jump to
	rules [][]expr.Any
}

// layout gives the chains of the gate of a port, the guard shut. The others
// never change.
//
// Matching is positive: a packet without a TCP header, such as a later fragment
// of somebody else's, matches nothing and passes.
//
// "replica" is looked up before "owner", because a lookup sees the newest
// generation of a set even when the packet began under the rules of the one
// before. In the step from replica to owner a packet that just misses the one
// thus still finds the other.
func layout(port uint16) []chain {
	jumpGuard := &expr.Verdict{Kind: expr.VerdictJump, Chain: chainGuard}
	accept := &expr.Verdict{Kind: expr.VerdictAccept}
	drop := []expr.Any{count(counterDropped), &expr.Verdict{Kind: expr.VerdictDrop}}
	return []chain{
		{chainGuard, nil, [][]expr.Any{guard(0)}},
		{chainInput, nftables.ChainHookInput, [][]expr.Any{
			rule(inSet(offsetDest, setReplica), jumpGuard),
			rule(inSet(offsetDest, setOwner), jumpGuard),
			rule(inSet(offsetDest, setMoved), count(counterReset), &expr.Reject{Type: unix.NFT_REJECT_TCP_RST}),
			rule(isPort(offsetDest, port), drop...),
		}},
		{chainOutput, nftables.ChainHookOutput, [][]expr.Any{
			rule(inSet(offsetSource, setReplica), jumpGuard),
			rule(inSet(offsetSource, setOwner), jumpGuard),
			// The resets that the input chain sends come through here.
			rule(inSet(offsetSource, setMoved), append(isReset(), accept)...),
			rule(isPort(offsetSource, port), drop...),
		}},
	}
}

func rule(match []expr.Any, then ...expr.Any) []expr.Any { return append(match, then...) }

// tcpPort loads one of a TCP packet's ports into register 1.
func tcpPort(offset uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2},
	}
}

func inSet(offset uint32, set string) []expr.Any {
	return append(tcpPort(offset), &expr.Lookup{SourceRegister: 1, SetName: set})
}

func isPort(offset uint32, port uint16) []expr.Any {
	return append(tcpPort(offset), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)})
}

func isReset() []expr.Any {
	return []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: offsetFlags, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{tcpRST}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{tcpRST}},
	}
}

func count(counter string) expr.Any {
	return &expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter}
}

// guard accepts while the wall clock, in nanoseconds since 1970, is before the
// time given. The kernel compares bytes in order, so the time is brought into
// the network's.
func guard(wall int64) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: metaTimeNS, Register: 1},
		&expr.Byteorder{SourceRegister: 1, DestRegister: 1, Op: expr.ByteorderHton, Len: 8, Size: 8},
		// A negative time would be the largest of all to the kernel.
		&expr.Cmp{Op: expr.CmpOpLt, Register: 1, Data: binaryutil.BigEndian.PutUint64(uint64(max(wall, 0)))},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}
}

// guardTime gives the time of a guard; ok is false for a rule that is none.
func guardTime(exprs []expr.Any) (wall int64, ok bool) {
	if len(exprs) < 3 {
		return 0, false
	}
	c, ok := exprs[2].(*expr.Cmp)
	if !ok || len(c.Data) != 8 {
		return 0, false
	}
	wall = int64(binaryutil.BigEndian.Uint64(c.Data))
	return wall, sameRule(exprs, guard(wall))
}

// namedSet refers to one of the sets. All have timeouts, though moved does not
// use its own, so that they are of one kind.
func namedSet(name string) *nftables.Set {
	return &nftables.Set{Table: table, Name: name, KeyType: nftables.TypeInetService, HasTimeout: true}
}

// flushSets, setGuard, addPort and deleteTable add to the batch that the next
// Flush of l.nft sends.

func (l *link) flushSets(names ...string) {
	for _, name := range names {
		l.nft.FlushSet(namedSet(name))
	}
}

func (l *link) setGuard(wall int64) {
	c := &nftables.Chain{Table: table, Name: chainGuard}
	l.nft.FlushChain(c)
	l.nft.AddRule(&nftables.Rule{Table: table, Chain: c, Exprs: guard(wall)})
}

func (l *link) addPort(set string, port uint16, timeout time.Duration) error {
	return l.nft.SetAddElements(namedSet(set), portElement(port, timeout))
}

func portElement(port uint16, timeout time.Duration) []nftables.SetElement {
	return []nftables.SetElement{{Key: binaryutil.BigEndian.PutUint16(port), Timeout: timeout}}
}

// deleteTable adds the table first, so that deleting it is valid whether or not
// it was there.
func (l *link) deleteTable() {
	l.nft.AddTable(table)
	l.nft.DelTable(table)
}

// writeTable replaces the table by a shut one in one batch.
func (l *link) writeTable(port uint16, moved bool) error {
	l.deleteTable()
	l.nft.AddTable(table)
	for _, name := range counterNames {
		l.nft.AddObj(&nftables.NamedObj{Table: table, Name: name, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
	}
	for _, name := range setNames {
		var elements []nftables.SetElement
		if moved && name == setMoved {
			elements = portElement(port, 0)
		}
		if err := l.nft.AddSet(namedSet(name), elements); err != nil {
			return err
		}
	}
	policy := nftables.ChainPolicyAccept
	for _, c := range layout(port) {
		nc := &nftables.Chain{Table: table, Name: c.name}
		if c.hook != nil {
			nc.Type, nc.Hooknum, nc.Priority, nc.Policy = nftables.ChainTypeFilter, c.hook, &chainPriority, &policy
		}
		l.nft.AddChain(nc)
		for _, exprs := range c.rules {
			l.nft.AddRule(&nftables.Rule{Table: table, Chain: nc, Exprs: exprs})
		}
	}
	return l.nft.Flush()
}
