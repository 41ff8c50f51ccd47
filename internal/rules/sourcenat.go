//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/xt"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// FixedSources reads to which addresses rules of the user's translate the source of IPv4
// packets, whatever link these leave by; a masquerade is no such rule. unknown says that
// there are others, or may be: in an expression that is not understood, or in tables of
// iptables-legacy that only root may know of. A packet that leaves by a link with the
// address of another one may have it from such a rule alone.
func FixedSources(netns int) (addrs []AddrRange, unknown bool, err error) {
	see := func(_ string, r *nftables.Rule) {
		found, ok := fixedSource(r.Exprs)
		addrs, unknown = append(addrs, found...), unknown || !ok
	}
	hidden, err := eachLegacySourceNAT(netns, see)
	err = errors.Join(err, eachSourceNAT(netns, see))
	return addrs, unknown || hidden || err != nil, err
}

// PortChoosers names the rules of the user's that choose among ports when they translate
// the source of IPv4 packets: those of a block, or of a map (RFC 7422, MAP-E). A flow
// must not leave by another port. A table of iptables-legacy that cannot be read is among
// them, but not one that only root may know of.
func PortChoosers(netns int) (rules []string, err error) {
	see := func(table string, r *nftables.Rule) {
		if choosesPort(r.Exprs) {
			rules = append(rules, ruleName(table, r))
		}
	}
	if _, err := eachLegacySourceNAT(netns, see); err != nil {
		rules = append(rules, fmt.Sprintf("or may: %v", err))
	}
	err = eachSourceNAT(netns, see)
	return rules, err
}

// eachLegacySourceNAT calls f for each rule of the nat table for IPv4 of iptables-legacy.
// It reports whether there may be one that only root may know of.
func eachLegacySourceNAT(netns int, f func(table string, r *nftables.Rule)) (hidden bool, err error) {
	tables, unknown, err := readLegacy(netns, legacy4, natTable)
	if err != nil {
		return false, err
	}
	for _, raw := range tables {
		t, err := raw.decode()
		if err != nil {
			return false, err
		}
		for _, chain := range slices.Sorted(maps.Keys(t.chains)) {
			for _, r := range t.chains[chain] {
				f(t.title(), r)
			}
		}
	}
	return len(unknown) > 0, nil
}

// eachSourceNAT calls f for each rule of the nftables tables for IPv4 that have a NAT chain
// of the postrouting hook, but ours.
func eachSourceNAT(netns int, f func(table string, r *nftables.Rule)) error {
	c, err := dial(netns)
	if err != nil {
		return err
	}
	defer func() { _ = c.CloseLasting() }()
	chains, err := c.ListChains()
	if err != nil {
		return fmt.Errorf("list nftables chains: %w", nfnl.Permitted(err))
	}
	type table struct {
		name   string
		family nftables.TableFamily
	}
	var ours, nat []table
	for _, chain := range chains {
		t := table{chain.Table.Name, chain.Table.Family}
		if chain.Name == markerChain {
			ours = append(ours, t)
		}
		if chain.Type == nftables.ChainTypeNAT && chain.Hooknum != nil && *chain.Hooknum == *nftables.ChainHookPostrouting {
			nat = append(nat, t)
		}
	}
	for _, chain := range chains {
		t := table{chain.Table.Name, chain.Table.Family}
		if !slices.Contains(nat, t) || slices.Contains(ours, t) || t.family == nftables.TableFamilyIPv6 {
			continue
		}
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil {
			return fmt.Errorf("read nftables table %s: %w", t.name, nfnl.Permitted(err))
		}
		for _, r := range rules {
			f(title(chain.Table), r)
		}
	}
	return nil
}

// choosesPort reports whether a rule translates a source to ports that it names.
func choosesPort(es []expr.Any) bool {
	return slices.ContainsFunc(es, func(e expr.Any) bool {
		switch e := e.(type) {
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
func fixedSource(es []expr.Any) (addrs []AddrRange, ok bool) {
	loaded := make(map[uint32][]byte) // constants, by register
	for _, e := range es {
		switch e := e.(type) {
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
