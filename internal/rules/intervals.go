//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"encoding/binary"
	"math"
	"net"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// notUnicast are the IPv4 prefixes whose addresses are no peers.
var notUnicast = []netip.Prefix{
	netip.MustParsePrefix("0.0.0.0/8"),
	netip.MustParsePrefix("127.0.0.0/8"),
	netip.MustParsePrefix("169.254.0.0/16"),
	netip.MustParsePrefix("224.0.0.0/3"), // multicast, reserved, broadcast
}

// intervals returns the elements of a set with the addresses of the IPv4
// prefixes: each interval has one for its first address and one for the first
// behind it, unless it goes to the end.
func intervals(prefixes []netip.Prefix) (es []nftables.SetElement) {
	type span struct{ first, last uint32 }
	var spans []span
	for _, p := range prefixes {
		if p.Addr().Is4() {
			b := p.Masked().Addr().As4()
			first := binary.BigEndian.Uint32(b[:])
			spans = append(spans, span{first, first | uint32(1<<(32-p.Bits())-1)})
		}
	}
	slices.SortFunc(spans, func(a, b span) int { return int(int64(a.first) - int64(b.first)) })
	var merged []span
	for _, s := range spans {
		if n := len(merged); n > 0 && int64(s.first) <= int64(merged[n-1].last)+1 {
			merged[n-1].last = max(merged[n-1].last, s.last)
		} else {
			merged = append(merged, s)
		}
	}
	for _, s := range merged {
		es = append(es, nftables.SetElement{Key: be32(s.first)})
		if s.last != math.MaxUint32 {
			es = append(es, nftables.SetElement{Key: be32(s.last + 1), IntervalEnd: true})
		}
	}
	return es
}

// prefixes are IPv4 prefixes that addresses are tested for. One is compared with,
// which is cheaper than to look it up in a set.
type prefixes struct {
	set *set
	one netip.Prefix
}

func (l *layout) prefixes(name string, all []netip.Prefix) *prefixes {
	all = slices.DeleteFunc(slices.Clone(all), func(p netip.Prefix) bool { return !p.Addr().Is4() })
	if len(all) == 1 {
		return &prefixes{one: all[0].Masked()}
	}
	s := l.set(name, nftables.TypeIPAddr)
	s.Interval, s.elements = true, intervals(all)
	return &prefixes{set: s}
}

// has ends the rule where the address that load puts into the first word is in none,
// hasNot where it is in one, and hasAt where the one at word w is in none.
func (p *prefixes) has(load piece) piece { return join(load, p.test(0, true)) }

func (p *prefixes) hasNot(load piece) piece {
	if p == nil {
		return nil
	}
	return join(load, p.test(0, false))
}
func (p *prefixes) hasAt(w uint32) piece { return p.test(w, true) }

func (p *prefixes) test(w uint32, in bool) piece {
	op := expr.CmpOpNeq
	if in {
		op = expr.CmpOpEq
	}
	if p.set != nil {
		return piece{&expr.Lookup{SourceRegister: word32(w), SetName: p.set.Name, Invert: !in}}
	}
	// What ends with a byte needs no mask.
	if n := p.one.Bits(); n > 0 && n%8 == 0 {
		return piece{&expr.Cmp{Op: op, Register: word32(w), Data: p.one.Addr().AsSlice()[:n/8]}}
	}
	return piece{
		&expr.Bitwise{
			SourceRegister: word32(w), DestRegister: word32(maskedWord), Len: 4,
			Mask: net.CIDRMask(p.one.Bits(), 32), Xor: make([]byte, 4),
		},
		&expr.Cmp{Op: op, Register: word32(maskedWord), Data: p.one.Addr().AsSlice()},
	}
}

func be32(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }

func portElements(ports []uint16) (es []nftables.SetElement) {
	for _, p := range slices.Compact(slices.Sorted(slices.Values(ports))) {
		es = append(es, nftables.SetElement{Key: be16(p)})
	}
	return es
}

func sameElement(a nftables.SetElement) func(nftables.SetElement) bool {
	return func(b nftables.SetElement) bool { return bytes.Equal(a.Key, b.Key) && a.IntervalEnd == b.IntervalEnd }
}
