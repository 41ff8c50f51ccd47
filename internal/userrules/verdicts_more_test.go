package userrules_test

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/userrules"
)

func children(t *testing.T, l *lab.Lab, outside []userrules.Link, subnets ...netip.Prefix) (all []string) {
	t.Helper()
	got, err := childrenOf(l.Gateway.FD(), outside, subnets)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range got {
		all = append(all, verdict(v))
	}
	return all
}

func equal(t *testing.T, got []string, want ...string) {
	t.Helper()
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestChildrenOfEachSubnet(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Guest: true, IPv6: true, Rules: `table inet filter { chain forward {
		type filter hook forward priority filter; policy drop;
		ip daddr 10.47.11.0/24 ct status dnat accept
		oifname "guest0" ct state related accept
		ip6 daddr 2001:db8:47::/64 oif "lan0" udp dport != 0 accept
		ip6 saddr 2001:db8:47::/64 accept
		ip6 saddr 2001:db8:5::/64 ip6 daddr 2001:db8::/32 ct state vmap { related : accept, new : drop }
	}; }`})
	got := children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet, lab.GuestNet, lab.InsideNet6, lab.GuestNet6, netip.MustParsePrefix("192.168.7.0/24"))
	equal(t, got,
		"accepted accepted",
		"dropped accepted inet filter forward",
		"unknown (accepted) unknown (accepted)",
		"dropped accepted inet filter forward",
		"dropped unknown inet filter forward") // it may be behind guest0
}

// Rules let in one provider, whatever they do with others.
//
// Fails when the source of the peers that the question is about is not used.
func TestChildrenOfSomePeers(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: `table inet filter { chain forward {
		type filter hook forward priority filter; policy drop;
		ip saddr 203.0.113.0/24 ct status dnat accept
		ip saddr 192.0.2.128/25 drop
		ip saddr 192.0.2.0/24 accept
		ip6 saddr 2001:db8:99::/48 ct state related accept
	}; }`})
	rs, err := readOnce(l.Gateway.FD())
	if err != nil {
		t.Fatal(err)
	}
	for peers, want := range map[string]string{
		"203.0.113.0/24":     "accepted accepted",
		"203.0.113.64/27":    "accepted accepted",
		"203.0.112.0/23":     "unknown unknown",
		"198.51.100.0/24":    "dropped dropped inet filter forward",
		"192.0.2.0/25":       "accepted accepted",
		"192.0.2.0/24":       "unknown unknown",
		"2001:db8:99:1::/64": "dropped accepted inet filter forward",
		"2001:db8:98::/48":   "dropped dropped inet filter forward",
	} {
		t.Run(peers, func(t *testing.T) {
			prefix, subnet := netip.MustParsePrefix(peers), lab.InsideNet
			if prefix.Addr().Is6() {
				subnet = lab.InsideNet6
			}
			got, err := rs.ChildrenOf(prefix, []userrules.Link{wan0(t, l)}, nil, []netip.Prefix{subnet})
			if err == nil {
				err = fmt.Errorf("%s", verdict(got[0]))
			}
			equal(t, []string{err.Error()}, want)
		})
	}
}

// A routed host gets children that are not translated.
func TestRelatedChildrenOfIPv6NeedNotBeDNATed(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: inForward("ct status dnat accept")})
	equal(t, children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet6, netip.MustParsePrefix("192.0.2.0/24")),
		"accepted unknown", "accepted unknown")
}

func TestChildrenOfSeveralOutsideLinks(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward(`iifname "wan0" accept; iifname "ppp0" ct state related accept`)})
	wan, ppp, tun := wan0(t, l), userrules.Link{Index: 1 << 20, Name: "ppp0"}, userrules.Link{Index: 1<<20 + 1, Name: "tun0"}
	for _, test := range []struct {
		outside []userrules.Link
		want    string
	}{
		{[]userrules.Link{wan}, "accepted accepted"},
		{[]userrules.Link{wan, ppp}, "unknown accepted"},
		{[]userrules.Link{wan, ppp, tun}, "unknown unknown"},
		{[]userrules.Link{tun}, "dropped dropped inet filter forward"},
		{nil, "unknown unknown"},
	} {
		equal(t, children(t, l, test.outside, lab.InsideNet), test.want)
	}
}

func TestUnknownLinkToASubnetIsNoneOfTheOutsideLinks(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward(`oifname "wan0" drop; oifname "lan0" accept; ct state related accept`)})
	subnet := netip.MustParsePrefix("192.168.7.0/24") // by the default route, if there is one
	equal(t, children(t, l, []userrules.Link{wan0(t, l)}, subnet), "unknown accepted")
	output(t, l, "ip", "route", "add", "192.168.7.0/24", "via", "10.47.11.109")
	equal(t, children(t, l, []userrules.Link{wan0(t, l)}, subnet), "accepted accepted")
}

// A packet must pass the chains of all tables, whichever program made them, in the order of
// their priorities.
func TestChildrenPassAllTablesOfIPTablesLegacy(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.Masquerade})
	outside := []userrules.Link{wan0(t, l)}
	for _, step := range []struct {
		variant, rules string
		v4, v6         string
	}{
		{lab.IPTablesLegacy, "*mangle\n-A FORWARD -j MARK --set-mark 1\nCOMMIT\n", "accepted accepted", "accepted accepted"},
		{
			lab.IPTablesLegacy, "*filter\n:FORWARD DROP\n-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\nCOMMIT\n",
			"accepted accepted", "accepted accepted",
		},
		{
			"ip6tables-legacy", "*filter\n:FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED -j ACCEPT\nCOMMIT\n",
			"accepted accepted", "dropped accepted ip6tables-legacy filter FORWARD",
		},
		{
			lab.IPTablesLegacy, "*filter\n-I FORWARD -m conntrack ! --ctstate RELATED -j DROP\nCOMMIT\n",
			"dropped accepted iptables-legacy filter FORWARD", "dropped accepted ip6tables-legacy filter FORWARD",
		},
		{
			lab.IPTablesLegacy, "*mangle\n-A FORWARD -m conntrack --ctstate NEW -j DROP\nCOMMIT\n",
			"dropped accepted iptables-legacy mangle FORWARD", "dropped accepted ip6tables-legacy filter FORWARD",
		},
		{
			"", "table ip late { chain f { type filter hook forward priority 100; drop; }; }",
			"dropped dropped iptables-legacy mangle FORWARD", "dropped accepted ip6tables-legacy filter FORWARD",
		},
	} {
		if step.variant == "" {
			check(t, l.NFT(step.rules))
		} else {
			check(t, l.IPTables(step.variant, step.rules))
		}
		t.Log(step.rules)
		equal(t, children(t, l, outside, lab.InsideNet, lab.InsideNet6), step.v4, step.v6)
	}
}

// Only root can see which tables there are, so another user knows only what other chains
// drop.
func TestHiddenTablesOfIPTablesLegacyMayDropChildren(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward("ct state related accept; ct status dnat accept")})
	check(t, l.IPTables(lab.IPTablesLegacy, "*filter\nCOMMIT\n"))
	outside := []userrules.Link{wan0(t, l)}
	read := func(want string) {
		t.Helper()
		check(t, l.Gateway.Do(func() error {
			return asAnotherUser(func() error {
				got, err := childrenOf(0, outside, []netip.Prefix{lab.InsideNet})
				if err == nil && verdict(got[0]) != want {
					err = fmt.Errorf("%q, want %q", verdict(got[0]), want)
				}
				return err
			})
		}))
	}
	equal(t, children(t, l, outside, lab.InsideNet), "accepted accepted")
	read("unknown unknown")
	check(t, l.NFT("insert rule inet filter forward ct state new drop"))
	read("dropped unknown inet filter forward")
}

func TestIPSetsAreNotRead(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	output(t, l, "ipset", "create", "blocked", "hash:ip")
	check(t, l.IPTables(lab.IPTablesNFT, `*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -m set --match-set blocked src -j DROP
COMMIT
`))
	equal(t, children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet), "unknown (accepted) unknown (accepted)")
	check(t, l.IPTables(lab.IPTablesNFT, "*filter\n-A FORWARD -m set ! --match-set blocked src -j DROP\nCOMMIT\n"))
	equal(t, children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet), "unknown unknown")
}

func TestChildrenNeedPrivilege(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	err := l.Gateway.Do(func() error {
		return lab.WithoutCapabilities(func() error {
			_, err := childrenOf(0, nil, []netip.Prefix{lab.InsideNet})
			return err
		})
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Error(err)
	}
}

// A grant changes the ruleset, too: the daemon makes thousands per second.
func TestChildrenAreReadBesideGrants(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	check(t, l.NFT("table inet other { set s { type ipv4_addr; }; }"))
	check(t, l.NFT(lab.DropPolicy))
	stop, stopped := make(chan struct{}), make(chan error)
	go func() {
		for {
			for _, verb := range []string{"add", "delete"} {
				if err := l.NFT(verb + " element inet other s { 192.0.2.1 }"); err != nil {
					stopped <- err
					return
				}
			}
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
		}
	}()
	rounds := 200
	if os.Getenv("CONENATD_GUEST") != "" {
		rounds = 40 // an emulated machine takes half a second for each
	}
	for range rounds {
		equal(t, children(t, l, []userrules.Link{wan0(t, l)}, lab.InsideNet), "dropped accepted inet filter forward")
	}
	close(stop)
	check(t, <-stopped)
}
