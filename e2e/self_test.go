package e2e

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/lab"
)

// A PBX is a program on the gateway itself that talks to a proxy outside.
type pbx struct {
	*lab.Socket
	proxy, stranger *lab.Socket
	free            uint16 // the last port of the proxy that is in use
}

// newPBX opens its socket at an address of the gateway.
func (s *scene) newPBX(addr netip.Addr) *pbx {
	s.T.Helper()
	proxy, stranger := lab.PeerA, lab.PeerB
	if addr.Is6() {
		proxy, stranger = lab.Peer6A, lab.Peer6B
	}
	return &pbx{
		Socket: s.Socket(s.Gateway.Namespace, addr, 5060),
		proxy:  s.PeerSocket(proxy, 5060), stranger: s.PeerSocket(stranger, 5060), free: 5070,
	}
}

// another opens a socket of the proxy on a port that the gateway has not seen yet.
func (s *scene) another(p *pbx) *lab.Socket {
	s.T.Helper()
	p.free++
	return s.PeerSocket(p.proxy.Addr().Addr(), p.free)
}

// reached checks that the proxy reaches the PBX from any port, and nobody else does.
func (s *scene) reached(p *pbx) {
	s.T.Helper()
	s.Contact(p.Socket, p.proxy)
	s.Stands(p.Socket, p.proxy, p.Addr())
	s.Arrives(p.Socket, s.another(p), p.Addr())
	s.Lost(p.Socket, p.stranger, p.Addr(), p.proxy)
	s.Verified()
}

// unreached checks that the proxy reaches the PBX only from the port that the PBX contacted.
func (s *scene) unreached(p *pbx) {
	s.T.Helper()
	s.Contact(p.Socket, p.proxy)
	s.Lost(p.Socket, s.another(p), p.Addr(), p.proxy)
}

// ofSelf are the rules of a gateway with a PBX.
const ofSelf = lab.Masquerade + lab.DropPolicy

// A PBX runs on the gateway. With self = true and a firewall that accepts RELATED, the proxy
// may answer from another port, and nobody else may. Without self = true only the port asked
// may.
//
// Fails when flows of the gateway's own addresses give no permission, when one is refused
// because of the very socket that it serves, and when they give one without self = true.
func TestSelfGetsAnswersFromAnyPort(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{IPv6: true, Rules: ofSelf})
		four, six := s.newPBX(s.Gateway.Addr), s.newPBX(s.Gateway.Addr6)
		s.Serve(mode...)
		for _, p := range []*pbx{four, six} {
			s.unreached(p)
		}
		phone := s.InsideSocket(0, 5062)
		s.Stands(phone, four.proxy, s.Contact(phone, four.proxy)) // all earlier flows were seen
		for _, p := range s.List() {
			if p.Int.Addr() == s.Gateway.Addr || p.Int.Addr() == s.Gateway.Addr6 {
				t.Errorf("without self: %+v", p)
			}
		}
		s.Stop()
		s.Serve(append(slices.Clone(mode), "--self")...)
		for _, p := range []*pbx{four, six} {
			s.reached(p)
		}
		s.Stop()
		if left := s.Leftovers(); len(left) > 0 {
			t.Errorf("a stop leaves %q", left)
		}
		for _, p := range []*pbx{four, six} {
			s.unreached(p)
		}
	})
}

// The gateway translates nothing, has a public address for its programs on its loopback link,
// and no enabled inside network.
//
// Fails when only addresses of outside links, or only translated flows, count as the gateway's.
func TestSelfWithAnAddressOfItsOwn(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: lab.DropPolicy})
	public := netip.MustParseAddr("192.0.2.200")
	s.Start("--self", "--reconcile=1h")
	s.IP(s.Gateway, "addr add "+public.String()+"/32 dev lo") // after the daemon has started
	s.IP(s.Outside, "route add table local unicast "+public.String()+"/32 via "+s.Gateway.Addr.String())
	s.reached(s.newPBX(public))
	s.IP(s.Gateway, "addr del "+public.String()+"/32 dev lo")
	s.Until("the permission ends with the address", func() bool { return len(s.ConntrackList("expect")) == 0 })
}

// The permission survives kill -9, and the next daemon takes it over. Without a daemon it ends
// with its lifetime or with a cleanup.
//
// Fails when the next daemon does not take over a permission of the gateway's, and when a
// cleanup does not find it.
func TestSelfAfterTheDaemon(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{Rules: ofSelf})
	p := s.newPBX(s.Gateway.Addr)
	start := func(more ...string) { s.Serve(append([]string{"--self"}, more...)...) }
	start()
	s.reached(p)
	s.Kill()
	s.Arrives(p.Socket, s.another(p), p.Addr())
	start()
	s.Arrives(p.Socket, s.another(p), p.Addr())
	s.Verified()
	s.Kill()
	if out, code := s.CLI("cleanup"); code != 0 {
		t.Errorf("cleanup: exit %d, %q", code, out)
	}
	if left := s.Leftovers(); len(left) > 0 {
		t.Errorf("a cleanup leaves %q", left)
	}
	s.unreached(p)
	start("--lifetime=8s") // longer than a busy machine takes to look
	s.reached(p)
	s.Kill()
	s.Until("the permission has run out", func() bool { return len(s.ConntrackList("expect")) == 0 })
	s.unreached(p)
}

// The gateway's address is in a private network of the provider's. The daemon is killed, and
// started again while there is no route.
//
// Fails when "auto" takes the gateway for an inside host, and enables the provider's network.
func TestSelfIsNoInsideHostForAuto(t *testing.T) {
	stage.NeedsExpect(t)
	s := newBridgedUplink(t, lab.Options{Rules: strings.Replace(lab.Masquerade, `oifname "wan0" `, "", 1)})
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan0")
	s.Start("--subnet=auto", "--self")
	pbx, proxy := s.Socket(s.Gateway.Namespace, netip.MustParseAddr("192.168.0.2"), 5060), s.PeerSocket(lab.PeerA, 5060)
	s.Stands(pbx, proxy, s.Contact(pbx, proxy))
	s.Kill()
	s.IP(s.Gateway, "route del default")
	s.Start("--subnet=auto", "--self")
	if got := s.enabled(); len(got) > 0 {
		t.Errorf("served: %q", got)
	}
}

// Reloads turn self off and on.
//
// Fails when the permissions stay, and when existing flows give none.
func TestSelfIsReloaded(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: ofSelf})
	p := s.newPBX(s.Gateway.Addr)
	path := filepath.Join(t.TempDir(), "c.toml")
	write := func(self bool) {
		s.Must(os.WriteFile(path, fmt.Appendf(nil, "self = %v\n[[subnet]]\nprefix = %q\nrouted = true\n", self, lab.InsideNet6), 0o644))
	}
	reload := func(self bool) {
		write(self)
		if out, code := s.CLI("reload"); code != 0 {
			t.Fatalf("exit %d, %q", code, out)
		}
	}
	write(true)
	s.Start("--config", path)
	s.reached(p)
	reload(false)
	s.Until("the permission is gone", func() bool { return len(s.ConntrackList("expect")) == 0 })
	s.unreached(p)
	reload(true)
	s.Stands(p.Socket, p.proxy, p.Addr())
	s.Arrives(p.Socket, s.another(p), p.Addr())
}

// The gateway's permission admits only packets from outside links, and at most max_children
// flows.
//
// Fails without the chain own_children.
func TestSelfJudgesChildren(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Guest: true, Rules: ofSelf})
		for _, link := range []string{"all", "guest0"} {
			s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
		}
		s.Serve(append(slices.Clone(mode), "--self", "--max-children=2")...)
		p := s.newPBX(s.Gateway.Addr)
		s.Contact(p.Socket, p.proxy)
		s.Stands(p.Socket, p.proxy, p.Addr())
		s.IP(s.Guest, "addr add "+lab.PeerA.String()+"/32 dev lo")
		own := s.Socket(s.Guest.Namespace, s.Guest.Addr, 5061)
		s.Contact(p.Socket, own)
		s.Lost(p.Socket, s.Socket(s.Guest.Namespace, lab.PeerA, 5099), p.Addr(), own)
		s.Arrives(p.Socket, s.another(p), p.Addr())
		s.Arrives(p.Socket, s.another(p), p.Addr())
		s.Lost(p.Socket, s.another(p), p.Addr(), p.proxy)
		g := s.Status().Tables.Guard
		if g.Spoofed != 1 || g.Children != 1 {
			t.Errorf("spoofed %d, beyond the limit %d", g.Spoofed, g.Children)
		}
	})
}

// A host that sends from an IPv6 address of the gateway earns it no permission. Linux forwards
// such packets, but not with an IPv4 address.
//
// Fails without the chain own_source.
func TestSelfIsFakedByNobody(t *testing.T) {
	stage.NeedsExpect(t)
	s := newScene(t, lab.Options{IPv6: true, Rules: ofSelf})
	s.Serve("--self")
	p := s.newPBX(s.Gateway.Addr6)
	s.IP(s.Inside(0), "addr add "+s.Gateway.Addr6.String()+"/128 dev lo nodad")
	faker := s.Socket(s.Inside(0).Namespace, s.Gateway.Addr6, 5060)
	s.Must(faker.Send(p.stranger.Addr(), "for the gateway"))
	s.Until("it is dropped", func() bool { return s.Status().Tables.Guard.Spoofed > 0 })
	s.reached(p)
	for _, x := range s.List() {
		if x.Peer == p.stranger.Addr().Addr() {
			t.Errorf("it earned %+v", x)
		}
	}
}

// An inside host on the PBX's outside port is refused, and even if it came first it does not
// keep the PBX from its permission. Connected sockets, of which a resolver has thousands, get
// no permission: they accept no packet from another port.
//
// Fails when a claim that was refused because of the socket goes first, when a look at the
// sockets ends the PBX's own permission, and when each flow of the gateway's gives one.
func TestSelfBesideInsideHosts(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: ofSelf})
		s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600")) // keeps the phone's flow
		s.Serve(append(slices.Clone(mode), "--self", "--reconcile=1s")...)
		p := s.newPBX(s.Gateway.Addr)
		phone, other := s.InsideSocket(0, 5060), s.PeerSocket(lab.PeerA, 5080)
		if ext := s.Contact(phone, other); ext != p.Addr() {
			t.Fatalf("the phone has %v", ext)
		}
		s.Until("the phone is refused", func() bool {
			return slices.ContainsFunc(s.List(), func(x control.Permission) bool { return x.Int == phone.Addr() && x.Reason == "local_socket" })
		})
		s.reached(p)
		since := s.Listed(p.Socket, p.proxy, p.Addr(), "standing").Since
		later := s.InsideSocket(0, 5090)
		ext := s.Contact(later, other)
		s.Stands(later, other, ext)
		s.Socket(s.Gateway.Namespace, ext.Addr(), ext.Port())
		s.Listed(later, other, ext, "refused") // the daemon has looked at sockets
		if again := s.Listed(p.Socket, p.proxy, p.Addr(), "standing").Since; !again.Equal(since) {
			t.Errorf("the PBX lost its permission for its own socket: it stands since %v, not %v", again, since)
		}

		var connected netip.AddrPort
		s.Must(s.Gateway.Do(func() error {
			c, err := net.DialUDP("udp", nil, net.UDPAddrFromAddrPort(other.Addr()))
			if err != nil {
				return err
			}
			t.Cleanup(func() { c.Close() })
			connected = c.LocalAddr().(*net.UDPAddr).AddrPort()
			_, err = c.Write([]byte("a query"))
			return err
		}))
		s.Until("the connected socket is refused", func() bool {
			return slices.ContainsFunc(s.List(), func(x control.Permission) bool {
				return x.Int == connected && x.State == "refused" && x.Reason == "no_socket"
			})
		})
	})
}

// An inside host already has the flow that the PBX would have, so the kernel gives the PBX
// another outside port. The proxy's packets there are translated back, and still RELATED.
//
// Fails when the map carries translated permissions: the input hook drops their children.
func TestSelfIsTranslated(t *testing.T) {
	stage.NeedsExpect(t)
	stage.InModes(t, [][]string{stage.Auto, stage.Expect}, func(t *testing.T, mode ...string) {
		s := newScene(t, lab.Options{Rules: ofSelf})
		s.Serve(append(slices.Clone(mode), "--self")...)
		p, phone := s.newPBX(s.Gateway.Addr), s.InsideSocket(0, 5060)
		s.Contact(phone, p.proxy)
		ext := s.Contact(p.Socket, p.proxy)
		if ext == p.Addr() {
			t.Fatalf("the PBX has %v, as the phone", ext)
		}
		s.Stands(p.Socket, p.proxy, ext)
		s.Arrives(p.Socket, s.another(p), ext)
		s.Lost(p.Socket, p.stranger, ext, p.proxy)
		s.Verified()
	})
}

// The map cannot carry the gateway's permissions, because its children are NEW.
//
// Fails when such a configuration is accepted.
func TestSelfTakesExpectations(t *testing.T) {
	stage.OfTheDaemon(t)
	s := newScene(t, lab.Options{})
	out, code := s.CLI("run", "--self", "--backend=nft")
	if code != 78 || !strings.Contains(out, `self: only expectations carry permissions of the gateway's own programs`) {
		t.Errorf("exit %d, %q", code, out)
	}
}
