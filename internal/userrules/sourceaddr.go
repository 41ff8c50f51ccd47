package userrules

import (
	"net/netip"
	"slices"
)

// OutsideAddrs are the addresses to which rules translate packets of hosts that leave by a
// link.
type OutsideAddrs struct {
	// Differ says that they may not be the same for all hosts, or that some hosts keep theirs.
	Differ bool
	// Addr is the address that all get, unless Differ is set or no rule is known: nil then.
	// The zero address stands for that of the link, if own is not known.
	Addr *netip.Addr
	// Elsewhere are destinations to which packets get another address than to most others, or
	// keep theirs.
	Elsewhere []netip.Prefix
	// ByOther names rules that give some packets of a host another address than later rules
	// give to the others. They tell them apart by something that is not their source, and
	// not a destination that was read: a mark, a port, a named set.
	ByOther []string
}

// OutsideAddrsOf evaluates what SourceNAT and Untranslated return. own is the address that a
// masquerade gives on the link, or the zero address if that is not certain.
func OutsideAddrsOf(rules, untranslated []SourceNAT, link string, own netip.Addr, hosts []netip.Prefix) (o OutsideAddrs) {
	var usual, elsewhere []*SourceNAT
	differs := func(n *SourceNAT) func(m *SourceNAT) bool {
		return func(m *SourceNAT) bool { return n.differs(m, own) }
	}
	for n := range met(rules, link, hosts) {
		if n.dests != nil {
			elsewhere = append(elsewhere, n)
		} else {
			usual = append(usual, n)
		}
	}
	for _, p := range hosts { // hosts that no rule translates keep their address
		covers := func(n *SourceNAT) bool { return slices.Contains(n.Within([]netip.Prefix{p}), p) }
		o.Differ = o.Differ || len(usual) > 0 && !slices.ContainsFunc(usual, covers)
	}
	for i, n := range usual {
		o.Differ = o.Differ || slices.ContainsFunc(usual[i:], differs(n))
		if n.byOther && n.outsideAddr(own) != nil && slices.ContainsFunc(usual[i+1:], differs(n)) && !slices.Contains(o.ByOther, n.Text) {
			o.ByOther = append(o.ByOther, n.Text)
		}
	}
	if len(usual) > 0 && !o.Differ {
		o.Addr = usual[0].outsideAddr(own)
	}
	elsewhere = slices.DeleteFunc(elsewhere, func(n *SourceNAT) bool { return !slices.ContainsFunc(usual, differs(n)) })
	for i := range untranslated {
		if n := &untranslated[i]; n.LeavesBy(link) && len(n.Within(hosts)) > 0 {
			elsewhere = append(elsewhere, n)
		}
	}
	for _, n := range elsewhere {
		for _, r := range n.dests {
			o.Elsewhere = append(o.Elsewhere, r.Prefixes()...)
		}
	}
	return o
}

// differs reports whether the rules n and m may give different addresses, or the rule n
// itself if both are the same.
func (n *SourceNAT) differs(m *SourceNAT, own netip.Addr) bool {
	a, b := n.outsideAddr(own), m.outsideAddr(own)
	return a == nil || b == nil || *a != *b
}

// outsideAddr returns the address that the rule gives, which is own for a masquerade, or nil
// if it may give several.
func (n *SourceNAT) outsideAddr(own netip.Addr) *netip.Addr {
	switch {
	case n.Unknown:
	case n.Masquerade && len(n.Addrs) == 0:
		return &own
	case len(n.Addrs) == 1 && n.Addrs[0].First == n.Addrs[0].Last:
		return &n.Addrs[0].First
	}
	return nil
}
