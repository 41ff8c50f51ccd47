package rules

import (
	"encoding/binary"
	"net"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// Rules are built from the parts in this file, which use nft's words. An operand is an
// expression with a value, such as "ip saddr . udp sport". Its methods compare it or look
// it up in a set. Functions make statements, such as "snat to".
//
// Each rule loads its registers itself, as nft would: the kernel refuses rules that rely on
// the registers of another rule, and nft correctly lists only what it could have written. A
// rule that names a port must test for UDP first, or nft does not know what the port is. A
// rule must load fields of the packet before fields of the flow.
//
// nft cannot test a value that it found in a map. Such a value is written into the source
// of the packet, where a test finds it, and the source is restored in the same chain.
// Checksums stay as they are, because nobody else sees the packet meanwhile.

// exprs are a part of a rule: a test that the packet must match, or an action.
type exprs = []expr.Any

// An operand loads a value into the registers, starting at a word of 4 bytes.
type operand struct {
	load  func(word uint32) exprs
	words uint32 // how many words the value fills
}

// dataWord is where nft puts the value that belongs to the key at word 0: the data of a map
// element, or the port of an address.
const dataWord = 4

func register(word uint32) uint32 { return unix.NFT_REG32_00 + word }

// one is an operand of a single expression. make returns that expression for a register.
func one(words uint32, make func(register uint32) expr.Any) operand {
	return operand{func(w uint32) exprs { return exprs{make(register(w))} }, words}
}

func meta(key expr.MetaKey, words uint32) operand {
	return one(words, func(r uint32) expr.Any { return &expr.Meta{Key: key, Register: r} })
}

func ct(key expr.CtKey, words uint32) operand {
	return one(words, func(r uint32) expr.Any { return &expr.Ct{Key: key, Register: r} })
}

func ctOriginal(key expr.CtKey, words uint32) operand {
	return one(words, func(r uint32) expr.Any {
		return &expr.Ct{Key: key, Register: r, Direction: expr.CtDirOriginal, OptDirection: true}
	})
}

func ctReply(key expr.CtKey, words uint32) operand {
	return one(words, func(r uint32) expr.Any {
		return &expr.Ct{Key: key, Register: r, Direction: expr.CtDirReply, OptDirection: true}
	})
}

func fib(f expr.Fib, words uint32) operand {
	return one(words, func(r uint32) expr.Any { f := f; f.Register = r; return &f })
}

// numgenRandom is "numgen random mod n".
func numgenRandom(n uint32) operand {
	return one(1, func(r uint32) expr.Any { return &expr.Numgen{Register: r, Modulus: n, Type: unix.NFT_NG_RANDOM} })
}

func network(offset, size uint32) operand {
	return one(size/4, func(r uint32) expr.Any {
		return &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size, DestRegister: r}
	})
}

func transport(offset uint32) operand {
	return one(1, func(r uint32) expr.Any {
		return &expr.Payload{Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2, DestRegister: r}
	})
}

const (
	metaKeySecPath  expr.MetaKey = 25 // NFT_META_SECPATH
	metaKeySDIFName expr.MetaKey = 34 // NFT_META_SDIFNAME
	rtKeyXFRM       expr.RtKey   = 4  // NFT_RT_XFRM
	nameWords                    = unix.IFNAMSIZ / 4
)

// The words of nft. nft writes a port as "udp sport" if the rule has tested for UDP,
// otherwise as "th sport".
var (
	metaL4proto  = meta(expr.MetaKeyL4PROTO, 1)
	metaNfproto  = meta(expr.MetaKeyNFPROTO, 1)
	metaMark     = meta(expr.MetaKeyMARK, 1)
	metaIPsec    = meta(metaKeySecPath, 1) // the packet came through IPsec
	iifname      = meta(expr.MetaKeyIIFNAME, nameWords)
	oifname      = meta(expr.MetaKeyOIFNAME, nameWords)
	metaSdifname = meta(metaKeySDIFName, nameWords) // the packet's link if iifname is its VRF; else ""

	rtIPsec = one(1, func(r uint32) expr.Any { return &expr.Rt{Register: r, Key: rtKeyXFRM} }) // IPsec will take the packet
	// The gateway has a socket for the packet, on any address.
	socketWildcard = one(1, func(r uint32) expr.Any { return &expr.Socket{Key: expr.SocketKeyWildcard, Register: r} })

	// In this order: the link that leads to the packet's source; whether that is the link
	// by which the packet came, with and without its mark; the address types of its
	// destination and of its source.
	fibSaddrMarkOifname = fib(expr.Fib{FlagSADDR: true, FlagMARK: true, ResultOIFNAME: true}, nameWords)
	fibSaddrMarkIifOif  = fib(expr.Fib{FlagSADDR: true, FlagMARK: true, FlagIIF: true, ResultOIF: true, FlagPRESENT: true}, 1)
	fibSaddrIifOif      = fib(expr.Fib{FlagSADDR: true, FlagIIF: true, ResultOIF: true, FlagPRESENT: true}, 1)
	fibDaddrType        = fib(expr.Fib{FlagDADDR: true, ResultADDRTYPE: true}, 1)
	fibSaddrType        = fib(expr.Fib{FlagSADDR: true, ResultADDRTYPE: true}, 1)
	fibSaddrOifType     = fib(expr.Fib{FlagSADDR: true, FlagOIF: true, ResultADDRTYPE: true}, 1)

	ipSaddr  = network(12, net.IPv4len)
	ipDaddr  = network(16, net.IPv4len)
	ip6Saddr = network(8, net.IPv6len)
	ip6Daddr = network(24, net.IPv6len)
	udpSport = transport(0)
	udpDport = transport(2)

	ctState  = ct(expr.CtKeySTATE, 1)
	ctStatus = ct(expr.CtKeySTATUS, 1)
	ctZone   = ct(expr.CtKeyZONE, 1) // without a direction: the library cannot ask for one
	ctMark   = ct(expr.CtKeyMARK, 1)
	ctHelper = ct(expr.CtKeyHELPER, helperNameLen/4) // the helper of the master flow

	// A flow's original direction, and its reply direction.
	ctOriginalIPSaddr  = ctOriginal(expr.CtKeySRCIP, 1)
	ctOriginalIPDaddr  = ctOriginal(expr.CtKeyDSTIP, 1)
	ctOriginalIP6Saddr = ctOriginal(expr.CtKeySRCIP6, net.IPv6len/4)
	ctOriginalIP6Daddr = ctOriginal(expr.CtKeyDSTIP6, net.IPv6len/4)
	ctOriginalProtoSrc = ctOriginal(expr.CtKeyPROTOSRC, 1)
	ctOriginalProtoDst = ctOriginal(expr.CtKeyPROTODST, 1)
	ctReplyIPSaddr     = ctReply(expr.CtKeySRCIP, 1)
	ctReplyIP6Saddr    = ctReply(expr.CtKeySRCIP6, net.IPv6len/4)
	ctReplyIPDaddr     = ctReply(expr.CtKeyDSTIP, 1)
	ctReplyIP6Daddr    = ctReply(expr.CtKeyDSTIP6, net.IPv6len/4)
	ctReplyProtoSrc    = ctReply(expr.CtKeyPROTOSRC, 1)
	ctReplyProtoDst    = ctReply(expr.CtKeyPROTODST, 1)
)

// concat is "a . b".
func concat(of ...operand) operand {
	o := operand{load: func(w uint32) (s exprs) {
		for _, part := range of {
			s = append(s, part.load(w)...)
			w += part.words
		}
		return s
	}}
	for _, part := range of {
		o.words += part.words
	}
	return o
}

// and is "o & mask", bitwise "o & mask ^ xor".
func (o operand) and(mask []byte) operand { return o.bitwise(mask, make([]byte, len(mask))) }

func (o operand) bitwise(mask, xor []byte) operand {
	return operand{func(w uint32) exprs {
		return append(o.load(w), &expr.Bitwise{
			SourceRegister: register(w), DestRegister: register(w), Len: uint32(len(mask)), Mask: mask, Xor: xor,
		})
	}, o.words}
}

// or is "o | bits", of a mark.
func (o operand) or(bits uint32) operand { return o.bitwise(host32(^bits), host32(bits)) }

// of is "key map @s", the value of the key in the map. A rule does not match if the map
// lacks the key.
func (s *set) of(key operand) operand {
	return operand{func(w uint32) exprs { return join(key.load(w), s.find(w, w)) }, 1}
}

// find looks up the key at one word and stores its value at another.
func (s *set) find(key, value uint32) exprs {
	return exprs{&expr.Lookup{SourceRegister: register(key), SetName: s.Name, DestRegister: register(value), IsDestRegSet: true}}
}

// Tests: "o value", "o != value", "o <= value", "o @s" and "o != @s".
func (o operand) is(value []byte) exprs     { return o.compare(expr.CmpOpEq, value) }
func (o operand) isNot(value []byte) exprs  { return o.compare(expr.CmpOpNeq, value) }
func (o operand) atMost(value []byte) exprs { return o.compare(expr.CmpOpLte, value) }
func (o operand) in(s *set) exprs           { return o.lookup(s, false) }
func (o operand) notIn(s *set) exprs        { return o.lookup(s, true) }

func (o operand) compare(op expr.CmpOp, value []byte) exprs {
	return append(o.load(0), &expr.Cmp{Op: op, Register: register(0), Data: value})
}

func (o operand) lookup(s *set, not bool) exprs {
	return append(o.load(0), &expr.Lookup{SourceRegister: register(0), SetName: s.Name, Invert: not})
}

// missing is the test "o missing", for an operand of size bytes.
func (o operand) missing(size int) exprs { return o.is(make([]byte, size)) }

// Bits of conntrack's status, from linux/netfilter/nf_conntrack_common.h.
const (
	ctExpected  = 1 << 0
	ctSeenReply = 1 << 1
	ctAssured   = 1 << 2
	ctConfirmed = 1 << 3
	ctSrcNAT    = 1 << 4
	ctDstNAT    = 1 << 5
	ctHelped    = 1 << 13 // a rule or a program gave the flow its helper; nft has no name for it
)

// hasStatus is "ct status bits" (any of them), lacksStatus "ct status ! bits", and
// statusIs "ct status value / mask".
func hasStatus(bits uint32) exprs   { return ctStatus.and(host32(bits)).isNot(host32(0)) }
func lacksStatus(bits uint32) exprs { return statusIs(0, bits) }
func statusIs(value, mask uint32) exprs {
	return ctStatus.and(host32(mask)).is(host32(value))
}

var (
	isUDP      = metaL4proto.is([]byte{unix.IPPROTO_UDP})
	isTCP      = metaL4proto.is([]byte{unix.IPPROTO_TCP})
	notUDP     = metaL4proto.isNot([]byte{unix.IPPROTO_UDP})
	notNew     = ctState.isNot(host32(expr.CtStateBitNEW))
	zoneIs0    = ctZone.is(host16(0))
	zoneIsNot0 = ctZone.isNot(host16(0))
	hasSocket  = socketWildcard.atMost([]byte{1})
	// The link by which the packet came is not the way back to its source.
	noWayBack         = fibSaddrMarkIifOif.missing(4)
	noWayBackUnmarked = fibSaddrIifOif.missing(4)
	forwarded         = fibDaddrType.isNot(host32(unix.RTN_LOCAL))
	toGateway         = fibDaddrType.is(host32(unix.RTN_LOCAL))
	ofGateway         = fibSaddrType.is(host32(unix.RTN_LOCAL))
	notOfGateway      = fibSaddrType.isNot(host32(unix.RTN_LOCAL))
	notOfLink         = fibSaddrOifType.isNot(host32(unix.RTN_LOCAL)) // not an address of the link by which it leaves
)

func join(parts ...exprs) exprs { return slices.Concat(parts...) }

// Statements.
var (
	// notrack lets conntrack pass a packet by, so that it matches no flow.
	notrack = exprs{&expr.Notrack{}}

	accept = exprs{&expr.Verdict{Kind: expr.VerdictAccept}}
	drop   = exprs{&expr.Verdict{Kind: expr.VerdictDrop}}
)

func goTo(c *nftables.Chain) exprs {
	return exprs{&expr.Verdict{Kind: expr.VerdictGoto, Chain: c.Name}}
}

func jump(c *nftables.Chain) exprs {
	return exprs{&expr.Verdict{Kind: expr.VerdictJump, Chain: c.Name}}
}

func counter(name string) exprs {
	return exprs{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

// setIPSaddr is "ip saddr set value", and so on.
func setIPSaddr(value operand) exprs {
	return append(value.load(0), &expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: register(0), Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4,
	})
}

func setUDPSport(value operand) exprs {
	return append(value.load(0), &expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: register(0), Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2,
	})
}

func setCt(key expr.CtKey, value operand) exprs {
	return append(value.load(0), &expr.Ct{Key: key, Register: register(0), SourceRegister: true})
}

// setMetaMark is "meta mark set value".
func setMetaMark(value operand) exprs {
	return append(value.load(0), &expr.Meta{Key: expr.MetaKeyMARK, Register: register(0), SourceRegister: true})
}

// constant is an immediate value in the rule.
func constant(b []byte) operand {
	return one(uint32(len(b)+3)/4, func(r uint32) expr.Any { return &expr.Immediate{Register: r, Data: b} })
}

// An elem is the element of a set statement: "{ key timeout t limit rate … : data }".
type elem struct {
	key     operand
	timeout time.Duration // 0 means the set's timeout
	limit   expr.Any      // of the element; nil for none
	data    *operand      // for a map
}

// addTo is "add @s { … }": an existing element stays as it is. updateIn refreshes an
// existing element, but not its data. deleteFrom is "delete"; for a map the kernel requires
// data even then. The rule does not match if the set is full, or if the element's limit
// refuses.
func addTo(s *set, e elem) exprs      { return e.in(s, unix.NFT_DYNSET_OP_ADD) }
func updateIn(s *set, e elem) exprs   { return e.in(s, unix.NFT_DYNSET_OP_UPDATE) }
func deleteFrom(s *set, e elem) exprs { return e.in(s, dynsetDelete) }

const dynsetDelete = 2 // NFT_DYNSET_OP_DELETE

func (e elem) in(s *set, operation uint32) exprs {
	d := &expr.Dynset{SrcRegKey: register(0), SetName: s.Name, Operation: operation, Timeout: e.timeout}
	all := e.key.load(0)
	if e.data != nil {
		all = append(all, e.data.load(dataWord)...)
		d.SrcRegData = register(dataWord)
	}
	if e.limit != nil {
		d.Exprs = []expr.Any{e.limit}
	}
	return append(all, d)
}

// limitRate is "limit rate n/unit burst n packets", or "limit rate over" if over is set.
func limitRate(over bool, rate int, unit expr.LimitTime, burst int) expr.Any {
	return &expr.Limit{Type: expr.LimitTypePkts, Rate: uint64(rate), Over: over, Unit: unit, Burst: uint32(burst)}
}

// ctCount is "ct count n": at most n.
func ctCount(n int) expr.Any { return &expr.Connlimit{Count: uint32(n)} }

// ctCountOver is "ct count over n".
func ctCountOver(n int) expr.Any {
	return &expr.Connlimit{Count: uint32(n), Flags: expr.NFT_CONNLIMIT_F_INV}
}

// snatTo is "snat to addr:port", dnatTo the same for destinations. snatToAddr has no port,
// snatToRange a range of ports.
func snatTo(addr, port operand) exprs {
	return join(addr.load(0), port.load(dataWord), nat(expr.NATTypeSourceNAT, 0, dataWord))
}

func dnatTo(addr, port operand) exprs {
	return join(addr.load(0), port.load(dataWord), nat(expr.NATTypeDestNAT, 0, dataWord))
}

func snatToAddr(addr operand) exprs {
	return append(addr.load(0), &expr.NAT{Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: register(0)})
}

func snatToRange(addr operand, r cone.PortRange) exprs {
	const lastWord = 2 * dataWord
	return join(addr.load(0), constant(be16(r.First)).load(dataWord), constant(be16(r.Last)).load(lastWord), exprs{&expr.NAT{
		Type: expr.NATTypeSourceNAT, Family: unix.NFPROTO_IPV4, RegAddrMin: register(0),
		RegProtoMin: register(dataWord), RegProtoMax: register(lastWord),
	}})
}

// masquerade translates to the address of the link by which the packet leaves.
var masquerade = exprs{&expr.Masq{}}

// nat translates to the address and the port in two words.
func nat(typ expr.NATType, addr, port uint32) exprs {
	return exprs{&expr.NAT{Type: typ, Family: unix.NFPROTO_IPV4, RegAddrMin: register(addr), RegProtoMin: register(port)}}
}

func be16(n uint16) []byte   { return binary.BigEndian.AppendUint16(nil, n) }
func be32(n uint32) []byte   { return binary.BigEndian.AppendUint32(nil, n) }
func host16(n uint16) []byte { return binary.NativeEndian.AppendUint16(nil, n) }
func host32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }

const helperNameLen = 16 // NF_CT_HELPER_NAME_LEN

// helperName is the name of a conntrack helper in the form that nft compares.
func helperName(name string) []byte {
	return append([]byte(name), make([]byte, helperNameLen-len(name))...)
}

// hasLabel matches flows that setLabel marked.
var hasLabel = ct(expr.CtKeyLABELS, 4).and(nfnl.ChildLabel[:]).isNot(make([]byte, len(nfnl.ChildLabel)))

// setLabel marks the flow as admitted by us.
var setLabel = setCt(expr.CtKeyLABELS, constant(nfnl.ChildLabel[:]))
