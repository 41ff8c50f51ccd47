package daemon

import (
	"errors"
	"net/netip"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
)

// assumeAddresses tells the kernel to which address hosts with mappings are translated on
// each outside link by which none of their flows has left yet. The rules of mapping learn it
// from flows; without it they would leave the first flow on a port that the gateway serves.
func (f *firewall) assumeAddresses(cfg config.Config, network gateway.Network) error {
	c := f.mappingConfig(cfg)
	if c == nil || !f.maps() {
		return nil
	}
	kernel := f.tables.NewMappings(c)
	var errs []error
	for _, l := range network.Links {
		if l.Outside&gateway.IPv4 == 0 || l.Cause == gateway.SharedLink {
			continue
		}
		if addr, ok := f.onlyAddress(network, l, c.Subnets); ok {
			errs = append(errs, kernel.Assume(l.Name, addr))
		}
	}
	return errors.Join(errs...)
}

// onlyAddress returns the address that the user's rules give to all that they translate of
// some subnets on a link. It returns false if that is not known, or more than one.
func (f *firewall) onlyAddress(network gateway.Network, l gateway.Link, subnets []netip.Prefix) (only netip.Addr, ok bool) {
	if f.unread != nil || f.user.SourcesMayBeHidden() {
		return only, false
	}
	for _, rule := range f.user.SourceNAT() {
		if !rule.LeavesBy(l.Name) || len(rule.Within(subnets)) == 0 {
			continue
		}
		var addrs []netip.Addr
		if rule.Masquerade {
			for _, a := range network.Addrs {
				if a.Link == l.Index && a.Prefix.Addr().Is4() && !a.Narrow {
					addrs = append(addrs, a.Prefix.Addr())
				}
			}
		}
		for _, r := range rule.Addrs {
			addrs = append(addrs, r.First, r.Last)
		}
		if rule.Unknown || len(addrs) == 0 {
			return only, false
		}
		for _, a := range addrs {
			if only.IsValid() && a != only {
				return only, false
			}
			only = a
		}
	}
	return only, only.IsValid()
}
