package stage

import (
	"fmt"
	"net/netip"
	"os"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// UplinkRules are usual policy routing by connmark: packets of host two take the
// second uplink, and so does everything that belongs to its flows.
const UplinkRules = `table ip mangle {
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

// IP changes links, addresses or routes of h.
func (s *Scene) IP(h *lab.Host, args string) {
	s.T.Helper()
	_, err := h.Output("ip", strings.Fields(args)...)
	s.Must(err)
}

// AddUplink gives the gateway a second link to the outside, 198.51.100.129,
// with a routing table of its own for mark 2.
func (s *Scene) AddUplink() netip.Addr {
	s.T.Helper()
	const addr = "198.51.100.129"
	s.AddLink("wan1", addr)
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 102")
	s.IP(s.Gateway, "rule add fwmark 2 iif lan0 table 102")
	return netip.MustParseAddr(addr)
}

// AddLink adds a link between the gateway, where it has an address, and the outside.
func (s *Scene) AddLink(name, addr string) {
	s.T.Helper()
	outside := fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), s.Outside.FD())
	s.IP(s.Gateway, "link add "+name+" type veth peer name "+name+" netns "+outside)
	s.IP(s.Gateway, "address add "+addr+"/32 dev "+name)
	s.IP(s.Outside, "link set "+name+" up")
	s.IP(s.Outside, "route add "+addr+"/32 dev "+name)
	s.LinkUp(name)
}

// LinkUp brings up a link of the gateway and waits until it carries packets.
func (s *Scene) LinkUp(name string) {
	s.T.Helper()
	s.IP(s.Gateway, "link set "+name+" up")
	s.Until("the link is up", func() bool {
		out, err := s.Gateway.Output("ip", "-brief", "link", "show", name)
		s.Must(err)
		return strings.Contains(out, " UP ")
	})
}
