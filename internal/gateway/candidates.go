package gateway

import (
	"fmt"
	"net/netip"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

var private = []netip.Prefix{ // RFC 1918
	netip.MustParsePrefix("10.0.0.0/8"),
	netip.MustParsePrefix("172.16.0.0/12"),
	netip.MustParsePrefix("192.168.0.0/16"),
}

// A LAN is a link, up or down, that may have an inside network behind it, with the link's
// IPv4 networks.
type LAN struct {
	Link
	Networks []netip.Prefix
}

// LANs returns the links that are not outside links for IPv4, or that lead inside too. It
// leaves out tunnels and the links of containers and virtual machines on the gateway.
func (n Network) LANs() (lans []LAN) {
	for _, l := range n.Links {
		if l.Outside&IPv4 != 0 && !l.Inside || !l.lan() {
			continue
		}
		lan := LAN{Link: l}
		for _, a := range n.Addrs {
			if a.Link == l.Index && a.Prefix.Addr().Is4() {
				lan.Networks = append(lan.Networks, a.Prefix.Masked())
			}
		}
		lans = append(lans, lan)
	}
	return lans
}

// Candidates returns the prefixes of the families that look like a LAN behind the gateway:
// connected, on a link that is up and looks like a LAN; of IPv4 only private ones (RFC 1918),
// and of IPv6 those of a provider and those of RFC 4193. They are a proposal for the user's
// subnets, so what is doubtful is left out: links with an IPv4 address from DHCP, those named
// in uplinks, which are known to lead outside, and IPv6 prefixes of links that lead outside,
// for one family or both. If no outside link is known at all, any link may
// be one: then only networks with one of hosts, which are known to be inside, are candidates.
func (n Network) Candidates(families Families, uplinks map[string]bool, hosts []netip.Addr) []netip.Prefix {
	unknown := len(n.OutsideLinks()) == 0 && len(n.Missing) == 0 && len(uplinks) == 0
	return n.candidates(families, uplinks, func(p netip.Prefix) bool { return !unknown || slices.ContainsFunc(hosts, p.Contains) })
}

// Proposals returns the candidates of IPv4 if nothing is known about uplinks: the network of
// one may be among them.
func (n Network) Proposals() []netip.Prefix {
	return n.candidates(IPv4, nil, func(netip.Prefix) bool { return true })
}

func (n Network) candidates(families Families, uplinks map[string]bool, may func(netip.Prefix) bool) []netip.Prefix {
	leased := func(l Link) bool {
		return slices.ContainsFunc(n.Addrs, func(a Addr) bool { return a.Link == l.Index && a.Leased && a.Prefix.Addr().Is4() })
	}
	var outside []netip.Prefix
	for _, l := range n.Links {
		if !l.Inside && l.Outside != 0 || uplinks[l.Name] {
			outside = append(outside, n.Connected(l.Name)...)
		}
	}
	likely := func(p netip.Prefix) bool {
		if p.Addr().Is4() {
			return families&IPv4 != 0 && Covered(p, private)
		}
		return families&IPv6 != 0 && !slices.ContainsFunc(outside, p.Overlaps)
	}
	var found []netip.Prefix
	for _, l := range n.LANs() {
		if uplinks[l.Name] || !l.is(unix.IFF_UP) || leased(l.Link) {
			continue
		}
		for _, p := range n.Connected(l.Name) {
			if likely(p) && may(p) {
				found = append(found, p)
			}
		}
	}
	return unique(found)
}

// PassedOver says which connected private IPv4 networks are no proposals, and why, such as
// "10.8.0.0/24 on wg0, a link of kind wireguard, as tunnels, containers or virtual machines have".
func (n Network) PassedOver() (all []string) {
	proposals := n.Proposals()
	for _, l := range n.Links {
		why := ""
		switch {
		case l.is(unix.IFF_LOOPBACK) || l.Outside&IPv4 != 0 && !l.Inside:
			continue
		case !l.lan():
			why = l.notLAN()
		case !l.is(unix.IFF_UP):
			why = "which is down"
		default:
			why = "which has its address by DHCP"
		}
		for _, a := range n.Addrs {
			if p := a.Prefix.Masked(); a.Link == l.Index && !p.IsSingleIP() && Covered(p, private) && !slices.Contains(proposals, p) {
				all = append(all, fmt.Sprintf("%v on %s, %s", p, l.Name, why))
			}
		}
	}
	return all
}

// LeftOut says which IPv4 networks behind LANs are no candidates, because they are not private or a route
// leads to them, such as "10.99.0.0/16 on lan1, to which a route leads". It leaves out those that are enabled.
func (n Network) LeftOut(enabled []netip.Prefix) (all []string) {
	for _, l := range n.LANs() {
		if !l.is(unix.IFF_UP) {
			continue
		}
		for _, p := range unique(slices.Clone(l.Networks)) {
			if !p.IsSingleIP() && !p.Addr().IsLinkLocalUnicast() && !Covered(p, private) && !Covered(p, enabled) {
				all = append(all, fmt.Sprintf("%v on %s, which is not private", p, l.Name))
			}
		}
		var routed []netip.Prefix
		for _, r := range n.Routes {
			if r.Link == l.Index && !r.Prefix.IsSingleIP() && r.Table == unix.RT_TABLE_MAIN && Covered(r.Prefix, private) && !Covered(r.Prefix, l.Networks) && !Covered(r.Prefix, enabled) {
				routed = append(routed, r.Prefix)
			}
		}
		for _, p := range unique(routed) { // there may be several routes, of other metrics
			all = append(all, fmt.Sprintf("%v on %s, to which a route leads", p, l.Name))
		}
	}
	return all
}

// NotProposed returns what PassedOver and, if nothing is enabled, LeftOut return.
func (n Network) NotProposed() []string { return slices.Concat(n.PassedOver(), n.LeftOut(nil)) }

// lanKinds are the kinds of link that a LAN can be behind. All others are tunnels, links of
// containers and virtual machines, and the like.
var lanKinds = []string{"", "bond", "bridge", "dsa", "macvlan", "openvswitch", "team", "vlan"}

// hostLinks are name prefixes of links, most of them bridges, that lead to containers and
// virtual machines on the gateway itself.
var hostLinks = []string{
	"cali", "cbr", "cni", "docker", "flannel", "incus", "kube", "lxc", "lxd",
	"nerdctl", "podman", "vboxnet", "veth", "virbr", "vmnet", "vnet", "weave",
}

func (l Link) lan() bool { return l.notLAN() == "" }

// notLAN says why a link is not one that a LAN can be behind; it is empty if it is one.
func (l Link) notLAN() string {
	switch {
	case slices.ContainsFunc(hostLinks, func(s string) bool { return strings.HasPrefix(l.Name, s) }), dockerBridge.MatchString(l.Name):
		return "which has the name of a link of containers or virtual machines"
	case !slices.Contains(lanKinds, l.Kind):
		return "a link of kind " + l.Kind + ", as tunnels, containers or virtual machines have"
	case l.Flags&(unix.IFF_LOOPBACK|unix.IFF_POINTOPOINT|unix.IFF_NOARP) != 0:
		return "a point-to-point link, as tunnels are"
	}
	return ""
}

// dockerBridge matches the name of a bridge of "docker network create".
var dockerBridge = regexp.MustCompile(`^br-[0-9a-f]{12}$`)
