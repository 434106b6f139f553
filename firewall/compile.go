package firewall

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

const (
	tableName = "pgha"
	chainName = "input"

	// New connections to an API port that is open for joining, for all strangers
	// together: enough for people, too few to keep the TLS handshakes busy.
	joinRate  = 20 // a second
	joinBurst = 40
)

// chainPriority runs the chain before the distribution's own filter chains, so
// that their accepts cannot open a port of ours.
var chainPriority = *nftables.ChainPriorityFilter - 10

// Ruleset is a compiled policy: the content of the table "inet pgha". The zero
// value stands for no table at all.
type Ruleset struct {
	// Sets are the named sets, in the order in which they are made.
	Sets []Set
	// Counters are the names of the drop counters.
	Counters []string
	// Rules are the rules of the chain "input", in order.
	Rules []Rule
}

// Off reports whether the ruleset stands for no table at all.
func (r Ruleset) Off() bool { return len(r.Rules) == 0 }

// Set is a named set of ports or of addresses of one family.
type Set struct {
	// Name is the set's name in the table.
	Name string
	// Type is nft's name for the type of the elements.
	Type string
	// Interval says that elements are ranges rather than single values.
	Interval bool
	// Elements are the elements in nft's notation, sorted and disjoint.
	Elements []string

	keyType nftables.SetDatatype
	encoded []nftables.SetElement
}

// Rule is one rule of the chain.
type Rule struct {
	// Text is the rule in nft's notation.
	Text string

	exprs []expr.Any
}

// Compile turns a policy into the ruleset that enforces it. It has no side
// effects and fails only where p.Validate fails.
func Compile(p Policy) (Ruleset, error) {
	if err := p.Validate(); err != nil {
		return Ruleset{}, err
	}
	if p.Mode == ModeOff {
		return Ruleset{}, nil
	}
	var r Ruleset
	all := p.Ports.all()
	rw, ro, health := named{"readwrite", p.Ports.ReadWrite}, named{"readonly", p.Ports.ReadOnly}, named{"health", p.Ports.Health}
	stats, api := named{"stats", p.Ports.Stats}, named{"api", p.Ports.API}

	r.Sets = []Set{
		portSet("ports", all),
		portSet("client_ports", inUse([]named{rw, ro, stats, health, api})),
		portSet("probe_ports", inUse([]named{rw, ro, health})),
		addrSet("members4", false, false, hosts(p.Members, false)),
		addrSet("members6", true, false, hosts(p.Members, true)),
		addrSet("probes4", false, false, hosts(p.Probes, false)),
		addrSet("probes6", true, false, hosts(p.Probes, true)),
		addrSet("clients4", false, true, aggregate(p.Clients, false)),
		addrSet("clients6", true, true, aggregate(p.Clients, true)),
	}
	r.Rules = []Rule{
		// The host's own packets, HAProxy's to its neighbour PostgreSQL among them.
		rule(loopback(), verdict(expr.VerdictAccept)),
		// Everything that is not ours leaves here.
		rule(notTCP(), verdict(expr.VerdictAccept)),
		rule(portLookup("ports", true), verdict(expr.VerdictAccept)),

		rule(source("members4", false), verdict(expr.VerdictAccept)),
		rule(source("members6", true), verdict(expr.VerdictAccept)),
		rule(source("clients4", false), portLookup("client_ports", false), verdict(expr.VerdictAccept)),
		rule(source("clients6", true), portLookup("client_ports", false), verdict(expr.VerdictAccept)),
		rule(source("probes4", false), portLookup("probe_ports", false), verdict(expr.VerdictAccept)),
		rule(source("probes6", true), portLookup("probe_ports", false), verdict(expr.VerdictAccept)),
	}
	if len(p.Former) > 0 && p.Ports.API != 0 {
		r.Sets = append(r.Sets, addrSet("former4", false, false, hosts(p.Former, false)), addrSet("former6", true, false, hosts(p.Former, true)))
		r.Rules = append(r.Rules,
			rule(source("former4", false), port(p.Ports.API), verdict(expr.VerdictAccept)),
			rule(source("former6", true), port(p.Ports.API), verdict(expr.VerdictAccept)))
	}
	for _, n := range all {
		counter := "drop_" + n.name
		r.Counters = append(r.Counters, counter)
		if p.JoinOpen && n == api {
			r.Rules = append(r.Rules,
				rule(port(n.port), synOnly(), overLimit(joinRate, joinBurst), count(counter), verdict(expr.VerdictDrop)),
				rule(port(n.port), verdict(expr.VerdictAccept)))
			continue
		}
		r.Rules = append(r.Rules, rule(port(n.port), count(counter), verdict(expr.VerdictDrop)))
	}
	return r, nil
}

// String gives the ruleset as text that nft reads and an operator compares with
// "nft list table inet pgha".
func (r Ruleset) String() string {
	if r.Off() {
		return "# firewall off: no table\n"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", tableName)
	for _, c := range r.Counters {
		fmt.Fprintf(&b, "\tcounter %s { packets 0 bytes 0 }\n", c)
	}
	for _, s := range r.Sets {
		fmt.Fprintf(&b, "\tset %s {\n\t\ttype %s\n", s.Name, s.Type)
		if s.Interval {
			b.WriteString("\t\tflags interval\n")
		}
		if len(s.Elements) > 0 {
			fmt.Fprintf(&b, "\t\telements = { %s }\n", strings.Join(s.Elements, ", "))
		}
		b.WriteString("\t}\n")
	}
	fmt.Fprintf(&b, "\tchain %s {\n\t\ttype filter hook input priority filter - 10; policy accept;\n", chainName)
	for _, rule := range r.Rules {
		fmt.Fprintf(&b, "\t\t%s\n", rule.Text)
	}
	b.WriteString("\t}\n}\n")
	return b.String()
}

func portSet(name string, ports []named) Set {
	s := Set{Name: name, Type: nftables.TypeInetService.Name, keyType: nftables.TypeInetService}
	ports = slices.SortedFunc(slices.Values(ports), func(a, b named) int { return cmp.Compare(a.port, b.port) })
	for _, n := range ports {
		s.Elements = append(s.Elements, fmt.Sprint(n.port))
		s.encoded = append(s.encoded, nftables.SetElement{Key: binaryutil.BigEndian.PutUint16(n.port)})
	}
	return s
}

func addrSet(name string, v6, interval bool, ranges []ipRange) Set {
	s := Set{Name: name, Interval: interval, keyType: nftables.TypeIPAddr}
	if v6 {
		s.keyType = nftables.TypeIP6Addr
	}
	s.Type = s.keyType.Name
	for _, r := range ranges {
		s.Elements = append(s.Elements, r.String())
		s.encoded = append(s.encoded, nftables.SetElement{Key: r.first.AsSlice()})
		// A range up to the last address of the family has no end element: there
		// is no address after it to mark the end.
		if end := r.last.Next(); interval && end.IsValid() {
			s.encoded = append(s.encoded, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
		}
	}
	return s
}

// clause is a part of a rule: the text and the expressions always go together,
// so that the text cannot promise what the kernel was not told.
type clause struct {
	text  string
	exprs []expr.Any
}

func rule(clauses ...clause) Rule {
	var r Rule
	var texts []string
	for _, c := range clauses {
		texts = append(texts, c.text)
		r.exprs = append(r.exprs, c.exprs...)
	}
	r.Text = strings.Join(texts, " ")
	return r
}

func loopback() clause {
	name := make([]byte, unix.IFNAMSIZ)
	copy(name, "lo")
	return clause{`iifname "lo"`, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
	}}
}

func l4proto(op expr.CmpOp) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: op, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
}

func notTCP() clause {
	return clause{"meta l4proto != tcp", l4proto(expr.CmpOpNeq)}
}

// dport loads the destination port, of TCP packets alone.
func dport() []expr.Any {
	return append(l4proto(expr.CmpOpEq),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2})
}

func portLookup(set string, invert bool) clause {
	op := ""
	if invert {
		op = "!= "
	}
	return clause{"tcp dport " + op + "@" + set,
		append(dport(), &expr.Lookup{SourceRegister: 1, SetName: set, Invert: invert})}
}

func port(p uint16) clause {
	return clause{fmt.Sprintf("tcp dport %d", p),
		append(dport(), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(p)})}
}

// source matches the sender. A table of the family inet sees packets of both
// families, so the family is compared first.
func source(set string, v6 bool) clause {
	text, family, offset, length := "ip saddr @", byte(unix.NFPROTO_IPV4), uint32(12), uint32(4)
	if v6 {
		text, family, offset, length = "ip6 saddr @", byte(unix.NFPROTO_IPV6), 8, 16
	}
	return clause{text + set, []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
		&expr.Lookup{SourceRegister: 1, SetName: set},
	}}
}

// synOnly matches the first packet of a connection without asking connection
// tracking.
func synOnly() clause {
	return clause{"tcp flags & (fin | syn | rst | ack) == syn", append(l4proto(expr.CmpOpEq),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 13, Len: 1},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 1, Mask: []byte{0x17}, Xor: []byte{0}},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{0x02}},
	)}
}

func overLimit(rate uint64, burst uint32) clause {
	return clause{fmt.Sprintf("limit rate over %d/second burst %d packets", rate, burst), []expr.Any{
		&expr.Limit{Type: expr.LimitTypePkts, Rate: rate, Over: true, Unit: expr.LimitTimeSecond, Burst: burst},
	}}
}

func count(counter string) clause {
	return clause{fmt.Sprintf("counter name %q", counter), []expr.Any{
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter},
	}}
}

func verdict(kind expr.VerdictKind) clause {
	text := "accept"
	if kind == expr.VerdictDrop {
		text = "drop"
	}
	return clause{text, []expr.Any{&expr.Verdict{Kind: kind}}}
}
