package e2e

import (
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Another link becomes the outside link: wan0 becomes a port of a bridge, or there is a new one with its
// address or, where rules name an address, with another. Each host keeps its outside endpoint.
//
// Fails when its mapping stays with wan0: then the port counts as another host's.
func TestNFTMappingFollowsItsAddressToAnotherLink(t *testing.T) {
	t.Parallel() // mostly it waits
	const addr, back = "198.51.100.1/24", "route add default via 198.51.100.254"
	bridge := func(s *scene) {
		s.IP(s.Gateway, "link add wan7 type bridge forward_delay 0")
		s.IP(s.Gateway, "link set wan0 master wan7")
		s.moves("wan0", "wan7", addr)
	}
	for name, tc := range map[string]struct {
		statement string // of the user's rule
		move      func(s *scene)
		killed    bool // it moves while no daemon runs
	}{
		"a bridge":                            {"masquerade", bridge, false},
		"a bridge, snat":                      {"snat to 198.51.100.1", bridge, false},
		"a bridge, and an address of no link": {"snat to " + routedAddr, bridge, false},
		"while no daemon runs":                {"masquerade", bridge, true},
		"while no daemon runs, snat":          {"snat to 198.51.100.1", bridge, true},
		"a macvlan": {"masquerade", func(s *scene) {
			s.IP(s.Gateway, "link add link wan0 name wan7 type macvlan")
			s.moves("wan0", "wan7", addr)
		}, false},
		"another name": {"masquerade", func(s *scene) {
			s.IP(s.Gateway, "link set wan0 down")
			s.IP(s.Gateway, "link set wan0 name wan7")
		}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{Inside: 2, Rules: strings.NewReplacer(`"wan0"`, `{ "wan0", "wan7" }`, "masquerade", tc.statement).Replace(lab.Masquerade)})
			s.IP(s.Outside, "route add "+routedAddr+"/32 via 198.51.100.1 dev eth0")
			start := func() { s.Start("--subnet", lab.InsideNet.String(), mapped, "--reconcile=1h") }
			start()
			hosts, exts := s.consoles(2)
			if tc.killed {
				s.Kill()
			}
			tc.move(s)
			s.LinkUp("wan7")
			s.IP(s.Gateway, back)
			if tc.killed {
				start()
			}
			s.Until("the daemon knows the new link", func() bool { return slices.Contains(s.Status().Outside, "wan7") })
			for i, host := range hosts {
				if got := s.Contact(host, s.PeerSocket(lab.PeerC, 9+uint16(i))); got != exts[i] {
					t.Errorf("host %d left as %v, and leaves as %v", i, exts[i], got)
				}
			}
		})
	}
}

// Mappings stay where the link by which packets leave stays, or is only down for a moment.
//
// Fails when they follow the address, and each host's next flow leaves by a port of the pool.
func TestNFTMappingStaysOnTheLinkByWhichPacketsLeave(t *testing.T) {
	t.Parallel()                            // mostly it waits
	uplink := func(s *scene, addr string) { // a second one
		s.IP(s.Gateway, "link add wan7 type veth peer name far7")
		s.IP(s.Gateway, "link set far7 up")
		s.IP(s.Gateway, "link set wan7 up")
		s.IP(s.Gateway, "address add "+addr+" dev wan7")
		s.IP(s.Gateway, "route add default dev wan7 metric 5000")
		s.Until("the daemon knows the new link", func() bool { return slices.Contains(s.Status().Outside, "wan7") })
	}
	outside := func(s *scene, n int) {
		s.Until("the daemon knows the links", func() bool { return len(s.Status().Outside) == n })
		s.Verified()
	}
	for name, tc := range map[string]struct {
		statement string // of the user's rule
		change    func(s *scene)
	}{
		"another link gets the address, too": {"masquerade", func(s *scene) { uplink(s, "198.51.100.1/32") }},
		"a failover and back": {"snat to " + routedAddr, func(s *scene) {
			uplink(s, "192.0.2.130/30")
			s.IP(s.Gateway, "link set wan0 down")
			outside(s, 1)
			s.IP(s.Gateway, "link set wan0 up")
			s.IP(s.Gateway, "route add default via 198.51.100.254")
			outside(s, 2)
		}},
		"a map for the mark": {"meta mark set ip saddr map { 10.47.11.0/24 : 0x1 } snat to 198.51.100.1", func(*scene) {}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newScene(t, lab.Options{Inside: 2, Rules: strings.NewReplacer(`"wan0"`, `{ "wan0", "wan7" }`, "masquerade", tc.statement).Replace(lab.Masquerade)})
			s.IP(s.Outside, "route add "+routedAddr+"/32 via 198.51.100.1 dev eth0")
			s.Start("--subnet", lab.InsideNet.String(), mapped, "--reconcile=1h")
			hosts, exts := s.consoles(2)
			s.Verified()
			tc.change(s)
			s.Verified()
			for i, host := range hosts {
				if got := s.Contact(host, s.PeerSocket(lab.PeerC, 9+uint16(i))); got != exts[i] {
					t.Errorf("host %d left as %v, and leaves as %v", i, exts[i], got)
				}
			}
		})
	}
}

// A bridge takes over the uplink and its address, and no rule of the user's translates what leaves by it.
//
// Fails when the mappings follow to it all the same.
func TestNFTMappingFollowsToNoLinkThatNoRuleTranslates(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade})
	s.Start("--subnet", lab.InsideNet.String(), mapped, "--reconcile=1h")
	hosts, _ := s.consoles(2)
	s.IP(s.Gateway, "link add wan7 type bridge forward_delay 0")
	s.IP(s.Gateway, "link set wan0 master wan7")
	s.moves("wan0", "wan7", "198.51.100.1/24")
	s.LinkUp("wan7")
	s.IP(s.Gateway, "route add default via 198.51.100.254")
	s.Until("the daemon knows the new link", func() bool { return slices.Contains(s.Status().Outside, "wan7") })
	s.Verified()
	peer := s.PeerSocket(lab.PeerC, 9)
	s.Must(hosts[0].Send(peer.Addr(), "as it is"))
	if _, from, err := peer.Recv(stage.Patience()); err != nil || from != hosts[0].Addr() {
		t.Errorf("it left as %v, %v", from, err)
	}
}
