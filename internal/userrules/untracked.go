package userrules

import (
	"encoding/binary"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// An Untracked is a rule that keeps UDP packets of a subnet's hosts, or of their peers, from
// conntrack (notrack): nothing translates such packets, and they belong to no flow.
type Untracked struct {
	Subnet    netip.Prefix
	FromPeers bool
	// Ports are where the packets go: for those from hosts, the ports of the peers, otherwise those
	// of the outside address, or of the hosts of a routed subnet, which are more than half of all.
	Ports cone.PortRanges
	Text  string // names the rule, as in a Forward
	// Spec are the words by which iptables-legacy deletes the rule from its chain; none for other rules,
	// and if they would not say all of it.
	Spec []string
}

// Untracked returns the rules before conntrack in prerouting that take packets of hosts to peers, or
// those that come from outside for most of the ports: others are for ports of the gateway's own. routed
// are those of the subnets that nothing translates. Of the conditions of a rule, it takes the same
// into account as Diversions; a rule for packets from outside is left out if it has others.
func (rs *Ruleset) Untracked(sides Sides, routed []netip.Prefix) (found []Untracked) {
	for _, t := range rs.tables {
		if t = t.settled(); t.failed != nil {
			continue
		}
		add := func(r *rule, subnets []netip.Prefix, fromPeers bool, c condition) {
			hosts := c.sources
			if fromPeers {
				hosts = c.addrs
			}
			for _, s := range subnets {
				u := Untracked{s, fromPeers, orEvery(c.ports), r.title(t), r.spec}
				if c.family != unix.NFPROTO_INET && c.family != familyOf(s) || hosts != nil && !slices.ContainsFunc(hosts, cone.RangeOf(s).Overlaps) && (!fromPeers || slices.Contains(routed, s)) {
					continue
				}
				if !slices.ContainsFunc(found, func(o Untracked) bool {
					return o.Subnet == u.Subnet && o.FromPeers == u.FromPeers && o.Text == u.Text && slices.Equal(o.Ports, u.Ports)
				}) {
					found = append(found, u)
				}
			}
		}
		translated := slices.DeleteFunc(slices.Clone(sides.Subnets), func(p netip.Prefix) bool { return slices.Contains(routed, p) })
		for _, way := range []struct {
			by, out   []Link
			dest      uint32 // where the packets go, before NAT
			subnets   []netip.Prefix
			fromPeers bool
		}{
			{sides.Inside, sides.Outside, unix.RTN_UNICAST, sides.Subnets, false},
			{sides.Outside, nil, unix.RTN_LOCAL, translated, true},
			{sides.Outside, sides.Inside, unix.RTN_UNICAST, routed, true},
		} {
			w := &walker{table: t, outside: way.by, seen: map[string]bool{}, first: &firstPacket{dest: way.dest, out: way.out}}
			w.translates = func(*rule, []condition) {}
			w.finds = statement.untracks
			w.helps = func(r *rule, conds []condition) {
				for _, c := range conds {
					if !way.fromPeers || !c.wide && mostPorts(orEvery(c.ports)) && mayBePeers(c.sources) {
						add(r, way.subnets, way.fromPeers, c)
					}
				}
			}
			for _, b := range t.of(unix.NF_INET_PRE_ROUTING, "") {
				if len(way.subnets) > 0 && b.hookPriority() < priorityConntrack {
					w.accepted = letPass{}
					w.chain(b.name, condition{family: t.family}, 0)
				}
			}
		}
	}
	return found
}

// mayBePeers reports whether one of the sources, nil for any, is no private address.
func mayBePeers(sources cone.AddrRanges) bool {
	return sources == nil || slices.ContainsFunc(sources, func(r cone.AddrRange) bool { return !r.First.IsPrivate() || !r.Last.IsPrivate() })
}

// untracks reports whether a statement keeps packets from conntrack.
func (s statement) untracks() bool {
	e, ok := s.expr.(*expr.Target)
	switch {
	case !ok:
		return s.name == "notrack"
	case e.Name == "CT":
		info, ok := e.Info.(*xt.Unknown)
		return ok && len(*info) >= 2 && binary.NativeEndian.Uint16(*info)&ctNoTrack != 0
	}
	return e.Name == "NOTRACK"
}
