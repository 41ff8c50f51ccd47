package gateway

import (
	"fmt"
	"net/netip"
	"testing"
)

// Fails when an address counts as one of a single link although packets for it may come by another.
func TestAddrsOfALink(t *testing.T) {
	const wan0, wan1, lan0, lo = 2, 3, 4, 1
	at := func(link int, prefix string) Addr { return Addr{Prefix: netip.MustParsePrefix(prefix), Link: link} }
	for name, tc := range map[string]struct {
		addrs []Addr
		kind  string // of wan1
		lower int
		want  string // the addresses of wan0, then those of wan1
	}{
		"two providers":             {[]Addr{at(wan0, "198.51.100.1/24"), at(wan1, "198.18.7.2/24")}, "", 0, "[198.51.100.1] [198.18.7.2]"},
		"several addresses":         {[]Addr{at(wan0, "198.51.100.1/24"), at(wan0, "198.51.100.2/24"), at(wan1, "2001:db8:7::2/64")}, "", 0, "[198.51.100.1 198.51.100.2] [2001:db8:7::2]"},
		"link-local ones":           {[]Addr{at(wan0, "fe80::1/64"), at(wan0, "198.51.100.1/24"), at(wan1, "fe80::1/64"), at(wan1, "198.18.7.2/24")}, "", 0, "[198.51.100.1] [198.18.7.2]"},
		"one network":               {[]Addr{at(wan0, "198.51.100.1/24"), at(wan1, "198.51.100.2/24")}, "", 0, "[] []"},
		"one within the other's":    {[]Addr{at(wan0, "198.51.100.1/24"), at(wan1, "198.51.100.2/32")}, "", 0, "[] []"},
		"one address on both":       {[]Addr{at(wan0, "198.51.100.1/32"), at(wan1, "198.51.100.1/32")}, "", 0, "[] []"},
		"one more of each":          {[]Addr{at(wan0, "198.51.100.1/32"), at(wan0, "192.0.2.1/24"), at(wan1, "198.51.100.1/32")}, "", 0, "[192.0.2.1] []"},
		"borrowed from a loopback":  {[]Addr{at(lo, "198.51.100.1/32"), at(wan0, "10.9.9.1/30"), at(wan1, "10.9.9.5/30")}, "", 0, "[10.9.9.1] [10.9.9.5]"},
		"the loopback has one, too": {[]Addr{at(lo, "198.51.100.1/32"), at(wan0, "198.51.100.1/24"), at(wan1, "198.18.7.2/24")}, "", 0, "[] [198.18.7.2]"},
		"inside has that network":   {[]Addr{at(lan0, "198.51.100.129/25"), at(wan0, "198.51.100.1/32"), at(wan1, "198.18.7.2/24")}, "", 0, "[198.51.100.1] [198.18.7.2]"},
		"a macvlan":                 {[]Addr{at(wan0, "198.51.100.1/24"), at(wan1, "198.18.7.2/24")}, "macvlan", wan0, "[] []"},
		"a VLAN":                    {[]Addr{at(wan0, "198.51.100.1/24"), at(wan1, "198.18.7.2/24")}, "vlan", wan0, "[198.51.100.1] [198.18.7.2]"},
	} {
		t.Run(name, func(t *testing.T) {
			n := Network{Addrs: tc.addrs, Links: []Link{
				{Index: lo, Name: "lo"},
				{Index: wan0, Name: "wan0", Outside: bothFamilies},
				{Index: wan1, Name: "wan1", Outside: bothFamilies, Kind: tc.kind, Lower: tc.lower},
				{Index: lan0, Name: "lan0", Inside: true},
			}}
			if got := fmt.Sprint(n.AddrsOf(n.Links[1]), n.AddrsOf(n.Links[2])); got != tc.want {
				t.Error(got)
			}
		})
	}
}
