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
		if addr, ok := f.onlyAddress(l, c.Subnets); ok {
			errs = append(errs, kernel.Assume(l.Name, addr))
		}
	}
	return errors.Join(errs...)
}

// onlyAddress returns the address to which the user's rules translate all hosts of some
// subnets on a link. It returns false if that is not known, or more than one.
func (f *firewall) onlyAddress(l gateway.Link, subnets []netip.Prefix) (only netip.Addr, ok bool) {
	if f.unread != nil || f.user.SourcesMayBeHidden() {
		return only, false
	}
	o := userrules.OutsideAddrsOf(f.sources, f.exempt, l.Name, f.ownAddrs[l.Name], subnets)
	if o.Addr == nil {
		return only, false
	}
	return *o.Addr, o.Addr.IsValid()
}

// ownAddrs returns the address that a masquerade gives on each link, as far as it is certain.
func ownAddrs(network gateway.Network) map[string]netip.Addr {
	own := make(map[string]netip.Addr)
	for _, l := range network.Links {
		for _, a := range network.Addrs {
			if a.Link != l.Index || !a.Prefix.Addr().Is4() || a.Narrow {
				continue
			}
			switch _, another := own[l.Name]; {
			case !another:
				own[l.Name] = a.Prefix.Addr()
			case !a.Alone: // which one depends on the next router
				own[l.Name] = netip.Addr{}
			}
		}
	}
	return own
}
