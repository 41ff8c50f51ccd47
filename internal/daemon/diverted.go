package daemon

import (
	"reflect"
	"slices"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/userrules"
)

// divert reads which ports of peers rules of the user's take from inside hosts, and reports
// whether the tables must change for it. What was read before holds if rules cannot be read.
func (f *firewall) divert(cfg config.Config, network gateway.Network) (changed bool) {
	if f.unread != nil || f.user == nil {
		return false
	}
	var next []userrules.Diversion
	own := network.Topology().Local
	all, same := f.diverter.Diversions(f.user, sidesOf(cfg, network))
	if same && slices.Equal(own, f.divertedOwn) {
		return false
	}
	f.divertedOwn = own
	for _, d := range all {
		// The gateway's own addresses are no peers.
		isOwn := func(r cone.AddrRange) bool { return r.First == r.Last && slices.Contains(own, r.First) }
		if slices.ContainsFunc(d.Peers, isOwn) {
			if d.Peers = slices.DeleteFunc(slices.Clone(d.Peers), isOwn); len(d.Peers) == 0 {
				continue
			}
		}
		next = append(next, d)
	}
	next = userrules.MergedDiversions(next)
	changed = !reflect.DeepEqual(next, f.diverted)
	f.diverted, f.endsAny = next, f.endsAny || changed
	return changed
}

// sidesOf returns where packets of inside hosts come from. Without a link that leads inside, no
// rule is for one by its name.
func sidesOf(cfg config.Config, network gateway.Network) userrules.Sides {
	s := userrules.Sides{Inside: insideLinks(network), Outside: outsideLinks(network), Subnets: prefixes(cfg.Subnets)}
	if len(s.Inside) == 0 {
		s.Inside = []userrules.Link{{}}
	}
	return s
}

// endDiverted ends the children that would keep packets from the user's rules, once for each change
// of the rules. The tables must have the change.
func (f *firewall) endDiverted(cfg config.Config) error {
	if !f.endsAny || len(f.diverted) == 0 {
		f.endsAny = false
		return nil
	}
	_, err := f.fixedFlows(cfg).End(func(sent *cone.Flow) bool {
		return sent.IsChild() && slices.ContainsFunc(f.diverted, func(d userrules.Diversion) bool {
			return d.Takes(sent.Src.Addr.Netip(), sent.ReplySrc.Netip())
		})
	})
	f.endsAny = err != nil
	return err
}

// diversions are what the tables do about them.
func (f *firewall) diversions() (all []rules.Diversion) {
	for _, d := range f.diverted {
		all = append(all, rules.Diversion{Hosts: d.Hosts, Peers: d.Peers, Ports: d.Ports})
	}
	return all
}
