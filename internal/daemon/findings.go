package daemon

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/control"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/handover"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// A warning about flows needs someFlows of them to rule out chance, or fewFlows if most or
// all flows are affected.
const (
	someFlows = 10
	fewFlows  = 3
)

// warnings says what a user should know about his gateway.
func (l *loop) warnings() (out warnings) {
	out = slices.Concat(l.features.warnings, l.ruleWarnings, l.unsureWarnings, l.portWarnings)
	out.addDecisions(l.cfg, l.decisions, l.engine.Model.MapAlone)
	if l.late >= isLate {
		out.add(warnLate, "", "rules, links or routes change so often that a change may take effect %v late: "+
			"to read them takes %v of CPU time", l.late.Round(time.Second), l.look.Round(time.Millisecond))
	}
	if l.missing != "" {
		out.add(warnBackendMissing, "", "%s", l.missing)
	}
	if l.engine.Model.Remaps() {
		out.add(warnPortPerPeer, "", "each peer sees a different outside port of the same inside port, so a rule of yours probably has random or fully-random: "+
			`mapping = "endpoint_independent" keeps one`)
	}
	if l.engine.Model.LabelTaken() {
		out.add(warnLabelTaken, "", "a rule of yours sets bit 126 of the conntrack label, by which conenatd knows the flows that its map admits: set another bit")
	}
	if len(largeGroups(l.cfg)) > 0 && l.backends.nft == nil {
		out.add(warnLargeGroups, "", "peer_groups of more than 16 IPv4 addresses hold for routed subnets alone: only the nft backend can translate for these")
	}
	if n := l.tables.Mapping.PoolUsedUp; n >= someFlows {
		out.add(warnPoolUsedUp, "", "port_pool %v had no port for %d flows, whose mapping stays the kernel's: make it larger", poolText(l.cfg), n)
	}
	if err := l.features.lacks[rules.FeatureMapping]; err != nil && wantsMapping(l.cfg) {
		out.add(warnNoMapping, "", "mapping stays the kernel's: %v", err)
	}
	if err := l.features.lacks[rules.FeatureUplinkMarks]; err != nil && l.cfg.UplinkMarks {
		out.add(warnFeatureMissing, string(rules.FeatureUplinkMarks), "uplink_marks is not in force: %v", err)
	}
	if err := l.features.lacks[rules.FeatureQuiet]; err != nil && l.cfg.Quiet {
		out.add(warnFeatureMissing, string(rules.FeatureQuiet), "quiet is not in force: %v", err)
	}
	switch a := &l.applied; {
	case a.NotInForce():
		first := ""
		for _, w := range l.ruleWarnings {
			if w.ID == warnRivalChain {
				first = "chain " + w.About + " comes before conenatd's: "
			}
		}
		out.add(warnNotMapped, "", "endpoint-independent mapping is not in force: %s%s", first, control.NotApplied(a.Not()))
	case a.Sum() >= someFlows:
		out.add(warnNotMapped, "", "%s", control.NotApplied(a.Not()))
	}
	if n, err := l.conntrack.Read(handover.Events); err == nil && n == 0 {
		out.add(warnEventsOff, "", "the kernel sends no conntrack events: permissions come late, at each reconcile; set net.netfilter.nf_conntrack_events = 1")
	}
	if n, err := l.conntrack.Read(handover.Acct); err == nil && n == 0 {
		out.add(warnAccountingOff, "", "the kernel does not count packets: a peer alone can keep a permission; set net.netfilter.nf_conntrack_acct = 1")
	}
	for _, name := range l.network.Missing {
		out.add(warnLinkMissing, name, "outside link %s is not there: it counts as soon as it is, or correct its name in the key outside (there are %s)",
			name, strings.Join(l.network.LinkNames(), ", "))
	}
	l.warnForwarding(&out)
	l.warnLinkSubnets(&out)
	l.warnDown(&out)
	l.warnLeftOut(&out)
	if len(l.network.OutsideLinks()) == 0 && len(l.network.Missing) == 0 {
		out.add(warnNoOutside, "", `no outside link: none has a default route, no rule translates by one with routes beyond its own network, and no translated flow left; name one with --outside, or wait if this is a standby gateway`)
	}
	l.warnRoom(&out)
	l.warnElsewhere(&out)
	l.warnOtherArrivals(&out)
	l.warnSides(&out)
	l.warnSubnets(&out)
	l.warnBroken(&out)
	l.warnSelf(&out)
	return out
}

// addDecisions warns of children that are dropped, and of chains that cannot be read. Rules
// that changed during the reading are no warning: the next look reads them. alone is
// Model.MapAlone.
func (w *warnings) addDecisions(cfg config.Config, decisions map[netip.Prefix]decision, alone func(netip.Prefix) [cone.Reasons]int) {
	var unread error
	// With "auto", a network that the firewall keeps in, beside one that it lets out, is meant to be.
	letsOut := func(s config.Subnet) bool { return decisions[s.Prefix].blocker.Chain == "" }
	keptIn := cfg.AutoSubnets && slices.ContainsFunc(cfg.Subnets, letsOut)
	for _, s := range cfg.Subnets {
		x := decisions[s.Prefix]
		if !errors.Is(x.err, userrules.ErrChanging) {
			unread = cmp.Or(unread, x.err)
		}
		switch {
		case x.zoned:
			w.add(warnPacketsInZone, s.Prefix.String(), "%s", x.warning)
		case x.warning != "":
			w.add(warnChildrenDropped, s.Prefix.String(), "%s", x.warning)
		}
		switch by := x.blocker.Chain; {
		case by == "":
		case keptIn:
			w.add(warnHostsKeptIn, s.Prefix.String(), "your firewall drops all UDP that hosts of %v send outside: %s; ignore this if they are meant to stay inside", s.Prefix, by)
		default:
			w.add(warnHostsBlocked, s.Prefix.String(), "your firewall drops all UDP that hosts of %v send outside: %s; let it accept UDP flows that they begin", s.Prefix, by)
		}
		w.addMapLost(cfg, s, &x, alone(s.Prefix))
	}
	if unread != nil {
		w.add(warnChainsUnread, "", "what your chains of prerouting and forward let pass is told by flows of peers alone, for they cannot be read: %v", unread)
	}
}

// warnForwarding warns of subnets whose packets, or those of their peers, the kernel does not
// forward: for IPv4 by the setting of the link by which a packet comes in (IN_DEV_FORWARD), for IPv6
// by that of all links, or since Linux 6.17 by force_forwarding of the link (ip6_forward).
func (l *loop) warnForwarding(out *warnings) {
	outside := map[gateway.Families][]string{}
	off := func(family gateway.Families, link string) bool {
		if family == gateway.IPv4 {
			n, err := l.conntrack.Read("../ipv4/conf/" + link + "/forwarding")
			return err == nil && n == 0
		}
		all, err := l.conntrack.Read("../ipv6/conf/all/forwarding")
		forced, _ := l.conntrack.Read("../ipv6/conf/" + link + "/force_forwarding")
		return err == nil && all == 0 && forced == 0
	}
	inside := map[netip.Prefix][]string{}
	for _, link := range l.network.Links {
		for _, family := range []gateway.Families{gateway.IPv4, gateway.IPv6} {
			if link.Outside&family != 0 && (family != gateway.IPv4 || l.network.Has4(link.Name)) && off(family, link.Name) {
				outside[family] = append(outside[family], link.Name)
			}
		}
		for _, p := range l.network.SubnetsOf(link) {
			if off(gateway.FamilyOf(p.Addr()), link.Name) {
				inside[p] = append(inside[p], link.Name)
			}
		}
	}
	for _, s := range l.cfg.Subnets {
		family := gateway.FamilyOf(s.Prefix.Addr())
		links := slices.Concat(inside[s.Prefix], outside[family])
		slices.Sort(links)
		if links = slices.Compact(links); len(links) > 0 {
			out.add(warnForwardingOff, s.Prefix.String(), "%s forwarding is off on %s: the kernel forwards no packet that comes in there",
				family, strings.Join(links, " and "))
		}
	}
}

// warnElsewhere warns of links that should perhaps be outside links, except those that the reconcile is
// about to judge by flows that left by them.
func (l *loop) warnElsewhere(out *warnings) {
	elsewhere, waiting := l.engine.Model.Elsewhere(), append(l.newStrayLinks(), l.shown...)
	for _, link := range l.network.Links {
		if n := elsewhere[link.Name].Translated; n > 0 && link.Outside == 0 && !slices.Contains(waiting, link.Name) {
			out.add(warnPeersBehindLink, link.Name, "%d translated flows of enabled hosts left by %s, which is no outside link, and give no permission: "+
				"if it leads to peers, name it with --outside %s", n, link.Name, link.Name)
		}
	}
}

// warnOtherArrivals warns of links by which peers may answer although hosts do not leave by them, as on a
// gateway with a link for each direction: packets were dropped because of the link that they came by,
// and flows are translated to an address of such a link. It may as well lead to a network of servers,
// one of which fakes the address of a peer, so nothing is assumed.
func (l *loop) warnOtherArrivals(out *warnings) {
	if l.tables.Guard.Spoofed == 0 {
		return
	}
	links := map[cone.Addr]string{} // of addresses by whose link nothing should arrive from outside
	for _, link := range l.network.Links {
		if link.Inside || link.Flags&unix.IFF_LOOPBACK != 0 || link.Kind == "dummy" { // no peer is behind these
			continue
		}
		for _, a := range l.network.Addrs {
			if link.Index == a.Link && link.Outside&gateway.FamilyOf(a.Prefix.Addr()) == 0 {
				links[cone.AddrFrom(a.Prefix.Addr())] = link.Name
			}
		}
	}
	told := map[string]bool{}
	for _, ext := range l.engine.Model.OutsideInUse(slices.Collect(maps.Keys(links))) {
		if link := links[ext]; !told[link] {
			told[link] = true
			out.add(warnOtherArrivals, link, "%s dropped as faked, having come by another link than the way to their source; hosts leave with %v, "+
				"which is on %s, no outside link: if peers answer by it, name it with --outside %s", control.Several(l.tables.Guard.Spoofed, "packet was", "packets were"), ext.Netip(), link, link)
		}
	}
}

// warnReplyZones warns of enabled subnets with a conntrack zone of both directions and permissions
// that only the map could carry. It serves no flow there. Where another backend suffices,
// warnNoCarrier says so.
func (l *loop) warnReplyZones(out *warnings) {
	for _, p := range l.engine.Model.Zones().Replies {
		i := slices.IndexFunc(l.cfg.Subnets, func(s config.Subnet) bool { return s.Prefix == p })
		if i < 0 || !p.Addr().Is4() {
			continue
		}
		mend := ""
		switch filtering := l.cfg.Subnets[i].Filtering; {
		case filtering == config.AddressAndPortDependent: // there are no permissions
			continue
		case filtering == config.EndpointIndependent && (!wantsExpect(l.cfg) || l.backends.expect != nil):
			mend = `leave out filtering = "endpoint_independent", for expectations stand in such a zone, or `
			if !wantsExpect(l.cfg) {
				mend = `set backend = "auto" and ` + mend
			}
		case wantsExpect(l.cfg) && l.backends.expect == nil:
		default:
			continue
		}
		out.add(warnReplyZone, p.String(), "flows of %v have a conntrack zone for both directions, where the map admits nothing: "+
			"%sgive the zone to the original direction alone (ct original zone set)", p, mend)
	}
}

// warnSubnets warns of peculiarities of enabled subnets.
func (l *loop) warnSubnets(out *warnings) {
	l.warnNoSourceNAT(out)
	for _, s := range l.engine.Model.Zones().Several {
		out.add(warnSeveralZones, s.String(), "flows of %v came in several conntrack zones, where other networks may have the same addresses: "+
			"the map and mappings serve no flow with a zone; give the networks different subnets, and restart conenatd", s)
	}
	l.warnReplyZones(out)
	for _, z := range l.engine.Model.SecondZones() {
		out.add(warnSecondZone, z.Subnet.String(), "flows of %v pass conntrack twice, in zone %d untranslated, as behind the firewall of a bridge (Proxmox): "+
			"it knows nothing of what a permission admits and may drop it; set routed = true for this subnet", z.Subnet, z.Zone)
	}
	l.warnNoCarrier(out)
	for _, s := range l.cfg.Subnets {
		translated := s.Prefix.Addr().Is4()
		switch {
		case s.Filtering != config.EndpointIndependent:
		case translated && l.backends.nft == nil:
			out.add(warnNoFiltering, s.Prefix.String(), "subnet %v has address-dependent filtering: only the nft backend can give it endpoint_independent", s.Prefix)
		default:
			out.add(warnSubnetOpen, s.Prefix.String(), "subnet %v is open: anybody on the Internet may send to a port that its hosts use", s.Prefix)
		}
		if s.Prefix.Addr().Is6() && !s.Routed {
			out.add(warnIPv6NotRouted, s.Prefix.String(), "subnet %v is not routed: only source-NATed IPv6 flows give permissions", s.Prefix)
		}
	}
}

// warnNoSourceNAT warns of subnets that nobody translates: by the user's rules, whether or not there
// were flows, or by flows where rules do not tell.
func (l *loop) warnNoSourceNAT(out *warnings) {
	flows := map[netip.Prefix]uint64{}
	for _, u := range l.engine.Model.Untranslated() {
		flows[u.Subnet] = u.Flows
	}
	for _, s := range l.cfg.Subnets {
		what, n := "", flows[s.Prefix]
		switch {
		case n >= fewFlows:
			what = fmt.Sprintf("%d flows of %v left untranslated and none was translated", n, s.Prefix)
		case l.decisions[s.Prefix].noNAT && l.decisions[s.Prefix].blocker.Chain == "": // else nothing comes so far
			what = fmt.Sprintf("no rule of yours translates what hosts of %v send outside", s.Prefix)
		default:
			continue
		}
		out.add(warnNoSourceNAT, s.Prefix.String(), "no source NAT: %s, so no permission arises; "+
			"let a rule of yours masquerade them, or set routed = true if the subnet has public addresses", what)
	}
}

// warnNoCarrier warns of subnets with permissions that only expectations can carry, where the user
// wants the map alone.
func (l *loop) warnNoCarrier(out *warnings) {
	if wantsExpect(l.cfg) {
		return
	}
	for _, s := range l.cfg.Subnets {
		what, mend := "", ""
		switch n := l.engine.Model.Uncarried(s.Prefix); {
		case s.Filtering == config.AddressAndPortDependent:
		case s.Prefix.Addr().Is6():
			what = fmt.Sprintf("IPv6 flows of %v", s.Prefix)
		case s.Routed:
			what = fmt.Sprintf("untranslated flows of %v", s.Prefix)
		case n > 0 && s.Filtering != config.EndpointIndependent:
			what = fmt.Sprintf("flows of %v with a conntrack zone for both directions", s.Prefix)
			mend = ", or give the zone to the original direction alone (ct original zone set)"
		}
		if what != "" {
			out.add(warnNoCarrier, s.Prefix.String(), `%s give no permission: only expectations can carry it, and with backend = "nft" there are none; set backend = "auto"%s`, what, mend)
		}
	}
}
