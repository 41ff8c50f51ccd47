package userrules

import (
	"bytes"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A Diversion is what a rule takes from inside hosts: new UDP flows to some ports, which it
// translates to another destination, or gives to a transparent proxy or a conntrack helper.
type Diversion struct {
	// Hosts and Peers are sorted and disjoint, and may be long. nil stands for any. Several
	// Diversions may share a list.
	Hosts, Peers cone.AddrRanges
	Ports        cone.PortRanges // of the peers
	Text         string          // names the rule, as in a Forward
}

// Takes reports whether the rule takes what a host sends to a peer.
func (d Diversion) Takes(host netip.Addr, peer netip.AddrPort) bool {
	has := func(all cone.AddrRanges, a netip.Addr) bool { return all == nil || hasAddr(all, a) }
	return d.Ports.Has(peer.Port()) && has(d.Hosts, host) && has(d.Peers, peer.Addr())
}

// Sides are where the packets of flows come from, and where peers are.
type Sides struct {
	Inside  []Link         // links that lead to Subnets
	Subnets []netip.Prefix // of the inside hosts
	Outside []Link
}

func (s Sides) equal(o Sides) bool {
	return slices.EqualFunc(s.Inside, o.Inside, Link.Equal) && slices.EqualFunc(s.Outside, o.Outside, Link.Equal) && slices.Equal(s.Subnets, o.Subnets)
}

// A Diverter finds the diversions in one Ruleset after the other. It looks only at tables that
// changed. The zero value is ready for use.
type Diverter struct {
	sides Sides
	found map[*table][]Diversion
}

// Diversions returns the diversions of UDP packets that come from inside. same says that the
// answer is that of the last call. Of the conditions of a rule, and of the jumps to it,
//
//   - ports, hosts, peers, the protocol, the family, and links count, also negated;
//   - a set whose elements expire, or that has the flag dynamic, stands for all hosts or peers,
//     and so does a named set of single hosts whose packets the rule takes: packets may add others;
//   - what is the same for all first packets of flows from hosts to peers counts: the state,
//     status and direction of the flow, the packet type, and the types of addresses. So a rule
//     for packets to the gateway itself (fib daddr type local) is left out;
//   - anything else, such as a mark, a MAC address, a limit, or a set of ipset, may hold for all
//     packets: it is ignored.
//
// So a Diversion may be wider than its rule, but is not narrower. Only a rule for most of the
// ports is left out if it has such a condition: nothing would be left for other hosts. What an
// earlier rule accepts, or returns, is not part of a Diversion, if all of its conditions are
// understood and Hosts, Peers and Ports can say it. Sets of hosts for that, and those that a rule
// excludes, count as they are at the time of the reading, if they are not long.
//
// Translations to other hosts that concern packets from outside to the gateway as well are port
// forwards, and left out.
func (d *Diverter) Diversions(rs *Ruleset, sides Sides) (all []Diversion, same bool) {
	before := d.found
	if !d.sides.equal(sides) {
		before = nil
	}
	same = before != nil && len(before) == len(rs.tables)
	d.sides, d.found = sides, make(map[*table][]Diversion)
	for _, t := range rs.tables {
		found, known := before[t]
		if !known {
			found, same = t.diversions(sides), false
		}
		d.found[t] = found
		all = append(all, found...)
	}
	return all, same
}

func (t *table) diversions(sides Sides) (found []Diversion) {
	if t = t.settled(); t.failed != nil {
		return nil
	}
	begin := condition{family: t.family}
	forwards := make(map[string]bool)
	forward := &walker{table: t, outside: sides.Outside, seen: map[string]bool{}, first: &firstPacket{dest: unix.RTN_LOCAL}}
	forward.translates = func(r *rule, conds []condition) {
		if slices.ContainsFunc(conds, func(c condition) bool { return !sides.isInside(c.sources) }) && !r.redirects() {
			forwards[r.title(t)] = true
		}
	}
	w := &walker{table: t, outside: sides.Inside, seen: map[string]bool{}, first: &firstPacket{dest: unix.RTN_UNICAST, out: sides.Outside}}
	w.finds = func(s statement) bool { return t.givesHelper(s) || s.proxies() }
	w.helps = func(r *rule, conds []condition) {
		for _, c := range conds {
			if c.ports == nil {
				c.ports = everyPort
			}
			if !c.wide || !mostPorts(c.ports) {
				f := c.forward(r.title(t))
				found = append(found, Diversion{f.Sources, f.Addrs, f.Ports, f.Text})
			}
		}
	}
	w.translates = func(r *rule, conds []condition) {
		if !forwards[r.title(t)] {
			w.helps(r, conds)
		}
	}
	for _, b := range t.of(unix.NF_INET_PRE_ROUTING, natKind) {
		forward.accepted = letPass{}
		forward.chain(b.name, begin, 0)
	}
	for _, b := range t.bases {
		if b.purposes()&forHelpers != 0 {
			w.accepted = letPass{}
			w.chain(b.name, begin, 0)
		}
	}
	return found
}

// mostPorts reports whether the ports are more than half of all.
func mostPorts(ranges cone.PortRanges) bool {
	return ranges.Len() > 1<<15
}

// isInside reports whether all sources are inside hosts.
func (s Sides) isInside(sources cone.AddrRanges) bool {
	var inside cone.AddrRanges
	for _, p := range s.Subnets {
		inside = append(inside, cone.RangeOf(p))
	}
	others, some := exceptAddrs(sources, inside.Merged())
	return some && len(others) == 0
}

// redirects reports whether the rule leads packets to the gateway itself.
func (r *rule) redirects() bool {
	return slices.ContainsFunc(r.statements, func(s statement) bool {
		target, ok := s.expr.(*expr.Target)
		_, redirects := s.expr.(*expr.Redir)
		return redirects || ok && target.Name == "REDIRECT"
	})
}

// proxies reports whether a statement hands packets to a transparent proxy.
func (s statement) proxies() bool {
	target, ok := s.expr.(*expr.Target)
	return s.name == "tproxy" || ok && target.Name == "TPROXY"
}

// GivesHelpers reports whether a rule gives flows a conntrack helper, whichever flows these are,
// or may do so because it was not read. Rules for packets from or to the gateway itself are not
// read.
func (rs *Ruleset) GivesHelpers() bool {
	return len(rs.hidden) > 0 || slices.ContainsFunc(rs.tables, (*table).givesHelpers)
}

func (t *table) givesHelpers() bool {
	if t.unread() {
		return true
	}
	for _, c := range t.chains {
		for i := range c.rules {
			if slices.ContainsFunc(c.rules[i].statements, func(s statement) bool { return t.givesHelper(s) || t.leadsAnywhere(s) }) {
				return true
			}
		}
	}
	return false
}

// givesHelper reports whether a statement gives flows a conntrack helper: "ct helper set" of nft,
// or the target CT of iptables.
func (t *table) givesHelper(s statement) bool {
	switch e := s.expr.(type) {
	case *expr.Objref:
		return e.Type == objectCtHelper
	case *objrefMap:
		m := t.sets[e.set]
		return m != nil && m.failed == nil && m.objects == objectCtHelper
	case *expr.Target:
		info, ok := e.Info.(*xt.Unknown)
		return ok && e.Name == "CT" && len(*info) >= ctHelperEnd && !bytes.HasPrefix((*info)[ctHelper:], []byte{0})
	}
	return false
}

// leadsAnywhere reports whether a statement looks up a chain or an object in a map that was not
// read. Maps are not read where no UDP packet gets.
func (t *table) leadsAnywhere(s statement) bool {
	switch e := s.expr.(type) {
	case *expr.Lookup:
		return e.IsDestRegSet && e.DestRegister == unix.NFT_REG_VERDICT && t.sets[e.SetName] == nil
	case *objrefMap:
		return t.sets[e.set] == nil
	}
	return false
}

const (
	objectCtHelper = 3 // NFT_OBJECT_CT_HELPER

	// Struct xt_ct_target_info begins with 16 bits of flags, and has the name of the helper here, in
	// all revisions.
	ctNoTrack   = 1 << 0 // XT_CT_NOTRACK
	ctHelper    = 12
	ctHelperEnd = ctHelper + 16
)
