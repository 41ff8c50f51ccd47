package userrules

import (
	"net/netip"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
)

// leadsTo returns the one endpoint to which a rule translates destinations, as in
// Forward.To. The zero value stands for everything else: several addresses, a range of
// ports, a map, a random port, or the gateway itself.
func (r *rule) leadsTo() netip.AddrPort {
	loaded := make(map[uint32][]byte) // constants, by register
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Immediate:
			loaded[e.Register] = e.Data
		case *expr.NAT:
			if e.Type == expr.NATTypeDestNAT {
				return nftDestination(e, loaded)
			}
		case *expr.Target: // of iptables
			if e.Name == "DNAT" {
				return xtDestination(e.Info)
			}
		default:
			clear(loaded) // it may load a register
		}
	}
	return netip.AddrPort{}
}

// nftDestination is leadsTo for a statement of nftables, with the constants in the
// registers.
func nftDestination(e *expr.NAT, loaded map[uint32][]byte) (none netip.AddrPort) {
	one := func(first, last uint32) ([]byte, bool) {
		return loaded[first], last == 0 || last == first
	}
	b, ok := one(e.RegAddrMin, e.RegAddrMax)
	addr, is := netip.AddrFromSlice(b)
	if !ok || !is || e.Random || e.FullyRandom || e.Prefix {
		return none
	}
	if e.RegProtoMin == 0 {
		return netip.AddrPortFrom(addr, 0)
	}
	b, ok = one(e.RegProtoMin, e.RegProtoMax)
	port := uint16(number(b, 2, 0))
	if !ok || len(b) < 2 || port == 0 {
		return none
	}
	return netip.AddrPortFrom(addr, port)
}

// xtDestination is leadsTo for the data of a DNAT target.
func xtDestination(info xt.InfoAny) (none netip.AddrPort) {
	var r xt.NatRange
	switch info := info.(type) {
	case *xt.NatIPv4MultiRangeCompat:
		if len(*info) != 1 {
			return none
		}
		r = xt.NatRange((*info)[0])
	case *xt.NatRange:
		r = *info
	case *xt.NatRange2:
		r = info.NatRange
	default:
		return none
	}
	const known = rangeAddrs | rangePorts | rangePersistent
	addr, is := netip.AddrFromSlice(r.MinIP)
	if !is || r.Flags&rangeAddrs == 0 || r.Flags&^known != 0 || !r.MinIP.Equal(r.MaxIP) {
		return none
	}
	switch {
	case r.Flags&rangePorts == 0:
		return netip.AddrPortFrom(addr.Unmap(), 0)
	case r.MinPort == 0, r.MinPort != r.MaxPort:
		return none
	}
	return netip.AddrPortFrom(addr.Unmap(), r.MinPort)
}
