package gateway

import "net/netip"

// AddrsOf returns the addresses of an outside link whose packets come from outside by no other link:
// no other link has them, and no other outside link shares a network with this one, by its addresses
// or as a macvlan. A router that sends packets for them to another link all the same cannot be seen.
func (n Network) AddrsOf(l Link) (addrs []netip.Addr) {
	for _, o := range n.Links {
		if o.Index != l.Index && o.Outside != 0 && n.shareNetwork(l, o) {
			return nil
		}
	}
	links := make(map[netip.Addr]int) // how many have the address
	for _, a := range n.Addrs {
		links[a.Prefix.Addr()]++
	}
	for _, a := range n.Addrs {
		if a.Link == l.Index && !local(a.Prefix.Addr()) && links[a.Prefix.Addr()] == 1 {
			addrs = append(addrs, a.Prefix.Addr())
		}
	}
	return addrs
}

// shareNetwork reports whether a router in a network of one link may send packets by the other.
func (n Network) shareNetwork(l, o Link) bool {
	switch {
	case l.sharesLower() && o.sharesLower() && l.Lower == o.Lower && l.Elsewhere == o.Elsewhere,
		l.sharesLower() && !l.Elsewhere && l.Lower == o.Index, o.sharesLower() && !o.Elsewhere && o.Lower == l.Index:
		return true
	}
	for _, a := range n.Addrs {
		for _, b := range n.Addrs {
			alone := a.Prefix.IsSingleIP() && b.Prefix.IsSingleIP() // unnumbered links: one address says nothing of others
			if a.Link == l.Index && b.Link == o.Index && !alone && !local(a.Prefix.Addr()) && a.Prefix.Overlaps(b.Prefix) {
				return true
			}
		}
	}
	return false
}
