package cone

// labels reports whether the label tells the children of the map from other flows: the kernel
// has labels, and nobody else sets ours.
func (m *Model) labels() bool { return m.policy.Labels && !m.othersLabel }

// LabelTaken reports whether, by the flows that were seen since the last snapshot began, somebody
// else sets the label of our children.
func (m *Model) LabelTaken() bool { return m.policy.Labels && m.othersLabel }

// noteLabel notes that f has our label although our rules cannot have set it: they set it with
// the translation of the destination alone.
func (m *Model) noteLabel(f *Flow) {
	if f.Labelled && !f.Status.Has(StatusDstNAT) {
		m.othersLabel, m.snap.othersLabel = true, true
	}
}
