// Package mapping keeps the mappings in the kernel in step with the flows that use them, for hosts
// with endpoint-independent mapping (RFC 4787, section 4.1), and says which flows go without. A
// value is for one goroutine at a time.
package mapping

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// A View is what a Mapper judges flows and mappings by.
type View struct {
	Kernel *elements.Mappings
	Links  map[cone.Addr]string // names of outside links, by their addresses
	Owned  func(cone.Addr) bool // packets to the address end here
	Routes *flows.Router        // closed by Keep
	Inside func(cone.Addr) bool // is in a subnet with mappings
	Served func(cone.Endpoint) bool
	Barred []uint16 // outside ports on which mappings must end, sorted
	Exempt []netip.Prefix
	Given  *Given
	Zoned  bool // the rules serve zones of the original direction
	// Outdated reports whether the host of a mapping may no longer have its port.
	Outdated func(elements.Mapping) bool
}

// A Mapper keeps each mapping for as long as one of its flows lives: the kernel does
// that by itself only until the flow is answered. Each dump has a new Mapper.
type Mapper struct {
	View
	ending map[ends]struct{} // outdated mappings that stand
	ended  []cone.Flow       // flows on ports of outdated mappings

	strays  []elements.Mapping // their hosts get another outside address now
	formers map[elements.Former]struct{}

	known map[ends]string                       // mappings that stand, and their links
	bad   []elements.Mapping                    // outdated, or on a port that the gateway serves now
	twins []elements.Mapping                    // their outside endpoint is another mapping's, too
	live  map[elements.Mapping]struct{}         // known mappings with a living flow
	older map[elements.Mapping][]elements.Taken // new ones, from flows older than the rules; what these take if refused
	taken map[elements.Taken]struct{}           // ports in use by living flows without a mapping

	insides map[elements.Mapping]int // number of outside endpoints by inside endpoint and link, with those in older

	applied, before Applied                       // result of this look, and of the last one
	ids             map[elements.Mapping][]uint32 // IDs of the flows behind each mapping in older
}

// ends are both ends of a mapping.
type ends struct{ in, ext cone.Endpoint }

func newMapper(v View) *Mapper {
	return &Mapper{
		View:    v,
		known:   make(map[ends]string),
		ending:  make(map[ends]struct{}),
		live:    make(map[elements.Mapping]struct{}),
		older:   make(map[elements.Mapping][]elements.Taken),
		taken:   make(map[elements.Taken]struct{}),
		ids:     make(map[elements.Mapping][]uint32),
		formers: make(map[elements.Former]struct{}),
		insides: make(map[elements.Mapping]int),
	}
}

// New lists the mappings that stand. before is the result of the last look. noted is called for the
// outside address of each.
func New(v View, before Applied, noted func(cone.Addr)) (*Mapper, error) {
	m := newMapper(v)
	m.before = before
	owners := make(map[cone.Endpoint]elements.Mapping)
	return m, m.Kernel.List(func(x elements.Mapping, _ time.Duration) {
		noted(x.Ext.Addr)
		if m.stray(x) {
			return
		}
		outdated := m.Outdated(x)
		if outdated {
			m.ending[ends{x.Int, x.Ext}] = struct{}{}
		}
		if outdated || m.isBarred(x.Ext.Port) {
			m.bad = append(m.bad, x)
			return
		}
		if other, ok := owners[x.Ext]; ok && other != x { // two first packets raced
			m.twins = append(m.twins, x)
			return
		}
		owners[x.Ext] = x
		m.known[ends{x.Int, x.Ext}] = x.Link
		m.insides[inside(x)]++
	})
}

// inside returns the link and inside endpoint of a mapping, which may have one outside
// endpoint only.
func inside(x elements.Mapping) elements.Mapping { return elements.Mapping{Link: x.Link, Int: x.Int} }

// isBarred reports whether mappings on an outside port must end.
func (m *Mapper) isBarred(port uint16) bool {
	_, barred := slices.BinarySearch(m.Barred, port)
	return barred
}

// See takes in a living flow.
func (m *Mapper) See(f *cone.Flow) {
	if !f.Src.Addr.Is4() || cone.IsAnchor(f.Src, f.Dst) {
		return
	}
	if f.ReplyZone != 0 || f.OrigZone != 0 && !m.Zoned {
		m.check(f, "")
		return
	}
	m.hold(ends{f.ReplySrc, f.Dst}) // a child, or hairpinned
	if m.hold(ends{f.Src, f.ReplyDst}) {
		m.applied.flows++
		return
	}
	if _, outdated := m.ending[ends{f.Src, f.ReplyDst}]; outdated {
		m.ended = append(m.ended, *f)
		return
	}
	out := elements.Taken{Remote: f.ReplySrc, Port: f.ReplyDst.Port}
	switch {
	case f.Status.Has(cone.StatusDstNAT):
	case f.Status.Has(cone.StatusSrcNAT):
		link := ""
		if m.Inside(f.Src.Addr) {
			link = m.linkOf(f)
			m.check(f, link)
		}
		if link == "" || m.isBarred(f.ReplyDst.Port) || m.isFormer(link, f.Src.Addr, f.ReplyDst.Addr) {
			m.taken[out] = struct{}{}
			return
		}
		// The flow is older than the rules.
		x := elements.Mapping{Link: link, Int: f.Src, Ext: f.ReplyDst}
		if m.Outdated(x) {
			if m.leavesBy(f, link) {
				m.ended = append(m.ended, *f)
			} else {
				m.taken[out] = struct{}{}
			}
			return
		}
		if len(m.older[x]) == 0 {
			m.insides[inside(x)]++
		}
		m.older[x] = append(m.older[x], out)
		m.ids[x] = append(m.ids[x], f.ID)
		m.applied.flows++ // unless it is refused
	case m.Owned(f.Src.Addr):
		m.taken[out] = struct{}{}
	case m.Owned(f.Dst.Addr) && !m.Served(f.Dst) && f.OrigZone == 0:
		m.taken[elements.Taken{Remote: f.Src, Port: f.Dst.Port}] = struct{}{}
	}
}

// linkOf returns the outside link for a mapping of the flow: the link that has the outside
// address, if the rules may give it there, else the link by which the flow leaves. It returns
// none if the address is not the gateway's: the gateway may have lost it.
func (m *Mapper) linkOf(f *cone.Flow) string {
	link := m.Links[f.ReplyDst.Addr]
	if link != "" && m.Given.may(link, f.Src.Addr, f.ReplyDst.Addr) || !m.Owned(f.ReplyDst.Addr) {
		return link
	}
	if links, _ := m.Routes.Links(f); len(links) == 1 && links[0].Outside&gateway.IPv4 != 0 {
		return links[0].Name
	}
	return link
}

// hold notes that the mapping e has a living flow. It returns false if e does not stand.
func (m *Mapper) hold(e ends) bool {
	link, known := m.known[e]
	if known {
		m.live[elements.Mapping{Link: link, Int: e.in, Ext: e.ext}] = struct{}{}
	}
	return known
}

// Keep renews the mappings of the flows that were seen, and the ports that others use, and ends
// mappings whose hosts may no longer have them. It returns the flows to end as well, which are on
// ports that their hosts may no longer have, and how many mappings had an outside address that
// rules no longer give.
func (m *Mapper) Keep() (ended []cone.Flow, strays int, err error) {
	errs := []error{m.leave(), m.Routes.Close(), m.Kernel.Release(m.twins)}
	live, older := slices.Collect(maps.Keys(m.live)), slices.Collect(maps.Keys(m.older))
	refused := func(ms []elements.Mapping) func(i int, err error) {
		return func(i int, err error) {
			m.applied.flows -= uint64(len(m.ids[ms[i]]))
			switch {
			case !errors.Is(err, elements.ErrOtherMapping):
				errs = append(errs, fmt.Errorf("keep mapping %v -> %v: %w", ms[i].Int, ms[i].Ext, err))
			case m.insides[inside(ms[i])] == 1: // so another mapping has its outside endpoint
				m.applied.missing(SharedPort, len(m.ids[ms[i]]))
			default:
				m.applied.misfit(&m.before, m.ids[ms[i]])
			}
			for _, t := range m.older[ms[i]] {
				m.taken[t] = struct{}{}
			}
		}
	}
	m.Kernel.Keep(live, refused(live))
	m.Kernel.Add(older, refused(older))
	errs = append(errs, m.Kernel.Teach(slices.Concat(live, older)), m.Kernel.Revoke(m.bad))
	errs = append(errs, m.Kernel.Take(slices.Collect(maps.Keys(m.taken))))
	return m.ended, len(m.strays), errors.Join(errs...)
}

// leavesBy reports whether f surely leaves by link, which has its outside address. Rules for
// another link may give that address, too.
func (m *Mapper) leavesBy(f *cone.Flow, link string) bool {
	ways, all := m.Routes.Links(f)
	return all && len(ways) == 1 && ways[0].Name == link
}

// Applied ends the look, and returns its result. left is how many flows our rules left to the
// user's rules so far.
func (m *Mapper) Applied(left uint64) Applied {
	m.applied.settle(&m.before, left)
	return m.applied
}
