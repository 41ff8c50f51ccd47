package daemon

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/expect"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// uplinks are outside links that no default route shows.
type uplinks struct {
	ruled  []string            // rules of the user's translate what leaves by them
	seen   map[string]seenLink // translated flows left by them
	routed map[string]bool     // had a default route once, or were named

	// What ruled was computed from.
	rules *userrules.Ruleset
	links []userrules.LAN
}

// A seenLink is an outside link that a translated flow showed.
type seenLink struct {
	index int
	ext   cone.Addr // the flow's outside address
}

// mostAsked bounds the links of each side that are checked against the user's rules: each
// costs a walk through his chains.
const mostAsked = 64

// readNetwork reads links, addresses and routes, and tells outside links from others, for
// the subnets of cfg, by the rules that were read last. If the rules cannot be read, what
// they said of links before holds.
func (r *reconciler) readNetwork(cfg config.Config) (gateway.Network, error) {
	network, unruled, err := r.uplinks.readNetwork(cfg, r.firewall)
	r.failures.Note(requestFindUplinks, 1, unruled)
	return network, err
}

// readNetwork does this for reconciler.readNetwork. unruled says why the rules could not tell.
func (u *uplinks) readNetwork(cfg config.Config, f *firewall) (network gateway.Network, unruled, err error) {
	if network, err = gateway.ReadNetwork(0, u.sides(cfg)); err != nil {
		return network, nil, err
	}
	maps.DeleteFunc(u.seen, func(name string, s seenLink) bool {
		return !slices.ContainsFunc(network.Links, func(l gateway.Link) bool {
			return l.Name == name && l.Index == s.index && network.LeadsToInternet(l)
		})
	})
	_, unruled = u.ask(f, network)
	network.Mark(u.sides(cfg))
	return network, unruled, nil
}

// remember notes which links are outside links under the configuration in force.
func (u *uplinks) remember(network gateway.Network) {
	for _, l := range network.Links {
		if (l.Cause == gateway.Named || l.Cause == gateway.DefaultRoute) && l.Outside&gateway.IPv4 != 0 && !l.Inside {
			if u.routed == nil {
				u.routed = make(map[string]bool)
			}
			u.routed[l.Name] = true
		}
	}
}

// forgetBackups forgets links that also lead inside and that flows showed to be outside links
// for a time, once no permission has the outside address of such a flow and another link has
// a default route.
func (r *reconciler) forgetBackups(network gateway.Network) (forgot bool) {
	for _, l := range network.Links {
		s, seen := r.uplinks.seen[l.Name]
		another := slices.ContainsFunc(network.Links, func(o gateway.Link) bool {
			return o.Cause == gateway.DefaultRoute && o.Outside&gateway.IPv4 != 0 && !o.Inside
		})
		if !seen || !l.Inside || !another {
			continue
		}
		var inUse bool
		if r.ask(func(l *loop) { inUse = len(l.engine.Model.OutsideInUse([]cone.Addr{s.ext})) > 0 }) && !inUse {
			delete(r.uplinks.seen, l.Name)
			forgot = true
		}
	}
	return forgot
}

// sides returns what is known of the sides of links besides their routes.
func (u *uplinks) sides(cfg config.Config) gateway.Sides {
	return gateway.Sides{
		Outside: cfg.Outside, Inside: cfg.Inside, Subnets: prefixes(cfg.Subnets),
		RuledNAT: u.ruled, SeenNAT: slices.Sorted(maps.Keys(u.seen)),
	}
}

// ask finds the links by which rules of the user's translate what comes from enabled
// subnets, and reports whether these changed. It looks at the rules only if they or the
// links changed since the last time.
func (u *uplinks) ask(f *firewall, network gateway.Network) (changed bool, err error) {
	var links []userrules.LAN
	for _, l := range network.Links {
		if l.Inside && len(links) < mostAsked {
			links = append(links, userrules.LAN{Link: flows.LinkOf(l), Networks: network.SubnetsOf(l)})
		}
	}
	leads := len(links)
	for _, l := range network.Doubtful() {
		if len(links) < leads+mostAsked {
			links = append(links, userrules.LAN{Link: flows.LinkOf(l)})
		}
	}
	if f.unread == nil && u.rules == f.user && slices.EqualFunc(links, u.links, func(a, b userrules.LAN) bool {
		return a.Equal(b.Link) && slices.Equal(a.Networks, b.Networks)
	}) {
		return false, nil
	}
	var names []string
	if len(links) > leads {
		if names, err = f.uplinks(links); err != nil {
			return false, err
		}
	}
	names = slices.DeleteFunc(names, func(name string) bool {
		return slices.ContainsFunc(links[:leads], func(l userrules.LAN) bool { return l.Name == name })
	})
	slices.Sort(names)
	changed = !slices.Equal(names, u.ruled)
	u.ruled, u.rules, u.links = names, f.user, links
	return changed, nil
}

// followFlows finds the links by which translated flows left for peers on the Internet
// that are behind no known outside link, and reports whether there is a new one. It asks the
// kernel once for each peer.
func (r *reconciler) followFlows(cfg config.Config) (found bool, err error) {
	var flows []cone.Flow
	if !r.ask(func(l *loop) { flows = l.takeStrays() }) {
		return false, errEnded
	}
	found, err = r.seeNAT(cfg, flows)
	shown := slices.Sorted(maps.Keys(r.uplinks.seen))
	r.ask(func(l *loop) { l.judge(shown) })
	return found, err
}

// takeStrays returns the strays that nobody judged yet. Until the caller did, and calls judge, their links
// count as shown.
func (l *loop) takeStrays() []cone.Flow {
	l.shown = append(l.shown, l.newStrayLinks()...)
	return l.engine.Model.Strays()
}

// newStrayLinks returns the links of strays that wait for their first judgement. A link that was judged
// before keeps its warning meanwhile: each change of the network makes the reconcile judge again.
func (l *loop) newStrayLinks() []string {
	return slices.DeleteFunc(l.engine.Model.StrayLinks(), func(link string) bool { _, told := l.judged[link]; return told })
}

// judge notes which links flows show to be outside links, of those that takeStrays returned and of earlier ones.
func (l *loop) judge(shown []string) {
	if l.judged == nil {
		l.judged = make(map[string]struct{})
	}
	for _, link := range l.shown {
		l.judged[link] = struct{}{}
	}
	l.shown = shown
}

// seeFlowsBefore does the same at the start, before the first rule of ours: an earlier daemon
// may have had permissions and mappings on such a link. A permission that it left counts like
// its flow, which may have ended. The first reconcile tries again what fails.
func (r *reconciler) seeFlowsBefore(cfg config.Config) {
	if !r.network.Hidden() {
		return
	}
	const most = 4096
	topology, enabled := r.network.Topology().Compile(), cone.NewPrefixTable(prefixes(cfg.Subnets))
	asked := make(map[cone.Addr]struct{})
	var translated []cone.Flow
	see := func(f *cone.Flow) {
		peer := f.ReplySrc.Addr
		if _, known := asked[peer]; known || len(asked) == most || !cone.IsStray(f, topology) || !enabled.Holds(f.Src.Addr) {
			return
		}
		asked[peer] = struct{}{}
		translated = append(translated, *f)
	}
	errs := []error{r.reads.Dump(see)}
	inMap, err := r.firewall.left(cfg)
	expected, failed := expect.Left(0)
	errs = append(errs, err, failed)
	for _, a := range slices.Concat(inMap, expected) {
		if a.Int.Addr != a.Ext.Addr {
			peer := cone.Endpoint{Addr: a.Peer, Port: 1} // any port
			see(&cone.Flow{Src: a.Int, Dst: peer, ReplySrc: peer, ReplyDst: a.Ext, Status: cone.StatusSrcNAT})
		}
	}
	found, err := r.seeNAT(cfg, translated)
	if found {
		r.network.Mark(r.uplinks.sides(cfg))
	}
	r.failures.Note(requestFollowFlows, 1, errors.Join(append(errs, err)...))
}

// seeNAT takes in translated flows, and reports whether one left by a link that was not
// known to be an outside link.
func (r *reconciler) seeNAT(cfg config.Config, translated []cone.Flow) (found bool, err error) {
	if len(translated) == 0 {
		return false, nil
	}
	routes := r.firewall.router(cfg, r.network)
	for i := range translated {
		f := &translated[i]
		ways, _ := routes.Links(f)
		l, ok := leftBy(ways, r.network, f.ReplyDst.Addr.Netip())
		if !ok || l.Outside&gateway.IPv4 != 0 || slices.Contains(cfg.Inside, l.Name) || !r.network.ShowsOutside(l, f.ReplySrc.Addr.Netip()) {
			continue
		}
		if _, known := r.uplinks.seen[l.Name]; known {
			continue
		}
		if r.uplinks.seen == nil {
			r.uplinks.seen = make(map[string]seenLink)
		}
		r.uplinks.seen[l.Name], found = seenLink{l.Index, f.ReplyDst.Addr}, true
	}
	if err := routes.Close(); err != nil {
		return found, fmt.Errorf("find the links of translated flows: %w", err)
	}
	return found, nil
}

// leftBy returns which of links a flow with the outside address ext left by: the link that
// has the address. If none of them has it, a single link is the answer, unless another link
// that leads somewhere has the address: an older flow may have left by that other link. With
// several links there is no answer, since marks may decide.
func leftBy(links []gateway.Link, network gateway.Network, ext netip.Addr) (l gateway.Link, ok bool) {
	holds := func(l gateway.Link) bool {
		return slices.ContainsFunc(network.Addrs, func(a gateway.Addr) bool { return a.Link == l.Index && a.Prefix.Addr() == ext })
	}
	if i := slices.IndexFunc(links, holds); i >= 0 {
		return links[i], true
	}
	elsewhere := slices.ContainsFunc(network.Links, func(l gateway.Link) bool { return holds(l) && (l.Outside != 0 || network.Leads(l)) })
	if len(links) != 1 || elsewhere {
		return l, false
	}
	return links[0], true
}

// newOutside reports whether there is a new outside link, or a new address on one: it may
// have flows already.
func newOutside(old, now gateway.Network) bool {
	known := old.OutsideAddrs()
	return slices.ContainsFunc(now.OutsideAddrs(), func(a gateway.Addr) bool { return !slices.Contains(known, a) }) ||
		slices.ContainsFunc(now.OutsideLinks(), func(l string) bool { return !slices.Contains(old.OutsideLinks(), l) })
}

// warnSides warns of what was assumed about links for which causes contradict each other, or
// that no default route shows.
func (l *loop) warnSides(out *warnings) {
	for _, link := range l.network.Links {
		subnets := slices.DeleteFunc(slices.Clone(l.network.SubnetsOf(link)), l.isOwnAddress)
		if err := l.features.lacks[rules.FeaturePartial]; err != nil && link.Partial && l.backends.expect != nil {
			out.add(warnFeatureMissing, link.Name, "no child of an expectation is let in by %s: %v", link.Name, err)
		}
		switch {
		case link.Cause == gateway.RuledNAT || link.Cause == gateway.SeenNAT:
			out.add(warnAssumedOutside, link.Name, "%s counts as an outside link, for %v, though no default route uses it: "+
				"outside = [%q] says that it is one, and inside = [%q] that it is none", link.Name, link.Cause, link.Name, link.Name)
		case link.Inside && link.Outside != 0 && len(subnets) > 0:
			out.add(warnOneArm, link.Name, "%s leads outside (%v), and to the subnet %v: packets with a source of the subnet count as from inside, "+
				"all others as from outside, so that a host there can fake the address of a peer", link.Name, link.Cause, subnets[0])
		case link.Unused != 0 && !slices.Contains(l.cfg.Inside, link.Name):
			why := "no subnet of that family is enabled"
			if len(subnets) > 0 {
				why = fmt.Sprintf("it leads to the subnet %v", subnets[0])
			}
			out.add(warnUnusedDefault, fmt.Sprintf("%s %v", link.Name, link.Unused), "%s has a default route (%v) and stays inside, for %s: "+
				"if peers are behind it, set outside = [%q]; inside = [%q] says that none are", link.Name, link.Unused, why, link.Name, link.Name)
		}
	}
	for _, name := range l.cfg.Inside {
		if !slices.Contains(l.network.LinkNames(), name) {
			out.add(warnInsideMissing, name, "inside link %s is not there: it counts as soon as it is, or correct its name in the key inside", name)
		}
	}
}
