package gateway

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Way returns a function that finds the link by which an address is reached, among links
// that are not outside links, by longest match. It costs nothing until it is called, and
// only one goroutine may use it at a time.
func (n Network) Way() func(netip.Addr) (link string, ok bool) {
	var links map[netip.Prefix]string
	return func(a netip.Addr) (string, bool) {
		if links == nil {
			links = n.ways()
		}
		for bits := a.BitLen(); bits >= 0; bits-- {
			if link, ok := links[netip.PrefixFrom(a, bits).Masked()]; ok {
				return link, true
			}
		}
		return "", false
	}
}

// ways returns the links of all routes by links that are not outside links, except default
// routes, by prefix.
func (n Network) ways() map[netip.Prefix]string {
	links, ways := n.links(), make(map[netip.Prefix]string)
	for _, r := range n.Routes {
		l, there := links[r.Link]
		if _, before := ways[r.Prefix.Masked()]; there && !before && !l.outsideFor(r.Prefix) && !isDefault(r.Prefix) && !l.is(unix.IFF_LOOPBACK) {
			ways[r.Prefix.Masked()] = l.Name
		}
	}
	return ways
}
