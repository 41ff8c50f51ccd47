package guest

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// newVRF makes a gateway whose outside link, and that of its guests, are in a VRF. The inside
// link is not, so routes lead from one to the other.
func newVRF(t *testing.T, rules string) *stage.Scene {
	t.Helper()
	s := stage.New(t, lab.Options{Guest: true, Rules: rules})
	if _, err := s.Gateway.Output("ip", "link", "add", "vrf0", "type", "vrf", "table", "10"); err != nil {
		if os.Getenv("CONENATD_GUEST") == "" {
			t.Skipf(`this kernel has no VRF (%v): run "make kernels"`, err)
		}
		t.Fatal(err)
	}
	for _, args := range []string{
		"link set vrf0 up", "link set wan0 master vrf0", "link set guest0 master vrf0",
		"route add default via 198.51.100.254 dev wan0 onlink table 10",
		"route replace default via 198.51.100.254 dev wan0 onlink",
		"route add 10.47.12.0/24 dev guest0",
		"route add 10.47.11.0/24 dev lan0 table 10",
		"neigh replace 198.51.100.254 lladdr 02:47:c6:33:64:fe dev wan0 nud permanent",
		"neigh replace 10.47.12.20 lladdr 02:47:0a:2f:0c:14 dev guest0 nud permanent",
	} {
		s.IP(s.Gateway, args)
	}
	return s
}

// The forward hook sees the name of the VRF, not of the link. Peers get in by an outside
// link in a VRF, up to max_children flows. A guest in the same VRF that fakes their
// address does not.
//
// Fails when chain child looks at iifname alone.
func TestPeersComeByALinkInAVRF(t *testing.T) {
	for _, mode := range [][]string{stage.Expect, stage.Auto} {
		t.Run(mode[0], func(t *testing.T) {
			s := newVRF(t, lab.Masquerade+lab.DropPolicy)
			s.Start(stage.Flags(mode, "--max-children=2")...)
			phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)

			s.IP(s.Guest, "addr add "+lab.PeerA.String()+"/32 dev lo")
			guest := s.Socket(s.Guest.Namespace, s.Guest.Addr, 5060)
			seen := s.Contact(phone, guest)
			s.Must(lab.Lost(phone,
				lab.Packet{From: s.Socket(s.Guest.Namespace, lab.PeerA, 5070), To: ext, Payload: stage.Payload("faked")},
				lab.Packet{From: guest, To: seen, Payload: stage.Payload("fence")}))
			if n := s.Status().Tables.Guard.Spoofed; n != 1 {
				t.Errorf("%d packets were dropped, want the guest's", n)
			}

			for port := range uint16(2) {
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070+port), ext)
			}
			s.Lost(phone, s.PeerSocket(lab.PeerA, 5080), ext, proxy)
		})
	}
}

// The guard does not know links in a VRF, so early packets become flows to the gateway there,
// and the events of all flows are heard. Such a flow does not lock its peer out, and its end,
// and that of the host's own flow, are noticed without a reconcile.
//
// Fails when events are filtered by source beside a VRF.
func TestEarlyPacketByALinkInAVRF(t *testing.T) {
	for _, mode := range [][]string{stage.Expect, stage.Auto, stage.NFT} {
		t.Run(mode[0], func(t *testing.T) {
			s := newVRF(t, lab.Masquerade)
			// The early flow must not end by itself.
			s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
			s.Start(stage.Flags(mode, "--reconcile=1h")...)
			if got := s.Status().Outside; !slices.Equal(got, []string{"wan0"}) {
				t.Errorf("outside links %q", got)
			}
			phone, proxy, media := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerA, 5070)
			early := netip.AddrPortFrom(s.Gateway.Addr, 5060)
			s.Must(media.Send(early, stage.Payload("early")))
			hasFlow := func() bool {
				return slices.ContainsFunc(s.ConntrackList("-p", "udp"), func(l string) bool {
					return strings.Contains(l, "src=203.0.113.5 dst=198.51.100.1 sport=5070 dport=5060") && strings.Contains(l, "UNREPLIED")
				})
			}
			s.Until("the early packet has a flow", hasFlow)
			ext := s.Contact(phone, proxy)
			if ext != early {
				t.Fatalf("outside endpoint %v, want %v", ext, early)
			}
			s.Stands(phone, proxy, ext)
			s.Until("the early flow is gone", func() bool { return !hasFlow() })
			s.Arrives(phone, media, ext)
			s.Until("the child is known", func() bool { return s.List()[0].Children == 1 })
			_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-src", s.Inside(0).Addr.String(), "--sport", "5060", "--dport", "5060")
			s.Must(err)
			s.Until("the end of its flow is known", func() bool { return s.List()[0].Flows == 0 })
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5071), ext)
		})
	}
}
