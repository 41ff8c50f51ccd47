package cone

import (
	"net/netip"
	"testing"
)

func TestFlowsThatGiveNoPermission(t *testing.T) {
	p := testPolicy
	p.Subnets = append(p.Subnets, Subnet{Prefix: netip.MustParsePrefix("2001:db8:47::/64"), Routed: true})
	p.ExcludePeers = []netip.Prefix{netip.MustParsePrefix("203.0.113.128/25")}
	p.ExcludePorts = []uint16{4500}
	topology := Topology{Local: []netip.Addr{netip.MustParseAddr("198.51.100.1")}, Routes: []Route{
		{netip.MustParsePrefix("0.0.0.0/0"), true},
		{netip.MustParsePrefix("::/0"), true},
		{netip.MustParsePrefix("10.47.11.0/24"), false},
		{netip.MustParsePrefix("10.47.12.0/24"), false},
		{netip.MustParsePrefix("192.0.2.0/24"), false},
		{netip.MustParsePrefix("192.0.2.128/25"), true}, // an uplink behind an inside network
		{netip.MustParsePrefix("198.51.100.0/24"), true},
		{netip.MustParsePrefix("198.51.100.0/24"), false}, // in another table
	}}
	const in, ext = "10.47.11.109:5060", "198.51.100.1:5060"
	const in6 = "[2001:db8:47::109]:5060"
	snat := StatusSrcNAT
	for name, tc := range map[string]struct {
		in, peer, ext string
		status        Status
		want          Reason
		silent        bool // not even counted
	}{
		"the seed":                       {in: in, peer: "203.0.113.5:5060", ext: ext, status: snat},
		"behind an uplink inside":        {in: in, peer: "192.0.2.200:5060", ext: ext, status: snat},
		"routed IPv6":                    {in: in6, peer: "[2001:db8:5::5]:5060", ext: in6},
		"DNS":                            {in: in, peer: "203.0.113.5:53", ext: ext, status: snat, want: ReasonExcludedPeerPort},
		"excluded peer":                  {in: in, peer: "203.0.113.200:5060", ext: ext, status: snat, want: ReasonExcludedPeer},
		"excluded outside port":          {in: in, peer: "203.0.113.5:5060", ext: "198.51.100.1:4500", status: snat, want: ReasonExcludedPort},
		"guest network":                  {in: in, peer: "10.47.12.20:5060", ext: "10.47.12.1:5060", status: snat, want: ReasonPeerInside},
		"its own network":                {in: in, peer: "10.47.11.110:5060", ext: "10.47.11.1:5060", status: snat, want: ReasonPeerInside},
		"inside by a route":              {in: in, peer: "192.0.2.5:5060", ext: ext, status: snat, want: ReasonPeerInside},
		"inside in one of two tables":    {in: in, peer: "198.51.100.9:5060", ext: ext, status: snat, want: ReasonPeerInside},
		"multicast":                      {in: in, peer: "239.1.1.1:5060", ext: ext, status: snat, want: ReasonNotUnicast},
		"broadcast":                      {in: in, peer: "255.255.255.255:5060", ext: ext, status: snat, want: ReasonNotUnicast},
		"this network":                   {in: in, peer: "0.1.2.3:5060", ext: ext, status: snat, want: ReasonNotUnicast},
		"link-local":                     {in: in, peer: "169.254.1.1:5060", ext: ext, status: snat, want: ReasonNotUnicast},
		"loopback":                       {in: in, peer: "127.0.0.1:5060", ext: ext, status: snat, want: ReasonNotUnicast},
		"IPv6 multicast":                 {in: in6, peer: "[ff02::1]:5060", ext: in6, want: ReasonNotUnicast},
		"port 0 inside and outside":      {in: "10.47.11.109:0", peer: "203.0.113.5:5060", ext: "198.51.100.1:0", status: snat, want: ReasonPortZero},
		"port 0 of the peer":             {in: in, peer: "203.0.113.5:0", ext: ext, status: snat, want: ReasonPortZero},
		"not translated, not routed":     {in: in, peer: "203.0.113.5:5060", ext: in, want: ReasonUntranslated},
		"not translated, towards us":     {in: in, peer: "198.51.100.1:5060", ext: in, silent: true},
		"not translated, inside":         {in: in, peer: "10.47.12.20:5060", ext: in, silent: true},
		"not translated, redirected":     {in: in, peer: "203.0.113.5:5060", ext: in, status: StatusDstNAT, silent: true},
		"subnet that is not enabled":     {in: "10.47.12.20:5060", peer: "203.0.113.5:5060", ext: ext, status: snat, silent: true},
		"IPv6 host that is not enabled":  {in: "[2001:db8:48::20]:5060", peer: "[2001:db8:5::5]:5060", ext: "[2001:db8:48::20]:5060", silent: true},
		"an IPv4 subnet is not an IPv6 ": {in: "[::ffff:0:109]:5060", peer: "[2001:db8:5::5]:5060", ext: ext, status: snat, silent: true},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(p)
			m.SetTopology(0, topology)
			m.FlowSeen(0, &Flow{
				ID: 1, Status: tc.status,
				Src: ep(tc.in), Dst: ep(tc.peer), ReplySrc: ep(tc.peer), ReplyDst: ep(tc.ext),
			})
			grants := 0
			for _, o := range m.Ops() {
				if o.Kind == Grant {
					grants++
				}
			}
			wanted := tc.want == ReasonNone && !tc.silent
			if (grants == 1) != wanted {
				t.Errorf("%d grants, wanted: %v", grants, wanted)
			}
			for r, n := range m.Stats().Skipped {
				if want := Reason(r) == tc.want && tc.want != ReasonNone; (n == 1) != want {
					t.Errorf("skipped %d for %q, want it for %q", n, Reason(r), tc.want)
				}
			}
		})
	}
}

// A transparent redirect: the packet goes to another peer than the inside host thinks, and
// that peer may answer, unless the port that it goes to is excluded.
func TestPeerOfARedirectedFlowIsWhoGetsIt(t *testing.T) {
	for name, tc := range map[string]struct {
		asked, gets string
		grants      int
	}{
		"to another port":      {"203.0.113.5:5060", "192.0.2.77:5062", 1},
		"to an excluded port":  {"203.0.113.5:5353", "192.0.2.77:53", 0},
		"from an excluded one": {"203.0.113.5:53", "192.0.2.77:5353", 1},
	} {
		t.Run(name, func(t *testing.T) {
			m := New(testPolicy)
			m.SetTopology(0, testTopology)
			m.FlowSeen(0, &Flow{
				Status: StatusSrcNAT | StatusDstNAT,
				Src:    ep("10.47.11.109:5060"), Dst: ep(tc.asked),
				ReplySrc: ep(tc.gets), ReplyDst: ep("198.51.100.1:5060"),
			})
			ops := m.Ops()
			if len(ops) != tc.grants || tc.grants > 0 && ops[0].Peer != ep(tc.gets).Addr {
				t.Errorf("ops: %+v", ops)
			}
		})
	}
}

func TestEventsAllocateNothingOnceTheFlowIsKnown(t *testing.T) {
	m := New(testPolicy)
	m.SetTopology(0, testTopology)
	f := Flow{
		ID: 1, Status: StatusSrcNAT,
		Src: ep("10.47.11.109:5060"), Dst: ep("203.0.113.5:5060"),
		ReplySrc: ep("203.0.113.5:5060"), ReplyDst: ep("198.51.100.1:5060"),
	}
	cycle := func() {
		m.FlowSeen(0, &f)
		for _, o := range m.Ops() {
			m.Granted(o.Permission)
		}
		m.FlowGone(0, &f)
		m.Review(0, func(Permission) Reason { return ReasonForwarded }) // ends it
		m.Ops()
	}
	cycle()
	if n := testing.AllocsPerRun(100, cycle); n != 0 {
		t.Errorf("%v allocations for a permission's life", n)
	}
}
