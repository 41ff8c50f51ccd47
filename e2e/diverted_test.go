package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

const (
	redirected = `table ip proxy { chain pre { type nat hook prerouting priority dstnat; iifname "lan0" udp dport 5060 redirect to :5099; }; }`
	sipHelped  = `table ip helped { ct helper sip { type "sip" protocol udp; }; chain pre { type filter hook prerouting priority filter; udp dport 5060 ct helper set "sip"; }; }`
)

// Rules of the user's take what hosts send to port 5060 of a peer: a proxy on the gateway, or a
// conntrack helper. They still see it after that port of the peer has spoken first, and what came
// in before the rules ends. Other ports of the peer get in.
//
// Fails when a child gets in from that port, and when a living one stays.
func TestNFTRulesSeeWhatHostsSendToAPortThatSpokeFirst(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, rules := range map[string]struct {
		load func(s *scene) error
		seen func(s *scene, phone, proxy *lab.Socket) bool // that rules take what phone sends
	}{
		"redirect": {func(s *scene) error { return s.NFT(redirected) }, redirectedTo},
		"redirect for one peer": {func(s *scene) error {
			return s.NFT(strings.Replace(redirected, "udp dport", "ip daddr 203.0.113.5 udp dport", 1))
		}, redirectedTo},
		"redirect by iptables-legacy": {func(s *scene) error {
			return s.IPTables(lab.IPTablesLegacy, "*nat\n-A PREROUTING -i lan0 -p udp --dport 5060 -j REDIRECT --to-ports 5099\nCOMMIT\n")
		}, redirectedTo},
		"redirect of new flows of this host": {func(s *scene) error {
			return s.NFT(strings.Replace(redirected, "udp dport", "ip saddr 10.47.11.109 ct state new udp dport", 1))
		}, redirectedTo},
		"redirect that is not for the gateway": {func(s *scene) error {
			return s.NFT(strings.Replace(redirected, "udp dport", "fib daddr type != local udp dport", 1))
		}, redirectedTo},
		"redirect by iptables-legacy that is not for the gateway": {func(s *scene) error {
			return s.IPTables(lab.IPTablesLegacy, "*nat\n-A PREROUTING -i lan0 -p udp -m addrtype ! --dst-type LOCAL --dport 5060 -j REDIRECT --to-ports 5099\nCOMMIT\n")
		}, redirectedTo},
		"redirect of a set of hosts": {func(s *scene) error {
			return s.NFT(`table ip proxy { set hosts { type ipv4_addr; elements = { 10.47.11.109 }; }; chain pre { type nat hook prerouting priority dstnat; iifname "lan0" ip saddr @hosts udp dport 5060 redirect to :5099; }; }`)
		}, redirectedTo},
		"helper": {func(s *scene) error { return s.NFT(sipHelped) }, helped},
		"helper by iptables-nft": {func(s *scene) error {
			return s.IPTables(lab.IPTablesNFT, "*raw\n-A PREROUTING -p udp --dport 5060 -j CT --helper sip\nCOMMIT\n")
		}, helped},
	} {
		for mode, args := range map[string][]string{
			"auto": nil, "expect": {"--backend=expect"}, "nft": {"--backend=nft", "--learn=false"},
		} {
			if mode != "auto" && name != "redirect" && name != "helper" {
				continue // two cases show the same for each mode
			}
			for _, late := range []bool{false, true} {
				t.Run(fmt.Sprintf("%s, %s, late %v", name, mode, late), func(t *testing.T) {
					t.Parallel()
					s := newScene(t, lab.Options{})
					if !late {
						s.Must(rules.load(s))
					}
					s.Serve(append(args, "--reconcile=1h")...)
					phone, proxy := s.InsideSocket(0, 4444), s.Socket(s.Gateway.Namespace, netip.IPv4Unspecified(), 5099)
					peer, sip, other := s.PeerSocket(lab.PeerA, 5061), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
					ext := s.Contact(phone, peer)
					s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
					if late {
						s.Arrives(phone, sip, ext)
						s.Contact(phone, sip) // the child is answered
						s.Must(rules.load(s))
						s.Until("the rules see what the phone sends", func() bool { return rules.seen(s, phone, proxy) })
						return
					}
					s.Lost(phone, sip, ext, other)
					s.explained("203.0.113.5:5060", ext, "lost", "diversion", netip.AddrPort{})
					if !rules.seen(s, phone, proxy) {
						t.Error("the rules do not see what the phone sends")
					}
				})
			}
		}
	}
}

// A rule takes what one host sends to one peer's port. Other hosts, and other peers, are not
// concerned.
//
// Fails when the sides of different rules are mixed, and when the host of the rule is ignored.
func TestNFTRuleOfOneHostLeavesOthersAlone(t *testing.T) {
	for mode, args := range map[string][]string{"auto": nil, "expect": {"--backend=expect"}} {
		t.Run(mode, func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2})
			s.Must(s.NFT(`table ip proxy { chain pre { type nat hook prerouting priority dstnat;
				iifname "lan0" ip saddr 10.47.11.110 udp dport 5060 redirect to :5099
				iifname "lan0" ip daddr 192.0.2.9 udp dport 5070 redirect to :5099
				iifname "lan0" ip daddr 203.0.113.5 udp dport 5080 redirect to :5099
			}; }`))
			s.Serve(args...)
			one, two, peer := s.InsideSocket(0, 4444), s.InsideSocket(1, 5555), s.PeerSocket(lab.PeerA, 5061)
			ext, another := s.Contact(one, peer), s.Contact(two, peer)
			s.Until("both may be reached", func() bool { return s.Status().Permissions.Standing == 2 })
			sip, other, third := s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070), s.PeerSocket(lab.PeerA, 5080)
			s.Arrives(one, sip, ext)
			s.Arrives(one, other, ext)
			s.Lost(one, third, ext, s.PeerSocket(lab.PeerA, 5090))
			s.Lost(two, sip, another, other)
		})
	}
}

// A host comes into a set of hosts whose packets a rule takes, and goes again. The rule itself
// does not change.
//
// Fails when the change of the set is not noticed.
func TestNFTHostsInASetOfARule(t *testing.T) {
	s := newScene(t, lab.Options{})
	s.Must(s.NFT(`table ip proxy { set hosts { type ipv4_addr; flags interval; elements = { 10.47.11.110 }; }; chain pre { type nat hook prerouting priority dstnat; iifname "lan0" ip saddr @hosts udp dport 5060 redirect to :5099; }; }`))
	s.Serve("--reconcile=1h")
	ruleTakesAWhile(s, "add element ip proxy hosts { 10.47.11.109 }", "delete element ip proxy hosts { 10.47.11.109 }")
}

// ruleTakesAWhile lets a rule take a port of the peer from the phone and leave it again: meanwhile
// the port does not get in, and the child that it had ends.
func ruleTakesAWhile(s *scene, take, leave string) {
	s.T.Helper()
	phone, proxy := s.InsideSocket(0, 4444), s.Socket(s.Gateway.Namespace, netip.IPv4Unspecified(), 5099)
	peer, sip, other := s.PeerSocket(lab.PeerA, 5061), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
	ext := s.Contact(phone, peer)
	s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
	s.Arrives(phone, sip, ext)
	s.Contact(phone, sip) // the child is answered
	s.Must(s.NFT(take))
	s.Until("the rule sees what the phone sends", func() bool { return redirectedTo(s, phone, proxy) })
	s.Lost(phone, sip, ext, other)
	s.Must(s.NFT(leave))
	second := s.InsideSocket(0, 4445) // the flow of the first one is still with the proxy
	ext = s.Contact(second, peer)
	s.Until("the port gets in again", func() bool {
		payload := stage.Payload("from the port")
		s.Must(sip.Send(ext, payload))
		return receives(second, payload)
	})
}

// A rule takes what hosts send, but not to thousands of prefixes, and not from some hosts. Another
// port of a peer that is among them gets in, until the peer, or the host, is taken out of the set.
//
// Fails when such a list makes the rule count for everybody, and when a change of it is not noticed.
func TestNFTRuleForAllButALongList(t *testing.T) {
	t.Parallel() // mostly it waits
	long := "203.0.113.0/25"
	for i := range 5000 {
		long += fmt.Sprintf(", 11.%d.%d.0/25", i>>8, i&0xff)
	}
	peers := `set spared { type ipv4_addr; flags interval; elements = { ` + long + ` }; }`
	hosts := `set spared { type ipv4_addr; elements = { 10.47.11.109, 10.47.11.200 }; }`
	proxy := func(set, rule string) string {
		return "table ip proxy { " + set + `; chain pre { type nat hook prerouting priority dstnat; ` + rule + ` udp dport 5060 redirect to :5099; }; }`
	}
	for name, tc := range map[string]struct{ rules, element string }{
		"return of peers": {proxy(peers, `ip daddr @spared return; iifname "lan0"`), "203.0.113.0/25"},
		"other peers":     {proxy(peers, `iifname "lan0" ip daddr != @spared`), "203.0.113.0/25"},
		"return of hosts": {proxy(hosts, `ip saddr @spared return; iifname "lan0"`), "10.47.11.109"},
		"other hosts":     {proxy(hosts, `iifname "lan0" ip saddr != @spared`), "10.47.11.109"},
	} {
		for mode, args := range map[string][]string{"auto": nil, "expect": {"--backend=expect"}} {
			t.Run(name+", "+mode, func(t *testing.T) {
				t.Parallel()
				s := newScene(t, lab.Options{})
				s.Must(s.NFT(tc.rules))
				s.Serve(append(args, "--reconcile=1h")...)
				ruleTakesAWhile(s, "delete element ip proxy spared { "+tc.element+" }", "add element ip proxy spared { "+tc.element+" }")
			})
		}
	}
}

// Many rules take what hosts send to anywhere but a long list of peers. The daemon's tables have
// the list once.
//
// Fails when each rule has a copy of the list.
func TestNFTManyRulesShareALongList(t *testing.T) {
	s := newScene(t, lab.Options{})
	rules := "table ip proxy { set spared { type ipv4_addr; flags interval; elements = { 203.0.113.0/25"
	for i := range 5000 {
		rules += fmt.Sprintf(", 11.%d.%d.0/25", i>>8, i&0xff)
	}
	rules += " }; }; chain pre { type nat hook prerouting priority dstnat; ip daddr @spared return\n"
	for i := range 100 {
		rules += fmt.Sprintf("ip saddr 10.47.11.%d udp dport %d redirect to :5099\n", i+2, 5000+i)
	}
	s.Must(s.NFT(rules + "}; }"))
	s.Serve()
	phone := s.InsideSocket(0, 4444)
	ext := s.Contact(phone, s.PeerSocket(lab.PeerA, 5061))
	s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5060), ext)
	out, err := s.Gateway.Output("nft", "list", "table", "inet", "conenat")
	s.Must(err)
	if n := strings.Count(out, "set diverted_peers"); n != 1 {
		t.Errorf("%d sets of peers, want 1", n)
	}
}

// redirectedTo sends from phone to port 5060, and reports whether it arrives at proxy.
func redirectedTo(s *scene, phone, proxy *lab.Socket) bool {
	payload := stage.Payload("to the proxy")
	s.Must(phone.Send(netip.AddrPortFrom(lab.PeerA, 5060), payload))
	return receives(proxy, payload)
}

// receives reports whether a payload is the next to arrive at a socket, soon.
func receives(in *lab.Socket, payload string) bool {
	got, _, err := in.Recv(time.Second)
	return err == nil && got == payload
}

// helped does the same, and reports whether the helper serves the flow.
func helped(s *scene, phone, _ *lab.Socket) bool {
	s.Must(phone.Send(netip.AddrPortFrom(lab.PeerA, 5060), stage.Payload("to the helper")))
	return slices.ContainsFunc(s.ConntrackList("-p", "udp"), func(line string) bool {
		return strings.Contains(line, "src=10.47.11.109 dst=203.0.113.5 sport=4444 dport=5060") && strings.Contains(line, "helper=sip")
	})
}
