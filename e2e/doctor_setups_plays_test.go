package e2e

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

// What makes the set-ups of TestDoctorNamesTheCause, and what is played in them.

// ip returns a function that changes links, addresses and routes of the gateway.
func ip(commands ...string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		for _, c := range commands {
			s.IP(s.Gateway, c)
		}
	}
}

// all does one thing after the other.
func all(steps ...func(s *scene)) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		for _, f := range steps {
			f(s)
		}
	}
}

// holds keeps a socket of the gateway open.
func holds(addr string, port uint16) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		s.gatewaySocket(addr, port, "", false)
	}
}

// noPlay is for what packets cannot show, or what TestDoctorsLinesRepair plays.
func noPlay(*patient) {}

// keepsPort checks that a host has one outside port towards all peers, and is reached there.
func keepsPort(p *patient) {
	p.T.Helper()
	p.newcomer()
}

// backupUplink adds an uplink that is not in use.
func backupUplink(s *scene) {
	s.T.Helper()
	s.AddLink("wan1", secondUplinkAddr)
	s.IP(s.Gateway, "route add default via 198.51.100.254 dev wan1 onlink metric 200")
}

// looseReversePath lets packets come by either uplink.
func looseReversePath(s *scene) {
	s.T.Helper()
	for _, link := range []string{"all", "wan0", "wan1"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "2"))
	}
}

// failsOver lets the default route move to the other uplink.
func failsOver(p *patient) {
	p.T.Helper()
	phone, peer := p.InsideSocket(0, 5060), p.PeerSocket(lab.PeerA, 5060)
	p.Contact(phone, peer)
	p.IP(p.Gateway, "route replace default via 198.51.100.254 dev wan1 onlink")
	p.heals(phone, peer, netip.MustParseAddr(secondUplinkAddr))
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 5070), netip.AddrPortFrom(netip.MustParseAddr(secondUplinkAddr), 5060))
}

// zonesPlay is reaches, once the first flow has shown the zone.
func zonesPlay(p *patient) {
	p.T.Helper()
	p.Contact(p.InsideSocket(0, 5050), p.PeerSocket(lab.PeerA, 5050))
	p.zonesAreServed()
	p.reaches(5060, !p.lost)
}

// groupIsLost checks that what peers of a group send from other ports is lost.
func groupIsLost(p *patient) {
	p.T.Helper()
	phone, proxy := p.InsideSocket(0, 5060), p.PeerSocket(lab.PeerA, 5060)
	ext := p.Contact(phone, proxy)
	p.standsFor(netip.MustParsePrefix("203.0.113.0/24"), phone, ext)
	p.Lost(phone, p.PeerSocket(lab.PeerA, 5061), ext, proxy)
}

// groupGetsIn checks that peers of a group of 16 get in from any port, and nobody else.
func groupGetsIn(p *patient) {
	p.T.Helper()
	phone, proxy := p.InsideSocket(0, 5060), p.PeerSocket(lab.PeerA, 5060)
	ext := p.Contact(phone, proxy)
	p.standsFor(netip.MustParsePrefix("203.0.113.0/28"), phone, ext)
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 5061), ext)
	p.Arrives(phone, p.PeerSocket(lab.PeerB, 5062), ext)
	p.Lost(phone, p.PeerSocket(lab.PeerC, 5061), ext, proxy)
}

const forOneProvider = `iifname "wan0" ip saddr 192.0.2.0/24 udp dport 30000-30100 dnat to 10.47.11.110`

// losesTheProvider checks that what the provider sends from another port is lost, outside of
// the ports of its forward.
func losesTheProvider(p *patient) {
	p.T.Helper()
	phone, proxy := p.InsideSocket(0, 30050), p.PeerSocket(lab.PeerC, 30050)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
}

const warrior = "10.47.11.200"

// roadWarrior gives a host of the LAN a way by wan0, for answers alone.
func roadWarrior(s *scene) {
	s.T.Helper()
	for _, link := range []string{"all", "wan0"} {
		s.Must(s.Gateway.SetSysctl("net.ipv4.conf."+link+".rp_filter", "0"))
	}
	s.IP(s.Gateway, "rule add iif lan0 lookup 100")
	s.IP(s.Gateway, "route add "+warrior+"/32 via 198.51.100.254 dev wan0 table 100")
	s.IP(s.Outside, "addr add "+warrior+"/32 dev lo")
	s.IP(s.Outside, "route add table local unicast 192.0.2.99/32 via 198.51.100.1")
	s.Must(s.NFT("insert rule inet filter forward ip saddr " + warrior + " accept"))
}

// warriorPasses checks that a packet of the road warrior is not dropped as spoofed.
func warriorPasses(p *patient) {
	p.T.Helper()
	p.Must(p.Socket(p.Outside.Namespace, netip.MustParseAddr(warrior), 5060).Send(netip.MustParseAddrPort("192.0.2.99:5060"), "x"))
	p.Until("the packet passed", func() bool { return len(p.ConntrackList("-p", "udp", "--orig-src", warrior)) > 0 })
	p.reaches(5060, true)
}

// toRouted translates to an address that is not on wan0.
var toRouted = strings.Replace(lab.Masquerade, "masquerade", "snat to "+routedAddr, 1) + acceptsBoth

// outsideAddr gives the gateway routedAddr in one of the ways of ownAddresses.
func outsideAddr(way string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		ip(ownAddresses[way]...)(s)
		s.IP(s.Outside, "route add "+routedAddr+"/32 via 198.51.100.1 dev eth0")
	}
}

// selfIsReached lets a peer reach a program of the gateway from another port.
func selfIsReached(p *patient) {
	p.T.Helper()
	p.reached(p.newPBX(p.Gateway.Addr))
}

// manyForwards loads port forwards that do not matter.
func manyForwards(s *scene) {
	s.T.Helper()
	var b strings.Builder
	for port := range 2000 {
		fmt.Fprintf(&b, "iifname \"wan0\" tcp dport %d dnat to 10.47.11.110\n", 20000+port)
	}
	s.Must(s.NFT(forwardChain("dstnat", b.String())))
}

// flaps makes and removes a link with an address and a route, again and again.
func flaps(s *scene) {
	s.T.Helper()
	for range 10 {
		ip("link add flap type veth peer name flip", "addr add 10.99.0.1/24 dev flap", "link set flap up", "route add 10.98.0.0/24 dev flap", "link del flap")(s)
	}
}

// savesRuleset runs doctor where a file that distributions load at boot has what nft lists now.
func savesRuleset(p *patient) {
	p.T.Helper()
	p.reaches(5060, true)
	p.saved()
}

// saved saves what nft lists now, as /etc/nftables.conf of the program, and returns its path.
func (p *patient) saved() string {
	p.T.Helper()
	list, err := p.Gateway.Output("nft", "list", "ruleset")
	p.Must(err)
	etc, program := p.T.TempDir(), filepath.Join(p.T.TempDir(), "conenatd")
	path := filepath.Join(etc, "nftables.conf")
	p.Must(os.WriteFile(path, []byte(list), 0o644))
	p.Must(os.WriteFile(program, fmt.Appendf(nil, `#!/bin/sh
exec unshare --mount --propagation private sh -ec 'mount --bind %s /etc; exec %s "$@"' sh "$@"
`, etc, p.Exe), 0o755))
	p.Exe = program
	return path
}

// renumbers gives the inside link another network.
func renumbers(s *scene) {
	s.T.Helper()
	ip("addr add 10.47.13.1/24 dev lan0", "addr del 10.47.11.1/24 dev lan0")(s)
	s.IP(s.Inside(0), "addr add 10.47.13.109/24 dev eth0")
	s.IP(s.Inside(0), "route replace default via 10.47.13.1 dev eth0 src 10.47.13.109")
}

// renumberedIsServed checks that a peer reaches the host at its new address.
func renumberedIsServed(p *patient) {
	p.T.Helper()
	p.Until("the new network is served", func() bool { return strings.Join(p.enabled(), " ") == "10.47.13.0/24" })
	phone, proxy := p.Socket(p.Inside(0).Namespace, netip.MustParseAddr("10.47.13.109"), 5060), p.PeerSocket(lab.PeerA, 5060)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 5061), ext)
}

// inUserNamespace runs doctor in a user namespace, in a gateway with links to nowhere. The
// self-test shows there that packets pass.
func inUserNamespace(p *patient) {
	p.T.Helper()
	dir := p.T.TempDir()
	rules, program := filepath.Join(dir, "rules"), filepath.Join(dir, "conenatd")
	p.Must(os.WriteFile(rules, []byte(usual.Rules), 0o644))
	p.Must(os.WriteFile(program, fmt.Appendf(nil, `#!/bin/sh
exec unshare --user --map-root-user --net sh -ec '
for link in lan0 wan0; do ip link add $link type veth peer name $link.; ip link set $link up; ip link set $link. up; done
ip addr add 10.47.11.1/24 dev lan0
ip addr add 198.51.100.1/24 dev wan0
ip route add default via 198.51.100.254
echo 1 > /proc/sys/net/ipv4/ip_forward
nft -f %s
exec %s "$@"' sh "$@"
`, rules, p.Exe), 0o755))
	p.Exe = program
	if out, code := p.CLI("selftest"); code != 0 {
		p.T.Fatalf("exit %d: %s", code, out)
	}
}

// forwardsLater lets a new forward take effect while flows begin.
func forwardsLater(p *patient) {
	p.T.Helper()
	defer p.newFlows(20)()
	phone, proxy, server := p.InsideSocket(0, 5060), p.PeerSocket(lab.PeerA, 5060), p.InsideSocket(1, 5060)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 5070), ext)
	p.Must(p.NFT(`add rule ip forwards pre iifname "wan0" udp dport 5060 dnat to 10.47.11.110`))
	p.Arrives(server, p.PeerSocket(lab.PeerA, 5071), ext)
}

// reachesBesideAForward is reaches on ports of the forward.
func reachesBesideAForward(p *patient) {
	p.T.Helper()
	phone, proxy := p.InsideSocket(0, 30050), p.PeerSocket(lab.PeerA, 30050)
	ext := p.Contact(phone, proxy)
	p.Stands(phone, proxy, ext)
	p.Arrives(phone, p.PeerSocket(lab.PeerA, 30051), ext)
	p.Lost(phone, p.PeerSocket(stranger, 30051), ext, proxy)
}
