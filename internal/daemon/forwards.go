package daemon

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// forwards returns the outside endpoints that the user's rules forward, and warnings about those
// rules that may keep peers away from hosts of the subnets. covered stays the same pointer as long
// as it covers the same. If the rules cannot be read, the last reading holds.
func (f *firewall) forwards(subnets []netip.Prefix, network gateway.Network) (covered *userrules.Covered, out warnings) {
	outside := outsideLinks(network)
	if len(outside) == 0 {
		return nil, nil
	}
	if f.unread != nil {
		f.forwardsKnown = false
		if f.forwarded == nil { // unknown rules may forward everything
			f.forwarded = userrules.Cover([]userrules.Forward{{All: true}})
			f.understood, f.shared = f.forwarded, f.forwarded
		}
		out = f.warnForwards(subnets)
		out.add(warnForwardsUnread, "", "port forwards cannot be read, "+
			"those that were read before hold, and all ports count as forwarded if none were: %v", f.unread)
		return f.forwarded, out
	}
	all, same := f.forwarder.Forwards(f.user, outside)
	f.forwardsKnown = !f.user.ForwardsMayBeHidden() && !slices.ContainsFunc(all, func(r userrules.Forward) bool { return r.Unknown })
	if same && f.forwarded != nil {
		return f.forwarded, f.warnForwards(subnets)
	}
	f.told, f.telling.of = nil, nil
	var possible, understood, certain, hiding []userrules.Forward
	var dests cone.AddrRanges
	for _, r := range all {
		dests = append(dests, r.Addrs...)
		if r.Unread || r.Unknown || r.Most {
			f.told = append(f.told, r)
		}
		if r.Unread {
			continue
		}
		possible = append(possible, r)
		if r.Unknown || r.Astray {
			continue
		}
		understood = append(understood, r)
		if r.Certain() {
			certain = append(certain, r)
		}
		if !r.Partial && r.Sources == nil {
			hiding = append(hiding, r)
		}
	}
	f.telling.understood = understood
	f.destinations = dests.Merged()
	f.reached = reachedBy(all)
	cover(&f.forwarded, possible)
	cover(&f.understood, understood)
	cover(&f.taken, certain)
	cover(&f.hidden, hiding)
	return f.forwarded, f.warnForwards(subnets)
}

// leads returns where forwards lead packets of the peers of a permission: those of forwarded may take
// some, those of hidden take all.
func leads(forwarded, hidden *userrules.Covered) func(cone.Permission) cone.Forwarding {
	return func(p cone.Permission) cone.Forwarding {
		if to := forwarded.Forwards(p); to != cone.ForwardedElsewhere || !hidden.ConflictsWith(p) {
			return to
		}
		return cone.ForwardedAll
	}
}

// mostReached limits for how many hosts the rules are asked what they let forwards lead there.
const mostReached = 64

// reachedBy returns the hosts to which forwards lead.
func reachedBy(all []userrules.Forward) (hosts []netip.Prefix) {
	for _, r := range all {
		if to := leadsTo(r); to.IsValid() {
			hosts = append(hosts, to)
		}
	}
	return slices.Compact(slices.SortedFunc(slices.Values(hosts), netip.Prefix.Compare))
}

// leadsTo returns the host or the prefix to which a forward leads, the zero value if that is not known.
func leadsTo(r userrules.Forward) netip.Prefix {
	if a := r.To.Addr(); a.IsValid() {
		return netip.PrefixFrom(a, a.BitLen())
	}
	return r.ToPrefix
}

// reachedIn returns those of hosts that are in one of the subnets, for each subnet by themselves: the
// subnets may be behind different links. There are at most mostReached.
func reachedIn(subnets, hosts []netip.Prefix) (all []netip.Prefix) {
	for _, h := range hosts {
		for _, s := range subnets {
			switch {
			case !h.Overlaps(s):
			case h.Bits() < s.Bits():
				all = append(all, s)
			default:
				all = append(all, h)
			}
		}
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	all = slices.Compact(all)
	return all[:min(len(all), mostReached)]
}

// cover sets c to what the forwards cover. As long as that is the same, the pointer stays.
func cover(c **userrules.Covered, forwards []userrules.Forward) {
	if next := userrules.Cover(forwards); !next.Equal(*c) {
		*c = next
	}
}

// warnForwards says what the user should know about forwards.
func (f *firewall) warnForwards(subnets []netip.Prefix) (out warnings) {
	for _, r := range f.worthTelling() {
		if r.Unread || keepsAway(r, subnets) {
			out.addForward(r, f.withMap)
		}
	}
	return out
}

// keepsAway reports whether the forward may take packets for hosts of the subnets that are not the one,
// or those, to which it leads, or for other ports of that host than the one to which it leads.
func keepsAway(r userrules.Forward, subnets []netip.Prefix) bool {
	to := leadsTo(r)
	return slices.ContainsFunc(subnets, func(s netip.Prefix) bool {
		if r.To.Port() == 0 && to.IsValid() && to.Bits() <= s.Bits() && to.Contains(s.Addr()) {
			return false
		}
		return r.Addrs == nil || slices.ContainsFunc(r.Addrs, func(a cone.AddrRange) bool { return a.First.Is4() == s.Addr().Is4() })
	})
}

// worthTelling returns the forwards to warn of, without those that are 1:1 NAT, and finds shared. It
// compares each with all source NAT, so it does so again only if something changed.
func (f *firewall) worthTelling() []userrules.Forward {
	if t := &f.telling; t.of == nil || t.of != f.user || !maps.Equal(t.own, f.ownAddrs) {
		t.of, t.own = f.user, f.ownAddrs
		t.all = slices.DeleteFunc(slices.Clone(f.told), func(r userrules.Forward) bool {
			return !r.Unread && !r.Unknown && f.isOneToOne(r)
		})
		if f.user != nil { // else all that may be forwarded is
			cover(&f.shared, slices.DeleteFunc(slices.Clone(t.understood), func(r userrules.Forward) bool {
				return r.Most && f.isOneToOne(r)
			}))
		}
	}
	return f.telling.all
}

// isOneToOne reports whether the forward is for addresses to which rules certainly translate no other
// host than the one it leads to, or those of the prefix (1:1 NAT): it keeps nobody's peers away.
func (f *firewall) isOneToOne(r userrules.Forward) bool {
	hosts := leadsTo(r)
	if f.user == nil || r.Addrs == nil || !hosts.Addr().Is4() || f.user.SourcesMayBeHidden() {
		return false
	}
	of := func(a netip.Addr) bool {
		return !a.IsValid() || r.Addrs.Has(a)
	}
	return !slices.ContainsFunc(f.user.SourceNAT(), func(n userrules.SourceNAT) bool {
		if len(n.Sources) == 1 && hosts.Contains(n.Sources[0].First) && hosts.Contains(n.Sources[0].Last) {
			return false
		}
		masquerades := n.Masquerade && len(f.ownAddrs) == 0
		for link, own := range f.ownAddrs {
			masquerades = masquerades || n.Masquerade && n.LeavesBy(link) && of(own)
		}
		return n.Unknown || masquerades || slices.ContainsFunc(n.Addrs, func(a cone.AddrRange) bool {
			return slices.ContainsFunc(r.Addrs, a.Overlaps)
		})
	})
}

// addForward adds what the user should know about a forward. withMap says that there is a map.
func (w *warnings) addForward(r userrules.Forward, withMap bool) {
	if n := len(*w); n > 0 && r.Most && (*w)[n-1].About == r.Text {
		return // the same rule, for other addresses
	}
	switch {
	case r.Unread:
		w.add(warnForwardsUnread, r.Text, "port forwards cannot be read, "+
			"those that were read before hold, and others are known from their first flow on only: %s", r.Text)
	case r.Unknown:
		who := "nobody gets in"
		if withMap {
			who = "the map alone admits"
		}
		w.add(warnForwardUnknown, r.Text,
			"a forward is not understood, so that no expectation stands where it may lead a packet elsewhere, and %s there: %s", who, r.Text)
	case r.Most:
		ports, them := "all", "its addresses"
		if !r.All {
			ports, them = "most", "these"
		}
		if r.Partial || r.Sources != nil {
			w.add(warnForwardsAll, r.Text, "a rule forwards %s ports of what it matches: no permission admits that to another host, "+
				"and no expectation stands for a peer that may send it: %s", ports, r.Text)
			return
		}
		to, host := "", "an"
		if p := leadsTo(r); p.IsSingleIP() {
			to, host = fmt.Sprintf(" to %v", p.Addr()), "another"
		} else if p.IsValid() {
			to, host = fmt.Sprintf(" to %v", p), "another"
		}
		w.add(warnForwardsAll, r.Text,
			"a rule forwards %s ports%s, so that no peer gets to %s inside host by a permission on %s: %s", ports, to, host, them, r.Text)
	}
}

// forwardOf returns the first forward that may lead a packet of peer to ext elsewhere, nil if
// none does. One that is certain comes before one that is not. If several may, and lead to different
// endpoints, the returned one has none. One that is astray is returned if there is no other.
func forwardOf(all []userrules.Forward, peer netip.Addr, ext netip.AddrPort) (found *userrules.Forward) {
	for i := range all {
		r := &all[i]
		has := func(a cone.AddrRange) bool { return a.Has(peer) }
		switch {
		case r.Sources != nil && !slices.ContainsFunc(r.Sources, has):
		case !r.Covers(cone.EndpointFrom(ext)):
		case r.Certain():
			return r
		case found == nil, found.Astray && !r.Astray:
			found = r
		case r.Astray:
		case found.To != r.To || found.ToPrefix != r.ToPrefix:
			several := *found
			several.To, several.ToPrefix = netip.AddrPort{}, netip.Prefix{}
			found = &several
		}
	}
	return found
}
