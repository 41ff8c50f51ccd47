package userrules

import (
	"encoding/binary"
	"net/netip"
	"slices"
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
		n.Ports = append(n.Ports, PortRange{binary.BigEndian.Uint16(a), binary.BigEndian.Uint16(b)})
	}
}

// MayGiveAddr reports whether rules, as SourceNAT returns them, may give a host an outside
// address on a link. own is as for OutsideAddrsOf. If rules translate the host on other links
// alone, the link may have another name there, and the answer is yes.
func MayGiveAddr(rules []SourceNAT, link string, host, addr, own netip.Addr) bool {
	asked, elsewhere := false, false
	var done []string // base chains in which an earlier rule translates all of the host's packets
	for i := range rules {
		n := &rules[i]
		if n.Sources != nil && !coversAddr(n.Sources, host) {
			continue
		}
		if !n.LeavesBy(link) {
			elsewhere = true
			continue
		}
		asked = true
		if slices.Contains(done, n.Chain) {
			continue
		}
		if n.mayGive(addr, own) {
			return true
		}
		if !n.Partial && !n.asks {
			done = append(done, n.Chain)
		}
	}
	return !asked && elsewhere
}

// SameSources reports whether two results of SourceNAT translate to the same addresses.
func SameSources(a, b []SourceNAT) bool {
	return slices.EqualFunc(a, b, func(x, y SourceNAT) bool {
		return x.Chain == y.Chain && x.Masquerade == y.Masquerade && x.Partial == y.Partial && x.Unknown == y.Unknown && x.asks == y.asks &&
			slices.Equal(x.Addrs, y.Addrs) && slices.Equal(x.Links, y.Links) && slices.Equal(x.Sources, y.Sources) && slices.Equal(x.dests, y.dests)
	})
}

// Gives reports whether the rule may give some host of the prefixes an outside address on a link.
func (n *SourceNAT) Gives(link string, hosts []netip.Prefix, addr, own netip.Addr) bool {
	return n.LeavesBy(link) && n.mayGive(addr, own) && len(n.Within(hosts)) > 0
}

func (n *SourceNAT) mayGive(addr, own netip.Addr) bool {
	switch {
	case n.Unknown:
		return true
	case len(n.Addrs) > 0:
		return coversAddr(n.Addrs, addr)
	}
	return !n.Masquerade || !own.IsValid() || own == addr
}

// MayGive reports whether rules, as SourceNAT returns them, may give a host an outside port
// on a link. sure is true if the rules decide that: the ports of all rules that may
// translate the host's packets are known, and no rule before the one that gives the port
// may translate all of the packets first.
func MayGive(rules []SourceNAT, link string, host netip.Addr, port uint16) (may, sure bool) {
	asked, unknown := false, false
	// The base chains in which an earlier rule translates all of the host's packets, and
	// those in which an earlier rule may do so.
	var done, perhaps []string
	for i := range rules {
		n := &rules[i]
		if slices.Contains(done, n.Chain) || !n.LeavesBy(link) || n.Sources != nil && !coversAddr(n.Sources, host) {
			continue
		}
		asked = true
		switch {
		case !n.ChoosesPort, slices.ContainsFunc(n.Ports, func(r PortRange) bool { return r.First <= port && port <= r.Last }):
			return true, !slices.Contains(perhaps, n.Chain)
		case len(n.Ports) == 0:
			unknown = true
		}
		switch {
		case n.Unknown, n.asks:
		case n.Partial:
			perhaps = append(perhaps, n.Chain)
		default:
			done = append(done, n.Chain)
		}
	}
	return !asked || unknown, !unknown
}
