package cone

import (
	"net/netip"
	"testing"
)

// Fails when one of two ranges is asked alone, and when addresses of different families are compared.
func TestRangesOverlapWhereTheyShareAnAddress(t *testing.T) {
	addrs := func(first, last string) AddrRange {
		return AddrRange{netip.MustParseAddr(first), netip.MustParseAddr(last)}
	}
	middle := addrs("10.0.0.8", "10.0.0.15")
	for name, tc := range map[string]struct {
		other AddrRange
		want  bool
	}{
		"before":         {addrs("10.0.0.1", "10.0.0.7"), false},
		"its first":      {addrs("10.0.0.1", "10.0.0.8"), true},
		"within":         {addrs("10.0.0.9", "10.0.0.10"), true},
		"around":         {addrs("10.0.0.0", "10.0.0.255"), true},
		"its last":       {addrs("10.0.0.15", "10.0.0.20"), true},
		"behind":         {addrs("10.0.0.16", "10.0.0.20"), false},
		"another family": {addrs("::", "ffff::"), false},
	} {
		if got, turned := middle.Overlaps(tc.other), tc.other.Overlaps(middle); got != tc.want || turned != tc.want {
			t.Errorf("%s: %v, and the other way round %v, want %v", name, got, turned, tc.want)
		}
	}
}

// Fails when a range that the configuration or the kernel may have is read wrongly, and when
// something else is taken for one.
func TestPortRangeIsReadAsItIsWritten(t *testing.T) {
	for text, want := range map[string]PortRange{"5060": {5060, 5060}, "10000-20000": {10000, 20000}, "0-65535": {0, 65535}} {
		if got, ok := ParsePortRange(text); !ok || got != want || got.Text() != text {
			t.Errorf("%s: %v, %v", text, got, ok)
		}
	}
	for _, text := range []string{"", "-", "5-", "-5", "5-4", "65536", "1-2-3", " 5", "a"} {
		if got, ok := ParsePortRange(text); ok {
			t.Errorf("%q is taken for %v", text, got)
		}
	}
}
