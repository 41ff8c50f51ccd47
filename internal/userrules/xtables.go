package userrules

import (
	"encoding/binary"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// Flags and offsets of struct xt_multiport_v1.
const (
	multiportSource      = 0
	multiportDestination = 1
	multiportEither      = 2
	multiportPorts       = 2
	multiportRanges      = multiportPorts + 2*15
	multiportInvert      = multiportRanges + 15
	multiportSize        = multiportInvert + 1
)

// xtMatch returns the fields that a match of iptables-nft reads, and its test. If there are no
// fields, the match tests nothing that matters here.
func xtMatch(m *expr.Match) ([]field, test) {
	ports := []field{{kind: port, size: 2}}
	switch info := m.Info.(type) {
	case *xt.Udp:
		return ports, test{
			any: []span{portSpan(info.DstPorts[0], info.DstPorts[1])},
			not: info.InvFlags&xt.UdpInvDestPorts != 0,
		}
	case *xt.Unknown:
		if m.Name != "multiport" {
			return nil, test{}
		}
		b := []byte(*info)
		spans, ok := multiportSpans(m.Rev, b)
		switch {
		case !ok:
			return ports, test{unknown: true}
		case b[0] != multiportDestination:
			return nil, test{}
		}
		return ports, test{any: spans, not: b[multiportInvert] != 0}
	}
	return nil, test{}
}

// fromSomePorts reports whether a match of iptables for UDP tests the source port, too.
func fromSomePorts(m *expr.Match) bool {
	info, ok := m.Info.(*xt.Udp)
	return ok && (info.SrcPorts != [2]uint16{0, 0xffff} || info.InvFlags&xt.UdpInvSrcPorts != 0)
}

// multiportSpans returns the ports of a match for several ports. It returns false if they are not
// understood.
func multiportSpans(rev uint32, b []byte) (all []span, ok bool) {
	if rev != 1 || len(b) < multiportSize || b[1] > 15 {
		return nil, false
	}
	at := func(i int) uint16 { return binary.NativeEndian.Uint16(b[multiportPorts+2*i:]) }
	for i := 0; i < int(b[1]); i++ {
		first := at(i)
		if b[multiportRanges+i] != 0 && i+1 < int(b[1]) {
			i++
		}
		all = append(all, portSpan(first, at(i)))
	}
	return all, true
}

// portSpan is a span of ports.
func portSpan(first, last uint16) span {
	return span{binary.BigEndian.AppendUint16(nil, first), binary.BigEndian.AppendUint16(nil, last)}
}
