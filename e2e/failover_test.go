package e2e

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Flows with mappings when an uplink fails.

const bothUplinks = `table ip nat {
	chain postrouting {
		type nat hook postrouting priority srcnat;
		oifname { "wan0", "wan1" } masquerade
	}
}
`

// twoUplinks makes a lab with two uplinks; the first is in use.
func twoUplinks(t *testing.T, o lab.Options) (s *scene, second netip.Addr) {
	t.Helper()
	second = netip.MustParseAddr("198.51.100.129")
	s = newScene(t, o)
	s.AddLink("wan1", second.String())
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink metric 200")
	return s, second
}

// heals sends from in to peer until peer sees packets from addr, and returns how long that
// took.
func (s *scene) heals(in, peer *lab.Socket, addr netip.Addr) time.Duration {
	s.T.Helper()
	began := time.Now()
	s.Until("the flow has the address of its link", func() bool {
		s.Must(in.Send(peer.Addr(), stage.Payload("after the failover")))
		for {
			_, from, err := peer.Recv(20 * time.Millisecond)
			if err != nil || from.Addr() == addr {
				return err == nil
			}
		}
	})
	return time.Since(began)
}

// An uplink fails. Every flow moves to the other one, as flows without a mapping do: the one
// that the user's rules translated first, and those that took over its mapping.
func TestNFTFailoverHealsAllFlowsOfAMapping(t *testing.T) {
	t.Parallel() // mostly it waits
	for way, fail := range map[string]string{
		"by route":  "route replace default via 198.51.100.254 dev wan1 onlink",
		"link down": "link set wan0 down",
		"by rule":   "rule add iif lan0 table 109",
	} {
		for how, rules := range map[string]struct{ nft, legacy string }{
			"masquerade": {bothUplinks, ""},
			"a fixed address for others": {strings.Replace(bothUplinks, "\t\toifname",
				"\t\tip saddr 192.168.9.9 snat to 198.51.100.1\n\t\toifname", 1), ""},
			"a fixed address for others, by iptables-legacy": {
				lab.NoRules, "*nat\n-A POSTROUTING -s 192.168.9.9 -j SNAT --to-source 198.51.100.1\n-A POSTROUTING -o wan+ -j MASQUERADE\nCOMMIT\n",
			},
		} {
			t.Run(way+", "+how, func(t *testing.T) {
				t.Parallel()
				s, second := twoUplinks(t, lab.Options{Rules: rules.nft})
				if rules.legacy != "" {
					s.Must(s.IPTables(lab.IPTablesLegacy, rules.legacy))
				}
				s.Serve(mapped, "--reconcile=1h")
				s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
				s.Until("both uplinks are known", func() bool { return len(s.Status().Outside) == 2 })
				phone := s.InsideSocket(0, 5060)
				peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 5060), s.PeerSocket(lab.PeerB, 5060), s.PeerSocket(lab.PeerC, 5060)}
				for _, peer := range peers {
					ext := s.Contact(phone, peer)
					if ext.Addr() != s.Gateway.Addr {
						t.Fatalf("it leaves as %v", ext)
					}
					s.Arrives(phone, peer, ext)
				}
				s.IP(s.Gateway, fail)
				for i, peer := range peers {
					t.Logf("flow %d healed after %v", i, s.heals(phone, peer, second))
				}
			})
		}
	}
}

// Nobody answers when the uplink fails, as when the provider is dead. Packets of these flows pass
// the rules that learn, and leave by the other uplink before the daemon ends the flows. They do
// not make the old address that of the other uplink.
func TestNFTFailoverHealsFlowsThatNobodyAnswers(t *testing.T) {
	t.Parallel() // mostly it waits
	for way, fail := range map[string]string{
		"by route": "route replace default via 198.51.100.254 dev wan1 onlink",
		"by rule":  "rule add iif lan0 table 109",
	} {
		t.Run(way, func(t *testing.T) {
			t.Parallel()
			s, second := twoUplinks(t, lab.Options{Inside: 2, Rules: bothUplinks})
			s.Serve(mapped, "--reconcile=1h")
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.Until("both uplinks are known", func() bool { return len(s.Status().Outside) == 2 })
			peer := s.PeerSocket(lab.PeerA, 5060)
			phones := []*lab.Socket{s.InsideSocket(0, 5060), s.InsideSocket(1, 5060), s.InsideSocket(1, 5061)}
			for _, phone := range phones {
				if ext := s.Contact(phone, peer); ext.Addr() != s.Gateway.Addr {
					t.Fatalf("it leaves as %v", ext)
				}
			}
			s.IP(s.Gateway, fail)
			for i, phone := range phones {
				t.Logf("flow %d healed after %v", i, s.heals(phone, peer, second))
			}
			for i, phone := range phones {
				if ext := s.Contact(phone, s.PeerSocket(lab.PeerB, uint16(6000+i))); ext.Addr() != second {
					t.Errorf("a new flow leaves as %v", ext)
				}
			}
		})
	}
}

// A flow may change its link and keep the right address: the user translates to one address
// on both links, or routes marked packets by another link than unmarked ones. Such flows go
// on.
func TestNFTFailoverEndsNoFlowWhoseAddressIsRight(t *testing.T) {
	t.Parallel() // mostly it waits
	const byRoute = "route del default via 198.51.100.254 dev wan0"
	one := func(s *scene) bool { return len(s.Status().Outside) == 1 }
	for name, tc := range map[string]struct {
		rules, legacy, change string
		host                  int
		lands                 func(s *scene) bool
	}{
		"one address on both links": {strings.Replace(bothUplinks, "masquerade", "snat to 198.51.100.1", 1), "", byRoute, 0, one},
		"one address on both links, by iptables-legacy": {
			lab.NoRules, "*nat\n-A POSTROUTING -o wan+ -j SNAT --to-source 198.51.100.1\nCOMMIT\n", byRoute, 0, one,
		},
		"marked packets": {
			stage.UplinkRules, "", "route add default via 198.51.100.254 dev wan2 onlink metric 300", 1,
			func(s *scene) bool { return len(s.Status().Outside) == 3 },
		},
	} {
		t.Run(name, func(t *testing.T) {
			s, _ := twoUplinks(t, lab.Options{Inside: 2, Rules: tc.rules})
			if tc.legacy != "" {
				s.Must(s.IPTables(lab.IPTablesLegacy, tc.legacy))
			}
			s.AddLink("wan2", "198.51.100.130")
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 102")
			s.IP(s.Gateway, "rule add fwmark 2 iif lan0 table 102")
			s.Serve(mapped, "--reconcile=1h")
			phone := s.InsideSocket(tc.host, 5060)
			for _, addr := range []netip.Addr{lab.PeerA, lab.PeerB} {
				s.Contact(phone, s.PeerSocket(addr, 5060))
			}
			before := s.insideFlows()
			s.IP(s.Gateway, tc.change)
			s.Until("the daemon saw the change", func() bool { return tc.lands(s) })
			began := time.Now() // flows may be checked with a delay
			s.Until("it looked at flows", func() bool { s.Status(); return time.Since(began) > 1500*time.Millisecond })
			if after := s.insideFlows(); !slices.Equal(after, before) {
				t.Errorf("before:\n%s\nafter:\n%s", strings.Join(before, "\n"), strings.Join(after, "\n"))
			}
		})
	}
}

// Calls use the second uplink because of their TOS. Two uplinks fail one after the other: the
// flows of the failed link heal, and no other flow ends.
//
// Fails when flows stay because the route lookup ignores their TOS, and when calls end
// because packets without it leave by another link.
func TestNFTFailoverHealsWhereRoutesAskForTOS(t *testing.T) {
	t.Parallel() // mostly it waits
	const lowDelay = 0x18
	for name, byTOS := range map[string]string{
		"a rule":  "rule add tos 0x18 table 109",
		"a route": "route add default via 198.51.100.254 dev wan1 onlink tos 0x18",
	} {
		t.Run(name, func(t *testing.T) {
			s, second := twoUplinks(t, lab.Options{Rules: strings.Replace(bothUplinks, `"wan1"`, `"wan1", "wan2"`, 1)})
			third := netip.MustParseAddr("198.51.100.130")
			s.AddLink("wan2", third.String())
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan2 onlink metric 300")
			s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink table 109")
			s.IP(s.Gateway, byTOS)
			s.Serve(mapped, "--reconcile=1h")
			phone, call := s.InsideSocket(0, 5060), s.InsideSocket(0, 5062)
			raw, err := call.SyscallConn()
			s.Must(err)
			s.Must(raw.Control(func(fd uintptr) { err = unix.SetsockoptInt(int(fd), unix.IPPROTO_IP, unix.IP_TOS, lowDelay) }))
			s.Must(err)
			// The second flow of each socket uses the mapping of the first.
			peers := []*lab.Socket{s.PeerSocket(lab.PeerA, 5080), s.PeerSocket(lab.PeerB, 5080)}
			for in, addr := range map[*lab.Socket]netip.Addr{phone: s.Gateway.Addr, call: second} {
				for _, peer := range peers {
					ext := s.Contact(in, peer)
					if ext.Addr() != addr {
						t.Fatalf("%v leaves as %v, want %v", in.Addr(), ext, addr)
					}
					s.Arrives(in, peer, ext)
				}
			}
			flowsOf := func(in *lab.Socket) (all []string) {
				return slices.DeleteFunc(s.insideFlows(), func(f string) bool {
					return !strings.Contains(f, fmt.Sprintf(" sport=%d ", in.Addr().Port()))
				})
			}
			for _, fails := range []struct {
				command     string
				heals, stay *lab.Socket
			}{
				{"route replace default via 198.51.100.254 dev wan2 onlink", phone, call},
				{"link set wan1 down", call, phone},
			} {
				before := flowsOf(fails.stay)
				s.IP(s.Gateway, fails.command)
				for _, peer := range peers {
					s.heals(fails.heals, peer, third)
				}
				if after := flowsOf(fails.stay); len(before) != len(peers) || !slices.Equal(after, before) {
					t.Errorf("after %q there is %q, and before %q", fails.command, after, before)
				}
			}
		})
	}
}
