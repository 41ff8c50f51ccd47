//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"slices"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Names returns the names of conenatd's tables in the network namespace behind the
// descriptor netns, or in the current one when it is 0, whatever daemon made them. The
// error is an *UnsupportedError where there is no nftables.
func Names(netns int) (names []string, err error) {
	c, err := dial(netns)
	if err != nil {
		return nil, err
	}
	defer func() { _ = c.CloseLasting() }()
	for _, family := range tables {
		chains, err := c.ListChainsOfTableFamily(family)
		if err := listError("chains", nfnl.Permitted(err)); err != nil {
			return nil, err
		}
		for _, chain := range chains {
			if chain.Name == markerChain {
				names = append(names, chain.Table.Name)
			}
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
