package cone

// lastMappings remembers some inside endpoints and the outside ones that they had
// last. The kernel gives one and the same to all flows of an inside endpoint where it
// can, but for rules with random or fully-random: then each peer sees another port,
// and what a STUN server said is of no use for the next peer (RFC 4787 section 4.1).
type lastMappings struct {
	slots [1024]struct{ in, ext Endpoint }
	// Of the last ones that were compared, and so many of them were different.
	recent, different int
}

// compare looks whether the outside endpoint of in is the one that it had.
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

// Remaps reports whether most inside endpoints got another outside port lately. That
// of one may have been taken, those of most are not.
func (m *Model) Remaps() bool { return m.last.recent >= 10 && m.last.different > m.last.recent/2 }
