package daemon

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/conenatd/conenatd/internal/cone"
	"github.com/conenatd/conenatd/internal/config"
	"github.com/conenatd/conenatd/internal/flows"
	"github.com/conenatd/conenatd/internal/gateway"
	"github.com/conenatd/conenatd/internal/rules"
	"github.com/conenatd/conenatd/internal/rules/elements"
)

// mappingsSize is how many mappings there can be: all ports of some addresses.
const mappingsSize = 1 << 18

// mappingConfig returns what the tables do for subnets with endpoint-independent
// mapping, nil without any. If inside hosts are behind an outside link, flows to them get no
// mapping.
func (f *firewall) mappingConfig(cfg config.Config) *rules.MappingConfig {
	ports := f.ports
	c := &rules.MappingConfig{
		Exempt: slices.Concat(cfg.MappingExempt, f.elsewhere), Served: ports.served,
		// A mapping is refreshed at each reconcile while a flow of it lives.
		Lifetime: max(cfg.Lifetime, 3*cfg.Reconcile), Size: mappingsSize,
		// Long enough for the next reconcile to see that the flow lives and, without a
		// daemon, for as long as conntrack keeps the flow.
		TakenFor: max(ports.udpTimeout, 2*cfg.Reconcile), KeptFor: max(ports.udpTimeout, 3*cfg.Reconcile),
	}
	pools := make(map[config.PortPool][]netip.Prefix)
	for _, s := range cfg.Subnets {
		if s.Mapping == config.EndpointIndependentMapping {
			c.Subnets = append(c.Subnets, s.Prefix)
			pools[cfg.Pool(s)] = append(pools[cfg.Pool(s)], s.Prefix)
		}
		if cfg.Hairpin && s.Prefix.Addr().Is4() {
			c.Hairpin = append(c.Hairpin, s.Prefix)
		}
		if len(f.sides.OneArmed) > 0 && s.Prefix.Addr().Is4() {
			c.Exempt = append(c.Exempt, s.Prefix)
		}
	}
	if len(c.Subnets) == 0 {
		return nil
	}
	for _, wanted := range poolsOf(cfg) {
		p := rules.Pool{Subnets: pools[wanted]}
		for _, r := range ports.pools[wanted] {
			p.Ports = append(p.Ports, rules.PortRange(r))
		}
		c.Pools = append(c.Pools, p)
	}
	return c
}

// wantsMapping reports whether a subnet has endpoint-independent mapping.
func wantsMapping(cfg config.Config) bool {
	return slices.ContainsFunc(cfg.Subnets, func(s config.Subnet) bool { return s.Mapping == config.EndpointIndependentMapping })
}

// A mapper keeps each mapping for as long as one of its flows lives: the kernel does
// that by itself only until the flow is answered. Each dump has a new mapper.
type mapper struct {
	kernel *elements.Mappings
	links  map[cone.Addr]string // names of outside links, by their addresses
	owned  func(cone.Addr) bool // packets to the address end here
	routes *flows.Router
	inside func(cone.Addr) bool // is in a subnet with mappings
	served func(cone.Endpoint) bool
	barred []uint16 // outside ports on which mappings must end, sorted
	exempt []netip.Prefix
	// outdated reports whether the host of a mapping may no longer have its port.
	outdated func(elements.Mapping) bool
	ending   map[ends]struct{} // outdated mappings that stand
	ended    []cone.Flow       // flows on ports of outdated mappings

	given   *given
	strays  []elements.Mapping // their hosts get another outside address now
	formers map[elements.Former]struct{}
	zoned   bool // the rules serve zones of the original direction

	known map[ends]string                       // mappings that stand, and their links
	bad   []elements.Mapping                    // outdated, or on a port that the gateway serves now
	twins []elements.Mapping                    // their outside endpoint is another mapping's, too
	live  map[elements.Mapping]struct{}         // known mappings with a living flow
	older map[elements.Mapping][]elements.Taken // new ones, from flows older than the rules; what these take if refused
	taken map[elements.Taken]struct{}           // ports in use by living flows without a mapping

	insides map[elements.Mapping]int // number of outside endpoints by inside endpoint and link, with those in older

	applied, before applied                       // result of this look, and of the last one
	ids             map[elements.Mapping][]uint32 // IDs of the flows behind each mapping in older
}

// ends are both ends of a mapping.
type ends struct{ in, ext cone.Endpoint }

// newMapper lists the mappings that stand. It returns nil if no subnet has mappings.
func (f *firewall) newMapper(cfg config.Config, network gateway.Network, served *gateway.PortSet) (*mapper, error) {
	c := f.mappingConfig(cfg)
	if c == nil || !f.maps() {
		return nil, nil
	}
	m := &mapper{
		kernel: f.tables.NewMappings(c),
		links:  outsideAddrs(network),
		owned:  network.Owned(),
		routes: f.router(cfg, network),
		inside: cone.NewPrefixTable(c.Subnets).Holds,
		served: served.Serves, barred: f.ports.barred, exempt: c.Exempt, outdated: f.outdated(cfg), zoned: len(f.zonedAddrs()) > 0,
		known:  make(map[ends]string),
		ending: make(map[ends]struct{}),
		live:   make(map[elements.Mapping]struct{}),
		older:  make(map[elements.Mapping][]elements.Taken),
		taken:  make(map[elements.Taken]struct{}),
		ids:    make(map[elements.Mapping][]uint32),
		given:  f.given(c, network), formers: make(map[elements.Former]struct{}),

		insides: make(map[elements.Mapping]int),
	}
	owners := make(map[cone.Endpoint]elements.Mapping)
	if f.mappedAddrs == nil {
		f.mappedAddrs = make(map[cone.Addr]struct{})
	}
	return m, m.kernel.List(func(x elements.Mapping, _ time.Duration) {
		f.mappedAddrs[x.Ext.Addr] = struct{}{}
		if m.stray(x) {
			return
		}
		outdated := m.outdated(x)
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
func (m *mapper) isBarred(port uint16) bool {
	_, barred := slices.BinarySearch(m.barred, port)
	return barred
}

// outsideAddrs returns the names of outside links, by their addresses. A link that only
// shares the network of another one is left out: flows with its address leave by that other
// link.
func outsideAddrs(n gateway.Network) map[cone.Addr]string {
	names := make(map[int]string)
	for _, l := range n.Links {
		if l.Outside&gateway.IPv4 != 0 && l.Cause != gateway.SharedLink {
			names[l.Index] = l.Name
		}
	}
	all := make(map[cone.Addr]string)
	for _, a := range n.Addrs {
		if name, ok := names[a.Link]; ok {
			all[cone.AddrFrom(a.Prefix.Addr())] = name
		}
	}
	return all
}

// see takes in a living flow.
func (m *mapper) see(f *cone.Flow) {
	if !f.Src.Addr.Is4() || cone.IsAnchor(f.Src, f.Dst) {
		return
	}
	if f.ReplyZone != 0 || f.OrigZone != 0 && !m.zoned {
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
		if m.inside(f.Src.Addr) {
			link = m.linkOf(f)
			m.check(f, link)
		}
		if link == "" || m.isBarred(f.ReplyDst.Port) || m.isFormer(link, f.Src.Addr, f.ReplyDst.Addr) {
			m.taken[out] = struct{}{}
			return
		}
		// The flow is older than the rules.
		x := elements.Mapping{Link: link, Int: f.Src, Ext: f.ReplyDst}
		if m.outdated(x) {
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
	case m.owned(f.Src.Addr):
		m.taken[out] = struct{}{}
	case m.owned(f.Dst.Addr) && !m.served(f.Dst) && f.OrigZone == 0:
		m.taken[elements.Taken{Remote: f.Src, Port: f.Dst.Port}] = struct{}{}
	}
}

// linkOf returns the outside link for a mapping of the flow: the link that has the outside
// address, if the rules may give it there, else the link by which the flow leaves. It returns
// none if the address is not the gateway's: the gateway may have lost it.
func (m *mapper) linkOf(f *cone.Flow) string {
	link := m.links[f.ReplyDst.Addr]
	if link != "" && m.given.may(link, f.Src.Addr, f.ReplyDst.Addr) || !m.owned(f.ReplyDst.Addr) {
		return link
	}
	if links, _ := m.routes.Links(f); len(links) == 1 && links[0].Outside&gateway.IPv4 != 0 {
		return links[0].Name
	}
	return link
}

// hold notes that the mapping e has a living flow. It returns false if e does not stand.
func (m *mapper) hold(e ends) bool {
	link, known := m.known[e]
	if known {
		m.live[elements.Mapping{Link: link, Int: e.in, Ext: e.ext}] = struct{}{}
	}
	return known
}

// keep renews the mappings of the flows that were seen, and the ports that others use.
func (m *mapper) keep() error {
	errs := []error{m.routes.Close(), m.kernel.Release(m.twins)}
	live, older := slices.Collect(maps.Keys(m.live)), slices.Collect(maps.Keys(m.older))
	refused := func(ms []elements.Mapping) func(i int, err error) {
		return func(i int, err error) {
			m.applied.flows -= uint64(len(m.ids[ms[i]]))
			switch {
			case !errors.Is(err, elements.ErrOtherMapping):
				errs = append(errs, fmt.Errorf("keep mapping %v -> %v: %w", ms[i].Int, ms[i].Ext, err))
			case m.insides[inside(ms[i])] == 1: // so another mapping has its outside endpoint
				m.applied.missing(sharedPort, len(m.ids[ms[i]]))
			default:
				m.applied.misfit(&m.before, m.ids[ms[i]])
			}
			for _, t := range m.older[ms[i]] {
				m.taken[t] = struct{}{}
			}
		}
	}
	m.kernel.Keep(live, refused(live))
	m.kernel.Add(older, refused(older))
	errs = append(errs, m.kernel.Teach(slices.Concat(live, older)), m.kernel.Revoke(m.bad))
	return errors.Join(append(errs, m.kernel.Take(slices.Collect(maps.Keys(m.taken))))...)
}
