package cone

// SetAdopting says whether the kernel may hold permissions of an earlier daemon that Adopt was
// not called for yet. Until it is told that there are none, the model renews a permission that
// a new flow earns, because a grant does not renew one that is there, and spares children of
// permissions that it does not know.
func (m *Model) SetAdopting(on bool) { m.adopting = on }

// Adopting returns what SetAdopting said last.
func (m *Model) Adopting() bool { return m.adopting }

// Unknown calls f for each permission that fl may hold and whose Key has no claim.
func (m *Model) Unknown(fl *Flow, f func(Permission)) {
	role, p, _ := m.role(fl)
	if role != roleOut {
		return
	}
	first, n := m.policy.expand(&p)
	for i := range n {
		p.Peer = first.Plus(i)
		if !m.Has(p.Key) {
			f(p)
		}
	}
}

// Has reports whether k has a claim.
func (m *Model) Has(k Key) bool { return m.owner(k) != none }
