package userrules

// A chance says how likely it is that a packet of a class matches. Only never and always
// are certain. Rarely stands for a few addresses or ports out of many, mostly for all but a
// few.
type chance uint8

const (
	never chance = iota
	rarely
	maybe
	mostly
	always
)

// and returns the chance that both match.
func (c chance) and(d chance) chance { return min(c, d) }

// not returns the chance that c does not match.
func (c chance) not() chance { return always - c }

func (c chance) inverted(not bool) chance {
	if not {
		return c.not()
	}
	return c
}

// few is the largest fraction of all packets that counts as rare.
const few = 1. / 8

// portion returns the chance of a match if fraction p of all packets match, some but not
// all.
func portion(p float64) chance {
	switch {
	case p <= few:
		return rarely
	case p >= 1-few:
		return mostly
	}
	return maybe
}

func certain(b bool) chance {
	if b {
		return always
	}
	return never
}
