package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/internal/lab"
)

// A routing rule of the user's leads packets with a type of service to another uplink, by a table
// with nothing but a default route. The kernel looks the way back of a host's packet up with the
// packet's own type of service, so that its flow earns nothing. Status says so, and what it names
// helps.
//
// Fails when such flows are left out silently, and when the link in inside does not help.
func TestWayBackHiddenByARoutingRule(t *testing.T) {
	for name, rule := range map[string]string{"tos": "tos 0x10", "port": "ipproto udp dport 7000", "none": ""} {
		t.Run(name, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Rules: bothUplinks})
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			if rule != "" {
				s.IP(s.Gateway, "rule add "+rule+" table 109")
			}
			phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 7000)
			if name == "tos" {
				_, err := s.Inside(0).Output("nft", "add table ip t; add chain ip t o { type filter hook output priority 0; }; add rule ip t o ip dscp set 4")
				s.Must(err)
			}
			s.Serve("--reconcile=1s")
			ext := s.Contact(phone, peer)
			if name != "tos" {
				s.Until("a permission stands", func() bool { return s.Status().Permissions.Standing == 1 })
				s.Arrives(phone, other, ext)
				s.tellsWayBack(false)
				return
			}
			s.Until("status tells of it", func() bool {
				return strings.Contains(strings.Join(s.Status().Warnings, ""), "hide that way")
			})
			s.tellsWayBack(true)
			if n := s.Status().Permissions.Standing; n != 0 {
				t.Fatalf("%d permissions stand", n)
			}
			s.Stop()
			s.Serve("--reconcile=1s", "--inside=lan0")
			phone = s.InsideSocket(0, 5061)
			ext = s.Contact(phone, peer)
			s.Until("both flows have a permission", func() bool { return s.Status().Permissions.Standing == 2 })
			s.Arrives(phone, other, ext)
			s.tellsWayBack(false)
		})
	}
}

// tellsWayBack checks whether status has the finding way_back_unknown.
func (s *scene) tellsWayBack(want bool) {
	s.T.Helper()
	told := false
	for _, f := range s.Status().Findings {
		told = told || f.ID == "way_back_unknown"
	}
	if told != want {
		s.T.Errorf("way_back_unknown is told: %v, want %v", told, want)
	}
}
