package rules

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/rules/elements"
)

// NewMap returns the permissions of t.
func (t *Tables) NewMap(c *MapConfig) *elements.Map {
	return elements.NewMap(t.w.Writer, elements.MapConfig{
		Size: c.Size, Lifetime: c.Lifetime, PeerGroups: c.PeerGroups,
	})
}

// NewMappings returns the mappings of the last Set.
func (t *Tables) NewMappings(c *MappingConfig) *elements.Mappings {
	m := t.mapped
	m.Lifetime, m.KeptFor = c.Lifetime, c.KeptFor
	return elements.NewMappings(t.w.Writer, m)
}

// MappedLinks returns the names of the links by which mappings stand, whoever made them. It uses its own
// connections.
func (t *Tables) MappedLinks() (links []string, err error) {
	sets, err := t.c.GetSets(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: t.name})
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list the sets of mappings: %w", err)
	}
	for _, set := range sets {
		link, ok := elements.LinkOfSet(set.Name)
		if !ok || slices.Contains(links, link) {
			continue
		}
		stands := false
		if err := elements.List(t.netns, unix.AF_INET, t.name, set.Name, func([]byte) { stands = true }); err != nil {
			return nil, err
		}
		if stands {
			links = append(links, link)
		}
	}
	return links, nil
}

// mappedOf says which sets for mappings d makes.
func mappedOf(d *Desired) (m elements.MappingsConfig) {
	if d.Mapping != nil {
		m.Links, m.Owners = d.Mapping.links(d.OutsideLinks), len(d.Mapping.Hairpin) > 0
	}
	return m
}

// NewUnsure returns the flows whose source may be spoofed.
func (t *Tables) NewUnsure() *elements.Unsure { return elements.NewUnsure(t.w.Writer) }

// NewLean returns the switch for reports of flows whose permission the kernel learned.
func (t *Tables) NewLean() *elements.Hidden { return elements.NewLean(t.w.Writer) }

// NewQuiet returns the switch for reports of flows that can have no permission.
func (t *Tables) NewQuiet() *elements.Hidden { return elements.NewQuiet(t.w.Writer) }

// NewAlive returns the daemon's sign of life.
func (t *Tables) NewAlive() *elements.Alive { return elements.NewAlive(t.w.Writer) }

// NewRevoked returns the permissions that the user revoked.
func (t *Tables) NewRevoked() *elements.Revoked { return elements.NewRevoked(t.w.Writer) }

// ZonedAddrs lists Desired.ZonedAddrs as the tables hold them. It uses its own connection.
func (t *Tables) ZonedAddrs() (addrs []netip.Addr, err error) {
	err = elements.List(t.netns, unix.AF_INET, t.name, zonedSet, func(b []byte) {
		if a, ok := netip.AddrFromSlice(elements.Key(b)); ok {
			addrs = append(addrs, a)
		}
	})
	return addrs, err
}

// PeerGroups lists the peer groups that the tables hold, from whatever configuration. It
// uses its own connection.
func (t *Tables) PeerGroups() (groups []netip.Prefix, err error) {
	for bits := 1; bits < 32 && err == nil; bits++ {
		err = elements.List(t.netns, unix.AF_INET, t.name, groupsName(bits), func(b []byte) {
			if a, ok := netip.AddrFromSlice(elements.Key(b)); ok {
				groups = append(groups, netip.PrefixFrom(a, bits))
			}
		})
	}
	return groups, err
}
