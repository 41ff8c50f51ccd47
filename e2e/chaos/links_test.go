package chaos

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// Outside addresses of the gateway: the lab's, and one that comes later.
const (
	firstAddr = "198.51.100.1"
	nextAddr  = "198.51.100.77"
)

// The crowds start small, and grow during the change. The expectation table has room for
// twice as many, because those on the old address end a moment after the first are
// wanted on the new one.
const firstFlows, allFlows = 500, 1500

// The way outside changes while a crowd of flows keeps sending, as clients do, and new
// flows join. Afterwards all have permissions on their new outside address, their peers
// get in from other ports, a conversation goes on, and nothing stands on an address that
// is gone. The reconcile is an hour away.
//
// Fails when the links are not watched; and, for "seen late", when a flow on an address
// that is gone gives a permission.
func TestLinks(t *testing.T) {
	for _, tc := range []struct {
		name   string
		change func(c *crowd)
		link   string // the outside link after the change
		addr   string // its address then
	}{
		{"another address", (*crowd).changeAddress, "wan0", nextAddr},
		{"another address, seen late", (*crowd).changeAddressUnseen, "wan0", nextAddr},
		{"down and up", (*crowd).downAndUp, "wan0", firstAddr},
		{"another link of that name", func(c *crowd) { c.replaceLink("wan0", nextAddr) }, "wan0", nextAddr},
		{"another link with that address", func(c *crowd) { c.replaceLink("wan1", firstAddr) }, "wan1", firstAddr},
	} {
		t.Run(tc.name, func(t *testing.T) {
			stage.InModes(t, modes, func(t *testing.T, mode ...string) {
				c := newLoad(t, mode)
				talker, proxy := c.InsideSocket(1, 5060), c.PeerSocket(lab.PeerA, 5060)
				old := c.Contact(talker, proxy)
				c.Arrives(talker, proxy, old)
				c.Until("all permissions stand", func() bool { return c.stand(firstAddr, firstFlows+1) })

				began := time.Now()
				c.grow()
				tc.change(c)
				c.Until("the daemon knows the link", func() bool { return strings.Join(c.Status().Outside, " ") == tc.link })
				ext := netip.AddrPortFrom(netip.MustParseAddr(tc.addr), old.Port())
				c.hears(proxy, talker, ext)
				c.Until("all permissions stand again", func() bool { return c.stand(tc.addr, allFlows+1) })
				t.Logf("%d permissions, right again after %v", allFlows+1, time.Since(began).Round(time.Millisecond))

				c.Arrives(talker, c.PeerSocket(lab.PeerA, 5070), ext)
				c.children(tc.addr)
				if tc.addr != firstAddr {
					c.Until("nothing of the old address is left", func() bool { return len(c.on(firstAddr)) == 0 })
				}
				c.end(talker, ext, proxy)
			})
		})
	}
}

// A second uplink comes while the crowd sends by the first one: flows that use it get
// permissions on its address, and no other flow is affected.
//
// Fails when the links are not watched.
func TestLinksSecondUplink(t *testing.T) {
	stage.InModes(t, modes, func(t *testing.T, mode ...string) {
		c := newLoad(t, mode)
		talker, newcomer, proxy := c.InsideSocket(2, 5060), c.InsideSocket(1, 5061), c.PeerSocket(lab.PeerA, 5060)
		ext := c.Contact(talker, proxy)
		c.Stands(talker, proxy, ext)
		stop := c.Steady(c.OnOnePort(talker, c.PeerSocket(lab.PeerA, 5070), ext))

		began := time.Now()
		c.grow()
		addr := c.AddUplink()
		c.Until("the daemon knows both uplinks", func() bool { return len(c.Status().Outside) == 2 })
		peer := c.PeerSocket(lab.PeerB, 5060)
		second := c.Contact(newcomer, peer)
		c.Stands(newcomer, peer, second)
		c.Arrives(newcomer, c.PeerSocket(lab.PeerB, 5070), second)
		took := time.Since(began)
		if second.Addr() != addr {
			t.Errorf("the newcomer leaves as %v", second)
		}
		c.Until("all others stand too", func() bool { return c.stand(firstAddr, allFlows+1) })
		c.children(firstAddr)
		n := stop()
		if n == 0 {
			t.Error("nobody talked")
		}
		if revoked := c.Status().Counters.Revoked; len(revoked) > 0 {
			t.Errorf("revoked: %v", revoked)
		}
		t.Logf("%d permissions, the one on the second uplink after %v; %d packets of a child, none lost",
			allFlows+2, took.Round(time.Millisecond), n)
		c.end(talker, ext, proxy)
	})
}

// newLoad makes a lab whose daemon serves a crowd. The first flows send all the time,
// while a stranger sends to the crowd's outside ports.
func newLoad(t *testing.T, mode []string) *crowd {
	t.Helper()
	s := stage.New(t, lab.Options{Inside: 3, Rules: stage.UplinkRules})
	s.Must(s.Gateway.SetSysctl("net.netfilter.nf_conntrack_udp_timeout", "600"))
	s.Start(stage.Flags(mode, "--reconcile=1h", "--learn-rate=100000")...)
	c := newCrowd(s, allFlows)
	c.sending.Store(firstFlows)
	at, strangers, pace := 0, c.strangers(), c.pacer()
	c.stop = c.Steady(func() error {
		const atOnce = 20
		if at += atOnce; at >= int(c.sending.Load()) {
			at = 0
		}
		if err := c.flood.Send(at, at+atOnce); err != nil {
			return err
		}
		port := at / peersOnPort
		_ = strangers.Send(2*port, 2*port+2) // their link may be gone
		return pace()
	})
	return c
}

// strangers have a packet for each of the crowd's ports on both addresses.
func (c *crowd) strangers() *lab.Flood {
	c.T.Helper()
	f := c.Flood(2*allFlows/peersOnPort, false)
	for i := range f.Len() {
		addr := netip.MustParseAddr([]string{firstAddr, nextAddr}[i%2])
		f.Aim(i, netip.AddrPortFrom(lab.PeerC, 9), netip.AddrPortFrom(addr, uint16(crowdPort+i/2)))
	}
	return f
}

// pacer returns a function that waits until the gateway keeps up.
func (c *crowd) pacer() func() error {
	c.T.Helper()
	in, gateway := c.InsideSocket(0, 7), c.Socket(c.Gateway.Namespace, lab.InsideNet.Addr().Next(), 7)
	return c.OnOnePort(gateway, in, gateway.Addr())
}

// grow lets the rest of the crowd send too.
func (c *crowd) grow() { c.sending.Store(allFlows) }

func (c *crowd) changeAddress() {
	c.IP(c.Outside, "route replace "+nextAddr+"/32 dev eth0")
	c.IP(c.Gateway, "address add "+nextAddr+"/32 dev wan0")
	c.IP(c.Gateway, "address del "+firstAddr+"/24 dev wan0")
	c.IP(c.Gateway, "route replace default via 198.51.100.254 dev wan0 onlink")
}

// changeAddressUnseen changes it while the daemon is paused, so that the daemon first
// reads events of flows on the old address.
func (c *crowd) changeAddressUnseen() {
	c.Must(c.Daemon.Pause())
	c.Until("the new flows are there", func() bool { return len(flows(c.Scene)) > allFlows })
	c.changeAddress()
	c.Until("they went with their address", func() bool {
		return len(c.ConntrackList("-p", "udp", "--reply-dst", firstAddr)) == 0
	})
	c.Must(c.Daemon.Resume())
}

func (c *crowd) downAndUp() {
	c.IP(c.Gateway, "link set wan0 down")
	c.Until("there is no outside link", func() bool { return len(c.Status().Outside) == 0 })
	c.LinkUp("wan0")
	c.IP(c.Gateway, "route replace default via 198.51.100.254 dev wan0")
}

// replaceLink puts a link in place of wan0.
func (c *crowd) replaceLink(name, addr string) {
	c.IP(c.Gateway, "link del wan0")
	c.AddLink(name, addr)
	c.IP(c.Outside, "address add 198.51.100.254/32 dev "+name) // it was lost with its link
	c.IP(c.Gateway, "route replace default via 198.51.100.254 dev "+name+" onlink")
}

// hears lets in send until peer sees its packets come from ext.
func (c *crowd) hears(peer, in *lab.Socket, ext netip.AddrPort) {
	c.T.Helper()
	c.Until("the peer hears", func() bool {
		p := stage.Payload("hello")
		c.Must(in.Send(peer.Addr(), p))
		for {
			got, from, err := peer.Recv(5 * time.Millisecond)
			if err != nil || got == p {
				return from == ext
			}
		}
	})
}

// stand reports whether exactly n permissions with a flow stand on an outside address.
func (c *crowd) stand(addr string, n int) bool {
	c.T.Helper()
	if c.Status().Permissions.Standing < n {
		return false // a list would take longer
	}
	for _, p := range c.List() {
		if p.State == "standing" && p.Flows > 0 && p.Ext.Addr().String() == addr {
			n--
		}
	}
	return n == 0
}

// on returns all permissions, listed or in the kernel, on an outside address.
func (c *crowd) on(addr string) (all []string) {
	c.T.Helper()
	for _, p := range c.List() {
		if p.Ext.Addr().String() == addr {
			all = append(all, fmt.Sprint(p))
		}
	}
	for _, x := range c.ConntrackList("expect") {
		if strings.Contains(x, " dst="+addr+" ") {
			all = append(all, x)
		}
	}
	for _, x := range c.Elements() {
		if strings.Contains(x, " "+addr+" ") {
			all = append(all, x)
		}
	}
	return all
}

// end ends the load, and checks that no stranger got in.
func (c *crowd) end(in *lab.Socket, ext netip.AddrPort, fence *lab.Socket) {
	c.T.Helper()
	if c.stop() == 0 {
		c.T.Error("there was no load")
	}
	c.Lost(in, c.PeerSocket(lab.PeerC, 5060), ext, fence)
	if got := c.ConntrackList("-p", "udp", "--orig-src", lab.PeerC.String(), "--dst-nat"); len(got) > 0 {
		c.T.Errorf("a stranger got in: %q", got)
	}
	leavesNothing(c.Scene)
}
