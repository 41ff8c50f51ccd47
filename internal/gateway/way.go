package gateway

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// mostWays is how many answers of a Way are kept.
const mostWays = 1024

// Way returns a function that finds the link by which an address is reached among
// those that are not outside, by longest match. It costs nothing until it is called,
// and keeps what it found, so only one goroutine may use it at a time.
func (n Network) Way() func(netip.Addr) (link string, ok bool) {
	var names map[int]string
	var found map[netip.Addr]string
	return func(a netip.Addr) (string, bool) {
		if found == nil {
			names, found = make(map[int]string), make(map[netip.Addr]string)
			for _, l := range n.Links {
				if !l.Outside && !l.is(unix.IFF_LOOPBACK) {
					names[l.Index] = l.Name
				}
			}
		}
		link, known := found[a]
		if !known {
			bits := -1
			for _, r := range n.Routes {
				if r.Prefix.Bits() > bits && r.Prefix.Contains(a) && names[r.Link] != "" {
					link, bits = names[r.Link], r.Prefix.Bits()
				}
			}
			if len(found) == mostWays {
				clear(found)
			}
			found[a] = link
		}
		return link, link != ""
	}
}
