//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
)

// legacyPriorities are those of the tables of iptables-legacy that have a chain of the
// forward hook.
var legacyPriorities = map[string]int32{"mangle": -150, filterTable: 0, "security": 50}

// legacyForwardHook reads the base chains of the forward hook that iptables-legacy has for
// the families of the subnets. hidden reports whether there may be others that filter
// packets of a subnet, which another user than root may not know, or that are not understood.
func legacyForwardHook(netns int, subnets []netip.Prefix) (bases []baseChain, hidden func(subnet netip.Prefix) bool, err error) {
	hides := map[*legacyFamily]bool{}
	for _, f := range []*legacyFamily{legacy4, legacy6} {
		if !slices.ContainsFunc(subnets, f.has) {
			continue
		}
		tables, unknown, err := readLegacy(netns, f, "mangle", filterTable, "security")
		if err != nil {
			return nil, nil, err
		}
		hides[f] = slices.Contains(unknown, filterTable)
		for _, raw := range tables {
			t, err := raw.decode()
			if err != nil { // who reads forwards says so
				hides[f] = true
				continue
			}
			for _, b := range t.bases {
				if b.hook == *nftables.ChainHookForward {
					bases = append(bases, baseChain{
						table: t, title: t.title(), name: b.name,
						family: f.TableFamily, priority: legacyPriorities[raw.name], drops: b.drops,
					})
				}
			}
		}
	}
	return bases, func(subnet netip.Prefix) bool {
		return hides[legacy4] && legacy4.has(subnet) || hides[legacy6] && legacy6.has(subnet)
	}, nil
}

// has reports whether a subnet is of the family.
func (f *legacyFamily) has(subnet netip.Prefix) bool { return subnet.Addr().Is4() == (f == legacy4) }

// chainRules returns the rules of a chain.
func (t *legacyTable) chainRules(chain string) (all [][]statement, err error) {
	for _, r := range t.chains[chain] {
		var rule []statement
		for _, e := range r.Exprs {
			rule = append(rule, statement{expr: e})
		}
		all = append(all, rule)
	}
	return all, nil
}

// keySet returns an error: iptables has sets of its own, whose rules only name them.
func (t *legacyTable) keySet(name string, _ bool) (*keySet, error) {
	return nil, fmt.Errorf("%s has no set %s", t.family.program, name)
}
