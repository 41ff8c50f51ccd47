package userrules

import (
	"errors"
	"net/netip"

	"github.com/conenatd/conenatd/internal/cone"
)

// FailToRead makes the reading of all chains of a table fail from now on, or succeed again.
func FailToRead(r *Reader, table string, fails bool) {
	r.fail = func(title, _ string) error {
		if fails && title == table {
			return errors.New("an expression that nobody knows")
		}
		return nil
	}
}

// Prefixes returns the prefixes that make up the ranges.
func Prefixes(ranges cone.AddrRanges) (all []netip.Prefix) {
	for _, r := range ranges {
		all = append(all, r.Prefixes()...)
	}
	return all
}
