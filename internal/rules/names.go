//go:build !(386 || arm || mips || mipsle)

package rules

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Names returns the names of conenatd's tables in the network namespace behind the
// descriptor netns, or in the current one when it is 0, whatever daemon made them. The
// error is an *UnsupportedError where there is no nftables.
func Names(netns int) ([]string, error) {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return nil, nfnl.Permitted(err)
	}
	defer func() { _ = c.Close() }()
	return (&hookReader{c: c}).names()
}

func (r *hookReader) names() (names []string, err error) {
	for _, family := range tables {
		err := r.ask(unix.NFT_MSG_GETCHAIN, unix.NLM_F_DUMP, family, nil, func(_ byte, b []byte) {
			var table, chain string
			nfnl.Attributes(b, func(typ uint16, b []byte) {
				switch typ {
				case unix.NFTA_CHAIN_TABLE:
					table = text(b)
				case unix.NFTA_CHAIN_NAME:
					chain = text(b)
				}
			})
			if chain == markerChain {
				names = append(names, table)
			}
		})
		if err := listError("chains", nfnl.Permitted(err)); err != nil {
			return nil, err
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}
