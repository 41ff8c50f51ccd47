package userrules

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
)

// A SourceNAT says to what a rule translates the sources of IPv4 packets, for UDP packets.
// Like a Forward it never says less than the rule does.
type SourceNAT struct {
	// Addrs are the addresses that the rule uses. A masquerade instead uses an address of
	// the link by which the packet leaves.
	Addrs      cone.AddrRanges
	Masquerade bool
	// ChoosesPort says that the rule names, or may name, the ports among which the kernel
	// chooses. Random says that the kernel chooses at random.
	ChoosesPort, Random bool
	// Ports are the ports that the rule names; none if they are not known.
	Ports cone.PortRanges
	// Links are the links by which the packets leave; a name that ends with an asterisk is
	// a pattern; nil stands for any. Sources are the sources of the packets; nil stands for
	// any.
	Links   []string
	Sources cone.AddrRanges
	// Partial says that the rule may not translate all packets that match.
	Partial bool
	// Unknown says that there may be other addresses: from a map that packets change, or that was not
	// read, or from something that is not understood.
	Unknown bool
	// asks says that other properties of the packets, for example a mark or their
	// destination, decide whether the rule translates them.
	asks bool
	// byOther says that it is neither their sources, nor links, nor known destinations.
	byOther bool
	// dests are the destinations of the packets; nil stands for any.
	dests cone.AddrRanges
	// few says that the rule is for packets to certain destinations or to few ports alone.
	few bool
	// Text names the rule as in a Forward, and Chain the base chain that leads to it, as
	// Chain.String does.
	Text, Chain string
}

// SourceNAT returns what the rules do to the sources of UDP packets over IPv4. It follows
// the NAT chains of the postrouting hook and the chains that they jump to. The result is never
// nil: nil stands for rules that were not read. It is found once, and callers must not change it.
func (rs *Ruleset) SourceNAT() (all []SourceNAT) {
	all, _ = rs.sourceNAT()
	return all
}

// Untranslated returns the packets to destinations that rules name as untranslated: by
// letting these packets pass, or by translating only what goes elsewhere. It may return more
// than the truth. As with SourceNAT, callers must not change it.
func (rs *Ruleset) Untranslated() []SourceNAT {
	_, exempt := rs.sourceNAT()
	return exempt
}

func (rs *Ruleset) sourceNAT() (all, exempt []SourceNAT) {
	rs.sourcesFound.Do(func() { rs.sources, rs.exempt = rs.findSources() })
	return slices.Clip(rs.sources), slices.Clip(rs.exempt)
}

func (rs *Ruleset) findSources() (all, exempt []SourceNAT) {
	all = []SourceNAT{}
	for _, t := range rs.sourceTables(unix.NFPROTO_IPV4) {
		if t.failed != nil {
			all = append(all, SourceNAT{ChoosesPort: true, Unknown: true, Text: t.failed.Error()})
		}
		w := &walker{table: t, seen: map[string]bool{}}
		var base string
		w.sources = func(r *rule, n SourceNAT, conds []condition) {
			for _, c := range conds {
				n.Text, n.Chain, n.Links, n.Sources, n.dests = r.title(t), base, c.out, c.sources, c.addrs
				n.asks = c.asks || w.exempts || c.ports != nil || c.addrs != nil
				n.byOther = c.asks || c.ports != nil || c.unread
				n.few = c.addrs != nil || !c.mostPorts()
				n.Partial = c.wide || w.exempts || c.ports != nil || c.addrs != nil
				all = append(all, n)
				if c.except != nil {
					exempt = append(exempt, SourceNAT{Links: c.out, Sources: c.sources, dests: c.except})
				}
			}
		}
		w.passes = func(conds []condition) {
			for _, c := range conds {
				if c.addrs != nil {
					exempt = append(exempt, SourceNAT{Links: c.out, Sources: c.sources, dests: c.addrs})
				}
			}
		}
		for _, b := range t.of(unix.NF_INET_POST_ROUTING, natKind) {
			base = t.title + " " + b.name
			w.chain(b.name, condition{family: unix.NFPROTO_IPV4}, 0)
		}
		for _, f := range w.found {
			all = append(all, SourceNAT{ChoosesPort: true, Unknown: true, Sources: f.Sources, Text: f.Text})
		}
	}
	return all, exempt
}

// FixedSources returns the addresses to which rules translate the source of IPv4 packets on
// any outgoing link, other than by masquerading. unknown says that there are or may be
// more: in rules that are not understood or could not be read, or in tables of
// iptables-legacy that only root can see. A packet that leaves by one link with the address
// of another link can have that address only from such a rule.
func (rs *Ruleset) FixedSources() (addrs cone.AddrRanges, unknown bool) {
	for _, t := range rs.tables {
		unknown = unknown || t.torn && t.has(unix.NFPROTO_IPV4)
	}
	for _, t := range rs.sourceTables(unix.NFPROTO_IPV4) {
		unknown = unknown || t.failed != nil
		t.each(func(name string, c *chain) {
			unknown = unknown || c.failed != nil || c.odd != ""
			for i := range c.rules {
				n := t.sourceNAT(&c.rules[i])
				addrs, unknown = append(addrs, n.Addrs...), unknown || n.Unknown
			}
		})
	}
	return addrs, unknown || rs.SourcesMayBeHidden()
}

// PortChoosers returns the rules that choose a port when they translate the source of UDP
// packets over IPv4; other rules keep the port if they can. They choose from a block or a
// map (RFC 7422, MAP-E), or at random. A flow must not leave by any other port. A rule that
// chooses at random among all ports, but only for some packets, does not count (Kubernetes
// has one for marked packets; another may be for DNS): it may give any port. The result
// includes rules that are not understood, and a table of iptables-legacy that cannot be
// read, but not one that only root can see (SourcesMayBeHidden). An error says that a table
// of nftables could not be read.
func (rs *Ruleset) PortChoosers() (rules []SourceNAT, err error) {
	for _, t := range rs.sourceTables(unix.NFPROTO_IPV4) {
		t.each(func(name string, c *chain) {
			if c.failed != nil && err == nil {
				err = fmt.Errorf("read nftables table %s: chain %s: %w", t.title, name, c.failed)
			}
		})
	}
	return slices.DeleteFunc(slices.Clone(rs.SourceNAT()), func(n SourceNAT) bool { return !n.ChoosesPort && (!n.Random || n.asks) }), err
}

// SourcesMayBeHidden reports whether iptables-legacy may have source NAT that only root can
// see.
func (rs *Ruleset) SourcesMayBeHidden() bool { return rs.hides(legacy4, natTable) }

// sourceTables returns the tables that may translate the sources of packets of a family.
func (rs *Ruleset) sourceTables(family byte) (all []*table) {
	for _, t := range rs.tables {
		t = t.settled()
		if t.has(family) && (len(t.of(unix.NF_INET_POST_ROUTING, natKind)) > 0 || t.failed != nil && t.name == natTable) {
			all = append(all, t)
		}
	}
	return all
}

// each calls f for each chain, sorted by name.
func (t *table) each(f func(name string, c *chain)) {
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		f(name, t.chains[name])
	}
}

// translatesSource reports whether a statement translates sources.
func (s *statement) translatesSource() bool {
	switch e := s.expr.(type) {
	case *expr.NAT:
		return e.Type == expr.NATTypeSourceNAT
	case *expr.Masq:
		return true
	case *expr.Target:
		return e.Name == "MASQUERADE" || slices.Contains(fixedTargets, e.Name)
	}
	return false
}

// Flags of struct nf_nat_range.
const (
	rangeAddrs      = 1 << 0 // NF_NAT_RANGE_MAP_IPS
	rangePorts      = 1 << 1 // NF_NAT_RANGE_PROTO_SPECIFIED
	rangeRandom     = 1<<2 | 1<<4
	rangePersistent = 1 << 3 // NF_NAT_RANGE_PERSISTENT
)

// sourceNAT returns to what a rule translates sources, if it does.
func (t *table) sourceNAT(r *rule) (n SourceNAT) {
	loaded := make(map[uint32][]byte) // constants, by register
	found := make(map[uint32]*set)    // maps whose values are in registers
	for _, s := range r.statements {
		if reg, loads := loads(s.expr); loads {
			delete(loaded, reg)
			delete(found, reg)
		} else if s.expr == nil { // not understood
			clear(found)
		}
		switch e := s.expr.(type) {
		case *expr.Immediate:
			loaded[e.Register] = e.Data
		case *expr.Lookup:
			if e.IsDestRegSet {
				found[e.DestRegister] = t.sets[e.SetName]
			}
		case *expr.NAT:
			if s.translatesSource() {
				n.nat(e, loaded, found)
			}
		case *expr.Masq:
			n.Masquerade = true
			n.ChoosesPort = n.ChoosesPort || e.ToPorts
			n.chooses(e.RegProtoMin, e.RegProtoMax, loaded)
			n.Random = n.Random || e.Random || e.FullyRandom
		case *expr.Target: // of iptables
			if s.translatesSource() {
				n.target(e)
			}
		}
	}
	return n
}

// nat adds a statement that translates to an address, with the constants and the maps of the registers.
func (n *SourceNAT) nat(e *expr.NAT, loaded map[uint32][]byte, found map[uint32]*set) {
	n.chooses(e.RegProtoMin, e.RegProtoMax, loaded)
	n.Random = n.Random || e.Random || e.FullyRandom
	if e.RegAddrMin == 0 {
		return
	}
	if s := found[e.RegAddrMin]; s != nil {
		n.fromMap(e, s)
		return
	}
	first, ok := netip.AddrFromSlice(loaded[e.RegAddrMin])
	last := first
	if ok && e.RegAddrMax != 0 {
		last, ok = netip.AddrFromSlice(loaded[e.RegAddrMax])
	}
	if !ok {
		n.Unknown = true
		return
	}
	n.Addrs = append(n.Addrs, cone.AddrRange{First: first, Last: last})
}

// fromMap adds the addresses, ranges or prefixes of all values of a map.
func (n *SourceNAT) fromMap(e *expr.NAT, s *set) {
	size, last := 4, 0
	if e.Family == unix.NFPROTO_IPV6 {
		size = 16
	}
	if e.RegAddrMax != 0 {
		last = 4 * (word(e.RegAddrMax) - word(e.RegAddrMin))
	}
	n.Unknown = n.Unknown || s.failed != nil || !s.loaded || s.changing
	for _, el := range s.elements {
		if last < 0 || len(el.value) < last+size {
			n.Unknown = true
			return
		}
		n.Addrs = append(n.Addrs, addrRange(el.value[:size], el.value[last:last+size]))
	}
	n.Addrs = n.Addrs.Merged()
}

// fixedTargets are the iptables targets with fixed addresses. Rules of nftables may have
// them, too.
var fixedTargets = []string{"SNAT", "NETMAP", "SAME"}

// target adds a target of iptables.
func (n *SourceNAT) target(e *expr.Target) {
	fixed, named := slices.Contains(fixedTargets, e.Name), e.Name == "SNAT" || e.Name == "MASQUERADE"
	n.Masquerade = n.Masquerade || e.Name == "MASQUERADE"
	if to := xtPrefix(e.Info); e.Name == "NETMAP" && to.IsValid() {
		n.Addrs = append(n.Addrs, cone.RangeOf(to))
		return
	}
	ranges, ok := e.Info.(*xt.NatIPv4MultiRangeCompat)
	if !ok {
		n.ChoosesPort, n.Unknown = n.ChoosesPort || named, n.Unknown || fixed
		return
	}
	for _, r := range *ranges {
		if named && r.Flags&rangePorts != 0 {
			n.ChoosesPort, n.Ports = true, append(n.Ports, cone.PortRange{First: r.MinPort, Last: r.MaxPort})
		}
		n.Random = n.Random || r.Flags&rangeRandom != 0
		first, _ := netip.AddrFromSlice(r.MinIP)
		last, _ := netip.AddrFromSlice(r.MaxIP)
		if fixed && r.Flags&rangeAddrs != 0 {
			n.Addrs = append(n.Addrs, cone.AddrRange{First: first, Last: last})
		}
	}
}

// LeavesBy reports whether packets that the rule translates may leave by a link.
func (n *SourceNAT) LeavesBy(link string) bool {
	return n.Links == nil || slices.ContainsFunc(n.Links, func(l string) bool { return covered(l, link) })
}

// Within returns those IPv4 subnets, or parts of them, whose packets the rule may
// translate.
func (n *SourceNAT) Within(subnets []netip.Prefix) (all []netip.Prefix) {
	if n.Sources == nil {
		return slices.Clone(subnets)
	}
	for _, s := range subnets {
		whole := cone.RangeOf(s)
		for _, r := range intersectAddrs(cone.AddrRanges{whole}, n.Sources) {
			all = append(all, r.Prefixes()...)
		}
	}
	return all
}
