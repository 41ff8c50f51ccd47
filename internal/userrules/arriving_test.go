package userrules_test

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// twoLinks are two outside links, wan0 and wan1, each with an address whose packets come by it
// alone.
func twoLinks() (links []userrules.Link, addrs []netip.Addr) {
	addrs = []netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.18.7.2")}
	return []userrules.Link{
		{Index: 11, Name: "wan0", Addrs: addrs[:1]}, {Index: 12, Name: "wan1", Addrs: addrs[1:]},
	}, addrs
}

// reach says what the forwards do with port 5060 of the address of the first link, of that of the
// second, and of one that packets by both links may have.
func reach(rs *userrules.Ruleset) string {
	links, addrs := twoLinks()
	all := rs.Forwards(links)
	var said []string
	for _, a := range append(addrs, netip.MustParseAddr("192.88.99.7")) {
		what := "leaves"
		for _, f := range all {
			switch ext := netip.AddrPortFrom(a, 5060); {
			case !f.Covers(cone.EndpointFrom(ext)):
			case !f.Partial && !f.Unknown:
				what = "takes"
			case what == "leaves" && f.Astray:
				what = "gets strays"
			case what != "takes" && !f.Astray:
				what = "may take"
			}
		}
		said = append(said, what)
	}
	return strings.Join(said, ", ")
}

// Fails when a forward for one of two links is not told from one of the other, when it is certain for
// an address of both, and when its link, or an address that it names, is not understood.
func TestForwardsForSomeLinksLeaveTheAddressesOfOthers(t *testing.T) {
	const to, first, second, both = " udp dport 5060 dnat to 10.47.11.109; ", "takes, gets strays, may take", "gets strays, takes, may take", "takes, takes, takes"
	for name, tc := range map[string]struct{ nft, want string }{
		"any link":                    {"@@" + to + "}", both},
		"one link":                    {`@@ iifname "wan0"` + to + "}", first},
		"the other link":              {`@@ iifname "wan1"` + to + "}", second},
		"a set of one":                {`@@ iifname { "wan1", "ppp7" }` + to + "}", second},
		"a named set":                 {`set up { type ifname; elements = { "wan0" }; }; @@ iifname @up` + to + "}", first},
		"a set of both":               {`@@ iifname { "wan0", "wan1" }` + to + "}", both},
		"names that begin alike":      {`@@ iifname "wan*"` + to + "}", both},
		"not one link":                {`@@ iifname != "wan1"` + to + "}", first},
		"not some links":              {`@@ iifname != { "lan0", "wan0" }` + to + "}", second},
		"no outside link":             {`@@ iifname "lan0"` + to + "}", "leaves, leaves, leaves"},
		"an index":                    {"@@ iif 12" + to + "}", second},
		"a jump":                      {`chain led {` + to + `}; @@ iifname "wan1" jump led; }`, second},
		"a map of links":              {`chain led {` + to + `}; @@ iifname vmap { "wan0" : jump led, "lan0" : accept }; }`, first},
		"link and port":               {`@@ iifname . udp dport { "wan1" . 5060 } dnat to 10.47.11.109; }`, second},
		"link and address":            {`@@ iifname "wan0" ip daddr 198.51.100.1` + to + "}", "takes, leaves, leaves"},
		"another's address":           {`@@ iifname "wan0" ip daddr 198.18.7.2` + to + "}", "leaves, may take, leaves"},
		"a set of addresses":          {`@@ iifname "wan0" ip daddr { 198.51.100.1, 198.18.7.2 }` + to + "}", "takes, may take, leaves"},
		"another's network":           {`@@ iifname != "wan1" ip daddr 198.18.7.0/24` + to + "}", "leaves, may take, leaves"},
		"other links and addrs":       {`@@ iifname . ip daddr { "wan1" . 198.51.100.1 } udp dport 5060 dnat to 10.47.11.109; }`, "may take, leaves, leaves"},
		"not an address":              {`@@ iifname "wan0" ip daddr != 192.0.2.1` + to + "}", "may take, gets strays, may take"},
		"an address alone":            {`@@ ip daddr 198.18.7.2` + to + "}", "leaves, takes, leaves"},
		"each link has its own":       {`@@ iifname "wan0"` + to + `iifname "wan1"` + to + "}", "takes, takes, may take"},
		"behind a return":             {`@@ iifname "wan0" return; ` + to + "}", second},
		"behind an accept":            {`@@ iifname { "wan0", "lan0" } counter accept; ` + to + "}", second},
		"behind a return of both":     {`@@ iifname "wan0" return; iifname "wan1" accept; ` + to + "}", "leaves, leaves, leaves"},
		"behind a map":                {`@@ iifname vmap { "wan1" : return, "lan0" : accept }; ` + to + "}", first},
		"behind a goto":               {`chain none { }; @@ iifname "wan0" goto none; ` + to + "}", second},
		"behind a jump":               {`chain none { iifname "wan0" return; }; @@ jump none; ` + to + "}", both},
		"behind an accept in a chain": {`chain some { iifname "wan0" accept; }; @@ jump some; ` + to + "}", second},
		"behind one in another chain": {`@@ iifname "wan0" accept; }; chain later { type nat hook prerouting priority 0;` + to + "}", both},
		"behind a port's return":      {`@@ udp dport 5060 return; dnat to 10.47.11.109; }`, "leaves, leaves, leaves"},
		"behind another port's":       {`@@ udp dport 5061 return; dnat to 10.47.11.109; }`, both},
		"behind an address's":         {`@@ ip daddr 198.51.100.1 return; ` + to + "}", "leaves, takes, takes"},
		"behind a link's port":        {`@@ iifname "wan0" udp dport 5060 return; ` + to + "}", second},
		"behind a link's other":       {`@@ iifname "wan0" udp dport 5061 return; ` + to + "}", both},
		"behind a link's tcp":         {`@@ iifname "wan0" meta l4proto tcp return; ` + to + "}", both},
		"behind a doubtful one":       {`@@ iifname "wan0" meta mark 7 return; ` + to + "}", "may take, takes, may take"},
		"behind a limit":              {`@@ iifname "wan0" limit rate 1/second return; ` + to + "}", "may take, takes, may take"},
		"behind a link to leave by":   {`@@ oifname "wan0" return; ` + to + "}", "may take, may take, may take"},
		"behind elements that end":    {`set s { type inet_service; flags timeout; timeout 1h; elements = { 5060 }; }; @@ udp dport @s return; ` + to + "}", "may take, may take, may take"},
		"behind elements of a map":    {`map m { type inet_service : verdict; flags timeout; elements = { 5060 timeout 1h : accept }; }; @@ udp dport vmap @m; ` + to + "}", "may take, may take, may take"},
		"a port not understood":       {`@@ iifname "wan1" udp dport & 1 == 0 dnat to 10.47.11.109; }`, "gets strays, may take, may take"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: inPrerouting(tc.nft)})
			if got := reach(ruleset(t, l)); got != tc.want {
				t.Errorf("%s\n%s", got, output(t, l, "nft", "-n", "list", "ruleset"))
			}
		})
	}
	for name, tc := range map[string]struct{ before, condition, want string }{
		"one link":                         {"", "-i wan0", first},
		"the other link":                   {"", "-i wan1", second},
		"names that begin alike":           {"", "-i wan+", both},
		"not one link":                     {"", "! -i wan0", second},
		"another's address":                {"", "-i wan0 -d 198.18.7.2", "leaves, may take, leaves"},
		"another link":                     {"", "-i ppp+", "leaves, leaves, leaves"},
		"behind a return":                  {"-A PREROUTING -i wan0 -j RETURN\n", "", second},
		"behind an accept":                 {"-A PREROUTING ! -i wan0 -j ACCEPT\n", "", first},
		"behind a port's accept":           {"-A PREROUTING -i wan0 -p udp --dport 5060 -j ACCEPT\n", "", second},
		"behind a doubtful one":            {"-A PREROUTING -i wan0 -m mark --mark 7 -j ACCEPT\n", "", "may take, takes, may take"},
		"behind a return of another chain": {":some - [0:0]\n-A PREROUTING -j some\n-A some -i wan0 -j RETURN\n", "", both},
	} {
		withIPTables(t, name, "*nat\n"+tc.before+"-A PREROUTING "+tc.condition+" -p udp --dport 5060 -j DNAT --to-destination 10.47.11.109\nCOMMIT\n",
			func(t *testing.T, l *lab.Lab) {
				if got := reach(ruleset(t, l)); got != tc.want {
					t.Error(got)
				}
			})
	}
}

// Fails when links with very many addresses make each forward as long as these.
func TestForwardsForSomeLinksOfVeryManyAddresses(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inPrerouting(`@@ iifname "wan0" udp dport 5060 dnat to 10.47.11.109; }`)})
	links, addrs := twoLinks()
	for a := addrs[1]; len(links[1].Addrs) <= 64; a = a.Next().Next() {
		links[1].Addrs = append(links[1].Addrs, a)
	}
	all := ruleset(t, l).Forwards(links)
	if len(all) != 1 || len(all[0].Addrs) != 1 || !all[0].Partial || all[0].Astray {
		t.Errorf("%+v", all)
	}
}
