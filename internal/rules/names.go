package rules

import (
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// Names returns the names of conenatd's tables in the network namespace behind the
// descriptor netns (0 for the current one), whichever daemon made them. The error is an
// *UnsupportedError if the kernel has no nftables.
func Names(netns int) ([]string, error) {
	c, err := nfnl.Dial(netns)
	if err != nil {
		return nil, nfnl.Permitted(err)
	}
	defer func() { _ = c.Close() }()
	return names(c)
}

func names(c *nfnl.Conn) (names []string, err error) {
	for _, family := range tables {
		var found []string // of the last dump
		err := nfnl.Uninterrupted(func() error {
			found = nil
			var e nfnl.Encoder
			e.Message(unix.NFNL_SUBSYS_NFTABLES, unix.NFT_MSG_GETCHAIN, unix.NLM_F_REQUEST|unix.NLM_F_DUMP, c.NextSeq(1), byte(family))
			e.End()
			return c.Ask(&e, func(_ uint16, body []byte) {
				if table, ours := ownTable(body); ours {
					found = append(found, table)
				}
			})
		})
		if err := listError("chains", nfnl.Permitted(err)); err != nil {
			return nil, err
		}
		names = append(names, found...)
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// ownTable returns the table of a chain in a dump, and whether the chain is our marker
// chain.
func ownTable(body []byte) (table string, ours bool) {
	if len(body) < nfnl.FamilyHeaderLen {
		return "", false
	}
	nfnl.Attributes(body[nfnl.FamilyHeaderLen:], func(typ uint16, b []byte) {
		switch typ {
		case unix.NFTA_CHAIN_TABLE:
			table = nfnl.Text(b)
		case unix.NFTA_CHAIN_NAME:
			ours = nfnl.Text(b) == MarkerChain
		}
	})
	return table, ours
}
