package userrules

import (
	"encoding/binary"
	"iter"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
)

// chooses adds the ports of a statement, which names the first and the last of a range by
// registers. last may be 0 for a single port.
func (n *SourceNAT) chooses(first, last uint32, loaded map[uint32][]byte) {
	if first == 0 {
		return
	}
	if last == 0 {
		last = first
	}
	n.ChoosesPort = true
	if a, b := loaded[first], loaded[last]; len(a) == 2 && len(b) == 2 {
		n.Ports = append(n.Ports, cone.PortRange{First: binary.BigEndian.Uint16(a), Last: binary.BigEndian.Uint16(b)})
	}
}

// met yields the rules, as SourceNAT returns them, that packets of hosts meet when they leave by
// a link, each with those of the hosts, or parts of them, whose packets it may translate. It
// leaves out the rules behind one that translates all of these packets in the same base chain.
func met(rules []SourceNAT, link string, hosts []netip.Prefix) iter.Seq2[*SourceNAT, []netip.Prefix] {
	return func(yield func(*SourceNAT, []netip.Prefix) bool) {
		var done []string // base chains in which a rule has translated all of the packets
		for i := range rules {
			n := &rules[i]
			if slices.Contains(done, n.Chain) || !n.LeavesBy(link) {
				continue
			}
			within := n.Within(hosts)
			if len(within) == 0 {
				continue
			}
			if !yield(n, within) {
				return
			}
			if !n.Partial && !n.asks && !n.Unknown && slices.Equal(within, hosts) {
				done = append(done, n.Chain)
			}
		}
	}
}

// GivesAddr reports whether rules, as SourceNAT returns them, that are for a link may give some of the
// hosts an outside address there. own is as for OutsideAddrsOf.
func GivesAddr(rules []SourceNAT, link string, hosts []netip.Prefix, addr, own netip.Addr) bool {
	for n := range met(rules, link, hosts) {
		if n.mayGive(addr, own) {
			return true
		}
	}
	return false
}

// MayGiveAddr is GivesAddr, but if rules translate a host on other links alone, the link may have
// another name there, and the answer is yes.
func MayGiveAddr(rules []SourceNAT, link string, hosts []netip.Prefix, addr, own netip.Addr) bool {
	var here []netip.Prefix // hosts that rules translate on the link
	if GivesAddr(rules, link, hosts, addr, own) {
		return true
	}
	for _, within := range met(rules, link, hosts) {
		here = append(here, within...)
	}
	return slices.ContainsFunc(rules, func(n SourceNAT) bool {
		return !n.LeavesBy(link) && slices.ContainsFunc(n.Within(hosts), func(p netip.Prefix) bool {
			return !slices.ContainsFunc(here, func(h netip.Prefix) bool { return h.Bits() <= p.Bits() && h.Contains(p.Addr()) })
		})
	})
}

// MayName reports whether one of the rules, as SourceNAT returns them, may name an outside address
// for some of the hosts, other than for packets to certain destinations or few ports alone. Unlike a
// masquerade it gives the address also while no link has it.
func MayName(rules []SourceNAT, hosts []netip.Prefix, addr netip.Addr) bool {
	return slices.ContainsFunc(rules, func(n SourceNAT) bool {
		return !n.few && (n.Unknown || n.Addrs.Has(addr)) && len(n.Within(hosts)) > 0
	})
}

// SameSources reports whether two results of SourceNAT translate to the same addresses.
func SameSources(a, b []SourceNAT) bool {
	return slices.EqualFunc(a, b, func(x, y SourceNAT) bool {
		return x.Chain == y.Chain && x.Masquerade == y.Masquerade && x.Partial == y.Partial && x.Unknown == y.Unknown && x.asks == y.asks &&
			slices.Equal(x.Addrs, y.Addrs) && slices.Equal(x.Links, y.Links) && slices.Equal(x.Sources, y.Sources) && slices.Equal(x.dests, y.dests)
	})
}

// mayGive reports whether the rule may give an outside address. own is as for OutsideAddrsOf.
func (n *SourceNAT) mayGive(addr, own netip.Addr) bool {
	switch {
	case n.Unknown:
		return true
	case len(n.Addrs) > 0:
		return n.Addrs.Has(addr)
	}
	return !n.Masquerade || !own.IsValid() || own == addr
}

// MayGive reports whether rules, as SourceNAT returns them, may give a host an outside port
// on a link. sure is true if the rules decide that: the ports of all rules that may
// translate the host's packets are known, and no rule before the one that gives the port
// may translate all of the packets first.
func MayGive(rules []SourceNAT, link string, host netip.Addr, port uint16) (may, sure bool) {
	asked, unknown := false, false
	var perhaps []string // base chains in which an earlier rule may translate all of the host's packets
	for n := range met(rules, link, []netip.Prefix{netip.PrefixFrom(host, host.BitLen())}) {
		asked = true
		switch {
		case !n.ChoosesPort, n.Ports.Has(port):
			return true, !slices.Contains(perhaps, n.Chain)
		case len(n.Ports) == 0:
			unknown = true
		}
		if n.Partial && !n.asks && !n.Unknown {
			perhaps = append(perhaps, n.Chain)
		}
	}
	return !asked || unknown, !unknown
}
