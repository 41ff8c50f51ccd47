package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// Flows with another source address than the rules would now give them.

const heal = "--heal-flows"

// tracked are rules that turn on connection tracking, but not NAT.
const tracked = "table inet f { chain forward { type filter hook forward priority filter; ct state invalid drop; }; }\n"

// A brokenPlay breaks a flow of the first inside host to peer A. After healing, its packets
// have the source address good.
type brokenPlay struct {
	rules, source string // source is what status names, empty where the flow is untranslated
	breaks        func(s *scene)
	link          string
	good          string
}

var brokenPlays = map[string]brokenPlay{
	// The flow began before the rule existed; its packets still leave untranslated.
	"older than the rule": {
		tracked, "", func(s *scene) { s.Must(s.NFT(lab.Masquerade)) }, "wan0", "198.51.100.1",
	},
	"older than the rule, of iptables-legacy": {
		tracked, "", func(s *scene) { s.Must(s.IPTables(lab.IPTablesLegacy, lab.IPTablesMasquerade)) }, "wan0", "198.51.100.1",
	},
	"older than a map": {
		tracked, "", func(s *scene) {
			s.Must(s.NFT(natChain("srcnat", "snat to ip saddr map { 10.47.11.109 : 198.51.100.1 }")))
		}, "wan0", "198.51.100.1",
	},
	"older than a 1:1 rule of iptables": {
		tracked, "", func(s *scene) {
			s.IP(s.Outside, "route add 198.51.100.8/30 via 198.51.100.1")
			s.Must(s.IPTables(lab.IPTablesNFT, "*nat\n-A POSTROUTING -o wan0 -s 10.47.11.108/30 -j NETMAP --to 198.51.100.8/30\nCOMMIT\n"))
		}, "wan0", "198.51.100.9",
	},
	// A re-dial changes the address, and a script replaces the rule.
	"another address": {
		fixedSource("wan0", "198.51.100.1"), "198.51.100.1", func(s *scene) {
			s.IP(s.Outside, "route add 198.51.100.9/32 via 198.51.100.1")
			s.IP(s.Gateway, "address add 198.51.100.9/24 dev wan0")
			s.Must(s.NFT("flush chain ip nat postrouting; add rule ip nat postrouting oifname wan0 snat to 198.51.100.9"))
			s.IP(s.Gateway, "address del 198.51.100.1/24 dev wan0")
			s.IP(s.Gateway, "address replace 198.51.100.9/24 dev wan0")
			s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan0")
		}, "wan0", "198.51.100.9",
	},
	// The kernel's counters show that nobody answers to the address of the other uplink.
	"another uplink": {
		eachItsOwn, "198.51.100.1", func(s *scene) {
			s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan1 onlink")
		}, "wan1", "198.51.100.129",
	},
	"another uplink, by a map": {
		natTable(`snat to oifname map { "wan0" : 198.51.100.1, "wan1" : 198.51.100.129 }`), "198.51.100.1", func(s *scene) {
			s.IP(s.Gateway, "route replace default via 198.51.100.254 dev wan1 onlink")
		}, "wan1", "198.51.100.129",
	},
	"another uplink, and the first is down": {
		eachItsOwn, "198.51.100.1", func(s *scene) { s.IP(s.Gateway, "link set wan0 down") }, "wan1", "198.51.100.129",
	},
}

// eachItsOwn are rules that translate to the address of each uplink.
var eachItsOwn = fixedSource("wan0", "198.51.100.1", "wan1", "198.51.100.129")

// fixedSource is a table that translates to an address on each link.
func fixedSource(linksAndAddrs ...string) string {
	var rules []string
	for pair := range slices.Chunk(linksAndAddrs, 2) {
		rules = append(rules, "oifname "+pair[0]+" snat to "+pair[1])
	}
	return natTable(rules...)
}

// natTable is a table with a source NAT chain.
func natTable(rules ...string) string {
	return "table ip nat { chain postrouting { type nat hook postrouting priority srcnat; " + strings.Join(rules, "; ") + "; }; }"
}

// broken plays until the flow is broken, and returns its endpoints.
func (tt brokenPlay) broken(t *testing.T, args ...string) (s *scene, phone, peer *lab.Socket) {
	t.Helper()
	s, _ = twoUplinks(t, lab.Options{Rules: tt.rules})
	s.countPackets()
	phone, peer = s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	if tt.source == "" {
		s.Must(phone.Send(peer.Addr(), "too early"))
	} else {
		s.Arrives(phone, peer, s.Contact(phone, peer))
	}
	s.Start(stage.Flags(args, "--reconcile=1h")...)
	tt.breaks(s)
	return s, phone, peer
}

// named waits until status reports the flow.
func (tt brokenPlay) named(s *scene, phone, peer *lab.Socket) {
	s.T.Helper()
	want := control.BrokenFlows{Subnet: lab.InsideNet, Link: tt.link, Flows: 1, Int: phone.Addr(), Peer: peer.Addr()}
	if tt.source != "" {
		want.Source = netip.MustParseAddr(tt.source)
	}
	var got []control.BrokenFlows
	s.Until("status tells of the flow", func() bool {
		s.Must(phone.Send(peer.Addr(), "nobody answers"))
		got = s.Status().BrokenFlows
		return slices.Equal(got, []control.BrokenFlows{want})
	})
	if st := s.Status(); !stage.Warned(st, "1 flow of 10.47.11.0/24 left by "+tt.link) {
		s.T.Errorf("warnings %q", st.Warnings)
	}
}

// insideIDs returns the identifiers of the flows of inside hosts.
func (s *scene) insideIDs() (all []string) {
	s.T.Helper()
	for _, f := range s.insideFlows() {
		all = append(all, f[strings.LastIndex(f, " id=")+1:])
	}
	slices.Sort(all)
	return all
}

// countPackets lets the kernel count the packets of new flows.
func (s *scene) countPackets() {
	s.T.Helper()
	s.Must(s.Gateway.SetSysctl(accounting, "1"))
}

// Fails when a broken flow is not seen, and when it does not end.
func TestBrokenFlowsAreHealed(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tt := range brokenPlays {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, phone, peer := tt.broken(t, heal)
			s.heals(phone, peer, netip.MustParseAddr(tt.good))
			s.Until("status tells of no flow", func() bool {
				st := s.Status()
				return len(st.BrokenFlows) == 0 && st.Counters.Healed == 1
			})
			ext := netip.AddrPortFrom(netip.MustParseAddr(tt.good), 5060)
			s.Stands(phone, peer, ext)
			s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
		})
	}
}

// Without heal_flows broken flows are reported, but not ended.
//
// Fails when a flow ends.
func TestBrokenFlowsAreCountedAlone(t *testing.T) {
	t.Parallel() // mostly it waits
	for name, tt := range brokenPlays {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, phone, peer := tt.broken(t)
			tt.named(s, phone, peer)
			before := s.insideIDs()
			for range 2 {
				s.readAgain()
				tt.named(s, phone, peer)
			}
			if after := s.insideIDs(); !slices.Equal(after, before) || s.Status().Counters.Healed != 0 {
				t.Errorf("before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
			}
		})
	}
}

// Rules exempt one flow, may exempt another, and a third is answered although it is
// untranslated. None of them ends when the flow that is surely broken is healed, nor later.
//
// Fails when a flow ends that rules exempt, that they may exempt, or that works.
func TestFlowsThatMayWorkAreNotHealed(t *testing.T) {
	const rules = `table ip nat { chain postrouting { type nat hook postrouting priority srcnat;
	ip daddr 203.0.113.6 accept
	udp sport 7000 meta mark 7 accept
	oifname wan0 masquerade
}; }`
	s := newScene(t, lab.Options{Inside: 3, Rules: tracked})
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600")) // only healing may end a flow
	s.IP(s.Outside, "route add 10.47.11.111/32 via 198.51.100.1")
	broken, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	answered, other := s.InsideSocket(2, 5060), s.PeerSocket(lab.PeerC, 5060)
	s.Must(s.InsideSocket(0, 5061).Send(s.PeerSocket(lab.PeerB, 5060).Addr(), "exempt"))
	s.Must(s.InsideSocket(1, 7000).Send(peer.Addr(), "marked, for all that is known"))
	s.Arrives(answered, other, s.Contact(answered, other))
	before := s.insideFlows()
	if len(before) != 3 {
		t.Fatalf("flows %q", before)
	}
	s.Must(broken.Send(peer.Addr(), "too early"))
	s.Start(stage.Flags([]string{heal}, "--reconcile=1h")...)
	s.Must(s.NFT(rules))
	s.heals(broken, peer, s.Gateway.Addr)
	s.Until("status tells of no flow", func() bool { return len(s.Status().BrokenFlows) == 0 })
	s.readAgain()
	s.Until("another look was made", func() bool { return len(s.Status().BrokenFlows) == 0 })
	after := s.insideFlows()
	for _, f := range before {
		if !slices.Contains(after, f) {
			t.Errorf("it ended: %s\nleft are:\n%s", f, strings.Join(after, "\n"))
		}
	}
	if n := s.Status().Counters.Healed; n != 1 {
		t.Errorf("%d flows were healed, want 1", n)
	}
}

// A workingPlay changes the rules or the route for a working flow of the first inside host
// to peer A. The flow of the second host is translated only after the change, and so breaks.
type workingPlay struct {
	commands []string // of ip(8), before the flow begins
	rules    string   // translate the flow
	change   []string // of ip(8)
	after    string   // the rules after the change
	counted  bool     // the kernel counts packets
	oneWay   bool     // nobody answers, or nobody needs to
	fence    string   // the second host's address after healing; empty if none of its flows is healed
}

// talk sends a packet, and an answer unless the flow is one-way.
func (tt workingPlay) talk(phone, peer *lab.Socket) error {
	if tt.oneWay {
		_, _, _ = phone.Recv(20 * time.Millisecond) // not too fast
		return phone.Send(peer.Addr(), "nobody answers")
	}
	ext, err := phone.Contact(peer)
	if err != nil {
		return err
	}
	answer := stage.Payload("answer")
	if err := peer.Send(ext, answer); err != nil {
		return err
	}
	_, err = phone.Expect(answer)
	return err
}

var workingPlays = map[string]workingPlay{
	"a routed address, and another one": {
		rules: "snat to 198.51.100.200", after: "snat to 198.51.100.201", fence: "198.51.100.201",
	},
	"a routed address of a blackhole route, and a link had it": {
		commands: []string{"route add blackhole 198.51.100.200/30", "address add 198.51.100.200/32 dev wan0"},
		rules:    "snat to 198.51.100.200", change: []string{"address del 198.51.100.200/32 dev wan0"}, after: "snat to 198.51.100.1",
		fence: "198.51.100.1",
	},
	"an address of the link, and another one": {
		commands: []string{"address add 198.51.100.200/32 dev wan0"},
		rules:    "snat to 198.51.100.200", after: "snat to 198.51.100.1",
		fence: "198.51.100.1",
	},
	"answers come by the other uplink": {
		rules:  "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129",
		change: []string{"route replace 203.0.113.5/32 via 198.51.100.254 dev wan1 onlink"},
		after:  "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129",
		fence:  "198.51.100.1",
	},
	"answers come by the other uplink, and are counted": {
		rules:   "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129",
		change:  []string{"route replace 203.0.113.5/32 via 198.51.100.254 dev wan1 onlink"},
		after:   "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129",
		counted: true, fence: "198.51.100.1",
	},
	"by an uplink without an address of its own": {
		commands: []string{
			"address flush dev wan1", "address add 169.254.7.1/32 dev wan1 scope link",
			"address flush dev lan0", "address add 10.47.11.1/24 dev lan0 scope link",
			"route replace 203.0.113.5/32 via 198.51.100.254 dev wan1 onlink",
		},
		rules: "masquerade", after: "masquerade", oneWay: true, fence: "198.51.100.1",
	},
	"by a type of service": {
		commands: []string{"route add default via 198.51.100.254 dev wan1 onlink table 109", "rule add tos 0x18 table 109"},
		rules:    "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129",
		after:    "oifname wan0 snat to 198.51.100.1; oifname wan1 snat to 198.51.100.129", oneWay: true,
	},
	"to a local socket by a mark": {
		commands: []string{"route add local default dev lo table 109", "rule add fwmark 9 table 109"},
		rules:    "masquerade", after: "masquerade", oneWay: true,
	},
}

// Rules or routes change, and working flows go on.
//
// Fails when a working flow ends.
func TestFlowsThatWorkAreNotHealed(t *testing.T) {
	t.Parallel() // mostly it waits
	const before = `table ip m { chain prerouting { type filter hook prerouting priority mangle;
	ip saddr 10.47.11.109 ip dscp set 6; ip saddr 10.47.11.109 meta mark set 9; }; }
table ip nat { chain postrouting { type nat hook postrouting priority srcnat; ip saddr 10.47.11.110 accept; `
	for name, tt := range workingPlays {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s, _ := twoUplinks(t, lab.Options{Inside: 2, Rules: before + tt.rules + "; }; }"})
			for _, a := range []string{routedAddr, "198.51.100.201"} {
				s.IP(s.Outside, "route add "+a+"/32 via 198.51.100.1 dev eth0")
			}
			for _, c := range tt.commands {
				s.IP(s.Gateway, c)
			}
			if tt.counted {
				s.countPackets()
			}
			phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
			if !tt.oneWay {
				s.Arrives(phone, peer, s.Contact(phone, peer))
			} else {
				s.Must(phone.Send(peer.Addr(), "nobody answers"))
			}
			works := s.insideIDs()
			if len(works) != 1 {
				t.Fatalf("flows %q", works)
			}
			fence, other := s.InsideSocket(1, 5060), s.PeerSocket(lab.PeerB, 5060)
			s.Must(fence.Send(other.Addr(), "too early"))
			s.Start(stage.Flags([]string{heal}, "--outside=wan0", "--outside=wan1", "--reconcile=1h")...)
			for _, c := range tt.change {
				s.IP(s.Gateway, c)
			}
			s.Must(s.NFT("flush chain ip nat postrouting\ntable ip nat { chain postrouting { " + tt.after + "; }; }"))
			began := time.Now()
			stop := s.Steady(func() error { return tt.talk(phone, peer) })
			if tt.fence != "" {
				s.heals(fence, other, netip.MustParseAddr(tt.fence))
			}
			long := 4 * time.Second
			if tt.counted {
				long = 14 * time.Second // the daemon takes ten seconds to see that nobody answers
			}
			s.UntilIn(time.Minute, "it looked at flows some times", func() bool { s.readAgain(); return time.Since(began) > long })
			stop()
			if after := s.insideIDs(); !slices.Contains(after, works[0]) {
				t.Errorf("it ended: %s\nleft are:\n%s", works[0], strings.Join(after, "\n"))
			}
		})
	}
}
