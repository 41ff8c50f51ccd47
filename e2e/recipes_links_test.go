package e2e

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/conenatd/conenatd/e2e/stage"
	"github.com/conenatd/conenatd/internal/lab"
)

// The links that the pages name, as a test's kernel can make them: a link that needs a
// driver of its own (ppp0, wg0, tailscale0) becomes a plain link with that name.

// rename gives a link of the gateway another name.
func (s *scene) rename(link, name string) {
	s.T.Helper()
	s.IP(s.Gateway, "link set "+link+" down")
	s.IP(s.Gateway, "link set "+link+" name "+name)
	s.LinkUp(name)
}

// proxmoxBridges gives the first host a bridge of its own, as a guest with a firewall has.
func proxmoxBridges(s *scene) {
	s.T.Helper()
	s.rename("wan0", "vmbr0")
	s.IP(s.Gateway, "route add default via 198.51.100.254")
	s.rename("lan0", "vmbr1")
	s.IP(s.Gateway, "link add fwbr100i0 type bridge forward_delay 0")
	s.IP(s.Gateway, "link add fwln100i0 type veth peer name fwpr100p0")
	s.IP(s.Gateway, "link set fwpr100p0 master vmbr1")
	s.IP(s.Gateway, "link set fwln100i0 master fwbr100i0")
	s.IP(s.Gateway, "link set lan0p0 master fwbr100i0")
	s.rename("lan0p0", "tap100i0")
	for _, link := range []string{"fwbr100i0", "fwpr100p0", "fwln100i0"} {
		s.IP(s.Gateway, "link set "+link+" up")
	}
	s.LinkUp("fwln100i0")
}

const (
	pppAddr     = "198.51.100.129"
	nextPPPAddr = "198.51.100.130"
)

// dialUp moves the outside behind ppp0, and leaves wan0 without an address.
func dialUp(s *scene) {
	s.T.Helper()
	s.IP(s.Gateway, "addr flush dev wan0")
	s.connect(pppAddr)
}

func (s *scene) connect(addr string) {
	s.T.Helper()
	s.AddLink("ppp0", addr)
	s.IP(s.Gateway, "route add default dev ppp0")
}

// reconnects shows that a new connection with another address ends the old permissions, and
// that hosts get new ones.
func (r *recipe) reconnects() {
	r.T.Helper()
	r.IP(r.Gateway, "link del ppp0")
	r.endsAllOf(pppAddr)
	if n := r.Status().Counters.Revoked["address_gone"]; n == 0 {
		r.T.Errorf("revoked: %v", r.Status().Counters.Revoked)
	}
	r.connect(nextPPPAddr)
	r.from = nextPPPAddr
	r.answers(6300)
	r.forwards(true)
}

// endsAllOf waits until no permission stands on this outside address.
func (r *recipe) endsAllOf(addr string) {
	r.T.Helper()
	r.Until("permissions of "+addr+" ended", func() bool {
		for _, p := range r.List() {
			if p.Ext.Addr().String() == addr && p.State == "standing" {
				return false
			}
		}
		return true
	})
}

const secondUplinkAddr = "198.51.100.129"

// secondUplink adds wan1. Each provider drops packets with the other provider's address.
func secondUplink(s *scene) {
	s.T.Helper()
	s.AddLink("wan1", secondUplinkAddr)
	_, err := s.Outside.Output("nft", fmt.Sprintf(`table ip provider {
	counter wrong {}
	chain prerouting {
		type filter hook prerouting priority raw;
		iifname "eth0" ip saddr %s counter name wrong drop
		iifname "wan1" ip saddr %v counter name wrong drop
	}
}`, secondUplinkAddr, s.Gateway.Addr))
	s.Must(err)
}

// needsMarks shows that without the page's line replies to children leave by the wrong
// uplink, and with it none does.
func (r *recipe) needsMarks() {
	r.T.Helper()
	const children = 24
	if wrong := r.repliesByTheWrongUplink(6080, 20_000, children); wrong == 0 {
		r.T.Errorf("without the line all %d replies are right", children)
	}
	r.load(pageLine)
	if wrong := r.repliesByTheWrongUplink(6081, 30_000, children); wrong != 0 {
		r.T.Errorf("with the line %d of %d replies are wrong", wrong, children)
	}
}

// repliesByTheWrongUplink lets the phone reply to n ports of a peer, and returns how many
// of the replies the provider drops.
func (r *recipe) repliesByTheWrongUplink(port, firstMedia uint16, n int) (wrong int) {
	r.T.Helper()
	before := r.dropped()
	phone, proxy, ext := r.contact(port)
	r.Stands(phone, proxy, ext)
	waiting := make(map[*lab.Socket]string)
	for i := range n {
		media := r.PeerSocket(lab.PeerA, firstMedia+uint16(i))
		r.Arrives(phone, media, ext)
		reply := stage.Payload("reply to child")
		r.Must(phone.Send(media.Addr(), reply))
		waiting[media] = reply
	}
	r.Until("each reply has arrived or was dropped", func() bool {
		for media, reply := range waiting {
			got, _, err := media.Recv(time.Millisecond)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				continue
			}
			r.Must(err)
			if got == reply {
				delete(waiting, media)
			}
		}
		wrong = r.dropped() - before
		return len(waiting) == wrong
	})
	return wrong
}

// bindsAHost shows that the second host, and its replies to children, leave by the second
// uplink only.
func (r *recipe) bindsAHost() {
	r.T.Helper()
	r.load(pageOneLink)
	before := r.dropped()
	for port := uint16(6200); port < 6208; port++ {
		phone, proxy := r.InsideSocket(1, port), r.PeerSocket(lab.PeerA, port)
		ext := r.Contact(phone, proxy)
		if ext.Addr().String() != secondUplinkAddr {
			r.T.Fatalf("it leaves as %v", ext)
		}
		r.Stands(phone, proxy, ext)
		media := r.PeerSocket(lab.PeerA, port+1000)
		r.Arrives(phone, media, ext)
		r.replies(phone, media, ext)
	}
	if wrong := r.dropped() - before; wrong != 0 {
		r.T.Errorf("%d packets left by the wrong uplink", wrong)
	}
}

var packets = regexp.MustCompile(`packets (\d+)`)

// dropped returns how many packets the providers dropped.
func (r *recipe) dropped() (n int) {
	r.T.Helper()
	out, err := r.Outside.Output("nft", "list", "counter", "ip", "provider", "wrong")
	r.Must(err)
	_, err = fmt.Sscan(packets.FindStringSubmatch(out)[1], &n)
	r.Must(err)
	return n
}

// staysInItsBlocks shows that hosts leave only by the customer's ports, and each inside
// port by one of them, unless the rule gave it a port that another host has.
func (r *recipe) staysInItsBlocks() {
	r.T.Helper()
	peers := []*lab.Socket{r.PeerSocket(lab.PeerA, 3074), r.PeerSocket(lab.PeerB, 3074), r.PeerSocket(lab.PeerC, 3074)}
	taken := make(map[netip.AddrPort]bool)
	for _, p := range r.List() {
		taken[p.Ext] = true
	}
	for i := range 2 {
		console := r.InsideSocket(i, 3074)
		ext := r.Contact(console, peers[0])
		for port := uint16(3075); taken[ext]; port++ {
			console = r.InsideSocket(i, port)
			ext = r.Contact(console, peers[0])
		}
		taken[ext] = true
		if p := ext.Port(); (p < 7472 || p > 7487) && (p < 11568 || p > 11583) {
			r.T.Errorf("host %d leaves by port %d", i, p)
		}
		for _, peer := range peers[1:] {
			if other := r.Contact(console, peer); other != ext {
				r.T.Errorf("host %d leaves as %v and as %v", i, ext, other)
			}
		}
	}
}

// tunnelGivesNoPermission shows that packets into the tunnel are not translated and give no
// permission.
func (r *recipe) tunnelGivesNoPermission() {
	r.T.Helper()
	office := netip.MustParseAddr("10.99.0.5")
	r.IP(r.Outside, "addr add "+office.String()+"/32 dev lo")
	phone, far := r.InsideSocket(0, 6200), r.PeerSocket(office, 6200)
	if seen := r.Contact(phone, far); seen != phone.Addr() {
		r.T.Errorf("it leaves as %v", seen)
	}
	r.Until("its flow is skipped", func() bool { return r.Status().Counters.Skipped["untranslated"] == 1 })
	for _, p := range r.List() {
		if p.Peer == office {
			r.T.Errorf("%+v", p)
		}
	}
}

const wgAddr = "10.66.0.2"

func wireguardLinks(s *scene) {
	s.T.Helper()
	s.AddLink("wg0", wgAddr)
	guestNetwork("wg1", "10.66.67.1/24", "10.66.67.2")(s)
}

const virtualAddr = "198.51.100.10"

// virtualMAC puts the outside address on a macvlan of wan0.
func virtualMAC(s *scene) {
	s.T.Helper()
	const mac = "00:00:5e:00:01:33"
	s.IP(s.Gateway, "link add vrrp51 link wan0 address "+mac+" type macvlan mode private")
	s.IP(s.Gateway, "addr add "+virtualAddr+"/32 dev vrrp51")
	for _, link := range []string{"all", "vrrp51", "wan0"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
	}
	s.LinkUp("vrrp51")
	s.IP(s.Outside, "neigh replace "+virtualAddr+" lladdr "+mac+" dev eth0 nud permanent")
}

// fallsOver shows that permissions end with the virtual address, and come back when hosts
// send, also for a flow that began on another gateway.
func (r *recipe) fallsOver() {
	r.T.Helper()
	r.IP(r.Gateway, "link del vrrp51")
	r.endsAllOf(virtualAddr)
	virtualMAC(r.scene)
	r.answers(6300)

	phone, proxy := r.InsideSocket(0, 6400), r.PeerSocket(lab.PeerA, 6400)
	_, err := r.Gateway.Output("conntrack", strings.Fields("-I -p udp -t 60 -s 10.47.11.109 -d 203.0.113.5 --sport 6400 --dport 6400 --src-nat "+virtualAddr)...)
	r.Must(err)
	ext := netip.AddrPortFrom(netip.MustParseAddr(virtualAddr), 6400)
	r.Stands(phone, proxy, ext)
	r.Arrives(phone, r.PeerSocket(lab.PeerA, 6401), ext)
}
