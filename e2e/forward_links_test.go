package e2e

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A forward for one of two uplinks gets what comes by that uplink. It keeps no permission on an address
// of the other from the map, which comes after it. An expectation does not know by which link a packet
// came.

// bothLinks makes a gateway whose second host leaves by the second uplink, and the third gets what a
// rule forwards.
func bothLinks(t *testing.T, second string, load func(s *scene) error) *scene {
	t.Helper()
	s := newScene(t, lab.Options{Inside: 3, Rules: lab.NoRules})
	s.AddLink("wan1", second)
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 102")
	s.IP(s.Gateway, "rule add from 10.47.11.110 table 102")
	s.Must(load(s))
	return s
}

// nftForward and iptablesForward are rules that forward to the third host. Those of before come first.
func nftForward(rule string) func(s *scene) error {
	return func(s *scene) error {
		return s.NFT(`table ip nat { chain post { type nat hook postrouting priority srcnat; oifname { "wan0", "wan1" } masquerade; }; ` +
			"chain pre { type nat hook prerouting priority dstnat; " + rule + "; }; }")
	}
}

func iptablesForward(variant, rule string, before ...string) func(s *scene) error {
	text := "*nat\n-A POSTROUTING -o wan+ -j MASQUERADE\n"
	for _, b := range before {
		text += "-A PREROUTING " + b + "\n"
	}
	text += "-A PREROUTING -p udp " + rule + " -j DNAT --to-destination 10.47.11.111\nCOMMIT\n"
	return func(s *scene) error { return s.IPTables(variant, text) }
}

// Fails when a permission of the other uplink counts as forwarded, or one of this uplink does not.
func TestForwardOfOneUplinkBarsNoneOfAnother(t *testing.T) {
	t.Parallel() // mostly it waits
	const to = " udp dport 5060 dnat to 10.47.11.111"
	for name, load := range map[string]func(s *scene) error{
		"a link":          nftForward(`iifname "wan1"` + to),
		"a set":           nftForward(`iifname { "wan1", "ppp0" }` + to),
		"a pattern":       nftForward(`iifname "wan1*"` + to),
		"not the other":   nftForward(`iifname != "wan0"` + to),
		"an address":      nftForward("ip daddr 198.18.7.2" + to),
		"iptables-nft":    iptablesForward(lab.IPTablesNFT, "-i wan1 --dport 5060"),
		"iptables-legacy": iptablesForward(lab.IPTablesLegacy, "-i wan1 --dport 5060"),
		"legacy, all but": iptablesForward(lab.IPTablesLegacy, "! -i wan0 --dport 5060"),
		"a return":        nftForward(`iifname "wan0" return; udp dport 5060 dnat to 10.47.11.111`),
		"a port's accept": nftForward(`iifname "wan0" udp dport 5060 accept; udp dport 5060-5070 dnat to 10.47.11.111`),
		"nft, a return":   iptablesForward(lab.IPTablesNFT, "--dport 5060", "-i wan0 -j RETURN"),
		"legacy, accept":  iptablesForward(lab.IPTablesLegacy, "--dport 5060", "! -i wan1 -j ACCEPT"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := bothLinks(t, "198.18.7.2", load)
			s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
			one, two, server := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.InsideSocket(2, 5060)
			proxy := s.PeerSocket(lab.PeerA, 6060)
			first, second := s.Contact(one, proxy), s.Contact(two, proxy)
			if second.Addr() != netip.MustParseAddr("198.18.7.2") {
				t.Fatalf("it leaves as %v", second)
			}
			s.Stands(one, proxy, first)
			s.explainedArrives(one, s.PeerSocket(lab.PeerA, 5070), first)
			if p := s.Listed(two, proxy, second, "refused"); p.Reason != "forwarded" {
				t.Errorf("reason %q", p.Reason)
			}
			s.explained(lab.PeerA.String(), second, "forwarded", "forward", server.Addr())
			s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), second)
		})
	}
}

// Packets for an address that both uplinks have may come by both: nobody knows whether the forward
// gets them.
//
// Fails when an expectation takes a packet of the forward.
func TestForwardOfOneUplinkBarsAnAddressOfBoth(t *testing.T) {
	t.Parallel() // mostly it waits
	s := bothLinks(t, "198.18.7.2", nftForward(`iifname "wan1" udp dport 5060 dnat to 10.47.11.111`))
	s.IP(s.Gateway, "address add 198.18.7.2/32 dev wan0")
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	two, proxy := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 6060)
	ext := s.Contact(two, proxy)
	if p := s.Listed(two, proxy, ext, "refused"); p.Reason != "forwarded" {
		t.Errorf("reason %q", p.Reason)
	}
	s.Arrives(s.InsideSocket(2, 5060), s.PeerSocket(lab.PeerA, 5071), ext)
}

// A router sends packets for an address of the first uplink by the second, where a rule forwards them.
// The firewall accepts RELATED flows, and new ones to the host that the rule leads to.
//
// Fails when an expectation on that address takes them, and when the map admits no others.
func TestForwardOfOneUplinkGetsWhatComesThereForAnother(t *testing.T) {
	ownMode(t)
	t.Parallel() // mostly it waits
	const to, related = " udp dport 5060 dnat to 10.47.11.111", lab.DropPolicy + "add rule inet filter forward ip daddr 10.47.11.111 accept\n"
	for name, load := range map[string]func(s *scene) error{
		"a link":              nftForward(`iifname "wan1"` + to),
		"not the other":       nftForward(`iifname != "wan0"` + to),
		"its address":         nftForward(`iifname "wan1" ip daddr 198.51.100.1` + to),
		"a set of addresses":  nftForward(`iifname "wan1" ip daddr { 198.18.7.2, 198.51.100.0/24 }` + to),
		"all ports":           nftForward(`iifname "wan1" dnat to 10.47.11.111`),
		"iptables-nft":        iptablesForward(lab.IPTablesNFT, "-i wan1 -d 198.51.100.1 --dport 5060"),
		"iptables-legacy":     iptablesForward(lab.IPTablesLegacy, "-i wan1 --dport 5060"),
		"legacy, its address": iptablesForward(lab.IPTablesLegacy, "! -i wan0 -d 198.51.100.1 --dport 5060"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range [][]string{stage.Auto, stage.Expect} {
				t.Run(mode[0][2:], func(t *testing.T) {
					s := bothLinks(t, "198.18.7.2", load)
					s.Must(s.NFT(related))
					for _, link := range []string{"all", "wan1"} {
						s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
					}
					s.Start(stage.Flags(mode, "--reconcile=1h")...)
					one, server, proxy := s.InsideSocket(0, 5060), s.InsideSocket(2, 5060), s.PeerSocket(lab.PeerA, 6060)
					ext, auto := s.Contact(one, proxy), mode[0] == stage.Auto[0]
					if auto {
						if p := s.Listed(one, proxy, ext, "standing"); p.Backend != "nft" || p.Reason != "dropped" {
							t.Errorf("list has %+v", p)
						}
					} else if p := s.Listed(one, proxy, ext, "refused"); p.Reason != "forwarded" {
						t.Errorf("list has %+v", p)
					}
					s.IP(s.Outside, "route add 198.51.100.1/32 dev wan1")
					s.Arrives(server, s.PeerSocket(lab.PeerA, 5071), ext)
					s.IP(s.Outside, "route del 198.51.100.1/32 dev wan1")
					if auto {
						s.Must(s.NFT("insert rule inet filter forward ct label 126 accept"))
						s.Arrives(one, s.PeerSocket(lab.PeerA, 5072), ext)
					}
				})
			}
		})
	}
}

// Fails when another rule on that port, for the address of the other uplink, bars the expectation.
func TestForwardOfTheAddressOfOneUplinkBarsNoneOfAnother(t *testing.T) {
	s := bothLinks(t, "198.18.7.2", nftForward("ip daddr 198.18.7.2 udp dport 5060 dnat to 10.47.11.111"))
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	one, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 6060)
	ext := s.Contact(one, proxy)
	s.Stands(one, proxy, ext)
	s.explainedArrives(one, s.PeerSocket(lab.PeerA, 5070), ext)
}

// Fails when the map stands for an endpoint whose packets a forward takes, and when one rule is
// warned of twice.
func TestAutoBesideADMZHostOfOneUplink(t *testing.T) {
	s := bothLinks(t, "198.18.7.2", nftForward(`iifname "wan1" dnat to 10.47.11.111`))
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	one, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 6060)
	ext := s.Contact(one, proxy)
	s.Stands(one, proxy, ext)
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), ext)
	two := s.InsideSocket(1, 5060)
	s.Listed(two, proxy, s.Contact(two, proxy), "refused")
	warned := 0
	for _, f := range s.Status().Findings {
		if f.ID == "all_ports_forwarded" {
			warned++
		}
	}
	if warned != 1 {
		t.Errorf("%d warnings: %q", warned, s.Status().Warnings)
	}
}

// A rule lets a port pass before everything goes to a DMZ host. Permissions on that port stand, and those
// on others do not.
//
// Fails when the port counts as forwarded, and when status does not warn of the others.
func TestForwardOfAllThatARuleLeft(t *testing.T) {
	t.Parallel() // mostly it waits
	s := newScene(t, lab.Options{Inside: 3, Rules: lab.NoRules})
	s.Must(nftForward(`udp dport 5060 return; iifname "wan0" dnat to 10.47.11.111`)(s))
	s.Start(stage.Flags(stage.Expect, "--reconcile=1h")...)
	one, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 6060)
	ext := s.Contact(one, proxy)
	s.Stands(one, proxy, ext)
	s.Arrives(one, s.PeerSocket(lab.PeerA, 5070), ext)
	two := s.InsideSocket(1, 5061)
	if p := s.Listed(two, proxy, s.Contact(two, proxy), "refused"); p.Reason != "forwarded" {
		t.Errorf("reason %q", p.Reason)
	}
	if !s.warns("a rule forwards most ports") {
		t.Errorf("warnings %q", s.Status().Warnings)
	}
}
