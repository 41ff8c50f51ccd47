package daemon

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// subnets returns the enabled subnets: those that are named, the prefixes of links that are
// named, and, if these are asked for, the candidates, as far as they do not overlap what
// goes before. Links that were outside links lead to no candidate, and hosts are known to be
// inside.
func (f *firewall) subnets(cfg config.Config, network gateway.Network, were map[string]bool, hosts []netip.Addr) ([]config.Subnet, error) {
	enabled := slices.Clone(cfg.Subnets)
	add := func(p netip.Prefix, like config.Subnet) {
		if !slices.ContainsFunc(enabled, func(s config.Subnet) bool { return s.Prefix.Overlaps(p) }) {
			like.Prefix = p
			enabled = append(enabled, like)
		}
	}
	for _, l := range cfg.LinkSubnets {
		for _, p := range network.Connected(l.Link) {
			switch like := l.Like; {
			case p.Addr().Is4():
				add(p, like)
			case like.Routed:
				like.Mapping = config.KernelMapping // there is no other one
				add(p, like)
			}
		}
	}
	if !cfg.AutoSubnets {
		return enabled, nil
	}
	var lans []userrules.LAN
	for _, l := range network.LANs() {
		lans = append(lans, userrules.LAN{Link: userrules.Link{Index: l.Index, Name: l.Name}, Networks: l.Networks})
	}
	if f.unread != nil {
		return nil, fmt.Errorf("find the links of subnet \"auto\": %w", f.unread)
	}
	named, err := f.user.Uplinks(lans)
	if err != nil {
		return nil, fmt.Errorf("find the links of subnet \"auto\": %w", err)
	}
	uplinks := make(map[string]bool)
	maps.Copy(uplinks, were)
	// What is behind a link that leads inside stays enabled, though it led outside for a time.
	for _, l := range network.Links {
		if l.Inside {
			delete(uplinks, l.Name)
		}
	}
	for _, name := range named {
		uplinks[name] = !slices.Contains(cfg.Inside, name)
	}
	for _, c := range network.Candidates(uplinks, hosts) {
		add(c, config.Subnet{})
	}
	return enabled, nil
}

// warnLinkSubnets warns of links that are named for their prefixes and have none, and of
// subnets that no link has.
func (d *Daemon) warnLinkSubnets(out *warnings) {
	for _, l := range d.cfg.LinkSubnets {
		switch {
		case !slices.Contains(d.network.LinkNames(), l.Link):
			out.add(warnSubnetLink, l.Link, "link %s of a subnet is not there: its prefixes are enabled as soon as it is, "+
				"or correct the name (there are %v)", l.Link, d.network.LinkNames())
		case len(d.network.Connected(l.Link)) == 0:
			out.add(warnSubnetLink, l.Link, "link %s of a subnet has no prefix: those that it gets are enabled", l.Link)
		}
	}
	for _, s := range d.cfg.Subnets {
		own := slices.ContainsFunc(d.network.Addrs, func(a gateway.Addr) bool { return a.Prefix.Addr() == s.Prefix.Addr() })
		switch {
		case s.Prefix.IsSingleIP() && own:
			out.add(warnOwnAddress, s.Prefix.String(), "subnet %v is the gateway's own address, and no host has it: name the network of the hosts", s.Prefix)
		case slices.Contains(d.network.Unreached, s.Prefix) && !d.model.Heard(s.Prefix):
			out.add(warnUnreached, s.Prefix.String(), "no link has the subnet %v, no route but a default route leads to it, and no host of it was heard: "+
				"it is served as soon as one is, or correct it", s.Prefix)
		}
	}
}
