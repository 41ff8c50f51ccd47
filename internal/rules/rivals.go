//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"fmt"
	"slices"

	"github.com/google/nftables"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Rivals returns the chains of others that may translate the source of a flow before
// the rules of mapping do, as nft names them: those with the lowest priority that there
// is. Of two the younger one comes first.
func (t *Tables) Rivals() (names []string, err error) {
	for _, family := range tables {
		chains, err := t.c.ListChainsOfTableFamily(family)
		if err != nil {
			return nil, fmt.Errorf("list chains: %w", nfnl.Permitted(err))
		}
		ours := func(name string) bool {
			return slices.ContainsFunc(chains, func(c *nftables.Chain) bool { return c.Table.Name == name && c.Name == markerChain })
		}
		for _, c := range chains {
			if c.Type == nftables.ChainTypeNAT && equal(c.Hooknum, nftables.ChainHookPostrouting) &&
				c.Priority != nil && *c.Priority <= mapPriority && !ours(c.Table.Name) {
				names = append(names, title(c.Table)+" "+c.Name)
			}
		}
	}
	return names, nil
}
