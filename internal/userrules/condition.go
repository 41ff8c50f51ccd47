package userrules

import (
	"bytes"
	"encoding/binary"
	"net"
	"net/netip"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/nfnl"
)

// A condition is what a UDP packet must meet to reach some place in a ruleset. It is never
// narrower than the truth. Its slices are not changed once made.
type condition struct {
	family  byte            // NFPROTO_INET while both are possible
	ports   cone.PortRanges // sorted; nil stands for any
	spared  bool            // they are any but those that earlier rules let pass
	addrs   cone.AddrRanges // nil stands for any
	sources cone.AddrRanges // sorted and disjoint; nil stands for any
	except  cone.AddrRanges // destinations that a test excluded, for source NAT; may be wider than the truth
	unread  bool            // a test of the destination was not understood
	in      []int           // indexes of the outside links that packets come by; nil stands for any
	tested  bool            // the link that packets come by was tested, also if in has all links
	out     []string        // the outgoing links; nil stands for any
	unknown bool            // a test of the port was not understood
	wide    bool            // the condition may be wider than the truth
	astray  bool            // such packets come by other links
	asks    bool            // that test was for neither an address, nor a port, nor a link
}

func partly(conds []condition) []condition {
	out := slices.Clone(conds)
	for i := range out {
		out[i].wide, out[i].asks = true, true
	}
	return out
}

// mostPorts reports whether most ports meet the condition.
func (c condition) mostPorts() bool { return c.ports == nil || c.spared || mostPorts(c.ports) }

func (c condition) forward(text string) Forward {
	f := Forward{
		Ports: c.ports, All: c.ports == nil, Most: c.mostPorts(), Addrs: c.addrs, Sources: c.sources,
		Unknown: c.unknown, Partial: c.wide || c.out != nil, Astray: c.astray, Text: text,
	}
	if f.Addrs == nil {
		switch c.family {
		case unix.NFPROTO_IPV4:
			f.Addrs = cone.AddrRanges{addrRange(make([]byte, 4), slices.Repeat([]byte{0xff}, 4))}
		case unix.NFPROTO_IPV6:
			f.Addrs = cone.AddrRanges{addrRange(make([]byte, 16), slices.Repeat([]byte{0xff}, 16))}
		}
	}
	return f
}

// A field is a part of a key that a rule compares.
type field struct {
	kind fieldKind
	size int
	mask []byte // nil stands for all bits
	is   []byte // the value, if the kind is known
}

type fieldKind uint8

const (
	other   fieldKind = iota // a field that does not matter here
	padding                  // behind a field that does not fill its word; always zero
	protocol
	family
	etherType
	linkName
	linkIndex
	port
	mangledPort // something computed from the port
	address4
	address6
	source4
	source6
	outName
	known // something else that all packets have alike; see firstPacket
)

// A span holds all keys from low to high, field by field.
type span struct{ low, high []byte }

func only(b []byte) span { return span{b, b} }

// has reports whether the span, which may be for the first bytes alone, has a value.
func (s span) has(value []byte) bool {
	value = value[:min(len(s.low), len(value))]
	return bytes.Compare(s.low, value) <= 0 && bytes.Compare(value, s.high) <= 0
}

// isAll reports whether all keys are in the span.
func (s span) isAll() bool {
	return allZero(s.low) && !slices.ContainsFunc(s.high, func(b byte) bool { return b != 0xff })
}

// cut returns the part of s for the field at an offset, masked.
func (s span) cut(f field, at int) span {
	part := func(b []byte) []byte { return bytes.Clone(b[min(at, len(b)):min(at+f.size, len(b))]) }
	s = span{part(s.low), part(s.high)}
	for i := range min(len(f.mask), len(s.low), len(s.high)) {
		s.low[i] &= f.mask[i]
		s.high[i] |= ^f.mask[i]
	}
	return s
}

// outside reports whether s begins with a value that the masked field at an offset never has.
// What is cut then is more than can match.
func (s span) outside(f field, at int) bool {
	for i, bits := range f.mask {
		if at+i < len(s.low) && s.low[at+i]&^bits != 0 {
			return true
		}
	}
	return false
}

// number returns b, at most 8 bytes in network order, padded to size with fill.
func number(b []byte, size int, fill byte) uint64 {
	var n uint64
	for i := range size {
		x := fill
		if i < len(b) {
			x = b[i]
		}
		n = n<<8 | uint64(x)
	}
	return n
}

// A test matches a key in any of the spans, or, if not is set, a key in none of them.
type test struct {
	any     []span
	not     bool
	unknown bool // the keys are not known
	// byPart says that each field of a key must be in its part of a span. Otherwise the key
	// as a whole is a number from low to high.
	byPart bool
	whole  *set // whose elements are the spans; nil for others
	// loose says that more values than the spans' are in them, because a mask was applied.
	loose bool
}

// isNumber reports whether the test compares a key of several fields as one number, which
// says nothing about each field.
func (t *test) isNumber(fields []field) bool {
	return !t.byPart && len(fields) > 1 && slices.ContainsFunc(t.any, func(s span) bool {
		return !bytes.Equal(s.low, s.high) && !s.isAll()
	})
}

// test returns the test that a lookup in the set makes. Many rules may look into one long set.
func (w *walker) test(s *set, not bool) test {
	any, known := w.spans[s]
	if !known {
		for _, e := range s.elements {
			any = append(any, e.span)
		}
		if w.spans == nil {
			w.spans = make(map[*set][]span)
		}
		w.spans[s] = any
	}
	return test{any: any, not: not, unknown: s.failed != nil || !s.loaded, byPart: len(s.fields) > 1, whole: s}
}

// maxProduct limits the number of conditions that concatenated keys produce. Beyond that
// their fields are tested one by one, which gives a wider condition.
const maxProduct = 1 << 10

// narrow returns conds restricted to packets whose fields pass the test.
func (w *walker) narrow(conds []condition, fields []field, t test) []condition {
	asked := 0
	for _, f := range fields {
		if f.isAsked() || w.first != nil && f.isSource() {
			asked++
		}
	}
	var left []condition
	switch {
	case asked == 0 && !slices.ContainsFunc(fields, field.isTold):
		return partly(conds)
	case t.unknown, t.not && len(fields) > 1, t.isNumber(fields):
		for _, c := range conds {
			c.unknown, c.wide = c.unknown || slices.ContainsFunc(fields, field.isPort), true
			c.unread = c.unread || slices.ContainsFunc(fields, func(f field) bool { return f.kind == address4 })
			left = append(left, c)
		}
	case asked > 1 && len(conds)*len(t.any) <= maxProduct:
		for _, c := range conds {
			for _, s := range t.any {
				if c, ok := w.fields(c, fields, test{any: []span{s}}); ok {
					left = append(left, c)
				}
			}
		}
	default:
		for _, c := range conds {
			c.wide = c.wide || len(fields) > 1 && len(t.any) > 1
			if c, ok := w.fields(c, fields, t); ok {
				left = append(left, c)
			}
		}
	}
	return left
}

// isAsked reports whether the elements of a set matter for the field, however many there
// are.
func (f field) isAsked() bool { return f.kind > padding && !f.isTold() }

// isTold reports whether answers contain the field, although no set is read because of it.
func (f field) isTold() bool { return f.isSource() || f.kind == outName }

func (f field) isSource() bool { return f.kind == source4 || f.kind == source6 }

func (f field) isPort() bool { return f.kind == port || f.kind == mangledPort }

// fields applies the test to one field after the other. It reports whether c is still
// possible.
func (w *walker) fields(c condition, fields []field, t test) (condition, bool) {
	if len(fields) == 1 && fields[0].mask == nil {
		return w.field(c, fields[0], t)
	}
	at := 0
	for _, f := range fields {
		part := test{not: t.not}
		for _, s := range t.any {
			part.loose = part.loose || s.outside(f, at)
			part.any = append(part.any, s.cut(f, at))
		}
		at += f.size
		var ok bool
		if c, ok = w.field(c, f, part); !ok {
			return c, false
		}
	}
	return c, true
}

func (w *walker) field(c condition, f field, t test) (condition, bool) {
	switch f.kind {
	case known:
		return c, f.passes(t)
	case padding:
		return c, true
	}
	if f.isSource() || w.first != nil && (f.kind == address4 || f.kind == address6) {
		return w.at(c, f, t)
	}
	wide := f.mask != nil
	switch f.kind {
	case other, mangledPort:
		wide = true
	case outName:
		wide = wide || t.not || w.first != nil && len(w.first.out) != 1
	case address4, address6:
		wide = wide || t.not
	case linkName, linkIndex:
		wide = wide || w.outside == nil || w.first != nil && len(w.outside) != 1
	}
	c.wide = c.wide || wide
	if f.kind == mangledPort || f.kind == port && t.not && f.mask != nil {
		c.unknown = true
		return c, true
	}
	if t.not && f.kind == address4 && w.sources != nil {
		c.except = append(slices.Clip(c.except), t.addrs(false)...)
	}
	if t.not && f.mask != nil {
		return c, true // a mask makes the spans too wide, so their complement would be too narrow
	}
	passes := func(in func(span) bool) bool { return slices.ContainsFunc(t.any, in) != t.not }
	named := func(l Link) bool { return passes(func(s span) bool { return s.has(nfnl.LinkKey(l.Name)) }) }
	is := func(n uint64) func(span) bool {
		return func(s span) bool { return number(s.low, f.size, 0) <= n && n <= number(s.high, f.size, 0xff) }
	}
	switch f.kind {
	case protocol:
		return c, passes(is(unix.IPPROTO_UDP))
	case family:
		return c.ofFamily(passes(is(unix.NFPROTO_IPV4)), passes(is(unix.NFPROTO_IPV6)))
	case etherType:
		return c.ofFamily(passes(is(unix.ETH_P_IP)), passes(is(unix.ETH_P_IPV6)))
	case linkName:
		return w.arriving(c, named)
	case linkIndex:
		return w.arriving(c, func(l Link) bool {
			return passes(func(s span) bool { return s.has(binary.NativeEndian.AppendUint32(nil, uint32(l.Index))) })
		})
	case port:
		var ports cone.PortRanges
		for _, s := range t.any {
			ports = append(ports, cone.PortRange{First: uint16(number(s.low, 2, 0)), Last: uint16(number(s.high, 2, 0xff))})
		}
		ports = ports.Merged()
		if t.not {
			ports = complement(ports)
		}
		c.ports = intersect(c.ports, ports)
		return c, len(c.ports) > 0
	case address4, address6:
		if t.not {
			return c, true
		}
		c.addrs = intersectAddrs(c.addrs, t.addrs(f.kind == address6))
		return c, len(c.addrs) > 0
	case outName:
		switch {
		case w.first != nil:
			return c, w.first.out == nil || slices.ContainsFunc(w.first.out, named)
		case t.not:
			return c, true
		}
		c.out = c.leaving(t.any)
		return c, len(c.out) > 0
	}
	return c, true
}

// isPrefixMask reports whether a mask keeps the first bits of a field, so that a span of masked
// keys is a span of keys.
func isPrefixMask(mask []byte) bool {
	ones, size := net.IPMask(mask).Size()
	return ones > 0 || size > 0
}

// leaving returns the links of c that match one of the names. A name without its end (a
// zero byte) matches all names that begin with it.
func (c *condition) leaving(names []span) (links []string) {
	for _, s := range names {
		name := string(bytes.TrimRight(s.low, "\x00"))
		if !bytes.ContainsRune(s.low, 0) {
			name += "*"
		}
		if c.out == nil || slices.ContainsFunc(c.out, func(o string) bool { return covered(o, name) }) {
			links = append(links, name)
			continue
		}
		for _, o := range c.out {
			if covered(name, o) {
				links = append(links, o)
			}
		}
	}
	return links
}

// covered reports whether a pattern matches a name, or all names of another pattern.
func covered(pattern, name string) bool {
	prefix, is := strings.CutSuffix(pattern, "*")
	return pattern == name || is && strings.HasPrefix(name, prefix)
}

// addrs returns the addresses in the spans. A span may hold only the first bytes of an
// address.
func (t *test) addrs(v6 bool) (all cone.AddrRanges) {
	size := 4
	if v6 {
		size = 16
	}
	for _, s := range t.any {
		low, high := make([]byte, size), slices.Repeat([]byte{0xff}, size)
		copy(low, s.low)
		copy(high, s.high)
		all = append(all, addrRange(low, high))
	}
	return all
}

func (c condition) ofFamily(v4, v6 bool) (condition, bool) {
	v4 = v4 && c.family != unix.NFPROTO_IPV6
	v6 = v6 && c.family != unix.NFPROTO_IPV4
	switch {
	case v4 && !v6:
		c.family = unix.NFPROTO_IPV4
	case v6 && !v4:
		c.family = unix.NFPROTO_IPV6
	}
	return c, v4 || v6
}

func addrRange(low, high []byte) cone.AddrRange {
	first, _ := netip.AddrFromSlice(low)
	last, _ := netip.AddrFromSlice(high)
	return cone.AddrRange{First: first, Last: last}
}

// complement returns the ports that are not in the merged ranges.
func complement(ranges cone.PortRanges) cone.PortRanges {
	var out cone.PortRanges
	next := 0
	for _, r := range ranges {
		if next < int(r.First) {
			out = append(out, cone.PortRange{First: uint16(next), Last: r.First - 1})
		}
		next = int(r.Last) + 1
	}
	if next <= 0xffff {
		out = append(out, cone.PortRange{First: uint16(next), Last: 0xffff})
	}
	return out
}

// intersect returns the ports in both merged lists; nil stands for all in a.
func intersect(a, b cone.PortRanges) cone.PortRanges {
	if a == nil {
		return b
	}
	out := cone.PortRanges{}
	for len(a) > 0 && len(b) > 0 {
		if r := (cone.PortRange{First: max(a[0].First, b[0].First), Last: min(a[0].Last, b[0].Last)}); r.First <= r.Last {
			out = append(out, r)
		}
		if a[0].Last < b[0].Last {
			a = a[1:]
		} else {
			b = b[1:]
		}
	}
	return out
}

func intersectAddrs(a, b cone.AddrRanges) cone.AddrRanges {
	if a == nil {
		return b
	}
	out := cone.AddrRanges{}
	for _, x := range a {
		for _, y := range b {
			r := x
			if y.First.Compare(r.First) > 0 {
				r.First = y.First
			}
			if y.Last.Compare(r.Last) < 0 {
				r.Last = y.Last
			}
			if x.First.BitLen() == y.First.BitLen() && r.First.Compare(r.Last) <= 0 {
				out = append(out, r)
			}
		}
	}
	return out
}
