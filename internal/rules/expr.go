//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"encoding/binary"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
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
)

var (
	ctState  = piece{&expr.Ct{Key: expr.CtKeySTATE, Register: reg}}
	ctStatus = piece{&expr.Ct{Key: expr.CtKeySTATUS, Register: reg}}
	l4proto  = piece{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg}}
	nfproto  = piece{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg}}
	iifname  = piece{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg}}
	socket   = piece{&expr.Socket{Key: expr.SocketKeyWildcard, Register: reg}}

	sourcePort = piece{&expr.Payload{
		Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2, DestRegister: reg,
	}}
	destinationPort = piece{&expr.Payload{
		Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2, DestRegister: reg,
	}}

	isUDP      = join(l4proto, is([]byte{unix.IPPROTO_UDP}))
	notUDP     = join(l4proto, isNot([]byte{unix.IPPROTO_UDP}))
	notOutside = join(iifname, piece{&expr.Lookup{SourceRegister: reg, SetName: outsideSet, Invert: true}})

	accept = piece{&expr.Verdict{Kind: expr.VerdictAccept}}
)

func is(b []byte) piece    { return piece{&expr.Cmp{Op: expr.CmpOpEq, Register: reg, Data: b}} }
func isNot(b []byte) piece { return piece{&expr.Cmp{Op: expr.CmpOpNeq, Register: reg, Data: b}} }
func atMost(b byte) piece  { return piece{&expr.Cmp{Op: expr.CmpOpLte, Register: reg, Data: []byte{b}}} }
func be16(n uint16) []byte { return binary.BigEndian.AppendUint16(nil, n) }
func ne32(n uint32) []byte { return binary.NativeEndian.AppendUint32(nil, n) }
func masked(m uint32) piece {
	return piece{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: 4, Mask: ne32(m), Xor: ne32(0)}}
}

func drop(name string) piece {
	return piece{
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: name},
		&expr.Verdict{Kind: expr.VerdictDrop},
	}
}

// add makes an element of what is in reg and the registers behind it, or finds
// it, and runs the element's own e.
func add(set *nftables.Set, e expr.Any) piece {
	return piece{&expr.Dynset{
		SrcRegKey: reg, SetName: set.Name, Operation: unix.NFT_DYNSET_OP_ADD, Exprs: []expr.Any{e},
	}}
}

// families are the two halves of family inet. The key of a permission, as a
// child has it, is peer . outside address . outside port; zones share a cap.
var families = []struct {
	name  string
	proto byte
	addr  nftables.SetDatatype
	key   piece
}{
	{"4", unix.NFPROTO_IPV4, nftables.TypeIPAddr, childKey(expr.CtKeySRCIP, expr.CtKeyDSTIP, 4)},
	{"6", unix.NFPROTO_IPV6, nftables.TypeIP6Addr, childKey(expr.CtKeySRCIP6, expr.CtKeyDSTIP6, 16)},
}

func childKey(src, dst expr.CtKey, size uint32) piece {
	const reg32 = unix.NFT_REG32_00 // the first part of reg
	original := func(key expr.CtKey, at uint32) expr.Any {
		return &expr.Ct{Key: key, Register: reg32 + at/4, Direction: expr.CtDirOriginal, OptDirection: true}
	}
	return piece{original(src, 0), original(dst, size), original(expr.CtKeyPROTODST, 2*size)}
}
