package daemon

import (
	"errors"
	"net/netip"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
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

// onlyAddress returns the address to which the user's rules translate all hosts of some
// subnets on a link. It returns false if that is not known, or more than one.
func (f *firewall) onlyAddress(network gateway.Network, l gateway.Link, subnets []netip.Prefix) (only netip.Addr, ok bool) {
	if f.unread != nil || f.user.SourcesMayBeHidden() {
		return only, false
	}
	o := userrules.OutsideAddrsOf(f.sources, f.exempt, l.Name, subnets)
	switch {
	case o.Addr == nil:
		return only, false
	case o.Addr.IsValid():
		return *o.Addr, true
	}
	for _, a := range network.Addrs {
		if a.Link != l.Index || !a.Prefix.Addr().Is4() || a.Narrow {
			continue
		}
		if only.IsValid() { // which one depends on the next router
			return only, false
		}
		only = a.Prefix.Addr()
	}
	return only, only.IsValid()
}
