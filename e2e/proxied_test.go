package e2e

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/lab"
)

// transparent opens the socket of a transparent proxy on the gateway, and makes the routes and the
// rule of the firewall that lead to it what has its mark.
func (s *scene) transparent() *lab.Socket {
	s.T.Helper()
	proxy := s.Socket(s.Gateway.Namespace, netip.IPv6Unspecified(), 9500)
	raw, err := proxy.SyscallConn()
	s.Must(err)
	s.Must(raw.Control(func(fd uintptr) {
		s.Must(unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1))
		s.Must(unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_TRANSPARENT, 1))
	}))
	for _, family := range []string{"-4", "-6"} {
		s.IP(s.Gateway, family+" rule add fwmark 0x99 table 99 pref 10")
		s.IP(s.Gateway, family+" route add local default dev lo table 99")
	}
	return proxy
}

// A transparent proxy on the gateway takes what comes from outside to some ports, by a rule for new
// flows, or for all packets. It gets all of it, untranslated, although a host uses such a port: an
// expectation would make the packet RELATED, and translate it. An unanswered child that was there
// before the rule ends, whether the daemon runs meanwhile or not.
//
// Fails when an expectation stands there, and when the child stays.
func TestTransparentProxyGetsWhatComesFromOutside(t *testing.T) {
	ownMode(t)
	t.Parallel() // mostly it waits
	nft := func(rule string) func(s *scene) error {
		return func(s *scene) error {
			return s.NFT(`table inet tp { chain pre { type filter hook prerouting priority mangle; iifname "wan0" ` + rule + ` meta mark set 0x99 accept; }; }`)
		}
	}
	iptables := func(variant, match string) func(s *scene) error {
		return func(s *scene) error {
			return s.IPTables(variant, "*mangle\n-A PREROUTING -i wan0 -p udp "+match+"--dport 6000:6999 -j TPROXY --on-port 9500 --tproxy-mark 0x99\nCOMMIT\n")
		}
	}
	for name, load := range map[string]func(s *scene) error{
		"nftables, new flows":        nft("meta nfproto ipv4 ct state new udp dport 6000-6999 tproxy ip to :9500"),
		"nftables":                   nft("meta nfproto ipv4 udp dport 6000-6999 tproxy ip to :9500"),
		"nftables, both families":    nft("ct state new udp dport 6000-6999 tproxy to :9500"),
		"iptables-nft, new flows":    iptables(lab.IPTablesNFT, "-m conntrack --ctstate NEW "),
		"iptables-legacy, new flows": iptables(lab.IPTablesLegacy, "-m conntrack --ctstate NEW "),
		"iptables-legacy":            iptables(lab.IPTablesLegacy, ""),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for mode, tc := range map[string]struct{ rules, backend string }{
				"expectations": {lab.DropPolicy, "auto"}, "expectations alone": {"", "expect"}, "map": {"", "auto"},
			} {
				for when, late := range map[string]func(s *scene, load func()){
					"before": nil,
					"later":  func(_ *scene, load func()) { load() },
					"dead":   func(s *scene, load func()) { s.Kill(); load(); s.Serve("--backend="+tc.backend, "--reconcile=1h") },
				} {
					if when != "before" && name != "nftables, new flows" && name != "iptables-legacy, new flows" {
						continue
					}
					t.Run(mode+", "+when, func(t *testing.T) {
						s := newScene(t, lab.Options{Rules: lab.Masquerade + tc.rules})
						if tc.rules != "" {
							s.Must(s.NFT("insert rule inet filter input meta mark 0x99 accept"))
						}
						proxy := s.transparent()
						if late == nil {
							s.Must(load(s))
						}
						s.Serve("--backend="+tc.backend, "--reconcile=1h")
						phone, peer := s.InsideSocket(0, 6000), s.PeerSocket(lab.PeerA, 9)
						ext := s.Contact(phone, peer)
						s.Until("it is listed", func() bool { return len(s.List()) == 1 })
						from := s.PeerSocket(lab.PeerA, 10)
						if late != nil {
							s.Stands(phone, peer, ext)
							s.Arrives(phone, from, ext)
							late(s, func() { s.Must(load(s)) })
						}
						s.leads(from, proxy, ext)
						translated := func() bool {
							return slices.ContainsFunc(s.ConntrackList("-p", "udp", "-s", lab.PeerA.String()), func(line string) bool {
								return strings.Contains(line, phone.Addr().Addr().String())
							})
						}
						s.Until("no child is left", func() bool { return !translated() })
						drain(proxy)
						s.Arrives(proxy, s.PeerSocket(lab.PeerA, 11), ext)
						if translated() {
							t.Errorf("it is translated\n%s", s.Dump())
						}
						if mode == "expectations" {
							s.explained("203.0.113.5:13", ext, "unknown", "map", nowhere)
							s.hidden(phone, peer, ext, true)
						}
						other := s.InsideSocket(0, 7000) // of no rule
						ext = s.Contact(other, peer)
						s.Stands(other, peer, ext)
						s.Arrives(other, s.PeerSocket(lab.PeerA, 12), ext)
					})
				}
			}
		})
	}
}

// So does one for IPv6 behind source NAT, where expectations alone carry permissions.
//
// Fails when only rules for IPv4 count.
func TestTransparentProxyGetsWhatComesFromOutsideOverIPv6(t *testing.T) {
	ownMode(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: `table inet tp { chain pre { type filter hook prerouting priority mangle;
	iifname "wan0" ct state new meta nfproto ipv6 udp dport 6000-6999 tproxy ip6 to :9500 meta mark set 0x99 accept; }; }
table ip6 nat { chain post { type nat hook postrouting priority srcnat; oifname "wan0" masquerade; }; }
`})
	proxy := s.transparent()
	s.Start("--subnet", lab.InsideNet6.String(), "--reconcile=1h")
	peer := s.Socket(s.Outside.Namespace, lab.Peer6A, 9)
	for port, takes := range map[uint16]bool{6000: true, 7000: false} {
		phone := s.Socket(s.Inside(0).Namespace, s.Inside(0).Addr6, port)
		ext := s.Contact(phone, peer)
		to, state := phone, "standing"
		if takes {
			to, state = proxy, "refused"
		}
		s.Listed(phone, peer, ext, state)
		s.Arrives(to, s.Socket(s.Outside.Namespace, lab.Peer6A, port+10), ext)
	}
}
