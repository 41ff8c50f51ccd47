package userrules

import (
	"bytes"
	"math"
	"net/netip"

	"github.com/google/nftables/expr"
)

// A cell is one byte of a register: the bits of val that are set in known are known, the
// other bits may have any value.
type cell struct {
	val, known byte
	mask       byte // bits that were not masked out
	changed    bool // by an exclusive or
	at         int  // index in the value of origin
	*origin
}

// An origin is the source of an unknown value.
type origin struct {
	even   bool                        // all values are equally likely: addresses, ports
	other  func(low, high []byte) bool // reports whether no packet has a value from low to high
	unsure bool                        // a test of it may match or not
}

// unknownBytes returns n unknown bytes.
func unknownBytes(n int, s *origin) []cell {
	cells := make([]cell, n)
	for i := range cells {
		cells[i] = cell{mask: 0xff, at: i, origin: s}
	}
	return cells
}

func knownBytes(b []byte) []cell {
	cells := make([]cell, len(b))
	for i := range cells {
		cells[i] = cell{val: b[i], known: 0xff, mask: 0xff}
	}
	return cells
}

// inPrefix returns the unknown address of a host in the prefix.
func inPrefix(p netip.Prefix) []cell {
	cells := unknownBytes(p.Addr().BitLen()/8, &origin{even: true})
	for i, b := range p.Masked().Addr().AsSlice() {
		bits := min(max(p.Bits()-8*i, 0), 8)
		cells[i].known = ^byte(0xff >> bits)
		cells[i].val = b
	}
	return cells
}

// outOf returns an unknown address outside all of the prefixes.
func outOf(prefixes []netip.Prefix, size int) []cell {
	return unknownBytes(size, &origin{even: true, other: func(low, high []byte) bool {
		first, ok := netip.AddrFromSlice(filled(low, size, 0))
		last, ok2 := netip.AddrFromSlice(filled(high, size, 0xff))
		if !ok || !ok2 {
			return false
		}
		for _, p := range prefixes {
			if p.Contains(first) && p.Contains(last) {
				return true
			}
		}
		return false
	}})
}

func filled(b []byte, size int, fill byte) []byte {
	return append(bytes.Clone(b), bytes.Repeat([]byte{fill}, max(size-len(b), 0))...)
}

// equals returns the chance that the cells hold b.
func equals(cells []cell, b []byte) chance {
	if len(cells) < len(b) {
		return maybe
	}
	cells = cells[:len(b)]
	unknown, even := 0, true
	for i, c := range cells {
		if (c.val^b[i])&c.known != 0 {
			return never
		}
		for bits := ^c.known; bits != 0; bits &= bits - 1 {
			unknown++
		}
		even = even && (c.known == 0xff || c.origin != nil && c.even)
	}
	switch {
	case unknown == 0:
		return always
	case impossible(cells, b, b):
		return never
	}
	noteUnsure(cells)
	if !even {
		return maybe
	}
	return portion(math.Ldexp(1, -unknown))
}

// noteUnsure notes that a test depends on values of which not all is known.
func noteUnsure(cells []cell) {
	for _, c := range cells {
		if c.known != 0xff && c.origin != nil {
			c.unsure = true
		}
	}
}

// impossible reports whether the origin of the cells excludes all values from low to high.
func impossible(cells []cell, low, high []byte) bool {
	s := cells[0].origin
	if s == nil || s.other == nil {
		return false
	}
	one := bytes.Equal(low, high)
	high = bytes.Clone(high)
	for i, c := range cells {
		if c.origin != s || c.at != i || c.changed || c.mask != 0xff && !one {
			return false
		}
		high[i] |= ^c.mask
	}
	return s.other(low, high)
}

// within returns the chance that the cells hold a number from low to high. If all their
// values are equally likely, it also returns the fraction that lies in that range.
func within(cells []cell, low, high []byte) (chance, float64) {
	n := len(low)
	if len(cells) < n || len(high) < n || n == 0 {
		return maybe, 0
	}
	cells = cells[:n]
	least, most := make([]byte, n), make([]byte, n)
	even := true
	for i, c := range cells {
		least[i] = c.val & c.known
		most[i] = least[i] | ^c.known
		even = even && (c.known == 0xff || c.origin != nil && c.even)
	}
	switch {
	case bytes.Compare(least, low) >= 0 && bytes.Compare(most, high) <= 0:
		return always, 1
	case bytes.Compare(most, low) < 0, bytes.Compare(least, high) > 0, bytes.Compare(low, high) > 0:
		return never, 0
	case impossible(cells, low, high):
		return never, 0
	}
	noteUnsure(cells)
	if !even {
		return maybe, 0
	}
	if bytes.Compare(low, least) < 0 {
		low = least
	}
	if bytes.Compare(high, most) > 0 {
		high = most
	}
	p := (float(high) - float(low) + 1) / (float(most) - float(least) + 1)
	return portion(p), p
}

func float(b []byte) (f float64) {
	for _, x := range b {
		f = f*256 + float64(x)
	}
	return f
}

// cells are the registers of a rule, byte by byte.
type cells [80]cell

// at returns the index of a register's first byte.
func (r *cells) at(reg uint32) int { return 4 * min(word(max(reg, 1)), 15) }

func (r *cells) get(reg uint32, size int) []cell {
	at := r.at(reg)
	return r[at : at+min(max(size, 0), len(r)-at)]
}

// put loads a register. As in the kernel, the rest of its last word becomes zero.
func (r *cells) put(reg uint32, b []cell) {
	for len(b)%4 != 0 {
		b = append(b, knownBytes([]byte{0})...)
	}
	copy(r[r.at(reg):], b)
}

// forget makes the registers from reg on unknown.
func (r *cells) forget(reg uint32) {
	for i := r.at(reg); i < len(r); i++ {
		r[i] = cell{mask: 0xff}
	}
}

func (r *cells) bitwise(e *expr.Bitwise) {
	n := int(e.Len)
	src := append([]cell(nil), r.get(e.SourceRegister, n)...)
	if len(e.Mask) != n || len(e.Xor) != n || len(src) != n {
		r.forget(e.DestRegister) // for example a shift
		return
	}
	for i := range src {
		c := &src[i]
		c.val = c.val&e.Mask[i] ^ e.Xor[i]
		c.known |= ^e.Mask[i]
		c.mask &= e.Mask[i]
		c.changed = c.changed || e.Xor[i] != 0
	}
	r.put(e.DestRegister, src)
}

// compare returns the chance that a comparison holds.
func (r *cells) compare(e *expr.Cmp) chance {
	n := len(e.Data)
	have := r.get(e.Register, n)
	lowest, highest := make([]byte, n), bytes.Repeat([]byte{0xff}, n)
	switch e.Op {
	case expr.CmpOpEq:
		return equals(have, e.Data)
	case expr.CmpOpNeq:
		return equals(have, e.Data).not()
	case expr.CmpOpLte:
		c, _ := within(have, lowest, e.Data)
		return c
	case expr.CmpOpGt:
		c, _ := within(have, lowest, e.Data)
		return c.not()
	case expr.CmpOpGte:
		c, _ := within(have, e.Data, highest)
		return c
	case expr.CmpOpLt:
		c, _ := within(have, e.Data, highest)
		return c.not()
	}
	return maybe
}
