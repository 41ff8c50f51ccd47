//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// Rules are put together from these pieces. A piece that loads something puts
// it into reg, where the next one finds it.
type piece = []expr.Any

func join(pieces ...piece) piece { return slices.Concat(pieces...) }

const reg = unix.NFT_REG_1

// Bits of conntrack's status, from linux/netfilter/nf_conntrack_common.h.
const (
	ctExpected  = 1 << 0
	ctConfirmed = 1 << 3
	ctSrcNAT    = 1 << 4
	ctDstNAT    = 1 << 5
)

var (
	ctState  = piece{&expr.Ct{Key: expr.CtKeySTATE, Register: reg}}
	ctStatus = piece{&expr.Ct{Key: expr.CtKeySTATUS, Register: reg}}
	l4proto  = piece{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}}
	nfproto  = piece{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}}
	iifname  = piece{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg}}
	oifname  = piece{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg}}
	// The link by which the source of a packet is reached, and what is not for the
	// gateway, before it is routed.
	wayBack   = piece{&expr.Fib{Register: reg, FlagSADDR: true, ResultOIFNAME: true}}
	forwarded = join(piece{&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true}}, isNot(ne32(unix.RTN_LOCAL)))
	ctZone    = piece{&expr.Ct{Key: expr.CtKeyZONE, Register: reg}}
	// The expression ends the rule where there is no socket.
	hasSocket = join(piece{&expr.Socket{Key: expr.SocketKeyWildcard, Register: reg}}, atMost(1))

	sourcePort      = transport(0, 0)
	destinationPort = transport(2, 0)

	isUDP  = join(l4proto, is([]byte{unix.IPPROTO_UDP}))
	notUDP = join(l4proto, isNot([]byte{unix.IPPROTO_UDP}))

	// Of a flow from inside: its inside address, its peer, the peer's port and
	// the outside port.
	ctOriginalSource       = original(expr.CtKeySRCIP, 0)
	ctReplySource          = reply(expr.CtKeySRCIP, 0)
	ctReplySourcePort      = reply(expr.CtKeyPROTOSRC, 0)
	ctReplyDestinationPort = reply(expr.CtKeyPROTODST, 0)

	// Both addresses of the packet, which a key begins with; and the endpoint and
	// the mark of a flow from inside.
	packetAddresses = piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 8, DestRegister: reg}}
	flowValue       = join(original(expr.CtKeySRCIP, valueWord), original(expr.CtKeyPROTOSRC, valueWord+1),
		piece{&expr.Ct{Key: expr.CtKeyMARK, Register: markRegister}})

	// toInside ends the rule where the map has not the key, or its bucket is empty.
	// It puts the value, an inside endpoint and a connmark, where flowValue puts it.
	toInside = piece{&expr.Lookup{
		SourceRegister: reg, SetName: permissionMap, DestRegister: unix.NFT_REG32_00 + valueWord, IsDestRegSet: true,
	}}
	translate = piece{&expr.NAT{
		Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4,
		RegAddrMin: unix.NFT_REG32_00 + valueWord, RegProtoMin: unix.NFT_REG32_00 + valueWord + 1,
	}}
	noMark      = piece{&expr.Cmp{Op: expr.CmpOpEq, Register: markRegister, Data: ne32(0)}}
	hasMark     = piece{&expr.Cmp{Op: expr.CmpOpNeq, Register: markRegister, Data: ne32(0)}}
	inheritMark = join(hasMark, piece{&expr.Ct{Key: expr.CtKeyMARK, Register: markRegister, SourceRegister: true}})

	accept = piece{&expr.Verdict{Kind: expr.VerdictAccept}}
)

// sourceIn ends the rule, of family inet, where the source of the packet is not in p.
// What ends with a byte, within the first four, is compared without a mask.
func sourceIn(p netip.Prefix) piece {
	addr, family, offset := p.Masked().Addr().AsSlice(), byte(unix.NFPROTO_IPV4), uint32(12)
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 8
	}
	size := len(addr)
	whole := p.Bits() / 8
	if p.Bits()%8 == 0 && 0 < whole && whole <= 4 {
		return join(
			piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4, DestRegister: reg}}, is(addr[:whole]),
			nfproto, is([]byte{family}))
	}
	return join(
		piece{
			&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(size), DestRegister: reg},
			&expr.Bitwise{
				SourceRegister: reg, DestRegister: reg, Len: uint32(size),
				Mask: net.CIDRMask(p.Bits(), 8*size), Xor: make([]byte, size),
			},
		}, is(addr),
		nfproto, is([]byte{family}))
}

func is(b []byte) piece    { return piece{&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b}} }
func isNot(b []byte) piece { return piece{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: b}} }
func atMost(b byte) piece  { return piece{&expr.Cmp{Op: expr.CmpOpLte, Register: reg, Data: []byte{b}}} }
func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }
func ne16(n uint16) []byte { return binary.NativeEndian.AppendUint16(nil, n) }
func ne32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
func masked(m uint32) piece {
	return piece{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: ne32(m), Xor: ne32(0)}}
}

// valueWord is the first word behind the key of the map, where the value goes,
// and markRegister has its last one.
const (
	valueWord    = 4
	markRegister = unix.NFT_REG32_00 + valueWord + 2
)

// These load a part of the UDP header, of the flow as its first packet came, or of
// its answers, into a word of reg and what follows it.
func transport(offset, word uint32) piece {
	return piece{&expr.Payload{
		Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: 2, DestRegister: unix.NFT_REG32_00 + word,
	}}
}

func original(key expr.CtKey, word uint32) piece {
	return piece{&expr.Ct{Key: key, Register: unix.NFT_REG32_00 + word, Direction: expr.CtDirOriginal, OptDirection: true}}
}

func reply(key expr.CtKey, word uint32) piece {
	return piece{&expr.Ct{Key: key, Register: unix.NFT_REG32_00 + word, Direction: expr.CtDirReply, OptDirection: true}}
}

func in(s *set) piece { return piece{&expr.Lookup{SourceRegister: reg, SetName: s.Name}} }
func notIn(s *set) piece {
	return piece{&expr.Lookup{SourceRegister: reg, SetName: s.Name, Invert: true}}
}

func count(name string) piece {
	return piece{&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name}}
}

func drop(name string) piece {
	return join(count(name), piece{&expr.Verdict{Kind: expr.VerdictDrop}})
}

func goTo(c *nftables.Chain) piece {
	return piece{&expr.Verdict{Kind: expr.VerdictGoto, Chain: c.Name}}
}

// add makes an element of what is in reg and the registers behind it, or finds
// it, and runs the element's own e.
func add(s *set, e expr.Any) piece {
	return piece{&expr.Dynset{
		SrcRegKey: reg, SetName: s.Name, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: []expr.Any{e},
	}}
}

// over matches a flow beyond the first most with that key.
func over(s *set, most int) piece {
	return add(s, &expr.Connlimit{Count: uint32(most), Flags: expr.NFT_CONNLIMIT_F_INV})
}

// limited matches what comes faster than rate in a second, once that key had its
// burst.
func limited(s *set, rate int) piece {
	return add(s, &expr.Limit{
		Type: expr.LimitTypePkts, Rate: uint64(rate), Over: true, Unit: expr.LimitTimeSecond, Burst: uint32(burst * rate),
	})
}

const burst = 5

// repeated matches what comes more often than every ten seconds.
func repeated(s *set) piece {
	return add(s, &expr.Limit{Type: expr.LimitTypePkts, Rate: 6, Over: true, Unit: expr.LimitTimeMinute, Burst: 1})
}

// learned puts key and value into the map. An element that is there stays as it
// is: a second host on the outside endpoint neither takes over nor refreshes.
func learned(c *MapConfig, wild uint8, marked bool) piece {
	add := &expr.Dynset{
		SrcRegKey: reg, SrcRegData: unix.NFT_REG32_00 + valueWord, SetName: permissionMap,
		Operation: unix.NFT_DYNSET_OP_ADD, Timeout: c.Lifetime,
	}
	if c.MaxChildren > 0 {
		b := bucketOf(c.MaxChildren, wild, marked)
		b.size++ // to make the element takes one
		add.Exprs = []expr.Any{&expr.Limit{
			Type: expr.LimitTypePkts, Rate: uint64(b.perMinute), Unit: expr.LimitTimeMinute, Burst: uint32(b.size),
		}}
	}
	return piece{add}
}

// A bucket of tokens, of which a look-up of an element takes one.
type bucket struct{ size, perMinute int }

// bucketOf returns the bucket that lets an element have about maxChildren children
// that nobody answers: conntrack forgets those after 30 s (nf_conntrack_udp_timeout).
// An element with a mark is looked up twice for each, and one that is not for one
// peer may have more (cone.WildChildren).
func bucketOf(maxChildren int, wild uint8, marked bool) bucket {
	if wild > 0 {
		maxChildren *= cone.WildChildren
	}
	if marked {
		maxChildren *= 2
	}
	return bucket{size: maxChildren, perMinute: 2 * maxChildren}
}

// families are the two halves of family inet. The key of a permission, as an
// expected child has it, is peer . outside address . outside port; zones share a
// cap.
var families = []struct {
	name  string
	proto byte
	addr  nftables.SetDatatype
	key   piece
}{
	{"4", unix.NFPROTO_IPV4, nftables.TypeIPAddr, join(
		original(expr.CtKeySRCIP, 0), original(expr.CtKeyDSTIP, 1), original(expr.CtKeyPROTODST, 2))},
	{"6", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, join(
		original(expr.CtKeySRCIP6, 0), original(expr.CtKeyDSTIP6, 4), original(expr.CtKeyPROTODST, 8))},
}
