package userrules

import (
	"bytes"
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A rawPacket has the bytes of a packet that most rules ask for: those of its IPv4 and UDP headers,
// the name and the index of the link by which it came, and its protocols.
type rawPacket [rawSize]byte

// Offsets in a rawPacket.
const (
	rawTransport = 20
	rawLink      = rawTransport + 4
	rawIndex     = rawLink + unix.IFNAMSIZ
	rawL4        = rawIndex + 4
	rawL3        = rawL4 + 1
	rawSize      = rawL3 + 1
)

// Offsets in an IPv4 header.
const (
	headerProtocol  = 9
	headerAddresses = 12
)

func rawPacketOf(f *cone.Flow, in Link) *rawPacket {
	p := new(rawPacket)
	p[headerProtocol] = unix.IPPROTO_UDP
	copy(p[headerAddresses:], f.Src.Addr[12:])
	copy(p[headerAddresses+4:], f.ReplySrc.Addr[12:])
	binary.BigEndian.PutUint16(p[rawTransport:], f.Src.Port)
	binary.BigEndian.PutUint16(p[rawTransport+2:], f.ReplySrc.Port)
	copy(p[rawLink:], nfnl.LinkKey(in.Name))
	binary.NativeEndian.PutUint32(p[rawIndex:], uint32(in.Index))
	p[rawL4], p[rawL3] = unix.IPPROTO_UDP, unix.NFPROTO_IPV4
	return p
}

// A guard has tests of a rule that a packet must pass before the rule does anything. There are
// gateways with thousands of rules, of which a packet passes the guards of a few: only these are
// worth a walk.
type guard []rawTest

// A rawTest compares bytes of a rawPacket.
type rawTest struct {
	at, n     int
	mask      []byte // nil for all bits
	low, high []byte // the first and the last value; high is nil if there is one
	not       bool
}

// mayPass reports whether a packet passes all tests.
func (g guard) mayPass(p *rawPacket) bool {
	for i := range g {
		if !g[i].passes(p) {
			return false
		}
	}
	return true
}

func (t *rawTest) passes(p *rawPacket) bool {
	value := p[t.at:][:t.n]
	if t.mask != nil {
		var masked [unix.IFNAMSIZ]byte
		for i, b := range value {
			masked[i] = b & t.mask[i]
		}
		value = masked[:t.n]
	}
	if t.high == nil {
		return bytes.Equal(value, t.low) != t.not
	}
	return (bytes.Compare(value, t.low) >= 0 && bytes.Compare(value, t.high) <= 0) != t.not
}

// guards are the guards of the rules of chains.
type guards map[*chain][]guard

// of returns the guards of a chain's rules.
func (g guards) of(c *chain) []guard {
	all, made := g[c]
	if !made {
		all = make([]guard, len(c.rules))
		for i := range c.rules {
			all[i] = guardOf(&c.rules[i])
		}
		g[c] = all
	}
	return all
}

func guardOf(r *rule) (g guard) {
	var loaded rawTest // n is 0 if nothing is loaded
	var register uint32
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Meta:
			if e.SourceRegister {
				return g
			}
			loaded, register = rawMeta(e.Key), e.Register
		case *expr.Payload:
			if e.OperationType != expr.PayloadLoad {
				return g
			}
			loaded, register = rawPayload(e), e.DestRegister
		case *expr.Bitwise:
			masks := e.SourceRegister == register && e.DestRegister == register && loaded.mask == nil &&
				len(e.Mask) == loaded.n && bytes.Equal(e.Xor, make([]byte, loaded.n))
			if !masks {
				loaded = rawTest{}
			}
			loaded.mask = e.Mask
		case *expr.Cmp:
			if e.Register != register || loaded.n == 0 || len(e.Data) > loaded.n {
				continue
			}
			t := loaded
			t.n, t.low, t.not = len(e.Data), e.Data, e.Op == expr.CmpOpNeq
			if e.Op == expr.CmpOpEq || e.Op == expr.CmpOpNeq {
				g = append(g, t)
			}
		case *expr.Match:
			if info, ok := e.Info.(*xt.Udp); ok {
				g = append(g, rawPorts(0, info.SrcPorts, info.InvFlags&xt.UdpInvSrcPorts != 0), rawPorts(2, info.DstPorts, info.InvFlags&xt.UdpInvDestPorts != 0))
			}
		case *expr.Lookup:
			if e.IsDestRegSet {
				return g
			}
		default:
			if s.name != "counter" {
				return g
			}
		}
	}
	return g
}

func rawMeta(key expr.MetaKey) rawTest {
	switch key {
	case expr.MetaKeyIIFNAME:
		return rawTest{at: rawLink, n: unix.IFNAMSIZ}
	case expr.MetaKeyIIF:
		return rawTest{at: rawIndex, n: 4}
	case expr.MetaKeyL4PROTO:
		return rawTest{at: rawL4, n: 1}
	case expr.MetaKeyNFPROTO:
		return rawTest{at: rawL3, n: 1}
	}
	return rawTest{}
}

func rawPayload(e *expr.Payload) rawTest {
	at, n := uint64(e.Offset), uint64(e.Len)
	switch {
	case e.Base == expr.PayloadBaseNetworkHeader && at == headerProtocol && n == 1:
	case e.Base == expr.PayloadBaseNetworkHeader && at >= headerAddresses && at+n <= rawTransport:
	case e.Base == expr.PayloadBaseTransportHeader && at+n <= rawLink-rawTransport:
		at += rawTransport
	default:
		return rawTest{}
	}
	return rawTest{at: int(at), n: int(n)}
}

func rawPorts(at int, ports [2]uint16, not bool) rawTest {
	span := portSpan(ports[0], ports[1])
	return rawTest{at: rawTransport + at, n: 2, low: span.low, high: span.high, not: not}
}
