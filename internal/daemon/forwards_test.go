package daemon

import (
	"errors"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// Fails when hosts of others take the places of those of enabled subnets, and when subnets of one
// forwarded prefix are asked for together.
func TestHostsToAskForAreThoseOfEnabledSubnets(t *testing.T) {
	prefix := netip.MustParsePrefix
	var all []userrules.Forward
	for n := range 2 * mostReached {
		all = append(all, userrules.Forward{To: netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 42, 0, byte(n)}), 53)})
	}
	all = append(all, userrules.Forward{To: netip.MustParseAddrPort("10.47.14.1:53")}, userrules.Forward{ToPrefix: prefix("10.47.12.0/22")})
	subnets := []netip.Prefix{prefix("10.47.13.0/24"), prefix("10.47.14.0/24"), prefix("10.47.16.0/24")}
	want := []netip.Prefix{prefix("10.47.13.0/24"), prefix("10.47.14.0/24"), prefix("10.47.14.1/32")}
	if got := reachedIn(subnets, reachedBy(all)); !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// Fails when each look walks through the same rules again, and when one after a change does not.
func TestFirewallIsAskedOnceWhatItDropsOfForwards(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	check(l.Gateway.Do(func() error {
		host := []netip.Prefix{netip.PrefixFrom(l.Inside(0).Addr, 32)}
		ports := func(first, last uint16) cone.Shut {
			return cone.Shut{Peers: netip.MustParsePrefix("0.0.0.0/0"), Hosts: host[0], Ports: cone.PortRange{First: first, Last: last}}
		}
		closed := []cone.Shut{ports(0, 65535)}
		f := &firewall{reader: userrules.NewReader(userrules.Config{}), reached: host, helpers: []string{"RAS"}}
		defer func() { check(f.close()) }()
		network, err := gateway.ReadNetwork(0, gateway.Sides{Outside: []string{"wan0"}})
		check(err)
		cfg := config.Config{Subnets: []config.Subnet{{Prefix: lab.InsideNet}}}
		shut := func() []cone.Shut {
			f.look()
			return f.shutTo(cfg, network)
		}
		if got := shut(); !slices.Equal(got, closed) {
			t.Errorf("behind a firewall that drops all: %v", got)
		}
		f.shut = nil // what nobody would find again
		if got := shut(); len(got) > 0 {
			t.Error("a look at unchanged rules walked through the chains again")
		}
		check(l.NFT("add rule inet filter forward tcp dport 80 accept"))
		if got := shut(); !slices.Equal(got, closed) {
			t.Errorf("after a change for TCP: %v", got)
		}
		check(l.NFT("add rule inet filter forward udp dport 5060 accept"))
		if got, want := shut(), []cone.Shut{ports(0, 5059), ports(5061, 65535)}; !slices.Equal(got, want) {
			t.Errorf("once a port is open: %v", got)
		}
		return nil
	}))
}

// Fails when a look that cannot read the rules moves permissions.
func TestFirewallStaysShutWhileRulesCannotBeRead(t *testing.T) {
	host := netip.MustParsePrefix("10.47.11.109/32")
	shut := []cone.Shut{{Peers: netip.MustParsePrefix("0.0.0.0/0"), Hosts: host, Ports: cone.PortRange{Last: 65535}}}
	f := &firewall{reached: []netip.Prefix{host}, shut: shut, unread: errors.New("interrupted"), helpers: []string{"RAS"}}
	cfg := config.Config{Subnets: []config.Subnet{{Prefix: netip.MustParsePrefix("10.47.11.0/24")}}}
	network := gateway.Network{Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4}}}
	if got := f.decide(cfg, network)[cfg.Subnets[0].Prefix].shut; !slices.Equal(got, shut) {
		t.Errorf("%v, want %v", got, shut)
	}
}

// The last known forwards hold while rules cannot be read.
//
// Fails when an error of the reading gives an empty answer.
func TestForwardsHoldWhileRulesCannotBeRead(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(l.NFT("table ip fw { chain pre { type nat hook prerouting priority dstnat; udp dport 5060 dnat to 10.47.11.109; }; }"))
	f := &firewall{}
	var err error
	f.tables, err = rules.Open(rules.Config{NetNS: l.Gateway.FD()})
	must(err)
	f.reader = userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD(), OwnChain: rules.MarkerChain, Changes: f.tables.OthersChanges})
	defer func() { must(f.close()) }()
	forwards := func(network gateway.Network) (*userrules.Covered, warnings) {
		f.look()
		return f.forwards([]netip.Prefix{lab.InsideNet}, network)
	}
	network := gateway.Network{Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4}}}
	e := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5060"))

	unprivileged(t, func() {
		if got, warnings := forwards(network); !got.Covers(e) || len(warnings) == 0 {
			t.Errorf("at first, without privilege: covered %v, warnings %q", got.Covers(e), warnings)
		}
	})
	other := cone.EndpointFrom(netip.MustParseAddrPort("198.51.100.1:5061"))
	if got, _ := forwards(network); got.Covers(other) {
		t.Error("all is covered still")
	}
	before, warnings := forwards(network)
	if !before.Covers(e) || len(warnings) > 0 {
		t.Fatalf("covered %v, warnings %q", before.Covers(e), warnings)
	}
	unprivileged(t, func() {
		if got, warnings := forwards(network); got != before || !slices.ContainsFunc(warnings, func(w control.Finding) bool {
			return w.ID == warnForwardsUnread && strings.Contains(w.Text, "port forwards cannot be read") && strings.Contains(w.Text, "CAP_NET_ADMIN")
		}) {
			t.Errorf("without privilege: covered %v, warnings %q", got.Covers(e), warnings)
		}
	})
	if got, warnings := forwards(network); got != before || len(warnings) > 0 {
		t.Errorf("afterwards: covered %v, warnings %q", got.Covers(e), warnings)
	}
}

// A forward that is not fully understood, or gets only what strays, prevents expectations only: it takes no port from
// hosts with mappings, and does not surely hide anything from the map.
//
// Fails when one of the three treats it otherwise.
func TestForwardThatIsNotUnderstoodBarsExpectationsAlone(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(l.NFT(`table ip fw { chain pre { type nat hook prerouting priority dstnat
		udp dport 5060 dnat to 10.47.11.110
		udp sport 7 udp dport 5061 dnat to 10.47.11.110
		udp dport 5000-5100 udp dport & 1 != 1 dnat to 10.47.11.110
		iifname "wan1" udp dport 6000 dnat to 10.47.11.110
	}; }`))
	f := &firewall{reader: userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})}
	defer func() { must(f.close()) }()
	f.look()
	network := gateway.Network{
		Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4}, {Index: 3, Name: "wan1", Outside: gateway.IPv4}},
		Addrs: []gateway.Addr{{Prefix: netip.MustParsePrefix("198.51.100.1/24"), Link: 2}, {Prefix: netip.MustParsePrefix("198.18.7.2/24"), Link: 3}},
	}
	covered, warnings := f.forwards([]netip.Prefix{lab.InsideNet}, network)
	if len(warnings) != 1 || warnings[0].ID != warnForwardUnknown || !strings.Contains(warnings[0].Text, "nobody gets in there") {
		t.Errorf("warnings %q", warnings)
	}
	for port, want := range map[uint16][3]bool{
		5060: {true, true, true},
		5061: {true, true, false},
		5062: {true, false, false},
		5101: {false, false, false},
		6000: {true, false, false}, // of packets that come for the first uplink by the second
	} {
		e := cone.EndpointFrom(netip.AddrPortFrom(netip.MustParseAddr("198.51.100.1"), port))
		if got := [3]bool{covered.Covers(e), f.understood.Covers(e), f.hidden.Covers(e)}; got != want {
			t.Errorf("port %d: may be forwarded, is understood, is certain: %v, want %v", port, got, want)
		}
	}
}

// A forward of all ports to a host keeps peers away from other hosts, unless these never have its
// addresses.
//
// Fails when 1:1 NAT is warned of, and when a DMZ host that shares its address is not.
func TestForwardOfAllPortsIsWarnedOfWhereOthersHaveItsAddress(t *testing.T) {
	const to = " dnat to 10.47.11.109; "
	for name, tc := range map[string]struct {
		pre, post string
		warned    bool
	}{
		"1:1 NAT":                    {"ip daddr 198.51.100.2" + to, `ip saddr 10.47.11.109 snat to 198.51.100.2; oifname "wan0" masquerade`, false},
		"inwards alone":              {"ip daddr 198.51.100.2" + to, `oifname "wan0" masquerade`, false},
		"some peers":                 {"ip saddr 203.0.113.0/24 ip daddr 198.51.100.2" + to, `oifname "wan0" masquerade`, false},
		"a network of the provider":  {"ip daddr 198.51.100.0/30" + to, `oifname "wan0" masquerade`, true},
		"a DMZ host":                 {`iifname "wan0"` + to, `oifname "wan0" masquerade`, true},
		"most ports":                 {`iifname "wan0" udp dport 1024-65535` + to, `oifname "wan0" masquerade`, true},
		"all but some ports":         {`iifname "wan0" udp dport != { 53, 123, 500, 4500 }` + to, `oifname "wan0" masquerade`, true},
		"some ports":                 {`iifname "wan0" udp dport { 53, 10000-40000 }` + to, `oifname "wan0" masquerade`, false},
		"most ports of 1:1 NAT":      {"ip daddr 198.51.100.2 udp dport 1024-65535" + to, `oifname "wan0" masquerade`, false},
		"the address of masquerades": {"ip daddr 198.51.100.1" + to, `oifname "wan0" masquerade`, true},
		"of another link":            {"ip daddr 198.51.100.1" + to, `oifname "wan1" masquerade`, false},
		"of all links":               {"ip daddr 198.51.100.1" + to, "masquerade", true},
		"another host has it":        {"ip daddr 198.51.100.2" + to, "ip saddr 10.47.11.110 snat to 198.51.100.2", true},
		"a network has it":           {"ip daddr 198.51.100.2" + to, "ip saddr 10.47.11.108/30 snat to 198.51.100.2", true},
		"a pool":                     {"ip daddr 198.51.100.2" + to, `oifname "wan0" snat to 198.51.100.1-198.51.100.9`, true},
		"a map":                      {"ip daddr 198.51.100.2" + to, "snat to ip saddr map { 10.47.11.110 : 198.51.100.2 }", true},
		"prefixes":                   {"ip daddr 198.51.100.8/29 dnat prefix to 10.47.11.104/29; ", `snat ip prefix to ip saddr map { 10.47.11.104/29 : 198.51.100.8/29 }; oifname "wan0" masquerade`, false},
		"prefixes, and their pool":   {"ip daddr 198.51.100.8/29 dnat prefix to 10.47.11.104/29; ", `oifname "wan0" snat to 198.51.100.8-198.51.100.15`, true},
		"to several hosts":           {"ip daddr 198.51.100.2 dnat to 10.47.11.109-10.47.11.110; ", `oifname "wan0" masquerade`, true},
	} {
		t.Run(name, func(t *testing.T) {
			l := lab.ForTest(t, lab.Options{Rules: "table ip fw { chain pre { type nat hook prerouting priority dstnat; " + tc.pre +
				"; }; chain post { type nat hook postrouting priority srcnat; " + tc.post + "; }; }\n"})
			f := &firewall{reader: userrules.NewReader(userrules.Config{NetNS: l.Gateway.FD()})}
			defer func() {
				if err := f.close(); err != nil {
					t.Error(err)
				}
			}()
			f.look()
			f.ownAddrs = map[string]netip.Addr{"wan0": netip.MustParseAddr("198.51.100.1"), "lan0": lab.InsideNet.Addr().Next()}
			_, warnings := f.forwards([]netip.Prefix{lab.InsideNet}, gateway.Network{Links: []gateway.Link{{Index: 2, Name: "wan0", Outside: gateway.IPv4}}})
			if (len(warnings) == 1 && warnings[0].ID == warnForwardsAll) != tc.warned || len(warnings) > 1 {
				t.Errorf("warnings %q", warnings)
			}
		})
	}
}

// Fails when a chain that comes after the rules of mapping is said to come before them.
func TestRivalsAreChainsBeforeOurs(t *testing.T) {
	chains := []userrules.Chain{
		{Table: "ip first", Name: "c", Priority: -199},
		{Table: "ip first", Name: "later", Priority: -198},
		{Table: "inet both", Name: "c", Priority: -300},
	}
	if got, want := lowest(chains), []string{"ip first c", "inet both c"}; !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// unprivileged runs f on a thread without capabilities, which ends then.
func unprivileged(t *testing.T, f func()) {
	t.Helper()
	done := make(chan error)
	go func() {
		done <- lab.WithoutCapabilities(func() error { f(); return nil })
	}()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}
