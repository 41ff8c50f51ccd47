package mapping

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules/elements"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A flow may be older than the rules of mapping. Fails when one look makes a mapping of it that
// the next look ends.
func TestMappingsOfOlderFlowsStay(t *testing.T) {
	addr := netip.MustParseAddr
	to := func(a string, links ...string) userrules.SourceNAT {
		return userrules.SourceNAT{Chain: "c", Addrs: cone.AddrRanges{{First: addr(a), Last: addr(a)}}, Links: links}
	}
	for name, tc := range map[string]struct {
		rules []userrules.SourceNAT
		want  int // mappings
	}{
		"the rule of the address's link":           {[]userrules.SourceNAT{to("198.51.100.9", "wan1")}, 1},
		"a rule of another link":                   {[]userrules.SourceNAT{to("198.51.100.9", "wan0"), to("198.51.100.8", "wan1")}, 0},
		"no rule of any link":                      {[]userrules.SourceNAT{to("198.51.100.8")}, 0},
		"a rule of another link, none of its own":  {[]userrules.SourceNAT{to("198.51.100.9", "wan0")}, 1},
		"a rule of a link with another name alone": {[]userrules.SourceNAT{to("198.51.100.9", "uplink")}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			out := cone.AddrFrom(addr("198.51.100.9"))
			m := newMapper(View{
				Links: map[cone.Addr]string{out: "wan1"}, Owned: func(a cone.Addr) bool { return a == out },
				Inside: func(cone.Addr) bool { return true }, Outdated: func(elements.Mapping) bool { return false },
				Routes: flows.NewRouter(gateway.Network{}, nil), // which knows no link
				Given:  NewGiven(tc.rules, nil, []string{"wan0", "wan1"}, []netip.Prefix{netip.MustParsePrefix("10.47.11.0/24")}, func(cone.Addr) bool { return false }),
			})
			host := cone.EndpointFrom(netip.MustParseAddrPort("10.47.11.109:3074"))
			peer := cone.EndpointFrom(netip.MustParseAddrPort("203.0.113.7:5060"))
			m.See(&cone.Flow{Src: host, Dst: peer, ReplySrc: peer, ReplyDst: cone.Endpoint{Addr: out, Port: 3074}, Status: cone.StatusSrcNAT})
			if len(m.older) != tc.want {
				t.Errorf("%d mappings, want %d", len(m.older), tc.want)
			}
			for x := range m.older {
				if m.stray(x) {
					t.Errorf("the mapping on %s ends at the next look", x.Link)
				}
			}
			if former := len(m.formers) > 0; former != !m.Given.mayBy(host.Addr, out) {
				t.Errorf("noted as former: %v", former)
			}
			if m.Given.may("wan1", host.Addr, out) && !m.Given.toSomebody("wan1", out) {
				t.Error("one host may get the address, and no host may")
			}
		})
	}
}
