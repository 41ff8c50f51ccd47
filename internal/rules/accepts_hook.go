//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"cmp"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// A baseChain is a chain of the forward hook.
type baseChain struct {
	table    tableReader
	name     string // of the chain
	title    string // family, table and chain
	family   nftables.TableFamily
	priority nftables.ChainPriority
	drops    bool // its policy
}

// Children reads what the chains of the forward hook of the network namespace
// behind the descriptor netns, 0 for the current, do with the first packet of a
// flow from the links outside, nil for any, to a host of each of the subnets. The
// answers have the order of the subnets. The chains of our own tables and those of
// iptables-legacy are not read; where iptables-legacy has a filter table, the
// answer is Unknown, but for what nftables drops.
//
// An error names the table and chain that could not be read; there is no answer
// then. Where there is no nftables the error is an *UnsupportedError.
func Children(netns int, outside []Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	c, err := dial(netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	inside, err := insideLinks(netns, outside, subnets)
	if err != nil {
		return nil, err
	}
	legacy4, legacy6, err := legacyFilters(netns)
	if err != nil {
		return nil, fmt.Errorf("look for tables of iptables-legacy: %w", err)
	}
	var answers []ChildVerdicts
	for range maxReads {
		var chains []baseChain
		if chains, err = forwardHook(c); err == nil {
			answers, err = childVerdicts(chains, outside, inside, subnets)
		}
		if !errors.Is(err, errInterrupted) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	for i := range answers {
		if v4 := subnets[i].Addr().Is4(); v4 && legacy4 || !v4 && legacy6 {
			answers[i].mayDropAll()
		}
	}
	return answers, nil
}

// mayDropAll makes unknown what was accepted.
func (v *ChildVerdicts) mayDropAll() {
	for _, a := range []*Answer{&v.DNATed, &v.Related, &v.MostDNATed, &v.MostRelated} {
		if *a == Accepted {
			*a = Unknown
		}
	}
}

// maxReads is how often a ruleset is read that changes all the time.
const maxReads = 5

// forwardHook lists the base chains of the user's that forwarded packets meet, in
// the order in which they do.
func forwardHook(c *conn) ([]baseChain, error) {
	if err := c.begin(); err != nil {
		return nil, err
	}
	tables, err := c.ListTables()
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		missing := features[0].UnsupportedError
		missing.Err = err
		return nil, &missing
	case err != nil:
		return nil, fmt.Errorf("list nftables tables: %w", nfnl.Permitted(err))
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, fmt.Errorf("list nftables chains: %w", nfnl.Permitted(err))
	}
	var bases []baseChain
	for _, t := range tables {
		if familyOf(t.Family) == "" || t.Flags&nftables.TableFlagDormant != 0 {
			continue
		}
		var own []*nftables.Chain
		for _, chain := range chains {
			if chain.Table.Name == t.Name && chain.Table.Family == t.Family {
				own = append(own, chain)
			}
		}
		if slices.ContainsFunc(own, func(c *nftables.Chain) bool { return c.Name == markerChain }) {
			continue
		}
		reader := newHookTable(c, t)
		for _, chain := range own {
			if chain.Hooknum == nil || chain.Priority == nil || *chain.Hooknum != *nftables.ChainHookForward {
				continue
			}
			bases = append(bases, baseChain{
				table: reader, name: chain.Name, family: t.Family, priority: *chain.Priority,
				title: strings.Join([]string{familyOf(t.Family), t.Name, chain.Name}, " "),
				drops: chain.Policy != nil && *chain.Policy == nftables.ChainPolicyDrop,
			})
		}
	}
	slices.SortStableFunc(bases, func(a, b baseChain) int { return cmp.Compare(a.priority, b.priority) })
	return bases, nil
}

// childVerdicts answers for each of the subnets. The links inside lead to them, where
// they are known.
func childVerdicts(chains []baseChain, outside []Link, inside []*Link, subnets []netip.Prefix) ([]ChildVerdicts, error) {
	answers := make([]ChildVerdicts, len(subnets))
	for i, subnet := range subnets {
		from := []*Link{nil}
		if len(outside) > 0 {
			from = nil
		}
		for n := range outside {
			from = append(from, &outside[n])
		}
		a := &answers[i]
		for n, in := range from {
			var v ChildVerdicts
			for _, related := range []bool{true, false} {
				packets := newChild(related, in, inside[i], outside, subnet, subnets)
				all, dropper, err := hookAnswer(chains, packets, false)
				if err != nil {
					return nil, err
				}
				most, _, err := hookAnswer(chains, packets, true)
				if err != nil {
					return nil, err
				}
				if related {
					v.Related, v.MostRelated = all, most
				} else {
					v.DNATed, v.MostDNATed = all, most
				}
				if all == Dropped {
					v.Dropper = dropper
				}
			}
			if n == 0 {
				*a = v
				continue
			}
			a.DNATed, a.Related = both(a.DNATed, v.DNATed), both(a.Related, v.Related)
			a.MostDNATed, a.MostRelated = both(a.MostDNATed, v.MostDNATed), both(a.MostRelated, v.MostRelated)
		}
		if a.DNATed != Dropped && a.Related != Dropped {
			a.Dropper = ""
		}
	}
	return answers, nil
}

func both(a, b Answer) Answer {
	if a != b {
		return Unknown
	}
	return a
}

// hookAnswer takes packets through all chains. An accept ends one chain only.
func hookAnswer(chains []baseChain, packets *child, most bool) (Answer, string, error) {
	answer := Accepted
	for _, c := range chains {
		if c.family != nftables.TableFamilyINet && byte(c.family) != packets.family {
			continue
		}
		w := hookWalk{table: c.table, child: packets, most: most, known: map[string]fates{}}
		f, err := w.chain(c.name)
		if err != nil {
			return Unknown, "", fmt.Errorf("nftables table %s: %w", strings.TrimSuffix(c.title, " "+c.name), nfnl.Permitted(err))
		}
		if f&returns != 0 {
			if f &^= returns; c.drops {
				f |= drops
			} else {
				f |= accepts
			}
		}
		switch f {
		case accepts:
		case drops:
			return Dropped, c.title, nil
		default:
			answer = Unknown
		}
	}
	return answer, "", nil
}
