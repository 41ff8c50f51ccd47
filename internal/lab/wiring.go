package lab

import (
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// wire makes the links, addresses and routes.
func (l *Lab) wire(ipv6 bool) error {
	w := wiring{gateway: l.Gateway, families: 1, scripts: make(map[*Host]*strings.Builder)}
	if ipv6 {
		w.families = 2
	}
	w.add(l.Gateway, "link set lo up")
	w.outside(l.Outside)
	w.inside(l.inside)
	if l.Guest != nil {
		w.guest(l.Guest)
	}
	for _, h := range l.all { // the gateway comes first and makes all links
		if _, err := h.feed(w.scripts[h].String(), "ip", "-batch", "-"); err != nil {
			return err
		}
	}
	return errors.Join(l.forward(ipv6), l.settle())
}

// forward sets the sysctls that differ from the kernel's defaults.
func (l *Lab) forward(ipv6 bool) error {
	err := l.Gateway.SetSysctl("net.ipv4.ip_forward", "1")
	if ipv6 {
		err = errors.Join(err,
			l.Gateway.SetSysctl("net.ipv6.conf.all.forwarding", "1"),
			// IPv4 lets a program bind any address of a local route; IPv6 does not.
			l.Outside.SetSysctl("net.ipv6.ip_nonlocal_bind", "1"))
	}
	return err
}

// settle waits until the gateway's links carry packets. The gateway's end of a veth
// pair came up first, and so without a carrier. The kernel activates such a link
// later, from a work queue (linkwatch), and drops its packets until then. The
// hosts' ends work at once.
func (l *Lab) settle() error {
	for deadline := time.Now().Add(toolTime); ; {
		links, err := l.Gateway.Output("ip", "-brief", "link", "show", "up")
		if err != nil {
			return err
		}
		down := ""
		for line := range strings.Lines(links) {
			if f := strings.Fields(line); len(f) > 1 && f[0] != "lo" && f[1] != "UP" {
				down = line
			}
		}
		if down == "" {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("bring up link: still not ready: %s", down)
		}
	}
}

// wiring collects the input of "ip -batch -" for every host: one process each
// instead of one for each command.
type wiring struct {
	gateway  *Host
	families int // 1 is IPv4 alone, 2 is both
	scripts  map[*Host]*strings.Builder
}

func (w *wiring) add(h *Host, format string, args ...any) {
	if w.scripts[h] == nil {
		w.scripts[h] = new(strings.Builder)
	}
	fmt.Fprintf(w.scripts[h], format+"\n", args...)
}

func (w *wiring) outside(h *Host) {
	w.vethPair("wan0", "address "+outsideSegment.mac(), h, outsideSegment, outsideHost)
	w.setGatewayAddrs(outsideSegment, outsideHost)
	for f := range w.families {
		w.add(w.gateway, "route add %s via %s", everywhere[f], outsideHost[f])
		for _, prefix := range peerPrefixes[f] {
			w.add(h, "route add local %s dev lo", prefix)
		}
		for _, addr := range peers[f] { // for programs that list the addresses of links
			w.add(h, "addr add %s dev lo %s", addr, nodad[f])
		}
	}
	// Only IPv6 gets a route back: IPv4 packets must be translated to be answered.
	if w.families == 2 {
		w.add(h, "route add %s via %s", everywhere[1], outsideSegment.gateway(1))
	}
	w.gateway.setAddrs([2]netip.Addr{outsideSegment.gateway(0), outsideSegment.gateway(1)}, w.families)
	h.setAddrs([2]netip.Addr{PeerA, Peer6A}, w.families)
}

func (w *wiring) inside(hosts []*Host) {
	w.add(w.gateway, "link add lan0 address %s type bridge forward_delay 0", insideSegment.mac())
	var all [][2]netip.Addr
	for i, h := range hosts {
		all = append(all, insideHost(i))
		w.vethPair(fmt.Sprintf("lan0p%d", i), "master lan0", h, insideSegment, all[i])
		w.routeOut(h, insideSegment)
		h.setAddrs(all[i], w.families)
	}
	w.add(w.gateway, "link set lan0 up")
	w.setGatewayAddrs(insideSegment, all...)
}

func (w *wiring) guest(h *Host) {
	w.vethPair("guest0", "address "+guestSegment.mac(), h, guestSegment, guestHost)
	w.setGatewayAddrs(guestSegment, guestHost)
	w.routeOut(h, guestSegment)
	h.setAddrs(guestHost, w.families)
}

var (
	nodad      = [2]string{"", "nodad"} // otherwise an IPv6 address cannot be used for a second
	everywhere = [2]string{"0.0.0.0/0", "::/0"}
)

// vethPair makes a veth pair between a new port of the gateway and eth0 of h, and
// gives h its addresses. The pair is made in the gateway's namespace, never in the
// machine's.
func (w *wiring) vethPair(port, options string, h *Host, s segment, addrs [2]netip.Addr) {
	w.add(w.gateway, "link add %s %s up type veth peer name eth0 address %s netns %s",
		port, options, mac(addrs[0]), h.path())
	w.add(h, "link set lo up")
	w.add(h, "link set eth0 up")
	for f := range w.families {
		w.add(h, "addr add %s/%d dev eth0 %s", addrs[f], s.prefixes[f].Bits(), nodad[f])
		w.add(h, "neigh add %s lladdr %s dev eth0 nud permanent", s.gateway(f), s.mac())
	}
}

// setGatewayAddrs gives the gateway its addresses on a segment and the link addresses of
// the hosts there.
func (w *wiring) setGatewayAddrs(s segment, hosts ...[2]netip.Addr) {
	for f := range w.families {
		w.add(w.gateway, "addr add %s/%d dev %s %s", s.gateway(f), s.prefixes[f].Bits(), s.link, nodad[f])
		for _, addrs := range hosts {
			w.add(w.gateway, "neigh add %s lladdr %s dev %s nud permanent", addrs[f], mac(addrs[0]), s.link)
		}
	}
}

// routeOut routes all packets of h to the gateway.
func (w *wiring) routeOut(h *Host, s segment) {
	for f := range w.families {
		w.add(h, "route add %s via %s", everywhere[f], s.gateway(f))
	}
}

func (h *Host) setAddrs(addrs [2]netip.Addr, families int) {
	h.Addr = addrs[0]
	if families == 2 {
		h.Addr6 = addrs[1]
	}
}
