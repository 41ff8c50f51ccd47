package userrules

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
)

// Fails when a port that some rule may give is denied, because then its flows end. The rule
// may be for others of the host's packets, in another chain, or with unknown ports.
func TestPortsThatRulesMayGive(t *testing.T) {
	host, other := netip.MustParseAddr("10.47.11.109"), netip.MustParseAddr("10.47.11.110")
	only := func(a netip.Addr) cone.AddrRanges { return cone.AddrRanges{{First: a, Last: a}} }
	low, high := cone.PortRanges{{First: 1024, Last: 2023}}, cone.PortRanges{{First: 2024, Last: 3023}}
	plain := SourceNAT{Chain: "c"}
	block := SourceNAT{Chain: "c", ChoosesPort: true, Ports: low}
	change := func(n SourceNAT, f func(*SourceNAT)) SourceNAT { f(&n); return n }
	partial := change(block, func(n *SourceNAT) { n.Partial, n.asks = true, true })
	some := change(block, func(n *SourceNAT) { n.Partial = true })
	unknown := change(block, func(n *SourceNAT) { n.Ports = nil })
	for name, tt := range map[string]struct {
		rules     []SourceNAT
		port      uint16
		may, sure bool
	}{
		"no rule":                        {nil, 3074, true, true},
		"any port":                       {[]SourceNAT{plain}, 3074, true, true},
		"at random":                      {[]SourceNAT{change(plain, func(n *SourceNAT) { n.Random = true })}, 3074, true, true},
		"the first of a block":           {[]SourceNAT{block}, 1024, true, true},
		"the last":                       {[]SourceNAT{block}, 2023, true, true},
		"beyond it":                      {[]SourceNAT{block}, 2024, false, true},
		"unknown ports":                  {[]SourceNAT{unknown}, 3074, true, false},
		"behind it, any":                 {[]SourceNAT{block, plain}, 3074, false, true},
		"before it, any":                 {[]SourceNAT{plain, block}, 3074, true, true},
		"behind one for some":            {[]SourceNAT{partial, plain}, 3074, true, true},
		"a block behind one for some":    {[]SourceNAT{partial, change(block, func(n *SourceNAT) { n.Ports = high })}, 2500, true, true},
		"neither":                        {[]SourceNAT{partial, change(block, func(n *SourceNAT) { n.Ports = high })}, 3074, false, true},
		"in another chain, any":          {[]SourceNAT{block, change(plain, func(n *SourceNAT) { n.Chain = "d" })}, 3074, true, true},
		"behind one for perhaps all":     {[]SourceNAT{some, plain}, 3074, true, false},
		"of one for perhaps all":         {[]SourceNAT{some, plain}, 1024, true, true},
		"by another link":                {[]SourceNAT{change(plain, func(n *SourceNAT) { n.Links = []string{"ppp*"} }), block}, 3074, false, true},
		"a block for another host":       {[]SourceNAT{change(block, func(n *SourceNAT) { n.Sources = only(other) }), plain}, 3074, true, true},
		"a block for it, any for others": {[]SourceNAT{change(block, func(n *SourceNAT) { n.Sources = only(host) }), plain}, 3074, false, true},
	} {
		t.Run(name, func(t *testing.T) {
			if may, sure := MayGive(tt.rules, "wan0", host, tt.port); may != tt.may || sure != tt.sure {
				t.Errorf("may %v, sure %v", may, sure)
			}
		})
	}
}

// Fails when an address counts as given to no host although one of the hosts may get it: by a
// rule of the link, or because the link may have another name in the rules for that host.
func TestAddrsThatRulesMayGiveSomebody(t *testing.T) {
	net := netip.MustParsePrefix
	inside := func(p string) cone.AddrRanges { return cone.AddrRanges{cone.RangeOf(net(p))} }
	to := func(last byte, sources cone.AddrRanges, links ...string) SourceNAT {
		a := netip.AddrFrom4([4]byte{198, 51, 100, last})
		return SourceNAT{Chain: "c", Addrs: cone.AddrRanges{{First: a, Last: a}}, Sources: sources, Links: links}
	}
	half := inside("10.47.11.0/25")
	for name, tt := range map[string]struct {
		rules []SourceNAT
		want  bool // .9
	}{
		"no rule":                           {nil, false},
		"to all":                            {[]SourceNAT{to(9, nil)}, true},
		"another to all":                    {[]SourceNAT{to(8, nil)}, false},
		"behind another to all":             {[]SourceNAT{to(8, nil), to(9, nil)}, false},
		"behind another to some":            {[]SourceNAT{to(8, half), to(9, nil)}, true},
		"to some":                           {[]SourceNAT{to(9, half)}, true},
		"to hosts elsewhere":                {[]SourceNAT{to(9, inside("192.0.2.0/24"))}, false},
		"by another name":                   {[]SourceNAT{to(8, nil, "uplink")}, true},
		"to all here, others by another":    {[]SourceNAT{to(8, nil, "wan0"), to(7, nil, "uplink")}, false},
		"to some here, others by another":   {[]SourceNAT{to(8, half, "wan0"), to(7, nil, "uplink")}, true},
		"to some here, the same by another": {[]SourceNAT{to(8, half, "wan0"), to(7, half, "uplink")}, false},
		"to strangers by another name":      {[]SourceNAT{to(8, nil, "wan0"), to(7, inside("192.0.2.0/24"), "uplink")}, false},
	} {
		t.Run(name, func(t *testing.T) {
			all := []netip.Prefix{net("10.47.11.0/24")}
			if got := MayGiveAddr(tt.rules, "wan0", all, netip.MustParseAddr("198.51.100.9"), netip.Addr{}); got != tt.want {
				t.Errorf("%v", got)
			}
			each := false
			for _, host := range []string{"10.47.11.1/32", "10.47.11.200/32"} {
				each = each || MayGiveAddr(tt.rules, "wan0", []netip.Prefix{net(host)}, netip.MustParseAddr("198.51.100.9"), netip.Addr{})
			}
			if each != tt.want {
				t.Errorf("by single hosts %v", each)
			}
		})
	}
}
