package cone

import "net/netip"

// Passed counts children that the user's firewall let pass.
type Passed struct {
	Mapped   uint64 // that a map admitted
	Expected uint64 // expected flows from outside, ours or not
}

// passed returns the count for the subnet of f's inside host.
func (m *Model) passed(f *Flow) *Passed {
	_, s, _ := m.policy.subnet(f.ReplySrc.Addr.Netip())
	p, ok := m.passes[s.Prefix]
	if !ok {
		p = new(Passed)
		m.passes[s.Prefix] = p
	}
	return p
}

// PassedInto returns the count for an enabled subnet. Flows count to the subnet that is
// enabled when they begin.
func (m *Model) PassedInto(subnet netip.Prefix) Passed {
	if p, ok := m.passes[subnet]; ok {
		return *p
	}
	return Passed{}
}

// PassedBySubnet returns the counts of all enabled subnets that have one.
func (m *Model) PassedBySubnet() map[netip.Prefix]Passed {
	all := make(map[netip.Prefix]Passed, len(m.passes))
	for subnet, p := range m.passes {
		all[subnet] = *p
	}
	return all
}

// Passed returns the count for all subnets.
func (m *Model) Passed() (all Passed) {
	for _, p := range m.passes {
		all.Mapped += p.Mapped
		all.Expected += p.Expected
	}
	return all
}

// notePassed counts f when it is first seen. f is a child of claim i, or of no claim if i is
// none. Flows of the first snapshot passed long ago and do not count; later snapshots show
// children whose events were lost.
func (m *Model) notePassed(f *Flow, i int32) {
	if !m.snap.complete || m.snap.fromDump && (m.snap.first || i == none) || m.policy.isOwn(f.ReplySrc.Addr) { // which the forward hook does not see
		return
	}
	switch {
	case i != none && m.flowOf(i, f.Src, true, f.ID) != none: // it is known
	case f.Status.Has(StatusExpected):
		m.passed(f).Expected++
	case m.passedBefore(f, i):
	default:
		m.passed(f).Mapped++
	}
}
