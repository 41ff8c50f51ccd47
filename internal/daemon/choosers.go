package daemon

import (
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// sourceNAT finds what the user's source NAT means for mappings. It returns warnings for him,
// and whether our tables must change. If the rules cannot be read, the last reading holds.
func (f *firewall) sourceNAT(cfg config.Config, network gateway.Network) (out warnings, changed bool, err error) {
	if !wantsMapping(cfg) || !f.maps() {
		f.choosers, f.sources, f.exempt, f.elsewhere = nil, nil, nil, nil
		return nil, false, nil
	}
	choosers, err := f.readChoosers()
	if f.unread == nil {
		out = f.rivals(cfg, network)
	}
	if err != nil {
		out.add(warnSourceNATUnread, "", "source NAT cannot be read, what was read before holds, "+
			"and where nothing was, hosts whose port another one has are left to your rules: %v", err)
		if f.choosers != nil {
			return out, false, err
		}
	}
	before, known, same, sources := f.chosen(cfg, network), f.choosers != nil, sameGiven(f.choosers, choosers), f.sources
	elsewhere := f.elsewhere
	differed, _ := f.differ(cfg, network)
	f.choosers, f.sources = choosers, nil
	now := f.chosen(cfg, network)
	if changed = !same || !maps.EqualFunc(before, now, slices.Equal); changed && known {
		f.old.chosenSince(before, now)
	}
	if err != nil {
		return out, changed, err
	}
	f.sources, f.exempt = f.user.SourceNAT(), f.user.Untranslated()
	changed = changed || sources != nil && !userrules.SameSources(sources, f.sources)
	differ, more := f.differ(cfg, network)
	out = append(out, more...)
	changed = changed || !slices.Equal(differed, differ) || !slices.Equal(elsewhere, f.elsewhere)
	pool, hidden := poolText(cfg), f.user.SourcesMayBeHidden()
	if hidden && pool != "" {
		out.add(warnSourceNATHidden, "", "only root and its group may read the rules of iptables-legacy: if one of them chooses outside ports "+
			`(--to-ports, --to-source with ports), set port_pool = "none", so that hosts keep to it`)
	}
	for i := range choosers {
		hosts := hostsOf(chosenPorts(choosers[i:i+1], f.mappingConfig(cfg).Subnets, network.OutsideLinks4()))
		if len(hosts) > 0 && pool != "" {
			out.add(warnPortsChosen, "", "port_pool is not used, for a rule of yours chooses outside ports (%s): "+
				"hosts in %v whose port another one has get one by that rule, not one of %s, and may share it", choosers[i].Text, hosts[0], pool)
			break
		}
	}
	return out, changed, nil
}

// readChoosers returns the user's rules that choose outside ports, never nil. If they cannot
// be read, it returns one unknown rule, which may choose any port.
func (f *firewall) readChoosers() (rules []userrules.SourceNAT, err error) {
	err = f.unread
	if err == nil {
		rules, err = f.user.PortChoosers()
	}
	if err != nil {
		return []userrules.SourceNAT{{ChoosesPort: true, Unknown: true, Text: err.Error()}}, err
	}
	return append([]userrules.SourceNAT{}, rules...), nil
}

// differ returns the links on which the user's rules may translate hosts with mappings to
// different addresses. It notes the destinations to which they give another address, or
// none, and returns a warning for each rule that mappings do not follow.
func (f *firewall) differ(cfg config.Config, network gateway.Network) (links []string, out warnings) {
	f.elsewhere = nil
	c := f.mappingConfig(cfg)
	if c == nil {
		return nil, nil
	}
	links, elsewhere, byOther := f.outsideAddrs(c.Subnets, network.OutsideLinks4())
	f.elsewhere = elsewhere
	for _, rule := range byOther {
		out.add(warnAddrByOther, rule, "a rule of yours gives some packets of a host another outside address, and not by their source or "+
			"by destinations that it names (%s): mappings keep the address of the host's first flow; "+
			"name the destinations of that rule in mapping_exempt", rule)
	}
	return links, out
}

// outsideAddrs puts userrules.OutsideAddrs of all outside links together. differ are the
// links with different addresses.
func (f *firewall) outsideAddrs(subnets []netip.Prefix, outside []string) (differ []string, elsewhere []netip.Prefix, byOther []string) {
	subnets = slices.DeleteFunc(slices.Clone(subnets), func(p netip.Prefix) bool { return !p.Addr().Is4() })
	for _, link := range outside {
		o := userrules.OutsideAddrsOf(f.sources, f.exempt, link, f.ownAddrs[link], subnets)
		elsewhere, byOther = append(elsewhere, o.Elsewhere...), append(byOther, o.ByOther...)
		if o.Differ {
			differ = append(differ, link)
		}
	}
	slices.SortFunc(elsewhere, netip.Prefix.Compare)
	slices.Sort(byOther)
	return differ, slices.Compact(elsewhere), slices.Compact(byOther)
}

// chosen returns the hosts for which the user's rules choose outside ports, by outside link.
func (f *firewall) chosen(cfg config.Config, network gateway.Network) map[string][]netip.Prefix {
	c := f.mappingConfig(cfg)
	if c == nil {
		return nil
	}
	return chosenPorts(f.choosers, c.Subnets, network.OutsideLinks4())
}

// rivals warns of source NAT chains of the user's that run before ours, or may do so.
func (f *firewall) rivals(cfg config.Config, network gateway.Network) (out warnings) {
	f.overtaken = false
	if !wantsMapping(cfg) || !f.maps() || f.unread != nil {
		return nil
	}
	older := ""
	if f.behind == nil {
		older = " if it is younger"
	}
	chains := slices.DeleteFunc(f.user.SourceNATChains(), func(c userrules.Chain) bool { return f.behind[c.Handles] })
	for _, c := range lowest(chains) {
		out.add(warnRivalChain, c, "chain %s has the priority of conenatd's own, -199, and comes before it%s: "+
			"mapping is not in force for what it translates; give it another priority", c, older)
		f.overtaken = f.overtaken || f.behind != nil && f.translatesAll(c, f.mappingConfig(cfg).Subnets, network.OutsideLinks4())
	}
	return out
}

// translatesAll reports whether a chain of the user's translates all traffic from subnets
// that leaves by one of the outside links.
func (f *firewall) translatesAll(chain string, subnets []netip.Prefix, outside []string) bool {
	for _, n := range f.user.SourceNAT() {
		if n.Chain != chain || n.Partial || !slices.ContainsFunc(outside, n.LeavesBy) {
			continue
		}
		hosts := n.Within(subnets)
		if !slices.ContainsFunc(subnets, func(s netip.Prefix) bool { return !slices.Contains(hosts, s) }) {
			return true
		}
	}
	return false
}

// lowest names the chains that may translate the source of a flow before our mapping rules
// do: those with the same priority, the lowest that there is. Of two such chains the younger
// runs first.
func lowest(chains []userrules.Chain) (names []string) {
	for _, c := range chains {
		if c.Priority <= rules.MapPriority {
			names = append(names, c.String())
		}
	}
	return names
}

// chosenPorts returns, by outside link, the hosts of subnets for which the choosers choose
// outside ports. outside are the outside links for IPv4.
func chosenPorts(choosers []userrules.SourceNAT, subnets []netip.Prefix, outside []string) map[string][]netip.Prefix {
	chosen := make(map[string][]netip.Prefix)
	for _, link := range outside {
		for i := range choosers {
			if choosers[i].LeavesBy(link) {
				chosen[link] = append(chosen[link], choosers[i].Within(subnets)...)
			}
		}
	}
	return chosen
}

// hostsOf returns the hosts in chosen, whatever their link.
func hostsOf(chosen map[string][]netip.Prefix) []netip.Prefix {
	var all []netip.Prefix
	for _, hosts := range chosen {
		all = append(all, hosts...)
	}
	slices.SortFunc(all, netip.Prefix.Compare)
	return slices.Compact(all)
}
