package config

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
)

// A namedPrefix is a prefix from one of the lists of the configuration.
type namedPrefix struct {
	netip.Prefix
	list listName
	at   int // index in the list
}

type listName uint8

const (
	listGroups listName = iota
	listSubnets
	listExcluded
)

// checkGroups finds a peer group that overlaps another one, an enabled subnet, or excluded
// peers. If two prefixes overlap, one contains the other, so each is compared only with the
// smallest one around it.
func (c *Config) checkGroups() error {
	if len(c.PeerGroups) == 0 {
		return nil
	}
	var all []namedPrefix
	for i, p := range c.PeerGroups {
		all = append(all, namedPrefix{p, listGroups, i})
	}
	for i, s := range c.Subnets {
		all = append(all, namedPrefix{s.Prefix, listSubnets, i})
	}
	for i, p := range c.ExcludePeers {
		all = append(all, namedPrefix{p, listExcluded, i})
	}
	slices.SortFunc(all, func(a, b namedPrefix) int {
		return cmp.Or(a.Addr().Compare(b.Addr()), cmp.Compare(a.Bits(), b.Bits()), cmp.Compare(a.list, b.list), cmp.Compare(a.at, b.at))
	})
	var around []namedPrefix // the outer prefixes first
	for _, p := range all {
		for n := len(around); n > 0 && !around[n-1].Contains(p.Addr()); n-- {
			around = around[:n-1]
		}
		if n := len(around); n > 0 {
			if err := overlap(around[n-1], p); err != nil {
				return err
			}
		}
		around = append(around, p)
	}
	return nil
}

// overlap returns an error if two overlapping prefixes contradict each other.
func overlap(a, b namedPrefix) error {
	if a.list > b.list || a.list == b.list && a.at < b.at {
		a, b = b, a
	}
	switch {
	case a.list != listGroups:
		return nil
	case b.list == listSubnets:
		return fmt.Errorf("%q overlaps subnet %q, whose hosts are inside: name peers", a.Prefix, b.Prefix)
	case b.list == listExcluded:
		return fmt.Errorf("%q overlaps %q of exclude_peers, whose addresses would be permitted with the group; keep one of the two", a.Prefix, b.Prefix)
	}
	return fmt.Errorf("%q overlaps %q; a peer belongs to one group, so keep one of the two", a.Prefix, b.Prefix)
}
