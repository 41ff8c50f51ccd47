package userrules

import (
	"bytes"
	"encoding/binary"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// A firstPacket is what is known of the first packets of flows, besides ports, addresses and the
// links that they come by. Nobody has translated them yet.
type firstPacket struct {
	dest uint32 // the type of their destination address: RTN_UNICAST or RTN_LOCAL
	out  []Link // that they leave by; nil stands for any
}

// loads returns the field that a statement loads, of kind other if nothing is known of it, and the
// register.
func (p *firstPacket) loads(e expr.Any) (f field, reg uint32) {
	number := func(n uint32) field {
		return field{kind: known, size: 4, is: binary.NativeEndian.AppendUint32(nil, n)}
	}
	switch e := e.(type) {
	case *expr.Ct:
		switch {
		case e.SourceRegister:
		case e.Key == expr.CtKeySTATE:
			return number(expr.CtStateBitNEW), e.Register
		case e.Key == expr.CtKeySTATUS:
			return number(0), e.Register
		case e.Key == expr.CtKeyDIRECTION: // original
			return field{kind: known, size: 1, is: []byte{0}}, e.Register
		case e.Key == expr.CtKeyPROTODST && e.Direction == 0:
			return field{kind: port, size: 2}, e.Register
		}
	case *expr.Meta:
		if e.Key == expr.MetaKeyPKTTYPE && !e.SourceRegister {
			return field{kind: known, size: 1, is: []byte{unix.PACKET_HOST}}, e.Register
		}
	case *expr.Fib:
		switch {
		case !e.ResultADDRTYPE:
		case e.FlagDADDR:
			return number(p.dest), e.Register
		case e.FlagSADDR:
			return number(unix.RTN_UNICAST), e.Register
		}
	}
	return field{}, 0
}

// passes reports whether the known value of f passes a test of it.
func (f field) passes(t test) bool {
	value := bytes.Clone(f.is)
	for i := range min(len(f.mask), len(value)) {
		value[i] &= f.mask[i]
	}
	return slices.ContainsFunc(t.any, func(s span) bool {
		return bytes.Equal(s.low, value) || f.mask == nil && s.has(value)
	}) != t.not
}

// xtMatch returns the chance that a match of iptables matches, if it is for nothing else than
// what is known.
func (p *firstPacket) xtMatch(m *expr.Match) chance {
	const invertSource, invertDest, limits = 1, 2, 4 | 8 // XT_ADDRTYPE_
	types := func(source, dest uint16, notSource, notDest bool) chance {
		has := func(types uint16, typ uint32, not bool) chance {
			return certain(types == 0 || types&(1<<typ) != 0 != not)
		}
		return has(source, unix.RTN_UNICAST, notSource).and(has(dest, p.dest, notDest))
	}
	switch info := m.Info.(type) {
	case *xt.AddrType:
		return types(info.Source, info.Dest, info.InvertSource, info.InvertDest)
	case *xt.AddrTypeV1:
		if info.Flags&limits != 0 && p.dest == unix.RTN_LOCAL {
			return maybe // of another link, perhaps
		}
		return types(info.Source, info.Dest, info.Flags&invertSource != 0, info.Flags&invertDest != 0)
	}
	if m.Name == "conntrack" || m.Name == "state" {
		return translated(&Link{}, nil, nil).xtMatch(m)
	}
	return maybe
}

// toPeers returns a match of iptables as it is for the ports of peers alone: "multiport --ports"
// is also for those of hosts.
func toPeers(m *expr.Match) *expr.Match {
	info, ok := m.Info.(*xt.Unknown)
	if !ok || m.Name != "multiport" || len(*info) == 0 || (*info)[0] != multiportEither {
		return m
	}
	b := xt.Unknown(bytes.Clone(*info))
	b[0] = multiportDestination
	return &expr.Match{Name: m.Name, Rev: m.Rev, Info: &b}
}
