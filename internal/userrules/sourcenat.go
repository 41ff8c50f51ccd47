package userrules

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"
	"golang.org/x/sys/unix"
)

// FixedSources returns to which addresses rules translate the source of IPv4 packets,
// whatever link these leave by; a masquerade is no such rule. unknown says that there are
// others, or may be: in what is not understood or could not be read, or in tables of
// iptables-legacy that only root may know of. A packet that leaves by a link with the
// address of another one may have it from such a rule alone.
func (rs *Ruleset) FixedSources() (addrs []AddrRange, unknown bool) {
	for _, t := range rs.sourceTables() {
		unknown = unknown || t.torn || t.failed != nil
		t.each(func(name string, c *chain) {
			unknown = unknown || c.failed != nil || c.odd != ""
			for _, r := range c.rules {
				found, ok := fixedSource(r.statements)
				addrs, unknown = append(addrs, found...), unknown || !ok
			}
		})
	}
	return addrs, unknown || rs.hides(legacy4, natTable)
}

// PortChoosers names the rules that choose among ports when they translate the source of
// IPv4 packets: those of a block, or of a map (RFC 7422, MAP-E). A flow must not leave by
// another port. What is not understood is among them, and a table of iptables-legacy that
// cannot be read, but not one that only root may know of. An error says that a table of
// nftables could not be read.
func (rs *Ruleset) PortChoosers() (rules []string, err error) {
	for _, t := range rs.sourceTables() {
		if t.failed != nil {
			rules = append(rules, fmt.Sprintf("or may: %v", t.failed))
		}
		t.each(func(name string, c *chain) {
			if c.failed != nil && err == nil {
				err = fmt.Errorf("read nftables table %s: chain %s: %w", t.title, name, c.failed)
			}
			if c.odd != "" {
				rules = append(rules, fmt.Sprintf("or may: %s %s: %s", t.title, name, c.odd))
			}
			for i := range c.rules {
				if choosesPort(c.rules[i].statements) {
					rules = append(rules, c.rules[i].title(t))
				}
			}
		})
	}
	return rules, err
}

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

// choosesPort reports whether a rule translates a source to ports that it names.
func choosesPort(all []statement) bool {
	return slices.ContainsFunc(all, func(s statement) bool {
		switch e := s.expr.(type) {
		case *expr.NAT:
			return e.Type == expr.NATTypeSourceNAT && e.RegProtoMin != 0
		case *expr.Masq:
			return e.ToPorts || e.RegProtoMin != 0
		case *expr.Target: // of iptables
			if slices.Contains([]string{"SNAT", "MASQUERADE"}, e.Name) {
				ranges, ok := e.Info.(*xt.NatIPv4MultiRangeCompat)
				return !ok || slices.ContainsFunc(*ranges, func(r xt.NatIPv4Range) bool { return r.Flags&rangePorts != 0 })
			}
		}
		return false
	})
}

const (
	rangeAddrs = 1 << 0 // NF_NAT_RANGE_MAP_IPS
	rangePorts = 1 << 1 // NF_NAT_RANGE_PROTO_SPECIFIED
)

// fixedSource returns the addresses to which a rule translates a source; ok is false where
// there are others.
func fixedSource(all []statement) (addrs []AddrRange, ok bool) {
	loaded := make(map[uint32][]byte) // constants, by register
	for _, s := range all {
		switch e := s.expr.(type) {
		case *expr.Immediate:
			loaded[e.Register] = e.Data
		case *expr.Lookup:
			delete(loaded, e.DestRegister)
		case *expr.NAT:
			if e.Type != expr.NATTypeSourceNAT || e.RegAddrMin == 0 {
				continue
			}
			first, ok := netip.AddrFromSlice(loaded[e.RegAddrMin])
			last := first
			if ok && e.RegAddrMax != 0 {
				last, ok = netip.AddrFromSlice(loaded[e.RegAddrMax])
			}
			if !ok {
				return nil, false
			}
			addrs = append(addrs, AddrRange{First: first, Last: last})
		case *expr.Target:
			if !slices.Contains(fixedTargets, e.Name) {
				continue
			}
			ranges, ok := e.Info.(*xt.NatIPv4MultiRangeCompat)
			if !ok {
				return nil, false
			}
			for _, r := range *ranges {
				first, _ := netip.AddrFromSlice(r.MinIP)
				last, _ := netip.AddrFromSlice(r.MaxIP)
				if r.Flags&rangeAddrs != 0 {
					addrs = append(addrs, AddrRange{First: first, Last: last})
				}
			}
		}
	}
	return addrs, true
}

// fixedTargets are those of iptables, which may be behind nftables.
var fixedTargets = []string{"SNAT", "NETMAP", "SAME"}

// Has reports whether a is in the range.
func (r AddrRange) Has(a netip.Addr) bool { return coversAddr([]AddrRange{r}, a) }
