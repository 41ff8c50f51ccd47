package gateway

import "slices"

// Segments returns, for each link with an address or a route, the other links of the gateway by
// which packets of its network segment may come, by name and sorted. Whoever can send a packet by
// one of these links can also send it by the link itself. They are
//
//   - links that are another MAC or IP address of the link below, as VRRP makes them, and
//   - bridges, of which the firewall sees the packets that they bridge (br_netfilter): a bridge
//     for the firewall of a virtual machine is a port of the bridge that the gateway routes by
//     (Proxmox), through a pair of veth.
//
// A bridge that filters VLANs joins no segments: its ports may lead to different ones.
func (n Network) Segments() map[string][]string { return segments(n.links(), n.used()) }

// Bridges returns the names of the bridges that have ports, and no address or route of the gateway:
// it routes nothing to or from them.
func (n Network) Bridges() []string { return bridges(n.links(), n.used()) }

func bridges(links map[int]Link, used map[int]bool) (names []string) {
	for _, l := range links {
		if bridge, ok := portOf(l, links); ok && !used[bridge.Index] {
			names = append(names, bridge.Name)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// used returns the indexes of the links with an address or a route.
func (n Network) used() map[int]bool {
	used := map[int]bool{}
	for _, a := range n.Addrs {
		used[a.Link] = used[a.Link] || !local(a.Prefix.Addr())
	}
	for _, r := range n.Routes {
		used[r.Link] = used[r.Link] || !local(r.Prefix.Addr())
	}
	return used
}

func segments(links map[int]Link, used map[int]bool) map[string][]string {
	joined := join(links)
	members := map[int][]string{}
	for _, l := range links {
		if arrives(l, links) {
			segment := joined.of(l.Index)
			members[segment] = append(members[segment], l.Name)
		}
	}
	found := map[string][]string{}
	for _, l := range links {
		if _, port := portOf(l, links); port || !used[l.Index] {
			continue
		}
		others := slices.DeleteFunc(slices.Sorted(slices.Values(members[joined.of(l.Index)])), func(name string) bool { return name == l.Name })
		if len(others) > 0 {
			found[l.Name] = others
		}
	}
	return found
}

// arrives reports whether packets of hosts come by the link. What comes by one end of a pair of
// veth, the gateway itself sent by the other end, and packets to a port come by its bridge.
func arrives(l Link, links map[int]Link) bool {
	_, port := portOf(l, links)
	_, pair := pairOf(l, links)
	return !port && !pair
}

// A segmentation has the segment of each link, by index: one of the links of the segment.
type segmentation map[int]int

func join(links map[int]Link) segmentation {
	s := segmentation{}
	for _, l := range links {
		if bridge, ok := portOf(l, links); ok && !bridge.VLANs {
			s.join(l.Index, bridge.Index)
		}
		if other, ok := pairOf(l, links); ok {
			s.join(l.Index, other.Index)
		}
		if below, ok := l.below(links); ok && l.sharesLower() {
			s.join(l.Index, below.Index)
		}
	}
	return s
}

func (s segmentation) of(link int) int {
	for next, ok := s[link]; ok; next, ok = s[link] {
		link = next
	}
	return link
}

func (s segmentation) join(a, b int) {
	if a, b = s.of(a), s.of(b); a != b {
		s[a] = b
	}
}

// sameSegment reports whether two readings of a link mean the same for Segments and Bridges.
func (l Link) sameSegment(o Link) bool {
	return l.Name == o.Name && l.Kind == o.Kind && l.Lower == o.Lower && l.Elsewhere == o.Elsewhere && l.Master == o.Master && l.VLANs == o.VLANs
}

// portOf returns the bridge of which the link is a port.
func portOf(l Link, links map[int]Link) (bridge Link, ok bool) {
	bridge, ok = links[l.Master]
	return bridge, ok && bridge.Kind == "bridge"
}

// pairOf returns the other end of a pair of veth, if it is in the same network namespace.
func pairOf(l Link, links map[int]Link) (other Link, ok bool) {
	other, ok = l.below(links)
	return other, ok && l.Kind == "veth"
}

// below returns the link below (IFLA_LINK), if it is in the same network namespace.
func (l Link) below(links map[int]Link) (below Link, ok bool) {
	below, ok = links[l.Lower]
	return below, ok && !l.Elsewhere
}
