package rules

import (
	"bytes"
	"fmt"
	"net"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"
)

// ruleText returns a rule in the syntax of nft. It reads the rule's expressions, so it
// shows what the kernel gets.
func (l *layout) ruleText(r *nftables.Rule) string {
	p := rulePrinter{layout: l}
	if l.table.Family == nftables.TableFamilyIPv4 {
		p.network = "ip"
	}
	for _, e := range r.Exprs {
		p.print(e)
	}
	if comment, ok := userdata.GetString(r.UserData, userdata.TypeComment); ok {
		p.add("comment %q", comment)
	}
	return strings.Join(p.words, " ")
}

// A rulePrinter tracks what the registers hold while it prints a rule.
type rulePrinter struct {
	*layout
	words              []string
	registers          [16]held // each of 4 bytes
	network, transport string   // the protocols that the rule has tested for
}

// held is the content of a register.
type held struct {
	text      string // as nft writes it; "" for a constant
	typ       string // the type, for constants
	data      []byte // the constant
	mask, xor []byte // the operations on it; nil for none
	bits      int    // how many bits of an address it holds, if not all
}

func (p *rulePrinter) add(format string, args ...any) {
	p.words = append(p.words, fmt.Sprintf(format, args...))
}

// registerWord returns the index of the word of 4 bytes at which a register begins.
func registerWord(register uint32) uint32 {
	if register < unix.NFT_REG32_00 {
		return 4 * (register - unix.NFT_REG_1)
	}
	return register - unix.NFT_REG32_00
}

func (p *rulePrinter) load(register uint32, o held) { p.registers[registerWord(register)] = o }
func (p *rulePrinter) at(register uint32) held      { return p.registers[registerWord(register)] }

func (p *rulePrinter) print(e expr.Any) {
	switch e := e.(type) {
	case *expr.Meta:
		if o := metaWords[e.Key]; e.SourceRegister {
			p.add("%s set %s", o.text, p.at(e.Register).as(o.typ))
		} else {
			p.load(e.Register, o)
		}
	case *expr.Ct:
		p.ct(e)
	case *expr.Rt:
		p.load(e.Register, held{text: "rt ipsec", typ: "boolean"})
	case *expr.Numgen:
		p.load(e.Register, held{text: fmt.Sprintf("numgen random mod %d", e.Modulus), typ: "number"})
	case *expr.Socket:
		p.load(e.Register, held{text: "socket wildcard", typ: "integer_8"})
	case *expr.Fib:
		p.load(e.Register, fibWords(e))
	case *expr.Payload:
		p.payload(e)
	case *expr.Immediate:
		p.load(e.Register, held{data: e.Data})
	case *expr.Bitwise:
		o := p.at(e.SourceRegister)
		o.mask, o.xor = e.Mask, e.Xor
		p.load(e.DestRegister, o)
	case *expr.Cmp:
		p.compare(p.at(e.Register), e)
	case *expr.Lookup:
		p.lookup(e)
	case *expr.Dynset:
		p.dynset(e)
	case *expr.Objref:
		p.add("counter name %q", e.Name)
	case *expr.NAT:
		p.nat(e)
	case *expr.Masq:
		p.add("masquerade")
	case *expr.Notrack:
		p.add("notrack")
	case *expr.Verdict:
		p.verdict(e)
	default:
		p.add("?%T", e)
	}
}

var metaWords = map[expr.MetaKey]held{
	expr.MetaKeyL4PROTO: {text: "meta l4proto", typ: "inet_proto"},
	expr.MetaKeyNFPROTO: {text: "meta nfproto", typ: "nf_proto"},
	expr.MetaKeyIIFNAME: {text: "iifname", typ: "ifname"},
	expr.MetaKeyOIFNAME: {text: "oifname", typ: "ifname"},
	expr.MetaKeyMARK:    {text: "meta mark", typ: "mark"},
	metaKeySDIFName:     {text: "meta sdifname", typ: "ifname"},
	metaKeySecPath:      {text: "meta ipsec", typ: "boolean"},
}

var ctWords = map[expr.CtKey]held{
	expr.CtKeySTATE:     {text: "ct state", typ: "ct_state"},
	expr.CtKeySTATUS:    {text: "ct status", typ: "ct_status"},
	expr.CtKeyMARK:      {text: "ct mark", typ: "mark"},
	expr.CtKeyZONE:      {text: "ct zone", typ: "zone"},
	expr.CtKeyHELPER:    {text: "ct helper", typ: "string"},
	expr.CtKeyLABELS:    {text: "ct label", typ: "ct_label"},
	expr.CtKeyEVENTMASK: {text: "ct event", typ: "ct_event"},
	expr.CtKeySRCIP:     {text: "ip saddr", typ: "ipv4_addr"},
	expr.CtKeyDSTIP:     {text: "ip daddr", typ: "ipv4_addr"},
	expr.CtKeySRCIP6:    {text: "ip6 saddr", typ: "ipv6_addr"},
	expr.CtKeyDSTIP6:    {text: "ip6 daddr", typ: "ipv6_addr"},
	expr.CtKeyPROTOSRC:  {text: "proto-src", typ: "inet_service"},
	expr.CtKeyPROTODST:  {text: "proto-dst", typ: "inet_service"},
}

func (p *rulePrinter) ct(e *expr.Ct) {
	o := ctWords[e.Key]
	switch {
	case e.SourceRegister:
		p.add("%s set %s", o.text, p.at(e.Register).as(o.typ))
		return
	case e.OptDirection && e.Direction == expr.CtDirOriginal:
		o.text = "ct original " + o.text
	case e.OptDirection:
		o.text = "ct reply " + o.text
	}
	p.load(e.Register, o)
}

func fibWords(e *expr.Fib) held {
	var of []string
	for _, f := range []struct {
		name string
		on   bool
	}{{"saddr", e.FlagSADDR}, {"daddr", e.FlagDADDR}, {"mark", e.FlagMARK}, {"iif", e.FlagIIF}, {"oif", e.FlagOIF}} {
		if f.on {
			of = append(of, f.name)
		}
	}
	text := "fib " + strings.Join(of, " . ")
	switch {
	case e.ResultADDRTYPE:
		return held{text: text + " type", typ: "fib_type"}
	case e.ResultOIFNAME:
		return held{text: text + " oifname", typ: "ifname"}
	}
	return held{text: text + " oif", typ: "boolean"}
}

// headerFields are the packet header fields that rules use, by protocol and offset.
var headerFields = map[string]map[uint32]held{
	"ip":  {12: {text: "ip saddr", typ: "ipv4_addr"}, 16: {text: "ip daddr", typ: "ipv4_addr"}},
	"ip6": {8: {text: "ip6 saddr", typ: "ipv6_addr"}, 24: {text: "ip6 daddr", typ: "ipv6_addr"}},
	"udp": {0: {text: "udp sport", typ: "inet_service"}, 2: {text: "udp dport", typ: "inet_service"}},
	"th":  {0: {text: "th sport", typ: "inet_service"}, 2: {text: "th dport", typ: "inet_service"}},
}

func (p *rulePrinter) payload(e *expr.Payload) {
	protocol, raw := p.network, "nh"
	if e.Base == expr.PayloadBaseTransportHeader {
		if protocol, raw = p.transport, "th"; protocol == "" {
			protocol = "th" // any transport protocol
		}
	}
	o, known := headerFields[protocol][e.Offset]
	if !known {
		o = held{text: fmt.Sprintf("@%s,%d,%d", raw, 8*e.Offset, 8*e.Len), typ: "integer"}
	}
	if whole := addressSizes[o.typ]; e.Len < whole {
		o.bits = int(8 * e.Len)
	}
	if e.OperationType == expr.PayloadWrite {
		p.add("%s set %s", o.text, p.at(e.SourceRegister).as(o.typ))
		return
	}
	p.load(e.DestRegister, o)
}

var addressSizes = map[string]uint32{"ipv4_addr": net.IPv4len, "ipv6_addr": net.IPv6len}

// as returns the value as nft writes it for that type.
func (o held) as(typ string) string {
	if o.text == "" {
		return constants[typ](o.data)
	}
	// Convert mask and xor back to the form "& m ^ x | o".
	m, x, or := bytes.Clone(o.mask), bytes.Clone(o.xor), make([]byte, len(o.mask))
	for i := range m {
		or[i] = x[i] &^ m[i]
		x[i] &= m[i]
		m[i] |= or[i]
	}
	text := o.text
	if slices.ContainsFunc(m, func(b byte) bool { return b != 0xff }) {
		text += " & " + constants[o.typ](m)
	}
	if !isZero(x) {
		text += " ^ " + constants[o.typ](x)
	}
	if !isZero(or) {
		text += " | " + constants[o.typ](or)
	}
	return text
}

func isZero(b []byte) bool { return !slices.ContainsFunc(b, func(b byte) bool { return b != 0 }) }

// bitTypes are the types of which nft prints "any of these bits" without an operator.
var bitTypes = map[string]bool{"ct_status": true, "ct_state": true, "ct_label": true}

var operators = map[expr.CmpOp]string{expr.CmpOpEq: "", expr.CmpOpNeq: "!= ", expr.CmpOpLte: "<= "}

func (p *rulePrinter) compare(o held, e *expr.Cmp) {
	value := e.Data
	switch {
	case o.typ == "boolean":
		p.add("%s %s", o.text, constants[o.typ](value))
		return
	case o.bits > 0: // an address
		value = append(bytes.Clone(value), make([]byte, int(addressSizes[o.typ])-len(value))...)
		p.add("%s %s%s/%d", o.text, operators[e.Op], constants[o.typ](value), o.bits)
		return
	case o.mask == nil:
		p.add("%s %s%s", o.text, operators[e.Op], constants[o.typ](value))
	case o.typ == "ct_status" && isZero(value) && e.Op == expr.CmpOpEq:
		p.add("%s ! %s", o.text, constants[o.typ](o.mask))
	case bitTypes[o.typ] && isZero(value):
		p.add("%s %s", o.text, constants[o.typ](o.mask))
	// nft writes a test of a single bit as "& dnat == dnat".
	case o.typ == "ct_status" && (!bytes.Equal(value, o.mask) || strings.Contains(constants[o.typ](value), ",")):
		p.add("%s %s%s / %s", o.text, operators[e.Op], constants[o.typ](value), constants[o.typ](o.mask))
	default:
		ones, size := net.IPMask(o.mask).Size()
		if addressSizes[o.typ] > 0 && size > 0 && ones > 0 {
			p.add("%s %s%s/%d", o.text, operators[e.Op], constants[o.typ](value), ones)
			return
		}
		op := map[expr.CmpOp]string{expr.CmpOpEq: "==", expr.CmpOpNeq: "!="}[e.Op]
		p.add("%s %s %s", o.as(o.typ), op, constants[o.typ](value))
	}
	if e.Op == expr.CmpOpEq { // later fields are named by this protocol
		switch o.text {
		case "meta l4proto":
			p.transport = constants[o.typ](value)
		case "meta nfproto":
			p.network = map[string]string{"ipv4": "ip", "ipv6": "ip6"}[constants[o.typ](value)]
		}
	}
}

// key is the set key in the registers, beginning with the given one.
func (p *rulePrinter) key(register uint32, s *set) string {
	var parts []string
	at := registerWord(register)
	for typ := range strings.SplitSeq(s.KeyType.Name, " . ") {
		parts = append(parts, p.registers[at].as(typ))
		at += (typeSizes[typ] + 3) / 4
	}
	return strings.Join(parts, " . ")
}

var typeSizes = map[string]uint32{
	"ipv4_addr": net.IPv4len, "ipv6_addr": net.IPv6len, "inet_service": 2, "mark": 4, "ifname": unix.IFNAMSIZ,
}

func (p *rulePrinter) lookup(e *expr.Lookup) {
	s := p.named(e.SetName)
	key := p.key(e.SourceRegister, s)
	switch {
	case e.IsDestRegSet:
		p.load(e.DestRegister, held{text: key + " map @" + s.Name, typ: s.DataType.Name})
	case e.Invert:
		p.add("%s != @%s", key, s.Name)
	case p.at(e.SourceRegister).mask != nil && key == p.at(e.SourceRegister).as(s.KeyType.Name):
		p.add("%s == @%s", key, s.Name)
	default:
		p.add("%s @%s", key, s.Name)
	}
}

var dynsetOperations = map[uint32]string{
	unix.NFT_DYNSET_OP_ADD: "add", unix.NFT_DYNSET_OP_UPDATE: "update", dynsetDelete: "delete",
}

func (p *rulePrinter) dynset(e *expr.Dynset) {
	s := p.named(e.SetName)
	element := p.key(e.SrcRegKey, s)
	if e.Timeout > 0 {
		element += " timeout " + timeText(e.Timeout)
	}
	for _, x := range e.Exprs {
		switch x := x.(type) {
		case *expr.Limit:
			element += " " + limitText(x)
		case *expr.Connlimit:
			over := ""
			if x.Flags&expr.NFT_CONNLIMIT_F_INV != 0 {
				over = "over "
			}
			element += fmt.Sprintf(" ct count %s%d", over, x.Count)
		}
	}
	if s.IsMap {
		element += " : " + p.at(e.SrcRegData).as(s.DataType.Name)
	}
	p.add("%s @%s { %s }", dynsetOperations[e.Operation], s.Name, element)
}

func limitText(x *expr.Limit) string {
	over := ""
	if x.Over {
		over = "over "
	}
	unit := map[expr.LimitTime]string{expr.LimitTimeSecond: "second", expr.LimitTimeMinute: "minute"}[x.Unit]
	return fmt.Sprintf("limit rate %s%d/%s burst %d packets", over, x.Rate, unit, x.Burst)
}

func (p *rulePrinter) nat(e *expr.NAT) {
	to := p.at(e.RegAddrMin).as("ipv4_addr")
	if e.RegProtoMin > 0 {
		to += ":" + p.at(e.RegProtoMin).as("inet_service")
	}
	if e.RegProtoMax > 0 {
		to += "-" + p.at(e.RegProtoMax).as("inet_service")
	}
	p.add("%s to %s", map[expr.NATType]string{expr.NATTypeSourceNAT: "snat", expr.NATTypeDestNAT: "dnat"}[e.Type], to)
}

func (p *rulePrinter) verdict(e *expr.Verdict) {
	switch e.Kind {
	case expr.VerdictAccept:
		p.add("accept")
	case expr.VerdictDrop:
		p.add("drop")
	case expr.VerdictGoto:
		p.add("goto %s", e.Chain)
	case expr.VerdictJump:
		p.add("jump %s", e.Chain)
	}
}
