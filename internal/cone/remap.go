package cone

// lastMappings remembers the last outside endpoints of some inside endpoints. If it can,
// the kernel gives the same one to all flows of an inside endpoint, except under rules with
// random or fully-random: then each peer sees another port, and the address that a STUN
// server reports is useless for the next peer (RFC 4787 section 4.1).
type lastMappings struct {
	slots [1024]struct{ in, ext Endpoint }
	// recent counts comparisons and is halved at 64; different counts those that differed.
	recent, different int
}

// compare counts whether the outside endpoint of in is the one that it had last.
func (m *Model) compare(in, ext Endpoint) {
	l := &m.last
	h := uint32(in.Port)
	for _, b := range in.Addr[12:] {
		h = (h ^ uint32(b)) * 16777619 // FNV-1
	}
	slot := &l.slots[(h^h>>16)%uint32(len(l.slots))]
	if slot.in == in && slot.ext.Addr == ext.Addr {
		m.stats.Compared++
		if l.recent++; l.recent == 64 {
			l.recent, l.different = l.recent/2, l.different/2
		}
		if slot.ext != ext {
			m.stats.Remapped++
			l.different++
		}
	}
	slot.in, slot.ext = in, ext
}

// Remaps reports whether most inside endpoints got another outside port lately. For one of
// them the port may have been in use, but not for most.
func (m *Model) Remaps() bool { return m.last.recent >= 10 && m.last.different > m.last.recent/2 }
