package e2e

import (
	"net/netip"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// The second uplink comes while the daemon runs. Its default route is in a table
// that only marked packets use; a child must carry the mark, or its answers
// would leave by the first uplink.
func TestNewUplinkWithPolicyRoutingByConnmark(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: stage.UplinkRules})
	s.Start("--subnet", lab.InsideNet.String())
	addr := s.AddUplink()
	s.Until("the daemon knows both uplinks", func() bool { return len(s.Status().Outside) == 2 })

	one, two, proxy := s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerA, 5060)
	extOne, extTwo := s.Contact(one, proxy), s.Contact(two, proxy)
	if extOne.Addr() != s.Gateway.Addr || extTwo.Addr() != addr {
		t.Fatalf("outside endpoints %v and %v", extOne, extTwo)
	}
	s.Stands(one, proxy, extOne)
	s.Stands(two, proxy, extTwo)
	for in, ext := range map[*lab.Socket]netip.AddrPort{one: extOne, two: extTwo} {
		media := s.PeerSocket(lab.PeerA, ext.Port()+uint16(ext.Addr().As4()[3]))
		s.Arrives(in, media, ext)
		p := stage.Payload("reply to child")
		s.Must(in.Send(media.Addr(), p))
		from, err := media.Expect(p)
		s.Must(err)
		if from != ext {
			t.Errorf("the reply to a child of %v comes from %v", ext, from)
		}
	}

	// The uplink goes, and its permissions with it; the other one stays.
	s.IP(s.Gateway, "link del wan1")
	s.Until("its permission ended", func() bool { return len(s.InKernel()) == 1 })
	s.Arrives(one, s.PeerSocket(lab.PeerA, 6000), extOne)
}

// A router advertisement or a backup gives an inside link a default route: reload and the
// next start go on, and hosts are reached. Fails where such a subnet is refused.
func TestInsideLinkWithADefaultRoute(t *testing.T) {
	s := play(t, lab.Options{})
	phone, proxy := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	s.IP(s.Gateway, "route add default via "+s.Inside(0).Addr.String()+" dev lan0 metric 200")
	s.Until("it is told", func() bool { return s.warns("holds the network of the outside link lan0") })
	if out, code := s.CLI("reload", "--control-socket", s.Daemon.Socket); code != 0 {
		t.Errorf("reload: exit %d, %q", code, out)
	}
	s.Stop()
	s.Start("--subnet", lab.InsideNet.String())
	ext := s.Contact(phone, proxy)
	s.Stands(phone, proxy, ext)
	s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
}
