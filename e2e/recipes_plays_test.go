package e2e

import (
	"net/netip"
	"strings"

	"github.com/conenatd/conenatd/internal/lab"
)

func insideHost(i int) func(s *scene) *lab.Host {
	return func(s *scene) *lab.Host { return s.Inside(i) }
}
func guestHost(s *scene) *lab.Host { return s.Guest }

// plays are the pages of docs/recipes.
var plays = []recipePlay{
	{page: "nftables", forward: &forwarded{port: 3478, peer: stranger, host: insideHost(1), to: 3478}},
	{page: "iptables", forward: &forwarded{port: 3478, peer: stranger, host: insideHost(1), to: 3478}},
	{page: "iptables", variant: lab.IPTablesLegacy, forward: &forwarded{port: 3478, peer: stranger, host: insideHost(1), to: 3478}},

	// Firewalls that write their rules themselves.
	{page: "firewalld", forward: &forwarded{port: 5060, peer: stranger, host: insideHost(0), to: 5070}},
	{page: "ufw", forward: &forwarded{port: 5060, peer: stranger, host: insideHost(0), to: 5060}},
	{
		page: "openwrt", forward: &forwarded{port: 5060, peer: stranger, host: insideHost(0), to: 5060},
		beforeMap: func(r *recipe) { r.deleteRule("inet fw4 forward_wan", "ct status dnat accept") },
	},
	{
		page: "docker", guest: true, links: guestNetwork("docker0", "172.17.0.1/16", "172.17.0.2"),
		forward: &forwarded{port: 3478, peer: stranger, host: guestHost, to: 3478},
		also:    (*recipe).guestIsAnswered,
	},
	{page: "libvirt"},
	{page: "libvirt-iptables"},
	{page: "vyos", from: "198.51.100.1 198.51.100.2 198.51.100.3 198.51.100.4", links: vyosAddresses, forward: &forwarded{port: 5060, peer: stranger, host: insideHost(0), to: 5060, byLine: true}},
	{page: "shorewall", forward: &forwarded{port: 5060, peer: lab.PeerA, host: insideHost(0), to: 5060}},
	{page: "firehol", forward: &forwarded{port: 5060, peer: stranger, host: insideHost(0), to: 5060, byLine: true}},

	// Links and routes.
	{page: "proxmox", links: proxmoxBridges},
	{page: "pppoe", from: pppAddr, links: dialUp, forward: &forwarded{port: 3478, peer: stranger, host: insideHost(1), to: 3478}, also: (*recipe).reconnects},
	{page: "two-uplinks", from: "198.51.100.1 " + secondUplinkAddr, links: secondUplink, needs: (*recipe).needsMarks, also: (*recipe).bindsAHost},
	{page: "map-e", also: (*recipe).staysInItsBlocks},
	{page: "ipsec", also: (*recipe).tunnelGivesNoPermission},
	{page: "wireguard", from: wgAddr, guest: true, links: wireguardLinks, also: (*recipe).guestIsAnswered},
	{page: "tailscale", guest: true, links: guestNetwork("tailscale0", "100.101.102.1/32", "100.101.102.103"), also: (*recipe).guestIsAnswered},
	{page: "sip-helper", proxyPort: 5060},
	{page: "keepalived", from: virtualAddr, links: virtualMAC, forward: &forwarded{port: 3478, peer: stranger, host: insideHost(1), to: 3478}, also: (*recipe).fallsOver},
}

// guestNetwork renames the link to the guest, and gives it another network and the
// guest another address.
func guestNetwork(link, gateway, host string) func(s *scene) {
	return func(s *scene) {
		s.T.Helper()
		at, bits, _ := strings.Cut(gateway, "/")
		s.IP(s.Gateway, "link set guest0 down")
		s.IP(s.Gateway, "addr flush dev guest0")
		s.IP(s.Gateway, "link set guest0 name "+link)
		s.IP(s.Gateway, "addr add "+gateway+" dev "+link)
		s.LinkUp(link)
		s.IP(s.Guest, "addr flush dev eth0")
		s.IP(s.Guest, "addr add "+host+"/"+bits+" dev eth0")
		s.IP(s.Guest, "route add default via "+at+" dev eth0 onlink")
		s.Guest.Addr = netip.MustParseAddr(host)
	}
}

// guestIsAnswered shows that a host of the second network has permissions, too.
func (r *recipe) guestIsAnswered() {
	r.T.Helper()
	const port = 6200
	phone, proxy := r.Socket(r.Guest.Namespace, r.Guest.Addr, port), r.PeerSocket(lab.PeerA, port)
	ext := r.Contact(phone, proxy)
	r.Stands(phone, proxy, ext)
	media := r.PeerSocket(lab.PeerA, port+1)
	r.Arrives(phone, media, ext)
	r.Lost(phone, r.PeerSocket(stranger, port+1), ext, proxy)
	r.replies(phone, media, ext)
}

// deleteRule deletes the first rule of a chain that has the text.
func (r *recipe) deleteRule(chain, text string) {
	r.T.Helper()
	out, err := r.Gateway.Output("nft", append([]string{"-a", "list", "chain"}, strings.Fields(chain)...)...)
	r.Must(err)
	for line := range strings.Lines(out) {
		if _, handle, ok := strings.Cut(line, "# handle "); ok && strings.Contains(line, text) {
			r.Must(r.NFT("delete rule " + chain + " handle " + handle))
			return
		}
	}
	r.T.Fatalf("no rule %q in\n%s", text, out)
}

// vyosAddresses gives wan0 all addresses that the rules translate to.
func vyosAddresses(s *scene) {
	s.T.Helper()
	for _, a := range []string{"198.51.100.2/24", "198.51.100.3/24", "198.51.100.4/24"} {
		s.IP(s.Gateway, "addr add "+a+" dev wan0")
	}
}
