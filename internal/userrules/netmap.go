package userrules

import (
	"net/netip"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"

	"github.com/conenatd/conenatd/internal/cone"
)

// A netmap translates the outside addresses in from to those of a prefix with the same low bits.
type netmap struct {
	from cone.AddrRange // the zero value stands for all that the rule matches
	to   netip.Prefix   // invalid if it is not known
}

// netmaps returns what a rule does to destinations by "dnat prefix to" or NETMAP.
func (w *walker) netmaps(r *rule) []netmap {
	loaded := make(map[uint32][]byte) // constants, by register
	var asked uint32                  // the register with the whole destination
	var found *set                    // what the last lookup asked for the destination, and
	var value uint32                  // the register of its answer
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Immediate:
			loaded[e.Register] = e.Data
		case *expr.Payload:
			if asked = 0; e.Base == expr.PayloadBaseNetworkHeader && (e.Offset == 16 && e.Len == 4 || e.Offset == 24 && e.Len == 16) {
				asked = e.DestRegister
			}
		case *expr.Lookup:
			if found = nil; e.IsDestRegSet && e.SourceRegister == asked {
				found, value = w.set(e.SetName), e.DestRegister
			}
		case *expr.NAT:
			switch {
			case !e.Prefix || e.RegProtoMin != 0:
				return nil
			case found != nil && value == e.RegAddrMin:
				return found.netmaps()
			}
			return []netmap{{to: prefixOf(loaded[e.RegAddrMin], loaded[e.RegAddrMax])}}
		case *expr.Target: // of iptables
			if e.Name == "NETMAP" {
				return []netmap{{to: xtPrefix(e.Info)}}
			}
		default:
			clear(loaded) // it may load a register
			asked = 0
		}
	}
	return nil
}

// netmaps returns what a map of prefixes to prefixes has, or nil if that is not known.
func (s *set) netmaps() (all []netmap) {
	if s.failed != nil || !s.loaded || s.changing {
		return nil
	}
	for _, el := range s.elements {
		if half := len(el.value) / 2; half == s.size && !el.others {
			all = append(all, netmap{addrRange(el.low, el.high), prefixOf(el.value[:half], el.value[half:])})
		}
	}
	return all
}

// prefixOf returns the prefix from the first to the last address, or an invalid one if these are
// the ends of none.
func prefixOf(first, last []byte) (none netip.Prefix) {
	a, ok := netip.AddrFromSlice(first)
	b, is := netip.AddrFromSlice(last)
	if !ok || !is || a.Unmap().BitLen() != b.Unmap().BitLen() {
		return none
	}
	if all := (cone.AddrRange{First: a.Unmap(), Last: b.Unmap()}).Prefixes(); len(all) == 1 {
		return all[0]
	}
	return none
}

// xtPrefix returns the prefix in the data of a NETMAP target, which has one range of addresses: struct
// nf_nat_ipv4_multi_range_compat, or for IPv6 struct nf_nat_range2.
func xtPrefix(info xt.InfoAny) (none netip.Prefix) {
	const size4, size6 = 20, 40 // without padding
	raw, ok := info.(*xt.Unknown)
	switch {
	case !ok:
		return none
	case len(*raw) >= size6:
		return prefixOf((*raw)[4:20], (*raw)[20:36])
	case len(*raw) >= size4:
		return prefixOf((*raw)[8:12], (*raw)[12:16])
	}
	return none
}
