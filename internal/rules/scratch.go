//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"time"

	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The rules of mapping are made of what nft can express, and with the registers that
// it would take: so every nft lists them, and loads what it listed. nft cannot test
// for a value that it found in a map. Such a value is put into the source of the
// packet, where a test finds it, and the source is put back in the same chain. That
// leaves the checksums alone, for nobody else sees the packet meanwhile.

// These load a part of the packet into a word of the registers.
func word32(w uint32) uint32     { return unix.NFT_REG32_00 + w }
func source(w uint32) piece      { return network(12, w) }
func destination(w uint32) piece { return network(16, w) }
func network(offset, w uint32) piece {
	return piece{&expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: 4, DestRegister: word32(w)}}
}

// nft puts the value of an element, and the second value of a rule, at word 4.
const secondWord = 4

// Keys of the sets, at word 0, or at secondWord: the source and the destination of the
// packet, both ends of a flow from inside, and the endpoint to which it was opened. A
// rule that loads a port must begin with isUDP, or nft does not know what that is; and
// what it loads of the packet must come before what it loads of the flow.
var (
	packetSourceEndpoint = sourceEndpointAt(0)
	packetTarget         = join(destination(0), transport(2, 1))
	flowInside           = join(original(expr.CtKeySRCIP, 0), original(expr.CtKeyPROTOSRC, 1))
	flowOutside          = join(reply(expr.CtKeyDSTIP, 0), reply(expr.CtKeyPROTODST, 1))
	flowTarget           = join(original(expr.CtKeyDSTIP, 0), original(expr.CtKeyPROTODST, 1))
	// That of a flow that kept its port, from its packet: what the packet has is cheaper
	// to load than what conntrack knows.
	keptInside = join(original(expr.CtKeySRCIP, 0), transport(0, 1))
	// The key of taken, of a packet that leaves, and of a flow.
	packetTuple = join(transport(0, 0), destination(1), transport(2, 2))
	flowTuple   = join(reply(expr.CtKeyPROTODST, 0), reply(expr.CtKeySRCIP, 1), reply(expr.CtKeyPROTOSRC, 2))
	// A flow from outside, as it came.
	inboundTuple = join(original(expr.CtKeyPROTODST, 0), original(expr.CtKeySRCIP, 1), original(expr.CtKeyPROTOSRC, 2))
)

func sourceEndpointAt(w uint32) piece { return join(source(w), transport(0, w+1)) }

// These write the source of the packet, and put back what it was when the packet came
// and, after NAT, when it leaves.
func setSource(load piece) piece {
	return join(load, piece{&expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: reg,
		Base: expr.PayloadBaseNetworkHeader, Offset: 12, Len: 4,
	}})
}

func setSourcePort(load piece) piece {
	return join(load, piece{&expr.Payload{
		OperationType: expr.PayloadWrite, SourceRegister: reg,
		Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 2,
	}})
}

var (
	insideSource      = setSource(original(expr.CtKeySRCIP, 0))
	insideSourcePort  = setSourcePort(original(expr.CtKeyPROTOSRC, 0))
	outsideSource     = setSource(reply(expr.CtKeyDSTIP, 0))
	outsideSourcePort = setSourcePort(reply(expr.CtKeyPROTODST, 0))
)

// find puts the value that the map has for key into reg. It ends the rule where there
// is none.
func find(m *set, key piece) piece { return findAt(m, key, 0) }

func findAt(m *set, key piece, w uint32) piece {
	return join(key, piece{&expr.Lookup{SourceRegister: word32(w), SetName: m.Name, DestRegister: word32(w), IsDestRegSet: true}})
}

func has(s *set, key piece) piece {
	return join(key, piece{&expr.Lookup{SourceRegister: reg, SetName: s.Name}})
}

func hasNot(s *set, key piece) piece {
	return join(key, piece{&expr.Lookup{SourceRegister: reg, SetName: s.Name, Invert: true}})
}

// put writes an element; value, which a map wants, loads it to secondWord.
// NFT_DYNSET_OP_ADD leaves one that is there as it is; _UPDATE refreshes it, but not
// its value. The rule ends where the set is full.
func put(s *set, op uint32, key, value piece, timeout time.Duration) piece {
	d := &expr.Dynset{SrcRegKey: reg, SetName: s.Name, Operation: op, Timeout: timeout}
	if s.IsMap {
		d.SrcRegData = word32(secondWord)
	}
	return join(key, value, piece{d})
}

const (
	opAdd    = unix.NFT_DYNSET_OP_ADD
	opUpdate = unix.NFT_DYNSET_OP_UPDATE
)

// and and xor change what is in reg.
func and(mask []byte) piece { return bitwise(mask, make([]byte, len(mask))) }

func bitwise(mask, xor []byte) piece {
	return piece{&expr.Bitwise{SourceRegister: reg, DestRegister: reg, Len: uint32(len(mask)), Mask: mask, Xor: xor}}
}

// nobody makes a constant key, 0.0.0.0, of the address that load puts into reg.
func nobody(load piece) piece { return join(load, and(be32(0))) }

func jump(c string) piece { return piece{&expr.Verdict{Kind: expr.VerdictJump, Chain: c}} }

// translate gives a source or a destination; the first value is in reg, the port, if
// any, in secondWord.
func snat(withPort bool) piece { return nat(expr.NATTypeSourceNAT, withPort) }
func dnat() piece              { return nat(expr.NATTypeDestNAT, true) }
func nat(typ expr.NATType, withPort bool) piece {
	n := &expr.NAT{Type: typ, Family: unix.NFPROTO_IPV4, RegAddrMin: reg}
	if withPort {
		n.RegProtoMin = word32(secondWord)
	}
	return piece{n}
}
