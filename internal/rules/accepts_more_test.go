package rules_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
	"github.com/conenatd/conenatd/internal/rules"
)

func children(t *testing.T, l *lab.Lab, outside []rules.Link, subnets ...netip.Prefix) (all []string) {
	t.Helper()
	got, err := rules.Children(l.Gateway.FD(), outside, subnets)
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
	got := children(t, l, []rules.Link{wan0(t, l)}, lab.InsideNet, lab.GuestNet, lab.InsideNet6, lab.GuestNet6, netip.MustParsePrefix("192.168.7.0/24"))
	equal(t, got,
		"accepted accepted",
		"dropped accepted inet filter forward",
		"unknown (accepted) unknown (accepted)",
		"dropped accepted inet filter forward",
		"dropped unknown inet filter forward") // it may be behind guest0
}

// A routed host gets a child that is not translated.
func TestRelatedChildrenOfIPv6NeedNotBeDNATed(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: inForward("ct status dnat accept")})
	equal(t, children(t, l, []rules.Link{wan0(t, l)}, lab.InsideNet6, netip.MustParsePrefix("192.0.2.0/24")),
		"accepted unknown", "accepted unknown")
}

func TestChildrenOfSeveralOutsideLinks(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward(`iifname "wan0" accept; iifname "ppp0" ct state related accept`)})
	wan, ppp, tun := wan0(t, l), rules.Link{Index: 1 << 20, Name: "ppp0"}, rules.Link{Index: 1<<20 + 1, Name: "tun0"}
	for _, test := range []struct {
		outside []rules.Link
		want    string
	}{
		{[]rules.Link{wan}, "accepted accepted"},
		{[]rules.Link{wan, ppp}, "unknown accepted"},
		{[]rules.Link{wan, ppp, tun}, "unknown unknown"},
		{[]rules.Link{tun}, "dropped dropped inet filter forward"},
		{nil, "unknown unknown"},
	} {
		equal(t, children(t, l, test.outside, lab.InsideNet), test.want)
	}
}

func TestUnknownLinkToASubnetIsNoneOfTheOutsideLinks(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: inForward(`oifname "wan0" drop; oifname "lan0" accept; ct state related accept`)})
	subnet := netip.MustParsePrefix("192.168.7.0/24") // by the default route, if there is one
	equal(t, children(t, l, []rules.Link{wan0(t, l)}, subnet), "unknown accepted")
	output(t, l, "ip", "route", "add", "192.168.7.0/24", "via", "10.47.11.109")
	equal(t, children(t, l, []rules.Link{wan0(t, l)}, subnet), "accepted accepted")
}

// Rules of iptables-legacy are not read, so that nothing is known but what
// nftables drops.
func TestLegacyFilterMakesWhatIsAcceptedUnknown(t *testing.T) {
	l := lab.ForTest(t, lab.Options{IPv6: true, Rules: lab.Masquerade})
	outside := []rules.Link{wan0(t, l)}
	equal(t, children(t, l, outside, lab.InsideNet, lab.InsideNet6), "accepted accepted", "accepted accepted")
	check(t, l.IPTables(lab.IPTablesLegacy, "*mangle\n-A FORWARD -j MARK --set-mark 1\nCOMMIT\n"))
	equal(t, children(t, l, outside, lab.InsideNet), "accepted accepted")
	check(t, l.IPTables(lab.IPTablesLegacy, "*filter\n-A FORWARD -m conntrack --ctstate DNAT -j ACCEPT\nCOMMIT\n"))
	equal(t, children(t, l, outside, lab.InsideNet, lab.InsideNet6), "unknown unknown", "accepted accepted")
	check(t, l.NFT(inForward("ct state related accept")))
	equal(t, children(t, l, outside, lab.InsideNet), "dropped unknown inet filter forward")
}

func TestIPSetsAreNotRead(t *testing.T) {
	l := lab.ForTest(t, lab.Options{Rules: lab.NoRules})
	output(t, l, "ipset", "create", "blocked", "hash:ip")
	check(t, l.IPTables(lab.IPTablesNFT, `*filter
:FORWARD ACCEPT [0:0]
-A FORWARD -m set --match-set blocked src -j DROP
COMMIT
`))
	equal(t, children(t, l, []rules.Link{wan0(t, l)}, lab.InsideNet), "unknown (accepted) unknown (accepted)")
	check(t, l.IPTables(lab.IPTablesNFT, "*filter\n-A FORWARD -m set ! --match-set blocked src -j DROP\nCOMMIT\n"))
	equal(t, children(t, l, []rules.Link{wan0(t, l)}, lab.InsideNet), "unknown unknown")
}

func TestChildrenNeedPrivilege(t *testing.T) {
	l := lab.ForTest(t, lab.Options{})
	err := l.Gateway.Do(func() error {
		return withoutCapabilities(func() error {
			_, err := rules.Children(0, nil, []netip.Prefix{lab.InsideNet})
			return err
		})
	})
	if !errors.Is(err, unix.EPERM) || !strings.Contains(err.Error(), "CAP_NET_ADMIN") {
		t.Error(err)
	}
}

// A grant is a change of the ruleset, too: the daemon makes thousands a second.
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
	for range 200 {
		equal(t, children(t, l, []rules.Link{wan0(t, l)}, lab.InsideNet), "dropped accepted inet filter forward")
	}
	close(stop)
	check(t, <-stopped)
}
