package e2e

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// A host with a mapping, and the gateway gets another address, while rules name the old one.

// moreOtherRules name the outside address for other hosts or destinations in more ways.
var moreOtherRules = map[string]string{
	"in a range for another host":       "ip saddr 10.47.11.200 snat to 198.51.100.1-198.51.100.4",
	"for another port":                  "udp dport 53 snat to 198.51.100.1",
	"as a prefix for a network":         "snat ip prefix to ip saddr map { 10.48.0.0/28 : 198.51.100.0/28 }",
	"for a network without conenatd":    "ip saddr 10.48.0.0/24 snat to 198.51.100.1",
	"for other ports of a network":      "ip saddr 10.47.11.0/24 udp dport 1-99 snat to 198.51.100.1",
	"for another host, by a map, to it": "snat to ip saddr map { 10.47.11.200 : 198.51.100.1 }",
}

// Fails when a rule that names the old address keeps the mappings of every host, or the flows that
// have them.
func TestNFTMappingHealsWhereARuleForOthersNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, rules := range []map[string]string{otherRules, moreOtherRules} {
		for name, rule := range rules {
			t.Run(name, func(t *testing.T) {
				s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", rule, "masquerade")}, mapped, "--reconcile=1h")
				healsAll(s, func() {})
			})
		}
	}
}

// Fails when rules of iptables are judged in another way.
func TestNFTMappingHealsWhereARuleOfIPTablesNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for _, variant := range []string{lab.IPTablesNFT, lab.IPTablesLegacy} {
		for _, others := range []string{"-s 10.47.11.200", "-d 192.0.2.200"} {
			t.Run(variant+" "+others, func(t *testing.T) {
				s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
				s.Must(s.IPTables(variant, "*nat\n-A POSTROUTING -o wan0 "+others+" -j SNAT --to-source 198.51.100.1\n-A POSTROUTING -o wan0 -j MASQUERADE\nCOMMIT\n"))
				s.Serve(mapped, "--reconcile=1h")
				healsAll(s, func() {})
			})
		}
	}
}

// Fails when a daemon that starts leaves such mappings and flows as they are.
func TestNFTMappingHealsAfterARestartWhereARuleForOthersNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, rule := range otherRules {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", rule, "masquerade")}, mapped, "--reconcile=1h")
			healsAll(s, func() { s.Kill() }, func() { s.Serve(mapped, "--reconcile=1h") })
		})
	}
}

// healsAll lets two hosts send from one port, so that they get different ones outside, runs the first
// function, gives the gateway another address, runs the others, and checks that all that the hosts
// send leaves by the new address.
func healsAll(s *scene, before func(), after ...func()) {
	s.T.Helper()
	peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060)}
	hosts := []*lab.Socket{s.InsideSocket(0, 5060), s.InsideSocket(1, 5060)}
	for _, host := range hosts {
		for _, peer := range peers {
			s.Contact(host, peer)
		}
	}
	s.Verified() // it knows the gateway's addresses
	before()
	addr := s.anotherAddress()
	for _, f := range after {
		f()
	}
	for _, host := range hosts {
		for _, peer := range peers {
			s.heals(host, peer, addr)
		}
	}
	another := s.PeerSocket(lab.PeerA, 7000)
	for _, host := range hosts {
		if a, b := s.Contact(host, another), s.Contact(host, peers[0]); a.Addr() != addr || a != b {
			s.T.Errorf("%v leaves as %v and as %v", host.Addr(), a, b)
		}
	}
}

// No rule gives a host with a mapping the old address, or only to another destination.
//
// Fails when the kernel goes on translating to the mappings on it while no daemon runs.
func TestNFTMappingHealsWithoutADaemonWhereARuleForOthersNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, rule := range map[string]string{
		"for another destination":        otherRules["for another destination"],
		"for a network without conenatd": moreOtherRules["for a network without conenatd"],
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", rule, "masquerade")}, mapped, "--reconcile=1h")
			host := s.InsideSocket(0, 5060)
			s.Contact(host, s.PeerSocket(lab.PeerA, 5060))
			s.Verified() // it knows the gateway's addresses
			s.Kill()
			addr := s.anotherAddress()
			if ext := s.Contact(host, s.PeerSocket(lab.PeerA, 7000)); ext.Addr() != addr {
				t.Errorf("it leaves as %v", ext)
			}
		})
	}
}

// A rule names the old address for one host or one destination, to which a host sends all the time.
//
// Fails when such a flow ends.
func TestNFTFlowStaysWhereARuleNamesItsAddress(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tt := range map[string]struct {
		rule string
		// The rule does not give the address to what this host sends to this peer. That flow heals by
		// the same look, and shows that it is over.
		host int
		peer netip.Addr
		port uint16
		next bool // the phone's next flow gets the address, too
	}{
		"for its host":        {"ip saddr 10.47.11.109 snat to 198.51.100.1", 1, lab.PeerA, 7000, true},
		"by a map":            {"snat to ip saddr map { 10.47.11.109 : 198.51.100.1 }", 1, lab.PeerA, 7000, true},
		"by a prefix map":     {"snat ip prefix to ip saddr map { 10.47.11.109/32 : 198.51.100.1/32 }", 1, lab.PeerA, 7000, true},
		"for its destination": {"ip daddr 203.0.113.5 snat to 198.51.100.1", 0, lab.PeerB, 5060, false},
		"but not to some":     {"ip daddr != 203.0.113.6 snat to 198.51.100.1", 0, lab.PeerB, 5060, false},
		"for its port":        {"udp dport 5060 snat to 198.51.100.1", 0, lab.PeerA, 7000, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := play(t, lab.Options{Inside: 2, Rules: natChain("srcnat", tt.rule, "masquerade")}, mapped, "--reconcile=1h")
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			ids := s.insideIDs()
			other, to := s.InsideSocket(tt.host, 5070), s.PeerSocket(tt.peer, tt.port)
			s.Contact(other, s.PeerSocket(lab.PeerC, 5060))
			s.Contact(other, to) // by the mapping: the kernel itself ends what it masqueraded
			s.Verified()         // it knows the gateway's addresses
			s.heals(other, to, s.anotherAddress())
			s.stay(ids)
			if tt.next {
				if got := s.Contact(phone, s.PeerSocket(lab.PeerB, 7000)); got != ext {
					t.Errorf("it left as %v, and leaves as %v", ext, got)
				}
			}
		})
	}
}
