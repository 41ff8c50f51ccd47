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

// Rules of iptables that give flows helpers, for [lab.Lab.IPTables].
const ipTablesHelpers = `*raw
-A PREROUTING -i lan0 -p udp --dport 69 -j CT --helper tftp
-A PREROUTING -i lan0 -p udp --dport 5060 -j CT --helper sip
-A PREROUTING -i lan0 -p tcp --dport 5060 -j CT --helper sip
COMMIT
`

const tftpRequest = "\x00\x01boot.cfg\x00octet\x00"

// A helper of the user's serves the first packet that needs it, from a host whose port has an
// expectation by a flow without a helper, whatever gave the flow its helper, and when. What is
// dropped until the expectation ends passes when it is sent again; nothing is lost later.
// Expectations of other hosts stay.
//
// Fails when the expectation stays: the helper then drops each packet, and no flow shows that.
func TestHelperServesItsFirstPacket(t *testing.T) {
	stage.NeedsExpect(t)
	give := map[string]func(s *scene) error{
		"nft": func(s *scene) error {
			return s.NFT(tftpHelper + strings.Replace(sipHelper, "table ip h", "table ip h2", 1))
		},
		"iptables": func(s *scene) error { return s.IPTables(lab.IPTablesNFT, ipTablesHelpers) },
		"legacy":   func(s *scene) error { return s.IPTables(lab.IPTablesLegacy, ipTablesHelpers) },
	}
	by := map[string]string{stage.Auto[0]: "expect+nft", stage.Expect[0]: "expect"} // before a helper works
	for _, tc := range []struct {
		by, what string
		later    bool // the rule comes when the expectation stands
	}{
		{by: "nft", what: "TFTP"},
		{by: "nft", what: "UDP"},
		{by: "nft", what: "TCP"},
		{by: "nft", what: "UDP", later: true},
		{by: "nft", what: "TCP", later: true},
		{by: "iptables", what: "UDP"},
		{by: "iptables", what: "TFTP", later: true},
		{by: "legacy", what: "TCP"},
		{by: "legacy", what: "TFTP", later: true},
	} {
		for _, mode := range [][]string{stage.Auto, stage.Expect} {
			name := []string{tc.what, tc.by, mode[0][len("--backend="):]}
			if tc.later {
				name = append(name, "later")
			}
			t.Run(strings.Join(name, "/"), func(t *testing.T) {
				s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy})
				if !tc.later {
					s.Must(give[tc.by](s))
				}
				s.Serve(mode...)
				c := newSIPCall(s, tc.what)
				other := s.InsideSocket(1, 7020)
				for _, in := range []*lab.Socket{c.media, other} {
					if p := s.Listed(in, c.proxyMedia, s.Contact(in, c.proxyMedia), "standing"); p.Backend != by[mode[0]] {
						t.Fatalf("it stands by %q", p.Backend)
					}
				}
				if tc.later {
					s.Must(give[tc.by](s))
				}
				ext := netip.AddrPortFrom(s.Gateway.Addr, c.media.Addr().Port())
				switch tc.what {
				case "TFTP":
					server := s.PeerSocket(lab.PeerA, 69)
					s.sendsUntilServed(c.media, server, tftpRequest)
					for range 3 {
						s.fetches(c.media, server, ext)
					}
				case "UDP":
					s.sendsUntilServed(c.phone, c.proxy, c.message("INVITE sip:2@203.0.113.5 SIP/2.0", "INVITE", c.phone.Addr(), c.media.Addr()))
					fallthrough
				default:
					c.connect()
					if media := c.invite(); media != ext { // sends three
						t.Errorf("media at %v, want %v", media, ext)
					}
					c.talk(ext)
				}
				if mode[0] == stage.Expect[0] {
					if p := s.Listed(c.media, c.proxyMedia, ext, "refused"); p.Reason != "helper" {
						t.Errorf("reason %q", p.Reason)
					}
				} else if p := s.Listed(c.media, c.proxyMedia, ext, "standing"); p.Backend != "nft" {
					t.Errorf("it stands by %q", p.Backend)
				}
				ext = netip.AddrPortFrom(s.Gateway.Addr, other.Addr().Port())
				if p := s.Listed(other, c.proxyMedia, ext, "standing"); p.Backend != by[mode[0]] {
					t.Errorf("that of the other host stands by %q", p.Backend)
				}
				s.Arrives(other, s.PeerSocket(lab.PeerA, 40020), ext)
				if s.Status().Permissions.Helped == 0 {
					t.Error("status shows no hosts with a helper")
				}
			})
		}
	}
}

// sendsUntilServed sends the packet again, as programs do, until one comes. What comes besides is
// read, too.
func (s *scene) sendsUntilServed(from, to *lab.Socket, payload string) {
	s.T.Helper()
	s.Until("a packet passes the helper", func() bool {
		s.Must(from.Send(to.Addr(), payload))
		_, _, err := to.Recv(50 * time.Millisecond)
		return err == nil
	})
	drain(to)
}

// fetches requests a file by TFTP; the server sends it from a new port.
func (s *scene) fetches(from, server *lab.Socket, ext netip.AddrPort) {
	s.T.Helper()
	s.Must(from.Send(server.Addr(), tftpRequest))
	seen, err := server.Expect(tftpRequest)
	s.Must(err)
	if seen != ext {
		s.T.Errorf("the request comes from %v, want %v", seen, ext)
	}
	s.Arrives(from, s.PeerSocket(server.Addr().Addr(), 0), ext)
}

// The same where the expectation is another host's: two hosts have one outside port towards different
// ports of a peer.
//
// Fails when only the expectations of the host that the helper serves end.
func TestHelperServesItsFirstPacketOnASharedPort(t *testing.T) {
	stage.NeedsExpect(t)
	for _, mode := range [][]string{stage.Auto, stage.Expect} {
		t.Run(mode[0][len("--backend="):], func(t *testing.T) {
			s := newScene(t, lab.Options{Inside: 2, Rules: lab.Masquerade + lab.DropPolicy + tftpHelper})
			s.Serve(mode...)
			first, second, app := s.InsideSocket(0, 2070), s.InsideSocket(1, 2070), s.PeerSocket(lab.PeerA, 7777)
			ext, elsewhere := s.Contact(first, app), s.PeerSocket(lab.PeerB, 7777)
			for _, to := range []*lab.Socket{app, elsewhere} {
				if p := s.Listed(first, to, s.Contact(first, to), "standing"); !strings.HasPrefix(p.Backend, "expect") {
					t.Fatalf("it stands by %q", p.Backend)
				}
			}
			server := s.PeerSocket(lab.PeerA, 69)
			s.sendsUntilServed(second, server, tftpRequest)
			for range 3 {
				s.fetches(second, server, ext)
			}
			if mode[0] == stage.Expect[0] {
				if p := s.Listed(first, app, ext, "refused"); p.Reason != "helper" {
					t.Errorf("reason %q", p.Reason)
				}
			} else if p := s.Listed(first, app, ext, "standing"); p.Backend != "nft" {
				t.Errorf("it stands by %q", p.Backend)
			}
			if p := s.Listed(first, elsewhere, ext, "standing"); !strings.HasPrefix(p.Backend, "expect") {
				t.Errorf("that for another peer stands by %q", p.Backend)
			}
		})
	}
}

// The same where the expectation is for a group of peers, as a host with IPv6 has it.
//
// Fails when only expectations for single peers end.
func TestHelperServesItsFirstPacketToOneOfAGroup(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: lab.Masquerade + lab.DropPolicy + strings.Replace(tftpHelper, "table ip ", "table inet ", 1)})
	s.Start("--routed", "--subnet", lab.InsideNet6.String(), "--peer-group=2001:db8:5::/64")
	h := s.Inside(0)
	host := s.Socket(h.Namespace, h.Addr6, 2070)
	server := s.Socket(s.Outside.Namespace, lab.Peer6A, 69)
	s.Contact(host, s.Socket(s.Outside.Namespace, lab.Peer6A, 7777))
	s.Until("an expectation stands", func() bool {
		return slices.ContainsFunc(s.List(), func(p control.Permission) bool { return p.Backend == "expect" && p.Peers.IsValid() })
	})
	s.sendsUntilServed(host, server, tftpRequest)
	for range 3 {
		s.fetches(host, server, host.Addr())
	}
}

// After kill -9 the kernel still knows for which hosts a helper works.
//
// Fails when the next daemon makes an expectation before it asks the kernel.
func TestHelperServesItsFirstPacketAfterAKill(t *testing.T) {
	stage.NeedsExpect(t)
	s := play(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy + tftpHelper}, stage.Auto...)
	host, server, app := s.InsideSocket(0, 2070), s.PeerSocket(lab.PeerA, 69), s.PeerSocket(lab.PeerA, 7777)
	ext := s.Contact(host, app)
	s.Stands(host, app, ext)
	s.sendsUntilServed(host, server, tftpRequest)
	s.Kill()
	_, err := s.Gateway.Output("conntrack", "-D", "-p", "udp", "--orig-port-dst", "69") // it shows its helper
	s.Must(err)
	s.Serve(stage.Auto...)
	if p := s.Listed(host, app, s.Contact(host, app), "standing"); p.Backend != "nft" {
		t.Errorf("it stands by %q", p.Backend)
	}
	s.fetches(host, server, ext)
}

// Kernels before 6.0 can give flows a helper without any rule.
//
// Fails when only flows whose helper a rule gave are noted.
func TestHelperServesItsFirstPacketWithoutARule(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: lab.Masquerade + lab.DropPolicy})
	if out, err := s.Gateway.Output("sh", "-c", "modprobe nf_conntrack_tftp; modprobe nf_nat_tftp; sysctl -w net.netfilter.nf_conntrack_helper=1"); err != nil {
		t.Skip("the kernel gives no helper by itself:", out, err)
	}
	s.Serve(stage.Auto...)
	host, server, app := s.InsideSocket(0, 2070), s.PeerSocket(lab.PeerA, 69), s.PeerSocket(lab.PeerA, 7777)
	ext := s.Contact(host, app)
	s.Stands(host, app, ext)
	s.sendsUntilServed(host, server, tftpRequest)
	for range 3 {
		s.fetches(host, server, ext)
	}
}
