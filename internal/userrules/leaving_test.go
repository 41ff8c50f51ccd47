package userrules_test

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Fails when a rule that does not match counts, when one that may match is left out or counts as
// sure, or when earlier rules are ignored.
func TestSourceOfAPacket(t *testing.T) {
	const masquerade, asIs, unsure, perhaps = "masquerade", "as it is", "unsure", "masquerade or as it is"
	chain := func(priority, rules string) string {
		return "chain c" + fmt.Sprint(len(rules)) + " { type nat hook postrouting priority " + priority + "; " + rules + "; }; "
	}
	nat := func(chains string) string { return "table ip nat { " + chains + " }" }
	for name, tt := range map[string]struct{ nft, want string }{
		"no rule":                     {lab.NoRules, asIs},
		"masquerade":                  {lab.Masquerade, masquerade},
		"another link":                {nat(chain("srcnat", `oifname "wan1" masquerade`)), asIs},
		"a fixed address":             {nat(chain("srcnat", `ip saddr 10.47.11.0/24 oifname "wan0" snat to 198.51.100.1`)), "198.51.100.1"},
		"another host":                {nat(chain("srcnat", `ip saddr 10.47.11.110 masquerade`)), asIs},
		"its port":                    {nat(chain("srcnat", `udp sport 5060 counter masquerade`)), masquerade},
		"the peer's port":             {nat(chain("srcnat", `udp dport 5061 masquerade`)), asIs},
		"exempt":                      {nat(chain("srcnat", `ip daddr 203.0.113.0/24 accept; masquerade`)), asIs},
		"others exempt":               {nat(chain("srcnat", `ip daddr 192.0.2.0/24 accept; masquerade`)), masquerade},
		"perhaps exempt":              {nat(chain("srcnat", `meta mark 7 accept; masquerade`)), perhaps},
		"perhaps translated":          {nat(chain("srcnat", `ct mark 7 masquerade`)), perhaps},
		"from one link":               {nat(chain("srcnat", `iifname "lan0" oifname "wan0" masquerade`)), perhaps},
		"perhaps another address":     {nat(chain("srcnat", `meta mark 7 snat to 198.51.100.9; masquerade`)), "198.51.100.9 or masquerade"},
		"perhaps in an earlier chain": {nat(chain("90", `meta mark 7 snat to 198.51.100.9`) + chain("srcnat", `masquerade`)), "198.51.100.9 or masquerade"},
		"IPsec is exempt":             {nat(chain("srcnat", `rt ipsec exists accept; masquerade`)), perhaps},
		"dropped":                     {nat(chain("srcnat", `udp dport 5060 drop; masquerade`)), unsure},
		"by a map":                    {nat(chain("srcnat", `snat to ip saddr map { 10.47.11.109 : 198.51.100.1, 10.47.11.110 : 198.51.100.9 }`)), "198.51.100.1"},
		"by a map of links":           {nat(chain("srcnat", `snat to oifname map { "wan0" : 198.51.100.1, "wan1" : 198.51.100.9 }`)), "198.51.100.1"},
		"by a map for others":         {nat(chain("srcnat", `snat to ip saddr map { 10.47.11.110 : 198.51.100.9 }`)), asIs},
		"by a map of ports":           {nat(chain("srcnat", `meta l4proto udp snat ip to ip saddr map { 10.47.11.109 : 198.51.100.1 . 7000-7015 }`)), "198.51.100.1"},
		"by a map of prefixes":        {nat(chain("srcnat", `snat ip prefix to ip saddr map { 10.47.11.108/30 : 198.51.100.8/30 }`)), "198.51.100.8-198.51.100.11"},
		"by a map of marks":           {nat(chain("srcnat", `snat to meta mark map { 7 : 198.51.100.9 }`)), "198.51.100.9 or as it is"},
		"by a named map":              {nat("map m { type ipv4_addr : ipv4_addr; elements = { 10.47.11.109 : 198.51.100.1, 10.47.11.110 : 198.51.100.9 }; }; " + chain("srcnat", `snat to ip saddr map @m`)), "198.51.100.1"},
		"by a map of the time":        {nat("map m { type ipv4_addr : ipv4_addr; flags timeout; elements = { 10.47.11.109 : 198.51.100.1 }; }; " + chain("srcnat", `snat to ip saddr map @m`)), unsure},
		"an earlier chain":            {nat(chain("90", `snat to 198.51.100.9`) + chain("srcnat", `masquerade`)), "198.51.100.9"},
		"exempt in one chain":         {nat(chain("90", `accept`) + chain("srcnat", `masquerade`)), masquerade},
		"two chains, one hook":        {nat(chain("srcnat", `snat to 198.51.100.9`) + chain("srcnat", `masquerade`)), "198.51.100.9 or masquerade"},
		"a jump":                      {nat("chain x { oifname wan0 masquerade; }; " + chain("srcnat", `ip saddr 10.0.0.0/8 jump x`)), masquerade},
		"a named set":                 {nat("set lan { type ipv4_addr; flags interval; elements = { 10.47.11.0/24 }; }; " + chain("srcnat", `ip saddr @lan masquerade`)), perhaps}, // it is not read
		"dormant":                     {"table ip nat { flags dormant; " + chain("srcnat", "masquerade") + " }", asIs},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(tt.nft))
			sourceOf(t, l, tt.want)
		})
	}
	for name, tt := range map[string]struct{ nft, want string }{
		"only IPv4":       {lab.Masquerade, asIs},
		"masquerade":      {"table ip6 nat { " + chain("srcnat", `oifname "wan*" masquerade`) + " }", masquerade},
		"of both":         {"table inet nat { " + chain("srcnat", `masquerade`) + " }", masquerade},
		"a fixed address": {"table ip6 nat { " + chain("srcnat", `ip6 saddr 2001:db8:47::/64 snat to 2001:db8:1::9`) + " }", "2001:db8:1::9"},
		"a prefix":        {"table ip6 nat { " + chain("srcnat", `ip6 saddr 2001:db8:47::/64 snat prefix to ip6 saddr map { 2001:db8:47::/64 : 2001:db8:1::/64 }`) + " }", "2001:db8:1::-2001:db8:1:0:ffff:ffff:ffff:ffff"},
		"the peer's port": {"table ip6 nat { " + chain("srcnat", `udp dport 5061 masquerade`) + " }", asIs},
		"by a map":        {"table ip6 nat { " + chain("srcnat", `snat to ip6 saddr map { 2001:db8:47::109 : 2001:db8:1::9 }`) + " }", "2001:db8:1::9"},
		"exempt":          {"table ip6 nat { " + chain("srcnat", `ip6 daddr 2001:db8:5::/48 accept; masquerade`) + " }", asIs},
	} {
		t.Run("IPv6, "+name, func(t *testing.T) {
			t.Parallel()
			l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
			check(t, l.NFT(tt.nft))
			sourceFrom(t, l, "[2001:db8:47::109]:5060", "[2001:db8:5::5]:5060", tt.want)
		})
	}
	for name, tt := range map[string]struct{ rules, want string }{
		"masquerade":      {"-o wan0 -j MASQUERADE", masquerade},
		"a fixed address": {"-s 10.47.11.0/24 -j SNAT --to-source 198.51.100.1", "198.51.100.1"},
		"NETMAP":          {"-s 10.47.11.0/24 -j NETMAP --to 198.51.100.8/30", "198.51.100.8-198.51.100.11"},
		"exempt":          {"-d 203.0.113.5 -j ACCEPT\n-A POSTROUTING -j MASQUERADE", asIs},
		"perhaps exempt":  {"-m policy --dir out --pol ipsec -j ACCEPT\n-A POSTROUTING -j MASQUERADE", perhaps},
	} {
		withIPTables(t, name, "*nat\n-A POSTROUTING "+tt.rules+"\nCOMMIT\n", func(t *testing.T, l *lab.Lab) { sourceOf(t, l, tt.want) })
	}
}

// Fails when a change of source NAT goes unnoticed, and when a change elsewhere counts.
func TestSameSources(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	reader := userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})
	defer reader.Close()
	read := func() *userrules.Ruleset {
		rs, err := reader.Read()
		check(t, err)
		return rs
	}
	for _, step := range []struct {
		change string
		same   bool
	}{
		{"table inet filter { chain f { type filter hook forward priority 0; }; }", true},
		{"insert rule ip nat postrouting ip saddr 10.47.11.110 accept", false},
		{"add rule inet filter f udp dport 9 drop", true},
	} {
		before := read()
		check(t, l.NFT(step.change))
		if after := read(); after == before || after.SameSources(before) != step.same {
			t.Errorf("after %q: the same rules: %v, the same sources: %v, want %v", step.change, after == before, after.SameSources(before), step.same)
		}
	}
	if read().SameSources(nil) {
		t.Error("no rules are the same")
	}
}

func sourceOf(t *testing.T, l *lab.Lab, want string) {
	t.Helper()
	sourceFrom(t, l, "10.47.11.109:5060", "203.0.113.5:5060", want)
}

func sourceFrom(t *testing.T, l *lab.Lab, src, dst, want string) {
	t.Helper()
	n, known := ruleset(t, l).SourcesOf(userrules.Leaving{
		Src: netip.MustParseAddrPort(src), Dst: netip.MustParseAddrPort(dst),
		Out: userrules.Link{Index: 7, Name: "wan0"},
	})
	var all []string
	for _, r := range n.Addrs {
		if all = append(all, r.First.String()); r.First != r.Last {
			all[len(all)-1] += "-" + r.Last.String()
		}
	}
	if n.Masquerade {
		all = append(all, "masquerade")
	}
	if n.Kept {
		all = append(all, "as it is")
	}
	got := strings.Join(all, " or ")
	if !known {
		got = "unsure"
	}
	if got != want {
		t.Errorf("got %s (%+v), want %s", got, n, want)
	}
}
