//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"bytes"
	"encoding/binary"
	"math"
	"net/netip"
	"slices"

	"github.com/google/nftables"
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
