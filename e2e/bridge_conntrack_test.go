package e2e

import (
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A firewall of the bridges themselves, with conntrack (nf_conntrack_bridge): packets are tracked before
// they come to the IP stack, on the LAN's bridge and on the one outside.
const (
	bridgesTrack = `table bridge b {
	chain forward { type filter hook forward priority filter; ct state established,related accept; }
	chain prerouting { type filter hook prerouting priority filter; ct state invalid drop; }
}
`
	bridgeDropsNew = `table bridge c { chain input { type filter hook input priority filter; iifname "wan0" ip protocol udp ct state new drop; }; }
`
)

// Peers get in as without it. Where the bridge drops new flows from outside, expectations alone let them in.
func TestChildrenBehindBridgesThatTrack(t *testing.T) {
	for name, tc := range map[string]struct {
		rules string
		modes [][]string
	}{
		"they accept":             {bridgesTrack, [][]string{stage.Auto, stage.NFT, stage.Expect}},
		"they drop what is new":   {bridgesTrack + bridgeDropsNew, [][]string{stage.Expect}},
		"and so does the gateway": {bridgesTrack + bridgeDropsNew + lab.DropPolicy, [][]string{stage.Auto}},
	} {
		for _, mode := range tc.modes {
			t.Run(name+"/"+strings.Join(mode, " "), func(t *testing.T) {
				s := newScene(t, lab.Options{Rules: strings.Replace(lab.Masquerade, "wan0", "wan7", 1)})
				if err := s.NFT(tc.rules); err != nil {
					t.Skipf("this kernel has no conntrack in bridges (CONFIG_NF_CONNTRACK_BRIDGE): %v", err)
				}
				s.IP(s.Gateway, "link add wan7 type bridge forward_delay 0")
				s.IP(s.Gateway, "link set wan0 master wan7")
				s.moves("wan0", "wan7", "198.51.100.1/24")
				s.LinkUp("wan7")
				s.IP(s.Gateway, "route add default via 198.51.100.254")
				s.Start(stage.Flags(mode)...)
				phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
				ext := s.Contact(phone, proxy)
				s.Stands(phone, proxy, ext)
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				s.Lost(phone, s.PeerSocket(lab.PeerC, 5070), ext, proxy)
			})
		}
	}
}
