package engine

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when a permission is in no part of an owned map, and so never compared.
func TestEachPartOfAnOwnedMapIsCompared(t *testing.T) {
	const n = 1000
	parts := make([]int, partsOf(ListedAtMost+askedAtMost+1))
	for port := range uint16(n) {
		var v cone.View
		v.By = cone.ByMap
		v.Ext = cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), 1+port))
		for part := range parts {
			s := scope{asked: func(k cone.Key) bool { return partOfKey(k, uint64(len(parts))) == uint64(part) }}
			if s.lacking(&v, nil, nil) != 0 {
				parts[part]++
			}
		}
	}
	sum := 0
	for _, have := range parts {
		if sum += have; have == 0 || have > n/2 {
			t.Errorf("parts of %v permissions, want about the same of each", parts)
		}
	}
	if sum != n {
		t.Errorf("%d of %d permissions are compared", sum, n)
	}
}
