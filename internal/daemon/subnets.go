package daemon

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/userrules"
)

// subnets returns the enabled subnets: those that cfg names, the prefixes of links that it
// names, and with "auto" the candidates. One that overlaps an earlier one is left out. were
// are former outside links, which lead to no candidate; hosts are known to be inside.
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
				like.Mapping = config.KernelMapping // the only one for IPv6
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
	// Subnets behind a link that leads inside stay enabled, even if it led outside for a time.
	for _, l := range network.Links {
		if l.Inside {
			delete(uplinks, l.Name)
		}
	}
	for _, name := range named {
		uplinks[name] = !slices.Contains(cfg.Inside, name)
	}
	families := gateway.IPv4
	if cfg.AutoRouted {
		families |= gateway.IPv6
	}
	for _, c := range network.Candidates(families, uplinks, hosts) {
		add(c, config.Subnet{Routed: cfg.AutoRouted})
	}
	return enabled, nil
}

// warnLinkSubnets warns of links named as subnets that are missing or have no prefix, and of
// subnets that are the gateway's own address or that no link leads to.
func (l *loop) warnLinkSubnets(out *warnings) {
	for _, named := range l.cfg.LinkSubnets {
		switch {
		case !slices.Contains(l.network.LinkNames(), named.Link):
			out.add(warnSubnetLink, named.Link, "link %s of a subnet is not there: its prefixes are enabled as soon as it is, "+
				"or correct the name (there are %v)", named.Link, l.network.LinkNames())
		case len(l.network.Connected(named.Link)) == 0:
			out.add(warnSubnetLink, named.Link, "link %s of a subnet has no prefix: those that it gets are enabled", named.Link)
		}
	}
	for _, s := range l.cfg.Subnets {
		switch {
		case l.isOwnAddress(s.Prefix):
			out.add(warnOwnAddress, s.Prefix.String(), "subnet %v is the gateway's own address, and no host has it: name the network of the hosts", s.Prefix)
		case slices.Contains(l.network.Unreached, s.Prefix) && !l.engine.Model.HasTraffic(s.Prefix):
			out.add(warnUnreached, s.Prefix.String(), "no link has the subnet %v, no route but a default route leads to it, and no host of it was heard: "+
				"it is served as soon as one is, or correct it", s.Prefix)
		}
	}
}

// warnLeftOut says what "auto" leaves out, though hosts that leave by this gateway may be there.
func (l *loop) warnLeftOut(out *warnings) {
	if !l.cfg.AutoSubnets {
		return
	}
	if len(l.cfg.Subnets) > 0 {
		if left := l.network.LeftOut(prefixes(l.cfg.Subnets)); len(left) > 0 {
			out.add(warnLeftOut, "", `subnet "auto" leaves out %s: name it, too, if hosts from there leave by this gateway`, some(left))
		}
		return
	}
	text := `subnet "auto" found no inside network: one is served as soon as it is there, or name it with --subnet`
	if left := l.network.NotProposed(); len(left) > 0 {
		text += "; left out: " + some(left)
	}
	out.add(warnNoInside, "", "%s", text)
}

// some joins the first texts, and counts the others.
func some(texts []string) string {
	const most = 3
	if more := len(texts) - most; more > 0 {
		texts = append(slices.Clone(texts[:most]), fmt.Sprintf("%d more", more))
	}
	return strings.Join(texts, "; ")
}

// warnDown warns of subnets without a link that runs: one that leads outside, or one that leads to the
// hosts, where then may be none.
func (l *loop) warnDown(out *warnings) {
	for _, s := range l.cfg.Subnets {
		var inside, outside []gateway.Link
		for _, link := range l.network.Links {
			if slices.Contains(l.network.SubnetsOf(link), s.Prefix) {
				inside = append(inside, link)
			}
			if link.Outside&gateway.FamilyOf(s.Prefix.Addr()) != 0 {
				outside = append(outside, link)
			}
		}
		for _, side := range []struct {
			id    warningID
			links []gateway.Link
			what  string
		}{{warnInsideDown, inside, fmt.Sprintf("no link to %v runs", s.Prefix)}, {warnDown, outside, "no outside link runs"}} {
			if len(side.links) == 0 || slices.ContainsFunc(side.links, gateway.Link.Runs) {
				continue
			}
			var down []string
			for _, link := range side.links {
				down = append(down, link.Name)
			}
			out.add(side.id, s.Prefix.String(), "%s: %s; a link runs once it is up and has a carrier", side.what, strings.Join(down, " and "))
		}
	}
}

// isOwnAddress reports whether a subnet is an address of the gateway, and so has no host.
func (l *loop) isOwnAddress(subnet netip.Prefix) bool {
	return subnet.IsSingleIP() && slices.ContainsFunc(l.network.Addrs, func(a gateway.Addr) bool { return a.Prefix.Addr() == subnet.Addr() })
}
