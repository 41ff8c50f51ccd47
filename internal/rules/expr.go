//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// Rules are put together from these pieces. A piece that loads something puts
// it into reg, where the next one finds it.
type piece = []expr.Any

func join(pieces ...piece) piece { return slices.Concat(pieces...) }

const reg = unix.NFT_REG_1

const (
	metaKeySecPath  expr.MetaKey = 25 // NFT_META_SECPATH
	metaKeySDIFName expr.MetaKey = 34 // NFT_META_SDIFNAME
)

// Bits of conntrack's status, from linux/netfilter/nf_conntrack_common.h.
const (
	ctExpected  = 1 << 0
	ctSeenReply = 1 << 1
	ctAssured   = 1 << 2
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
	// The link by which a packet came, where iifname is its VRF; else "".
	sdifname = piece{&expr.Meta{Key: metaKeySDIFName, Register: reg}}
	ctHelper = piece{&expr.Ct{Key: expr.CtKeyHELPER, Register: reg}} // of the master
	// The link that leads to the source of a packet; that there is no way back by the
	// link that it came by; and what is not for the gateway, before it is routed.
	wayBack   = piece{&expr.Fib{Register: reg, FlagSADDR: true, FlagMARK: true, ResultOIFNAME: true}}
	noWayBack = join(piece{&expr.Fib{
		Register: reg, FlagSADDR: true, FlagMARK: true, FlagIIF: true, ResultOIF: true, FlagPRESENT: true,
	}}, is(ne32(0)))
	// A packet that IPsec took in has a security path.
	noSecurityPath = join(piece{&expr.Meta{Key: metaKeySecPath, Register: reg}}, is([]byte{0}))
	forwarded      = join(piece{&expr.Fib{Register: reg, FlagDADDR: true, ResultADDRTYPE: true}}, isNot(ne32(unix.RTN_LOCAL)))
	ctZone         = piece{&expr.Ct{Key: expr.CtKeyZONE, Register: reg}}
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

	packetSource      = address(12, 0)
	packetDestination = address(16, 1)

	ctMark = piece{&expr.Ct{Key: expr.CtKeyMARK, Register: reg}}

	// replyFlow is a flow from inside, as its answers come: no two have the same.
	replyFlow = join(reply(expr.CtKeySRCIP, 0), reply(expr.CtKeyPROTOSRC, 1), reply(expr.CtKeyDSTIP, 2), reply(expr.CtKeyPROTODST, 3))

	// flowAddr, flowPort and flowMark are inside address and port, and connmark, of a
	// flow from inside, behind a key of the map.
	flowAddr = original(expr.CtKeySRCIP, valueWord)
	flowPort = original(expr.CtKeyPROTOSRC, valueWord)
	flowMark = piece{&expr.Ct{Key: expr.CtKeyMARK, Register: unix.NFT_REG32_00 + valueWord}}

	// packetFlow is the flow of the first packet from outside, and originalFlow is the
	// same, when its destination was translated.
	packetFlow   = join(packetSource, transport(0, 1), address(16, 2), transport(2, 3))
	originalFlow = join(original(expr.CtKeySRCIP, 0), original(expr.CtKeyPROTOSRC, 1),
		original(expr.CtKeyDSTIP, 2), original(expr.CtKeyPROTODST, 3))

	// setLabel tells whoever sees the flow later that we admitted it.
	setLabel = piece{
		&expr.Immediate{Register: reg, Data: nfnl.ChildLabel[:]},
		&expr.Ct{Key: expr.CtKeyLABELS, Register: reg, SourceRegister: true},
	}
	// inheritMark sets the connmark to the one that the map of marks has for the key.
	inheritMark = join(lookUp(elements.MarksMap, 0), piece{&expr.Ct{Key: expr.CtKeyMARK, Register: reg, SourceRegister: true}})

	accept = piece{&expr.Verdict{Kind: expr.VerdictAccept}}
)

// toInside translates to the inside address that the map has for the key in reg, with the
// port behind it, does what mark says, remembers the flow and counts it. It does not match
// where the map lacks the key, or its bucket is empty. nft lists the look-ups last.
func toInside(mark piece) piece {
	return join(lookUp(elements.PermissionMap, valueWord), mark, packetFlow,
		piece{&expr.Dynset{SrcRegKey: reg, SetName: admittedSet, Operation: unix.NFT_DYNSET_OP_ADD}},
		count(admittedCounter), piece{&expr.NAT{
			Type: expr.NATTypeDestNAT, Family: unix.NFPROTO_IPV4,
			RegAddrMin: unix.NFT_REG32_00 + valueWord, RegProtoMin: unix.NFT_REG32_00 + valueWord + 1,
		}})
}

// sourceIn matches if the source of the packet is in p, in a rule of family inet. A
// prefix that ends with a byte is compared without a mask, as nft does it.
func sourceIn(p netip.Prefix) piece {
	addr, family, offset := p.Masked().Addr().AsSlice(), byte(unix.NFPROTO_IPV4), uint32(12)
	if p.Addr().Is6() {
		family, offset = unix.NFPROTO_IPV6, 8
	}
	size := len(addr)
	whole := p.Bits() / 8
	if p.Bits()%8 == 0 && whole > 0 {
		return join(
			piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: uint32(whole), DestRegister: reg}}, is(addr[:whole]),
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
func be32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
func ne16(n uint16) []byte { return binary.NativeEndian.AppendUint16(nil, n) }
func ne32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
func masked(m uint32) piece {
	return piece{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: ne32(m), Xor: ne32(0)}}
}

// valueWord is where nft puts the value of an element whose key is in reg.
const valueWord = 4

// These load an IPv4 address of the packet, a part of the UDP header, of the flow as
// its first packet came, or of its answers, into a word of reg and what follows it.
func address(offset, word uint32) piece {
	return piece{&expr.Payload{
		Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4, DestRegister: unix.NFT_REG32_00 + word,
	}}
}

func ipv6Address(offset uint32) piece {
	return piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: net.IPv6len, DestRegister: reg}}
}

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

// lookUp puts the value that a map has for the key in reg into a word of reg and what
// follows it.
func lookUp(name string, word uint32) piece {
	return piece{&expr.Lookup{
		SourceRegister: reg, SetName: name, DestRegister: unix.NFT_REG32_00 + word, IsDestRegSet: true,
	}}
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
func learned(c *MapConfig, wild uint8) piece {
	add := addTo(elements.PermissionMap, c.Lifetime)
	if c.MaxChildren > 0 {
		b := elements.BucketOf(c.MaxChildren, wild)
		b.Size++ // to make the element takes one
		add.Exprs = []expr.Any{&expr.Limit{
			Type: expr.LimitTypePkts, Rate: uint64(b.PerMinute), Unit: expr.LimitTimeMinute, Burst: uint32(b.Size),
		}}
	}
	return piece{add}
}

const dynsetDelete = 2 // NFT_DYNSET_OP_DELETE

// removeFrom removes the key in reg from a map. The kernel wants a value all the same.
func removeFrom(name string) piece {
	return piece{&expr.Dynset{SrcRegKey: reg, SrcRegData: unix.NFT_REG32_00 + valueWord, SetName: name, Operation: dynsetDelete}}
}

func addTo(name string, lifetime time.Duration) *expr.Dynset {
	return &expr.Dynset{
		SrcRegKey: reg, SrcRegData: unix.NFT_REG32_00 + valueWord, SetName: name,
		Operation: unix.NFT_DYNSET_OP_ADD, Timeout: lifetime,
	}
}

// An ipFamily is one of the two families that family inet is made of.
type ipFamily struct {
	name                string
	is                  piece // it is the packet's
	addr                nftables.SetDatatype
	source, destination piece // of the packet
	// The key of a permission, as an expected child has it: peer . outside address .
	// outside port. Zones share a cap.
	key  piece
	icmp byte
	size int // bytes of an address
}

var ipFamilies = []*ipFamily{
	{
		name: "4", is: join(nfproto, is([]byte{unix.NFPROTO_IPV4})), addr: nftables.TypeIPAddr,
		source: address(12, 0), destination: address(16, 0),
		key:  join(original(expr.CtKeySRCIP, 0), original(expr.CtKeyDSTIP, 1), original(expr.CtKeyPROTODST, 2)),
		icmp: unix.IPPROTO_ICMP, size: net.IPv4len,
	},
	{
		name: "6", is: join(nfproto, is([]byte{unix.NFPROTO_IPV6})), addr: nftables.TypeIP6Addr,
		source: ipv6Address(8), destination: ipv6Address(24),
		key:  join(original(expr.CtKeySRCIP6, 0), original(expr.CtKeyDSTIP6, 4), original(expr.CtKeyPROTODST, 8)),
		icmp: unix.IPPROTO_ICMPV6, size: net.IPv6len,
	},
}

// of returns the prefixes of the family.
func (f *ipFamily) of(prefixes []netip.Prefix) []netip.Prefix {
	return slices.DeleteFunc(slices.Clone(prefixes), func(p netip.Prefix) bool { return p.Addr().BitLen() != 8*f.size })
}

// familiesOf returns the families of prefixes.
func familiesOf(prefixes []netip.Prefix) []*ipFamily {
	return slices.DeleteFunc(slices.Clone(ipFamilies), func(f *ipFamily) bool { return len(f.of(prefixes)) == 0 })
}

// onlyOf matches if the packet is of the families, unless these are all.
func onlyOf(families []*ipFamily) piece {
	if len(families) == 1 {
		return families[0].is
	}
	return nil
}
