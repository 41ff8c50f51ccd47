package daemon

import (
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/evidence"
	"github.com/conenatd/conenatd/internal/rules"
)

// witnesses count the children of one subnet.
type witnesses struct {
	mapped, related    evidence.Witness // of what the user's firewall does with DNATed and RELATED children
	admitted, expected evidence.Count
}

// eachWitness yields the witnesses of all subnets.
func (f *firewall) eachWitness(yield func(*evidence.Witness) bool) {
	for _, w := range f.witnesses {
		if !yield(&w.mapped) || !yield(&w.related) {
			return
		}
	}
}

// A nowhere counts children that the map admitted and that did not come to the forward hook,
// where children are counted for each subnet. They count as lost for all subnets.
type nowhere struct {
	total, parts evidence.Count
	most         uint64 // the most so far, since the counters are not read at one time
}

func (n *nowhere) read(c rules.Counters, subnets []config.Subnet) {
	parts := uint64(0)
	for _, s := range subnets {
		into, ok := c.AdmittedInto(s.Prefix)
		if !ok && s.Prefix.Addr().Is4() {
			*n = nowhere{}
			return
		}
		parts += into
	}
	if total, parts := n.total.Read(c.Admitted()), n.parts.Read(parts); total > parts {
		n.most = max(n.most, total-parts)
	}
}

// witness returns the witnesses of a subnet.
func (f *firewall) witness(subnet netip.Prefix) *witnesses {
	w, ok := f.witnesses[subnet]
	if !ok {
		w = new(witnesses)
		if f.witnesses == nil {
			f.witnesses = make(map[netip.Prefix]*witnesses)
		}
		f.witnesses[subnet] = w
	}
	return w
}

// A counting says how the children into a subnet are counted: apart from those into others, or
// with them.
type counting struct {
	subnet             netip.Prefix
	admitted, expected bool
}

// recount begins to count at the present values if children are counted another way than
// before. What was counted so far still holds.
func (f *firewall) recount(subnets []config.Subnet) {
	var now []counting
	for _, s := range subnets {
		_, admitted := f.counts.AdmittedInto(s.Prefix)
		_, expected := f.counts.ExpectedInto(s.Prefix)
		now = append(now, counting{s.Prefix, admitted, expected})
	}
	if slices.Equal(now, f.counting) {
		return
	}
	f.counting, f.nowhere = now, nowhere{}
	for _, w := range f.witnesses {
		w.admitted, w.expected = evidence.Count{}, evidence.Count{}
		w.mapped.Pause()
		w.related.Pause()
	}
}

// readEvidence takes in what became of children into each subnet. If others have changed the
// ruleset, it starts to gather evidence against the rules again.
func (f *firewall) readEvidence(now time.Duration, subnets []config.Subnet, passed func(subnet netip.Prefix) cone.Passed) {
	maps.DeleteFunc(f.witnesses, func(p netip.Prefix, _ *witnesses) bool {
		return !slices.ContainsFunc(subnets, func(s config.Subnet) bool { return s.Prefix == p })
	})
	f.recount(subnets)
	f.nowhere.read(f.counts, subnets)
	if f.dumped {
		for w := range f.eachWitness {
			w.SawFlows()
		}
	}
	mappable := 0
	for _, s := range subnets {
		if s.Prefix.Addr().Is4() {
			mappable++
		}
	}
	for _, s := range subnets {
		w, p := f.witness(s.Prefix), passed(s.Prefix)
		before := f.passedBefore[s.Prefix]
		admitted, ok := f.counts.AdmittedInto(s.Prefix)
		switch {
		case ok:
			w.mapped.Read(now, w.admitted.Read(admitted)+f.nowhere.most, before.Mapped, p.Mapped)
		case mappable == 1 && s.Prefix.Addr().Is4(): // not counted by itself
			w.mapped.Read(now, w.admitted.Read(f.counts.Admitted()), before.Mapped, p.Mapped)
		}
		expected, ok := f.counts.ExpectedInto(s.Prefix)
		if len(subnets) == 1 {
			expected, ok = f.counts.Expected(), true
		}
		if ok {
			w.related.Read(now, w.expected.Read(expected), before.Expected, p.Expected)
		}
	}
	for w := range f.eachWitness {
		w.Judge(f.dumped)
	}
	f.dumped = false
	if !f.contradicted() {
		if f.retry.Changed {
			for w := range f.eachWitness {
				w.ForgetLoss()
			}
		}
		f.retry.Changed = false
		return
	}
	if f.retry.Due(now) {
		for w := range f.eachWitness {
			w.Restart()
		}
	}
}

// contradicted reports whether a decision goes against the rules, by evidence.
func (f *firewall) contradicted() bool {
	for _, d := range f.decisions {
		if d.elsewhere {
			return true
		}
	}
	return false
}

// noteZoned notes whether such packets came lately.
func (f *firewall) noteZoned(now time.Duration) {
	f.zoned.Note(now, f.zones.OneDirection(), f.expected.Total)
	f.unexpected.Note(now, f.zones.OneDirection(), f.expected.Total)
}

// withoutMap are the destinations to which only expectations admit, where flows have a zone in
// their original direction alone.
func (f *firewall) withoutMap(cfg config.Config) (all []netip.Prefix) {
	if !f.zones.OneDirection() || !f.withExpectations() {
		return nil
	}
	for _, a := range f.zones.Outside {
		if !f.withMap || a.Is6() {
			all = append(all, netip.PrefixFrom(a, a.BitLen()))
		}
	}
	for _, s := range cfg.Subnets {
		if s.Routed {
			all = append(all, s.Prefix)
		}
	}
	return all
}

// zonedAddrs are the outside addresses for which the map and mappings serve flows in conntrack zones.
func (f *firewall) zonedAddrs() []netip.Addr {
	if !f.zones.OneDirection() {
		return nil
	}
	return slices.DeleteFunc(slices.Clone(f.zones.Outside), netip.Addr.Is6)
}

// leftZones returns what the tables of an earlier daemon say about zones.
func (f *firewall) leftZones() (cone.Zones, error) {
	if f.tables == nil {
		return cone.Zones{}, nil
	}
	addrs, err := f.tables.ZonedAddrs()
	return cone.Zones{Original: len(addrs) > 0, Outside: addrs}, err
}

// followZones makes the rules serve flows with conntrack zones, if the model says that all
// zones are of the original direction alone. Otherwise the rules serve no flow with a zone:
// they cannot tell zones apart.
func (r *reconciler) followZones(cfg config.Config, zones cone.Zones) error {
	before := r.firewall.zones
	was, others := r.firewall.zonedAddrs(), r.firewall.withoutMap(cfg)
	r.firewall.zones = zones
	if slices.Equal(was, r.firewall.zonedAddrs()) && slices.Equal(others, r.firewall.withoutMap(cfg)) {
		return nil
	}
	if _, err := r.firewall.set(cfg, r.network.OutsideLinks()); err != nil {
		r.firewall.zones = before // try again at the next look
		return err
	}
	r.wantReconcile() // for the mappings of existing flows
	return nil
}
