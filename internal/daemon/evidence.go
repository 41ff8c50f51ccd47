package daemon

import (
	"cmp"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/rules"
)

const (
	// enoughChildren is how many children it takes to show that a firewall drops them, since
	// events of a few may be lost.
	enoughChildren = 3
	// manyChildren is the count above which all counts are halved, so that older children
	// weigh less.
	manyChildren = 64
	// evidenceMemory is how long evidence holds after the last child: the firewall may have
	// changed unnoticed.
	evidenceMemory = time.Hour
)

// witnesses count the children of one subnet.
type witnesses struct {
	mapped, related    witness // of what the user's firewall does with DNATed and RELATED children
	admitted, expected runningCount
}

// eachWitness yields the witnesses of all subnets.
func (f *firewall) eachWitness(yield func(*witness) bool) {
	for _, w := range f.witnesses {
		if !yield(&w.mapped) || !yield(&w.related) {
			return
		}
	}
}

// A nowhere counts children that the map admitted and that did not come to the forward hook,
// where children are counted for each subnet. They count as lost for all subnets.
type nowhere struct {
	total, parts runningCount
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
	if total, parts := n.total.read(c.Admitted()), n.parts.read(parts); total > parts {
		n.most = max(n.most, total-parts)
	}
}

// A witness counts the children that one carrier admitted lately, and how many of them
// the user's firewall let pass: those that conntrack confirmed.
type witness struct {
	counting         bool
	admitted, passed uint64 // as read last
	before           uint64 // passed, as it was before admitted was read
	lately, through  uint64
	pending          uint64        // admitted after the last dump of flows, so events may be missing
	seen             time.Duration // when the last child came
	lost             bool          // after a dump of flows, no child had passed
	anyPassed        bool          // since restart
	accepted         bool          // the rules that are read accept all children
}

// read takes in the totals. The daemon hears of a child after the kernel has counted it, so what
// begins to count begins with those that had passed before admitted was read: a child that is not
// among admitted must not be missing later among those that passed.
func (w *witness) read(now time.Duration, admitted, before, passed uint64) {
	if w.counting {
		if admitted > w.admitted {
			w.pending += admitted - w.admitted
			w.seen = now
		}
		// Of one child the two totals may be of different readings.
		w.through += passed - w.passed
		w.anyPassed = w.anyPassed || passed > w.passed
	}
	if !w.counting {
		passed = before
	}
	w.counting, w.admitted, w.before, w.passed = true, admitted, before, passed
	if w.lately > manyChildren {
		w.lately, w.through, w.pending = w.lately/2, w.through/2, w.pending/2
	}
	if now-w.seen >= evidenceMemory {
		w.lately, w.through, w.pending = 0, 0, 0
	}
}

// sawFlows tells the witness that flows were dumped since the last reading. Events are late on a
// busy machine, and some are lost. The dump shows all the same which children passed until that
// reading: the others are lost.
func (w *witness) sawFlows() { w.lately, w.pending = w.lately+w.pending, 0 }

// pause ends counting. The next reading begins again at its values, so children whose events are
// missing are forgotten.
func (w *witness) pause() {
	w.lately = max(w.lately, min(w.through, w.lately+w.pending))
	w.counting, w.pending = false, 0
}

// judge updates lost. dumped says whether flows were dumped since the last call.
func (w *witness) judge(dumped bool) {
	pass, known := w.passes()
	all := known && !pass && !w.anyPassed
	w.lost = all && (w.lost || dumped)
}

// contradicts reports whether all children are lost though the rules that are read accept
// them, for instance in a chain of another hook. If one child passed, the lost ones may be those
// of a peer that the user blocks.
func (w *witness) contradicts() bool { return w.lost }

// acceptedNow takes in whether the rules that are read accept all children. Children that
// were lost before say nothing against them.
func (w *witness) acceptedNow(accepted bool) {
	if accepted && !w.accepted {
		w.restart()
	}
	w.accepted = accepted
}

// restart forgets earlier children.
func (w *witness) restart() {
	w.lately, w.through, w.pending, w.lost, w.anyPassed = 0, 0, 0, false, false
	w.passed = w.before
}

// A retry says when to gather evidence against rules again, because somebody changed them.
// Each time children may be lost, so the waits grow if the rules keep changing.
type retry struct {
	changed  bool
	at, wait time.Duration
}

// due reports whether to begin now.
func (r *retry) due(now time.Duration) bool {
	if !r.changed || now-r.at < r.wait {
		return false
	}
	if now-r.at >= evidenceMemory {
		r.wait = 0
	}
	r.changed, r.at, r.wait = false, now, min(max(2*r.wait, time.Minute), evidenceMemory)
	return true
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
		w.admitted, w.expected = runningCount{}, runningCount{}
		w.mapped.pause()
		w.related.pause()
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
			w.sawFlows()
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
			w.mapped.read(now, w.admitted.read(admitted)+f.nowhere.most, before.Mapped, p.Mapped)
		case mappable == 1 && s.Prefix.Addr().Is4(): // not counted by itself
			w.mapped.read(now, w.admitted.read(f.counts.Admitted()), before.Mapped, p.Mapped)
		}
		expected, ok := f.counts.ExpectedInto(s.Prefix)
		if len(subnets) == 1 {
			expected, ok = f.counts.Expected(), true
		}
		if ok {
			w.related.read(now, w.expected.read(expected), before.Expected, p.Expected)
		}
	}
	for w := range f.eachWitness {
		w.judge(f.dumped)
	}
	f.dumped = false
	if !f.contradicted() {
		if f.retry.changed {
			for w := range f.eachWitness {
				w.lost, w.anyPassed = false, false
			}
		}
		f.retry.changed = false
		return
	}
	if f.retry.due(now) {
		for w := range f.eachWitness {
			w.restart()
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

// zoneQuiet is how long no packet must have come in a zone before a child of an expectation shows
// that packets do not come there any more. It is so long because with several uplinks those of one
// may come in a zone and those of another not.
const zoneQuiet = time.Minute

// inZone tells of packets from outside that come in a conntrack zone without expectations: these
// stand in the zone of the flow's reply direction.
type inZone struct {
	total    runningCount
	before   uint64        // total at the last look
	seen     time.Duration // when it last grew
	expected uint64        // children of expectations until then
	lately   bool          // it grew lately
}

// note takes in total, and how many children expectations have admitted so far. If nobody sends, it
// holds for evidenceMemory.
func (z *inZone) note(now time.Duration, oneDirection bool, expected uint64) {
	if z.total.total > z.before {
		z.before, z.seen, z.expected, z.lately = z.total.total, now, expected, true
	}
	over := now-z.seen >= evidenceMemory || now-z.seen >= zoneQuiet && expected > z.expected
	z.lately = z.lately && oneDirection && !over
}

// noteZoned notes whether such packets came lately.
func (f *firewall) noteZoned(now time.Duration) {
	f.zoned.note(now, f.zones.OneDirection(), f.expected.total)
	f.unexpected.note(now, f.zones.OneDirection(), f.expected.total)
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

// judged returns how many children passes judges. Before the first dump, these are all that were
// admitted: that they passed is known at once.
func (w *witness) judged() uint64 { return cmp.Or(w.lately, w.pending) }

// passes reports whether children pass, and whether there is enough evidence to know.
func (w *witness) passes() (pass, known bool) {
	switch {
	case w.judged() > 0 && 2*w.through >= w.judged():
		return true, true
	case w.lately >= enoughChildren && 4*w.through < w.lately:
		return false, true
	}
	return false, false
}
