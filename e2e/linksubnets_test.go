package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// enabled returns the subnets that the daemon serves, sorted.
func (s *scene) enabled() (subnets []string) {
	s.T.Helper()
	for _, n := range s.Status().Subnets {
		subnets = append(subnets, n.Prefix.String())
	}
	slices.Sort(subnets)
	return subnets
}

// A subnet that is named by its link follows the link's prefixes: at the start, when the
// network is renumbered, when a second one is added, and when the link appears later.
//
// Fails when the prefixes of a link are read only once.
func TestSubnetByItsLink(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Guest: true})
		s.Start(append(slices.Clone(mode), "--subnet=lan0", "--subnet=later0", "--reconcile=1h")...)
		s.works(lab.PeerA, 5060, s.Gateway.Addr)
		s.told("link later0 of a subnet is not there")

		const renumbered = "10.99.0.0/24"
		s.IP(s.Gateway, "addr add 10.99.0.1/24 dev lan0")
		s.Until("both are served", func() bool { return slices.Equal(s.enabled(), []string{"10.47.11.0/24", renumbered}) })
		s.IP(s.Gateway, "addr del 10.47.11.1/24 dev lan0")
		s.Until("the new one is served", func() bool { return slices.Equal(s.enabled(), []string{renumbered}) })
		s.IP(s.Inside(0), "addr add 10.99.0.109/24 dev eth0")
		s.IP(s.Inside(0), "route replace default via 10.99.0.1")
		phone, proxy := s.Socket(s.Inside(0).Namespace, netip.MustParseAddr("10.99.0.109"), 5070), s.PeerSocket(lab.PeerA, 5070)
		ext := s.Contact(phone, proxy)
		s.Stands(phone, proxy, ext)
		s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)

		s.IP(s.Gateway, "link set guest0 down")
		s.IP(s.Gateway, "link set guest0 name later0")
		s.LinkUp("later0")
		s.Until("the later link is served, too", func() bool { return slices.Equal(s.enabled(), []string{"10.47.12.0/24", renumbered}) })
		s.over("link later0 of a subnet is not there")
	})
}

// The provider rotates the IPv6 prefix: conenatd follows if the subnet is routed.
//
// Fails when the IPv6 prefix is not taken from the link, when it is taken without routed, and
// when "auto" leaves it out without a word.
func TestRotatingPrefixOfALink(t *testing.T) {
	stage.NeedsExpect(t)
	for _, subnet := range []string{"lan0", "auto"} {
		t.Run(subnet, func(t *testing.T) { rotates(t, subnet) })
	}
}

func rotates(t *testing.T, subnet string) {
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy})
	s.Start("--subnet="+subnet, "--routed", "--reconcile=1h")
	s.Until("both families are served", func() bool {
		return slices.Equal(s.enabled(), []string{"10.47.11.0/24", "2001:db8:47::/64"})
	})
	rotated := netip.MustParsePrefix("2001:db8:77::/64")
	host := netip.MustParseAddr("2001:db8:77::109")
	s.IP(s.Gateway, "addr add 2001:db8:77::1/64 dev lan0 nodad")
	s.IP(s.Gateway, "addr del 2001:db8:47::1/64 dev lan0")
	s.IP(s.Inside(0), "addr add "+host.String()+"/64 dev eth0 nodad")
	s.IP(s.Inside(0), "-6 route replace default via 2001:db8:77::1 dev eth0")
	s.Until("the rotated one is served", func() bool {
		return slices.Equal(s.enabled(), []string{"10.47.11.0/24", rotated.String()})
	})
	phone, proxy := s.Socket(s.Inside(0).Namespace, host, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.Socket(s.Outside.Namespace, lab.Peer6A, 5070), ext)
	s.Stop()

	s.Start("--subnet="+subnet, "--reconcile=1h")
	if got := s.enabled(); !slices.Equal(got, []string{"10.47.11.0/24"}) {
		t.Errorf("without routed: %v", got)
	}
	if told := strings.Contains(s.Daemon.Output(), "subnet auto leaves out IPv6: set routed = true"); told != (subnet == "auto") {
		t.Errorf("the log says %v that auto leaves out IPv6", told)
	}
}

// Warnings name a subnet that no link has, and one that is the gateway's own address. The
// first may lie behind another router, as in a cloud, so it is served anyway.
//
// Fails when no warning names such a subnet.
func TestSubnetThatNobodyHasIsTold(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.Start("--subnet=10.99.0.0/24", "--subnet=10.47.11.1/32", "--reconcile=1s")
	s.told("no link has the subnet 10.99.0.0/24")
	s.told("subnet 10.47.11.1/32 is the gateway's own address")
	s.IP(s.Gateway, "route add 10.99.0.0/24 via "+s.Inside(0).Addr.String())
	s.over("no link has the subnet 10.99.0.0/24")
}
