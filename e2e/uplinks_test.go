package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// uplinkRules are policy routing by connmark as people write it: what host two
// sends takes the second uplink, and so does everything that belongs to it.
const uplinkRules = `table ip mangle {
	chain prerouting {
		type filter hook prerouting priority mangle;
		ct mark != 0 meta mark set ct mark
		iifname "lan0" ip saddr 10.47.11.110 ct mark 0 meta mark set 2
		ct mark set meta mark
	}
}
table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname { "wan0", "wan1" } masquerade
	}
}
`

// addUplink gives the gateway a second link to the outside, 198.51.100.129,
// with a routing table of its own for mark 2.
func (s *scene) addUplink() netip.Addr {
	s.T.Helper()
	const addr = "198.51.100.129"
	s.addLink("wan1", addr)
	s.ip(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 102")
	s.ip(s.Gateway, "rule add fwmark 2 iif lan0 table 102")
	return netip.MustParseAddr(addr)
}

// addLink adds a link between the gateway, where it has an address, and the outside.
func (s *scene) addLink(name, addr string) {
	s.T.Helper()
	outside := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.Outside.FD())
	s.ip(s.Gateway, "link add "+name+" type veth peer name "+name+" netns "+outside)
	s.ip(s.Gateway, "address add "+addr+"/32 dev "+name)
	s.ip(s.Gateway, "link set "+name+" up")
	s.ip(s.Outside, "link set "+name+" up")
	s.ip(s.Outside, "route add "+addr+"/32 dev "+name)
	s.Until("the link is up", func() bool {
		out, err := s.Gateway.Output("ip", "-brief", "link", "show", name)
		s.Must(err)
		return strings.Contains(out, " UP ")
	})
}

// The second uplink comes while the daemon runs. Its default route is in a table
// that only marked packets use; a child must carry the mark, or its answers
// would leave by the first uplink.
func TestNewUplinkWithPolicyRoutingByConnmark(t *testing.T) {
	s := newScene(t, lab.Options{Inside: 2, Rules: uplinkRules})
	s.Start("--subnet", lab.InsideNet.String())
	addr := s.addUplink()
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
	s.ip(s.Gateway, "link del wan1")
	s.Until("its permission ended", func() bool { return len(s.InKernel()) == 1 })
	s.Arrives(one, s.PeerSocket(lab.PeerA, 6000), extOne)
}
