package daemon

import (
	"errors"
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Forwards are compared with source NAT when rules or addresses changed, not at each look.
//
// Fails when a look at unchanged rules compares them again, or one after a change does not.
func TestForwardsAreComparedWithSourceNATOnce(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: "table ip fw { chain pre { type nat hook prerouting priority dstnat; ip daddr 198.51.100.2 dnat to 10.47.11.109; }; " +
		`chain post { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }; }`})
	f := &firewall{reader: userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})}
	defer func() {
		if err := f.close(); err != nil {
			t.Error(err)
		}
	}()
	network := gateway.Network{Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4}}}
	warned := func(own string) int {
		f.ownAddrs = map[string]netip.Addr{"wan0": netip.MustParseAddr(own)}
		f.look()
		_, out := f.forwards([]netip.Prefix{lab.InsideNet}, network)
		return len(out)
	}
	public := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.2:50000"))
	if n := warned("198.51.100.1"); n != 0 || f.shared.Covers(public) {
		t.Fatalf("%d warnings of 1:1 NAT, and its address is others', too: %v", n, f.shared.Covers(public))
	}
	f.telling.all = f.told // what nobody would find again
	if n := warned("198.51.100.1"); n != 1 {
		t.Error("a look at unchanged rules compared all forwards with source NAT")
	}
	if n := warned("198.51.100.2"); n != 1 {
		t.Errorf("%d warnings when the link has the forwarded address", n)
	}
	if n := warned("198.51.100.1"); n != 0 {
		t.Errorf("%d warnings when it has another one again", n)
	}
	if err := l.NFT(`add rule ip fw post ip saddr 10.47.11.110 snat to 198.51.100.2`); err != nil {
		t.Fatal(err)
	}
	if n := warned("198.51.100.1"); n != 1 {
		t.Errorf("%d warnings when another host has the address", n)
	}
	if !f.shared.Covers(public) {
		t.Error("the forward keeps nobody's peers away though another host has the address")
	}
}

// While rules cannot be read, those that were read before hold.
//
// Fails when an address that a link gets meanwhile changes nothing.
func TestSharedForwardsFollowAddressesWhileRulesAreUnread(t *testing.T) {
	public := netip.MustParseAddr("198.51.100.2")
	oneToOne := userrules.Forward{
		All: true, Most: true, To: netip.MustParseAddrPort("10.47.11.109:0"), Addrs: cone.AddrRanges{{First: public, Last: public}},
	}
	f := &firewall{user: &userrules.Ruleset{}, told: []userrules.Forward{oneToOne}}
	f.telling.understood = f.told
	f.shared = userrules.Cover(f.told)
	f.unread = errors.New("not permitted")
	f.worthTelling()
	if f.shared.Covers(cone.EndpointFrom(netip.AddrPortFrom(public, 50000))) {
		t.Error("the address of 1:1 NAT is others', too")
	}
}

// A forward concerns the user only where it may keep peers away from hosts that are served.
//
// Fails when a forward of the other family is warned of, or one to all hosts that are served, and when one
// to some of them is not.
func TestForwardIsWarnedOfWhereItMayKeepPeersFromServedHosts(t *testing.T) {
	const dmz = `iifname "wan0" dnat to `
	host := netip.MustParsePrefix("10.47.11.109/32")
	for name, tc := range map[string]struct {
		family, rule string
		subnet       netip.Prefix
		want         warningID
	}{
		"IPv6, only IPv4 is served":             {"ip6", dmz + "2001:db8:47::6d", lab.InsideNet, ""},
		"IPv6":                                  {"ip6", dmz + "2001:db8:47::6d", lab.InsideNet6, warnForwardsAll},
		"IPv4, only IPv6 is served":             {"ip", dmz + "10.47.11.109", lab.InsideNet6, ""},
		"to the host that is served":            {"ip", dmz + "10.47.11.109", host, ""},
		"to a port of that host":                {"ip", `iifname "wan0" udp dport 1-65535 dnat to 10.47.11.109:6000`, host, warnForwardsAll},
		"to a port, not understood":             {"ip", `iifname "wan0" udp dport & 1 != 1 dnat to 10.47.11.109:6000`, host, warnForwardUnknown},
		"to another host than is served":        {"ip", dmz + "10.47.11.110", host, warnForwardsAll},
		"to the prefix that is served":          {"ip6", "dnat ip6 prefix to ip6 daddr map { 2001:db8:9::/64 : 2001:db8:47::/64 }", lab.InsideNet6, ""},
		"to a prefix in the one that is served": {"ip6", "dnat ip6 prefix to ip6 daddr map { 2001:db8:9::/80 : 2001:db8:47::/80 }", lab.InsideNet6, warnForwardsAll},
		"not understood":                        {"ip6", "udp dport & 1 != 1 " + dmz + "2001:db8:47::6d", lab.InsideNet6, warnForwardUnknown},
		"not understood, only IPv4 is served":   {"ip6", "udp dport & 1 != 1 " + dmz + "2001:db8:47::6d", lab.InsideNet, ""},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + "table " + tc.family + " fw { chain pre { type nat hook prerouting priority dstnat; " + tc.rule + "; }; }"})
			f := &firewall{reader: userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})}
			defer func() {
				if err := f.close(); err != nil {
					t.Error(err)
				}
			}()
			f.look()
			_, out := f.forwards([]netip.Prefix{tc.subnet}, gateway.Network{Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4 | gateway.IPv6}}})
			var got warningID
			if len(out) > 0 {
				got = out[0].ID
			}
			if got != tc.want || len(out) > 1 {
				t.Errorf("warnings %q, want %q", out, tc.want)
			}
		})
	}
}

// Fails when a forward of some ports is said to be one of all.
func TestForwardOfMostPortsIsNamedSo(t *testing.T) {
	host := netip.MustParseAddrPort("10.47.11.109:0")
	some := cone.AddrRanges{{First: netip.MustParseAddr("203.0.113.0"), Last: netip.MustParseAddr("203.0.113.255")}}
	for text, r := range map[string]userrules.Forward{
		"a rule forwards all ports to 10.47.11.109, so that no peer gets to another inside host by a permission on its addresses: r": {All: true, Most: true, To: host, Text: "r"},
		"a rule forwards most ports to 10.47.11.109, so that no peer gets to another inside host by a permission on these: r":        {Most: true, To: host, Text: "r"},
		"a rule forwards most ports, so that no peer gets to an inside host by a permission on these: r":                             {Most: true, Text: "r"},
		"a rule forwards most ports of what it matches: no permission admits that to another host, and no expectation stands for a peer that may send it: r": {
			Most: true, To: host, Sources: some, Text: "r",
		},
	} {
		var got warnings
		if got.addForward(r, true); len(got) != 1 || got[0].Text != text {
			t.Errorf("got %q, want %q", got, text)
		}
	}
}
