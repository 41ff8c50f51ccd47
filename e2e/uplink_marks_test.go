package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// secondAddr is the gateway's address on its second uplink.
const secondAddr = "10.66.0.2"

// uplinkMarks are the flags of docs/recipes/uplink-marks.md.
var uplinkMarks = []string{"--outside=wan0", "--outside=wan1", "--uplink-marks"}

// onTwoUplinks masquerades on both links, has a forward, and counts packets that leave by
// one uplink with the other's address.
const onTwoUplinks = `table ip nat {
	chain pre { type nat hook prerouting priority dstnat; iifname { "wan0", "wan1" } udp dport 7000 dnat to 10.47.11.109; }
	chain post { type nat hook postrouting priority srcnat; oifname { "wan0", "wan1" } masquerade; }
}
table ip watch {
	counter wrong { }
	chain post {
		type filter hook postrouting priority 350;
		oifname "wan0" ip saddr 10.66.0.2 counter name wrong
		oifname "wan1" ip saddr 198.51.100.1 counter name wrong
	}
}
`

// addSecondUplink makes a second uplink, and routes by both of them as the recipe does.
func (s *scene) addSecondUplink() {
	s.T.Helper()
	s.AddLink("wan1", secondAddr)
	s.IP(s.Gateway, "route add 10.66.0.0/24 dev wan1")
	s.IP(s.Outside, "addr add 10.66.0.1/24 dev wan1")
	for _, link := range []string{"all", "wan1", "eth0"} { // count packets that come the wrong way, do not drop them
		s.Must(s.Outside.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
	}
	s.Must(s.Gateway.SetSysctl("net.ipv4.conf.all.rp_filter", "1"))
	s.Must(s.Gateway.SetSysctl("net.ipv4.fib_multipath_hash_policy", "1"))
	page, err := os.ReadFile("../docs/recipes/uplink-marks.md")
	s.Must(err)
	commands := regexp.MustCompile(`(?m)^ip (.*)$`).FindAllStringSubmatch(string(page), -1)
	if len(commands) < 6 {
		s.T.Fatalf("the recipe has the commands %q", commands)
	}
	for _, c := range commands {
		s.IP(s.Gateway, c[1])
	}
}

// A flow is a flow of the inside host.
type flow struct {
	phone, proxy *lab.Socket
	ext          netip.AddrPort
}

// byBothUplinks sends from ports of the inside host until a flow leaves by each uplink, and
// returns these flows by outside address.
func (s *scene) byBothUplinks() map[netip.Addr]flow {
	s.T.Helper()
	found := make(map[netip.Addr]flow)
	for port := uint16(5060); len(found) < 2; port++ {
		if port == 5160 {
			s.T.Fatalf("all leave by %v", found)
		}
		f := flow{phone: s.InsideSocket(0, port), proxy: s.PeerSocket(lab.PeerA, port)}
		f.ext = s.Contact(f.phone, f.proxy)
		if _, known := found[f.ext.Addr()]; !known {
			found[f.ext.Addr()] = f
			s.Stands(f.phone, f.proxy, f.ext)
		}
	}
	return found
}

// answered lets a peer send from many ports, and the host answer. It returns how many
// answers left by the wrong uplink.
func (s *scene) answered(host *lab.Socket, peer netip.Addr, firstPort uint16, ext netip.AddrPort) string {
	s.T.Helper()
	s.Must(s.NFT("reset counters table ip watch"))
	for port := firstPort; port < firstPort+24; port++ {
		media := s.PeerSocket(peer, port)
		s.Arrives(host, media, ext)
		p := stage.Payload("answer of the host")
		s.Must(host.Send(media.Addr(), p))
		if from, err := media.Expect(p); err != nil || from != ext {
			s.T.Fatalf("the answer to %v by %v comes from %v: %v\n%s", media.Addr(), ext, from, err, s.Dump())
		}
	}
	list, err := s.Gateway.Output("nft", "list", "counters", "table", "ip", "watch")
	s.Must(err)
	return regexp.MustCompile(`packets \d+`).FindString(list)
}

// With two uplinks of equal cost, the answer to a peer's packet leaves by the uplink that
// the packet came by, for permissions of either backend and for a forward. Without
// uplink_marks it does not, or the test would show nothing.
//
// Fails when flows get no mark, when children get none, and when packets from inside are
// routed before they have it.
func TestChildrenAnswerByTheirUplink(t *testing.T) {
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		for name, flags := range map[string][]string{"with marks": uplinkMarks, "without": uplinkMarks[:2]} {
			t.Run(name, func(t *testing.T) {
				rules := onTwoUplinks + lab.DropPolicy
				if mode[0] == stage.NFT[0] {
					rules = onTwoUplinks
				}
				s := newScene(t, lab.Options{Rules: strings.ReplaceAll(rules, `iifname "lan0" accept`, `iifname "lan0" accept; udp dport 7000 accept`)})
				s.addSecondUplink()
				s.Start(stage.Flags(mode, flags...)...)
				marked, port := name == "with marks", uint16(20_000)
				for _, f := range s.byBothUplinks() {
					if wrong := s.answered(f.phone, lab.PeerA, port, f.ext); (wrong == "packets 0") != marked {
						t.Errorf("to children of %v: wrong %s", f.ext, wrong)
					}
					port += 100
				}
				server := s.InsideSocket(0, 7000)
				for _, addr := range []string{"198.51.100.1", secondAddr} {
					ext := netip.AddrPortFrom(netip.MustParseAddr(addr), 7000)
					if wrong := s.answered(server, lab.PeerC, port, ext); (wrong == "packets 0") != marked {
						t.Errorf("by the forward of %v: wrong %s", ext, wrong)
					}
					port += 100
				}
			})
		}
	})
}

// The user's own marks on flows, children and packets stay: all other bits, and values that
// the user sets in the uplink's bits. A flow that is older than the daemon gets its mark
// with its next packet.
//
// Fails when a mark is overwritten as a whole, when a packet's own mark is overwritten, when
// the map's mark wins over a user rule's, and when only new flows are marked.
func TestUplinkMarksLeaveTheUsersMarks(t *testing.T) {
	const rules = `table ip marks {
		counter chosen { }
		counter both { }
		chain pre { type filter hook prerouting priority mangle;
			iifname "lan0" ct state new ct mark set 0x2a
			iifname "wan0" ct state new,related udp sport 6000 ct mark set 7
			iifname "lan0" udp sport 5061 meta mark set 0x02000007
			iifname "lan0" udp sport 5062 meta mark set 5
		}
		chain forward { type filter hook forward priority filter;
			udp sport 5061 meta mark 0x02000007 counter name chosen
			udp sport 5062 meta mark 0x01000005 counter name both
		}
	}
	`
	stage.InModes(t, [][]string{stage.Auto, stage.NFT, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: lab.Masquerade + rules})
		older, peer := s.InsideSocket(0, 5063), s.PeerSocket(lab.PeerA, 5063)
		s.Arrives(older, peer, s.Contact(older, peer)) // no longer a new flow
		mark := func(flow ...string) string {
			s.T.Helper()
			lines := s.ConntrackList(append([]string{"-p", "udp"}, flow...)...)
			if len(lines) != 1 {
				t.Fatalf("%v is %q", flow, lines)
			}
			return regexp.MustCompile(`mark=\d+`).FindString(lines[0])
		}
		has := func(want string, flow ...string) {
			s.T.Helper()
			if got := mark(flow...); got != want {
				t.Errorf("%v has %s, want %s", flow, got, want)
			}
		}
		has("mark=42", "--orig-port-src", "5063")
		s.Start(stage.Flags(mode, "--outside=wan0", "--uplink-marks")...)
		const both = "mark=16777258" // 0x0100002a
		for port := uint16(5060); port < 5063; port++ {
			phone, proxy := s.InsideSocket(0, port), s.PeerSocket(lab.PeerA, port)
			ext := s.Contact(phone, proxy)
			s.Stands(phone, proxy, ext)
			has(both, "--orig-port-src", fmt.Sprint(port))
			s.Arrives(phone, proxy, ext)
			s.Contact(phone, proxy) // a packet of a flow that has its mark
			if port == 5060 {
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 5070), ext)
				has(both, "--orig-port-src", "5070")
				s.Arrives(phone, s.PeerSocket(lab.PeerA, 6000), ext)
				has("mark=16777223", "--orig-port-src", "6000") // 0x01000007
			}
		}
		for name, want := range map[string]string{"chosen": "packets 2", "both": "packets 1"} {
			list, err := s.Gateway.Output("nft", "list", "counter", "ip", "marks", name)
			s.Must(err)
			if !strings.Contains(list, want+" ") {
				t.Errorf("want %s: %s", want, list)
			}
		}
		s.Contact(older, peer)
		has(both, "--orig-port-src", "5063")
		s.Stop()
		s.Contact(older, peer)
		has(both, "--orig-port-src", "5063")
	})
}
