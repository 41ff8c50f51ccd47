package e2e

import (
	"net/netip"
	"slices"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A packet with a faked inside source comes by a link that is neither inside nor outside.
// The user's firewall lets it pass, but it earns no permission in any backend, neither when
// it comes nor when a later daemon reads the flows.
//
// Fails without the chain way_back, when that chain leaves out subnets that expectations
// carry, and when the daemon ignores the sources that the chain remembers, or does not move
// them into tables of another name.
func TestNFTSourceByAnotherLinkEarnsNothing(t *testing.T) {
	for name, tc := range map[string]struct {
		rules string
		modes [][]string
	}{
		"DNAT passes":          {lab.Masquerade, [][]string{stage.NFT, stage.Auto, append(stage.Auto, "--learn=false"), stage.Expect}},
		"RELATED alone passes": {lab.Masquerade + lab.DropPolicy, [][]string{stage.Auto}},
	} {
		t.Run(name, func(t *testing.T) {
			stage.InModes(t, tc.modes, func(t *testing.T, mode ...string) {
				s := play(t, lab.Options{Guest: true, Rules: tc.rules}, mode...)
				for _, link := range []string{"all", "guest0"} {
					s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
				}
				s.sourceByAnotherLinkEarnsNothing(mode, s.Inside(0).Addr, lab.PeerA, s.Gateway.Addr)
			})
		})
	}
}

// The same with routed IPv6, which expectations always carry.
//
// Fails without the chain way_back of family inet, when it judges IPv4 alone, and when the
// daemon does not read the sources that it remembers, or does not take them over.
func TestIPv6SourceByAnotherLinkEarnsNothing(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		mode = append(slices.Clip(mode), "--routed", "--subnet", lab.InsideNet6.String())
		s := play(t, lab.Options{Guest: true, IPv6: true, Rules: lab.Masquerade + lab.DropPolicy}, mode...)
		s.sourceByAnotherLinkEarnsNothing(mode, s.Inside(0).Addr6, lab.Peer6A, s.Inside(0).Addr6)
	})
}

// With a routing rule for a mark, a packet with a faked inside source passes even from an
// outside link, as the user's firewall allows.
//
// Fails without the chain way_back of family inet.
func TestIPv6SourceFromOutsideEarnsNothing(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true})
	s.IP(s.Gateway, "-6 rule add fwmark 7 lookup 100")
	s.Start(stage.Flags(stage.Auto, "--routed", "--subnet", lab.InsideNet6.String())...)
	victim, far := netip.AddrPortFrom(s.Inside(0).Addr6, 7777), netip.MustParseAddrPort("[2001:db8:5::99]:9")
	s.IP(s.Outside, "addr add "+victim.Addr().String()+"/128 dev lo nodad")
	s.IP(s.Outside, "-6 route add table local unicast "+far.Addr().String()+"/128 via "+s.Gateway.Addr6.String())
	s.Must(s.Socket(s.Outside.Namespace, victim.Addr(), victim.Port()).Send(far, "faked"))
	s.Until("the packet passed", func() bool {
		return len(s.ConntrackList("-f", "ipv6", "-p", "udp", "--orig-src", victim.Addr().String())) > 0
	})
	fence, peer := s.Socket(s.Inside(0).Namespace, victim.Addr(), 5062), s.PeerSocket(lab.Peer6B, 9)
	s.Stands(fence, peer, s.Contact(fence, peer))
	for _, p := range s.List() {
		if p.Int == victim {
			t.Errorf("it earned %+v", p)
		}
	}
}

// sourceByAnotherLinkEarnsNothing lets the guest send to a peer with the source of an inside
// host; the peer answers to the outside address ext.
func (s *scene) sourceByAnotherLinkEarnsNothing(mode []string, inside, peer, ext netip.Addr) {
	t := s.T
	t.Helper()
	victim := netip.AddrPortFrom(inside, 7777)
	nodad := ""
	if inside.Is6() {
		nodad = " nodad"
	}
	s.IP(s.Guest, "addr add "+netip.PrefixFrom(inside, inside.BitLen()).String()+" dev lo"+nodad)
	spoofer := s.Socket(s.Guest.Namespace, victim.Addr(), victim.Port())
	attacker := s.PeerSocket(peer, 9)
	for _, payload := range []string{"one", "two", "three"} {
		s.Must(spoofer.Send(attacker.Addr(), payload))
		_, err := attacker.Expect(payload)
		s.Must(err)
	}
	s.Must(attacker.Send(netip.AddrPortFrom(ext, victim.Port()), "an answer"))

	nothing := func(when string) {
		t.Helper()
		for _, p := range s.List() {
			if p.Int == victim {
				t.Errorf("%s: it earned %+v", when, p)
			}
		}
		for e := range s.entries() {
			if e.in == victim {
				t.Errorf("%s: the map has %v", when, e)
			}
		}
	}
	fence := s.Socket(s.Inside(0).Namespace, inside, 5062)
	s.Stands(fence, attacker, s.Contact(fence, attacker))
	nothing("from the packet")
	for _, next := range []struct {
		after, table string
		end          func()
	}{{"kill -9", "conenat", s.Kill}, {"kill -9", "young", s.Kill}, {"a stop", "young", s.Stop}} {
		next.end()
		s.Start(stage.Flags(mode, "--table="+next.table)...)
		s.Stands(fence, attacker, s.Contact(fence, attacker))
		nothing("by a daemon after " + next.after + " with the table " + next.table)
	}
}

// A road warrior with a LAN address comes by an outside link. Only a policy routing rule
// leads back to it: by the mark of its packets or of the answers, by the link that the
// answers come from, by their ports, or by the host to which a rule leads its packets. Its packets
// pass.
//
// Fails when the chain before_conntrack ignores marks, when it ignores rules that match what only
// the answers have, and when it drops packets that a rule leads on.
func TestNFTRoadWarriorByPolicyRoutingPasses(t *testing.T) {
	const warrior, far = "10.47.11.200", "192.0.2.99"
	const published = `chain nat { type nat hook prerouting priority dstnat; ip daddr 192.0.2.99 udp dport 5060 dnat to 10.47.11.109; };`
	for name, tc := range map[string]struct{ mark, rule, chain string }{
		"marked as it comes":          {mark: `iifname "wan0" ip saddr 10.47.11.200 meta mark set 7;`, rule: "fwmark 7"},
		"marked on its way back":      {mark: `iifname "lan0" ip daddr 10.47.11.200 meta mark set 7;`, rule: "fwmark 7"},
		"by the answers' link":        {rule: "iif lan0"},
		"by the answers' ports":       {rule: "ipproto udp sport 5060"},
		"by the source of an inside":  {rule: "from 10.47.11.0/24", chain: published},
		"by the source of one inside": {rule: "from 10.47.11.109", chain: published},
	} {
		t.Run(name, func(t *testing.T) {
			s := newScene(t, lab.Options{Rules: lab.Masquerade + `table ip marks { chain pre {
				type filter hook prerouting priority mangle; ` + tc.mark + ` }; ` + tc.chain + ` }`})
			for _, link := range []string{"all", "wan0"} {
				s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
			}
			s.IP(s.Gateway, "rule add "+tc.rule+" lookup 100")
			s.IP(s.Gateway, "route add "+warrior+"/32 via 198.51.100.254 dev wan0 table 100")
			s.IP(s.Outside, "addr add "+warrior+"/32 dev lo")
			s.IP(s.Outside, "route add table local unicast "+far+"/32 via 198.51.100.1")
			s.Start(stage.Flags(stage.Auto)...)
			from := s.Socket(s.Outside.Namespace, netip.MustParseAddr(warrior), 5060)
			s.Must(from.Send(netip.MustParseAddrPort(far+":5060"), "x"))
			s.Until("the packet passed", func() bool { return len(s.ConntrackList("-p", "udp", "--orig-src", warrior)) > 0 })
			if n := s.Status().Tables.Guard.Spoofed; n != 0 {
				t.Errorf("%d packets were dropped", n)
			}
		})
	}
}

// A host of another network, or a neighbour of the inside host, fakes the source of a
// permitted peer. Its packets do not get in by the peer's permission, whatever carries it and
// whatever rp_filter and policy routing do; they make no flow, and do not lock out the peer,
// which still gets in.
//
// Fails without the rule of chain child about outside links, or without chain faked_peer.
func TestPeerFakedFromInsideGetsNothing(t *testing.T) {
	stage.NeedsExpect(t)
	carriers := []struct {
		name, firewall string
		mode           []string
	}{
		{"expect", lab.DropPolicy, stage.Expect},
		{"expect in auto", lab.DropPolicy, stage.Auto},
		{"nft", "", stage.NFT},
		{"nft in auto", "", stage.Auto},
		{"nft for everybody", "", append(slices.Clip(stage.NFT), "--filtering=endpoint_independent")},
		{"nft for a group", "", append(slices.Clip(stage.NFT), "--peer-group=203.0.113.0/24")},
	}
	for name, tc := range map[string]struct {
		rpFilter string
		rules    string
		ip6      bool
	}{
		"rp_filter 0":    {rpFilter: "0"},
		"rp_filter 2":    {rpFilter: "2"},
		"routes by mark": {rpFilter: "0", rules: `table ip marks { chain pre { type filter hook prerouting priority mangle; ct mark != 0 meta mark set ct mark; }; }`},
		"routed IPv6":    {ip6: true},
	} {
		t.Run(name, func(t *testing.T) {
			for _, c := range carriers {
				t.Run(c.name, func(t *testing.T) {
					if tc.ip6 && c.firewall == "" {
						t.Skip("a map carries IPv4 alone")
					}
					mode := c.mode
					s := newScene(t, lab.Options{Inside: 2, Guest: true, IPv6: tc.ip6, Rules: lab.Masquerade + c.firewall + tc.rules})
					inside, guest, peer := s.Inside(0).Addr, s.Guest.Addr, lab.PeerA
					bits := "/32"
					if tc.ip6 {
						mode = append(slices.Clip(mode), "--routed", "--subnet", lab.InsideNet6.String())
						inside, guest, peer = s.Inside(0).Addr6, s.Guest.Addr6, lab.Peer6A
						bits = "/128 nodad"
					}
					for _, link := range []string{"all", "guest0", "lan0"} {
						if tc.rpFilter != "" {
							s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", tc.rpFilter))
						}
					}
					if tc.rules != "" {
						s.IP(s.Gateway, "rule add fwmark 7 lookup 100")
					}
					s.Start(stage.Flags(mode, "--max-children=3")...)
					phone, proxy := s.Socket(s.Inside(0).Namespace, inside, 5060), s.Socket(s.Outside.Namespace, peer, 5060)
					ext := s.Contact(phone, proxy)
					s.Until("it stands", func() bool { return len(s.List()) == 1 && s.List()[0].State == "standing" })

					type faker struct {
						host *lab.Host
						addr netip.Addr
					}
					fakers := []faker{{s.Guest, guest}}
					if !tc.ip6 { // with IPv6 it would reach the host directly, not by the gateway
						fakers = append(fakers, faker{s.Inside(1), s.Inside(1).Addr})
					}
					for _, faker := range fakers {
						s.IP(faker.host, "addr add "+peer.String()+bits+" dev lo")
						own := s.Socket(faker.host.Namespace, faker.addr, 5060)
						seen := s.Contact(phone, own)
						for port := range uint16(10) {
							s.Must(lab.Lost(phone,
								lab.Packet{From: s.Socket(faker.host.Namespace, peer, 5070+port), To: ext, Payload: stage.Payload("faked")},
								lab.Packet{From: own, To: seen, Payload: stage.Payload("fence")}))
						}
					}
					if n := s.Status().Tables.Guard.Spoofed; n != uint64(10*len(fakers)) {
						t.Errorf("%d packets were dropped, want 10 of each", n)
					}
					for port := range uint16(3) { // max_children
						s.Arrives(phone, s.Socket(s.Outside.Namespace, peer, 5070+port), ext)
					}
				})
			}
		})
	}
}

// Flows that the user's own helpers and rules expect may come from anywhere, for example
// from another inside network to which a host has sent.
//
// Fails when the chain child judges every expected flow.
func TestFlowsThatOthersExpectComeFromAnywhere(t *testing.T) {
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Guest: true, Rules: lab.Masquerade + lab.DropPolicy + tftpHelper + `table ip others {
		ct expectation later { protocol udp; dport 7001; timeout 1m; size 2; l3proto ip; }
		chain c { type filter hook forward priority 0; iifname "lan0" udp dport 7000 ct expectation set "later"; }
	}`}, "--max-children=1")
	server := func(port uint16) *lab.Socket { return s.Socket(s.Guest.Namespace, s.Guest.Addr, port) }
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Stands(phone, proxy, s.Contact(phone, proxy))

	client := s.InsideSocket(0, 2070)
	const request = "\x00\x01boot.cfg\x00octet\x00"
	tftp := server(69)
	s.Must(client.Send(tftp.Addr(), request))
	_, err := tftp.Expect(request)
	s.Must(err)
	s.Arrives(client, server(3000), client.Addr())

	host, later := s.InsideSocket(0, 7002), s.InsideSocket(0, 7001)
	s.Contact(host, server(7000))
	s.Arrives(later, server(9), later.Addr())
	if n := s.Status().Tables.Guard.Spoofed; n != 0 {
		t.Errorf("%d packets were dropped", n)
	}
}
