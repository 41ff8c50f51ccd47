package e2e

import (
	"slices"
	"strings"
	"testing"

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
