package userrules

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A SourceNAT is what a rule translates the sources of IPv4 packets to, as far as UDP
// packets are concerned. Like a Forward it never says less than the rule does.
type SourceNAT struct {
	// Addrs are the addresses that it takes. A masquerade takes one of the link by which
	// the packet leaves instead.
	Addrs      []AddrRange
	Masquerade bool
	// ChoosesPort says that it names the ports among which the kernel chooses, or may do so,
	// and Random that it chooses at random.
	ChoosesPort, Random bool
	// Ports are those that it names; none where they are not known.
	Ports []PortRange
	// Links are those by which the packets leave, a pattern with an asterisk at its end;
	// nil stands for any. Sources are those of the packets; nil stands for any.
	Links   []string
	Sources []AddrRange
	// Partial says that the rule may leave packets alone that it seems to translate.
	Partial bool
	// Unknown says that there may be other addresses: from a map, or in what is not
	// understood.
	Unknown bool
	// asks says that what else the packets are decides whether it translates them: by a mark
	// or to whom they go, say.
	asks bool
	// Text names the rule as that of a Forward does, and Chain the base chain that leads to
	// it, as a Chain does.
	Text, Chain string
}

// SourceNAT returns what the rules do to the sources of UDP packets over IPv4. It follows
// the NAT chains of the postrouting hook, and what they jump to.
func (rs *Ruleset) SourceNAT() (all []SourceNAT) {
	for _, t := range rs.sourceTables() {
		if t.failed != nil {
			all = append(all, SourceNAT{ChoosesPort: true, Unknown: true, Text: t.failed.Error()})
		}
		w := &walker{table: t, seen: map[string]bool{}}
		var base string
		w.sources = func(r *rule, n SourceNAT, conds []condition) {
			for _, c := range conds {
				n.Text, n.Chain, n.Links, n.Sources = r.title(t), base, c.out, c.sources
				n.asks = c.asks || w.exempts || c.ports != nil || c.addrs != nil
				n.Partial = c.partial || w.exempts || c.ports != nil || c.addrs != nil
				all = append(all, n)
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
	return all
}

// FixedSources returns to which addresses rules translate the source of IPv4 packets,
// whatever link these leave by; a masquerade is no such rule. unknown says that there are
// others, or may be: in what is not understood or could not be read, or in tables of
// iptables-legacy that only root may know of. A packet that leaves by a link with the
// address of another one may have it from such a rule alone.
func (rs *Ruleset) FixedSources() (addrs []AddrRange, unknown bool) {
	for _, t := range rs.tables {
		unknown = unknown || t.torn && t.has(unix.NFPROTO_IPV4)
	}
	for _, t := range rs.sourceTables() {
		unknown = unknown || t.failed != nil
		t.each(func(name string, c *chain) {
			unknown = unknown || c.failed != nil || c.odd != ""
			for i := range c.rules {
				n := c.rules[i].sourceNAT()
				addrs, unknown = append(addrs, n.Addrs...), unknown || n.Unknown
			}
		})
	}
	return addrs, unknown || rs.SourcesMayBeHidden()
}

// PortChoosers returns those rules that choose a port when they translate the source of UDP
// packets over IPv4, where others keep it if they can: those of a block, or of a map
// (RFC 7422, MAP-E), and at random. A flow must not leave by another port. A rule for some
// packets that chooses at random among all ports is none (that of Kubernetes, for marked
// ones, or one for DNS): any port is one that it gives. What is not understood is among
// them, and a table of iptables-legacy that cannot be read, but not one that only root may
// know of (SourcesMayBeHidden). An error says that a table of nftables could not be read.
func (rs *Ruleset) PortChoosers() (rules []SourceNAT, err error) {
	for _, t := range rs.sourceTables() {
		t.each(func(name string, c *chain) {
			if c.failed != nil && err == nil {
				err = fmt.Errorf("read nftables table %s: chain %s: %w", t.title, name, c.failed)
			}
		})
	}
	return slices.DeleteFunc(rs.SourceNAT(), func(n SourceNAT) bool { return !n.ChoosesPort && (!n.Random || n.asks) }), err
}

// SourcesMayBeHidden reports whether there may be source NAT of iptables-legacy that only root
// may know of.
func (rs *Ruleset) SourcesMayBeHidden() bool { return rs.hides(legacy4, natTable) }

// sourceTables returns the tables that may translate the sources of IPv4 packets.
func (rs *Ruleset) sourceTables() (all []*table) {
	for _, t := range rs.tables {
		t = t.settled()
		if t.has(unix.NFPROTO_IPV4) && (len(t.of(unix.NF_INET_POST_ROUTING, natKind)) > 0 || t.failed != nil && t.name == natTable) {
			all = append(all, t)
		}
	}
	return all
}

// each calls f for each chain, by name.
func (t *table) each(f func(name string, c *chain)) {
	for _, name := range slices.Sorted(maps.Keys(t.chains)) {
		f(name, t.chains[name])
	}
}

// translatesSource reports whether a statement is one that sourceNAT is about.
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

// sourceNAT returns what a rule translates sources to, where it does.
func (r *rule) sourceNAT() (n SourceNAT) {
	loaded := make(map[uint32][]byte) // constants, by register
	for _, s := range r.statements {
		switch e := s.expr.(type) {
		case *expr.Immediate:
			loaded[e.Register] = e.Data
		case *expr.Lookup:
			delete(loaded, e.DestRegister)
		case *expr.Numgen:
			delete(loaded, e.Register)
		case *expr.Hash:
			delete(loaded, e.DestRegister)
		case *expr.NAT:
			if s.translatesSource() {
				n.nat(e, loaded)
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

// nat takes in a statement that translates to an address, from constants that registers
// have.
func (n *SourceNAT) nat(e *expr.NAT, loaded map[uint32][]byte) {
	n.chooses(e.RegProtoMin, e.RegProtoMax, loaded)
	n.Random = n.Random || e.Random || e.FullyRandom
	if e.RegAddrMin == 0 {
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
	n.Addrs = append(n.Addrs, AddrRange{First: first, Last: last})
}

// fixedTargets are those of iptables, which may be behind nftables.
var fixedTargets = []string{"SNAT", "NETMAP", "SAME"}

// target takes in a target of iptables.
func (n *SourceNAT) target(e *expr.Target) {
	fixed, named := slices.Contains(fixedTargets, e.Name), e.Name == "SNAT" || e.Name == "MASQUERADE"
	n.Masquerade = n.Masquerade || e.Name == "MASQUERADE"
	ranges, ok := e.Info.(*xt.NatIPv4MultiRangeCompat)
	if !ok {
		n.ChoosesPort, n.Unknown = n.ChoosesPort || named, n.Unknown || fixed
		return
	}
	for _, r := range *ranges {
		if named && r.Flags&rangePorts != 0 {
			n.ChoosesPort, n.Ports = true, append(n.Ports, PortRange{r.MinPort, r.MaxPort})
		}
		n.Random = n.Random || r.Flags&rangeRandom != 0
		first, _ := netip.AddrFromSlice(r.MinIP)
		last, _ := netip.AddrFromSlice(r.MaxIP)
		if fixed && r.Flags&rangeAddrs != 0 {
			n.Addrs = append(n.Addrs, AddrRange{First: first, Last: last})
		}
	}
}

// LeavesBy reports whether packets that it translates may leave by a link.
func (n *SourceNAT) LeavesBy(link string) bool {
	return n.Links == nil || slices.ContainsFunc(n.Links, func(l string) bool { return covered(l, link) })
}

// Within returns those of IPv4 subnets, or the parts of them, from which packets come that it
// may translate.
func (n *SourceNAT) Within(subnets []netip.Prefix) (all []netip.Prefix) {
	if n.Sources == nil {
		return slices.Clone(subnets)
	}
	for _, s := range subnets {
		whole := AddrRange{First: s.Masked().Addr(), Last: nfnl.LastAddr(s)}
		for _, r := range intersectAddrs([]AddrRange{whole}, n.Sources) {
			all = append(all, r.prefixes()...)
		}
	}
	return all
}

// prefixes returns the prefixes that make up the range.
func (r AddrRange) prefixes() (all []netip.Prefix) {
	for a := r.First; a.IsValid() && a.Compare(r.Last) <= 0; {
		p := netip.PrefixFrom(a, a.BitLen())
		for p.Bits() > 0 {
			wider := netip.PrefixFrom(a, p.Bits()-1)
			if wider.Masked().Addr() != a || nfnl.LastAddr(wider).Compare(r.Last) > 0 {
				break
			}
			p = wider
		}
		all = append(all, p)
		a = nfnl.LastAddr(p).Next()
	}
	return all
}

// Has reports whether a is in the range.
func (r AddrRange) Has(a netip.Addr) bool { return coversAddr([]AddrRange{r}, a) }
