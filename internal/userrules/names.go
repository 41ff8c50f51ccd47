package userrules

import (
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/nfnl"
)

// HasTable reports whether the rules have a table, named as in a Chain: "inet fw4".
func (rs *Ruleset) HasTable(title string) bool {
	return slices.ContainsFunc(rs.tables, func(t *table) bool { return t.title == title })
}

// HasChain reports whether a table has a chain that packets can reach.
func (rs *Ruleset) HasChain(title, chain string) bool {
	return slices.ContainsFunc(rs.tables, func(t *table) bool { return t.title == title && t.chains[chain] != nil })
}

// Flowtables returns the names of all flowtables of the network namespace behind the
// descriptor netns, 0 for the current one: "inet fw4 ft". Without nftables there are none.
func Flowtables(netns int) (names []string, err error) {
	r := NewReader(Config{NetNS: netns})
	if r.c, err = nfnl.Dial(netns); err != nil {
		return nil, nfnl.Permitted(err)
	}
	const nameAttribute = 2 // NFTA_FLOWTABLE_NAME; NFTA_FLOWTABLE_TABLE is 1
	err = r.dump(unix.NFT_MSG_GETFLOWTABLE, unix.AF_UNSPEC, nil, "", func(k tableKey, attrs []byte) {
		nfnl.Attributes(attrs, func(typ uint16, b []byte) {
			if typ == nameAttribute {
				names = append(names, k.title()+" "+unix.ByteSliceToString(b))
			}
		})
	})
	if isMissing(err) {
		err = nil
	}
	if err != nil {
		err = fmt.Errorf("list flowtables: %w", err)
	}
	if closed := r.Close(); err == nil {
		err = closed
	}
	return names, err
}
