package e2e

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// A forward to the very endpoint that has a permission is a forward like any other: no expectation
// takes its packets.

// hostOpened is a firewall that accepts RELATED, and of new flows from outside those to port 5060
// of the first host. The host gets them with a source of the inside network.
const hostOpened = lab.DropPolicy + `add rule inet filter forward ip daddr 10.47.11.109 udp dport 5060 accept
table ip inward { chain post { type nat hook postrouting priority srcnat + 1; oifname "lan0" ct status dnat masquerade; }; }
table ip dns { chain pre { type nat hook prerouting priority dstnat; iifname "lan0" udp dport 53 redirect to :9053; }; }
`

// opened loads rules behind hostOpened.
func opened(load func(s *scene) error) func(s *scene) error {
	return func(s *scene) error {
		if err := load(s); err != nil {
			return err
		}
		return s.NFT(hostOpened)
	}
}

// Without the daemon all packets come by the forward: with its source, however many flows, and from
// each port.
//
// Fails when an expectation takes the packets of a forward because it leads to the same endpoint.
func TestForwardToTheHostOfAPermissionWins(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	t.Parallel() // mostly it waits
	const to = " dnat to 10.47.11.109"
	for name, load := range map[string]func(s *scene) error{
		"a port":          inChain(`iifname "wan0" udp dport 5060` + to),
		"ports":           inChain(`iifname "wan0" udp dport 5000-5100` + to + ":5060"),
		"all ports":       inChain(`iifname "wan0"` + to),
		"of some peers":   inChain(`ip saddr 203.0.113.5 udp dport 5060` + to),
		"a condition":     inChain(`iifname "wan0" meta mark 0 udp dport 5060` + to),
		"iptables-nft":    inPrerouting(lab.IPTablesNFT, "--dport 5060 -j DNAT --to-destination 10.47.11.109"),
		"iptables-legacy": inPrerouting(lab.IPTablesLegacy, "-m addrtype --dst-type LOCAL --dport 5060 -j DNAT --to-destination 10.47.11.109:5060"),
		"1:1 NAT": func(s *scene) error {
			s.IP(s.Gateway, "address add 198.51.100.2/24 dev wan0")
			return s.NFT(`table ip one { chain post { type nat hook postrouting priority srcnat - 1; ip saddr 10.47.11.109 oifname "wan0" snat to 198.51.100.2; }
				chain pre { type nat hook prerouting priority dstnat; ip daddr 198.51.100.2 dnat to 10.47.11.109; }; }` + "\n" + lab.Masquerade)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range [][]string{stage.Auto, stage.Expect} {
				t.Run(mode[0][2:], func(t *testing.T) {
					s := newScene(t, lab.Options{Rules: lab.NoRules})
					s.Must(opened(load)(s))
					s.Start(stage.Flags(mode, "--reconcile=1h", "--max-children=2")...)
					phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
					ext := s.Contact(phone, peer)
					state := "standing"
					if mode[0] == stage.Expect[0] {
						state = "refused"
					}
					if p := s.Listed(phone, peer, ext, state); p.Reason != "forwarded_here" || strings.Contains(p.Backend, "expect") {
						t.Errorf("list has %+v", p)
					}
					for _, port := range []uint16{53, 7000, 7001, 7002, 7003} {
						from := s.PeerSocket(lab.PeerA, port)
						s.Must(from.Send(ext, "new"))
						switch text, source, err := phone.Recv(stage.Patience()); {
						case err != nil:
							t.Errorf("from port %d: %v", port, err)
						case text != "new" || source.Addr() != netip.MustParseAddr("10.47.11.1"):
							t.Errorf("from port %d: %q of %v", port, text, source)
						}
					}
					if st := s.Status(); len(st.Warnings) > 0 && name != "all ports" {
						t.Errorf("warnings: %q", st.Warnings)
					}
					s.Verified()
				})
			}
		})
	}
}

// The same for IPv6 behind source NAT, where only expectations admit anybody.
func TestForwardToTheHostOfAPermissionWinsOverIPv6(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.NoRules + `table ip6 nat {
	chain post { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; oifname "lan0" ct status dnat masquerade; }
	chain pre { type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5060 dnat to 2001:db8:47::109; }
}
`})
	s.Start("--subnet", lab.InsideNet6.String(), "--reconcile=1h")
	phone, peer := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5060), s.Socket(s.Outside.Namespace, lab.Peer6A, 5060)
	ext := s.Contact(phone, peer)
	if p := s.Listed(phone, peer, ext, "refused"); p.Reason != "forwarded_here" {
		t.Errorf("list has %+v", p)
	}
	from := s.Socket(s.Outside.Namespace, lab.Peer6A, 7000)
	s.Must(from.Send(ext, "new"))
	if source, err := phone.Expect("new"); err != nil || source.Addr() != lab.InsideNet6.Addr().Next() {
		t.Errorf("%v, %v", source, err)
	}
	// Another port has a permission.
	free := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, 5061)
	ext = s.Contact(free, peer)
	s.Stands(free, peer, ext)
	s.Arrives(free, s.Socket(s.Outside.Namespace, lab.Peer6A, 7001), ext)
}

// The forward leads some packets of its peers to the host, and those of nobody else. A permission
// admits the others by the map, behind the rule, if something does.
//
// Fails when such a forward takes peers that its sources leave out, or keeps the map from the rest.
func TestForwardOfSomePacketsToTheHostOfAPermission(t *testing.T) {
	ownMode(t)
	t.Parallel() // mostly it waits
	for name, load := range map[string]func(s *scene) error{
		"nftables":               inChain(`ip saddr 203.0.113.0/24 udp sport 7 udp dport 5060 dnat to 10.47.11.109`),
		"nftables, another port": inChain(`ip saddr 203.0.113.0/24 udp sport 7 udp dport 5000-5100 dnat to 10.47.11.109:5060`),
		"iptables-nft":           inPrerouting(lab.IPTablesNFT, "-s 203.0.113.0/24 --sport 7 --dport 5060 -j DNAT --to-destination 10.47.11.109"),
		"iptables-legacy":        inPrerouting(lab.IPTablesLegacy, "-s 203.0.113.0/24 --sport 7 --dport 5060 -j DNAT --to-destination 10.47.11.109:5060"),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, mode := range [][]string{stage.Auto, stage.Expect} {
				t.Run(mode[0][2:], func(t *testing.T) {
					s := newScene(t, lab.Options{Inside: 2, Rules: lab.NoRules})
					s.Must(load(s))
					s.Start(stage.Flags(mode, "--reconcile=1h")...)
					phone, peer, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 9), s.PeerSocket(lab.PeerC, 9)
					ext := s.Contact(phone, peer)
					s.Contact(phone, other)
					s.Stands(phone, other, ext)
					s.Arrives(phone, s.PeerSocket(lab.PeerC, 10), ext)
					s.Arrives(phone, s.PeerSocket(lab.PeerB, 7), ext)                           // by the forward
					s.Lost(phone, s.PeerSocket(lab.PeerB, 10), ext, s.PeerSocket(lab.PeerA, 7)) // a stranger
					if mode[0] == stage.Auto[0] {
						if p := s.Listed(phone, peer, ext, "standing"); p.Backend != "nft" || p.Reason != "" {
							t.Errorf("list has %+v", p)
						}
						s.explainedArrives(phone, s.PeerSocket(lab.PeerA, 10), ext)
						return
					}
					if p := s.Listed(phone, peer, ext, "refused"); p.Reason != "forwarded_here" {
						t.Errorf("list has %+v", p)
					}
					s.Lost(phone, s.PeerSocket(lab.PeerA, 10), ext, peer)
					// Another port of the same host is another endpoint.
					another := s.InsideSocket(0, 5061)
					s.Must(s.NFT("table ip more { chain pre { type nat hook prerouting priority dstnat; udp dport 5061 dnat to 10.47.11.109:5060; }; }"))
					if p := s.Listed(another, peer, s.Contact(another, peer), "refused"); p.Reason != "forwarded" {
						t.Errorf("list has %+v", p)
					}
				})
			}
		})
	}
}

// A forward begins to lead to the host while a child of the permission lives there.
//
// Fails when it ends a child that the host answered, and when it leaves one to the expectation that
// nobody answered.
func TestForwardToTheHostEndsNoConversation(t *testing.T) {
	ownMode(t)
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade + hostOpened})
	s.Start(stage.Flags(stage.Auto, "--reconcile=1h")...)
	s.carried("expect+nft")
	phone, peer := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5060)
	ext := s.Contact(phone, peer)
	s.Stands(phone, peer, ext)
	answered, silent := s.PeerSocket(lab.PeerA, 7000), s.PeerSocket(lab.PeerA, 7001)
	for _, from := range []*lab.Socket{answered, silent} {
		s.Arrives(phone, from, ext)
	}
	s.Must(phone.Send(answered.Addr(), "answer"))
	_, err := answered.Expect("answer")
	s.Must(err)
	before := s.childID(answered)
	const lease = `table ip upnp { chain pre { type nat hook prerouting priority dstnat; iifname "wan0" udp dport 5060 dnat to 10.47.11.109; }; }`
	for range 2 { // the lease is renewed
		s.Must(s.NFT(lease))
		s.Until("the forward wins", func() bool { return s.Listed(phone, peer, ext, "standing").Backend == "nft" })
		s.Until("the host sees the source that the rules give", func() bool {
			s.Must(silent.Send(ext, "again"))
			for {
				text, source, err := phone.Recv(stage.Patience())
				s.Must(err)
				if text == "again" {
					return source.Addr() == netip.MustParseAddr("10.47.11.1")
				}
			}
		})
		if now := s.childID(answered); now != before {
			t.Errorf("the conversation is another flow: %q, %q", before, now)
		}
		s.Must(s.NFT("delete table ip upnp"))
		s.Until("the expectation is back", func() bool { return s.Listed(phone, peer, ext, "standing").Backend == "expect+nft" })
		_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-src", "7001")
		s.Must(err)
	}
}

// childID is what conntrack shows of the flow that a peer began.
func (s *scene) childID(from *lab.Socket) string {
	s.T.Helper()
	out, err := s.Gateway.Output("conntrack", "-L", "-o", "id", "-p", "udp", "-s", from.Addr().Addr().String(), "--orig-port-src", fmt.Sprint(from.Addr().Port()))
	s.Must(err)
	_, id, _ := strings.Cut(out, " id=")
	id, _, _ = strings.Cut(id, "\n")
	return id
}
